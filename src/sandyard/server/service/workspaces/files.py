"""Files of workspaces, as the API needs them. `tree` does the work, and `beneath` makes it safe."""

import asyncio
import os
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from sandyard.server.core.contracts.volumes import Volumes
from sandyard.server.core.errors import (
    InvalidArgumentError,
    PayloadTooLargeError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.records import Workspace
from sandyard.server.service.actor import Actor
from sandyard.server.service.repeats import Repeatable
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.workspaces import tree
from sandyard.server.service.workspaces.beneath import PASSING, Draft, Parts, Root
from sandyard.server.service.workspaces.tree import PIECE, Measure, TreeEntry, shown
from sandyard.server.service.workspaces.workspaces import Storage, Workspaces
from sandyard.server.tasks import in_thread, in_thread_of, to_the_end

BATCH_MAX = 250
_PATH_MAX, _NAME_MAX, _PARTS_MAX = 4095, 255, 256
THREADS, _AT_WORK = 12, 4
"""How many work at files at one time; and for one organization, which cannot shut out others."""
_BROKEN_OFF_S = 3600.0
_LOOK = 32 * 1024 * 1024  # bytes, after which the disk's free space is checked again
_T = TypeVar("_T")


@dataclass(frozen=True)
class EntryOutcome:
    """The outcome for one of several entries; `error` says why it failed."""

    path: Parts
    entry: TreeEntry | None = None
    error: SandyardError | None = None


@dataclass(frozen=True)
class OpenFile:
    """An open file."""

    entry: TreeEntry
    fd: int

    async def pieces(self, begin: int, count: int) -> AsyncIterator[bytes]:
        """Yield `size` bytes from an offset; fewer, if the file is truncated meanwhile."""
        while count > 0:
            data = await in_thread(os.pread, self.fd, min(PIECE, count), begin)
            if not data:
                return
            begin, count = begin + len(data), count - len(data)
            yield data


def path_of(text: bytes, *, field: str) -> Parts:
    """Return a path of a workspace, from its root, with or without the leading /.

    Raises:
        InvalidArgumentError: it is invalid, or contains `..`.
    """
    parts = tuple(one for one in text.split(b"/") if one not in (b"", b"."))
    if b".." in parts:
        raise InvalidArgumentError(
            "cannot use a path with .. in it: give it from the workspace's root", field=field
        )
    if b"\0" in text:
        raise InvalidArgumentError("cannot use a path with U+0000 in it", field=field)
    is_long = any(len(one) > _NAME_MAX for one in parts) or len(parts) > _PARTS_MAX
    if len(text) > _PATH_MAX or is_long:
        raise InvalidArgumentError(
            f"cannot use this path: a name has {_NAME_MAX} bytes at most, a path {_PATH_MAX}, and "
            f"{_PARTS_MAX} names",
            field=field,
        )
    if any(one.startswith(PASSING) for one in parts):
        raise InvalidArgumentError(
            f"cannot use a name that begins with {PASSING.decode()}: it is for what passes",
            field=field,
        )
    return parts


def name_of(text: bytes, *, field: str) -> bytes:
    """Return a single name.

    Raises:
        InvalidArgumentError: it is invalid.
    """
    parts = path_of(text, field=field)
    if len(parts) != 1 or b"/" in text:
        raise InvalidArgumentError(
            "cannot use this name: it is a single name, without /", field=field
        )
    return parts[0]


class WorkspaceFiles:
    """The operations. Each takes the actor and never discloses another organization's files."""

    def __init__(
        self,
        *,
        workspaces: Workspaces,
        volumes: Volumes,
        platform: Platform,
        threads: Executor,
        upload_max: int,
    ) -> None:
        self._workspaces = workspaces
        self._volumes = volumes
        self._store = platform.store
        self._repeats = platform.repeats
        self._clock = platform.clock
        self.upload_max = upload_max
        # Threads of their own, so that slow work here does not delay machines.
        self._threads = threads
        self._turns = defaultdict[str, asyncio.Semaphore](lambda: asyncio.Semaphore(_AT_WORK))
        self._swept: dict[str, float] = {}

    @asynccontextmanager
    async def _root(
        self, actor: Actor, reference: str, *, changes: bool
    ) -> AsyncIterator[tuple[Workspace, Root]]:
        actor.require("files:write" if changes else "files:read")
        workspace = await self._workspaces.find(actor, reference)
        try:
            async with self._volumes.open(workspace.id, workspace.quota_bytes) as place:
                with _opened(place) as root:
                    if changes:
                        await self._sweep(workspace, root)
                    yield workspace, root
        finally:
            # An interrupted operation may have changed something, too.
            await to_the_end(self._noted(workspace, has_changed=changes))

    async def _sweep(self, workspace: Workspace, root: Root) -> None:
        """Remove the leftovers of interrupted operations, once in a while."""
        now = self._clock.now().timestamp()
        if now - self._swept.get(workspace.id, 0.0) < _BROKEN_OFF_S:
            return
        self._swept[workspace.id] = now
        # Another server may be working on a newer state.
        await self._do(workspace.org_id, tree.sweep, root, before=now - _BROKEN_OFF_S)

    async def _noted(self, workspace: Workspace, *, has_changed: bool) -> None:
        with suppress(SandyardError):  # it is measured again later
            await self._workspaces.note_use(workspace, has_changed=has_changed)

    async def _do(
        self, org_id: str, work: Callable[..., _T], *arguments: object, **options: object
    ) -> _T:
        async with self._turns[org_id]:
            return await in_thread_of(self._threads, work, *arguments, **options)

    async def entries(
        self, actor: Actor, reference: str, path: Parts, *, hidden: bool
    ) -> list[TreeEntry]:
        """List a directory; for a file, return the file alone.

        Raises:
            NotFoundError: the workspace or the path does not exist.
            PayloadTooLargeError: there are too many entries.
        """
        async with self._root(actor, reference, changes=False) as (_, root):
            entry = await self._do(actor.org_id, tree.look, root, path)
            if not entry.is_folder:
                return [entry]
            return await self._do(actor.org_id, tree.listed, root, path, hidden=hidden)

    async def drive(self, actor: Actor, reference: str) -> tuple[int, int]:
        """Return how many bytes a workspace holds, and its capacity."""
        async with self._root(actor, reference, changes=False) as (workspace, _):
            use = await self._volumes.use_of(workspace.id, workspace.quota_bytes)
        # The file system below has some room of its own on top.
        return min(use.used_bytes, use.quota_bytes), use.quota_bytes

    async def measure(self, actor: Actor, reference: str, path: Parts) -> Measure:
        """Return the size and number of entries below a path."""
        async with self._root(actor, reference, changes=False) as (_, root):
            return await self._do(actor.org_id, tree.measured, root, path)

    @asynccontextmanager
    async def read(self, actor: Actor, reference: str, path: Parts) -> AsyncIterator[OpenFile]:
        """Open a file while the block lasts.

        Raises:
            NotFoundError: the workspace or the path does not exist.
            InvalidArgumentError: it is not a file.
        """
        async with AsyncExitStack() as held:
            _, root = await held.enter_async_context(self._root(actor, reference, changes=False))
            inner = held.enter_context(ExitStack())
            fd, entry = await self._do(actor.org_id, _open_in, inner, root, path)
            yield OpenFile(entry, fd)

    async def create(
        self,
        actor: Actor,
        reference: str,
        make: Callable[[], Awaitable[TreeEntry]],
        *,
        request: Repeatable | None,
    ) -> TreeEntry:
        """Return the entry that `make` creates, or the present state of the one that the same
        `request` has created before.

        Raises:
            NotFoundError: that one has been removed.
        """
        if request is None:
            return await make()
        async with self._repeats.turn(actor, request):
            async with self._store.write(actor.org_id) as tx:
                made = await self._repeats.made_before(tx, actor, request)
            if made is not None:
                path = tuple(bytes.fromhex(one) for one in made)
                async with self._root(actor, reference, changes=False) as (_, root):
                    return await self._do(actor.org_id, tree.look, root, path)
            entry = await make()
            # Not before: what was not created must be created by the next attempt.
            async with self._store.write(actor.org_id) as tx:
                await self._repeats.note(tx, actor, request, tuple(one.hex() for one in entry.path))
        return entry

    async def make_folder(self, actor: Actor, reference: str, path: Parts) -> TreeEntry:
        """Create a directory and its parents.

        Raises:
            AlreadyExistsError: the name is taken.
        """
        async with self._root(actor, reference, changes=True) as (workspace, root):
            await self._room(actor, workspace)
            return await self._do(actor.org_id, tree.make_folder, root, path)

    async def write(
        self,
        actor: Actor,
        reference: str,
        folder: Parts,
        source: AsyncIterator[bytes],
        name: Callable[[], bytes],
        *,
        replaces: bool,
        most: int | None = None,
    ) -> TreeEntry:
        """Write the data of `source` to a file in a directory, which is created if necessary. The
        file appears when it is complete. `name` is called after all data has arrived.

        Raises:
            AlreadyExistsError: the name is taken, and must not be replaced.
            PayloadTooLargeError: it is too large, or the workspace is full.
        """
        async with self._root(actor, reference, changes=True) as (workspace, root):
            left = await self._room(actor, workspace)
            size, looked_at = 0, 0
            async with AsyncExitStack() as held:
                inner = held.enter_context(ExitStack())
                draft = await self._do(actor.org_id, _draft_in, inner, root, folder)
                async for piece in source:
                    size += len(piece)
                    if most is not None and size > most:
                        raise PayloadTooLargeError(
                            f"cannot take a file of over {most} bytes in one upload: send it in "
                            "parts, or have workspaces.upload_mib raised",
                            limit=most,
                        )
                    if size > left:
                        raise _full(workspace)
                    if size - looked_at >= _LOOK:
                        looked_at = size
                        use = await self._volumes.use_of(workspace.id, workspace.quota_bytes)
                        if not use.host_bytes:
                            raise _host_is_full()
                    await self._do(actor.org_id, tree.write, draft, folder, piece)
                path = (*folder, name_of(name(), field="name"))
                await self._do(actor.org_id, tree.keep, draft, path, replaces=replaces)
            return await self._do(actor.org_id, tree.look, root, path)

    async def _room(self, actor: Actor, workspace: Workspace, size: int = 1) -> int:
        """Return how many bytes can be written now, by the workspace's size and the organization's
        limit.

        Raises:
            PayloadTooLargeError: the limit is reached, or `size` does not fit.
            UnavailableError: it would fit, but the host's disk is full.
        """
        storage: Storage = await self._workspaces.storage(actor)
        use = await self._volumes.use_of(workspace.id, workspace.quota_bytes)
        left = max(0, use.quota_bytes - use.used_bytes)
        if (quota := storage.quota_bytes) is not None:
            # The stored size of this one may be older than what was just measured.
            others = storage.used_bytes - workspace.size_bytes
            of_all = quota - others - use.used_bytes
            if of_all <= 0:
                raise PayloadTooLargeError(
                    f"cannot write this: the organization's workspaces may hold {quota} bytes in "
                    "all; remove something first",
                    limit=quota,
                )
            left = min(left, of_all)
        if size > max(left, 1):
            raise _full(workspace)
        if use.host_bytes < size:
            raise _host_is_full()
        return left

    async def _check_copy(
        self, actor: Actor, workspace: Workspace, root: Root, source: Parts
    ) -> None:
        """Return if there is space for a copy."""
        await self._room(
            actor, workspace, max(1, await self._do(actor.org_id, tree.weighed, root, source))
        )

    async def move(
        self, actor: Actor, reference: str, source: Parts, target: Parts, *, replaces: bool
    ) -> TreeEntry:
        """Move or rename a file or directory. If the target is a directory, move into it.

        Raises:
            NotFoundError: it does not exist.
            AlreadyExistsError: the target exists, and must not be replaced.
        """
        async with self._root(actor, reference, changes=True) as (_, root):
            return await self._do(actor.org_id, _moved, root, source, target, replaces)

    async def rename(
        self, actor: Actor, reference: str, path: Parts, name: bytes, *, replaces: bool
    ) -> TreeEntry:
        """Rename a file or directory in its directory."""
        async with self._root(actor, reference, changes=True) as (_, root):
            return await self._do(
                actor.org_id, tree.move, root, path, (*path[:-1], name), replaces=replaces
            )

    async def copy(
        self, actor: Actor, reference: str, source: Parts, target: Parts, *, replaces: bool
    ) -> TreeEntry:
        """Copy a file, or a directory and its contents. If the target is a directory, copy into
        it."""
        async with self._root(actor, reference, changes=True) as (workspace, root):
            await self._check_copy(actor, workspace, root, source)
            return await self._do(actor.org_id, _copied, root, source, target, replaces)

    async def remove(
        self, actor: Actor, reference: str, paths: Sequence[Parts]
    ) -> list[EntryOutcome]:
        """Delete files, and directories with their contents; return each outcome."""

        def one(root: Root, path: Parts) -> None:
            tree.remove(root, path)

        return await self._each(actor, reference, paths, one)

    async def place(
        self,
        actor: Actor,
        reference: str,
        paths: Sequence[Parts],
        target: Parts,
        *,
        copies: bool,
        replaces: bool,
    ) -> list[EntryOutcome]:
        """Move or copy several entries into a directory; return each outcome.

        Raises:
            NotFoundError: the directory does not exist.
        """

        def one(root: Root, path: Parts) -> TreeEntry:
            return (_copied if copies else _moved)(root, path, target, replaces)

        return await self._each(actor, reference, paths, one, into=target, copies=copies)

    async def _each(
        self,
        actor: Actor,
        reference: str,
        paths: Sequence[Parts],
        work: Callable[[Root, Parts], TreeEntry | None],
        *,
        into: Parts | None = None,
        copies: bool = False,
    ) -> list[EntryOutcome]:
        if not 1 <= len(paths) <= BATCH_MAX:
            raise InvalidArgumentError(
                f"cannot do this to {len(paths)} at once: 1 to {BATCH_MAX}", field="ids"
            )
        done = []
        async with self._root(actor, reference, changes=True) as (workspace, root):
            if into is not None:
                there = await self._do(actor.org_id, tree.look, root, into)
                if not there.is_folder:
                    raise InvalidArgumentError(
                        f"cannot put several into {shown(into)}: it is a file", field="target"
                    )
            for path in paths:
                try:
                    if copies:
                        await self._check_copy(actor, workspace, root, path)
                    done.append(EntryOutcome(path, await self._do(actor.org_id, work, root, path)))
                except SandyardError as error:
                    done.append(EntryOutcome(path, error=error))
        return done


def _open_in(held: ExitStack, root: Root, path: Parts) -> tuple[int, TreeEntry]:
    """Open a file that is closed with `held`, even if the caller was cancelled."""
    fd, entry = tree.opened(root, path)
    held.callback(os.close, fd)
    return fd, entry


def _draft_in(held: ExitStack, root: Root, folder: Parts) -> Draft:
    """Begin a file that is discarded with `held`, unless it is kept."""
    return held.enter_context(tree.drafted(root, folder))


@contextmanager
def _opened(place: Path) -> Iterator[Root]:
    try:
        root = Root(place)
    except OSError as error:
        raise UnavailableError(f"cannot reach the workspace now: {error.strerror}") from error
    with root:
        yield root


def _target(root: Root, source: Parts, target: Parts) -> Parts:
    """Return the destination: inside an existing directory, else the path itself."""
    if not source:
        return target
    with suppress(OSError):
        if tree.leads_to_folder(root, target):
            return (*target, source[-1])
    return target


def _moved(root: Root, source: Parts, target: Parts, replaces: bool) -> TreeEntry:
    return tree.move(root, source, _target(root, source, target), replaces=replaces)


def _copied(root: Root, source: Parts, target: Parts, replaces: bool) -> TreeEntry:
    return tree.copy(root, source, _target(root, source, target), replaces=replaces)


def _host_is_full() -> UnavailableError:
    return UnavailableError(
        "cannot write now: the host's disk is full; its operator must free some space"
    )


def _full(workspace: Workspace) -> PayloadTooLargeError:
    return PayloadTooLargeError(
        f"cannot write this: the workspace is full, it holds {workspace.quota_bytes} bytes; remove "
        "something first",
        limit=workspace.quota_bytes,
    )
