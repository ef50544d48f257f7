"""Totals of the resources reserved for a node's machines, updated incrementally.

With hundreds of machines, adding them all up would dominate the cost of a start. A machine reports
when its reservation may have changed, and only then is it read again. Disk usage changes without a
report, so that a few machines, those read longest ago, are read again each time.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from sandyard.server.core.contracts.clock import Clock

_STALE_S = 15.0
_STALE_AT_ONCE = 16


@dataclass(frozen=True)
class Promise:
    """The reservation of one machine, including the disk space that it uses already; or a sum of
    these.

    A paused machine has no memory reserved. `coming` counts machines that are about to be created.
    """

    memory_mib: int = 0
    disk_mib: int = 0
    disk_used_mib: int = 0
    coming: int = 0

    @property
    def disk_left_mib(self) -> int:
        """The reserved disk space that it does not use yet."""
        return max(0, self.disk_mib - self.disk_used_mib)


@dataclass(frozen=True)
class Totals:
    """Total reservations; for disks, only the space that is not used yet."""

    memory_mib: int = 0
    disk_left_mib: int = 0
    coming: int = 0


class Counted(Protocol):
    """Something with a reservation."""

    counted: Callable[[], None]
    """To be called whenever `promised` may say something else than before."""

    def promised(self, now: float) -> Promise:
        """Return its reservation; `now` is the clock's monotonic time."""
        ...


def nobody_counts() -> None:
    """Used when no ledger needs to know of a change."""


class Ledger:
    """See the module."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._entries: OrderedDict[Counted, tuple[float, Promise]] = OrderedDict()
        self._changed: set[Counted] = set()
        self._totals = [0, 0, 0]

    def enter(self, one: Counted) -> None:
        """Count it from now on."""
        one.counted = lambda: self._changed.add(one)
        one.counted()

    def leave(self, one: Counted) -> None:
        """Stop counting it; does nothing if it is not counted."""
        one.counted = nobody_counts
        self._changed.discard(one)
        entry = self._entries.pop(one, None)
        if entry is not None:
            self._add(entry[1], -1)

    @property
    def everyone(self) -> set[Counted]:
        """Everything that is counted."""
        return {*self._entries, *self._changed}

    def totals(self) -> Totals:
        """Return the current totals."""
        now = self._clock.monotonic()
        for one in list(self._changed):
            self._look_at(one, now)
            self._changed.discard(one)
        for _ in range(min(_STALE_AT_ONCE, len(self._entries))):
            oldest = next(iter(self._entries))
            if now - self._entries[oldest][0] < _STALE_S:
                break
            self._look_at(oldest, now)
        return Totals(*self._totals)

    def recount(self) -> Totals:
        """Return the totals, computed from scratch."""
        now = self._clock.monotonic()
        found = [one.promised(now) for one in self.everyone]
        return Totals(
            sum(one.memory_mib for one in found),
            sum(one.disk_left_mib for one in found),
            sum(one.coming for one in found),
        )

    def _look_at(self, one: Counted, now: float) -> None:
        promise = one.promised(now)
        before = self._entries.pop(one, None)
        if before is not None:
            self._add(before[1], -1)
        self._entries[one] = (now, promise)
        self._add(promise, 1)

    def _add(self, promise: Promise, sign: int) -> None:
        self._totals[0] += sign * promise.memory_mib
        self._totals[1] += sign * promise.disk_left_mib
        self._totals[2] += sign * promise.coming
