"""Who is logged in on which terminal, for who(1), w(1) and wall(1); see utmp(5)."""

import os
import platform
import stat
import struct
import time
from collections.abc import Iterator

_LOGGED_IN, _DEAD, _EMPTY = 7, 8, 0
_NUMBERS = "iii" if platform.machine() == "x86_64" else "qqq"  # session, seconds, microseconds
_RECORD = struct.Struct(f"=hxxi32s4s32s256shh{_NUMBERS}16s{20 if _NUMBERS == 'iii' else 24}x")
_RECORDS_MAX = 1024


class Utmp:
    """The file of a machine. What somebody else put in its place, or locked away, is left alone."""

    def __init__(self) -> None:
        self._is_begun = False

    def note_login(self, root_fd: int, pid: int, terminal: str, user: str, host: str) -> None:
        """Note that a user is logged in on a terminal, such as `pts/0`, from a host."""
        now_ns = time.time_ns()
        line = terminal.encode()
        record = _RECORD.pack(
            _LOGGED_IN, pid, line, line[-4:], user.encode(), host.encode()[:255], 0, 0, 0,
            now_ns // 1_000_000_000, now_ns // 1000 % 1_000_000, bytes(16),
        )  # fmt: skip
        self._put(root_fd, line, record, makes=True)

    def note_logout(self, root_fd: int, terminal: str) -> None:
        """Note that nobody is logged in on a terminal any more."""
        line = terminal.encode()
        now = time.time_ns() // 1_000_000_000
        record = _RECORD.pack(
            _DEAD, 0, line, line[-4:], b"", b"", 0, 0, 0, now, 0, bytes(16)
        )  # fmt: skip
        self._put(root_fd, line, record, makes=False)

    def _put(self, root_fd: int, line: bytes, record: bytes, *, makes: bool) -> None:
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        try:
            folder = os.open("run", os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=root_fd)
            try:
                file = os.open("utmp", flags | os.O_CREAT * makes, 0o644, dir_fd=folder)
            finally:
                os.close(folder)
        except OSError:
            return
        try:
            if not stat.S_ISREG(os.fstat(file).st_mode):
                return
            if not self._is_begun:
                # Whoever was logged in before the machine booted is not any more.
                self._is_begun = True
                os.ftruncate(file, 0)
            os.pwrite(file, record, self._place(file, line))
        except OSError:
            return
        finally:
            os.close(file)

    def _place(self, file: int, line: bytes) -> int:
        free = None
        for place, kind, theirs in _records(file):
            if theirs == line:
                return place
            if free is None and kind in (_DEAD, _EMPTY):
                free = place
        end = min(os.fstat(file).st_size // _RECORD.size, _RECORDS_MAX) * _RECORD.size
        return end if free is None else free


def _records(file: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield where each record begins, its kind, and its terminal."""
    data = os.pread(file, _RECORD.size * _RECORDS_MAX, 0)
    for place in range(0, len(data) - _RECORD.size + 1, _RECORD.size):
        kind, _, line, *_ = _RECORD.unpack_from(data, place)
        yield place, kind, line.rstrip(b"\0")
