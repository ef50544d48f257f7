"""Admission control: decides whether the host has capacity for another machine.

A clone starts small and may grow to its full size. Reserved resources of all machines together may
exceed the host's by a configured factor, because few machines use all of theirs; the free resources
count as well. Further starts are refused, so that the kernel never has to kill a machine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sandyard.server.core.errors import NoCapacityError
from sandyard.server.core.shapes import Shape
from sandyard.server.node.host.disks import (
    available_memory_mib,
    free_mib,
    lacks_files,
    total_memory_mib,
)
from sandyard.server.node.host.ledger import Promise, Totals

_HYPERVISOR_MIB = 96  # its own code and data, and translated code under TCG


@dataclass(frozen=True)
class Margins:
    """What the host keeps free, and how far resources may be overcommitted."""

    memory_floor_mib: int
    disk_floor_mib: int
    memory_overcommit: float
    disk_overcommit: float
    disk_reserve_mib: int

    @property
    def disk_most_mib(self) -> int:
        """The most that is reserved of the disk for one machine, before it is overcommitted."""
        return int(self.disk_reserve_mib * self.disk_overcommit)


@dataclass(frozen=True)
class Room:
    """What can still be reserved."""

    memory_mib: int
    disk_mib: int


class Admission:
    """Compares requests to free resources. `totals` returns the reservations of all machines."""

    def __init__(
        self,
        folder: Path,
        margins: Margins,
        totals: Callable[[], Totals],
        *,
        free_disk: Callable[[Path], int] = free_mib,
        available_memory: Callable[[], int] = available_memory_mib,
        total_memory: Callable[[], int] = total_memory_mib,
    ) -> None:
        self._folder = folder
        self._margins = margins
        self._totals = totals
        self._free_disk = free_disk
        self._available_memory = available_memory
        self._total_memory = total_memory

    @property
    def is_short_of_memory(self) -> bool:
        """Tell whether so little memory is free that a machine should be paused."""
        return self._available_memory() < self._margins.memory_floor_mib // 2

    def room(self) -> Room:
        """Return what can still be reserved, for one machine and in total."""
        totals = self._totals()
        return Room(
            max(0, -self._missing_memory_mib(0, 0, totals)),
            max(0, self._disk_left_mib(totals)),
        )

    def check(self, shape: Shape, *, count: int = 1, is_promised: bool = False) -> None:
        """Return if there is capacity for this many more machines of a shape.

        If `is_promised`, the disk of the machine is already reserved.

        Raises:
            NoCapacityError: there is not; the message says what is missing.
        """
        totals = self._totals()
        self._check_disk(None if is_promised else shape, count, totals)
        short = self._missing_memory_mib(shape.memory_mib, count, totals)
        if short > 0:
            raise NoCapacityError(
                f"cannot start {_machines(count)} of {shape.memory_mib} MB: the host's memory is "
                f"promised to others ({short} MB short); pause or delete a sandbox and try again"
            )

    def check_disk(self, shape: Shape) -> None:
        """Return if there is capacity for the disk of one more machine; see `check`."""
        self._check_disk(shape, 1, self._totals())

    def check_growth(self, disk_mib: int) -> None:
        """Return if there is capacity for growing the disk of an existing machine; see `check`."""
        grown = Shape(1, 0, disk_mib) if disk_mib > 0 else None
        self._check_disk(grown, 1, self._totals())

    def missing_memory_mib(self, shape: Shape, *, count: int = 1) -> int:
        """Return how much memory is missing for this many more machines; 0 if none."""
        missing = self._missing_memory_mib(shape.memory_mib, count, self._totals())
        return max(0, missing)

    def _check_disk(self, shape: Shape | None, count: int, totals: Totals) -> None:
        self._folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        floor = self._margins.disk_floor_mib
        if self._free_disk(self._folder) < floor:
            raise NoCapacityError(
                f"cannot start a machine: the host's disk has less than {floor} MB left under "
                f"{self._folder}; free some space"
            )
        if (lack := lacks_files(self._folder)) is not None:
            raise NoCapacityError(f"cannot start a machine: {lack}; remove some files")
        if shape is not None and self._missing_disk_mib(shape, count, totals) > 0:
            raise NoCapacityError(
                f"cannot start {_machines(count)} with a disk of {shape.disk_mib} MB: the host's "
                "disk is promised to others; delete a sandbox or a snapshot and try again"
            )

    def missing_disk_mib(self, shape: Shape, *, count: int = 1) -> int:
        """Return how much disk is missing for this many more machines; 0 if none."""
        return max(0, self._missing_disk_mib(shape, count, self._totals()))

    def _missing_disk_mib(self, shape: Shape, count: int, totals: Totals) -> int:
        # A machine that is paused puts its memory beside its disk.
        whole = shape.disk_mib + shape.memory_mib
        left = self._disk_left_mib(totals)
        # Few fill their disks. One alone has to fit as a whole.
        wanted = min(whole, self._margins.disk_most_mib) * count
        return max(wanted - left, whole - left - totals.disk_left_mib)

    def _disk_left_mib(self, totals: Totals) -> int:
        self._folder.mkdir(mode=0o711, parents=True, exist_ok=True)
        free = self._free_disk(self._folder) - self._margins.disk_floor_mib
        return int(free * self._margins.disk_overcommit) - totals.disk_left_mib

    def _missing_memory_mib(self, memory_mib: int, count: int, totals: Totals) -> int:
        """Return how much memory is missing for this many machines; negative if some would be
        left."""
        margins = self._margins
        total = self._total_memory() - margins.memory_floor_mib
        wanted = totals.memory_mib + count * cost_mib(memory_mib)
        by_promise = wanted - int(total * margins.memory_overcommit)
        # A clone takes about a quarter of its memory soon, the rest over time.
        soon = margins.memory_floor_mib + count * memory_mib // 4
        by_fact = soon - self._available_memory()
        return max(by_promise, by_fact)


def _machines(count: int) -> str:
    return "a machine" if count == 1 else f"{count} machines"


def cost_mib(memory_mib: int) -> int:
    """Return how much of the host's memory a machine with this much memory may use."""
    return memory_mib + _HYPERVISOR_MIB


def promise_of(shape: Shape, *, coming: int = 0) -> Promise:
    """Return the reservation for a machine of a shape; a paused one has its memory on disk."""
    return Promise(cost_mib(shape.memory_mib), shape.disk_mib + shape.memory_mib, coming)
