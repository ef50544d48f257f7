"""The files of a sandbox, accessed as one of its users.

Nothing here touches the host's files: a path is a name inside the sandbox. A guest's answers are
bounded and not trusted.
"""

import json
import re
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

from sandyard.server.core import ops
from sandyard.server.core.codec import CodecError, decode
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.errors import (
    AgentError,
    InvalidArgumentError,
    UnavailableError,
)
from sandyard.server.core.ops import FileChange, FileEnd, FileFact, FileOperation
from sandyard.server.core.refusals import meaning_of
from sandyard.server.core.wire import Channel, Frame, Refusal, printable
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.fields import check_account
from sandyard.server.service.sandboxes.frames import Open, decoded, frames_of, pass_on
from sandyard.server.service.sandboxes.reach import GuestStream, Reach
from sandyard.server.service.sandboxes.uses import Use
from sandyard.server.tasks import concurrently

LIST_MAX = 10_000
DEPTH_MAX = 64
_PATH_MAX = 4096
_NAME_MAX = 255
_HOME = b"/workspace/"
_FIGURE_MAX = 2**62
_TAR_LIMIT_MS = 3_600_000
_WORK_S = 3600.0
_FRAMES_A_CHANGE = 5  # the cost of one, in frames
_SILENT_S = 400 * 86_400.0
_LISTED_MAX = 4 * 1024 * 1024
_COMPLAINT_MAX = 4096
_WATCH_MAX = 64
_CHANGES_MAX, _CHANGES_A_READING = 50_000, 2000
_LABELS_MAX = 64
_VERSION = re.compile(r"[0-9a-f-]{1,64}")
WishT = TypeVar("WishT", bound=FileOperation | ops.OpenWatch)
FactT = TypeVar("FactT")
_USES: dict[type[FileOperation | ops.OpenWatch], Use] = {
    ops.MakeFolder: Use("file.created", "Directory created", "create a directory in"),
    ops.Move: Use("file.moved", "File moved", "move a file in"),
    ops.Copy: Use("file.copied", "File copied", "copy a file in"),
    ops.Remove: Use("file.removed", "File removed", "remove a file from"),
    ops.Write: Use("file.written", "File written", "write a file to"),
    ops.Read: Use("file.read", "File read", "read a file of"),
    ops.Stat: Use("file.read", "", "look at a file of", is_in_feed=False),
    ops.ListFolder: Use("file.read", "", "list a directory of", is_in_feed=False),
    ops.WatchFolder: Use("file.watched", "", "watch a directory of", is_in_feed=False),
    ops.OpenWatch: Use("file.watched", "", "watch a directory of", is_in_feed=False),
}


@dataclass(frozen=True)
class Listing:
    """The entries of a directory, by path. `is_cut` says that there are more."""

    entries: Sequence[FileFact]
    is_cut: bool


class FileReading:
    """A file that is being read, and its metadata `fact`."""

    def __init__(self, fact: FileFact, stream: GuestStream, clock: Clock) -> None:
        self.fact = fact
        self._stream = stream
        self._clock = clock

    async def pieces(self, limit: int | None = None) -> AsyncIterator[bytes]:
        """Yield the file's bytes, at most `limit`.

        Raises:
            SandyardError: it could not be read completely; see `meaning_of`.
            UnavailableError, ConflictError: the sandbox or its agent ended.
        """
        left = limit
        async for frame in frames_of(self._stream, self._clock):
            if frame.channel is Channel.EXIT:
                _checked_end(frame)
                return
            piece = frame.payload if left is None else frame.payload[:left]
            if piece:
                yield piece
            if left is not None:
                left -= len(piece)
                if left == 0:
                    return


