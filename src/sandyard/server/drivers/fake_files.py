"""The files of a fake machine: a tree in memory that gives the same errors as a real one."""

import asyncio
import json
import posixpath
from collections.abc import AsyncIterator, Iterator
from hashlib import sha256

from sandyard.server.core import ops, wire
from sandyard.server.core.codec import encode

ROOM = 64 * 1024 * 1024


class RefusedFileError(Exception):
    """The operation on a file fails."""

    def __init__(self, code: wire.Refusal, path: bytes) -> None:
        super().__init__(f"{path.decode(errors='replace')}: {code.value.replace('_', ' ')}")
        self.code = code


class FakeFiles:
    """A tree: a directory is None, a file its bytes. Access to `/denied` is denied."""

    def __init__(self) -> None:
        self._tree: dict[bytes, bytes | None] = {b"/": None, b"/workspace": None, b"/tmp": None}
        self._modes: dict[bytes, int] = {}
        self._watches: dict[asyncio.Queue[ops.FileChange], ops.WatchFolder] = {}

    def answer(self, wish: ops.FileOperation) -> object:
        """Carry out an operation, and return its answer.

        Raises:
            RefusedFileError: it fails.
        """
        match wish:
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
            path, kind, len(found or b""), mode, 0, 0, 0, "root", "root", version=version
        )

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
            if not wish.parents or self._tree[wish.path] is not None:
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
