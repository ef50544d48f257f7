"""Processes in sandboxes that keep running when their client disconnects.

Output has byte offsets; a client that was disconnected resumes at the offset it had reached.
"""

import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from sandyard.server.core import ops
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.errors import (
    AgentError,
    ConflictError,
    InvalidArgumentError,
)
from sandyard.server.core.ids import checked_text
from sandyard.server.core.ops import (
    DEFAULT,
    Attach,
    AttachLive,
    Input,
    Program,
    Resize,
    Run,
    Signal,
    Size,
    Start,
)
from sandyard.server.core.wire import FRAME_MAX, Channel, encode_frame, printable
from sandyard.server.service.actor import Actor
from sandyard.server.service.repeats import Repeatable, Repeats
from sandyard.server.service.sandboxes.execute import COMMAND_MAX
from sandyard.server.service.sandboxes.fields import checked_env, cwd_of, user_of
from sandyard.server.service.sandboxes.frames import Open, decoded, frames_of, pass_on
from sandyard.server.service.sandboxes.reach import GuestStream, Reach, make_folder
from sandyard.server.service.sandboxes.uses import Use
from sandyard.server.tasks import concurrently

INPUT_MAX = 1024 * 1024
TIMEOUT_MS = range(1, 30 * 86_400_000 + 1)
_ARGV_MAX = 1024
_ARGV_BYTES = 128 * 1024
_PATH_MAX = 4096
TAG_MAX = 64
_SIDE = range(1, 65536)
_SILENT_S = 400 * 86_400.0
_START = Use("process", "Process started", "start a process in")
_SIGNAL = Use("process.signal", "Process signalled", "signal a process in")
_ATTACH = Use("process", "", "follow a process in", is_in_feed=False)
_INPUT = Use("process", "", "write to a process in", is_in_feed=False)
SIGNAL_NAMES = tuple(
    name for one in signal.Signals for name in (one.name, one.name.removeprefix("SIG"))
)
"""The usual spellings of signals."""
STREAMS = {
    Channel.STDOUT: "stdout", Channel.STDERR: "stderr", Channel.TERMINAL: "terminal",
}  # fmt: skip
"""The names of what a process prints on, by channel."""


@dataclass(frozen=True)
class NewProcess:
    """A process to start: a shell command line, or a program and its arguments.

    None for `cwd` and `user` means the template's. If it `is_from_home`, a relative `cwd`, also
    with `~`, is below the user's home, and not below /workspace. `timeout` is in milliseconds;
    without it there is no limit. With `replaces` it takes the `tag` of the process with that pid,
    if that is still the last with it.
    """

    command: str | None
    argv: Sequence[str]
    cwd: str | None
    env: Mapping[str, str] = field(repr=False)
    user: str | None
    tag: str | None
    stdin: bool
    terminal: Size | None
    timeout: int | None
    makes_cwd: bool = False
    is_from_home: bool = False
    replaces: int | None = None


@dataclass(frozen=True)
class Which:
    """A process, by its pid or tag."""

    pid: int | None = None
    tag: str | None = None


@dataclass(frozen=True)
class Output:
    """A piece of output. `offset` is the offset of the byte after it."""

    stream: str
    data: bytes = field(repr=False)
    offset: int


@dataclass(frozen=True)
class FedInput:
    """How many bytes of a stream a process's input has taken, and whether it was closed."""

    count: int
    is_closed: bool


class Following:
    """A client following a process from `offset` on. `lost` bytes before that are gone."""

    def __init__(self, attached: ops.Attached, stream: GuestStream, clock: Clock) -> None:
        self.pid = attached.pid
        self.offset = max(0, attached.offset)
        self.lost = max(0, attached.lost)
        self._stream = stream
        self._clock = clock

    async def events(self) -> AsyncIterator[Output | ops.Ended]:
        """Yield output as it is printed, and finally the exit.

        Raises:
            ConflictError: the sandbox was paused or ended.
            UnavailableError: the agent ended, and the process with it.
        """
        # A process may be silent for as long as it likes.
        async for frame in frames_of(self._stream, self._clock, still_s=_SILENT_S):
            if frame.channel is Channel.EXIT:
                yield _bounded(decoded(ops.Ended, frame))
            elif frame.channel in STREAMS and frame.payload:
                self.offset += len(frame.payload)
                yield Output(STREAMS[frame.channel], frame.payload, self.offset)

    async def write(self, data: bytes) -> None:
        """Write to its input, as fast as it reads.

        Input for a process that never reads is dropped when the client disconnects.
        """
        for start in range(0, len(data), FRAME_MAX):
            frame = encode_frame(Channel.STDIN, data[start : start + FRAME_MAX])
            await self._stream.write(frame)

    async def close_input(self) -> None:
        """Close its input."""
        await self._stream.write(encode_frame(Channel.STDIN, b""))