class Files:
    """Operations on files."""

    def __init__(self, reach: Reach, clock: Clock, opened: Open) -> None:
        self._reach = reach
        self._clock = clock
        self._open = opened

    async def ask(
        self,
        actor: Actor,
        reference: str,
        wish: ops.Stat | ops.MakeFolder | ops.Move | ops.Copy | ops.Remove,
    ) -> FileFact | None:
        """Run one operation, and return the resulting metadata, if any.

        Raises:
            InvalidArgumentError, NotFoundError, AlreadyExistsError, PermissionDeniedError,
                ConflictError: the file system refused; `facts` have the `reason`.
            For the rest see `Reach.open`.
        """
        operation: ops.Operation[Any] = _checked(wish)
        async with AsyncExitStack() as held:
            held.enter_context(self._open.one(actor.org_id))
            opening = self._reach.open(actor, reference, operation, _use_of(wish))
            reached = await held.enter_async_context(opening)
            answer = reached.answer
            if isinstance(wish, ops.Move | ops.Copy | ops.Remove):
                answer = (await _end_of(reached.stream, self._clock, _WORK_S)).fact
        return _cleaned(answer) if isinstance(answer, FileFact) else None

    async def list(self, actor: Actor, reference: str, wish: ops.ListFolder) -> Listing:
        """List a directory. See `ask`."""
        if not 1 <= wish.depth <= DEPTH_MAX:
            raise InvalidArgumentError(
                f"cannot use depth: it must be 1 to {DEPTH_MAX}", field="depth"
            )
        if not 1 <= wish.limit <= LIST_MAX:
            raise InvalidArgumentError(
                f"cannot use limit: it must be 1 to {LIST_MAX}", field="limit"
            )
        wish = _checked(wish)
        entries: list[FileFact] = []
        size = 0
        with self._open.one(actor.org_id):
            async with self._reach.open(actor, reference, wish, _use_of(wish)) as reached:
                async for frame in frames_of(reached.stream, self._clock):
                    if frame.channel is Channel.EXIT:
                        return Listing(entries[: wish.limit], _checked_end(frame).is_cut)
                    size += len(frame.payload)
                    found = _facts_of(frame.payload)
                    if size > _LISTED_MAX or len(entries) + len(found) > wish.limit:
                        return Listing(entries, is_cut=True)
                    entries += found
        raise UnavailableError("the agent of the sandbox closed the connection during a listing")

    @asynccontextmanager
    async def watch(
        self, actor: Actor, reference: str, wish: ops.WatchFolder
    ) -> AsyncIterator[AsyncIterator[FileChange]]:
        """Watch a directory: changes after the block is entered are reported. See `ask`.

        The iteration raises NotFoundError when the directory is deleted.
        """
        wish = _checked(wish)
        async with AsyncExitStack() as held:
            held.enter_context(self._open.one(actor.org_id))
            opening = self._reach.open(actor, reference, wish, _use_of(wish))
            reached = await held.enter_async_context(opening)
            yield _changes_of(reached.stream, self._clock)

    async def open_watch(self, actor: Actor, reference: str, wish: ops.OpenWatch) -> str:
        """Watch a directory, and return the id of the watch, which lasts until it is closed or the
        machine ends. See `ask`."""
        wish = _checked(wish)
        async with self._reach.open(actor, reference, wish, _use_of(wish)) as reached:
            return printable(reached.answer.watch[:_WATCH_MAX])

    async def read_watch(self, actor: Actor, reference: str, watch: str) -> Sequence[FileChange]:
        """Return the changes that a watch has seen since the last time, up to now.

        Raises:
            NotFoundError: there is no such watch, or its directory is gone.
            For the rest see `Reach.open`.
        """
        found: list[FileChange] = []
        while len(found) < _CHANGES_MAX:  # the rest is for the next time
            async with self._reach.open(actor, reference, ops.ReadWatch(watch), _WATCH) as reached:
                answer = reached.answer
                if len(answer.items) > _CHANGES_A_READING:
                    raise AgentError
                await reached.stream.spend(1 + _FRAMES_A_CHANGE * len(answer.items))
            found += [_bounded(one) for one in answer.items]
            if not (answer.has_more and answer.items):
                break
        return found

    async def close_watch(self, actor: Actor, reference: str, watch: str) -> None:
        """End a watch. See `read_watch`."""
        async with self._reach.open(actor, reference, ops.CloseWatch(watch), _WATCH):
            pass

    @asynccontextmanager
    async def read(
        self, actor: Actor, reference: str, wish: ops.Read
    ) -> AsyncIterator[FileReading]:
        """Read a file. See `ask`."""
        wish = _checked(wish)
        async with AsyncExitStack() as held:
            held.enter_context(self._open.one(actor.org_id))
            opening = self._reach.open(actor, reference, wish, _use_of(wish))
            reached = await held.enter_async_context(opening)
            yield FileReading(_cleaned(reached.answer), reached.stream, self._clock)

    async def write(
        self, actor: Actor, reference: str, wish: ops.Write, body: AsyncIterator[bytes]
    ) -> tuple[int, FileFact | None]:
        """Write a stream to a file. Return its size, and what it is now.

        The old content stays until the stream is complete, unless it is written in place. If `body`
        fails, nothing is left of it.

        Raises:
            ChangedError: it does not have the version that it must have.
            For the rest see `ask`.
        """
        wish = _checked(wish)
        async with AsyncExitStack() as held:
            held.enter_context(self._open.one(actor.org_id))
            opening = self._reach.open(actor, reference, wish, _use_of(wish))
            stream = (await held.enter_async_context(opening)).stream
            telling = _end_of(stream, self._clock, _SILENT_S)
            ending = await held.enter_async_context(concurrently(telling))
            await pass_on(body, stream, ending, self._clock)
            end = ending.result()
            return end.count, None if end.fact is None else _cleaned(end.fact)

    @asynccontextmanager
    async def pack(
        self, actor: Actor, reference: str, path: bytes, user: str
    ) -> AsyncIterator[AsyncIterator[bytes]]:
        """Read a directory as a tar archive, with the sandbox's own tar. See `ask`."""
        fact = await self.ask(actor, reference, ops.Stat(path, user))
        if fact is None or fact.kind is not ops.FileKind.FOLDER:
            shown = printable(path.decode(errors="replace")[:500])
            raise meaning_of(Refusal.NOT_A_FOLDER, f"{shown}: not a directory")
        wish = _tar(path, "-cf - .", user)
        use = replace(_USES[ops.Read], attributes=_attributes(path, user))
        async with AsyncExitStack() as held:
            held.enter_context(self._open.one(actor.org_id))
            reached = await held.enter_async_context(self._reach.open(actor, reference, wish, use))
            yield _printed(reached.stream, self._clock)

    async def unpack(
        self, actor: Actor, reference: str, path: bytes, user: str, body: AsyncIterator[bytes]
    ) -> FileFact:
        """Unpack a tar archive into a directory, which is created if necessary, and return it. See
        `ask`.

        Raises:
            InvalidArgumentError: it is not an archive, or its contents cannot be created.
        """
        made = await self.ask(actor, reference, ops.MakeFolder(path, parents=True, user=user))
        if made is None:
            raise AgentError
        wish = replace(_tar(path, "-xf -", user), stdin=True)
        use = replace(_USES[ops.Write], attributes=_attributes(path, user))
        async with AsyncExitStack() as held:
            held.enter_context(self._open.one(actor.org_id))
            opening = self._reach.open(actor, reference, wish, use)
            stream = (await held.enter_async_context(opening)).stream
            telling = _all_printed(stream, self._clock, _SILENT_S)
            ending = await held.enter_async_context(concurrently(telling))
            await pass_on(body, stream, ending, self._clock)
            ending.result()
        return made


