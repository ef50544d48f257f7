"""Compares one node's report with the store, and repairs differences.

All state kept between comparisons concerns this one node. A machine is removed, and a sandbox is
marked as vanished, only after two comparisons in a row agree.

Nothing is deleted because the database does not know it: a database that was restored from a backup
does not know what was created since. Such machines are in quarantine. A machine is removed if its
row says so and is no older than what the node has been shown. A snapshot's files are removed if the
database remembers its deletion.
"""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sandyard.server.core.contracts.node import (
    REBOOTED,
    MachineFact,
    NodeControl,
    NodeReport,
    Phase,
)
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.egress import digest_of
from sandyard.server.core.errors import SandyardError, UnavailableError
from sandyard.server.core.node_ops import DropSnapshot, EnsureGone, EnsurePaused
from sandyard.server.core.records import (
    NEXT_START,
    Claim,
    Mark,
    Reason,
    Sandbox,
    Snapshot,
    Standing,
)
from sandyard.server.core.states import Event, Status
from sandyard.server.service.reconcile.idle import IDLE, Idleness
from sandyard.server.service.reconcile.quarantine import Quarantine
from sandyard.server.service.reconcile.work import LOST
from sandyard.server.service.roster import Heartbeat
from sandyard.server.service.sandboxes.enforcing import put_in_force
from sandyard.server.service.sandboxes.lifecycle import is_over
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.sandboxes.uses import last_used
from sandyard.server.service.sandboxes.worker import Worker, new_lease
from sandyard.server.tasks import Crew, Work

log = logging.getLogger(__name__)

WATCHED = frozenset(Status) - {Status.DESTROYING, Status.DESTROYED, Status.ORPHANED}
_NOTHING_LEFT = frozenset({Status.FAILED, Status.DESTROYED, Status.ORPHANED})
_KEPT = frozenset({Status.PAUSED, Status.ERROR})
_REBOOTS_MAX, _REBOOTS_IN = 5, timedelta(minutes=10)
_REBOOTS = Reason(
    "rebooted_too_often",
    f"it was rebooted from inside over {_REBOOTS_MAX} times in "
    f"{_REBOOTS_IN // timedelta(minutes=1)} minutes; resume or restart it",
)
_AWAKE = frozenset({Phase.RUNNING, Phase.WAKING})
_UNREADABLE = "record_unreadable"
_SILENT = Reason("agent_silent", "the agent in the sandbox does not answer")
_NODE_SILENT = Reason("node_silent", "the node that the sandbox is on does not answer")
_VANISHED = Reason("vanished", "nothing of the sandbox is left on its node")
_PRESSED = Reason("host_memory_low", "the host was short of memory and this was used least lately")
EXPIRED = Reason("expired", "it reached the end that was set at its creation")
_PAUSED_AT_END = Reason(
    "expired", "it reached its end and was paused; a resume starts a new period"
)
_PASSING = frozenset({"host_disk_full"})
_RELIEF = "relief"
_SILENT_MAX = timedelta(hours=1)
_WHOLE_S = 300.0
_NEVER = datetime.max.replace(tzinfo=UTC)
_AWAY = timedelta(seconds=10)
_UNWANTED_MAX, _LOOKED_UP_MAX = 100, 1000
_SHOWN_MAX = 3
_FILES_LATE = timedelta(hours=1)
"""How long after a snapshot's removal a node may still finish writing it."""
_BEHIND_MAX = 1_000_000
_NUMBER_MAX = 2**30
"""Beyond it no row's numbers are believed to have come; the database has room for twice as much."""


@dataclass(frozen=True)
class SilenceLimits:
    """How long a node may be silent, and how long new machines are left alone."""

    node_silent_s: float = 15.0
    grace_s: float = 10.0
    quarantine_s: float | None = 7 * 86_400.0
    """How long machines without a row are kept; None: until an operator removes them."""


@dataclass(frozen=True)
class _Calm:
    """The state in which a comparison found nothing to do, and until when time alone changes that.
    `since` is monotonic, in seconds."""

    mark: Mark
    generation: tuple[int, int]
    due_at: datetime
    since: float


