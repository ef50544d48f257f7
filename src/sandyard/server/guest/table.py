"""The processes that the agent keeps: the output, the followers and the end of each.

A process belongs to the agent and not to a connection: it continues when its client disconnects,
and its output is kept in a ring. A follower that reads slowly slows the process down. Without
followers, the oldest output is discarded.
"""

import asyncio
import contextlib
import fcntl
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from sandyard.server.core import ops
from sandyard.server.core.wire import Channel
from sandyard.server.guest import processes
from sandyard.server.guest.patience import patient
from sandyard.server.guest.ring import Ring
from sandyard.server.guest.streams import CHUNK, Reader
from sandyard.server.guest.system import ConflictingError, NoProcessError, RefusedError

RING = 256 * 1024
LIVING_MAX = 1000
ENDED_MAX = 256
_KEPT_MAX = 8 * 1024 * 1024  # for the kept output of all ended processes together
_KEPT_S = 600.0
_LAST_WORDS_S = 1.0
_FIRST_FOLLOWER_S = 10.0
_SHOWN = 500
_PIPE = 1024 * 1024


class Follower:
    """A client that reads the output of a process, and has read as far as `offset`."""

    def __init__(self, entry: "Entry", offset: int) -> None:
        self._entry = entry
        self.offset = offset

    async def pieces(self) -> AsyncIterator[tuple[Channel, bytes]]:
        """Yield the output of the process until it has ended and everything was read.

        Raises:
            ConnectionAbortedError: the next bytes are no longer kept.
        """
        entry = self._entry
        while True:
            for begin, channel, data in entry.ring.since(self.offset):
                if begin > self.offset:
                    raise ConnectionAbortedError
                yield channel, data
                self.offset = begin + len(data)
                entry.moved()
            if self.offset < entry.ring.begin:
                raise ConnectionAbortedError
            if self.offset >= entry.ring.end:
                if entry.end is not None:
                    return
                await entry.more()