_WATCH = replace(_USES[ops.OpenWatch], is_frequent=True)


def path_of(text: bytes, *, field: str = "path") -> bytes:
    """Return a path for the guest. Relative paths are below /workspace.

    Raises:
        InvalidArgumentError: it is invalid.
    """
    if not text or b"\0" in text:
        raise InvalidArgumentError("cannot use {field}: give the path of a file", field=field)
    path = text if text.startswith(b"/") else _HOME + text
    if len(path) > _PATH_MAX or any(len(one) > _NAME_MAX for one in path.split(b"/")):
        raise InvalidArgumentError(
            f"cannot use {{field}}: a path has at most {_PATH_MAX} bytes, and {_NAME_MAX} a name",
            field=field,
        )
    return path


def _checked(wish: WishT) -> WishT:
    check_account(wish.user)
    if wish.home_of is not None:
        check_account(wish.home_of)
    if isinstance(wish, ops.Move) and wish.owner is not None:
        check_account(wish.owner, field="owner")
    if isinstance(wish, ops.MakeFolder | ops.Write):
        if wish.mode is not None and not 0 <= wish.mode <= 0o7777:
            raise InvalidArgumentError(
                "cannot use mode: give it in octal, such as 644", field="mode"
            )
        if wish.owner is not None:
            check_account(wish.owner, field="owner")
    if isinstance(wish, ops.Write) and wish.path.endswith(b"/"):
        raise InvalidArgumentError(
            "cannot write to this path: it ends with /, so it names a directory; add a file name",
            field="path",
        )
    return wish


def _use_of(wish: FileOperation | ops.OpenWatch) -> Use:
    path = wish.target if isinstance(wish, ops.Move | ops.Copy) else wish.path
    return replace(_USES[type(wish)], attributes=_attributes(path, wish.user))