class Comparison:
    """See the module. `away_since` is when the platform was last at work, where it is known:
    machines that are found dead at the first look may have died at any time since, and nobody pays
    for what may not have been.
    """

    heard_at: float | None = None
    """When the node last answered a request or sent a report, by this process's monotonic clock."""
    silent_since: float | None = None
    """Since when it has not answered, by this process's clock; None while it does."""

    def __init__(
        self,
        node: NodeControl,
        platform: Platform,
        *,
        worker: Worker,
        idleness: Idleness,
        crew: Crew,
        patience: SilenceLimits,
        away_since: datetime | None,
    ) -> None:
        self._node = node
        self._store = platform.store
        self._nodes = platform.nodes
        self._networks = platform.networks
        self._lifecycle = platform.lifecycle
        self._worker = worker
        self._idleness = idleness
        self._clock = platform.clock
        self._crew = crew
        self._patience = patience
        self._away_since = away_since
        self._began_at = platform.clock.now()
        self._calm: _Calm | None = None
        self._rows: Mapping[str, Standing] = {}
        self._awake: dict[str, tuple[int, int]] = {}
        self._unwanted: dict[str, int] = {}
        self._removing = 0
        self._vanished: set[str] = set()
        self._lacks_rules = False
        self._reboots: dict[str, list[datetime]] = {}
        self._unwanted_snapshots: set[str] = set()
        self._unknown: dict[str, set[str]] = {}
        keeps_s = patience.quarantine_s
        self._quarantine = Quarantine(
            node,
            platform.store,
            platform.clock,
            keeps=None if keeps_s is None else timedelta(seconds=keeps_s),
            beside=self._beside,
        )

    async def look(self, mark: Mark | None = None) -> None:
        """Compare the node's report with the store, and repair differences. Handle a node that does
        not answer as silent.

        With a `mark` of the rows, skip the comparison if neither the rows, nor the node's
        heartbeat, nor time can have changed anything since the last one.

        Raises:
            SandyardError: the store does not answer.
        """
        heartbeat = self._nodes.last_heartbeat(self._node.node_id)
        if self._calm is not None and self._is_calm(self._calm, mark, heartbeat):
            self.heard_at = self._clock.monotonic()
            return
        self._calm = None
        # Read rows before the report: a row says running only after the machine ran, so a later
        # report without the machine means that it is gone.
        async with self._store.read() as tx:
            rows = await tx.sandboxes.standing(self._node.node_id, WATCHED, known=self._rows)
            seen = await tx.nodes.find(self._node.node_id)
        self._rows = {one.id: one for one in rows}
        try:
            report = await self._nodes.report_of(self._node)
        except UnavailableError as error:
            if self.silent_since is None:
                log.warning("node does not answer: %s; retrying", error.message)
                self.silent_since = self._clock.monotonic()
            async with self._store.glance() as tx:  # the report may have taken long
                joined = await tx.joined_nodes.find(self._node.node_id)
            if joined is None or joined.lease_until is None:
                await self._suspect_in_time(rows, self._began_at if seen is None else seen.seen_at)
            elif joined.lost_at is not None:
                await self._suspect(rows, joined.lost_at)
            else:  # it has a lease, and cannot be reached now
                for sandbox in rows:
                    if has_expired(sandbox, self._clock.now()):
                        await self._expire(sandbox, ended_at=None)
            return
        if self.silent_since is not None:
            log.warning("node %s answers again", self._node.node_id)
        self.silent_since = None
        if seen is not None and self._clock.now() - seen.seen_at > _AWAY:
            self._away_since = seen.seen_at
        snapshots = await self._compare(await self._caught_up(rows, report), report)
        if heartbeat is not None:
            self._calm = self._calmed(rows, report, snapshots, heartbeat)
        self.heard_at = self._clock.monotonic()

    def _is_calm(self, calm: "_Calm", mark: Mark | None, heartbeat: Heartbeat | None) -> bool:
        return (
            mark == calm.mark
            and heartbeat is not None
            and (heartbeat.epoch, heartbeat.view.generation) == calm.generation
            and self._clock.now() < calm.due_at
            and 0 <= self._clock.monotonic() - calm.since < _WHOLE_S
        )

    def _calmed(
        self,
        rows: list[Standing],
        report: NodeReport,
        snapshots: list[Snapshot],
        heartbeat: Heartbeat,
    ) -> "_Calm | None":
        """Return the state that lets the next comparison be skipped, or None if it may find
        something."""
        if (
            self._awake
            or self._vanished
            or self._unwanted
            or self._unwanted_snapshots
            or not self._quarantine.is_settled
            or report.is_short_of_memory
            or any(one.status is Status.SUSPECTED_MISSING for one in rows)
            or self._lacks_rules
            or any(one.is_hidden or not one.is_ready for one in snapshots)
        ):
            return None
        ends = [end for one in rows if (end := _due(one)) is not None]
        ends += [] if self._quarantine.due_at is None else [self._quarantine.due_at]
        ends += [
            last_used(one) + timedelta(seconds=one.idle_timeout_s)
            for one in rows
            if one.status is Status.RUNNING and one.idle_timeout_s
        ]
        mark = Mark(
            sandboxes=len(rows),
            versions=sum(one.version for one in rows),
            updated_at=max((one.updated_at for one in rows), default=None),
            snapshots=len(snapshots),
        )
        generation = (heartbeat.epoch, report.generation)
        since = self._clock.monotonic()
        return _Calm(mark, generation, min(ends, default=_NEVER), since)

    # --- the node itself ------------------------------------------------------------------

    async def _suspect_in_time(self, rows: list[Standing], heard_at: datetime) -> None:
        """Mark the sandboxes of a node without a lease as unreachable, once no server has heard
        from it for a while."""
        if self._clock.now() - heard_at >= timedelta(seconds=self._patience.node_silent_s):
            await self._suspect(rows, heard_at)

    async def _suspect(self, rows: list[Standing], heard_at: datetime) -> None:
        """Mark a node's sandboxes as unreachable.

        They are not charged for the time since the node was last heard from.
        """
        for sandbox in rows:
            if sandbox.status is Status.RUNNING:
                await self._apply(sandbox, Event.SILENT, reason=_NODE_SILENT, ended_at=heard_at)
            elif has_expired(sandbox, self._clock.now()):
                await self._expire(sandbox, ended_at=heard_at)

    async def _caught_up(self, rows: list[Standing], report: NodeReport) -> list[Standing]:
        """Return the rows once none is behind what the node has been shown.

        A row is written before its node is shown it. A row that is behind means that the database
        went back, to a backup or to a lagging standby. The node would refuse every request made
        from it.
        """
        shown = {fact.sandbox_id: fact for fact in report.machines}
        ahead = [one for one in rows if one.id in shown and one.version < shown[one.id].version]
        if not ahead:
            return rows
        for one in ahead:
            await self._catch_up(one, shown[one.id])
        self._rows = {}  # a row that went back may reach the same version with other content
        async with self._store.glance() as tx:
            return await tx.sandboxes.standing(self._node.node_id, WATCHED, known={})

    async def _catch_up(self, sandbox: Standing, fact: MachineFact) -> None:
        async with self._store.glance() as tx:
            now = await tx.sandboxes.find(sandbox.id)
        if now is None or now.node_id != self._node.node_id or now.version >= fact.version:
            return  # it was written and shown to the node since the rows were read
        if not (
            _is_believed(now.version, fact.version)
            and _is_believed(now.incarnation, fact.incarnation)
        ):
            log.error(
                "node %s reports a newer row version than the database has; was the database "
                "restored?",
                self._node.node_id,
                extra={"sandbox_id": sandbox.id},
            )
            return
        async with self._store.write(now.org_id) as tx:
            is_done = await tx.sandboxes.catch_up(
                now, version=fact.version, incarnation=max(fact.incarnation, now.incarnation)
            )
        if is_done:
            log.warning(
                "the database is older than a sandbox's node; continuing from the node's version",
                extra={"sandbox_id": sandbox.id},
            )

    # --- its sandboxes --------------------------------------------------------------------

    async def _compare(self, rows: list[Standing], report: NodeReport) -> list[Snapshot]:
        """Repair differences, and return the snapshots that the store places on the node."""
        facts = {fact.sandbox_id: fact for fact in report.machines}
        vanished: set[str] = set()
        self._lacks_rules = False
        awake: dict[str, tuple[int, int]] = {}
        for sandbox in rows:
            fact = facts.get(sandbox.id)
            if has_expired(sandbox, self._clock.now()):
                is_gone = fact is None or fact.phase is Phase.DEAD
                await self._expire(sandbox, ended_at=self._away_since if is_gone else None)
            elif sandbox.status in (Status.RUNNING, Status.SUSPECTED_MISSING):
                await self._judge(sandbox, fact)
                if is_to_be_paused(sandbox, self._clock.now()):
                    boots = 0 if sandbox.keeps_memory else NEXT_START
                    await self._apply(
                        sandbox, Event.PAUSE, reason=_PAUSED_AT_END, from_disk_incarnation=boots
                    )
                elif self._idleness.is_due(sandbox, fact):
                    self._beside(sandbox.id, self._pause_if_idle(sandbox))
            elif sandbox.status is Status.PAUSED and fact is not None and fact.phase is Phase.DEAD:
                await self._apply(sandbox, Event.BROKE, reason=_reason_of(fact))
            elif sandbox.status in _KEPT and fact is not None and fact.phase in _AWAKE:
                awake[sandbox.id] = (fact.incarnation, sandbox.version)
            elif sandbox.status in _KEPT and fact is None and await self._is_gone(sandbox, report):
                vanished.add(sandbox.id)
            elif sandbox.status in _KEPT and fact is not None and _was_unreadable(sandbox):
                await self._note(sandbox, None)
        self._vanished = vanished
        known = {one.id for one in rows}
        self._reboots = {one: times for one, times in self._reboots.items() if one in known}
        self._pause_awake(awake)
        self._away_since = None  # everything that ended while no server ran has been found
        if report.is_short_of_memory:
            await self._relieve(rows, facts)
        await self._remove_unwanted(report.machines, {one.id: one for one in rows})
        return await self._look_after_snapshots(report)

    async def _is_gone(self, sandbox: Standing, report: NodeReport) -> bool:
        """Tell whether a node has nothing of a sandbox; if it had nothing the last time either, the
        sandbox has vanished."""
        if report.unreadable:  # it may be one of those
            if (reason := _unreadable(report)) != sandbox.reason:
                await self._note(sandbox, reason)
            return False
        if sandbox.id in self._vanished:
            await self._apply(sandbox, Event.VANISHED, reason=_VANISHED)
        return True

    async def _judge(self, sandbox: Standing, fact: MachineFact | None) -> None:
        is_suspected = sandbox.status is Status.SUSPECTED_MISSING
        # Its agent has no part in its network rules, and may be silent.
        if fact is not None and _lacks_rules(sandbox, fact):
            self._lacks_rules = True
            self._beside(sandbox.id, self._enforce(sandbox, fact.rules))
        if fact is None or fact.incarnation != sandbox.incarnation:
            await self._broke(sandbox, LOST)
        elif fact.phase is Phase.DEAD and fact.reason_code == REBOOTED:
            await self._restart(sandbox)
        elif fact.phase is Phase.DEAD:
            await self._broke(sandbox, _reason_of(fact))
        elif fact.is_silent:
            if not is_suspected:
                await self._apply(sandbox, Event.SILENT, reason=_SILENT)
            elif self._clock.now() - sandbox.updated_at > _SILENT_MAX:
                # It cannot be used, so it is not charged.
                await self._apply(sandbox, Event.PAUSE, reason=_SILENT)
        elif is_suspected:
            await self._apply(sandbox, Event.READY)
        elif fact.phase is Phase.PAUSED:
            # It was saved, and the result was never stored.
            await self._apply(sandbox, Event.PAUSE)
        else:
            reason_now = Reason(fact.reason_code, fact.reason_message) if fact.reason_code else None
            passes = sandbox.reason is not None and sandbox.reason.code in _PASSING
            if reason_now != sandbox.reason and (reason_now is not None or passes):
                await self._note(sandbox, reason_now)

    async def _enforce(self, sandbox: Standing, reported: str) -> None:
        """Have network rules enforced that could not be when they were changed."""
        await put_in_force(self._node, self._networks, sandbox, reported=reported)

    async def _restart(self, sandbox: Standing) -> None:
        """Boot a sandbox again that was rebooted from inside. This is not an error."""
        now = self._clock.now()
        times = [one for one in self._reboots.get(sandbox.id, []) if now - one < _REBOOTS_IN]
        if len(times) >= _REBOOTS_MAX:
            await self._broke(sandbox, _REBOOTS)
            return
        self._reboots[sandbox.id] = [*times, now]
        incarnation = sandbox.incarnation + 1
        await self._apply(
            sandbox,
            Event.RESTART,
            ended_at=self._away_since,
            ip=None,
            incarnation=incarnation,
            from_disk_incarnation=incarnation,
        )

    async def _broke(self, sandbox: Standing, reason: Reason) -> None:
        await self._apply(sandbox, Event.BROKE, reason=reason, ip=None, ended_at=self._away_since)

    async def _expire(self, sandbox: Standing, *, ended_at: datetime | None) -> None:
        # If an older database was restored, the compared row may differ from the stored one.
        whole = await self._whole(sandbox)
        if whole is not None and has_expired(whole, self._clock.now()):
            await self._lifecycle.apply(whole, Event.DELETE, ended_at=ended_at, reason=EXPIRED)

    async def _apply(self, sandbox: Standing, event: Event, **changes: Any) -> Sandbox | None:
        """Apply an event to a sandbox as it was compared. See `Lifecycle.apply`."""
        whole = await self._whole(sandbox)
        return None if whole is None else await self._lifecycle.apply(whole, event, **changes)

    async def _note(self, sandbox: Standing, reason: Reason | None) -> None:
        if (whole := await self._whole(sandbox)) is not None:
            await self._lifecycle.note_reason(whole, reason)

    async def _whole(self, sandbox: Standing) -> Sandbox | None:
        """Return the full row of a sandbox, or None if it has changed since it was compared."""
        async with self._store.glance() as tx:
            found = await tx.sandboxes.find(sandbox.id)
        return found if found is not None and found.version == sandbox.version else None

    # --- pauses by the platform -----------------------------------------------------------

    async def _pause_if_idle(self, sandbox: Standing) -> None:
        if await self._idleness.is_idle(sandbox):
            await self._pause_unused(sandbox, IDLE)

    async def _pause_unused(self, sandbox: Standing, reason: Reason) -> None:
        """Pause a sandbox unless it is in use, or a use begins at that moment.

        The node knows uses in progress. A use about to begin was stored while the sandbox was still
        running, so before this pause.
        """
        report = await self._nodes.report_of(self._node)
        if any(fact.is_used for fact in report.machines if fact.sandbox_id == sandbox.id):
            return
        with new_lease(self._worker, sandbox.id) as hold:
            pausing = await self._apply(sandbox, Event.PAUSE, hold=hold, reason=reason)
        if pausing is None:
            return
        async with self._store.glance() as tx:
            again = await tx.sandboxes.find(sandbox.id)
        if again is None or again.last_activity_at != sandbox.last_activity_at:
            # A caller saw it running and uses it; its machine is still unchanged.
            await self._lifecycle.apply(pausing, Event.PAUSE_FAILED, lease=hold.lease)
            return
        await self._worker.run_now(Claim(pausing, hold.lease), limit_s=0)

    def _pause_awake(self, found: dict[str, tuple[int, int]]) -> None:
        """Save machines that run although their sandboxes are paused: they were resumed, and the
        result was never stored."""
        twice, self._awake = found.items() & self._awake.items(), found
        for sandbox_id, (incarnation, version) in twice:
            saved = self._node.do(
                EnsurePaused(sandbox_id, incarnation=incarnation, version=version)
            )
            self._beside(sandbox_id, saved)

    async def _relieve(self, rows: list[Standing], facts: Mapping[str, MachineFact]) -> None:
        """Pause the least recently used sandbox, because the host is short of memory.

        One at a time: its memory is free once it has been saved.
        """
        if any(one.status is Status.PAUSING for one in rows):
            return
        running = [
            one
            for one in rows
            if one.status is Status.RUNNING and one.id in facts and not facts[one.id].is_used
        ]
        if running and not self._crew.is_at(self._named(_RELIEF)):
            sandbox = min(running, key=last_used)
            log.warning(
                "the host is short of memory; pausing the least recently used sandbox",
                extra={"sandbox_id": sandbox.id},
            )
            self._beside(_RELIEF, self._pause_unused(sandbox, _PRESSED))

    # --- unwanted machines ----------------------------------------------------------------

    async def _remove_unwanted(
        self, machines: tuple[MachineFact, ...], known: Mapping[str, Standing]
    ) -> None:
        found: dict[str, int] = {}
        unknown: set[str] = set()
        strangers: list[MachineFact] = []
        looked_up = 0
        is_cut = False
        kept = self._unknown.get("machine", set())
        # Unknown ones come last, so that they are not looked up each time.
        for fact in sorted(machines, key=lambda one: one.sandbox_id in kept):
            # An honest node's others get their turn later.
            if len(found) >= _UNWANTED_MAX or looked_up >= _LOOKED_UP_MAX:
                if fact.sandbox_id in self._quarantine.ids:
                    strangers.append(fact)
                if fact.sandbox_id in kept:
                    unknown.add(fact.sandbox_id)
                else:
                    is_cut = True
                continue
            sandbox: Standing | Sandbox | None = known.get(fact.sandbox_id)
            if sandbox is None:  # ending, written after the rows were read, gone, or elsewhere
                looked_up += 1
                async with self._store.glance() as tx:
                    sandbox = await tx.sandboxes.find(fact.sandbox_id)
            if sandbox is None:
                strangers.append(fact)
            if sandbox is None or sandbox.version < fact.version:
                unknown.add(fact.sandbox_id)
            elif sandbox.node_id != self._node.node_id or sandbox.status in _NOTHING_LEFT:
                found[fact.sandbox_id] = fact.incarnation
        if is_cut:
            log.error(
                "node %s has many machines without a row; removing some of them at each comparison",
                self._node.node_id,
            )
        self._keep_unknown("machine", unknown)
        await self._quarantine.look(strangers)
        twice = found.items() & self._unwanted.items()
        self._unwanted = found
        for sandbox_id, incarnation in twice:
            if self._removing >= _UNWANTED_MAX:
                break
            log.warning(
                "removing a machine without a sandbox from node %s",
                self._node.node_id,
                extra={"sandbox_id": sandbox_id},
            )
            self._beside(sandbox_id, self._remove(sandbox_id, incarnation))

    def _keep_unknown(self, what: str, ids: set[str]) -> None:
        """Log when the node has more resources that are newer than the database."""
        if new := ids - self._unknown.get(what, set()):
            log.error(
                "node %s has %d %ss that are newer than the database, such as %s; keeping them "
                "(was the database restored from a backup? see docs/howto/backup.md)",
                self._node.node_id,
                len(ids),
                what,
                ", ".join(sorted(new)[:3]),
            )
        self._unknown[what] = ids

    async def _remove(self, sandbox_id: str, incarnation: int) -> None:
        self._removing += 1
        try:
            await self._node.do(EnsureGone(sandbox_id, incarnation=incarnation))
        finally:
            self._removing -= 1

    async def _look_after_snapshots(self, report: NodeReport) -> list[Snapshot]:
        """Remove hidden snapshots whose forks exist, unfinished ones, and the files of deleted
        ones. Return all snapshots of the node."""
        now = self._clock.now()
        async with self._store.read() as tx:
            rows = await tx.snapshots.on_node(self._node.node_id)
            removed = await tx.snapshots.removed(self._node.node_id)
            done = []
            for one in rows:
                is_new = now - one.created_at < timedelta(seconds=self._patience.grace_s)
                if is_new or one.is_made(now):
                    continue
                is_for_forks = one.is_ready and one.is_hidden
                if not one.is_ready or (is_for_forks and not await tx.snapshots.is_awaited(one.id)):
                    done.append(one)
        for one in done:
            async with self._store.write(one.org_id) as tx:
                again = await tx.snapshots.find(one.org_id, one.id)
                if again != one:  # another server works on it
                    continue
                await tx.snapshots.remove(one.id, at=now)
                await tx.storage.close("snapshot", one.id, now)
        there = set(report.snapshots)
        strangers = there - {one.id for one in rows} - removed.keys()
        self._keep_unknown("snapshot", strangers)
        await self._quarantine.look_at_snapshots(strangers)
        gone = [one for one, at in removed.items() if one not in there and now - at > _FILES_LATE]
        if gone:
            async with self._store.write(Turn.ALONE) as tx:
                await tx.snapshots.forget(gone)
        unwanted = there & removed.keys()
        twice, self._unwanted_snapshots = unwanted & self._unwanted_snapshots, unwanted
        for snapshot_id in twice:
            try:
                await self._node.do(DropSnapshot(snapshot_id))
            except SandyardError as error:
                log.warning("cannot remove a snapshot's files: %s; retrying", error.message)
        return rows

    # --- concurrent work ------------------------------------------------------------------

    def _beside(self, what: str, work: Work) -> None:
        """Do something for a sandbox or the node concurrently, once at a time."""
        self._crew.start(work, "a sandbox could not be looked after", once=self._named(what))

    def _named(self, what: str) -> str:
        return f"{self._node.node_id} {what}"


