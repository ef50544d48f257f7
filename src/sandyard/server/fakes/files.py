"""The files of a fake machine: a tree in memory that gives the same errors as a real one."""

import asyncio
import json
import posixpath
from collections.abc import AsyncIterator, Iterator, Mapping
from dataclasses import replace
from hashlib import sha256
from typing import Any, TypeVar, cast

from sandyard.server.core import ops, wire
from sandyard.server.core.codec import encode

ROOM = 64 * 1024 * 1024


class RefusedFileError(Exception):
    """The operation on a file fails."""

    def __init__(self, code: wire.Refusal, path: bytes) -> None:
        super().__init__(f"{path.decode(errors='replace')}: {code.value.replace('_', ' ')}")
        self.code = code


HOME = b"/root"
"""The home of every account."""
Placed = TypeVar("Placed", bound=ops.FileOperation | ops.OpenWatch)


def placed(wish: Placed) -> Placed:
    """Return an operation with absolute paths."""
    if wish.home_of is None:
        return wish
    found: Any = wish
    names = ("source", "target") if isinstance(wish, ops.Move | ops.Copy) else ("path",)
    found = replace(found, **{name: _below_home(getattr(wish, name)) for name in names})
    return cast("Placed", found)


def _below_home(path: bytes) -> bytes:
    if path == b"~" or path.startswith(b"~/"):
        path = path[2:]
    return posixpath.normpath(posixpath.join(HOME, path))