def _attributes(path: bytes, user: str) -> dict[str, str]:
    return {"path": printable(path.decode(errors="replace")[:500]), "user": user}


def _tar(folder: bytes, arguments: str, user: str) -> ops.Execute:
    """Return the command that runs tar in a directory whose path may have any bytes."""
    octal = "".join(f"\\0{one:03o}" for one in folder)
    # The dot preserves trailing newlines, which the shell would remove.
    line = f"p=$(printf '%b.' '{octal}'); cd -- \"${{p%.}}\" && exec tar {arguments}"
    return ops.Execute(line, timeout_ms=_TAR_LIMIT_MS, user=user)


async def _printed(
    stream: GuestStream, clock: Clock, still_s: float | None = None
) -> AsyncIterator[bytes]:
    """Yield a command's output.

    Raises:
        InvalidArgumentError: it failed; the message is its own.
    """
    complaint = b""
    async for frame in frames_of(stream, clock, still_s=still_s):
        if frame.channel is Channel.EXIT:
            end = decoded(ops.Ended, frame)
            # 1: something changed while it was read (tar(1)).
            if end.exit_code not in (0, 1) or end.timed_out:
                text = printable(complaint.decode(errors="replace").strip()[:500])
                raise InvalidArgumentError(
                    f"tar did not do it: {text or 'no reason'}", field="body"
                )
        elif frame.channel is Channel.STDOUT and frame.payload:
            yield frame.payload
        elif frame.channel is Channel.STDERR:
            complaint = (complaint + frame.payload)[:_COMPLAINT_MAX]


async def _all_printed(stream: GuestStream, clock: Clock, still_s: float) -> None:
    async for _ in _printed(stream, clock, still_s):
        pass


def _checked_end(frame: Frame) -> FileEnd:
    """Return the end of an operation, or raise its error."""
    end = decoded(FileEnd, frame)
    if end.trouble is not None:
        raise meaning_of(end.trouble.error, printable(end.trouble.message[:600]))
    return end


async def _end_of(stream: GuestStream, clock: Clock, still_s: float | None = None) -> FileEnd:
    async for frame in frames_of(stream, clock, still_s=still_s):
        if frame.channel is Channel.EXIT:
            return _checked_end(frame)
    raise UnavailableError("the agent of the sandbox closed the connection during a file transfer")


async def _changes_of(stream: GuestStream, clock: Clock) -> AsyncIterator[FileChange]:
    async for frame in frames_of(stream, clock, still_s=_SILENT_S):
        if frame.channel is Channel.EXIT:
            _checked_end(frame)
            return
        changes = _several_of(FileChange, frame.payload)
        await stream.spend(_FRAMES_A_CHANGE * len(changes))
        for one in changes:
            yield _bounded(one)


def _bounded(change: FileChange) -> FileChange:
    source = None if change.source is None else change.source[:_PATH_MAX]
    return replace(change, path=change.path[:_PATH_MAX], source=source)


def _facts_of(payload: bytes) -> list[FileFact]:
    return [_cleaned(one) for one in _several_of(FileFact, payload)]


def _several_of(kind: type[FactT], payload: bytes) -> list[FactT]:
    try:
        found = json.loads(payload)
        if not isinstance(found, list):
            raise AgentError
        return [decode(kind, one) for one in found]
    except (CodecError, ValueError, RecursionError) as error:
        raise AgentError from error


def _cleaned(fact: FileFact) -> FileFact:
    """Return a guest's metadata of a file, within bounds."""

    def figure(value: int) -> int:
        return max(0, min(_FIGURE_MAX, value))

    return replace(
        fact,
        path=fact.path[:_PATH_MAX],
        size=figure(fact.size),
        mode=fact.mode & 0o7777,
        uid=figure(fact.uid),
        gid=figure(fact.gid),
        modified_ms=figure(fact.modified_ms),
        owner=printable(fact.owner[:64]) if fact.owner else None,
        group=printable(fact.group[:64]) if fact.group else None,
        target=fact.target[:_PATH_MAX] if fact.target is not None else None,
        version=fact.version if fact.version and _VERSION.fullmatch(fact.version) else None,
        resolved=fact.resolved[:_PATH_MAX] if fact.resolved is not None else None,
        labels={
            printable(name[:_NAME_MAX]): printable(value[:_PATH_MAX])
            for name, value in islice(fact.labels.items(), _LABELS_MAX)
        },
    )
