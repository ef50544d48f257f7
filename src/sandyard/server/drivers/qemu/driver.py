"""The QEMU driver. See drivers.contract.Driver."""

import asyncio
import base64
import contextlib
import logging
import os
import shutil
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, contextmanager
from pathlib import Path
from typing import Self

from typing_extensions import override

from sandyard.server.core.errors import (
    ConflictError,
    InternalError,
    NoCapacityError,
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
from sandyard.server.drivers.ends import (
    HALTED,
    PANICKED,
    TAIL,
    Standstill,
    end_of_guest,
    says_halted,
)
from sandyard.server.drivers.initrd import add_token
from sandyard.server.drivers.kvm import DEVICE, NO_KVM, can_open
from sandyard.server.drivers.namespaces import open_tap, path_of
from sandyard.server.drivers.processes import (
    DetachedProcess,
    boot_id,
    kill_all_of,
    set_nice,
    small_pages,
    start_time,
)
from sandyard.server.drivers.programs import opened_as_written_by, output_of
from sandyard.server.drivers.qemu import command, memory
from sandyard.server.drivers.qemu.kvm import Door, door
from sandyard.server.drivers.qemu.monitor import Monitor
from sandyard.server.drivers.qemu.tsc import measure_khz
from sandyard.server.drivers.sparse import full_or_broken, make_empty
from sandyard.server.tasks import concurrently, in_thread, to_the_end

log = logging.getLogger(__name__)

_START_LIMIT_S = 30.0
_ENDING_S = 1.0
_LOAD_LIMIT_S = 30.0
_POLL_S = 0.002
_ONE_ARENA = {"MALLOC_ARENA_MAX": "1"}  # of several, each keeps pages that it has no use for
_PAGES = "pages"
_STATE_MAX = 64 * 2**20
_LITTLE_ROOM = 8 * 2**20
_STILL = frozenset({"paused", "prelaunch", "postmigrate", "inmigrate", "io-error"})
_NOBODY = 65534
_PROBE_POLL_S = 0.05
_PROBE_MIB = 256
_PASSED = "a probe machine booted"
_PROBE_PASSED = b"sandyard: probe passed"
_NO_DEVICE_OPTION = "kvm-accel.device"
_TOO_OLD = (
    f"{DEVICE} is open to root alone, which needs QEMU 8.2 or later; open it to a group: "
    f"chgrp kvm {DEVICE} && chmod 660 {DEVICE}"
)
_BROKEN_STATUS = "internal-error"
_BROKEN = End("machine_died", "the host's KVM could not go on with the guest")
_SHUTDOWN = End("guest_shutdown", "the guest shut itself down")
_DIED = End("machine_died", "the hypervisor's process ended unexpectedly")
_DISK_FULL = End(
    "host_disk_full", "the host's disk is full; the sandbox continues once there is space"
)


class QemuMachine(SavingMachine):
    """See drivers.contract.SavingMachine."""

    def __init__(self, process: DetachedProcess, monitor: Monitor, handle: Handle) -> None:
        self._process = process
        self._monitor = monitor
        self._handle = handle
        self._uid = int(handle["uid"])
        self._is_closed = self._is_held = False
        self._console_tail = self._unheard = b""
        self._standstill = Standstill()

    @property
    @override
    def handle(self) -> Handle:
        return self._handle

    @property
    @override
    def pid(self) -> int:
        return self._process.pid

    @property
    @override
    def version(self) -> str:
        return str(self._handle["version"])

    @override
    async def console(self) -> bytes:
        arguments = {"device": command.CONSOLE, "size": command.CONSOLE_SIZE, "format": "base64"}
        with contextlib.suppress(UnavailableError):
            data = await self._monitor.call("ringbuf-read", arguments)
            if isinstance(data, str):
                output = base64.b64decode(data)
                self._console_tail = (self._console_tail + output)[-TAIL:]
                # What was read for the machine's end is also part of the next answer.
                output, self._unheard = self._unheard + output, b""
                return output
        return b""

    @override
    async def stall(self) -> End | None:
        try:
            status = await self._monitor.status()
        except UnavailableError:
            return None
        if status == _BROKEN_STATUS:
            self._monitor.found_ended(status)
        if status == "running" and await self._has_halted():
            return HALTED
        if status != "io-error":
            return None
        if not self._is_held:  # it may be about to be saved since the status was asked for
            # Whether it continues shows only once it has written again: at the next call.
            with contextlib.suppress(UnavailableError):
                await self._monitor.call("cont")
        return _DISK_FULL

    async def _has_halted(self) -> bool:
        if not says_halted(self._console_tail):
            return False
        with contextlib.suppress(UnavailableError):
            return self._standstill.is_found(self.pid, await self._monitor.processors())
        return False

    @override
    async def wait(self) -> End:
        async with asyncio.TaskGroup() as tasks:
            died = tasks.create_task(self._process.wait())
            ended = tasks.create_task(self._guest_end())
            await asyncio.wait([died, ended], return_when=asyncio.FIRST_COMPLETED)
            end = _DIED if died.done() else ended.result()
            died.cancel()
            ended.cancel()
        return end

    @override
    async def stop(self) -> None:
        if self._is_closed:
            return
        # No orderly shutdown is needed: the disk is discarded, or has a journal.
        await self._process.kill()
        self._is_closed = True
        await self._monitor.close()
        self._process.close()

    @override
    async def detach(self) -> None:
        await self._monitor.close()
        self._process.close()
        self._is_closed = True

    @override
    def come_forward(self) -> None:
        set_nice(self.pid, 0)

    @override
    async def pause(self) -> None:
        self._is_held = True
        try:
            await self._monitor.call("stop")
        except SandyardError:
            self._is_held = False
            raise

    @override
    async def resume(self) -> None:
        self._is_held = False
        await self._monitor.call("cont")

    @override
    async def is_paused(self) -> bool:
        return await self._monitor.status() in _STILL

    @override
    async def save(self, folder: Path) -> Saved:
        folder.mkdir(mode=0o700)
        memory_file = Path(str(self._handle["memory"]))
        # Concurrently: the guest is suspended, and neither writes to its memory.
        pages = in_thread(memory.save_pages, self.pid, memory_file, folder / _PAGES)
        async with concurrently(pages) as saving:
            await self._save_devices(folder)
            await asyncio.wait([saving])
        return Saved(folder, self.version)

    async def _save_devices(self, folder: Path) -> None:
        # QEMU writes where its own account may; the state is taken from there.
        written = Path(str(self._handle["qmp"])).parent / "saving"
        written.unlink(missing_ok=True)
        try:
            await self._monitor.call(
                "xen-save-devices-state", {"filename": str(written), "live": False}
            )
            await in_thread(_take_file, written, folder / command.DEVICE_STATE, self._uid)
        except OSError as error:
            raise full_or_broken(error, "save the machine") from error
        except UnavailableError as error:
            # QEMU says that an I/O error occurred, not which.
            if shutil.disk_usage(written.parent).free > _LITTLE_ROOM:
                raise
            raise NoCapacityError(
                "cannot save the machine: the host's disk is full; free some space"
            ) from error
        finally:
            written.unlink(missing_ok=True)

    @override
    async def grow_disk(self, size_mib: int) -> None:
        await self._monitor.call("block_resize", {"device": command.DISK, "size": size_mib * 2**20})

    async def load(self, memory_file: Path, saved: Saved, state: Path) -> None:
        """Restore a machine that waits for a saved state; the guest is suspended.

        Raises:
            ConflictError: the state is incomplete, or does not fit.
        """
        if (pages := saved.folder / _PAGES).exists():
            try:
                await in_thread(memory.load_pages, self.pid, memory_file, pages)
            except (OSError, InternalError) as error:
                raise UnavailableError(f"cannot write QEMU's memory: {error}") from error
        await self._monitor.call("migrate-incoming", {"uri": f"file:{state}"})
        async with asyncio.timeout(_LOAD_LIMIT_S):
            while (status := await self._monitor.migration()) not in ("completed", "failed"):
                await asyncio.sleep(_POLL_S)
        if status == "failed":
            raise ConflictError("the saved state does not fit this QEMU")

    async def _guest_end(self) -> End:
        status = await self._first_status()
        if status not in ("shutdown", "guest-panicked", _BROKEN_STATUS):
            status = await self._monitor.ending()
        if status in ("GUEST_PANICKED", "guest-panicked"):
            return PANICKED
        self._unheard += await self.console()
        return end_of_guest(self._console_tail) or (
            _BROKEN if status == _BROKEN_STATUS else _SHUTDOWN
        )

    async def _first_status(self) -> str:
        # An event that came before this connection is lost; the run state is not.
        with contextlib.suppress(UnavailableError):
            return await self._monitor.status()
        return ""


class _EndedError(Exception):
    """QEMU ended while it was starting; its standard error says why."""


class _Stderr:
    """QEMU's standard error until it has started.

    It is a pipe that is closed after that, so that a guest cannot make QEMU fill a file.
    """

    def __init__(self) -> None:
        self._reader, self.writer = os.pipe()
        os.set_blocking(self._reader, False)
        self._tail = b""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exit: object) -> None:
        self.close_writer()
        os.close(self._reader)

    def close_writer(self) -> None:
        """Close our copy of the writing end, so that QEMU's end can be detected."""
        if self.writer >= 0:
            os.close(self.writer)
            self.writer = -1

    def has_more(self) -> bool:
        """Read what has arrived; return False once all writers have ended."""
        return self._read() != b""

    def rest(self) -> str:
        """Return the end of what has arrived."""
        while self._read():
            pass
        return self._tail.decode(errors="replace").strip()

    def _read(self) -> bytes | None:
        try:
            data = os.read(self._reader, 4096)
        except BlockingIOError:
            return None
        self._tail = (self._tail + data)[-1000:]
        return data