class Processes:
    """Starts, lists and controls processes."""

    def __init__(self, reach: Reach, clock: Clock, opened: Open, repeats: Repeats) -> None:
        self._reach = reach
        self._repeats = repeats
        self._clock = clock
        self._open = opened

    async def start(
        self,
        actor: Actor,
        reference: str,
        wish: NewProcess,
        *,
        request: Repeatable | None = None,
        use: Use = _START,
    ) -> Program:
        """Start a process and return it. The agent remembers `request`: repeated within a day, it
        returns the process that was started first, as long as the machine runs.

        Raises:
            InvalidArgumentError: a value is invalid; `facts` name the field.
            KeyReusedError: the key of `request` was used to start another process.
            ConflictError: the agent keeps too many processes.
            NotFoundError: the process that it was to replace was replaced, or lost its tag.
            For the rest see `Reach.open`.
        """
        _check(wish)
        operation = Start(
            **_values_of(wish), key=self._repeats.name_of(actor, request), replaces=wish.replaces
        )
        use = _with_attributes(wish, use)
        if wish.makes_cwd and wish.cwd is not None:
            cwd = operation.cwd
            await make_folder(self._reach, actor, reference, cwd, wish.user or "root", use)
        return await self.launch(actor, reference, operation, use)

    @asynccontextmanager
    async def begin(
        self, actor: Actor, reference: str, wish: NewProcess
    ) -> AsyncIterator[Following]:
        """Start a process and follow it from its first byte. It goes on when the block ends, and
        its end is kept for a while.

        Raises: see `start`.
        """
        _check(wish)
        operation = Run(**_values_of(wish), keeps_end=True)
        async with self.run(
            actor, reference, operation, _with_attributes(wish, _START)
        ) as following:
            yield following

    async def launch(self, actor: Actor, reference: str, operation: Start, use: Use) -> Program:
        """Start a process for the platform's own use. See `Reach.open`."""
        async with self._reach.open(actor, reference, operation, use) as reached:
            return _cleaned(reached.answer)

    async def list(self, actor: Actor, reference: str) -> ops.Programs:
        """Return the processes that the agent keeps, oldest first. See `Reach.look`."""
        found = await self._reach.look(actor, reference, ops.List(), doing="list the processes of")
        return replace(found, items=tuple(_cleaned(one) for one in found.items))

    async def get(self, actor: Actor, reference: str, which: Which) -> Program:
        """Return one process.

        Raises:
            NotFoundError: there is none.
            For the rest see `Reach.look`.
        """
        found = await self._reach.look(
            actor, reference, ops.List(which.pid, which.tag), doing="look at a process of"
        )
        if len(found.items) != 1:
            raise AgentError
        return _cleaned(found.items[0])

    async def sandbox_of(self, actor: Actor, reference: str) -> str:
        """Return a sandbox's id. See `Reach.id_of`."""
        return await self._reach.id_of(actor, reference)

    async def signal(
        self,
        actor: Actor,
        reference: str,
        which: Which,
        name: str,
        *,
        everything: bool,
        forgets_tag: bool = False,
        use: Use = _SIGNAL,
    ) -> tuple[int, str]:
        """Send a signal, by name or number, to a process or to everything it has started, and with
        `forgets_tag` remove its tag. Return its pid and the signal's name.

        Raises:
            InvalidArgumentError: there is no such signal.
            NotFoundError, ConflictError: there is no such process, or it has ended.
        """
        number = _number_of(name)
        wish = Signal(number, which.pid, which.tag, everything, forgets_tag)
        facts = {"signal": signal.Signals(number).name, "everything": everything}
        use = replace(use, attributes=facts)
        async with self._reach.open(actor, reference, wish, use) as reached:
            return reached.answer.pid, signal.Signals(number).name

    async def write(
        self, actor: Actor, reference: str, which: Which, data: bytes, *, closes: bool
    ) -> tuple[int, bool]:
        """Write to a process's input. Return how many bytes it accepted within 5 s, and whether its
        input was closed.

        Raises:
            NotFoundError, ConflictError: there is no such process, or its input is closed.
        """
        if len(data) > INPUT_MAX:
            raise InvalidArgumentError(
                "cannot write over 1 MiB of input at once: send it in pieces",
                field="data",
                reason="too_large",
            )
        wish = Input(data, closes, which.pid, which.tag)
        async with self._reach.open(actor, reference, wish, _INPUT) as reached:
            answer = reached.answer
            return max(0, min(len(data), answer.count)), answer.is_closed

    async def feed(
        self,
        actor: Actor,
        reference: str,
        which: Which,
        body: AsyncIterator[bytes],
        *,
        offset: int | None,
        closes: bool,
    ) -> FedInput:
        """Write a stream to a process's input, and return what that has taken. The rest is
        discarded once the process has taken nothing for 5 s, or if it closes its input.

        With an `offset` in its input the stream begins there; what was written before is not
        written again.

        Raises:
            InvalidArgumentError: the offset is beyond what was written.
            NotFoundError, ConflictError: there is no such process, or its input is closed.
        """
        wish = ops.Feed(closes, which.pid, which.tag, offset)
        async with AsyncExitStack() as held:
            held.enter_context(self._open.one(actor.org_id))
            opening = self._reach.open(actor, reference, wish, _INPUT)
            reached = await held.enter_async_context(opening)
            begin = max(0, reached.answer.taken)
            if offset is not None and not 0 <= offset <= begin:
                raise InvalidArgumentError(
                    f"cannot write at this offset: the input has {begin} bytes", field="offset"
                )
            telling = _end_of_feed(reached.stream, self._clock)
            ending = await held.enter_async_context(concurrently(telling))
            await pass_on(body, reached.stream, ending, self._clock)
            end = ending.result()
            if end.trouble is not None and end.count <= (0 if offset is None else begin - offset):
                raise ConflictError(printable(end.trouble[:500]))
            return FedInput(max(0, end.count), end.is_closed)

    async def resize(
        self, actor: Actor, reference: str, which: Which, size: Size, *, use: Use = _INPUT
    ) -> None:
        """Change the size of a process's terminal.

        Raises:
            InvalidArgumentError: the size is invalid.
            NotFoundError, ConflictError: there is no such process, or it has no terminal.
        """
        _check_size(size)
        wish = Resize(size, which.pid, which.tag)
        async with self._reach.open(actor, reference, wish, use):
            pass

    @asynccontextmanager
    async def run(
        self, actor: Actor, reference: str, wish: Run, use: Use
    ) -> AsyncIterator[Following]:
        """Start a process for a connected client, and follow it from its first byte.

        Raises: see `start`.
        """
        with self._open.one(actor.org_id):
            async with self._reach.open(actor, reference, wish, use) as reached:
                attached = ops.Attached(reached.answer.pid, 0)
                yield Following(attached, reached.stream, self._clock)

    @asynccontextmanager
    async def pipe(
        self, actor: Actor, reference: str, wish: ops.Pipe, use: Use
    ) -> AsyncIterator[ByteStream]:
        """Start a process and yield its input and output as a stream.

        Raises:
            UnsupportedError: the sandbox's agent is too old.
            For the rest see `start`.
        """
        with self._open.one(actor.org_id):
            async with self._reach.open(actor, reference, wish, use) as reached:
                yield reached.stream

    @asynccontextmanager
    async def follow(
        self,
        actor: Actor,
        reference: str,
        which: Which,
        offset: int | None,
        *,
        use: Use = _ATTACH,
        live: bool = False,
    ) -> AsyncIterator[Following]:
        """Follow a process's output from an offset, or from now. A `live` client is at its
        terminal: the sandbox counts as used only while data passes.

        Raises:
            NotFoundError: there is no such process.
            InvalidArgumentError: the offset is beyond its output.
            For the rest see `Reach.open`.
        """
        kind = AttachLive if live else Attach
        wish = kind(which.pid, which.tag, offset)
        with self._open.one(actor.org_id):
            async with self._reach.open(actor, reference, wish, use) as reached:
                yield Following(reached.answer, reached.stream, self._clock)


