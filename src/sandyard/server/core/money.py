"""Money in whole numbers: prices, what a stretch of time costs, and when a cent is full.

Inside, money is counted in millionths of a cent, called micros here; ledgers and clients see whole
cents. A cost is worked out exactly and rounded down once, for a whole stretch of time: to charge it
in pieces charges each time what the whole costs so far, less what was charged before, so that no
way of cutting it changes the sum. Time is counted in microseconds.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Self

from sandyard.server.core.shapes import Shape, ShapeSeconds

MICROS = 1_000_000
"""Micros in a cent."""
_HOUR_US = 3600 * 1_000_000
_MONTH_US = 730 * _HOUR_US  # a twelfth of a year of 365 days
_MIB, _GIB = 2**20, 2**30
_TICK = timedelta(microseconds=1)


@dataclass(frozen=True)
class Prices:
    """Prices in micros: of a vCPU-hour, a GiB-hour of memory, GiB-months of disk and of storage.

    `disk` is the disk of a sandbox that runs; `storage` is whatever is kept besides: the saved
    state of one that is paused, snapshots, workspaces.
    """

    vcpu_hour: int
    memory_gib_hour: int
    disk_gib_month: int
    storage_gib_month: int

    def compute(self, shape: Shape, time: timedelta) -> int:
        """Return what a running sandbox of a shape costs in a stretch of time."""
        us = max(0, time // _TICK)
        return self._compute(shape.vcpus * us, shape.memory_mib * us, shape.disk_mib * us)

    def used(self, amounts: ShapeSeconds) -> int:
        """Return what was used by several sandboxes, for whole seconds each, costs together."""
        second_us = 1_000_000
        return self._compute(
            amounts.vcpu_seconds * second_us,
            amounts.memory_mib_seconds * second_us,
            amounts.disk_mib_seconds * second_us,
        )

    def _compute(self, vcpu_us: int, memory_mib_us: int, disk_mib_us: int) -> int:
        # One fraction, rounded once: the months' part and the hours' part over 730 * 1024 hours.
        per_hour = vcpu_us * self.vcpu_hour * 1024 + memory_mib_us * self.memory_gib_hour
        per_month = disk_mib_us * self.disk_gib_month
        return (per_hour * 730 + per_month) // (1024 * _MONTH_US)

    def storage(self, size_bytes: int, time: timedelta) -> int:
        """Return what so many bytes that are kept cost in a stretch of time."""
        return max(0, time // _TICK) * size_bytes * self.storage_gib_month // (_GIB * _MONTH_US)

    def hour_of(self, shape: Shape) -> int:
        """Return what a sandbox of a shape costs in an hour."""
        return self.compute(shape, timedelta(hours=1))


@dataclass(frozen=True)
class PriceList:
    """The prices that held at each time: each from a moment on, oldest first, and the first also
    before it."""

    entries: tuple[tuple[datetime, Prices], ...]

    @classmethod
    def always(cls, prices: Prices) -> Self:
        """Return a list of prices that never changed."""
        return cls(((datetime.min.replace(tzinfo=UTC), prices),))

    @property
    def latest(self) -> Prices:
        """The prices that hold now."""
        return self.entries[-1][1]

    @property
    def changed_at(self) -> datetime | None:
        """When they last changed, or None if they never did."""
        return self.entries[-1][0] if len(self.entries) > 1 else None

    def compute(self, shape: Shape, start: datetime, end: datetime) -> int:
        """Return what a running sandbox of a shape costs between two moments."""
        return sum(one.compute(shape, time) for one, time in self._held(start, end))

    def storage(self, size_bytes: int, start: datetime, end: datetime) -> int:
        """Return what so many bytes that are kept cost between two moments."""
        return sum(one.storage(size_bytes, time) for one, time in self._held(start, end))

    def _held(self, start: datetime, end: datetime) -> Iterator[tuple[Prices, timedelta]]:
        """Yield which prices held between two moments, and for how long."""
        for number, (since, one) in enumerate(self.entries):
            first = start if number == 0 else max(start, since)
            is_last = number == len(self.entries) - 1
            last = end if is_last else min(end, self.entries[number + 1][0])
            if first < last:
                yield one, last - first


def micros_of(cents: Decimal) -> int:
    """Return a price in micros; it has six places of a cent at the most."""
    return int(cents * MICROS)


def cents_up(micros: int) -> int:
    """Return whole cents that suffice for so many micros."""
    return -(-micros // MICROS)


def show(cents: int) -> str:
    """Return cents as people read them, in the unit of the currency: 1234 is `12.34`."""
    sign = "-" if cents < 0 else ""
    return f"{sign}{abs(cents) // 100}.{abs(cents) % 100:02}"


def between(start: datetime, end: datetime) -> timedelta:
    """Return the time between two moments; none where a clock was set back."""
    return max(timedelta(), end - start)


@dataclass(frozen=True)
class Account:
    """What an organization has: whole cents, and what it used that does not fill a cent yet.

    `carried` are micros that were used and are not in `balance_cents` yet; below nothing where a
    clock that was set back made less of what had been counted.
    """

    org_id: str
    balance_cents: int = 0
    granted_cents: int = 0
    used_cents: int = 0
    carried: int = 0

    @property
    def left(self) -> int:
        """Micros that are left."""
        return self.balance_cents * MICROS - self.carried
