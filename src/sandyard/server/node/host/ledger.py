"""What the machines of a node were promised, as sums that are kept rather than made.

A sum over all machines at every start would be what a start takes most of, with some hundreds of
them. Who is counted says when it may have changed, and only that is looked at again. What a machine
takes on disk changes without a word; so those that were looked at longest ago are, a few each time.
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
    """What one machine may grow to, and what of that on disk it has taken already, or a sum.

    A machine that stands still has been promised no memory. `coming` counts those that are only
    about to be made.
    """

    memory_mib: int = 0
    disk_mib: int = 0
    disk_used_mib: int = 0
    coming: int = 0

    @property
    def disk_left_mib(self) -> int:
        """What it may still take on disk."""
        return max(0, self.disk_mib - self.disk_used_mib)


@dataclass(frozen=True)
class Totals:
    """What was promised in all; on disk, what of it has not been taken yet."""

    memory_mib: int = 0
    disk_left_mib: int = 0
    coming: int = 0


class Counted(Protocol):
    """Something that was promised a part of the host."""

    counted: Callable[[], None]
    """To be called whenever `promised` may say something else than before."""

    def promised(self, now: float) -> Promise:
        """Return what it was promised; `now` is the clock's monotonic time."""
        ...


def nobody_counts() -> None:
    """Stand where nobody wants to know of a change."""


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
        """Count it no longer; nothing if it was not."""
        one.counted = nobody_counts
        self._changed.discard(one)
        entry = self._entries.pop(one, None)
        if entry is not None:
            self._add(entry[1], -1)

    @property
    def everyone(self) -> set[Counted]:
        """Who is counted."""
        return {*self._entries, *self._changed}

    def totals(self) -> Totals:
        """Return what is promised now."""
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
        """Return the same, made anew from what everyone who is counted says now."""
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