async def _end_of_feed(stream: GuestStream, clock: Clock) -> ops.FeedEnd:
    async for frame in frames_of(stream, clock, still_s=_SILENT_S):
        if frame.channel is Channel.EXIT:
            return decoded(ops.FeedEnd, frame)
    raise AgentError


def _values_of(wish: NewProcess) -> dict[str, Any]:
    """Return the fields that every operation has that starts a process."""
    return {
        "command": wish.command,
        "argv": tuple(wish.argv),
        "cwd": _home_cwd(wish.cwd) if wish.is_from_home else cwd_of(wish.cwd),
        "env": wish.env,
        "user": user_of(wish.user),
        "tag": wish.tag,
        "stdin": wish.stdin,
        "terminal": wish.terminal,
        "timeout_ms": wish.timeout,
    }


def _home_cwd(text: str | None) -> str:
    """Return a working directory of which a relative one is below the user's home."""
    cwd_of(text)
    if text is None or text == "~" or text.startswith(("/", "~/")):
        return text or DEFAULT
    return f"~/{text}"


def _with_attributes(wish: NewProcess, use: Use) -> Use:
    """Return a use that tells of a process, and not of the command itself: people put secrets into
    commands, and the feed is kept forever."""
    attributes = {"user": wish.user, "cwd": wish.cwd and _values_of(wish)["cwd"], "tag": wish.tag}
    return replace(use, attributes={name: value for name, value in attributes.items() if value})


