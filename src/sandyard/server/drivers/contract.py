"""What a hypervisor must be able to do, and the specification of a machine.

Configuration is complete before the machine exists: a driver gets one frozen MachineSpec. Every
implementation passes `tests/contract/test_drivers.py`.
"""

from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from typing_extensions import override

from sandyard.server.drivers.background import Entry

Handle = Mapping[str, str | int]


@dataclass(frozen=True)
class Place:
    """A machine's place on its host: network namespace and tap, and the account it runs under.

    `ip` is the address at which the node reaches the machine. The machine's own address is the same
    in every place.
    """

    number: int
    netns: str
    tap: str
    mac: str
    ip: str
    uid: int


@dataclass(frozen=True)
class MachineSpec:
    """The complete specification of a machine.

    `roots` are the read-only disks, shared between machines, in the order in which the guest sees
    them; `disk` follows them and is the machine's own. `memory` is the file from which its memory
    is loaded: it is mapped privately and never written, so that many machines share its pages. A
    start without one makes an empty one. `token` is the first that the agent accepts. `folder` is
    for the driver's sockets; it exists, belongs to the place's account, and its path is short
    enough for a socket.
    """

    name: str
    vcpus: int
    memory_mib: int
    kernel: Path
    initrd: Path
    roots: tuple[Path, ...]
    disk: Path
    memory: Path
    folder: Path
    place: Place
    token: str = field(default="", repr=False)
    has_acpi: bool = True
    """Whether the kernel finds devices by ACPI; for others they are on the command line."""
    arguments: str = ""
    """Additional kernel parameters."""
    background: Entry | None = None
    """Takes in the hypervisor of a machine that no caller waits for."""


@dataclass(frozen=True)
class ProbeSpec:
    """The specification of a probe machine; for the files to boot see MachineSpec.

    `scratch` is an empty folder for the probe's files; `limit_s` limits the wait for its first
    program.
    """

    kernel: Path
    initrd: Path
    scratch: Path
    limit_s: float
    arguments: str = ""
    has_acpi: bool = True


@dataclass(frozen=True)
class Saved:
    """The saved state of a machine, without its disk.

    It builds on the memory file that its machine was started from, which is needed to restore it.
    After `SavingDriver.make_whole` it builds on `memory` in its own folder instead.
    """

    folder: Path
    version: str
    """The version of the hypervisor that wrote it."""

    @property
    def memory(self) -> Path:
        """The memory file of a state that depends on no other."""
        return self.folder / "memory"


@dataclass(frozen=True)
class Capabilities:
    """What a driver can do beyond starting and stopping machines."""

    saves: bool
    """Its machines are `SavingMachine`s and it is a `SavingDriver`."""


@dataclass(frozen=True)
class Verdict:
    """Whether a driver can be used on this host, and a sentence that says why not.

    A verdict that is not certain (the host was too busy, a device was not accessible) must not be
    cached. `took_s` is how long a probe machine took to its first program, if it got there.
    """

    is_usable: bool
    reason: str
    is_certain: bool = True
    took_s: float | None = None


@dataclass(frozen=True)
class End:
    """How a machine ended: a code for programs, a sentence for people."""

    code: str
    message: str


class Machine(Protocol):
    """A started machine: a hypervisor's process with a guest in it."""

    @property
    def handle(self) -> Handle:
        """What a later process needs to `recover` this machine."""
        ...

    @property
    def pid(self) -> int:
        """The process id of the hypervisor."""
        ...

    async def console(self) -> bytes:
        """Return the console output since the last call; its size is limited."""
        ...

    async def stall(self) -> End | None:
        """Return why the machine stands still although its process lives, or None.

        If it stands still because the host's disk is full, this call resumes it once there is
        space; the next call shows that.

        The code `powered_off` means that it says on its console that it has halted, and has not run
        since a call at least a second ago. It may only be idle: if its agent does not answer, it
        has ended.
        """
        ...

    async def wait(self) -> End:
        """Return once the machine has ended, even if that was before the call."""
        ...

    async def stop(self) -> None:
        """End the machine, and return once everything of it is released. May be repeated.

        Raises:
            UnavailableError: the process did not end.
        """
        ...

    async def detach(self) -> None:
        """Release the machine, which continues and can be found by `recover`."""
        ...

    def come_forward(self) -> None:
        """Give a machine that was started in the background its share of the CPUs."""
        ...


class SavingMachine(Machine, Protocol):
    """A machine that can be suspended and saved."""

    @property
    def version(self) -> str:
        """The version of the hypervisor that runs it, which may have been replaced since."""
        ...

    async def pause(self) -> None:
        """Suspend the guest, and sync its disk."""
        ...

    async def resume(self) -> None:
        """Resume the guest; does nothing if it runs."""
        ...

    async def is_paused(self) -> bool:
        """Tell whether the guest is suspended."""
        ...

    async def save(self, folder: Path) -> Saved:
        """Write the state of a suspended machine to a new folder; the caller syncs the files.

        Raises:
            NoCapacityError: the host's disk is full.
        """
        ...

    async def grow_disk(self, size_mib: int) -> None:
        """Enlarge the machine's disk; the guest sees it at once."""
        ...


class Driver(Protocol):
    """One hypervisor."""

    @property
    def name(self) -> str:
        """The driver's name, as the API shows it."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What it can do beyond starting and stopping machines."""
        ...

    async def version(self) -> str:
        """Return the hypervisor's version.

        Raises:
            UnavailableError: it is not installed.
        """
        ...

    async def probe(self, spec: ProbeSpec) -> Verdict:
        """Find out whether a machine boots here with this kernel; does not raise if it does not."""
        ...

    async def start(self, spec: MachineSpec, held: AsyncExitStack) -> Machine:
        """Start a machine, and push the release of every host resource on `held` as it is acquired.

        Raises:
            InternalError: it could not be started; the message says why.
            UnavailableError: the hypervisor is missing, or cannot be used here.
        """
        ...

    async def recover(self, handle: Handle, held: AsyncExitStack) -> Machine | None:
        """Find the machine of a handle, and push the release of its resources on `held`.

        Return None if it has ended; then `held` releases what it left.
        """
        ...


class SavingDriver(Driver, Protocol):
    """A hypervisor that can restore machines."""

    async def versions(self) -> Sequence[str]:
        """Return the versions of the hypervisor that are installed, and restore what they saved.
        The first one starts new machines.

        Raises: see `version`.
        """
        ...

    @override
    async def start(self, spec: MachineSpec, held: AsyncExitStack) -> SavingMachine:
        """See `Driver.start`."""
        ...

    async def restore(self, spec: MachineSpec, saved: Saved, held: AsyncExitStack) -> SavingMachine:
        """Start a machine from a saved state, suspended. See `start`.

        Raises:
            ConflictError: the hypervisor refuses the saved state.
        """
        ...

    async def make_whole(self, saved: Saved, memory: Path) -> None:
        """Make a saved state independent of the memory file that it builds on.

        Raises:
            NoCapacityError: the host's disk is full.
        """
        ...
