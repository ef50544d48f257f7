"""Makes what is so agree with what should be: the one worker of the platform.

Every sandbox that wants something done is leased, worked on, and given back. A lease that is lost
(the owner deleted the sandbox, another process took over) ends the work on it; whatever that did
is found at the next look. Beside that, every node's report is compared with the store.
"""

import asyncio
import logging
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from datetime import timedelta

from sandyard.server.core.contracts import (
    Bus,
    Clock,
    MachineFact,
    MachineState,
    MachineWish,
    NodeControl,
    Store,
)
from sandyard.server.core.errors import ConflictError, SandyardError, UnavailableError
from sandyard.server.core.ids import hostname_of, new_secret
from sandyard.server.core.records import Claim, Reason, Sandbox
from sandyard.server.core.states import Event, Status, Wanted
from sandyard.server.service.lifecycle import WORK, Lifecycle
from sandyard.server.service.placement import Placement

log = logging.getLogger(__name__)

NODES = "nodes"
"""The topic of hints that a node's machines have changed."""

_STARTING = frozenset({Status.PENDING, Status.CREATING})
_ENDING = frozenset({Status.DESTROYING})
WORKABLE = _STARTING | _ENDING
"""Statuses in which a sandbox wants work done."""
_WATCHED = frozenset(Status) - {Status.DESTROYING, Status.DESTROYED, Status.ORPHANED}
_NOTHING_LEFT = frozenset({Status.FAILED, Status.DESTROYED, Status.ORPHANED})
_LOST = Reason("machine_lost", "the machine is no longer on its node")


@dataclass(frozen=True)
class Pace:
    """How often the reconciler looks, and how long it keeps at it."""

    period_s: float = 2.0
    lease_s: float = 30.0
    retry_s: float = 2.0
    start_limit_s: float = 300.0
    workers: int = 64


class Reconciler:
    """See the module."""

    def __init__(
        self,
        *,
        store: Store,
        placement: Placement,
        lifecycle: Lifecycle,
        bus: Bus,
        clock: Clock,
        pace: Pace,
    ) -> None:
        self._store = store
        self._placement = placement
        self._lifecycle = lifecycle
        self._bus = bus
        self._clock = clock
        self._pace = pace
        self._working = 0
        self._unwanted: dict[str, int] = {}

    async def run(self) -> None:
        """Work until cancelled."""
        with self._bus.subscribe(WORK) as hints:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._compare_for_ever())
                while True:
                    for claim in await self._claims():
                        self._working += 1
                        tasks.create_task(self._work(claim))
                    await hints.wait(self._pace.period_s)

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
            now = self._clock.now()
            await self._lifecycle.apply(
                sandbox,
                Event.READY,
                lease=claim.lease,
                ip=fact.ip,
                driver=fact.driver,
                os=fact.os,
                started_at=now,
                last_activity_at=now,
                last_activity_kind="created",
            )

    async def _give_up(self, claim: Claim, reason: Reason) -> None:
        log.error(
            "a sandbox could not be started: %s",
            reason.message,
            extra={"sandbox_id": claim.sandbox.id},
        )
        await self._lifecycle.apply(claim.sandbox, Event.BROKE, lease=claim.lease, reason=reason)

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
        for sandbox in rows:
            if sandbox.expires_at is not None and sandbox.expires_at <= self._clock.now():
                await self._expire(sandbox)
            elif sandbox.status is Status.RUNNING:
                await self._judge(sandbox, facts.get(sandbox.id))
        await self._remove_unwanted(node, report.machines, known)

    async def _judge(self, sandbox: Sandbox, fact: MachineFact | None) -> None:
        if fact is None or fact.incarnation != sandbox.incarnation:
            await self._lifecycle.apply(sandbox, Event.BROKE, reason=_LOST, ip=None)
        elif fact.state is MachineState.DEAD:
            reason = Reason(fact.reason_code or _LOST.code, fact.reason_message or _LOST.message)
            await self._lifecycle.apply(sandbox, Event.BROKE, reason=reason, ip=None)
        else:
            reason_now = Reason(fact.reason_code, fact.reason_message) if fact.reason_code else None
            if reason_now != sandbox.reason:
                await self._lifecycle.note_reason(sandbox, reason_now)

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
        for sandbox_id, incarnation in found.items():
            if self._unwanted.get(sandbox_id) == incarnation:
                log.warning(
                    "removing a machine that nobody wants", extra={"sandbox_id": sandbox_id}
                )
                await node.ensure_gone(sandbox_id, incarnation=incarnation)
        self._unwanted = found

    async def _expire(self, sandbox: Sandbox) -> None:
        await self._lifecycle.apply(
            sandbox,
            Event.DELETE,
            wanted=Wanted.GONE,
            reason=Reason("expired", "the end set at its creation (expiresIn) has come"),
        )


async def _trouble_of(work: Awaitable[None]) -> SandyardError | None:
    """Return the error that work ended with instead of raising it into the task's owner."""
    try:
        await work
    except SandyardError as error:
        return error
    return None


def _wish(sandbox: Sandbox) -> MachineWish:
    return MachineWish(
        sandbox_id=sandbox.id,
        incarnation=sandbox.incarnation,
        template=sandbox.template,
        shape=sandbox.shape,
        hostname=hostname_of(sandbox.name, sandbox.id),
        env=sandbox.env,
        authorized_keys=sandbox.ssh_keys,
        root_password_hash=sandbox.root_password_hash,
    )
