"""The service `filesystem.Filesystem`.

As E2B does, everything is done as root, and what is made belongs to the user.
"""

import base64
import binascii
import json
import os
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from sandyard.server.core import ops
from sandyard.server.core.connect import Code, ConnectError, Fields, encode_time
from sandyard.server.core.errors import (
    AgentError,
    GuestNotFoundError,
    InvalidArgumentError,
)
from sandyard.server.core.ops import ChangeKind, FileChange, FileFact, FileKind
from sandyard.server.e2b.envd.box import Box
from sandyard.server.e2b.envd.calls import Call, Message, Route, streamed, unary, until_deadline
from sandyard.server.service.sandboxes.files import DEPTH_MAX, LIST_MAX

_TYPES: Final = {FileKind.FILE: "FILE_TYPE_FILE", FileKind.FOLDER: "FILE_TYPE_DIRECTORY"}
_EVENTS: Final = {
    ChangeKind.CREATED: "EVENT_TYPE_CREATE",
    ChangeKind.MODIFIED: "EVENT_TYPE_WRITE",
    ChangeKind.ATTRIBUTES: "EVENT_TYPE_CHMOD",
    ChangeKind.REMOVED: "EVENT_TYPE_REMOVE",
}
_CREATE, _RENAME = "EVENT_TYPE_CREATE", "EVENT_TYPE_RENAME"
_ENTRIES_MAX = 1000
_NAME_MAX, _PATH_MAX, _WATCHER_MAX = 64, 4096, 16 * 1024
_MARKS: Final = ((0o4000, "u"), (0o2000, "g"), (0o1000, "t"))


async def _stat(box: Box, message: Fields) -> Message:
    """Return what is at a path."""
    return {"entry": entry_of(await fact_at(box, _path(message)))}


async def _list_dir(box: Box, message: Fields) -> Message:
    """List a directory, each directory in it followed by its contents."""
    depth = min(DEPTH_MAX, max(1, message.integer("depth")))
    path = _path(message)
    wish = ops.ListFolder(path, depth, LIST_MAX, home_of=box.user)
    found = await box.services.files.list(box.actor, box.id, wish)
    if found.is_cut:
        raise ConnectError(
            Code.RESOURCE_EXHAUSTED, f"the directory has over {LIST_MAX} entries: list less of it"
        )
    return {"entries": [entry_of(one) for one in found.entries]}


async def _make_dir(box: Box, message: Fields) -> Message:
    """Make a directory, and those above it."""
    wish = ops.MakeFolder(
        _path(message), parents=True, owner=box.user, home_of=box.user, is_new=True
    )
    return {"entry": entry_of(_given(await box.services.files.ask(box.actor, box.id, wish)))}


async def _move(box: Box, message: Fields) -> Message:
    """Move a file or directory, over a file that is there."""
    source, target = (_path(message, name) for name in ("source", "destination"))
    wish = ops.Move(source, target, replaces=True, home_of=box.user, parents=True, owner=box.user)
    return {"entry": entry_of(_given(await box.services.files.ask(box.actor, box.id, wish)))}


async def _remove(box: Box, message: Fields) -> Message:
    """Remove whatever is at a path."""
    wish = ops.Remove(_path(message), everything=True, home_of=box.user)
    with suppress(GuestNotFoundError):
        await box.services.files.ask(box.actor, box.id, wish)
    return {}


# --- watches --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Watched:
    """What is watched, and whether events tell of what they are about: of so many paths at most,
    since the sandbox is asked for each."""

    path: bytes
    includes_entry: bool
    _entries: dict[bytes, Message | None] = field(default_factory=dict)

    async def events(self, box: Box, change: FileChange) -> list[Message]:
        """Return the events of a change.

        Raises:
            ConnectError: events were lost.
        """
        if change.kind is ChangeKind.OVERFLOW:
            raise ConnectError(Code.DATA_LOSS, "events were lost: read the directory anew")
        if change.kind is ChangeKind.MOVED:
            found = [] if change.source is None else [self._event(change.source, _RENAME)]
            return [*found, await self._with_entry(box, change.path, _CREATE)]
        kind = _EVENTS[change.kind]
        if change.kind is ChangeKind.REMOVED:
            return [self._event(change.path, kind)]
        return [await self._with_entry(box, change.path, kind)]

    async def _with_entry(self, box: Box, path: bytes, kind: str) -> Message:
        event = self._event(path, kind)
        if not self.includes_entry:
            return event
        if path not in self._entries and len(self._entries) < _ENTRIES_MAX:
            self._entries[path] = None
            with suppress(GuestNotFoundError):
                self._entries[path] = entry_of(await fact_at(box, path))
        entry = self._entries.get(path)
        return event if entry is None else {**event, "entry": entry}

    def _event(self, path: bytes, kind: str) -> dict[str, object]:
        name = path.removeprefix(self.path.rstrip(b"/")).lstrip(b"/")
        return {"name": os.fsdecode(name).encode(errors="replace").decode(), "type": kind}


async def _to_watch(box: Box, message: Fields) -> _Watched:
    """Return what a client wants to watch.

    Raises:
        ConnectError: it is no directory.
    """
    fact = await fact_at(box, _path(message))
    if FileKind.FOLDER not in (fact.kind, fact.resolved_kind):
        raise ConnectError(Code.INVALID_ARGUMENT, f"path {shown(fact.path)} not a directory")
    return _Watched(fact.path, message.flag("includeEntry"))


