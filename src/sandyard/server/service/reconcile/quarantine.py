"""The quarantine of one node: machines and snapshots that no row belongs to.

They are newer than the database, which was restored from a backup. Machines are saved, so that they
take no memory and lose nothing. All are kept until an operator adopts or deletes them, or their
time is over. They are not billed.
"""

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import MachineFact, NodeControl, Phase, SnapshotFact
from sandyard.server.core.contracts.store import Store, Transaction, Turn
from sandyard.server.core.errors import (
    DamagedError,
    IncompatibleError,
    SandyardError,
    UnsupportedError,
)
from sandyard.server.core.node_ops import (
    DropSnapshot,
    EnsureGone,
    EnsurePaused,
    FindMachine,
    FindSnapshot,
)
from sandyard.server.core.records import Quarantined, QuarantineKind
from sandyard.server.core.shapes import NOTHING
from sandyard.server.tasks import Work

log = logging.getLogger(__name__)

_SAVING_MAX = 4
_DESCRIBED_MAX = 20
_AWAKE = frozenset({Phase.RUNNING, Phase.WAKING})


class Quarantine:
    """See the module. `keeps` is how long machines and snapshots are kept; None means no limit.
    `beside` starts work concurrently, once at a time for a name."""

    def __init__(
        self,
        node: NodeControl,
        store: Store,
        clock: Clock,
        *,
        keeps: timedelta | None,
        beside: Callable[[str, Work], None],
    ) -> None:
        self._node = node
        self._store = store
        self._clock = clock
        self._keeps = keeps
        self._beside = beside
        self._seen: set[str] = set()
        self._may_have_rows = True
        self._seen_snapshots: frozenset[str] = frozenset()
        self._may_have_snapshots = True
        self._unreadable: set[str] = set()
        self._complained: set[str] = set()
        self._undescribed: set[str] = set()
        self._saving: set[str] = set()
        self._turns = 0
        self.due_at: datetime | None = None
        """When the next one's time is over."""
        self.is_settled = True
        """Whether there is nothing to do before that, unless an operator says so."""

    @property
    def ids(self) -> frozenset[str]:
        """The sandboxes whose machines had no row when the node was looked at last."""
        return frozenset(self._seen)

    async def look(self, strangers: Sequence[MachineFact]) -> None:
        """Look after the machines that have no row; only those that had none the last time
        either."""
        twice = [one for one in strangers if one.sandbox_id in self._seen]
        self._seen = {one.sandbox_id for one in strangers}
        self.due_at = None
        self.is_settled = len(twice) == len(strangers)
        if not twice and not self._may_have_rows:
            return
        async with self._store.read() as tx:
            rows = await self._rows(tx, "machine")
        now = self._clock.now()
        changed = []
        described = 0
        for fact in twice:
            row = rows.get(fact.sandbox_id)
            machine = self._machine_of(fact, row, now)
            if machine is None:
                continue
            if machine.network is None and machine.id not in self._undescribed:
                if described < _DESCRIBED_MAX:
                    described += 1
                    machine = await self._described(machine)
                self.is_settled = False
            if _as_found(row, machine) != machine:
                changed.append(machine)
        # Adopted, removed, or known to the database again.
        gone = rows.keys() - self._seen
        if changed or gone:
            async with self._store.write(Turn.ALONE) as tx:
                await tx.quarantine.remove(gone)
                for one in changed:
                    await tx.quarantine.put(one)
            # What was read of these is out of date, and must not decide; the next look does.
            self.is_settled = False
            for one in changed:
                rows.pop(one.id, None)
        self._may_have_rows = bool(twice)
        self._turns = _SAVING_MAX - len(self._saving)
        for fact in sorted(twice, key=lambda one: one.sandbox_id in self._complained):
            self._look_after(fact, rows.get(fact.sandbox_id), now)

    async def look_at_snapshots(self, strangers: Collection[str]) -> None:
        """Look after the snapshots that have no row; only those that had none the last time
        either. Call it after `look`."""
        twice = self._seen_snapshots.intersection(strangers)
        self._seen_snapshots = frozenset(strangers)
        self.is_settled = self.is_settled and len(twice) == len(strangers)
        if not twice and not self._may_have_snapshots:
            return
        async with self._store.read() as tx:
            rows = await self._rows(tx, "snapshot")
        now = self._clock.now()
        unknown = {one for one in twice if one not in rows or not rows[one].template}
        found = [
            await self._snapshot_of(one, rows.get(one), now)
            for one in sorted(unknown - self._unreadable)[:_DESCRIBED_MAX]
        ]
        added = [one for one in found if one is not None]
        self.is_settled = self.is_settled and unknown <= self._unreadable
        gone = rows.keys() - self._seen_snapshots
        if added or gone:
            async with self._store.write(Turn.ALONE) as tx:
                await tx.quarantine.remove(gone)
                for row in added:
                    await tx.quarantine.put(row)
            self.is_settled = False
        self._may_have_snapshots = bool(twice)
        for snapshot_id in twice & rows.keys():
            row = rows[snapshot_id]
            ends_at = None if self._keeps is None else row.found_at + self._keeps
            if row.is_unwanted:
                self.is_settled = False
                log.warning("removing the snapshot %s from the quarantine", snapshot_id)
                dropped = self._node.do(DropSnapshot(snapshot_id))
                self._beside(snapshot_id, dropped)
            elif ends_at is not None and ends_at <= now:
                self.is_settled = False
                self._beside(snapshot_id, self._condemn(snapshot_id))
            elif ends_at is not None:
                self.due_at = min(self.due_at or ends_at, ends_at)

    async def _rows(self, tx: Transaction, kind: QuarantineKind) -> dict[str, Quarantined]:
        found = await tx.quarantine.on_node(self._node.node_id)
        return {one.id: one for one in found if one.kind == kind}

    def _look_after(self, fact: MachineFact, row: Quarantined | None, now: datetime) -> None:
        ends_at = None if row is None or self._keeps is None else row.found_at + self._keeps
        if row is not None and ends_at is not None and ends_at <= now and not row.is_unwanted:
            self.is_settled = False
            self._beside(fact.sandbox_id, self._condemn(fact.sandbox_id))
            return
        if row is not None and row.is_unwanted:
            self.is_settled = False
            log.warning(
                "removing a machine from the quarantine of node %s",
                self._node.node_id,
                extra={"sandbox_id": fact.sandbox_id},
            )
            gone = self._node.do(EnsureGone(fact.sandbox_id, incarnation=fact.incarnation))
            self._beside(fact.sandbox_id, gone)
            return
        if ends_at is not None:
            self.due_at = min(self.due_at or ends_at, ends_at)
        if fact.phase in _AWAKE:
            self.is_settled = self.is_settled and fact.sandbox_id in self._complained
            if self._turns > 0:
                self._turns -= 1
                self._beside(fact.sandbox_id, self._save(fact))

    async def _condemn(self, wanted_id: str) -> None:
        # Only marked here: an operator may be adopting it at this moment.
        async with self._store.write(Turn.ALONE) as tx:
            await tx.quarantine.condemn(wanted_id)

    async def _save(self, fact: MachineFact) -> None:
        self._saving.add(fact.sandbox_id)
        try:
            await self._node.do(EnsurePaused(fact.sandbox_id, incarnation=fact.incarnation))
        except SandyardError as error:
            if fact.sandbox_id not in self._complained:
                self._complained.add(fact.sandbox_id)
                log.warning(
                    "cannot save a machine in quarantine, which keeps running: %s",
                    error.message,
                    extra={"sandbox_id": fact.sandbox_id},
                )
        finally:
            self._saving.discard(fact.sandbox_id)

    async def _described(self, machine: Quarantined) -> Quarantined:
        """Return a machine with its network rules and mounts, if its node can tell them now."""
        try:
            about = await self._node.do(FindMachine(machine.id))
        except (DamagedError, UnsupportedError) as error:
            log.warning(
                "cannot tell the network rules of a machine in quarantine: %s; it will have none "
                "and reach nothing if it is adopted",
                error.message,
                extra={"sandbox_id": machine.id},
            )
            self._undescribed.add(machine.id)
        except SandyardError as error:
            log.info("cannot ask for the machine of %s now: %s", machine.id, error.message)
        else:
            if (about.incarnation, about.version) == (machine.incarnation, machine.version):
                return replace(machine, network=about.policy, mounts=about.mounts)
        return machine

    def _machine_of(
        self, fact: MachineFact, row: Quarantined | None, now: datetime
    ) -> Quarantined | None:
        if fact.phase is Phase.STARTING:
            return None
        numbers = (fact.incarnation, fact.version)
        is_same = row is not None and (row.incarnation, row.version) == numbers
        return Quarantined(
            id=fact.sandbox_id,
            kind="machine",
            node_id=self._node.node_id,
            incarnation=fact.incarnation,
            version=fact.version,
            phase=fact.phase.value,
            template=fact.template,
            shape=fact.shape or NOTHING,
            found_at=now,
            network=row.network if row is not None and is_same else None,
            mounts=row.mounts if row is not None and is_same else (),
        )

    async def _snapshot_of(
        self, snapshot_id: str, row: Quarantined | None, now: datetime
    ) -> Quarantined | None:
        """Return what a node tells of a snapshot; None if it cannot tell now, and is asked
        again."""
        try:
            fact = await self._node.do(FindSnapshot(snapshot_id))
        except (DamagedError, IncompatibleError) as error:
            log.warning("cannot read the snapshot %s in quarantine: %s", snapshot_id, error.message)
            self._unreadable.add(snapshot_id)
            fact = SnapshotFact(snapshot_id, 0)
        except SandyardError as error:
            log.info("cannot ask for the snapshot %s now: %s", snapshot_id, error.message)
            return None
        return Quarantined(
            id=snapshot_id,
            kind="snapshot",
            node_id=self._node.node_id,
            incarnation=0,
            version=0,
            phase="saved",
            template=fact.template,
            shape=fact.shape or NOTHING,
            found_at=now if row is None else row.found_at,
            size_bytes=fact.size_bytes,
            os=fact.os,
        )


def _as_found(row: Quarantined | None, machine: Quarantined) -> Quarantined | None:
    """Return a row without what only the row has."""
    if row is None:
        return None
    return replace(row, found_at=machine.found_at, is_unwanted=machine.is_unwanted)