class FakeFiles:
    """A tree: a directory is None, a file its bytes. Access to `/denied` is denied, and there is no
    user `nobody`."""

    def __init__(self) -> None:
        folders = (b"/", b"/workspace", b"/tmp", HOME)
        self._tree: dict[bytes, bytes | None] = dict.fromkeys(folders)
        self._modes: dict[bytes, int] = {}
        self._labels: dict[bytes, Mapping[str, str]] = {}
        self._watches: dict[asyncio.Queue[ops.FileChange], ops.WatchFolder | ops.OpenWatch] = {}
        self._kept: dict[str, asyncio.Queue[ops.FileChange]] = {}

    def answer(self, wish: ops.FileOperation | ops.KeptWatch) -> object:
        """Carry out an operation, and return its answer.

        Raises:
            RefusedFileError: it fails.
        """
        if isinstance(wish, ops.ReadWatch | ops.CloseWatch):
            return self._look(wish)
        if "nobody" in (wish.user, wish.home_of):
            raise RefusedFileError(wire.Refusal.NO_USER, b"nobody")
        wish = placed(wish)
        match wish:
            case ops.OpenWatch():
                self._folder(wish.path)
                changes: asyncio.Queue[ops.FileChange] = asyncio.Queue()
                name = f"watch-{len(self._kept)}"
                self._kept[name], self._watches[changes] = changes, wish
                return ops.Watched(name)
            case ops.Stat():
                return self.fact(wish.path)
            case ops.ListFolder() | ops.WatchFolder():
                self._folder(wish.path)
            case ops.Read():
                self.content(wish.path)
                return self.fact(wish.path)
            case ops.MakeFolder():
                return self._make_folder(wish)
            case ops.Move() | ops.Copy():
                self._move(wish)
            case ops.Remove():
                self._remove(wish)
            case ops.Write():
                self._check_write(wish)
        return ops.Done()

    def fact(self, path: bytes) -> ops.FileFact:
        """Return the metadata of a file."""
        found = self._find(path)
        is_folder = found is None
        mode = self._modes.get(path, 0o755 if is_folder else 0o644)
        kind = ops.FileKind.FOLDER if is_folder else ops.FileKind.FILE
        version = sha256(found or b"").hexdigest()[:16]
        return ops.FileFact(
            path, kind, len(found or b""), mode, 0, 0, 0, "root", "root", version=version,
            labels=self._labels.get(path, {}),
        )  # fmt: skip

    def content(self, path: bytes) -> bytes:
        """Return the bytes of a file."""
        found = self._find(path)
        if found is None:
            raise RefusedFileError(wire.Refusal.IS_A_FOLDER, path)
        return found

    def frames(self, wish: ops.ListFolder | ops.Read) -> Iterator[bytes]:
        """Yield the frames that follow an answer."""
        if isinstance(wish, ops.Read):
            data = self.content(wish.path)[wish.offset :]
            data = data if wish.length is None else data[: wish.length]
            for start in range(0, len(data), wire.FRAME_MAX):
                yield wire.encode_frame(wire.Channel.STDOUT, data[start : start + wire.FRAME_MAX])
            yield end_frame(ops.FileEnd(len(data)))
            return
        found = sorted(self._below(wish.path, wish.depth))
        facts = [encode(self.fact(one)) for one in found[: wish.limit]]
        if facts:
            yield wire.encode_frame(wire.Channel.STDOUT, json.dumps(facts).encode())
        yield end_frame(ops.FileEnd(len(facts), len(found) > len(facts)))

    async def watched(self, wish: ops.WatchFolder) -> AsyncIterator[bytes]:
        """Yield the frames of a watch, and its end when its directory is removed."""
        changes: asyncio.Queue[ops.FileChange] = asyncio.Queue()
        self._watches[changes] = wish
        try:
            while True:
                change = await changes.get()
                if change.path == wish.path:
                    message = f"{wish.path.decode(errors='replace')}: the directory is gone"
                    trouble = ops.FileTrouble(wire.Refusal.ABSENT.value, message)
                    yield end_frame(ops.FileEnd(trouble=trouble))
                    return
                payload = json.dumps([encode(change)]).encode()
                yield wire.encode_frame(wire.Channel.STDOUT, payload)
        finally:
            del self._watches[changes]

    def _look(self, wish: ops.ReadWatch | ops.CloseWatch) -> object:
        """Read or end a watch that is kept."""
        if wish.watch not in self._kept:
            raise RefusedFileError(wire.Refusal.ABSENT, wish.watch.encode())
        changes = self._kept[wish.watch]
        if isinstance(wish, ops.CloseWatch):
            del self._kept[wish.watch], self._watches[changes]
            return ops.Done()
        return ops.Changes(tuple(changes.get_nowait() for _ in range(changes.qsize())))

    def _tell(self, path: bytes, kind: ops.ChangeKind, source: bytes | None = None) -> None:
        is_folder = self._tree.get(path, b"") is None
        for changes, wish in self._watches.items():
            head = wish.path.rstrip(b"/") + b"/"
            is_near = path.startswith(head) and (wish.recursive or b"/" not in path[len(head) :])
            if is_near or path == wish.path:
                changes.put_nowait(ops.FileChange(path, kind, is_folder, source))

    def write(self, wish: ops.Write, data: bytes) -> ops.FileEnd:
        """Write a file, if there is room."""
        if len(data) > ROOM:
            message = f"{wish.path.decode(errors='replace')}: no space left on device"
            return ops.FileEnd(trouble=ops.FileTrouble(wire.Refusal.NO_SPACE.value, message))
        is_new = wish.path not in self._tree
        if wish.is_new or wish.if_version is not None:
            known = None if is_new else self.fact(wish.path).version
            holds = is_new if wish.is_new else wish.if_version in (known, "*" if known else known)
            if not holds:
                message = f"{wish.path.decode(errors='replace')} has changed meanwhile"
                return ops.FileEnd(trouble=ops.FileTrouble(wire.Refusal.CHANGED.value, message))
        self._tree[wish.path] = data
        self._tell(wish.path, ops.ChangeKind.CREATED if is_new else ops.ChangeKind.MODIFIED)
        if wish.mode is not None:
            self._modes[wish.path] = wish.mode
        if wish.labels is not None:
            self._labels[wish.path] = wish.labels
        return ops.FileEnd(len(data), fact=self.fact(wish.path))

    def _find(self, path: bytes) -> bytes | None:
        if path.startswith(b"/denied"):
            raise RefusedFileError(wire.Refusal.DENIED, path)
        if path not in self._tree:
            above = posixpath.dirname(path)
            if self._tree.get(above) is not None:
                raise RefusedFileError(wire.Refusal.NOT_A_FOLDER, path)
            raise RefusedFileError(wire.Refusal.ABSENT, path)
        return self._tree[path]

    def _folder(self, path: bytes) -> None:
        if self._find(path) is not None:
            raise RefusedFileError(wire.Refusal.NOT_A_FOLDER, path)

    def _below(self, folder: bytes, depth: int) -> Iterator[bytes]:
        head = folder.rstrip(b"/") + b"/"
        for path in self._tree:
            if path.startswith(head) and path != b"/" and path[len(head) :].count(b"/") < depth:
                yield path

    def _make_parents(self, path: bytes) -> None:
        above = posixpath.dirname(path)
        if above not in self._tree:
            self._make_parents(above)
            self._tree[above] = None
            self._tell(above, ops.ChangeKind.CREATED)

    def _make_folder(self, wish: ops.MakeFolder) -> ops.FileFact:
        if wish.path in self._tree:
            if wish.is_new and self._tree[wish.path] is not None:
                raise RefusedFileError(wire.Refusal.NOT_A_FOLDER, wish.path)
            if wish.is_new or not wish.parents or self._tree[wish.path] is not None:
                raise RefusedFileError(wire.Refusal.EXISTS, wish.path)
            return self.fact(wish.path)
        if wish.parents:
            self._make_parents(wish.path)
        self._folder(posixpath.dirname(wish.path))
        self._tree[wish.path] = None
        self._tell(wish.path, ops.ChangeKind.CREATED)
        return self.fact(wish.path)

    def _move(self, wish: ops.Move | ops.Copy) -> None:
        self._find(wish.source)
        if isinstance(wish, ops.Move) and wish.parents:
            self._make_parents(wish.target)
        self._folder(posixpath.dirname(wish.target))
        if wish.target in self._tree and not wish.replaces:
            raise RefusedFileError(wire.Refusal.EXISTS, wish.target)
        for path in [wish.source, *self._below(wish.source, 10**6)]:
            self._tree[wish.target + path[len(wish.source) :]] = self._tree[path]
            if isinstance(wish, ops.Move):
                del self._tree[path]
        if isinstance(wish, ops.Move):
            self._tell(wish.target, ops.ChangeKind.MOVED, wish.source)
        else:
            self._tell(wish.target, ops.ChangeKind.CREATED)

    def _remove(self, wish: ops.Remove) -> None:
        self._find(wish.path)
        below = list(self._below(wish.path, 10**6))
        if below and not wish.everything:
            raise RefusedFileError(wire.Refusal.EXISTS, wish.path)
        for path in [*reversed(below), wish.path]:
            self._tell(path, ops.ChangeKind.REMOVED)
            del self._tree[path]

    def _check_write(self, wish: ops.Write) -> None:
        if wish.parents:
            self._make_parents(wish.path)
        self._folder(posixpath.dirname(wish.path))
        if self._tree.get(wish.path, b"") is None:
            raise RefusedFileError(wire.Refusal.IS_A_FOLDER, wish.path)


def end_frame(end: ops.FileEnd) -> bytes:
    """Return the last frame."""
    return wire.encode_frame(wire.Channel.EXIT, json.dumps(encode(end)).encode())
