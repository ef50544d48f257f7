"""A driver without a hypervisor, for tests of the rooms above and to measure them alone.

Its machines are small agents in this process that speak the real protocol over a Unix socket in the
machine's folder. FakeHost is the host: it outlives any node, so a restarted node finds its machines
there. Conduct makes it fail in the ways real ones do.
"""

import asyncio
import itertools
import json
import socket
from collections import deque
from collections.abc import Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import assert_never

from typing_extensions import override

from sandyard.server.core import ops, wire
from sandyard.server.core.codec import CodecError, decode, encode
from sandyard.server.core.contracts.node import POWERED_OFF, REBOOTED
from sandyard.server.core.errors import (
    ConflictError,
    InternalError,
    NoCapacityError,
    UnavailableError,
)
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
from sandyard.server.fakes.files import (
    ROOM,
    FakeFiles,
    RefusedFileError,
    end_frame,
    placed,
)
from sandyard.server.fakes.programs import (
    AbsentError,
    ConflictingError,
    FakePrograms,
    RefusedProgramError,
    ReusedError,
)
from sandyard.server.tasks import concurrently

_PIDS = itertools.count(1_000_000_000)  # above any real pid: nothing can be killed by mistake
AGENT_SOCKET = "agent.sock"
_ENDS = {
    "reboot": End(REBOOTED, "the guest was rebooted"),
    "poweroff": End(POWERED_OFF, "the guest was powered off"),
}
ECHO_PORT = 7
"""A service on this port of a fake machine echoes what it receives."""


@dataclass
class Conduct:
    """How the machines of a fake driver behave; by default, well."""

    start_delay_s: float = 0.0
    is_ready: bool = True
    makes_progress: bool = True
    dies_at_birth: bool = False
    can_switch_off: bool = True  # otherwise it halts, which only `stall` shows
    is_given_up: bool = False  # by its hypervisor, which only `stall` shows
    starts: bool = True
    leaks: bool = False
    can_be_stopped: bool = True
    is_usable: bool = True
    saves: bool = True
    has_room_to_save: bool = True
    save_delay_s: float = 0.0
    restores: bool = True
    restore_delay_s: float = 0.0
    fits: bool = True
    answers: bool = True
    wakes: bool = True
    is_rude: bool = False  # it refuses to say hello
    unknown: frozenset[ops.Op] = frozenset()  # operations that its agent is too old for
    mute_wakes: int = 0  # so many times
    dies_at_set_up: int = 0  # so many times
    recent_cpu_percent: float = 0.0
    earlier: Sequence[ops.Sample] = ()
    ports: dict[int, int] = field(
        default_factory=dict
    )  # ports that lead to one of this host's loopback


@dataclass
class FakeHost:
    """The host of fake machines."""

    machines: dict[int, "FakeMachine"] = field(default_factory=dict)
    programs: dict[str, FakePrograms] = field(default_factory=dict)
    files: dict[str, FakeFiles] = field(default_factory=dict)
    installed: list[str] = field(default_factory=lambda: ["1"])
    """The versions of the hypervisor that are installed; the first starts new machines."""