class QemuDriver(SavingDriver):
    """See drivers.contract.SavingDriver. `accel` is kvm or tcg; `tb_size_mib` is how much
    translated code a machine may keep, by its memory if it is None. `kept_binaries` are of other
    versions: they restore what they have saved."""

    capabilities = Capabilities(saves=True)

    def __init__(
        self,
        *,
        accel: str,
        binary: str = "qemu-system-x86_64",
        kept_binaries: Sequence[str] = (),
        tb_size_mib: int | None = None,
        mounts: Path | None = None,
    ) -> None:
        self._mounts = mounts
        self._accel = accel
        self._binary = Binary(binary, _version_of)
        self._kept_binaries = [Binary(one, _version_of) for one in kept_binaries]
        self._tb_size_mib = tb_size_mib
        self._tsc_khz: int | None = None

    @property
    @override
    def name(self) -> str:
        return f"qemu-{self._accel}"

    @override
    async def version(self) -> str:
        try:
            return await self._binary.version()
        except UnavailableError as error:
            raise UnavailableError(
                f"{error.message}; install the package qemu-system-x86"
            ) from error

    @override
    async def versions(self) -> list[str]:
        found = [await self.version()]
        for one in self._kept_binaries:
            with contextlib.suppress(UnavailableError):
                found.append(await one.version())
        return found

    async def _binary_of(self, version: str) -> Binary:
        for one in self._kept_binaries:
            with contextlib.suppress(UnavailableError):
                if version != await self.version() and version == await one.version():
                    return one
        return self._binary

    @override
    async def probe(self, spec: ProbeSpec) -> Verdict:
        console = spec.scratch / "console"
        try:
            version = await self.version()
            if self._accel == "kvm" and not can_open():
                return Verdict(False, NO_KVM, is_certain=False)
            with self._door() as way:
                options = [
                    "-M", f"microvm,acpi={'on' if spec.has_acpi else 'off'},rtc=on",
                    *command.accelerator(way, tb_size_mib=self._tb_size(_PROBE_MIB)),
                    "-m", f"{_PROBE_MIB}M",
                    "-kernel", str(spec.kernel), "-initrd", str(spec.initrd),
                    "-append", command.kernel_command_line(
                        tsc_khz=await self._rate(), extra=f"{spec.arguments} sandyard.probe"
                    ),
                    "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
                    "-serial", f"file:{console}",
                ]  # fmt: skip
                # As a real machine runs, so that a device closed to that account counts as closed;
                # and with an end of its own, should this process not live to end it.
                os.chown(spec.scratch, _NOBODY, _NOBODY)
                own_end = ["timeout", "--signal=KILL", f"{spec.limit_s + 5:g}"]
                confined = command.unprivileged(_NOBODY, group=_group(way))
                started = time.monotonic()
                command_line = [*own_end, *confined, self._binary.name, *options]
                probing = output_of(command_line, limit_s=spec.limit_s, pass_fds=_fds(way))
                async with concurrently(probing) as running:
                    # Its end is not waited for: there are hosts that bring up a machine, and
                    # cannot reset it.
                    while not running.done() and not _has_passed(console):
                        await asyncio.wait([running], timeout=_PROBE_POLL_S)
                    took_s = time.monotonic() - started
                    output = running.result() if running.done() else b""
        except TimeoutError:
            # With KVM a kernel speaks within a second, if it runs at all: one that was silent for
            # so long is not tried again at each start. Emulated, it may have lacked the time.
            is_silent = self._accel == "kvm" and not (console.exists() and console.stat().st_size)
            why = ": its kernel does not run under this host's KVM" if is_silent else ""
            return Verdict(
                False,
                f"a probe machine did not come up within {spec.limit_s:g} s{why}",
                is_certain=is_silent,
            )
        except (OSError, SandyardError) as error:
            problem = (str(error) or "no end in time").splitlines()[0]
            if _has_passed(console):  # how it ended does not matter any more
                return Verdict(True, _PASSED)
            if _NO_DEVICE_OPTION in problem:
                return Verdict(False, _TOO_OLD, is_certain=False)
            # A missing program or a full disk, say: that may change.
            reason = f"a probe machine did not come up: {problem}"
            return Verdict(False, reason, is_certain=False)
        if _has_passed(console):
            return Verdict(True, f"QEMU {version}: {_PASSED}", took_s=took_s)
        last = output.decode(errors="replace").strip().splitlines()[:1]
        return Verdict(False, f"a probe machine did not boot: {last[0] if last else 'no reason'}")

    @override
    async def start(self, spec: MachineSpec, held: AsyncExitStack) -> QemuMachine:
        if not spec.memory.exists():
            make_empty(spec.memory, command.machine_memory_mib(spec.memory_mib))
        return await self._start(spec, held, self._binary, is_restored=False)

    @override
    async def restore(self, spec: MachineSpec, saved: Saved, held: AsyncExitStack) -> QemuMachine:
        size = command.machine_memory_mib(spec.memory_mib) * 2**20
        if not spec.memory.exists() or spec.memory.stat().st_size != size:
            raise ConflictError(f"cannot restore {spec.name}: its memory file is not whole")
        state = spec.folder / command.DEVICE_STATE
        binary = await self._binary_of(saved.version)
        try:
            _place(saved.folder / command.DEVICE_STATE, state, spec.place.uid)
            machine = await self._start(spec, held, binary, is_restored=True)
            try:
                await machine.load(spec.memory, saved, state)
            except UnavailableError as error:
                # QEMU ends when it cannot load a state; but it may have been killed, and then the
                # state is good. Twice in a row says that it is not.
                log.warning("cannot restore %s, trying once more: %s", spec.name, error.message)
                await machine.stop()
                machine = await self._start(spec, held, binary, is_restored=True)
                await _load_or_refuse(machine, spec, saved, state)
        except FileNotFoundError as error:
            raise ConflictError(f"cannot restore {spec.name}: {error.filename} is gone") from error
        except TimeoutError as error:
            raise InternalError(f"cannot restore {spec.name}: QEMU does not come up") from error
        finally:
            state.unlink(missing_ok=True)
        return machine

    @override
    async def make_whole(self, saved: Saved, memory_file: Path) -> None:
        pages = saved.folder / _PAGES
        await in_thread(memory.merge, memory_file, pages, saved.memory)
        pages.unlink()

    async def _start(
        self, spec: MachineSpec, held: AsyncExitStack, binary: Binary, *, is_restored: bool
    ) -> QemuMachine:
        # Files of an earlier attempt must not be mistaken for this one's.
        for name in (command.PID_FILE, command.QMP_SOCKET, command.INITRD):
            (spec.folder / name).unlink(missing_ok=True)
        if not is_restored:
            try:
                _make_initrd(spec)
            except FileNotFoundError as error:
                raise InternalError(f"cannot start {spec.name}: {error}") from error
        with _Stderr() as stderr:
            try:
                return await self._start_heard(spec, held, binary, stderr, is_restored=is_restored)
            except _EndedError as error:
                reason = stderr.rest() or "QEMU ended at once"
                raise InternalError(f"cannot start {spec.name}: {reason}") from error

    async def _start_heard(
        self,
        spec: MachineSpec,
        held: AsyncExitStack,
        binary: Binary,
        stderr: _Stderr,
        *,
        is_restored: bool,
    ) -> QemuMachine:
        tap_fd = await open_tap(spec.place.netns, spec.place.tap)
        try:
            with self._door() as way:
                arguments = command.machine_arguments(
                    spec,
                    door=way,
                    tb_size_mib=self._tb_size(spec.memory_mib),
                    tsc_khz=await self._rate(),
                    tap_fd=tap_fd,
                    is_restored=is_restored,
                )
                version = await binary.version()
                confined = command.confined(
                    binary.name, arguments, spec, group=_group(way), mounts=self._mounts
                )
                # If this were interrupted, it would not run under its own account yet.
                pid = await to_the_end(_launch(confined, (tap_fd, *_fds(way)), spec, stderr))
        except BaseException:
            await to_the_end(kill_all_of(spec.place.uid, path_of(spec.place.netns)))
            raise
        finally:
            os.close(tap_fd)
        process = _take_hold(pid, held)
        if spec.background is not None:
            spec.background.add(process)
        try:
            monitor = await Monitor.connect(spec.folder / command.QMP_SOCKET, pid=process.pid)
        except UnavailableError as error:
            # Some errors show only after it listens.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_ENDING_S):
                    await process.wait()
            if start_time(process.pid) is None:
                raise _EndedError from error
            raise UnavailableError(f"cannot start {spec.name}: {error.message}") from error
        started = start_time(process.pid)
        if started is None:
            await monitor.close()
            raise _EndedError
        handle: Handle = {
            "pid": process.pid,
            "started": started,
            "boot": boot_id(),
            "qmp": str(spec.folder / command.QMP_SOCKET),
            "memory": str(spec.memory),
            "uid": spec.place.uid,
            "version": version,
        }
        return self._machine(process, monitor, handle, held)

    @override
    async def recover(self, handle: Handle, held: AsyncExitStack) -> QemuMachine | None:
        process = DetachedProcess.find(
            int(handle["pid"]), started=int(handle["started"]), boot=str(handle["boot"])
        )
        if process is None:
            return None
        held.push_async_callback(process.kill)
        process.send(
            signal.SIGCONT
        )  # an earlier server may have ended while the process was stopped
        try:
            monitor = await Monitor.connect(Path(str(handle["qmp"])), pid=process.pid)
        except UnavailableError:
            # A machine that cannot be controlled is as good as dead, and must not be left over.
            await process.kill()
            return None
        if "version" not in handle:  # of an earlier version of Sandyard
            handle = {**handle, "version": await monitor.version()}
        held.pop_all()
        return self._machine(process, monitor, handle, held)

    def _machine(
        self, process: DetachedProcess, monitor: Monitor, handle: Handle, held: AsyncExitStack
    ) -> QemuMachine:
        machine = QemuMachine(process, monitor, handle)
        held.push_async_callback(machine.stop)
        return machine

    @contextmanager
    def _door(self) -> Iterator[Door | None]:
        with ExitStack() as held:
            way = None
            if self._accel == "kvm":
                try:
                    way = held.enter_context(door())
                except OSError as error:
                    raise UnavailableError(
                        f"{DEVICE} cannot be opened: {error.strerror}"
                    ) from error
            yield way

    def _tb_size(self, memory_mib: int) -> int:
        if self._tb_size_mib is not None:
            return self._tb_size_mib
        return command.translated_mib(memory_mib)

    async def _rate(self) -> int | None:
        if self._accel == "kvm":
            return None
        if self._tsc_khz is None:
            self._tsc_khz = await in_thread(measure_khz)
        return self._tsc_khz


