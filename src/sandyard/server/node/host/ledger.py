"""Totals of the resources reserved for a node's machines.

They are added up from the machines' own state whenever they are needed, so there is nothing to keep
in step. Only the disk space that each uses is remembered, because finding out reads the disk.
"""

import math
from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from sandyard.server.core.contracts.clock import Clock

_STALE_S = 15.0
_STALE_AT_ONCE = 16


class Promise(NamedTuple):
    """The resources reserved for one machine.

    A paused machine has no memory reserved. `coming` counts machines that are about to be created.
    """

    memory_mib: int = 0
    disk_mib: int = 0
    coming: int = 0


@dataclass(frozen=True)
class Totals:
    """Total reservations; for disks, only the space that is not used yet, up to a limit for each
    machine."""

    memory_mib: int = 0
    disk_left_mib: int = 0
    coming: int = 0


class Counted(Protocol):
    """Something with a reservation."""

    @property
    def promise(self) -> Promise:
        """Its reservation now."""
        ...

    @property
    def used_mib(self) -> int:
        """The disk space it uses; reads the disk."""
        ...


class Ledger:
    """Adds up reservations."""

    def __init__(self, clock: Clock, *, disk_most_mib: float = math.inf) -> None:
        """Count at most `disk_most_mib` of the space that one machine does not use yet."""
        self._clock = clock
        self._disk_most_mib = disk_most_mib
        # When the disk space of each was read, and what it was; the oldest reading first.
        self._used: OrderedDict[Counted, tuple[float, int]] = OrderedDict()

    def enter(self, one: Counted) -> None:
        """Count a machine from now on, or read again what it uses."""
        self._read(one)

    def leave(self, one: Counted) -> None:
        """Stop counting a machine; does nothing if it is not counted."""
        self._used.pop(one, None)

    @property
    def everyone(self) -> set[Counted]:
        """Everything that is counted."""
        return set(self._used)

    def totals(self) -> Totals:
        """Return the current totals; disk usage is read again for a few machines at a time."""
        now = self._clock.monotonic()
        for _ in range(min(_STALE_AT_ONCE, len(self._used))):
            one, (read_at, _) = next(iter(self._used.items()))
            if now - read_at < _STALE_S:
                break
            self._read(one)
        memory_mib = disk_left_mib = coming = 0
        for one, (_, used_mib) in self._used.items():
            promise = one.promise
            memory_mib += promise.memory_mib
            disk_left_mib += self._left(promise, used_mib)
            coming += promise.coming
        return Totals(memory_mib, disk_left_mib, coming)

    def disk_left_mib(self, one: Counted) -> int:
        """Return how much of the reserved disk space a machine does not use yet."""
        _, used_mib = self._used.get(one, (0.0, 0))
        return self._left(one.promise, used_mib)

    def _left(self, promise: Promise, used_mib: int) -> int:
        return int(min(max(0, promise.disk_mib - used_mib), self._disk_most_mib))

    def _read(self, one: Counted) -> None:
        self._used.pop(one, None)
        self._used[one] = (self._clock.monotonic(), one.used_mib)