def _check_program(wish: NewProcess) -> None:
    """Refuse what is neither a command line nor a program with arguments."""
    if (wish.command is None) == (not wish.argv):
        raise InvalidArgumentError(
            "cannot start a process: give a command for the shell, or an argv, and not both",
            field="command",
        )
    if wish.command is not None:
        checked_text(wish.command, field="command")
        if not wish.command.strip():
            raise InvalidArgumentError("cannot run an empty command", field="command")
        if len(wish.command.encode()) > COMMAND_MAX:
            raise InvalidArgumentError(
                "cannot run a command of over 2 MiB: pass data as stdin",
                field="command",
                reason="too_large",
            )
    for word in wish.argv:
        checked_text(word, field="argv")
    if len(wish.argv) > _ARGV_MAX or sum(len(one) for one in wish.argv) > _ARGV_BYTES:
        raise InvalidArgumentError(
            "cannot start a process with over 1024 words or 128 KiB of arguments",
            field="argv",
            reason="too_large",
        )
    if wish.argv and not wish.argv[0]:
        raise InvalidArgumentError("cannot start a program without a name", field="argv")


def _check(wish: NewProcess) -> None:
    """Refuse a process that no sandbox could start."""
    _check_program(wish)
    user_of(wish.user)
    checked_text(wish.tag or "", field="tag")
    if wish.tag is not None and not 1 <= len(wish.tag) <= TAG_MAX:
        raise InvalidArgumentError("cannot use tag: it has 1 to 64 characters", field="tag")
    if wish.tag is not None and (wish.tag.isdigit() or "/" in wish.tag):
        raise InvalidArgumentError(
            "cannot use tag: one of digits alone would be taken for a pid, and one with / cannot "
            "stand in a path",
            field="tag",
        )
    if wish.timeout is not None and wish.timeout not in TIMEOUT_MS:
        raise InvalidArgumentError(
            "cannot use timeout: it must be 1 to 2592000000 milliseconds", field="timeout"
        )
    if wish.terminal is not None:
        _check_size(wish.terminal)
    checked_env(wish.env)


def _check_size(size: Size) -> None:
    if size.columns not in _SIDE or size.rows not in _SIDE:
        raise InvalidArgumentError(
            "cannot use a terminal of that size: it has 1 to 65535 columns and rows", field="pty"
        )


def _number_of(name: str) -> int:
    """Return the number of a signal: `SIGTERM`, `TERM`, `term` or `15`."""
    if name.isascii() and name.isdigit() and len(name) < 4:
        number = int(name)
        if any(number == one for one in signal.Signals):
            return number
    else:
        full = name.upper() if name.upper().startswith("SIG") else f"SIG{name.upper()}"
        found = next((one for one in signal.Signals if one.name == full), None)
        if found is not None:
            return int(found)
    raise InvalidArgumentError(
        f"cannot send the signal {name[:40]!r}: there is none; give a name such as SIGTERM",
        field="signal",
    )


def _cleaned(program: Program) -> Program:
    """Return a guest's data about a process, without terminal control characters."""
    return replace(
        program,
        command=printable(program.command[:1000]),
        cwd=printable(program.cwd[:_PATH_MAX]),
        user=printable(program.user[:TAG_MAX]),
        tag=None if program.tag is None else printable(program.tag[:TAG_MAX]),
        end=None if program.end is None else _bounded(program.end),
    )


def _bounded(end: ops.Ended) -> ops.Ended:
    return ops.Ended(
        exit_code=max(0, min(255, end.exit_code)),
        duration_ms=max(0, min(10**13, end.duration_ms)),
        timed_out=end.timed_out,
        signal=printable(end.signal[:32]) if end.signal else None,
    )