class FakeMachine(SavingMachine):
    """A fake machine. What it `remembers` is its memory, and is saved and restored."""

    def __init__(
        self, host: FakeHost, spec: MachineSpec, conduct: Conduct, *, version: str
    ) -> None:
        self._pid = next(_PIDS)
        self._version = version
        self.spec = spec
        self._host = host
        self._conduct = conduct
        self._ended = asyncio.Event()
        self._closed = asyncio.Event()
        self._end = End("machine_died", "the hypervisor's process ended")
        self.remembers: dict[str, str] = {"token": spec.token}
        self.is_held = False
        self.is_behind = spec.background is not None
        self.is_saving = False
        self.executing: list[str] = []
        self.asked: deque[ops.Op] = deque(maxlen=100)
        self.disk_mib: int | None = None
        self._moving = asyncio.Event()
        self._moving.set()
        self._listener: socket.socket | None = None
        self._serving: set[asyncio.Task[None]] = set()
        self._writers: set[asyncio.StreamWriter] = set()
        self._ticks = itertools.count()
        self.stalled: End | None = None
        self._has_halted = False

    @property
    @override
    def pid(self) -> int:
        return self._pid

    @property
    @override
    def version(self) -> str:
        return self._version

    @property
    def _programs(self) -> FakePrograms:
        # Its memory is saved, and with it which processes it has.
        key = self.remembers.setdefault("programs", str(self.pid))
        return self._host.programs.setdefault(key, FakePrograms())

    @property
    def _files(self) -> FakeFiles:
        key = self.remembers.setdefault("files", str(self.pid))
        return self._host.files.setdefault(key, FakeFiles())

    @property
    @override
    def handle(self) -> Handle:
        return {"pid": self.pid}

    async def boot(self) -> None:
        """Start the agent, as far as its conduct allows."""
        if self._conduct.is_ready and not self._ended.is_set():
            # A server of asyncio's own forgets what it is accepting at the moment it is closed
            # (github.com/python/cpython/issues/109564), and leaves that open.
            listener = self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            listener.setblocking(False)
            listener.bind(str(self.spec.folder / AGENT_SOCKET))
            listener.listen(100)
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)
        await asyncio.sleep(0)

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # the client has disconnected already
            connection, _ = listener.accept()
            task = asyncio.get_running_loop().create_task(self._take(connection))
            self._serving.add(task)
            task.add_done_callback(self._serving.discard)

    async def _take(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        try:
            reader, writer = await asyncio.open_connection(sock=connection)
        except BaseException:
            connection.close()
            raise
        await self._serve(reader, writer)

    @override
    async def console(self) -> bytes:
        tick = next(self._ticks)
        return f"tick {tick}\n".encode() if self._conduct.makes_progress or tick == 0 else b""

    @override
    async def stall(self) -> End | None:
        if self._conduct.is_given_up:
            self.die()
        return _ENDS["poweroff"] if self._has_halted else self.stalled

    @override
    async def wait(self) -> End:
        await self._ended.wait()
        return self._end

    @override
    async def stop(self) -> None:
        if not self._conduct.can_be_stopped and not self._ended.is_set():
            raise UnavailableError(f"cannot end the process {self.pid}: it does not react")
        self.die()
        self.close()

    @override
    async def detach(self) -> None:
        pass

    @override
    def come_forward(self) -> None:
        self.is_behind = False

    @override
    async def pause(self) -> None:
        self._check_lives()
        self.is_held = True
        self._moving.clear()

    @override
    async def resume(self) -> None:
        self._check_lives()
        self.is_held = False
        self._moving.set()

    @override
    async def is_paused(self) -> bool:
        return self.is_held

    @override
    async def save(self, folder: Path) -> Saved:
        folder.mkdir()
        self.is_saving = True
        await asyncio.sleep(self._conduct.save_delay_s)
        self.is_saving = False
        self._check_lives()
        if not self._conduct.has_room_to_save:
            raise NoCapacityError("cannot save the machine: the host's disk is full")
        if not self._conduct.saves:
            raise InternalError("cannot save the machine: told not to")
        (folder / "device").write_text("fake")
        (folder / "pages").write_text(json.dumps(self.remembers))
        return Saved(folder, self.version)

    @override
    async def grow_disk(self, size_mib: int) -> None:
        self._check_lives()
        self.disk_mib = size_mib

    def _check_lives(self) -> None:
        if self._ended.is_set():
            raise UnavailableError("the hypervisor's process has ended")

    def die(self, end: End | None = None) -> None:
        """End at once, as a killed process does, or with the given `end`."""
        if not self._ended.is_set():
            self._end = end or self._end
            self._ended.set()
            if self._listener is not None:
                asyncio.get_running_loop().remove_reader(self._listener)
                self._listener.close()
            with suppress(OSError):
                (self.spec.folder / AGENT_SOCKET).unlink()
            if not self._conduct.leaks:
                self._host.machines.pop(self.pid, None)

    def close(self) -> None:
        """Close the connections, which a machine that just ended leaves open."""
        self._closed.set()
        self._moving.set()  # a client of a suspended machine would wait forever
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        decoder = wire.Decoder()
        if self._closed.is_set():  # it was accepted just before
            writer.transport.abort()
            return
        self._writers.add(writer)
        try:
            again = True
            while again:
                while (request := decoder.take_request()) is None:
                    data = await reader.read(65536)
                    if not data:
                        return
                    decoder.feed(data)
                if self._has_halted or not self._conduct.answers:
                    await self._closed.wait()
                await self._moving.wait()
                if self._closed.is_set():
                    return
                again = await self._converse(request, reader, decoder, writer)
                await writer.drain()
        except (OSError, wire.WireError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _converse(
        self,
        request: wire.Request,
        reader: asyncio.StreamReader,
        decoder: wire.Decoder,
        writer: asyncio.StreamWriter,
    ) -> bool:
        try:
            operation = self._accepted(request)
            if isinstance(operation, ops.SetUp) and self._conduct.dies_at_set_up > 0:
                self._conduct.dies_at_set_up -= 1
                self.die()
                await self._closed.wait()
            if isinstance(operation, ops.Wake) and self._conduct.mute_wakes > 0:
                self._conduct.mute_wakes -= 1
                return False
            again = request.again and ops.may_be_followed(operation)
            answer = wire.Answer(encode(self._answer(operation)), again=again)
        except (_RefusedError, RefusedFileError) as error:
            writer.write(refusal(error.code, error))
            return False
        except (AbsentError, ConflictingError, RefusedProgramError, ReusedError) as error:
            writer.write(refusal(_CODES[type(error)], error))
            return False
        writer.write(wire.encode_answer(answer))
        await self._go_on(operation, answer, reader, decoder, writer)
        return again

    async def _go_on(
        self,
        operation: ops.AnyOperation,
        answer: wire.Answer,
        reader: asyncio.StreamReader,
        decoder: wire.Decoder,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Do what follows the answer of an operation."""
        match operation:
            case ops.Execute():
                await self._execute(operation, writer)
            case ops.Dial():
                if (port := self._conduct.ports.get(operation.port)) is not None:
                    await _join(port, reader, decoder, writer)
                else:
                    await _echo(reader, decoder, writer)
            case ops.Pipe():
                await _echo(reader, decoder, writer)
            case ops.Run():
                found = decode(ops.Program, answer.values)
                await _follow(
                    self._programs, ops.Attach(found.pid, offset=0), reader, decoder, writer
                )
            case ops.Attach():
                await _follow(self._programs, operation, reader, decoder, writer)
            case ops.Feed():
                await _take_input(self._programs, operation, reader, decoder, writer)
            case (
                ops.Move() | ops.Copy() | ops.Remove() | ops.Read() | ops.ListFolder()
                | ops.Write() | ops.WatchFolder()
            ):  # fmt: skip
                await self._work_on_file(placed(operation), reader, decoder, writer)
            case (
                ops.Hello() | ops.SetUp() | ops.Wake() | ops.Trust()
                | ops.MountAll() | ops.Unmount() | ops.Flush()
                | ops.Start() | ops.List() | ops.Signal() | ops.Input() | ops.Resize()
                | ops.Stat() | ops.MakeFolder() | ops.Listen() | ops.Take() | ops.Stats()
                | ops.OpenWatch() | ops.ReadWatch() | ops.CloseWatch()
            ):  # fmt: skip
                pass  # nothing follows the answer
            case _:
                assert_never(operation)

    async def _work_on_file(
        self,
        operation: ops.Move
        | ops.Copy
        | ops.Remove
        | ops.Read
        | ops.ListFolder
        | ops.Write
        | ops.WatchFolder,
        reader: asyncio.StreamReader,
        decoder: wire.Decoder,
        writer: asyncio.StreamWriter,
    ) -> None:
        """Send what follows the answer of an operation on a file."""
        match operation:
            case ops.Move() | ops.Copy():
                end = ops.FileEnd(1, fact=self._files.fact(operation.target))
                writer.write(end_frame(end))
            case ops.Remove():
                writer.write(end_frame(ops.FileEnd(1)))
            case ops.Read() | ops.ListFolder():
                for frame in self._files.frames(operation):
                    writer.write(frame)
                    await writer.drain()
            case ops.Write():
                await _take_file(self._files, operation, reader, decoder, writer)
            case ops.WatchFolder():
                async with (
                    concurrently(_watch(self._files, operation, writer)) as watching,
                    concurrently(reader.read(1)) as gone,
                ):
                    await asyncio.wait([watching, gone], return_when=asyncio.FIRST_COMPLETED)

    def _accepted(self, request: wire.Request) -> ops.AnyOperation:
        try:
            operation = ops.operation_of(request.op, request.args)
        except ops.UnknownOperationError as error:
            raise _RefusedError(wire.Refusal.UNSUPPORTED, str(error)) from error
        except CodecError as error:
            raise _RefusedError(wire.Refusal.BAD_REQUEST, str(error)) from error
        self.asked.append(operation.op)
        if operation.op in self._conduct.unknown:
            raise _RefusedError(wire.Refusal.UNSUPPORTED, f"there is no operation {operation.op}")
        if isinstance(operation, ops.SetUp | ops.Wake) and not self._conduct.wakes:
            raise _RefusedError(wire.Refusal.BAD_REQUEST, "told not to wake")
        if isinstance(operation, ops.Hello) and self._conduct.is_rude:
            raise _RefusedError(wire.Refusal.BAD_REQUEST, "told to be rude \x1b[2J")
        if request.token != self.remembers["token"]:
            raise _RefusedError(wire.Refusal.UNAUTHORIZED, "the token is wrong")
        return operation

    def _answer(self, operation: ops.AnyOperation) -> object:
        match operation:
            case ops.Hello():
                return ops.Greeting(1)
            case ops.SetUp() | ops.Trust():
                self._set_up(operation)
            case ops.Wake():
                if not operation.keeps_connections:  # else only its clock was set
                    self.remembers["woken"] = "fully"
            case ops.MountAll() | ops.Unmount():
                self._mount(operation)
            case ops.Execute():
                return ops.Started(1)
            case ops.Pipe() | ops.Flush():
                pass
            case (
                ops.Start()
                | ops.Attach()
                | ops.List()
                | ops.Signal()
                | ops.Input()
                | ops.Feed()
                | ops.Resize()
            ):
                return self._programs.answer(operation)
            case (
                ops.Stat() | ops.ListFolder() | ops.MakeFolder() | ops.Move() | ops.Copy()
                | ops.Remove() | ops.Read() | ops.Write() | ops.WatchFolder()
                | ops.OpenWatch() | ops.ReadWatch() | ops.CloseWatch()
            ):  # fmt: skip
                return self._files.answer(operation)
            case ops.Dial() | ops.Listen() | ops.Take():
                self._check_door(operation)
            case ops.Stats():
                earlier = self._conduct.earlier if operation.since_ms is not None else ()
                whole = ops.Figures(0.5, 2**20, 2**29, 2**20, 2**30, 1.0, earlier=earlier)
                recent = ops.Figures(recent_cpu_percent=self._conduct.recent_cpu_percent)
                return whole if operation.window_s is None else recent
        return ops.Done()

    def _set_up(self, operation: ops.SetUp | ops.Trust) -> None:
        if isinstance(operation, ops.Trust):
            self.remembers["trusted"] = operation.certificate
            return
        self.remembers |= {
            "token": operation.token,
            "hostname": operation.hostname,
            "env": json.dumps(dict(operation.env)),
            "replaces_access": "yes" if operation.replaces_access else "no",
        }
        if operation.trust is not None:
            self.remembers["trusted"] = operation.trust.certificate

    def _mount(self, operation: ops.MountAll | ops.Unmount) -> None:
        mounted = json.loads(self.remembers.get("mounts", "{}"))
        if isinstance(operation, ops.MountAll):
            if operation.port == ops.CLOSED_PORT:
                raise _RefusedError(wire.Refusal.BAD_REQUEST, "cannot mount: connection refused")
            mounted |= {one.path: one.name for one in operation.mounts}
        else:
            mounted.pop(operation.path, None)
        self.remembers["mounts"] = json.dumps(mounted)

    def _check_door(self, operation: ops.Dial | ops.Listen | ops.Take) -> None:
        if not isinstance(operation, ops.Dial):
            message = "a fake machine has no network"
            raise _RefusedError(wire.Refusal.UNSUPPORTED, message)
        if operation.port != ECHO_PORT and operation.port not in self._conduct.ports:
            message = f"cannot connect to port {operation.port}: nothing listens there"
            raise _RefusedError(wire.Refusal.ABSENT, message)

    async def _execute(self, wish: ops.Execute, writer: asyncio.StreamWriter) -> None:
        """Echo the command, except for a few words.

        `hang` never answers; `die`, `reboot` and `poweroff` end the machine; `hostname` prints it;
        `remember X` and `recall` use its memory, `write X` and `read` its disk. `spill N` prints N
        zero bytes on both streams, `crumbs N` sends N empty frames.
        """
        output = wish.command
        self.executing.append(output)
        word, _, rest = output.partition(" ")
        if word.endswith("/busybox"):
            word = rest.partition(" ")[0]
        match word:
            case "hang":
                await self._closed.wait()
            case "poweroff" if not self._conduct.can_switch_off:
                self._has_halted = True
                await self._closed.wait()
            case "die" | "reboot" | "poweroff":
                self.die(_ENDS.get(word))
                await self._closed.wait()
            case "remember":
                self.remembers["word"] = rest
            case "recall" | "hostname" | "env":
                output = self.remembers.get({"recall": "word"}.get(word, word), "")
            case "write":
                self.spec.disk.write_text(rest)
            case "read":
                output = self.spec.disk.read_text()
            case "spill" | "crumbs":
                output = ""
                await _pour(word, int(rest), writer)
            case _:
                pass
        writer.write(wire.encode_frame(wire.Channel.STDOUT, output.encode()))
        end = ops.Ended(exit_code=0, duration_ms=1)
        writer.write(wire.encode_frame(wire.Channel.EXIT, json.dumps(encode(end)).encode()))


async def _echo(
    reader: asyncio.StreamReader, decoder: wire.Decoder, writer: asyncio.StreamWriter
) -> None:
    data = decoder.take_raw()
    while data or (data := await reader.read(65536)):
        writer.write(data)
        await writer.drain()
        data = b""


async def _watch(files: FakeFiles, wish: ops.WatchFolder, writer: asyncio.StreamWriter) -> None:
    async for frame in files.watched(wish):
        writer.write(frame)
        await writer.drain()


async def _take_file(
    files: FakeFiles,
    wish: ops.Write,
    reader: asyncio.StreamReader,
    decoder: wire.Decoder,
    writer: asyncio.StreamWriter,
) -> None:
    """Receive a file; one that breaks off leaves nothing."""
    whole = bytearray()
    while frame := await _next_frame(reader, decoder):
        if not frame.payload or len(whole) > ROOM:
            writer.write(end_frame(files.write(wish, bytes(whole))))
            return
        whole += frame.payload


async def _next_frame(reader: asyncio.StreamReader, decoder: wire.Decoder) -> wire.Frame | None:
    while (frame := decoder.take_frame()) is None:
        data = await reader.read(65536)
        if not data:
            return None
        decoder.feed(data)
    return frame


async def _take_input(
    programs: FakePrograms,
    wish: ops.Feed,
    reader: asyncio.StreamReader,
    decoder: wire.Decoder,
    writer: asyncio.StreamWriter,
) -> None:
    """Pass a stream on to a process."""
    program = programs.find(wish.pid, wish.tag)
    trouble, count = None, 0
    while frame := await _next_frame(reader, decoder):
        at = program.state().fed if wish.offset is None else wish.offset + count
        try:
            if trouble is None:
                new = frame.payload[max(0, program.state().fed - at) :]
                program.feed(new, closes=wish.closes and not frame.payload)
                count += len(frame.payload)
        except ConflictingError as error:
            trouble = str(error)
        if not frame.payload:
            end = ops.FeedEnd(count, wish.closes and trouble is None, trouble)
            writer.write(wire.encode_frame(wire.Channel.EXIT, json.dumps(encode(end)).encode()))
            return


async def _follow(
    programs: FakePrograms,
    wish: ops.Attach,
    reader: asyncio.StreamReader,
    decoder: wire.Decoder,
    writer: asyncio.StreamWriter,
) -> None:
    """Send what a process prints, and receive its input."""
    program = programs.find(wish.pid, wish.tag)

    async def tell() -> None:
        async for frame in program.frames(program.attached(wish.offset).offset):
            writer.write(frame)
            await writer.drain()

    async def hear() -> None:
        while frame := await _next_frame(reader, decoder):
            with suppress(ConflictingError):
                program.feed(frame.payload, closes=not frame.payload)

    async with concurrently(tell()) as telling, concurrently(hear()) as hearing:
        await asyncio.wait([telling, hearing], return_when=asyncio.FIRST_COMPLETED)


async def _pour(what: str, much: int, writer: asyncio.StreamWriter) -> None:
    """Print so many bytes on both streams, or send so many empty frames."""
    if what == "crumbs":
        for _ in range(much // 1000):
            writer.write(wire.encode_frame(wire.Channel.STDOUT, b"") * 1000)
            await writer.drain()
        return
    for start in range(0, much, wire.FRAME_MAX):
        piece = bytes(min(wire.FRAME_MAX, much - start))
        for channel in (wire.Channel.STDOUT, wire.Channel.STDERR):
            writer.write(wire.encode_frame(channel, piece))
            await writer.drain()


async def _join(
    port: int, reader: asyncio.StreamReader, decoder: wire.Decoder, writer: asyncio.StreamWriter
) -> None:
    """Copy between a connection and a port of this host's loopback."""
    theirs, ours = await asyncio.open_connection("127.0.0.1", port)
    try:
        ours.write(decoder.take_raw())
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_copy(reader, ours))
            tasks.create_task(_copy(theirs, writer))
    finally:
        ours.close()


async def _copy(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await source.read(65536):
            sink.write(data)
            await sink.drain()
        sink.write_eof()


class _RefusedError(Exception):
    """The fake agent refuses an operation."""

    def __init__(self, code: wire.Refusal, message: str) -> None:
        super().__init__(message)
        self.code = code


def refusal(code: wire.Refusal, error: Exception) -> bytes:
    """Return the answer that refuses."""
    return wire.encode_answer(wire.Answer({}, error=code.value, message=str(error)))


_CODES: dict[type[Exception], wire.Refusal] = {
    AbsentError: wire.Refusal.ABSENT,
    ConflictingError: wire.Refusal.CONFLICT,
    RefusedProgramError: wire.Refusal.BAD_REQUEST,
    ReusedError: wire.Refusal.REUSED,
}


class FakeDriver(SavingDriver):
    """See drivers.contract.SavingDriver."""

    name = "fake"

    def __init__(
        self,
        host: FakeHost,
        conduct: Conduct | None = None,
        *,
        saves: bool = True,
    ) -> None:
        self._saves = saves
        self._host = host
        self.conduct = conduct or Conduct()

    @property
    @override
    def capabilities(self) -> Capabilities:
        return Capabilities(saves=self._saves)

    @override
    async def version(self) -> str:
        return self._host.installed[0]

    @override
    async def versions(self) -> list[str]:
        return list(self._host.installed)

    @override
    async def probe(self, spec: ProbeSpec) -> Verdict:
        if self.conduct.is_usable:
            return Verdict(True, "fake machines start anywhere")
        return Verdict(False, "told not to be usable")

    @override
    async def start(self, spec: MachineSpec, held: AsyncExitStack) -> FakeMachine:
        conduct = self.conduct
        if not conduct.starts:
            raise InternalError(f"cannot start {spec.name}: told not to")
        if not spec.memory.exists():
            spec.memory.write_text("{}")
        machine = self._make(spec, held, version=self._host.installed[0])
        await asyncio.sleep(conduct.start_delay_s)
        await machine.boot()
        if conduct.dies_at_birth:
            machine.die()
        return machine

    @override
    async def restore(self, spec: MachineSpec, saved: Saved, held: AsyncExitStack) -> FakeMachine:
        if not self.conduct.restores:
            raise InternalError(f"cannot restore {spec.name}: told not to")
        pages = saved.folder / "pages"
        try:
            is_there = saved.version in self._host.installed
            fits = (
                is_there and self.conduct.fits and (saved.folder / "device").read_text() == "fake"
            )
            remembers = json.loads((pages if pages.exists() else spec.memory).read_text())
            if not fits or "token" not in remembers:
                raise ConflictError(f"cannot restore {spec.name}: the saved state does not fit")
        except (OSError, ValueError) as error:
            raise ConflictError(f"cannot restore {spec.name}: {error}") from error
        machine = self._make(spec, held, version=saved.version)
        machine.remembers = remembers
        await asyncio.sleep(self.conduct.restore_delay_s)
        await machine.boot()
        await machine.pause()
        return machine

    @override
    async def make_whole(self, saved: Saved, memory: Path) -> None:
        (saved.folder / "pages").rename(saved.memory)

    def _make(self, spec: MachineSpec, held: AsyncExitStack, *, version: str) -> FakeMachine:
        machine = FakeMachine(self._host, spec, self.conduct, version=version)
        self._host.machines[machine.pid] = machine
        held.push_async_callback(machine.stop)
        return machine

    @override
    async def recover(self, handle: Handle, held: AsyncExitStack) -> FakeMachine | None:
        machine = self._host.machines.get(int(handle["pid"]))
        if machine is None:
            return None
        held.push_async_callback(machine.stop)
        return machine
