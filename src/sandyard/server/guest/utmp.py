"""Records who is logged in on which terminal, for who(1), w(1) and wall(1).

They read utmp(5), or on distributions that have dropped it because of the year 2038 the session
files of systemd-logind (sd-login(3)), which does not run here.
"""

import contextlib
import os
import platform
import stat
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager

_LOGGED_IN, _DEAD, _EMPTY = 7, 8, 0
_NUMBERS = "iii" if platform.machine() == "x86_64" else "qqq"  # session, seconds, microseconds
_RECORD = struct.Struct(f"=hxxi32s4s32s256shh{_NUMBERS}16s{20 if _NUMBERS == 'iii' else 24}x")
_RECORDS_MAX = 1024
_FOLDER = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_FILE = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK


class Utmp:
    """The files of a machine. If a user has replaced or protected them, they are left alone."""

    def __init__(self) -> None:
        self._is_begun = False

    def note_login(self, root_fd: int, pid: int, terminal: str, user: str, host: str) -> None:
        """Record that a user is logged in on a terminal, such as `pts/0`, from a host."""
        now_us = time.time_ns() // 1000
        record = _record(_LOGGED_IN, terminal, pid, user, host, now_us)
        session = (
            f"UID=0\nUSER={user}\nACTIVE=1\nSTATE=active\nREMOTE=1\nTYPE=tty\nCLASS=user\n"
            f"TTY={terminal}\nREMOTE_HOST={host}\nLEADER={pid}\nREALTIME={now_us}\n"
        )
        self._write(root_fd, terminal, record, session.encode())

    def note_logout(self, root_fd: int, terminal: str) -> None:
        """Record that a terminal is free."""
        record = _record(_DEAD, terminal, 0, "", "", time.time_ns() // 1000)
        self._write(root_fd, terminal, record, None)

    def _write(self, root_fd: int, terminal: str, record: bytes, session: bytes | None) -> None:
        # Logins from before the machine booted are over.
        is_first, self._is_begun = not self._is_begun, True
        with contextlib.suppress(OSError), _folder(root_fd, "run") as run:
            with contextlib.suppress(OSError), _file(run, "utmp") as file:
                if is_first:
                    os.ftruncate(file, 0)
                os.pwrite(file, record, _place(file, terminal.encode()))
            with contextlib.suppress(OSError), _sessions(run) as sessions:
                for name in _left(sessions) if is_first else ():
                    os.unlink(name, dir_fd=sessions)
                name = terminal.replace("/", "")
                if session is None:
                    os.unlink(name, dir_fd=sessions)
                    return
                with _file(sessions, name) as file:
                    os.ftruncate(file, 0)
                    os.pwrite(file, session, 0)


def _record(kind: int, terminal: str, pid: int, user: str, host: str, now_us: int) -> bytes:
    line = terminal.encode()
    return _RECORD.pack(
        kind, pid, line, line[-4:], user.encode(), host.encode()[:255], 0, 0, 0,
        now_us // 1_000_000, now_us % 1_000_000, bytes(16),
    )  # fmt: skip


@contextmanager
def _folder(parent: int, name: str) -> Iterator[int]:
    found = os.open(name, _FOLDER, dir_fd=parent)
    try:
        yield found
    finally:
        os.close(found)


@contextmanager
def _file(parent: int, name: str) -> Iterator[int]:
    found = os.open(name, _FILE, 0o644, dir_fd=parent)
    try:
        if not stat.S_ISREG(os.fstat(found).st_mode):
            raise OSError("it is no file")
        yield found
    finally:
        os.close(found)


@contextmanager
def _sessions(run: int) -> Iterator[int]:
    """Open the directory of sessions, made if necessary, unless systemd has one."""
    for path in ("systemd", "systemd/sessions"):
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, 0o755, dir_fd=run)
    with _folder(run, "systemd") as systemd, _folder(systemd, "sessions") as sessions:
        if "system" in os.listdir(f"/proc/self/fd/{systemd}"):
            raise FileExistsError("there is a systemd")
        yield sessions


def _left(sessions: int) -> list[str]:
    """Return our own entries from before."""
    return [name for name in os.listdir(f"/proc/self/fd/{sessions}") if name.startswith("pts")]


def _place(file: int, line: bytes) -> int:
    """Return the position for the record of a terminal."""
    free = None
    for place, kind, theirs in _records(file):
        if theirs == line:
            return place
        if free is None and kind in (_DEAD, _EMPTY):
            free = place
    end = min(os.fstat(file).st_size // _RECORD.size, _RECORDS_MAX) * _RECORD.size
    return end if free is None else free


def _records(file: int) -> Iterator[tuple[int, int, bytes]]:
    """Yield the position, kind and terminal of each record."""
    data = os.pread(file, _RECORD.size * _RECORDS_MAX, 0)
    for place in range(0, len(data) - _RECORD.size + 1, _RECORD.size):
        kind, _, line, *_ = _RECORD.unpack_from(data, place)
        yield place, kind, line.rstrip(b"\0")
