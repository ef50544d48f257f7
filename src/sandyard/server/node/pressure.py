"""Keeps guests from filling the host's disk, to which the platform itself has to write.

When little space is left, the machines that write most are suspended, one after the other, until
there is space again; they lose nothing, and their status says why. If the disk fills up
nevertheless, a file of some size, the ballast, is deleted, so that operations that free space,
above all deletes, can still be recorded.
"""

import contextlib
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import Phase
from sandyard.server.core.errors import SandyardError
from sandyard.server.drivers.contract import End
from sandyard.server.node.host.disks import free_mib, lacks_files
from sandyard.server.node.owner import Owner
from sandyard.server.tasks import in_thread

log = logging.getLogger(__name__)

BALLAST_MIB = 64
_LOOK_S = 1.0
_ENOUGH, _SOON = 2, 4  # multiples of `little_mib`
_WRITES_MIB = 4  # in a second; less does not count as writing
HELD = End(
    "host_disk_full",
    "the host's disk is nearly full, and this wrote most: it is suspended until there is room; "
    "delete sandboxes or snapshots, or free some space on the host",
)


class Pressure:
    """Monitors the disk under `home`. Less than `little_mib` free is too little. `running` returns
    the machines that run or are held, and at which no job is at work."""

    def __init__(
        self,
        home: Path,
        *,
        little_mib: int,
        running: Callable[[], Sequence[Owner]],
        clock: Clock,
        on_change: Callable[[], None],
        free: Callable[[Path], int] = free_mib,
    ) -> None:
        self._home = home
        self._ballast = home / "ballast"
        self._little_mib = little_mib
        self._running = running
        self._clock = clock
        self._on_change = on_change
        self._free = free
        self._used_mib: dict[Owner, int] = {}

    @property
    def missing(self) -> tuple[str, ...]:
        """What prevents machines from starting: a sentence if the disk is full, else nothing."""
        free = self._free(self._home)
        if free >= self._little_mib:
            lack = lacks_files(self._home)
            return () if lack is None else (lack,)
        return (f"the host's disk is full: {free} MiB are left under {self._home}",)

    async def watch(self) -> None:
        """Monitor the disk, forever."""
        while True:
            try:
                await self.look()
            except (SandyardError, OSError):
                log.exception("cannot relieve the host's disk; retrying")
            await self._clock.sleep(_LOOK_S)

    async def look(self) -> None:
        """Suspend a machine, or resume those that are suspended, and maintain the ballast."""
        free = self._free(self._home)
        running = list(self._running())
        if free >= self._little_mib * _ENOUGH:
            for one in running:
                if one.phase is Phase.HELD:
                    await one.release()
                    self._on_change()
        if free < self._little_mib * _SOON:
            # Before it matters, so that the machines that write are known by then.
            used = await in_thread(lambda: {one: one.used_mib for one in running})
            before, self._used_mib = self._used_mib, used
            if free < self._little_mib:
                grown = {one: used[one] - before.get(one, used[one]) for one in used}
                await self._hold_one(grown, least_mib=self._least(free))
        else:
            self._used_mib.clear()
        await in_thread(self._see_to_ballast, free)

    def _least(self, free: int) -> int:
        """Return how much a machine must write per second to count as filling the disk: less, the
        less space is left."""
        if free >= self._little_mib // 2:
            return _WRITES_MIB
        return 1 if free >= min(2 * BALLAST_MIB, self._little_mib // 4) else 0

    async def _hold_one(self, grown: Mapping[Owner, int], *, least_mib: int) -> None:
        """Suspend the machine whose disk has grown most since the last check, if any has."""
        for one in grown:
            # Those that found the disk full would try again, and use up the ballast's space.
            if one.is_stalled:
                await one.hold(HELD)
        writers = {
            one: much
            for one, much in grown.items()
            if much > 0 and much >= least_mib and one.phase is Phase.RUNNING
        }
        if not writers:
            return
        writer = max(writers, key=lambda one: writers[one])
        log.warning(
            "the host's disk is nearly full: suspending the machine that writes most",
            extra={"sandbox_id": writer.sandbox_id},
        )
        await writer.hold(HELD)
        self._on_change()

    def _see_to_ballast(self, free: int) -> None:
        there = self._ballast.exists()
        if there and free < BALLAST_MIB // 4:
            log.error("the host's disk is full: deleting the ballast")
            self._ballast.unlink(missing_ok=True)
        elif not there and free >= self._little_mib + 2 * BALLAST_MIB:
            part = self._ballast.with_suffix(".part")
            with contextlib.suppress(OSError):
                descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                try:
                    os.posix_fallocate(descriptor, 0, BALLAST_MIB * 2**20)
                finally:
                    os.close(descriptor)
                part.replace(self._ballast)
            part.unlink(missing_ok=True)