def _lacks_rules(sandbox: Standing, fact: MachineFact) -> bool:
    """Tell whether other network rules are enforced in a running machine than its row has."""
    is_there = fact.phase is Phase.RUNNING and fact.incarnation == sandbox.incarnation
    return is_there and fact.rules != digest_of(sandbox.network, sandbox.network.stamp)


def _reason_of(fact: MachineFact) -> Reason:
    return Reason(fact.reason_code or LOST.code, fact.reason_message or LOST.message)


def _was_unreadable(sandbox: Standing) -> bool:
    return sandbox.reason is not None and sandbox.reason.code == _UNREADABLE


def _unreadable(report: NodeReport) -> Reason:
    paths = sorted(report.unreadable)
    more = f" and {len(paths) - _SHOWN_MAX} more" if len(paths) > _SHOWN_MAX else ""
    return Reason(
        _UNREADABLE,
        "its machine is not found, and records of machines cannot be read; repair or restore them "
        f"and restart the server: {', '.join(paths[:_SHOWN_MAX])}{more}",
    )


def has_expired(sandbox: Standing | Sandbox, now: datetime) -> bool:
    """Tell whether a sandbox has reached its end and is to be deleted."""
    return is_over(sandbox, now) and not sandbox.pauses_at_end


def is_to_be_paused(sandbox: Standing, now: datetime) -> bool:
    """Tell whether a sandbox has reached its end and is to be paused."""
    is_running = sandbox.status is Status.RUNNING
    return sandbox.pauses_at_end and is_running and is_over(sandbox, now)


def _due(sandbox: Standing) -> datetime | None:
    """Return when a sandbox's end is due. One that is not running cannot be paused."""
    is_due = not sandbox.pauses_at_end or sandbox.status is Status.RUNNING
    return sandbox.expires_at if is_due else None


def _is_believed(now: int, reported: int) -> bool:
    """Tell whether a row's version may be what the node was shown before the row went back."""
    return reported - now <= _BEHIND_MAX and reported <= _NUMBER_MAX
