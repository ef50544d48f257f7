"""The Firecracker driver. See drivers.contract.Driver.

A machine's memory builds on a file, as with every driver: pages written since are saved as a sparse
file of the same size. A machine that boots builds on an empty file. Firecracker maps one file only.
So a state that builds on another file is joined with it before it is loaded, and the joined file
replaces the other.
"""

import asyncio
import logging
import os
import re
import shutil
import signal
from collections.abc import Iterator
from contextlib import AsyncExitStack, suppress
from functools import partial
from pathlib import Path

from typing_extensions import override

from sandyard.server.core.errors import (
    ConflictError,
    InternalError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.drivers.binaries import Binary
from sandyard.server.drivers.contract import (
    Capabilities,
    End,
    Handle,
    MachineSpec,
    ProbeSpec,
    Saved,
    SavingDriver,
    SavingMachine,
    Verdict,
)
from sandyard.server.drivers.ends import HALTED, TAIL, Standstill, end_of_guest, says_halted
from sandyard.server.drivers.firecracker.api import Api, Limiter
from sandyard.server.drivers.firecracker.jail import (
    CONSOLE,
    LOG,
    SOCKET,
    Jail,
    open_pipe,
    read_pipe,
    sweep_groups,
)
from sandyard.server.drivers.initrd import add_token
from sandyard.server.drivers.kernels import unpacked_kernel
from sandyard.server.drivers.kvm import NO_KVM, can_open
from sandyard.server.drivers.namespaces import give_tap_to
from sandyard.server.drivers.processes import (
    DetachedProcess,
    boot_id,
    set_nice,
    start_time,
)
from sandyard.server.drivers.programs import output_of
from sandyard.server.drivers.sparse import make_empty, merge_sparse
from sandyard.server.tasks import in_thread

log = logging.getLogger(__name__)

PINNED = "1.12.1"
"""The version that is fetched and tested."""
SUPPORTED = ((1, 12), (1, 13))
"""From this version on, before that one: what is saved, and how, differs in others."""
_KERNEL, _INITRD, _DISK, _MEMORY = "vmlinux", "initrd", "disk", "memory"
# Saved states name their disks. The first one's name is of when there was one.
_ROOTS = ("base", "root")
_STATE, _PAGES, _NET = "device", "pages", "net"
_OWN_SHARE_MIB = 16
_ARGUMENTS = (
    "console=ttyS0 reboot=k panic=-1 pci=off quiet loglevel=3 i8042.noaux i8042.nomux i8042.dumbkbd"
)
_PROBE_PASSED = b"sandyard: probe passed"
_PROBE_MIB = 256
_POLL_S = 0.05
_VERSION_LIMIT_S = 10.0
_RECOVER_LIMIT_S = 60.0
_NOBODY = 65534
_SHUTDOWN = End("guest_shutdown", "the guest shut itself down")
_DIED = End("machine_died", "the hypervisor's process ended unexpectedly")


class FirecrackerMachine(SavingMachine):
    """See drivers.contract.SavingMachine."""

    def __init__(self, process: DetachedProcess, api: Api, jail: Jail, handle: Handle) -> None:
        self._process = process
        self._api = api
        self._jail = jail
        self._handle = handle
        self._console = open_pipe(jail.folder / CONSOLE)
        self._log = open_pipe(jail.folder / LOG)
        self._console_tail = self._last_words = b""
        self._standstill = Standstill()
        self._is_closed = False

    @property
    @override
    def handle(self) -> Handle:
        return self._handle

    @property
    @override
    def version(self) -> str:
        return str(self._handle["version"])

    @property
    @override
    def pid(self) -> int:
        return self._process.pid

    @property
    def api(self) -> Api:
        """The API of the process."""
        return self._api

    def trouble(self) -> str:
        """Return Firecracker's last error message, if any."""
        lines = self._last_words.decode(errors="replace").splitlines()
        problems = [one.split("] ", 1)[-1] for one in lines if re.search(r"rror|xiting|fail", one)]
        return problems[-1][:300] if problems else ""

    @override
    async def console(self) -> bytes:
        output = read_pipe(self._console) if self._console is not None else b""
        self._console_tail = (self._console_tail + output)[-TAIL:]
        if self._log is not None:
            # Needed only at the end, but a full pipe would block Firecracker's log.
            self._last_words = (self._last_words + read_pipe(self._log))[-TAIL:]
        return output

    @override
    async def stall(self) -> End | None:
        """Tell why a halted guest stands still. A full disk is not a reason here: the guest sees an
        I/O error."""
        if says_halted(self._console_tail):
            with suppress(SandyardError):
                stands = self._standstill.is_found(self.pid, _processors_of(self.pid))
                return HALTED if stands and not await self.is_paused() else None
        return None

    @override
    async def wait(self) -> End:
        await self._process.wait()
        await self.console()
        if (end := end_of_guest(self._console_tail)) is not None:
            return end
        return _SHUTDOWN if b"exit_code=0" in self._last_words else _DIED

    @override
    async def stop(self) -> None:
        if self._is_closed:
            return
        await self._process.kill()
        await self._close()
        self._jail.remove()

    @override
    async def detach(self) -> None:
        await self._close()

    async def _close(self) -> None:
        self._is_closed = True
        await self._api.close()
        self._process.close()
        for descriptor in (self._console, self._log):
            if descriptor is not None:
                os.close(descriptor)
        self._console = self._log = None

    @override
    def come_forward(self) -> None:
        set_nice(self.pid, 0)

    @override
    async def pause(self) -> None:
        await self._api.pause()
        await in_thread(_sync, Path(str(self._handle["disk"])))

    @override
    async def resume(self) -> None:
        await self._api.resume()

    @override
    async def is_paused(self) -> bool:
        return await self._api.state() == "Paused"

    @override
    async def save(self, folder: Path) -> Saved:
        """Save the machine's state, and all pages written since it was loaded.

        Firecracker counts what is written from save to save, and lays each time's pages over what
        the file has: so the file stays in the jail for as long as the process lives, whatever
        became of the saves before.
        """
        folder.mkdir(mode=0o700)
        (self._jail.root / _STATE).unlink(missing_ok=True)
        # An earlier version may have saved it, and taken the file away: what was in that is not
        # counted any more.
        is_whole = "group" not in self._handle and not (self._jail.root / _PAGES).exists()
        await self._api.save(state=f"/{_STATE}", memory=f"/{_PAGES}", is_whole=is_whole)
        await in_thread(self._jail.take, _STATE, folder / _STATE)
        await in_thread(self._jail.copy_out, _PAGES, folder / _PAGES)
        return Saved(folder, self.version)

    @override
    async def grow_disk(self, size_mib: int) -> None:
        await in_thread(os.truncate, Path(str(self._handle["disk"])), size_mib * 2**20)
        await self._api.reread_drive(_DISK, f"/{_DISK}")


class FirecrackerDriver(SavingDriver):
    """See drivers.contract.SavingDriver.

    `cache` is a folder for unpacked kernels, `group` names the control group above those of all
    its machines, which is the installation's own. `disk_limiter` and `network_limiter` bound what
    one machine may move, in the form of Firecracker's rate limiters.
    """

    name = "firecracker"
    capabilities = Capabilities(saves=True)

    def __init__(
        self,
        *,
        cache: Path,
        group: str,
        binary: str = "firecracker",
        jailer: str = "jailer",
        disk_limiter: Limiter | None = None,
        network_limiter: Limiter | None = None,
    ) -> None:
        self._cache = cache
        self._group = group
        self._binary = binary
        self._jailer = jailer
        self._programs = (
            Binary(binary, partial(_version_of, "firecracker")),
            Binary(jailer, partial(_version_of, "jailer")),
        )
        self._disk_limiter = disk_limiter
        self._network_limiter = network_limiter
        self._has_swept = False

    @override
    async def version(self) -> str:
        found = []
        for one in self._programs:
            if shutil.which(one.name) is None:
                raise UnavailableError(
                    f"{one.name} is not installed; `sandyard setup firecracker` fetches it"
                )
            found.append(await one.version())
        if found[0] != found[1]:
            raise UnavailableError(
                f"firecracker {found[0]} and jailer {found[1]} do not belong together"
            )
        series = tuple(map(int, found[0].split(".")[:2]))
        if not SUPPORTED[0] <= series < SUPPORTED[1]:
            raise UnavailableError(
                f"Firecracker {found[0]} is not supported: this needs {PINNED} or another of its "
                "series"
            )
        return found[0]

    @override
    async def versions(self) -> list[str]:
        return [await self.version()]

    @override
    async def probe(self, spec: ProbeSpec) -> Verdict:
        try:
            version = await self.version()
            if not can_open():
                return Verdict(False, NO_KVM, is_certain=False)
            spec.scratch.chmod(0o711)
            jail = Jail(spec.scratch, "probe", _NOBODY, self._group)
            try:
                return await self._boot_probe(version, jail, spec)
            finally:
                jail.remove()
        except (OSError, SandyardError) as error:
            # A missing program or a full disk, say: that may change.
            reason = f"a probe machine did not come up: {str(error) or 'no reason'}"
            return Verdict(False, reason, is_certain=False)

    async def _boot_probe(self, version: str, jail: Jail, spec: ProbeSpec) -> Verdict:
        async with AsyncExitStack() as held:
            await in_thread(jail.prepare)
            jail.put(await in_thread(unpacked_kernel, spec.kernel, self._cache), _KERNEL)
            jail.write(_INITRD, spec.initrd.read_bytes())
            process = await self._launch(jail, held, netns=None)
            api = await held.enter_async_context(Api(jail.folder / SOCKET))
            machine = FirecrackerMachine(process, api, jail, {"version": version})
            held.push_async_callback(machine.stop)
            await api.configure(vcpus=1, memory_mib=_PROBE_MIB)
            await api.boot_from(
                kernel=f"/{_KERNEL}",
                initrd=f"/{_INITRD}",
                arguments=f"{_ARGUMENTS} {spec.arguments} sandyard.probe",
            )
            await api.start()
            output, clock = b"", asyncio.get_running_loop().time
            started = clock()
            try:
                async with asyncio.timeout(spec.limit_s):
                    lives = True
                    while lives:
                        # Before its output is read, which may end with what is waited for.
                        lives = start_time(process.pid) is not None
                        output += await machine.console()
                        if _PROBE_PASSED in output:
                            return Verdict(
                                True,
                                f"Firecracker {version}: a probe machine booted",
                                took_s=clock() - started,
                            )
                        await asyncio.sleep(_POLL_S)
            except TimeoutError:
                # A kernel that printed something may only have needed more time.
                return Verdict(
                    False,
                    f"a probe machine did not come up within {spec.limit_s:g} s: its kernel "
                    "does not run under this host's KVM",
                    is_certain=not output,
                )
            why = machine.trouble() or "it ended at once"
            return Verdict(False, f"a probe machine did not boot: {why}")

    @override
    async def start(self, spec: MachineSpec, held: AsyncExitStack) -> FirecrackerMachine:
        memory_mib = spec.memory_mib + _OWN_SHARE_MIB
        spec.memory.unlink(missing_ok=True)
        make_empty(spec.memory, memory_mib)
        jail = Jail(spec.folder, spec.name, spec.place.uid, self._group)
        try:
            kernel = await in_thread(unpacked_kernel, spec.kernel, self._cache)
            await in_thread(self._prepare, jail, spec)
            jail.put(kernel, _KERNEL)
            jail.write(_INITRD, add_token(spec.initrd.read_bytes(), spec.token))
        except FileNotFoundError as error:
            raise InternalError(f"cannot start {spec.name}: {error}") from error
        await give_tap_to(spec.place.netns, spec.place.tap, spec.place.uid)
        try:
            machine = await self._machine(jail, spec, held)
            api = machine.api
            await api.configure(vcpus=spec.vcpus, memory_mib=memory_mib)
            await api.boot_from(
                kernel=f"/{_KERNEL}",
                initrd=f"/{_INITRD}",
                arguments=f"{_ARGUMENTS} {spec.arguments}".strip(),
            )
            for _, name in zip(spec.roots, _ROOTS, strict=False):
                await api.add_drive(name, f"/{name}", is_read_only=True, limiter=self._disk_limiter)
            await api.add_drive(_DISK, f"/{_DISK}", is_read_only=False, limiter=self._disk_limiter)
            await api.add_network(
                _NET, tap=spec.place.tap, mac=spec.place.mac, limiter=self._network_limiter
            )
            await api.add_entropy()
            await api.start()
        except (InternalError, UnavailableError) as error:
            raise type(error)(f"cannot start {spec.name}: {error.message}") from error
        for name in (_KERNEL, _INITRD):
            (jail.root / name).unlink(missing_ok=True)
        return machine

    @override
    async def restore(
        self, spec: MachineSpec, saved: Saved, held: AsyncExitStack
    ) -> FirecrackerMachine:
        size = (spec.memory_mib + _OWN_SHARE_MIB) * 2**20
        if not spec.memory.exists() or spec.memory.stat().st_size != size:
            raise ConflictError(f"cannot restore {spec.name}: its memory file is not whole")
        jail = Jail(spec.folder, spec.name, spec.place.uid, self._group)
        try:
            if (pages := saved.folder / _PAGES).exists():
                await in_thread(_join, spec.memory, pages)
            await in_thread(self._prepare, jail, spec)
            jail.write(_STATE, (saved.folder / _STATE).read_bytes())
            jail.put(spec.memory, _MEMORY)
        except FileNotFoundError as error:
            raise ConflictError(f"cannot restore {spec.name}: {error.filename} is gone") from error
        await give_tap_to(spec.place.netns, spec.place.tap, spec.place.uid)
        machine = await self._machine(jail, spec, held)
        try:
            await machine.api.load(
                state=f"/{_STATE}", memory=f"/{_MEMORY}", network=_NET, tap=spec.place.tap
            )
        except ConflictError as error:
            raise ConflictError(f"cannot restore {spec.name}: {error.message}") from error
        for name in (_STATE, _MEMORY):
            (jail.root / name).unlink(missing_ok=True)
        return machine

    @override
    async def make_whole(self, saved: Saved, memory: Path) -> None:
        pages = saved.folder / _PAGES
        await in_thread(merge_sparse, memory, pages, saved.memory)
        pages.unlink()

    @override
    async def recover(self, handle: Handle, held: AsyncExitStack) -> FirecrackerMachine | None:
        jail = Jail(
            Path(str(handle["folder"])),
            str(handle["name"]),
            int(handle["uid"]),
            str(handle.get("group", "firecracker")),  # the jailer's default
        )
        process = DetachedProcess.find(
            int(handle["pid"]), started=int(handle["started"]), boot=str(handle["boot"])
        )
        if process is None:
            jail.remove()
            return None
        held.push_async_callback(process.kill)
        process.send(
            signal.SIGCONT
        )  # an earlier server may have ended while the process was stopped
        api = Api(jail.folder / SOCKET)
        try:
            # Firecracker does one thing at a time: in the middle of a save that an earlier server
            # began, it says nothing.
            await api.state(limit_s=_RECOVER_LIMIT_S)
            if "version" not in handle:  # of an earlier version of Sandyard
                handle = {**handle, "version": await api.version()}
        except (UnavailableError, InternalError):
            # A machine that cannot be controlled is as good as dead, and must not be left over.
            await process.kill()
            process.close()
            await api.close()
            jail.remove()
            return None
        held.pop_all()
        machine = FirecrackerMachine(process, api, jail, handle)
        held.push_async_callback(machine.stop)
        return machine

    def _prepare(self, jail: Jail, spec: MachineSpec) -> None:
        jail.prepare()
        for path, name in zip(spec.roots, _ROOTS, strict=False):
            jail.put(path, name)
        jail.put(spec.disk, _DISK)

    async def _machine(
        self, jail: Jail, spec: MachineSpec, held: AsyncExitStack
    ) -> FirecrackerMachine:
        process = await self._launch(jail, held, netns=spec.place.netns)
        if spec.background is not None:
            spec.background.add(process)
        started = start_time(process.pid)
        if started is None:
            raise InternalError(f"cannot start {spec.name}: Firecracker ended at once")
        handle: Handle = {
            "pid": process.pid,
            "started": started,
            "boot": boot_id(),
            "folder": str(spec.folder),
            "name": spec.name,
            "uid": spec.place.uid,
            "group": jail.group,
            "disk": str(spec.disk),
            "version": await self.version(),
        }
        machine = FirecrackerMachine(process, Api(jail.folder / SOCKET), jail, handle)
        held.push_async_callback(machine.stop)
        return machine

    async def _launch(
        self, jail: Jail, held: AsyncExitStack, *, netns: str | None
    ) -> DetachedProcess:
        if not self._has_swept:
            self._has_swept = True
            await in_thread(sweep_groups, self._group)
        held.callback(jail.remove)
        pid = await jail.launch(self._jailer, self._binary, netns=netns)
        started = start_time(pid)
        process = None
        if started is not None:
            process = DetachedProcess.find(pid, started=started, boot=boot_id())
        if process is None:
            raise InternalError("Firecracker ended at once")
        held.push_async_callback(process.kill)
        return process


def _join(memory: Path, pages: Path) -> None:
    """Write saved pages over a copy of a memory file and replace the file with it; repeatable.

    Raises:
        ConflictError: the pages belong to a machine with another memory size.
        NoCapacityError: the host's disk is full.
    """
    found = memory.stat()
    if pages.stat().st_size != found.st_size:
        raise ConflictError("the saved memory is not whole")
    part = memory.with_name(memory.name + ".part")
    part.unlink(missing_ok=True)
    merge_sparse(memory, pages, part)
    # A manifest of a state that builds on it has its size and time.
    os.utime(part, ns=(found.st_atime_ns, found.st_mtime_ns))
    part.replace(memory)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _processors_of(pid: int) -> Iterator[int]:
    """Yield the threads of a Firecracker process that run its guest's CPUs."""
    with suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            if (thread / "comm").read_text().startswith("fc_vcpu"):
                yield int(thread.name)


async def _version_of(name: str, binary: str) -> str:
    try:
        output = await output_of([binary, "--version"], limit_s=_VERSION_LIMIT_S)
    except TimeoutError as error:
        raise UnavailableError(f"cannot run {binary}: it does not come to an end") from error
    except OSError as error:
        raise UnavailableError(f"cannot run {binary}: {error.strerror or error}") from error
    match = re.search(rb"v(\d+\.\d+\.\d+)", output)
    if match is None:
        raise UnavailableError(f"cannot tell the version of {name} from {output[:80]!r}")
    return match[1].decode()