async def _version_of(binary: str) -> str:
    try:
        output = await output_of([binary, "--version"], limit_s=_START_LIMIT_S)
    except (OSError, ChildProcessError, TimeoutError) as error:
        raise UnavailableError(f"cannot run {binary}: {error}") from error
    words = output.decode(errors="replace").split()
    return words[words.index("version") + 1] if "version" in words else "unknown"


def _take_hold(pid: int, held: AsyncExitStack) -> DetachedProcess:
    started = start_time(pid)
    process = None
    if started is not None:
        process = DetachedProcess.find(pid, started=started, boot=boot_id())
    if process is None:
        raise _EndedError
    held.push_async_callback(process.kill)
    return process


def _make_initrd(spec: MachineSpec) -> None:
    """Make an initramfs with the machine's own token."""
    data = add_token(spec.initrd.read_bytes(), spec.token)
    _write_private(spec.folder / command.INITRD, data, spec.place.uid)


async def _load_or_refuse(
    machine: QemuMachine, spec: MachineSpec, saved: Saved, state: Path
) -> None:
    try:
        await machine.load(spec.memory, saved, state)
    except UnavailableError as error:
        if start_time(machine.pid) is not None:  # it lives, and was too slow
            raise
        raise ConflictError(f"cannot restore {spec.name}: {error.message}") from error


