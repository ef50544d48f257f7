"""OPEN_WATCH, READ_WATCH, CLOSE_WATCH: watches whose changes clients read whenever they like.

Each is a child that watches for `WatchFolder`, with the agent in the place of the host. It is asked
for everything up to now before each reading, so that a client sees what it did itself just before.
"""

import asyncio
import contextlib
import json
import secrets
import socket
import time
from collections import deque
from itertools import islice

from sandyard.server.core import ops, wire
from sandyard.server.core.codec import decode, encode
from sandyard.server.guest.context import Context
from sandyard.server.guest.ops import files
from sandyard.server.guest.patience import patient
from sandyard.server.guest.streams import receive
from sandyard.server.guest.system import ConflictingError, NoWatchError, RefusedError

_WATCHES_MAX = 64
_CHANGES_MAX = 50_000
_CHANGES_A_READING = 2000
_ANSWER_MAX = wire.HEAD_MAX * 3 // 4
_FLUSH_S = 20.0
_UNREAD_S = 600.0


class _Watch:
    """One watch, and what it has seen since it was read."""

    def __init__(self, path: bytes, connection: socket.socket) -> None:
        self.changes: deque[ops.FileChange] = deque()
        self.read_at = time.monotonic()
        self.trouble: ops.FileTrouble | None = None
        self.connection = connection
        self.reading = asyncio.Lock()
        self._path = path
        self._is_news = asyncio.Event()
        self._asked = self._answered = 0

    async def flush(self) -> None:
        """Have everything up to now in `changes`."""
        if self.trouble is not None:
            return
        self._asked += 1
        with contextlib.suppress(OSError):
            await asyncio.get_running_loop().sock_sendall(self.connection, b".")
        try:
            async with asyncio.timeout(patient(_FLUSH_S)):
                while self._answered < self._asked and self.trouble is None:
                    self._is_news.clear()
                    await self._is_news.wait()
        except TimeoutError:
            raise RefusedError("cannot tell what has changed: the watch does not answer") from None

    async def follow(self, decoder: wire.Decoder) -> None:
        """Take what the child reports until it ends."""
        try:
            while True:
                while (frame := decoder.take_frame()) is None:
                    decoder.feed(await receive(self.connection))
                if frame.channel is wire.Channel.EXIT:
                    self.trouble = decode(ops.FileEnd, json.loads(frame.payload)).trouble
                    return
                if not frame.payload:
                    self._answered += 1
                    self._is_news.set()
                    continue
                self.changes += [decode(ops.FileChange, one) for one in json.loads(frame.payload)]
                if len(self.changes) > _CHANGES_MAX:
                    self.changes.clear()
                    self.changes.append(ops.FileChange(self._path, ops.ChangeKind.OVERFLOW))
        except OSError:
            pass
        finally:
            self.trouble = self.trouble or ops.FileTrouble(
                wire.Refusal.ABSENT.value, "the watch has ended"
            )
            self._is_news.set()


class Watches:
    """All of them."""

    def __init__(self) -> None:
        self._watches: dict[str, _Watch] = {}
        self._tasks: asyncio.TaskGroup | None = None

    def open(self, tasks: asyncio.TaskGroup) -> None:
        """Have watches belong to a group of tasks."""
        self._tasks = tasks

    async def carry_out(self, context: Context, wish: ops.KeptWatch) -> object:
        """Carry out an operation, and return its answer.

        Raises:
            RefusedError: it is refused; see there.
        """
        match wish:
            case ops.OpenWatch():
                return ops.Watched(await self._begin(context, wish))
            case ops.ReadWatch():
                return await self._read(self._find(wish.watch))
            case ops.CloseWatch():
                self._end(wish.watch)
                return ops.Done()

    async def _begin(self, context: Context, wish: ops.OpenWatch) -> str:
        self._make_room()
        assert self._tasks is not None
        mine, childs = socket.socketpair()
        mine.setblocking(False)
        with childs:
            try:
                folder = ops.WatchFolder(wish.path, wish.recursive, wish.user, wish.home_of)
                pid = files.fork_child(context, folder, childs, wire.Decoder())
            except BaseException:
                mine.close()
                raise
        name, watch = secrets.token_hex(8), _Watch(wish.path, mine)
        begun: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._watches[name] = watch
        self._tasks.create_task(self._keep(name, watch, pid, begun))
        await begun
        return name

    async def _keep(
        self, name: str, watch: _Watch, pid: int, begun: "asyncio.Future[None]"
    ) -> None:
        """See a watch to its end. `begun` has how it begins."""
        ended = asyncio.ensure_future(files.until_ended(pid, watch.connection))
        try:
            decoder = wire.Decoder()
            while (answer := decoder.take_answer()) is None:
                decoder.feed(await receive(watch.connection))
            if answer.error is not None:
                raise _ChildRefusedError(answer.error, answer.message)
            if not begun.done():
                begun.set_result(None)
            await watch.follow(decoder)
        except (OSError, wire.WireError, RefusedError) as error:
            self._watches.pop(name, None)
            if not begun.done():
                begun.set_exception(
                    error if isinstance(error, RefusedError) else RefusedError(str(error))
                )
        finally:
            watch.connection.close()
            with contextlib.suppress(OSError):
                await ended

    def _make_room(self) -> None:
        """Drop the watch that was not read for longest, if there are too many."""
        if len(self._watches) < _WATCHES_MAX:
            return
        # One that has ended first.
        name, oldest = min(
            self._watches.items(), key=lambda one: (one[1].trouble is None, one[1].read_at)
        )
        if oldest.trouble is None and time.monotonic() - oldest.read_at < _UNREAD_S:
            raise ConflictingError(
                f"cannot watch another directory: {_WATCHES_MAX} are watched; end some of them"
            )
        self._end(name)

    def _find(self, name: str) -> _Watch:
        watch = self._watches.get(name)
        if watch is None:
            raise NoWatchError(f"there is no watch {name[:40]!r}")
        return watch

    async def _read(self, watch: _Watch) -> ops.Changes:
        async with watch.reading:
            watch.read_at = time.monotonic()
            await watch.flush()
            if watch.trouble is not None and not watch.changes:
                raise NoWatchError(watch.trouble.message)
            taken, size = 0, 0
            for one in islice(watch.changes, _CHANGES_A_READING):
                size += len(json.dumps(encode(one))) + 2
                if size > _ANSWER_MAX:
                    break
                taken += 1
            items = tuple(watch.changes.popleft() for _ in range(taken))
            return ops.Changes(items, has_more=bool(watch.changes))

    def _end(self, name: str) -> None:
        watch = self._find(name)
        del self._watches[name]
        with contextlib.suppress(OSError):
            watch.connection.shutdown(socket.SHUT_RDWR)


class _ChildRefusedError(RefusedError):
    """The child refused to watch."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = wire.Refusal(code)
