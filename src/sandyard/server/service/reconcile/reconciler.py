"""Makes what is so agree with what should be: the one worker of the platform.

Every sandbox that wants something done is leased, worked on, and given back. A lease that is lost
(the owner deleted the sandbox, another process took over) ends the work on it; whatever that did
is found at the next look. Beside that, every node's report is compared with the store.
"""

import asyncio
import logging
from collections.abc import Awaitable, Coroutine, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta

from sandyard.server.core.contracts.bus import Bus
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import (
    MachineFact,
    MachineState,
    MachineWish,
    NodeControl,
    NodeReport,
    Origin,
)
from sandyard.server.core.contracts.store import Hold, Store
from sandyard.server.core.errors import (
    ConflictError,
    DamagedError,
    NotFoundError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.ids import hostname_of, new_secret
from sandyard.server.core.records import Claim, Reason, Sandbox
from sandyard.server.core.states import Event, Status, Wanted
from sandyard.server.service.placement import Placement
from sandyard.server.service.reconcile.idle import IDLE, Idleness, last_used
from sandyard.server.service.sandboxes.lifecycle import WORK, Lifecycle
from sandyard.server.service.sandboxes.uses import Uses

log = logging.getLogger(__name__)

NODES = "nodes"
"""The topic of hints that a node's machines have changed."""

_STARTING = frozenset({Status.PENDING, Status.CREATING, Status.RESUMING})
_ENDING = frozenset({Status.DESTROYING, Status.PAUSING})
WORKABLE = _STARTING | _ENDING
"""Statuses in which a sandbox wants work done."""
_WATCHED = frozenset(Status) - {Status.DESTROYING, Status.DESTROYED, Status.ORPHANED}
_NOTHING_LEFT = frozenset({Status.FAILED, Status.DESTROYED, Status.ORPHANED})
_LOST = Reason("machine_lost", "the machine is no longer on its node")
_SILENT = Reason("agent_silent", "the agent in the sandbox does not answer")
_VANISHED = Reason("vanished", "nothing of the sandbox is left on its node")
_PRESSED = Reason("host_memory_low", "the host was short of memory and this was used least lately")
_KEPT = frozenset({Status.PAUSED, Status.ERROR})
_PASSING = frozenset({"host_disk_full"})
_RELIEF = "relief"
_SILENT_MAX = timedelta(hours=1)


@dataclass(frozen=True)
class Pace:
    """How often the reconciler looks, and how long it keeps at it."""

    period_s: float = 2.0
    lease_s: float = 30.0
    retry_s: float = 2.0
    start_limit_s: float = 300.0
    grace_s: float = 10.0
    workers: int = 64


class Reconciler:
    """See the module.

    `away_since` is when the platform was last at work: machines that are found dead at the first
    look may have died at any time since, and nobody pays for what may not have been.
    """

    def __init__(
        self,
        *,
        store: Store,
        placement: Placement,
        lifecycle: Lifecycle,
        bus: Bus,
        clock: Clock,
        pace: Pace,
        idleness: Idleness,
        uses: Uses,
        away_since: datetime | None = None,
    ) -> None:
        self._away_since = away_since
        self._idleness = idleness
        self._uses = uses
        self._store = store
        self._placement = placement
        self._lifecycle = lifecycle
        self._bus = bus
        self._clock = clock
        self._pace = pace
        self._working = 0
        self._unwanted: dict[str, int] = {}
        self._vanished: set[str] = set()
        self._unwanted_snapshots: set[str] = set()
        self._settling: set[str] = set()
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Work until cancelled."""
        with self._bus.subscribe(WORK) as hints:
            try:
                async with asyncio.TaskGroup() as tasks:
                    self._tasks = tasks
                    tasks.create_task(self._compare_for_ever())
                    while True:
                        for claim in await self._claims():
                            self._begin(claim)
                        await hints.wait(self._pace.period_s)
            finally:
                self._tasks = None

    def hold(self) -> Hold:
        """Return a lease to write together with a wish, for `take_up`."""
        until = self._clock.now() + timedelta(seconds=self._pace.lease_s)
        return Hold(new_secret(), until)

    async def take_up(self, claim: Claim, *, limit_s: float) -> None:
        """Work now on what was just wished and is leased; return when done, or at the limit.

        The work goes on beyond the limit, and whatever becomes of it is in the store.
        """
        if self._tasks is None:
            # Nobody works here now; whoever does next finds the lease void or run out.
            return
        task = self._begin(claim)
        if limit_s > 0:
            await asyncio.wait([task], timeout=limit_s)

    def _begin(self, claim: Claim) -> "asyncio.Task[None]":
        assert self._tasks is not None
        self._working += 1
        return self._tasks.create_task(self._work(claim))

    # --- work on one sandbox --------------------------------------------------------------

    async def _claims(self) -> list[Claim]:
        """Lease what wants work; what is to end never waits behind what waits to start."""
        room = self._pace.workers - self._working
        now = self._clock.now()
        until = now + timedelta(seconds=self._pace.lease_s)
        lease, claims = new_secret(), []
        try:
            async with self._store.write() as tx:
                for statuses, limit in ((_ENDING, self._pace.workers), (_STARTING, room)):
                    if limit > 0:
                        claims += await tx.sandboxes.claim(
                            statuses, lease=lease, now=now, until=until, limit=limit
                        )
        except UnavailableError:
            log.warning("the store does not answer; looking again soon")
        except Exception:  # the loop must go on, whatever the store says
            log.exception("the store failed; looking again soon")
        return claims

    async def _work(self, claim: Claim) -> None:
        try:
            await self._under_lease(claim, self._carry_out(claim))
        except ConflictError:
            log.debug("a sandbox has moved on meanwhile", extra={"sandbox_id": claim.sandbox.id})
        except UnavailableError as error:
            log.info("not now: %s", error.message, extra={"sandbox_id": claim.sandbox.id})
            await self._try_again_later(claim)
        except Exception:  # the loop must go on, whatever one sandbox does
            log.exception("work on a sandbox failed", extra={"sandbox_id": claim.sandbox.id})
            await self._try_again_later(claim)
        finally:
            # Work that ended well left a status that nobody works on, and with it the lease lost
            # its meaning; it need not be given back.
            was_full = self._working >= self._pace.workers
            self._working -= 1
            if was_full:
                self._bus.hint(WORK)

    async def _try_again_later(self, claim: Claim) -> None:
        again_at = self._clock.now() + timedelta(seconds=self._pace.retry_s)
        try:
            async with self._store.write() as tx:
                await tx.sandboxes.extend(claim.sandbox.id, lease=claim.lease, until=again_at)
        except Exception:  # as above; the lease runs out by itself
            log.exception("a lease could not be shortened; it will run out")

    async def _under_lease(self, claim: Claim, work: Awaitable[None]) -> None:
        """Do work for as long as the lease can be kept up."""
        async with asyncio.TaskGroup() as tasks:
            task = tasks.create_task(_trouble_of(work))
            while not task.done():
                await asyncio.wait([task], timeout=self._pace.lease_s / 3)
                if not task.done() and not await self._extend(claim):
                    task.cancel()
                    break
        trouble = ConflictError("the lease was lost") if task.cancelled() else task.result()
        if trouble is not None:
            raise trouble

    async def _extend(self, claim: Claim) -> bool:
        until = self._clock.now() + timedelta(seconds=self._pace.lease_s)
        try:
            async with self._store.write() as tx:
                return await tx.sandboxes.extend(claim.sandbox.id, lease=claim.lease, until=until)
        except UnavailableError:
            return True  # not known to be lost; the guard on every write decides

    async def _carry_out(self, claim: Claim) -> None:
        match claim.sandbox.status:
            case Status.PENDING:
                node = self._placement.choose(claim.sandbox)
                placed = await self._lifecycle.apply(
                    claim.sandbox, Event.PLACED, lease=claim.lease, node_id=node.node_id
                )
                if placed is not None:
                    await self._bring_up(Claim(placed, claim.lease), node)
            case Status.CREATING:
                await self._bring_up(claim, self._node_of(claim.sandbox))
            case Status.RESUMING:
                await self._bring_back(claim)
            case Status.PAUSING:
                await self._pause(claim)
            case Status.DESTROYING:
                await self._take_down(claim)
            case _:
                log.error("nothing to do for a sandbox that is %s", claim.sandbox.status)

    async def _bring_up(self, claim: Claim, node: NodeControl) -> None:
        sandbox = claim.sandbox
        try:
            fact = await node.ensure_running(_wish(sandbox))
        except ConflictError:
            raise
        except UnavailableError as error:
            waited = self._clock.now() - sandbox.created_at
            if waited < timedelta(seconds=self._pace.start_limit_s):
                raise
            await self._give_up(claim, Reason(error.code.value, error.message))
        except SandyardError as error:
            await self._give_up(claim, Reason("start_failed", error.message))
        else:
            await self._is_up(claim, fact, used="created")

    async def _is_up(self, claim: Claim, fact: MachineFact, *, used: str) -> None:
        reason = Reason(fact.reason_code, fact.reason_message) if fact.reason_code else None
        await self._lifecycle.apply(
            claim.sandbox,
            Event.READY,
            lease=claim.lease,
            reason=reason,
            used=used,
            ip=fact.ip,
            driver=fact.driver,
            os=fact.os,
            started_at=self._clock.now(),
            paused_at=None,
        )

    async def _give_up(self, claim: Claim, reason: Reason) -> None:
        log.error(
            "a sandbox could not be started: %s",
            reason.message,
            extra={"sandbox_id": claim.sandbox.id},
        )
        await self._lifecycle.apply(claim.sandbox, Event.BROKE, lease=claim.lease, reason=reason)

    async def _bring_back(self, claim: Claim) -> None:
        """Resume, or roll back; on failure the sandbox is again what it was."""
        sandbox = claim.sandbox
        wish = _wish(sandbox)
        try:
            fact = await self._node_of(sandbox).ensure_running(wish)
        except ConflictError:
            raise
        except (DamagedError, NotFoundError) as error:
            if wish.origin is Origin.SNAPSHOT:
                await self._stays_paused(claim, error)
                return
            code = "saved_state_unusable" if isinstance(error, DamagedError) else _LOST.code
            await self._give_up(claim, Reason(code, error.message))
        except SandyardError as error:
            await self._stays_paused(claim, error)
        else:
            await self._is_up(claim, fact, used="resumed")

    async def _stays_paused(self, claim: Claim, error: SandyardError) -> None:
        log.error(
            "a sandbox could not be resumed: %s",
            error.message,
            extra={"sandbox_id": claim.sandbox.id},
        )
        code = error.code.value if isinstance(error, UnavailableError) else "resume_failed"
        await self._lifecycle.apply(
            claim.sandbox,
            Event.RESUME_FAILED if await self._is_saved(claim.sandbox) else Event.BROKE,
            lease=claim.lease,
            reason=Reason(code, error.message),
            wanted=Wanted.PAUSED,
        )

    async def _is_saved(self, sandbox: Sandbox) -> bool:
        """Tell whether a sandbox can be resumed with its memory: none can that was in error."""
        report = await self._node_of(sandbox).report()
        return not any(_is_dead(fact) for fact in report.machines if fact.sandbox_id == sandbox.id)

    async def _pause(self, claim: Claim) -> None:
        sandbox = claim.sandbox
        try:
            size = await self._node_of(sandbox).ensure_paused(
                sandbox.id, incarnation=sandbox.incarnation
            )
        except (NotFoundError, ConflictError) as error:
            if error.facts.get("status") != "error" and not isinstance(error, NotFoundError):
                raise
            await self._lifecycle.apply(
                sandbox, Event.BROKE, lease=claim.lease, reason=_LOST, ip=None
            )
        except SandyardError as error:
            log.error(
                "a sandbox could not be paused and runs on: %s",
                error.message,
                extra={"sandbox_id": sandbox.id},
            )
            code = error.code.value if isinstance(error, UnavailableError) else "pause_failed"
            await self._lifecycle.apply(
                sandbox,
                Event.PAUSE_FAILED,
                lease=claim.lease,
                reason=Reason(code, error.message),
                used="pause_failed",
                wanted=Wanted.RUNNING,
            )
        else:
            await self._lifecycle.apply(
                sandbox,
                Event.SAVED,
                lease=claim.lease,
                reason=sandbox.reason,
                ip=None,
                paused_at=self._clock.now(),
                saved_bytes=size,
            )

    async def _take_down(self, claim: Claim) -> None:
        sandbox = claim.sandbox
        node = self._placement.find(sandbox.node_id)
        if node is not None:
            await node.ensure_gone(sandbox.id, incarnation=sandbox.incarnation)
        await self._lifecycle.apply(sandbox, Event.GONE, lease=claim.lease, ip=None, reason=None)

    def _node_of(self, sandbox: Sandbox) -> NodeControl:
        node = self._placement.find(sandbox.node_id)
        if node is None:
            raise UnavailableError(f"cannot reach the node {sandbox.node_id}")
        return node

    # --- what nodes report ----------------------------------------------------------------

    async def _compare_for_ever(self) -> None:
        with self._bus.subscribe(NODES) as hints:
            while True:
                try:
                    for node in self._placement.all():
                        await self._compare(node)
                except SandyardError as error:
                    log.warning("comparing with the nodes failed: %s", error.message)
                except Exception:  # as above
                    log.exception("comparing with the nodes failed")
                await hints.wait(self._pace.period_s)

    async def _compare(self, node: NodeControl) -> None:
        # Rows first: a row that says running was written when the machine was there, so a later
        # report without it means that it is gone.
        async with self._store.read() as tx:
            rows = await tx.sandboxes.on_node(node.node_id, _WATCHED)
        report = await node.report()
        facts = {fact.sandbox_id: fact for fact in report.machines}
        known = {sandbox.id: sandbox for sandbox in rows}
        vanished: set[str] = set()
        for sandbox in rows:
            fact = facts.get(sandbox.id)
            if sandbox.expires_at is not None and sandbox.expires_at <= self._clock.now():
                is_gone = fact is None or _is_dead(fact)
                await self._expire(sandbox, ended_at=self._away_since if is_gone else None)
            elif sandbox.status in (Status.RUNNING, Status.SUSPECTED_MISSING):
                await self._judge(sandbox, fact)
                if self._idleness.is_due(sandbox):
                    self._settle(sandbox.id, self._pause_if_idle(sandbox))
            elif sandbox.status is Status.PAUSED and fact is not None and _is_dead(fact):
                await self._lifecycle.apply(sandbox, Event.BROKE, reason=_reason_of(fact))
            elif sandbox.status in _KEPT and fact is None:
                vanished.add(sandbox.id)
                if sandbox.id in self._vanished:
                    await self._lifecycle.apply(sandbox, Event.VANISHED, reason=_VANISHED)
        self._vanished = vanished
        self._away_since = None  # whatever died while nobody looked has been found
        if report.is_short_of_memory:
            await self._relieve(rows)
        await self._remove_unwanted(node, report.machines, known)
        await self._look_after_snapshots(node, report)

    def _settle(self, what: str, work: Coroutine[None, None, None]) -> None:
        """Do something for a sandbox, or for all, beside; once at a time."""
        if self._tasks is None or what in self._settling:
            work.close()
            return
        self._settling.add(what)
        self._tasks.create_task(self._settled(what, work))

    async def _settled(self, what: str, work: Coroutine[None, None, None]) -> None:
        try:
            await work
        except SandyardError as error:
            log.warning("a sandbox could not be looked after: %s", error.message)
        except Exception:  # as above
            log.exception("a sandbox could not be looked after")
        finally:
            self._settling.discard(what)

    async def _pause_if_idle(self, sandbox: Sandbox) -> None:
        if await self._idleness.is_idle(sandbox):
            await self._pause_unused(sandbox, IDLE)

    async def _pause_unused(self, sandbox: Sandbox, reason: Reason) -> None:
        """Have a sandbox paused, unless somebody begins to use it at that moment."""
        hold = self.hold()
        pausing = await self._lifecycle.apply(
            sandbox, Event.PAUSE, hold=hold, reason=reason, wanted=Wanted.PAUSED
        )
        if pausing is None:
            return
        async with self._store.read() as tx:
            again = await tx.sandboxes.find(sandbox.id)
        is_used = again is None or again.last_activity_at != sandbox.last_activity_at
        if is_used or self._uses.is_used(sandbox.id):
            # Whoever uses it saw it running; nothing has been done to its machine yet.
            await self._lifecycle.apply(
                pausing, Event.PAUSE_FAILED, lease=hold.lease, wanted=Wanted.RUNNING
            )
            return
        await self.take_up(Claim(pausing, hold.lease), limit_s=0)

    async def _judge(self, sandbox: Sandbox, fact: MachineFact | None) -> None:
        is_silent = sandbox.status is Status.SUSPECTED_MISSING
        if fact is None or fact.incarnation != sandbox.incarnation:
            await self._lifecycle.apply(
                sandbox, Event.BROKE, reason=_LOST, ip=None, ended_at=self._away_since
            )
        elif _is_dead(fact):
            await self._lifecycle.apply(
                sandbox,
                Event.BROKE,
                reason=_reason_of(fact),
                ip=None,
                ended_at=self._away_since,
            )
        elif fact.state is MachineState.SILENT:
            if not is_silent:
                await self._lifecycle.apply(sandbox, Event.SILENT, reason=_SILENT)
            elif self._clock.now() - sandbox.updated_at > _SILENT_MAX:
                # It can be used by nobody, and is charged for nothing.
                await self._lifecycle.apply(
                    sandbox, Event.PAUSE, reason=_SILENT, wanted=Wanted.PAUSED
                )
        elif is_silent:
            await self._lifecycle.apply(sandbox, Event.READY)
        elif fact.state is MachineState.PAUSED:
            # It was saved by somebody whose word did not reach the store.
            await self._lifecycle.apply(sandbox, Event.PAUSE, wanted=Wanted.PAUSED)
        else:
            reason_now = Reason(fact.reason_code, fact.reason_message) if fact.reason_code else None
            passes = sandbox.reason is not None and sandbox.reason.code in _PASSING
            if reason_now != sandbox.reason and (reason_now is not None or passes):
                await self._lifecycle.note_reason(sandbox, reason_now)

    async def _relieve(self, rows: list[Sandbox]) -> None:
        """Have the sandbox paused that was used least lately, for the host's memory runs out."""
        running = [
            one for one in rows if one.status is Status.RUNNING and not self._uses.is_used(one.id)
        ]
        if running and _RELIEF not in self._settling:
            sandbox = min(running, key=last_used)
            log.warning(
                "the host is short of memory: a sandbox is paused",
                extra={"sandbox_id": sandbox.id},
            )
            self._settle(_RELIEF, self._pause_unused(sandbox, _PRESSED))

    async def _look_after_snapshots(self, node: NodeControl, report: NodeReport) -> None:
        """Remove hidden snapshots whose forks are made, those that were never finished, and files
        of which the store knows nothing."""
        now = self._clock.now()
        async with self._store.read() as tx:
            rows = await tx.snapshots.on_node(node.node_id)
            done = []
            for one in rows:
                is_new = now - one.created_at < timedelta(seconds=self._pace.grace_s)
                if is_new or self._uses.is_used(one.id):
                    continue
                is_for_forks = one.is_ready and one.is_hidden
                if not one.is_ready or (is_for_forks and not await tx.snapshots.is_awaited(one.id)):
                    done.append(one)
        for one in done:
            async with self._store.write() as tx:
                await tx.snapshots.remove(one.id)
                await tx.storage.close("snapshot", one.id, now)
        kept = {one.id for one in rows} - {one.id for one in done}
        unwanted = {one for one in report.snapshots if one not in kept}
        twice, self._unwanted_snapshots = unwanted & self._unwanted_snapshots, unwanted
        for snapshot_id in twice:
            try:
                await node.drop_snapshot(snapshot_id)
            except SandyardError as error:
                log.warning("a snapshot's files could not be removed: %s", error.message)

    async def _remove_unwanted(
        self, node: NodeControl, machines: tuple[MachineFact, ...], known: Mapping[str, Sandbox]
    ) -> None:
        """Remove machines that nobody wants, when two looks in a row have found them so."""
        found: dict[str, int] = {}
        for fact in machines:
            sandbox = known.get(fact.sandbox_id)
            if sandbox is None:  # written after the rows were read, or gone
                async with self._store.read() as tx:
                    sandbox = await tx.sandboxes.find(fact.sandbox_id)
            if sandbox is None or sandbox.status in _NOTHING_LEFT:
                found[fact.sandbox_id] = fact.incarnation
        twice = found.items() & self._unwanted.items()
        self._unwanted = found
        for sandbox_id, incarnation in twice:
            log.warning("removing a machine that nobody wants", extra={"sandbox_id": sandbox_id})
            self._settle(sandbox_id, node.ensure_gone(sandbox_id, incarnation=incarnation))

    async def _expire(self, sandbox: Sandbox, *, ended_at: datetime | None) -> None:
        await self._lifecycle.apply(
            sandbox,
            Event.DELETE,
            ended_at=ended_at,
            wanted=Wanted.GONE,
            reason=Reason("expired", "the end set at its creation (expiresIn) has come"),
        )


def _is_dead(fact: MachineFact) -> bool:
    return fact.state is MachineState.DEAD


def _reason_of(fact: MachineFact) -> Reason:
    return Reason(fact.reason_code or _LOST.code, fact.reason_message or _LOST.message)


async def _trouble_of(work: Awaitable[None]) -> SandyardError | None:
    """Return the error that work ended with instead of raising it into the task's owner."""
    try:
        await work
    except SandyardError as error:
        return error
    return None


def _wish(sandbox: Sandbox) -> MachineWish:
    origin = Origin.OWN if sandbox.status is Status.RESUMING else Origin.NEW
    if sandbox.from_snapshot_id is not None and sandbox.from_snapshot_at == sandbox.incarnation:
        origin = Origin.SNAPSHOT
    return MachineWish(
        sandbox_id=sandbox.id,
        incarnation=sandbox.incarnation,
        template=sandbox.template,
        shape=sandbox.shape,
        hostname=hostname_of(sandbox.name, sandbox.id),
        tenant=sandbox.org_id,
        env=sandbox.env,
        authorized_keys=sandbox.ssh_keys,
        root_password_hash=sandbox.root_password_hash,
        origin=origin,
        snapshot_id=sandbox.from_snapshot_id if origin is Origin.SNAPSHOT else None,
    )
