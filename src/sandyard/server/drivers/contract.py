"""What a hypervisor must be able to do, and what it is given to do it.

Configuration comes first, the machine second: a driver gets one complete frozen MachineSpec and
never a half-built object to fill in. Every implementation passes `tests/contract/test_drivers.py`.
"""

from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from sandyard.server.drivers.background import Entry

Handle = Mapping[str, str | int]


@dataclass(frozen=True)
class Place:
    """Where a machine stands on its host: its namespace and tap, and the account it runs under.

    `ip` is the address under which the node's host reaches the machine; the machine's own address
    is the same in every place.
    """

    number: int
    netns: str
    tap: str
    mac: str
    ip: str
    uid: int


@dataclass(frozen=True)
class MachineSpec:
    """Everything a machine is made of.

    `base` is shared and only read; `disk` is the machine's own. `memory` is the file that the
    machine's memory starts from: it is mapped privately and never written, so that many machines
    share its pages; a start that finds none makes one that is empty. `token` is what the agent
    will accept first. `folder` is for the driver's sockets; it is there already, belongs to the
    place's account and is short enough for a socket's path.
    """

    name: str
    vcpus: int
    memory_mib: int
    kernel: Path
    initrd: Path
    base: Path
    disk: Path
    memory: Path
    folder: Path
    place: Place
    token: str = field(default="", repr=False)
    has_acpi: bool = True
    """Whether the kernel finds devices by ACPI; one that does not is told of them otherwise."""
    arguments: str = ""
    """What the kernel is told besides."""
    background: Entry | None = None
    """Takes in the hypervisor of a machine that no caller waits for."""


@dataclass(frozen=True)
class ProbeSpec:
    """What a probe machine is made of: what it boots is as in MachineSpec.

    `scratch` is an empty folder of the caller's for the probe's files; `limit_s` is how long its
    first program may be waited for.
    """

    kernel: Path
    initrd: Path
    scratch: Path
    limit_s: float
    arguments: str = ""
    has_acpi: bool = True


@dataclass(frozen=True)
class Saved:
    """What a machine was at one moment, but for its disk.

    The state builds on the memory file that its machine started from, which must be given again;
    after `SavingDriver.make_whole` it builds on the file `memory` in its own folder instead.
    """

    folder: Path

    @property
    def memory(self) -> Path:
        """The memory file of a state that stands alone."""
        return self.folder / "memory"


@dataclass(frozen=True)
class Capabilities:
    """What a driver can do beyond starting and stopping."""

    saves: bool
    """Its machines are `SavingMachine`s and it is a `SavingDriver`."""


@dataclass(frozen=True)
class Verdict:
    """Whether a driver can be used on this host, and why not, in a sentence.

    A verdict that is not certain (the host was too busy to tell, a device is closed and may be open
    next time) is not to be remembered. `took_s` is how long a machine took until its first program
    ran, where one came so far.
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
    """A machine that was started: the process of a hypervisor with a guest in it."""

    @property
    def handle(self) -> Handle:
        """What to store so that a later process can `recover` this machine."""
        ...

    @property
    def pid(self) -> int:
        """The process id of the hypervisor."""
        ...

    async def console(self) -> bytes:
        """Return what the guest printed on its console since the last call; bounded."""
        ...

    async def stall(self) -> End | None:
        """Return why the machine stands still although it lives, None if it does not.

        A machine that stands still because the host's disk is full goes on by itself when there is
        room again and this is called; that it does so is told by the next call.

        With the code `powered_off` it says that it has halted, and has not run since a call a
        second or more ago. It may only have been idle: if its agent does not answer, it has ended.
        """
        ...

    async def wait(self) -> End:
        """Return once the machine has ended, also if that was before the call."""
        ...

    async def stop(self) -> None:
        """Return once nothing of the machine is left; at once if nothing is.

        Raises:
            UnavailableError: the process would not go away.
        """
        ...

    async def detach(self) -> None:
        """Let go of the machine, which lives on, to be found again by `recover`."""
        ...

    def come_forward(self) -> None:
        """Let a machine that was started ahead have its share of the processors from now on."""
        ...


class SavingMachine(Machine, Protocol):
    """A machine that can be held still, and whose state can be written down."""

    async def pause(self) -> None:
        """Hold the guest still; its memory stays where it is, its disk is synced."""
        ...

    async def resume(self) -> None:
        """Let a guest that is held still go on; nothing happens if it runs."""
        ...

    async def is_paused(self) -> bool:
        """Tell whether the guest is held still."""
        ...

    async def save(self, folder: Path) -> Saved:
        """Write the state of a machine that is held still to a new folder; whoever keeps it syncs
        what is in there.

        Raises:
            NoCapacityError: the host's disk is full.
        """
        ...

    async def grow_disk(self, size_mib: int) -> None:
        """Make the machine's disk larger; the guest sees it at once."""
        ...


class Driver(Protocol):
    """One hypervisor."""

    @property
    def name(self) -> str:
        """The driver's name, as the API shows it."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What it can do beyond starting and stopping."""
        ...

    async def version(self) -> str:
        """Return the hypervisor's version.

        Raises:
            UnavailableError: it is not installed.
        """
        ...

    async def probe(self, spec: ProbeSpec) -> Verdict:
        """Find out whether a machine of this kernel really boots here; never raises for that."""
        ...

    async def start(self, spec: MachineSpec, held: AsyncExitStack) -> Machine:
        """Start a machine; push the release of every host resource on `held` as it is taken.

        Raises:
            InternalError: it could not be started; the message says why.
            UnavailableError: the hypervisor is missing or cannot be used here.
        """
        ...

    async def recover(self, handle: Handle, held: AsyncExitStack) -> Machine | None:
        """Find the machine behind a stored handle, pushing on `held` what it still holds.

        None if it has died; then `held` releases what the dead machine left.
        """
        ...


class SavingDriver(Driver, Protocol):
    """A hypervisor that can start a machine from a saved one."""

    async def start(self, spec: MachineSpec, held: AsyncExitStack) -> SavingMachine:
        """See `Driver.start`."""
        ...

    async def restore(self, spec: MachineSpec, saved: Saved, held: AsyncExitStack) -> SavingMachine:
        """Start a machine where a saved one stood still, and hold it still there. See `start`.

        Raises:
            ConflictError: the saved state does not fit this version or this spec.
        """
        ...

    async def make_whole(self, saved: Saved, memory: Path) -> None:
        """Make a saved state stand alone, where it built on a memory file.

        Raises:
            NoCapacityError: the host's disk is full.
        """
        ...
