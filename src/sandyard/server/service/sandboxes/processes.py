"""Processes in sandboxes that live on when whoever started them has gone.

What one prints has numbers, byte by byte: who was cut off goes on from the number it had come to.
"""

import signal
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace

from sandyard.server.core import ops
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.errors import (
    AgentError,
    InvalidArgumentError,
)
from sandyard.server.core.ids import checked_text
from sandyard.server.core.ops import (
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
from sandyard.server.service.sandboxes.execute import COMMAND_MAX
from sandyard.server.service.sandboxes.fields import checked_env
from sandyard.server.service.sandboxes.frames import Open, frames_of, told
from sandyard.server.service.sandboxes.reach import GuestStream, Reach, Use

INPUT_MAX = 1024 * 1024
TIMEOUT_MS = range(1, 30 * 86_400_000 + 1)
_ARGV_MAX = 1024
_PATH_MAX = 4096
_TAG_MAX = 64
_SIDE = range(1, 65536)
_SILENT_S = 400 * 86_400.0
_START = Use("process", "Process started", "start a process in")
_SIGNAL = Use("process.signal", "Process signalled", "signal a process in")
_ATTACH = Use("process", "", "follow a process in", is_told=False)
_INPUT = Use("process", "", "write to a process in", is_told=False)
STREAMS = {
    Channel.STDOUT: "stdout", Channel.STDERR: "stderr", Channel.TERMINAL: "terminal",
}  # fmt: skip
"""The names of what a process prints on, by channel."""


@dataclass(frozen=True)
class NewProcess:
    """What to start: a command line for the shell, or a program with its arguments.

    `timeout` is in milliseconds; without it the process may run for ever.
    """

    command: str | None
    argv: Sequence[str]
    cwd: str
    env: Mapping[str, str] = field(repr=False)
    user: str
    tag: str | None
    stdin: bool
    terminal: Size | None
    timeout: int | None


@dataclass(frozen=True)
class Which:
    """A process, by its pid or the tag that it was started with."""

    pid: int | None = None
    tag: str | None = None


@dataclass(frozen=True)
class Output:
    """A piece of what a process printed on a stream; `offset` is the number of the byte after."""

    stream: str
    data: bytes = field(repr=False)
    offset: int


class Following:
    """Somebody follows a process, from the byte `offset` on; `lost` bytes before it are gone."""

    def __init__(self, attached: ops.Attached, stream: GuestStream, clock: Clock) -> None:
        self.pid = attached.pid
        self.offset = max(0, attached.offset)
        self.lost = max(0, attached.lost)
        self._stream = stream
        self._clock = clock

    async def events(self) -> AsyncIterator[Output | ops.Ended]:
        """Yield what it prints as it comes, and at last how it ended.

        Raises:
            ConflictError: the sandbox ended, or was paused.
            UnavailableError: its agent is gone, and with it the process.
        """
        # A process may be silent for as long as it likes.
        async for frame in frames_of(self._stream, self._clock, still_s=_SILENT_S):
            if frame.channel is Channel.EXIT:
                yield _bounded(told(ops.Ended, frame))
            elif frame.channel in STREAMS and frame.payload:
                self.offset += len(frame.payload)
                yield Output(STREAMS[frame.channel], frame.payload, self.offset)

    async def write(self, data: bytes) -> None:
        """Write to its input, as fast as it reads; nothing ends it.

        What waits for a process that never reads on is broken off with the following.
        """
        for start in range(0, len(data), FRAME_MAX):
            frame = encode_frame(Channel.STDIN, data[start : start + FRAME_MAX])
            await self._stream.write(frame)

    async def close_input(self) -> None:
        """End its input."""
        await self._stream.write(encode_frame(Channel.STDIN, b""))


class Processes:
    """See the module."""

    def __init__(self, reach: Reach, clock: Clock, opened: Open) -> None:
        self._reach = reach
        self._clock = clock
        self._open = opened

    async def start(self, actor: Actor, reference: str, wish: NewProcess) -> Program:
        """Start a process and return it.

        Raises:
            InvalidArgumentError: something asked for cannot be; `facts` name the field.
            ConflictError: as many run as an agent keeps.
            For the rest see `Reach.open`.
        """
        _check(wish)
        operation = Start(
            command=wish.command,
            argv=tuple(wish.argv),
            cwd=wish.cwd,
            env=wish.env,
            user=wish.user,
            tag=wish.tag,
            stdin=wish.stdin,
            terminal=wish.terminal,
            timeout_ms=wish.timeout,
        )
        # Not the command itself: people put secrets into commands, and the feed is for ever.
        facts = {"user": wish.user, "cwd": wish.cwd, **({"tag": wish.tag} if wish.tag else {})}
        return await self.launch(actor, reference, operation, replace(_START, attributes=facts))

    async def launch(self, actor: Actor, reference: str, operation: Start, use: Use) -> Program:
        """Start a process that the platform makes for a use of its own. See `Reach.open`."""
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

    async def signal(
        self,
        actor: Actor,
        reference: str,
        which: Which,
        name: str,
        *,
        everything: bool,
        use: Use = _SIGNAL,
    ) -> tuple[int, str]:
        """Send a signal, given by name or number, to a process or to all that it started; return
        its pid and the signal's name.

        Raises:
            InvalidArgumentError: there is no such signal.
            NotFoundError, ConflictError: there is no such process, or it has ended.
        """
        number = _number_of(name)
        wish = Signal(number, which.pid, which.tag, everything)
        facts = {"signal": signal.Signals(number).name, "everything": everything}
        use = replace(use, attributes=facts)
        async with self._reach.open(actor, reference, wish, use) as reached:
            return reached.answer.pid, signal.Signals(number).name

    async def write(
        self, actor: Actor, reference: str, which: Which, data: bytes, *, closes: bool
    ) -> tuple[int, bool]:
        """Write to the input of a process and return how many bytes it had room for within 5 s, and
        whether the input was closed then.

        Raises:
            NotFoundError, ConflictError: there is no such process, or it takes no input any more.
        """
        if len(data) > INPUT_MAX:
            raise InvalidArgumentError(
                "cannot write over 1 MiB of input at once: send it in pieces", field="data"
            )
        wish = Input(data, closes, which.pid, which.tag)
        async with self._reach.open(actor, reference, wish, _INPUT) as reached:
            answer = reached.answer
            return max(0, min(len(data), answer.count)), answer.is_closed

    async def resize(
        self, actor: Actor, reference: str, which: Which, size: Size, *, use: Use = _INPUT
    ) -> None:
        """Give the terminal of a process another size.

        Raises:
            InvalidArgumentError: no terminal is of that size.
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
        """Start a process for somebody who is connected, and follow it from its first byte on.

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
        """Start a process and yield its input and output.

        Raises:
            UnsupportedError: the sandbox's agent is of a version that cannot.
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
        """Follow what a process prints, from a byte on, or from now. Somebody `live` is at its
        terminal, and uses the sandbox only while bytes come or go.

        Raises:
            NotFoundError: there is no such process.
            InvalidArgumentError: it has not printed as much as that.
            For the rest see `Reach.open`.
        """
        kind = AttachLive if live else Attach
        wish = kind(which.pid, which.tag, offset)
        with self._open.one(actor.org_id):
            async with self._reach.open(actor, reference, wish, use) as reached:
                yield Following(reached.answer, reached.stream, self._clock)


def _check_program(wish: NewProcess) -> None:
    """Refuse what cannot be a command line or a program with its arguments."""
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
                "cannot run a command of over 1 MiB: give what it works on as stdin",
                field="command",
            )
    for word in wish.argv:
        checked_text(word, field="argv")
    if len(wish.argv) > _ARGV_MAX or sum(len(one) for one in wish.argv) > COMMAND_MAX // 8:
        raise InvalidArgumentError(
            "cannot start a process with over 1024 words or 128 KiB of arguments", field="argv"
        )
    if wish.argv and not wish.argv[0]:
        raise InvalidArgumentError("cannot start a program without a name", field="argv")


def _check(wish: NewProcess) -> None:
    """Refuse a process that no sandbox could start."""
    _check_program(wish)
    for name, text in (("cwd", wish.cwd), ("user", wish.user), ("tag", wish.tag or "")):
        checked_text(text, field=name)
    if not wish.cwd.startswith("/") or len(wish.cwd) > _PATH_MAX:
        raise InvalidArgumentError("cannot use cwd: it must start with /", field="cwd")
    if not 1 <= len(wish.user) <= 64:
        raise InvalidArgumentError("cannot use user: it is a name or a number", field="user")
    if wish.tag is not None and not 1 <= len(wish.tag) <= _TAG_MAX:
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
    """Return what a guest told of a process with nothing in it that a terminal would obey."""
    return replace(
        program,
        command=printable(program.command[:1000]),
        cwd=printable(program.cwd[:_PATH_MAX]),
        user=printable(program.user[:_TAG_MAX]),
        tag=None if program.tag is None else printable(program.tag[:_TAG_MAX]),
        end=None if program.end is None else _bounded(program.end),
    )


def _bounded(end: ops.Ended) -> ops.Ended:
    return ops.Ended(
        exit_code=max(0, min(255, end.exit_code)),
        duration_ms=max(0, min(10**13, end.duration_ms)),
        timed_out=end.timed_out,
        signal=printable(end.signal[:32]) if end.signal else None,
    )
