"""The journal of a sandbox's connections: the last lines of the last days, in two files.

A line is a JSON object. The files are written in turn: when one has half of the lines, or its first
line half of the days, the other is emptied and written. So the file system bounds both, and a
reader needs nothing but the two files.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Final

LINES_MAX: Final = 10_000
DAYS_MAX: Final = 7
A_SECOND: Final = 100
"""Lines a second; more are counted, and the number is a line of its own."""
_HALF, _HALF_S = LINES_MAX // 2, DAYS_MAX * 86400 / 2
_READ_MAX = 8 * 1024 * 1024
Line = dict[str, object]


class Journal:
    """Writes the files, which are open for reading and appending."""

    def __init__(self, files: Sequence[int], now: Callable[[], float]) -> None:
        self._now = now
        self._files = [_File(one) for one in files]
        self._current = max(self._files, key=lambda one: one.last)
        self._second, self._in_second, self._skipped = 0, 0, 0

    def write(self, line: Line) -> None:
        """Write a line, with the time. What cannot be written is counted."""
        second = int(self._now())
        if second != self._second:
            self._second, self._in_second = second, 0
        if self._in_second >= A_SECOND:
            self._skipped += 1
            return
        if self._skipped and self._put({"verdict": "skipped", "count": self._skipped}):
            self._skipped = 0
        self._in_second += 1
        if not self._put(line):
            self._skipped += 1

    def tidy(self) -> None:
        """Remove lines that are too old."""
        for one in self._files:
            if one.lines and one.last < self._now() - DAYS_MAX * 86400:
                one.empty()

    def _time(self) -> float:
        """Return a time for a line, which no line before has: readers ask for those after one."""
        now, last = self._now(), max(one.last for one in self._files)
        return math.nextafter(last, math.inf) if 0 <= last - now < 1 else now

    def _put(self, line: Line) -> bool:
        current, now = self._current, self._time()
        if current.lines >= _HALF or (current.lines and current.first < now - _HALF_S):
            other = next(one for one in self._files if one is not current)
            other.empty()
            self._current = current = other
        line = {"time": now, **line}
        return current.append(json.dumps(line, separators=(",", ":")).encode() + b"\n", now)


class _File:
    """One file, and the times of its first and last line."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        found = lines_in(os.pread(descriptor, _READ_MAX, 0))
        self.lines = len(found)
        self.first = time_of(found[0]) if found else 0.0
        self.last = time_of(found[-1]) if found else 0.0

    def append(self, data: bytes, now: float) -> bool:
        try:
            size = os.fstat(self._descriptor).st_size
            if os.write(self._descriptor, data) < len(data):  # the disk is full
                os.ftruncate(self._descriptor, size)
                return False
        except OSError:
            return False
        if not self.lines:
            self.first = now
        self.lines += 1
        self.last = now
        return True

    def empty(self) -> None:
        os.ftruncate(self._descriptor, 0)
        self.lines, self.first, self.last = 0, 0.0, 0.0


def lines_in(data: bytes, *, since: float | None = None) -> list[Line]:
    """Return the lines of a file; damaged ones are left out. With `since` only those after that
    time are parsed: lines are in the order of time."""
    found = []
    for one in reversed(data.splitlines()):
        try:
            line = json.loads(one)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("time"), int | float):
            if since is not None and time_of(line) <= since:
                break
            found.append(line)
    found.reverse()
    return found


def newest_of(files: Iterable[bytes], *, now: float, since: float | None = None) -> list[Line]:
    """Return the lines of all files that are not too old, oldest first."""
    lines = [line for data in files for line in lines_in(data[:_READ_MAX], since=since)]
    recent = [one for one in lines if time_of(one) >= now - DAYS_MAX * 86400]
    return sorted(recent, key=time_of)[-LINES_MAX:]


def time_of(line: Line) -> float:
    """Return a line's time, in seconds since 1970."""
    time = line["time"]
    return float(time) if isinstance(time, int | float) else 0.0
