"""The processes of a fake machine's agent, which know a few commands."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from dataclasses import replace

from sandyard.server.core import ops, wire
from sandyard.server.core.codec import encode

KEPT = 256 * 1024
_STARTED_MS = 1_777_777_777_000


class AbsentError(Exception):
    """There is no such process."""


class ConflictingError(Exception):
    """Its state does not allow that."""


class RefusedProgramError(Exception):
    """The request is invalid."""


class ReusedError(Exception):
    """The key of a start was used for another one."""


class FakeProgram:
    """One process: it runs until its command ends.

    `cat` and a login shell print what they read until their input is closed; `hang` runs until it
    gets a signal; `count N` prints the numbers, `spill N` N zeros, `flood` zeros as long as it has
    a reader; `exit N` ends with that code; anything else is printed. On a terminal all output goes
    there.
    """

    def __init__(self, pid: int, wish: ops.Start) -> None:
        self.end: ops.Ended | None = None
        self.size = wish.terminal
        self._pid = pid
        self._fed = 0
        self.wish = wish
        self._is_interpreter = (wish.tag or "").startswith("context-")
        self._is_open = wish.stdin or wish.terminal is not None
        self._kept: list[tuple[int, wire.Channel, bytes]] = []
        self._asked = b""
        self._hangs: str | None = None
        self._begin = self._printed = 0
        self._changed = asyncio.Event()
        self._started_ms = _STARTED_MS
        words = (wish.command or " ".join(wish.argv)).split(" ")
        match words:
            case ["cat"] | ["hang"] | ["flood"] | [""]:
                pass
            case _ if self._is_interpreter:
                pass
            case ["exit", number]:
                self._finish(int(number))
            case ["count", number]:
                self._print(b"".join(b"%d\n" % one for one in range(1, int(number) + 1)))
                self._finish(0)
            case ["spill", number]:
                self._print(bytes(int(number)))
                self._finish(0)
            case _:
                self._print(" ".join(words).encode())
                self._finish(0)

    @property
    def tag(self) -> str | None:
        """Its tag."""
        return self.wish.tag

    def state(self) -> ops.Program:
        """Its description."""
        wish = self.wish
        return ops.Program(
            pid=self._pid,
            command=wish.command or " ".join(wish.argv),
            cwd=wish.cwd,
            user=wish.user,
            started_ms=self._started_ms,
            printed=self._printed,
            tag=wish.tag,
            takes_input=self._is_open,
            terminal=self.size,
            ended_ms=self._started_ms + 1 if self.end else None,
            end=self.end,
            fed=self._fed,
        )

    def feed(self, data: bytes, *, closes: bool) -> None:
        """Accept input.

        Raises:
            ConflictingError: it accepts none.
        """
        if not self._is_open:
            raise ConflictingError(f"cannot write to the process {self._pid}: it takes no input")
        self._fed += len(data)
        is_cat = (self.wish.command or " ".join(self.wish.argv)) in ("cat", "")
        if is_cat:
            self._print(data)
        if self._is_interpreter:
            *lines, self._asked = (self._asked + data).split(b"\n")
            for line in lines:
                self._interpret(line)
        if closes:
            self._is_open = False
            if is_cat:
                self._finish(0)

    def send(self, number: int) -> None:
        """Accept a signal, which ends it unless that is SIGCONT.

        Raises:
            ConflictingError: it has ended.
        """
        if self.end is not None:
            raise ConflictingError(f"cannot signal it: the process {self._pid} has ended")
        if self._is_interpreter and number == signal.SIGINT:
            self._interrupted()
            return
        if number == signal.SIGCONT:
            return
        self._finish(128 + number, signal.Signals(number).name)

    def attached(self, offset: int | None) -> ops.Attached:
        """Return the offset from which it can be followed."""
        begin = self._printed if offset is None else max(self._begin, offset)
        return ops.Attached(self._pid, begin, 0 if offset is None else begin - offset)

    async def frames(self, offset: int) -> AsyncIterator[bytes]:
        """Yield its output from a byte on, and its end."""
        terminal = self.wish.terminal is not None
        channel = wire.Channel.TERMINAL if terminal else wire.Channel.STDOUT
        while self.wish.command == "flood" and self.end is None:
            yield wire.encode_frame(channel, bytes(wire.FRAME_MAX))
        while True:
            for begin, where, data in list(self._kept):
                if begin + len(data) > offset:
                    piece = data[max(0, offset - begin) :]
                    offset = begin + len(data)
                    for start in range(0, len(piece), wire.FRAME_MAX):
                        yield wire.encode_frame(where, piece[start : start + wire.FRAME_MAX])
            if self.end is not None:
                yield wire.encode_frame(wire.Channel.EXIT, json.dumps(encode(self.end)).encode())
                return
            self._changed.clear()
            await self._changed.wait()

    def _interpret(self, line: bytes) -> None:
        """Run a piece of "code": `print X`, `value X`, `raise X`, `die`; `hang` runs until it is
        interrupted, `stubborn` until it is killed."""
        if not line.strip():
            return
        asked = json.loads(line)
        mark, (word, _, rest) = asked["mark"], asked["code"].partition(" ")
        self._report(mark, "B", {}, both=True)
        error = None
        match word:
            case "die":
                self._finish(3)
                return
            case "hang" | "stubborn":
                self._hangs = None if word == "stubborn" else mark
                return
            case "print":
                self._print(rest.encode())
            case "input":
                self._print(asked["stdin"].encode())
            case "value":
                result = {"text": rest, "isMain": True, "truncated": False}
                self._report(mark, "R", result)
            case _:
                error = {"name": "Error", "value": rest, "traceback": "at line 1"}
        self._report(mark, "E", {"error": error}, both=True)

    def _interrupted(self) -> None:
        mark, self._hangs = self._hangs, None
        if mark is not None:
            error = {"name": "KeyboardInterrupt", "value": "", "traceback": ""}
            self._report(mark, "E", {"error": error}, both=True)

    def _report(self, mark: str, letter: str, value: object, *, both: bool = False) -> None:
        data = f"\0{mark}{letter}{json.dumps(value)}\0".encode()
        if both:
            self._print(data, wire.Channel.STDERR)
        self._print(data)

    def _print(self, data: bytes, channel: wire.Channel | None = None) -> None:
        if channel is None:
            on_terminal = self.wish.terminal is not None
            channel = wire.Channel.TERMINAL if on_terminal else wire.Channel.STDOUT
        self._kept.append((self._printed, channel, data[-KEPT:] if len(data) > KEPT else data))
        if len(data) > KEPT:
            self._kept[-1] = (self._printed + len(data) - KEPT, channel, data[-KEPT:])
        self._printed += len(data)
        self._begin = max(self._begin, self._printed - KEPT)
        self._changed.set()

    def _finish(self, code: int, by: str | None = None) -> None:
        self.end = ops.Ended(exit_code=code, duration_ms=1, signal=by)
        self._is_open = False
        self._changed.set()


class FakePrograms:
    """All processes, by pid."""

    def __init__(self) -> None:
        self._by_pid: dict[int, FakeProgram] = {}
        self._by_key: dict[str, tuple[ops.Start, FakeProgram]] = {}
        self._next = 100

    def answer(
        self,
        wish: ops.Start | ops.Attach | ops.List | ops.Signal | ops.Input | ops.Feed | ops.Resize,
    ) -> object:
        """Carry out an operation, and return its answer.

        Raises:
            AbsentError, ConflictingError, RefusedProgramError, ReusedError: see their classes.
        """
        if isinstance(wish, ops.Start):
            return self._start(wish).state()
        if isinstance(wish, ops.List) and wish.pid is None and wish.tag is None:
            return ops.Programs(tuple(one.state() for one in self._by_pid.values()))
        found = self.find(wish.pid, wish.tag)
        match wish:
            case ops.List():
                return ops.Programs((found.state(),))
            case ops.Attach():
                if wish.offset is not None and wish.offset > found.state().printed:
                    raise RefusedProgramError("cannot follow from there: it has printed less")
                return found.attached(wish.offset)
            case ops.Signal():
                if wish.forgets_tag:
                    found.wish = replace(found.wish, tag=None)
                found.send(wish.number)
                return ops.Started(found.state().pid)
            case ops.Input():
                found.feed(wish.data, closes=wish.closes)
                return ops.Written(len(wish.data), wish.closes)
            case ops.Feed():
                found.feed(b"", closes=False)
                return ops.Fed(found.state().fed)
            case ops.Resize():
                if found.size is None or found.end is not None:
                    raise ConflictingError("cannot resize: it has no terminal, or has ended")
                found.size = wish.terminal
                return ops.Done()

    def _start(self, wish: ops.Start) -> FakeProgram:
        if wish.key is not None and (known := self._by_key.get(wish.key)) is not None:
            if known[0] != wish:
                raise ReusedError("the key was used to start another process")
            return known[1]
        if wish.replaces is not None:
            last = self.find(None, wish.tag)
            if last.state().pid != wish.replaces:
                raise AbsentError(f"the process {wish.replaces} was replaced")
            last.wish = replace(last.wish, tag=None)
        asked = wish
        self._next += 1
        if isinstance(wish, ops.Run) and wish.line is not None:
            wish = replace(wish, command=wish.line.decode(errors="replace"))
        made = self._by_pid[self._next] = FakeProgram(self._next, wish)
        if wish.key is not None:
            self._by_key[wish.key] = (asked, made)
        return made

    def find(self, pid: int | None, tag: str | None) -> FakeProgram:
        """Return one.

        Raises:
            AbsentError: there is none.
        """
        for number, one in reversed(self._by_pid.items()):
            if number == pid or (tag is not None and one.tag == tag):
                return one
        raise AbsentError(f"there is no process with the pid {pid} or the tag {tag!r}")
