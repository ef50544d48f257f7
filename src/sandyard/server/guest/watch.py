"""Watches a directory with inotify(7), on request with everything below it.

The kernel reports names in one directory only, so each has its own watch. A new directory is
watched at once, and what was put into it before that is reported as well.
"""

import contextlib
import ctypes
import errno
import os
import select
import struct
from collections.abc import Iterator

from sandyard.server.core.ops import ChangeKind, FileChange
from sandyard.server.guest.parts import has_replaced, is_in_part

FOLDERS_MAX = 100_000
_EVENT = struct.Struct("=iIII")
_BUFFER = 256 * 1024
_PAIR_S = 0.02
# linux/inotify.h
_MODIFY, _ATTRIB, _MOVED_FROM, _MOVED_TO = 0x2, 0x4, 0x40, 0x80
_CREATE, _DELETE, _DELETE_SELF, _MOVE_SELF = 0x100, 0x200, 0x400, 0x800
_UNMOUNT, _OVERFLOW, _IGNORED = 0x2000, 0x4000, 0x8000
_ONLYDIR, _DONT_FOLLOW, _ISDIR = 0x1000000, 0x2000000, 0x40000000
_WANTED = (
    _MODIFY | _ATTRIB | _MOVED_FROM | _MOVED_TO | _CREATE | _DELETE | _DELETE_SELF | _MOVE_SELF
)
_PLAIN = {
    _CREATE: ChangeKind.CREATED, _MODIFY: ChangeKind.MODIFIED, _ATTRIB: ChangeKind.ATTRIBUTES,
    _DELETE: ChangeKind.REMOVED, _MOVED_FROM: ChangeKind.REMOVED, _MOVED_TO: ChangeKind.CREATED,
}  # fmt: skip


class TooManyError(Exception):
    """The kernel watches no more directories for this user."""