@asynccontextmanager
async def _watch_dir(call: Call) -> AsyncIterator[AsyncIterator[Message]]:
    """Watch a directory until the client disconnects."""
    box = call.box
    watched = await _to_watch(box, call.message)
    wish = ops.WatchFolder(watched.path, call.message.flag("recursive"))

    async def messages() -> AsyncIterator[Message]:
        yield {"start": {}}
        async for change in changes:
            now = _Watched(watched.path, watched.includes_entry)
            for event in await now.events(box, change):
                yield {"filesystem": event}

    async with box.services.files.watch(box.actor, box.id, wish) as changes:
        yield until_deadline(messages(), box.services.clock, call.timeout_ms)


async def _create_watcher(box: Box, message: Fields) -> Message:
    """Watch a directory until the client ends that; its events are asked for."""
    watched = await _to_watch(box, message)
    wish = ops.OpenWatch(watched.path, message.flag("recursive"))
    name = await box.services.files.open_watch(box.actor, box.id, wish)
    # Whichever server is asked for events knows by this what the names of files are relative to.
    about = [name, watched.path.hex(), watched.includes_entry]
    return {"watcherId": base64.urlsafe_b64encode(json.dumps(about).encode()).decode()}


async def _get_watcher_events(box: Box, message: Fields) -> Message:
    """Return the events since the last time."""
    name, watched = _watcher(message)
    changes = await box.services.files.read_watch(box.actor, box.id, name)
    return {"events": [event for one in changes for event in await watched.events(box, one)]}


async def _remove_watcher(box: Box, message: Fields) -> Message:
    """End a watch."""
    name, _ = _watcher(message)
    await box.services.files.close_watch(box.actor, box.id, name)
    return {}


def _watcher(message: Fields) -> tuple[str, _Watched]:
    """Return the agent's name of a watch, and what is watched."""
    given = message.text("watcherId")
    if len(given) > _WATCHER_MAX:
        given = ""
    try:
        name, path, includes_entry = json.loads(base64.urlsafe_b64decode(given))
        return str(name)[:_NAME_MAX], _Watched(bytes.fromhex(path), bool(includes_entry))
    except (binascii.Error, ValueError, TypeError, RecursionError) as error:
        raise ConnectError(Code.NOT_FOUND, f"watcher with id {given[:100]} not found") from error


# --- facts about files as JSON ----------------------------------------------------------------


async def fact_at(box: Box, path: bytes) -> FileFact:
    """Return what is at a path.

    Raises:
        GuestNotFoundError: there is nothing.
    """
    found = await box.services.files.ask(box.actor, box.id, ops.Stat(path, home_of=box.user))
    return _given(found)


def entry_of(fact: FileFact) -> dict[str, object]:
    """Return an `EntryInfo`: of a link, its own metadata and the type of what it leads to."""
    kind = fact.resolved_kind if fact.kind is FileKind.LINK else fact.kind
    entry: dict[str, object] = {
        "name": shown(fact.path).rstrip("/").rpartition("/")[2] or "/",
        "type": _TYPES.get(kind, "FILE_TYPE_UNSPECIFIED") if kind else "FILE_TYPE_UNSPECIFIED",
        "path": shown(fact.path),
        "size": str(fact.size),
        "mode": fact.mode & 0o777,
        "permissions": _permissions(fact),
        "owner": fact.owner or str(fact.uid),
        "group": fact.group or str(fact.gid),
        "modifiedTime": encode_time(_moment(fact.modified_ms)),
    }
    if fact.kind is FileKind.LINK:
        entry["symlinkTarget"] = shown(fact.resolved or fact.path)
    if fact.labels:
        entry["metadata"] = dict(fact.labels)
    return entry


def _moment(milliseconds: int) -> datetime:
    try:
        return datetime.fromtimestamp(milliseconds / 1000, UTC)
    except (ValueError, OverflowError):  # a guest may set any time
        return datetime.fromtimestamp(0, UTC)


def _permissions(fact: FileFact) -> str:
    """Return the mode as Go's `fs.FileMode` writes it."""
    kinds = {FileKind.FOLDER: "d", FileKind.LINK: "L", FileKind.OTHER: "?"}
    first = kinds.get(fact.kind, "") + "".join(mark for bit, mark in _MARKS if fact.mode & bit)
    letters = "rwxrwxrwx"
    bits = (letters[at] if fact.mode & (0o400 >> at) else "-" for at in range(9))
    return (first or "-") + "".join(bits)


def shown(path: bytes) -> str:
    """Return a path as text; what is not UTF-8 is replaced."""
    return path.decode(errors="replace")


def _path(message: Fields, name: str = "path") -> bytes:
    return checked_path(message.text(name).encode())


def checked_path(path: bytes) -> bytes:
    """Return a path.

    Raises:
        InvalidArgumentError: it can be none.
    """
    if b"\0" in path or len(path) > _PATH_MAX:
        raise InvalidArgumentError(
            f"cannot use the path: it has a null character, or over {_PATH_MAX} bytes", field="path"
        )
    return path


def _given(fact: FileFact | None) -> FileFact:
    if fact is None:
        raise AgentError
    return fact


METHODS: Final[Mapping[str, Route]] = {
    "Stat": unary(_stat),
    "ListDir": unary(_list_dir),
    "MakeDir": unary(_make_dir),
    "Move": unary(_move),
    "Remove": unary(_remove),
    "WatchDir": streamed(_watch_dir, alive={"keepalive": {}}),
    "CreateWatcher": unary(_create_watcher),
    "GetWatcherEvents": unary(_get_watcher_events),
    "RemoveWatcher": unary(_remove_watcher),
}