class Entry:
    """One process."""

    def __init__(
        self,
        process: processes.Process,
        started: ops.Program,
        waits_s: float,
        hang_up_s: float | None = None,
        at_end: Callable[[], None] | None = None,
    ) -> None:
        self.ring = Ring(RING)
        self.end: ops.Ended | None = None
        self.started = started
        self.fed = 0
        self._process = process
        self._readers = [Reader(one) for one in (process.stdout, process.stderr) if one is not None]
        self._hang_up_s = hang_up_s
        self._at_end = at_end
        self._hanging_up: asyncio.TimerHandle | None = None
        self._is_hung_up = False
        self._followers: set[Follower] = set()
        self._changed = asyncio.Event()
        self._moved = asyncio.Event()
        self._held_until = time.monotonic() + waits_s
        self._writing = asyncio.Lock()
        self._writable: asyncio.Future[None] | None = None
        self._ended_ms: int | None = None
        self._hang_up_later(patient(_FIRST_FOLLOWER_S))

    # --- for its owner ----------------------------------------------------------------------

    async def live(self, *, limit_s: float | None) -> None:
        """See it to its end, keep what it prints, and then give back what it took."""
        started = time.monotonic()
        process, readers = self._process, self._readers
        channels = (Channel.TERMINAL,) if process.is_terminal else (Channel.STDOUT, Channel.STDERR)
        async with asyncio.TaskGroup() as tasks:
            pumps = [
                tasks.create_task(self._pump(*one)) for one in zip(readers, channels, strict=True)
            ]
            code, timed_out = await self._wait(limit_s)
            if process.is_terminal:
                # The kernel hangs up for all who have it open; earlier output still arrives.
                await asyncio.wait(pumps, timeout=patient(_LAST_WORDS_S))
            for reader in readers:
                reader.finish()
        if process.is_terminal:
            self._stop_writing(process.stdout)
        self.close_input()
        if self._hanging_up is not None:
            self._hanging_up.cancel()
        self._ended_ms = round(time.time() * 1000)
        self.end = ops.Ended(
            exit_code=124 if timed_out else code if code >= 0 else 128 - code,
            duration_ms=round((time.monotonic() - started) * 1000),
            timed_out=timed_out,
            signal=None if code >= 0 else _signal_name(-code),
        )
        for reader in readers:
            reader.drain_to_nowhere()
        self._tell()
        process.release()
        if self._at_end is not None:
            self._at_end()

    async def give_up(self) -> None:
        """End it and release everything, because it cannot be followed to its end."""
        if self.end is not None:
            return
        process = self._process
        with contextlib.suppress(OSError):
            process.kill()
        process.signal(signal.SIGKILL)
        await process.wait()
        self._stop_writing(process.stdout if process.is_terminal else process.stdin)
        self.close_input()
        for reader in self._readers:
            with contextlib.suppress(OSError):
                reader.close()
        process.release()
        if self._at_end is not None:
            self._at_end()
        self._ended_ms = round(time.time() * 1000)
        self.end = ops.Ended(exit_code=255, duration_ms=0)
        self._tell()

    async def _wait(self, limit_s: float | None) -> tuple[int, bool]:
        try:
            async with asyncio.timeout(limit_s):
                return await self._process.wait(), False
        except TimeoutError:
            await self._process.end()
            return await self._process.wait(), True

    async def _pump(self, reader: Reader, channel: Channel) -> None:
        while data := await reader.read(CHUNK):
            while (wait_s := self._holds_s(len(data))) > 0:
                self._moved.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(wait_s):
                        await self._moved.wait()
            self.ring.add(channel, data)
            self._tell()
        if self._is_hung_up:
            reader.close()  # further output has no reader, so it gets SIGPIPE

    def _holds_s(self, size: int) -> float:
        """Return how long at most to hold back this much output; 0 to accept it."""
        if self._followers:
            slowest = min(one.offset for one in self._followers)
            return 0.0 if self.ring.has_room(size, slowest) else 3600.0
        if not self.ring.has_room(size, 0):
            return self._held_until - time.monotonic()
        return 0.0

    @property
    def is_followed(self) -> bool:
        """Whether it has followers."""
        return bool(self._followers)

    # --- for those who follow it --------------------------------------------------------------

    @contextmanager
    def followed(self, offset: int | None) -> Iterator[Follower]:
        """Follow it during the block, from a byte on, or from the first that is kept."""
        begin = self.ring.end if offset is None else max(self.ring.begin, offset)
        follower = Follower(self, min(begin, self.ring.end))
        self._held_until = 0.0
        self._followers.add(follower)
        if self._hanging_up is not None:
            self._hanging_up.cancel()
        try:
            yield follower
        finally:
            self._followers.discard(follower)
            self.moved()
            self._hang_up_later(0.0)

    def _hang_up_later(self, at_least_s: float) -> None:
        """Send it a hangup after its time, unless it has a follower by then."""
        if self._hang_up_s is None or self._followers or self.end is not None:
            return
        if self._hanging_up is not None:
            self._hanging_up.cancel()
        wait_s = max(at_least_s, self._hang_up_s)
        self._hanging_up = asyncio.get_running_loop().call_later(wait_s, self._hang_up)

    def _hang_up(self) -> None:
        if self.end is not None or self._followers or self._is_hung_up:
            return
        if self._process.is_terminal:
            self._process.hang_up()
            return
        self._is_hung_up = True
        self.close_input()
        for reader in self._readers:
            reader.abandon()

    async def more(self) -> None:
        """Return once it has printed more, or has ended."""
        self._changed.clear()
        await self._changed.wait()

    def moved(self) -> None:
        """Note that a follower has read on, or left."""
        self._moved.set()

    def _tell(self) -> None:
        self._changed.set()

    # --- what can be done to it -----------------------------------------------------------------

    def program(self) -> ops.Program:
        """Return its description."""
        started = self.started
        return ops.Program(
            pid=started.pid,
            command=started.command,
            cwd=started.cwd,
            user=started.user,
            started_ms=started.started_ms,
            printed=self.ring.end,
            tag=started.tag,
            takes_input=self._process.stdin is not None or self._process.is_terminal,
            terminal=started.terminal,
            ended_ms=self._ended_ms,
            end=self.end,
            fed=self.fed,
        )

    def signal(self, number: int, *, everything: bool) -> None:
        """Send a signal to it, or to everything that it started.

        Raises:
            RefusedError: there is no such signal.
            ConflictingError: it has ended.
        """
        if not 1 <= number < signal.NSIG:
            raise RefusedError(f"cannot send the signal {number}: there is none of that number")
        if everything:
            if not self._process.signal_everything(number):
                raise ConflictingError(self._over("signal it"))
        elif not self._process.signal(number):
            raise ConflictingError(self._over("signal it"))

    def forget_tag(self) -> None:
        """Remove its tag, so that only its pid finds it."""
        self.started = replace(self.started, tag=None)

    async def feed(
        self, data: bytes, *, closes: bool, limit_s: float | None = None, at: int | None = None
    ) -> tuple[int, bool]:
        """Write to its input, and close that if requested. Return how much was written within the
        limit, and whether it was closed. With `at`, where the data belongs in its input, what it
        has taken before counts as written.

        Raises:
            ConflictingError: it has no input, or that is closed, or is not as far as `at`.
        """
        written, is_terminal, ending = 0, self._process.is_terminal, b""
        if closes and is_terminal:
            # Ctrl-D, by default; after characters in a line, the first one only submits them.
            ending = b"\x04" if not data or data.endswith(b"\n") else b"\x04\x04"
        whole = memoryview(data + ending)
        is_closed = False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s), self._writing:
                if at is not None:
                    if at > self.fed:
                        raise ConflictingError(
                            f"cannot write to the process {self.started.pid} at byte {at}: its "
                            f"input has {self.fed}"
                        )
                    written = min(len(data), self.fed - at)
                while written < len(whole):
                    count = await self._write(whole[written:])
                    self.fed += min(count, max(0, len(data) - written))
                    written += count
                if closes and not is_terminal:
                    self._input()
                    self.close_input()
                is_closed = closes
        return min(written, len(data)), is_closed

    async def _write(self, data: memoryview) -> int:
        """Write as much as fits, once anything fits."""
        descriptor, loop = self._input(), asyncio.get_running_loop()
        try:
            return os.write(descriptor, data)
        except BlockingIOError:
            ready = self._writable = loop.create_future()
            loop.add_writer(descriptor, _resolve, ready)
            try:
                await ready
            finally:
                if (
                    self._writable is ready
                ):  # otherwise it was closed meanwhile, and the number may be reused
                    self._writable = None
                    loop.remove_writer(descriptor)
            return 0
        except OSError as error:
            raise ConflictingError(
                f"cannot write to the process {self.started.pid}: it has closed its input"
            ) from error

    def expect_much(self) -> None:
        """Prepare for much input: each time a pipe is full costs a switch to the process and back.

        Raises:
            ConflictingError: it has no input, or that is closed.
        """
        descriptor = self._input()
        if not self._process.is_terminal:
            with contextlib.suppress(OSError):
                fcntl.fcntl(descriptor, fcntl.F_SETPIPE_SZ, _PIPE)

    def _input(self) -> int:
        process = self._process
        if process.is_terminal and self.end is None and process.stdout is not None:
            return process.stdout
        if process.stdin is not None:
            return process.stdin
        if self.end is not None:
            raise ConflictingError(self._over("write to it"))
        raise ConflictingError(
            f"cannot write to the process {self.started.pid}: it was started without stdin, or "
            "that was closed"
        )

    def close_input(self) -> None:
        """Close its input; may be repeated."""
        descriptor, self._process.stdin = self._process.stdin, None
        self._stop_writing(descriptor)
        if descriptor is not None:
            os.close(descriptor)

    def _stop_writing(self, descriptor: int | None) -> None:
        """Wake writers before the input that they wait for is closed."""
        waiting, self._writable = self._writable, None
        if waiting is not None and descriptor is not None:
            asyncio.get_running_loop().remove_writer(descriptor)
            _resolve(waiting)

    async def stop(self) -> None:
        """End it and everything that it started: first with a request, then by force."""
        await self._process.end()

    def resize(self, size: ops.Size) -> None:
        """Change the size of its terminal.

        Raises:
            ConflictingError: it has none, or has ended.
            RefusedError: the size is invalid.
        """
        process = self._process
        if not process.is_terminal:
            raise ConflictingError(f"cannot resize: the process {self.started.pid} has no terminal")
        if self.end is not None or process.stdout is None:
            raise ConflictingError(self._over("resize its terminal"))
        processes.set_size(process.stdout, size.columns, size.rows)

    def _over(self, doing: str) -> str:
        return f"cannot {doing}: the process {self.started.pid} has ended"