class Watcher:
    """Watches one directory, or a tree."""

    def __init__(self) -> None:
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._fd = -1
        self._top = -1
        self._recursive = False
        self._paths: dict[int, bytes] = {}
        self._reported: set[bytes] = set()
        self.is_over = False
        """Whether the directory is gone; no more events follow."""

    def fileno(self) -> int:
        """Return a descriptor that is readable when there are changes."""
        return self._fd

    def open(self, folder: bytes, *, recursive: bool) -> None:
        """Begin to watch a directory.

        Raises:
            OSError: it cannot be watched.
            TooManyError: see there.
        """
        self._fd = self._libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if self._fd < 0:
            raise TooManyError if ctypes.get_errno() == errno.EMFILE else self._error(folder)
        self._recursive = recursive
        self._top = self._add(folder, _ONLYDIR)
        if recursive:
            for _ in self._watch_below(folder):
                pass

    def close(self) -> None:
        """Stop watching."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def changes(self) -> list[FileChange]:
        """Return the changes since the last call, in order."""
        found: list[FileChange] = []
        events = self._events()
        while events:
            wd, mask, cookie, name = events.pop(0)
            folder = self._paths.get(wd)
            if mask & _OVERFLOW:
                found.append(FileChange(self._paths.get(self._top, b"/"), ChangeKind.OVERFLOW))
                self._look_anew(found)
            elif mask & _IGNORED:
                self._paths.pop(wd, None)
                self.is_over = self.is_over or wd == self._top
            elif mask & (_DELETE_SELF | _MOVE_SELF | _UNMOUNT):
                # Deeper entries are reported by their own directory's watch.
                self.is_over = self.is_over or wd == self._top
            elif folder is not None and name:
                path = os.path.join(folder, name)
                is_pair = mask & _MOVED_FROM and events and events[0][1] & _MOVED_TO
                if is_pair and events[0][2] == cookie and events[0][0] in self._paths:
                    wd, _, _, name = events.pop(0)
                    target = os.path.join(self._paths[wd], name)
                    self._moved(path, target, found, is_folder=bool(mask & _ISDIR))
                else:
                    self._changed(path, mask, found)
        if self._reported and not select.select([self._fd], [], [], 0)[0]:
            # Entries created before the directory was read were reported by events, too.
            self._reported.clear()
        return _once([one for one in found if not is_in_part(one.path)])

    def _events(self) -> list[tuple[int, int, int, bytes]]:
        """Return the kernel's events; the two halves of a move are combined."""
        events: list[tuple[int, int, int, bytes]] = []
        while True:
            try:
                data = os.read(self._fd, _BUFFER)
            except BlockingIOError:
                return events
            at = 0
            while at < len(data):
                wd, mask, cookie, length = _EVENT.unpack_from(data, at)
                at += _EVENT.size
                events.append((wd, mask, cookie, data[at : at + length].rstrip(b"\0")))
                at += length
            if not events or not events[-1][1] & _MOVED_FROM:
                return events
            select.select([self._fd], [], [], _PAIR_S)

    def _changed(self, path: bytes, mask: int, found: list[FileChange]) -> None:
        is_folder = bool(mask & _ISDIR)
        kind = next((what for bit, what in _PLAIN.items() if mask & bit), None)
        if kind is None:
            return
        if kind is ChangeKind.REMOVED:
            self._reported.discard(path)
            if is_folder:
                self._forget_below(path)
        elif mask & _CREATE and path in self._reported:
            self._reported.discard(path)  # seen already, when its directory was read
            if is_folder and self._recursive:
                with contextlib.suppress(OSError, TooManyError):
                    self._add(path, _ONLYDIR | _DONT_FOLLOW)
            return
        found.append(FileChange(path, kind, is_folder=is_folder))
        if kind is ChangeKind.CREATED and is_folder and self._recursive:
            self._watch_new(path, found)

    def _watch_new(self, path: bytes, found: list[FileChange]) -> None:
        """Watch a new directory, and report what is in it already."""
        try:
            self._add(path, _ONLYDIR | _DONT_FOLLOW)
            for below, is_folder in self._watch_below(path):
                self._reported.add(below)
                found.append(FileChange(below, ChangeKind.CREATED, is_folder=is_folder))
        except OSError:
            pass  # removed again, or unreadable
        except TooManyError:
            found.append(FileChange(path, ChangeKind.OVERFLOW, is_folder=True))

    def _moved(
        self, source: bytes, target: bytes, found: list[FileChange], *, is_folder: bool
    ) -> None:
        self._reported -= {one for one in self._reported if _is_within(one, source)}
        self._reported.discard(target)
        if is_in_part(source) and not is_in_part(target):
            kind = ChangeKind.MODIFIED if has_replaced(source) else ChangeKind.CREATED
            found.append(FileChange(target, kind, is_folder=is_folder))
            if is_folder and self._recursive:
                self._watch_new(target, found)
            return
        if is_folder:
            for wd, path in self._paths.items():
                if _is_within(path, source):
                    self._paths[wd] = target + path[len(source) :]
        found.append(FileChange(target, ChangeKind.MOVED, is_folder=is_folder, source=source))
        if is_folder and self._recursive and target not in self._paths.values():
            self._watch_new(target, found)

    def _look_anew(self, found: list[FileChange]) -> None:
        """After an overflow of events, watch directories that were missed, and find out whether the
        watched one still exists."""
        self._reported.clear()
        top = self._paths.get(self._top)
        if top is not None:
            # An existing watch keeps its number.
            number = self._libc.inotify_add_watch(self._fd, top, _WANTED | _ONLYDIR)
            if number != self._top:
                self.is_over = True
                return
        if self._recursive and top is not None:
            try:
                for _ in self._watch_below(top):
                    pass
            except TooManyError:
                found.append(FileChange(top, ChangeKind.OVERFLOW))

    def _watch_below(self, folder: bytes) -> Iterator[tuple[bytes, bool]]:
        """Watch every directory below one, and yield all entries, and whether each is a
        directory."""
        folders = [folder]
        while folders:
            above = folders.pop()
            try:
                with os.scandir(above) as entries:
                    names = [(one.name, one.is_dir(follow_symlinks=False)) for one in entries]
            except OSError:
                continue
            for name, is_folder in names:
                path = os.path.join(above, name)
                if is_folder:
                    try:
                        self._add(path, _ONLYDIR | _DONT_FOLLOW)
                    except OSError:
                        continue  # removed meanwhile, or unreadable
                    folders.append(path)
                yield path, is_folder

    def _add(self, folder: bytes, how: int) -> int:
        if len(self._paths) >= FOLDERS_MAX:
            raise TooManyError
        wd: int = self._libc.inotify_add_watch(self._fd, folder, _WANTED | how)
        if wd < 0:
            raise TooManyError if ctypes.get_errno() == errno.ENOSPC else self._error(folder)
        self._paths[wd] = folder
        return wd

    def _forget_below(self, folder: bytes) -> None:
        self._reported -= {one for one in self._reported if _is_within(one, folder)}
        for wd, path in list(self._paths.items()):
            if _is_within(path, folder):
                del self._paths[wd]
                self._libc.inotify_rm_watch(self._fd, wd)

    def _error(self, path: bytes) -> OSError:
        number = ctypes.get_errno()
        return OSError(number, os.strerror(number), path)


def _is_within(path: bytes, folder: bytes) -> bool:
    return path == folder or path.startswith(folder + b"/")


def _once(found: list[FileChange]) -> list[FileChange]:
    """Return changes without immediate repetitions."""
    return [one for at, one in enumerate(found) if at == 0 or one != found[at - 1]]