def _place(source: Path, target: Path, uid: int) -> None:
    target.unlink(missing_ok=True)
    _write_private(target, source.read_bytes(), uid)


def _write_private(path: Path, data: bytes, uid: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        os.fchown(descriptor, uid, uid)
        file.write(data)


def _take_file(source: Path, target: Path, uid: int) -> None:
    """Copy a file that the hypervisor's account wrote.

    Raises:
        InternalError: it is not a regular file of that account, or too large.
    """
    with opened_as_written_by(uid, source) as descriptor, target.open("xb") as here:
        if os.fstat(descriptor).st_size > _STATE_MAX:
            raise InternalError("cannot save the machine: QEMU wrote a state that is too large")
        with os.fdopen(os.dup(descriptor), "rb") as there:
            shutil.copyfileobj(there, here)


def _has_passed(console: Path) -> bool:
    return console.exists() and _PROBE_PASSED in console.read_bytes()


def _group(way: Door | None) -> int | None:
    return None if way is None else way.group


def _fds(way: Door | None) -> tuple[int, ...]:
    return () if way is None or way.fd is None else (way.fd,)


async def _launch(
    arguments: list[str], fds: tuple[int, ...], spec: MachineSpec, stderr: _Stderr
) -> int:
    """Start QEMU and return its process id once its monitor listens."""
    try:
        with small_pages():
            await output_of(
                arguments, limit_s=_START_LIMIT_S, pass_fds=fds, to=stderr.writer, env=_ONE_ARENA
            )
        stderr.close_writer()
        async with asyncio.timeout(_START_LIMIT_S):
            while (pid := _pid_of_listening(spec.folder)) is None:
                if not stderr.has_more():
                    raise _EndedError
                await asyncio.sleep(0.003)
            return pid
    except FileNotFoundError as error:
        raise UnavailableError(
            f"cannot start {spec.name}: {error}; see `sandyard doctor`"
        ) from error
    except (ChildProcessError, TimeoutError) as error:
        reason = str(error) or "QEMU did not come up"
        raise InternalError(f"cannot start {spec.name}: {reason}") from error


def _pid_of_listening(folder: Path) -> int | None:
    """Return the pid in QEMU's pid file, or None while its monitor does not listen.

    QEMU listens before it opens its disks. If one is missing, it removes file and socket, possibly
    between two calls.
    """
    if not (folder / command.QMP_SOCKET).exists():
        return None
    try:
        return int((folder / command.PID_FILE).read_text())
    except (FileNotFoundError, ValueError):  # it is not there, or not written yet
        return None