class Table:
    """All processes, by pid."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}
        self._ended: list[tuple[float, Entry]] = []
        self._tasks: asyncio.TaskGroup | None = None

    def open(self, tasks: asyncio.TaskGroup) -> None:
        """Set the task group that follows processes to their end."""
        self._tasks = tasks

    def keep(self, entry: Entry, *, limit_s: float | None, keeps_end: bool) -> None:
        """Keep a process that was just started, and follow it to its end.

        It replaces the one that had its pid before. With `keeps_end`, its end and its last output
        are kept after that.
        """
        assert self._tasks is not None
        self._entries.pop(entry.started.pid, None)
        self._entries[entry.started.pid] = entry
        self._tasks.create_task(self._see_through(entry, limit_s, keeps_end))

    async def _see_through(self, entry: Entry, limit_s: float | None, keeps_end: bool) -> None:
        try:
            await entry.live(limit_s=limit_s)
        except Exception as error:  # noqa: BLE001 - one process must not end the agent
            await entry.give_up()
            sys.stderr.write(f"sandyard agent: a process was lost: {error!r}\n")
            sys.stderr.flush()
        if keeps_end:
            self._ended.append((time.monotonic(), entry))
            self._sweep()
        elif self._entries.get(entry.started.pid) is entry:
            del self._entries[entry.started.pid]

    def living(self) -> int:
        """Return the number of running processes."""
        return sum(one.end is None for one in self._entries.values())

    def _sweep(self) -> None:
        now = time.monotonic()
        while self._ended and (len(self._ended) > ENDED_MAX or now - self._ended[0][0] > _KEPT_S):
            _, entry = self._ended.pop(0)
            if self._entries.get(entry.started.pid) is entry:
                del self._entries[entry.started.pid]
            if not entry.is_followed:
                entry.ring.forget()
        kept = 0
        for _, entry in reversed(self._ended):
            kept += entry.ring.end - entry.ring.begin
            if kept > _KEPT_MAX and not entry.is_followed:
                entry.ring.forget()

    def find(self, pid: int | None, tag: str | None) -> Entry:
        """Return a process by its pid, or the last that was started with a tag.

        Raises:
            NoProcessError: there is none.
            RefusedError: neither or both were given.
        """
        self._sweep()
        if (pid is None) == (tag is None):
            raise RefusedError("cannot look a process up: give its pid or its tag")
        if pid is not None and (found := self._entries.get(pid)) is not None:
            return found
        if tag is not None and (found := self.last_with(tag)) is not None:
            return found
        which = f"tag {tag!r}" if pid is None else f"pid {pid}"
        raise NoProcessError(
            f"there is no process with the {which}; one that ended is kept for ten minutes"
        )

    def last_with(self, tag: str | None) -> Entry | None:
        """Return the process that was started last with a tag."""
        same = (one for one in reversed(self._entries.values()) if one.started.tag == tag)
        return None if tag is None else next(same, None)

    def programs(self) -> list[ops.Program]:
        """Return the descriptions of all, oldest first."""
        self._sweep()
        return [one.program() for one in self._entries.values()]


def shown(command: str) -> str:
    """Return the beginning of a command, for a list."""
    return command if len(command) <= _SHOWN else command[: _SHOWN - 1] + "…"


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"
