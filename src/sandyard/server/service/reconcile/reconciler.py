"""Makes what is so agree with what should be: the one worker of the platform.

Every sandbox that wants something done is leased, worked on, and given back. A lease that is lost
(the owner deleted the sandbox, another server took over) ends the work on it; whatever that did
is found at the next look. Beside that, every node's report is compared with the store.

Several servers may do this side by side: a lease says whose it is, every write is guarded, and
what one forgets another finds.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sandyard.server.core.contracts.node import NodeControl
from sandyard.server.core.contracts.store import Hold, Turn
from sandyard.server.core.errors import ConflictError, SandyardError, UnavailableError
from sandyard.server.core.ids import new_secret
from sandyard.server.core.records import Claim, Mark
from sandyard.server.core.states import Event, Status
from sandyard.server.service.reconcile.compare import (
    EXPIRED,
    WATCHED,
    Comparison,
    Patience,
)
from sandyard.server.service.reconcile.idle import Idleness
from sandyard.server.service.reconcile.revoking import Revoking
from sandyard.server.service.reconcile.shares import Shares
from sandyard.server.service.reconcile.work import Work
from sandyard.server.service.sandboxes.lifecycle import WORK
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.tasks import Crew, beside

log = logging.getLogger(__name__)


def topic_of_node(node_id: str) -> str:
    """Return the topic of hints that a node's machines have changed."""
    return f"node:{node_id}"


_NOTED_EVERY_S = 4.0
_LEFT_AFTER_S = 10.0
_STARTING = frozenset({Status.PENDING, Status.CREATING, Status.RESUMING})
_ENDING = frozenset({Status.DESTROYING, Status.PAUSING})


@dataclass(frozen=True)
class Pace:
    """How often the reconciler looks, and how long it keeps at it."""

    period_s: float = 2.0
    lease_s: float = 30.0
    retry_s: float = 2.0
    lost_s: float = 20.0
    """How long what is on a node that was given up is left alone."""
    start_limit_s: float = 300.0
    workers: int = 64
    patience: Patience = field(default_factory=Patience)


class Reconciler:
    """See the module. `server_id` is whose its leases are; for `away_since` see `Comparison`.
    `shares` says which nodes it compares; without, all."""

    def __init__(
        self,
        platform: Platform,
        *,
        work: Work,
        idleness: Idleness,
        revoking: Revoking,
        pace: Pace,
        shares: Shares | None = None,
        away_since: datetime | None = None,
    ) -> None:
        self._shares = shares
        self._comparisons: dict[str, Comparison] = {}
        self._marks: Mapping[str, Mark] | None = None
        self._noted_at: float | None = None
        self._noted: set[str] = set()
        self._platform = platform
        self._server_id = platform.server_id
        self._store = platform.store
        self._nodes = platform.nodes
        self._work = work
        self._lifecycle = platform.lifecycle
        self._idleness = idleness
        self._revoking = revoking
        self._bus = platform.bus
        self._clock = platform.clock
        self._pace = pace
        self._lasts = timedelta(seconds=pace.lease_s)
        self._away_since = away_since
        self._starting = 0
        self._more_end = False
        self._crew = Crew()

    async def run(self) -> None:
        """Work until cancelled."""
        with self._bus.subscribe(WORK) as hints:
            async with self._crew as crew:
                crew.start(self._compare_all(crew), "nodes that come are not compared")
                unplaced = self._keep_at(self._expire_unplaced, "unplaced")
                crew.start(unplaced, "what is on no node never ends")
                crew.start(self._keep_at(self._revoke, "revoked"), "revoked keys stay in files")
                while True:
                    for claim in await self._claims():
                        self._begin(claim)
                    await hints.wait(self._pace.period_s)

    def hold(self) -> Hold:
        """Return a lease to write together with a wish, for `take_up`."""
        return Hold(self._server_id, new_secret(), self._lasts)

    async def take_up(self, claim: Claim, *, limit_s: float) -> None:
        """Work now on what was just wished and is leased; return when done, or at the limit.

        The work goes on beyond the limit, and whatever becomes of it is in the store. Where nobody
        works, whoever does next finds the lease void or run out.
        """
        task = self._begin(claim)
        if task is not None and limit_s > 0:
            try:
                async with self._clock.timeout(limit_s):
                    await asyncio.wait([task])
            except TimeoutError:
                pass

    def let_go(self, sandbox_id: str, hold: Hold) -> None:
        """Give a lease back soon, if it was written: nobody works under it."""
        self._crew.start(self._let_go(sandbox_id, hold), "a lease was not given back", quietly=True)

    async def _let_go(self, sandbox_id: str, hold: Hold) -> None:
        try:
            async with self._store.write(Turn.BESIDE) as tx:
                was_held = await tx.leases.extend(sandbox_id, lease=hold.lease, lasts=None)
        except UnavailableError:
            return  # it runs out by itself
        if was_held:
            self._bus.hint(WORK)

    def _begin(self, claim: Claim) -> "asyncio.Task[None] | None":
        task = self._crew.start(self._carry_out(claim), "work on a sandbox failed")
        # What is to end takes no place from what is to start: where a node is away, it stays long.
        if task is not None and claim.sandbox.status in _ENDING:
            task.add_done_callback(lambda _: self._has_ended())
        elif task is not None:
            self._starting += 1
            task.add_done_callback(lambda _: self._is_free())
        return task

    def _has_ended(self) -> None:
        if self._more_end:
            self._more_end = False
            self._bus.hint(WORK)

    def _is_free(self) -> None:
        # Work that ended well left a status that nobody works on, and with it the lease lost its
        # meaning; it need not be given back.
        was_full = self._starting >= self._pace.workers
        self._starting -= 1
        if was_full:
            self._bus.hint(WORK)

    # --- work on one sandbox --------------------------------------------------------------

    async def _claims(self) -> list[Claim]:
        """Lease what wants work; what is to end never waits behind what waits to start."""
        room = self._pace.workers - self._starting
        hold, claims = self.hold(), list[Claim]()
        try:
            async with self._store.glance() as tx:
                # To write costs the disk a wait, and most looks find nothing.
                wanted = _ENDING | _STARTING if room > 0 else _ENDING
                if not await tx.leases.waits(wanted):
                    return []
            async with self._store.write(Turn.BESIDE) as tx:
                claims = await tx.leases.claim(_ENDING, hold=hold, limit=self._pace.workers)
                self._more_end = len(claims) == self._pace.workers
                if room > 0:
                    claims += await tx.leases.claim(_STARTING, hold=hold, limit=room)
        except UnavailableError:
            log.warning("the store does not answer; looking again soon")
        except Exception:  # the loop must go on, whatever the store says
            log.exception("the store failed; looking again soon")
        return claims

    async def _carry_out(self, claim: Claim) -> None:
        try:
            await self._under_lease(claim)
        except ConflictError:
            log.debug("a sandbox has moved on meanwhile", extra={"sandbox_id": claim.sandbox.id})
        except UnavailableError as error:
            log.info("not now: %s", error.message, extra={"sandbox_id": claim.sandbox.id})
            is_lost = self._nodes.is_lost(claim.sandbox.node_id)
            await self._try_again_later(claim, self._pace.lost_s if is_lost else None)
        except Exception:  # the loop must go on, whatever one sandbox does
            log.exception("work on a sandbox failed", extra={"sandbox_id": claim.sandbox.id})
            await self._try_again_later(claim)

    async def _try_again_later(self, claim: Claim, after_s: float | None = None) -> None:
        lasts = timedelta(seconds=self._pace.retry_s if after_s is None else after_s)
        try:
            async with self._store.write(Turn.BESIDE) as tx:
                await tx.leases.extend(claim.sandbox.id, lease=claim.lease, lasts=lasts)
        except Exception:  # as above; the lease runs out by itself
            log.exception("a lease could not be shortened; it will run out")

    async def _under_lease(self, claim: Claim) -> None:
        """Do what there is to do for as long as the lease can be kept up."""
        async with beside(self._trouble_with(claim)) as task:
            while not task.done():
                try:
                    async with self._clock.timeout(self._pace.lease_s / 3):
                        await asyncio.wait([task])
                except TimeoutError:
                    if not await self._extend(claim):
                        raise ConflictError("the lease was lost") from None
        if (trouble := task.result()) is not None:
            raise trouble

    async def _trouble_with(self, claim: Claim) -> SandyardError | None:
        """Do it, and return the error that it ended with instead of raising that in the task."""
        try:
            await self._work.carry_out(claim)
        except SandyardError as error:
            return error
        return None

    async def _extend(self, claim: Claim) -> bool:
        try:
            async with self._store.write(Turn.BESIDE) as tx:
                return await tx.leases.extend(
                    claim.sandbox.id, lease=claim.lease, lasts=self._lasts
                )
        except UnavailableError:
            return True  # not known to be lost; the guard on every write decides

    async def _expire_unplaced(self, _: bool) -> None:
        """Have those end in time that are on no node, and so in no node's report."""
        async with self._store.read() as tx:
            unplaced = await tx.sandboxes.unplaced_until(self._clock.now(), WATCHED)
        for sandbox in unplaced:
            await self._lifecycle.apply(sandbox, Event.DELETE, reason=EXPIRED)

    async def _revoke(self, _: bool) -> None:
        await self._revoking.look(self._crew)

    # --- what nodes report ----------------------------------------------------------------

    async def _compare_all(self, crew: Crew) -> None:
        """Have every node compared for as long as it is one, and this server's to compare."""
        while True:
            try:
                await self._refresh()
            except UnavailableError as error:
                log.warning("which nodes to compare is not known: %s", error.message)
            except Exception:  # the loop must go on, whatever the store says
                log.exception("which nodes to compare is not known")
            for node in self._nodes.all():
                name = f"compare {node.node_id}"
                if self._is_own(node.node_id) and not crew.is_at(name):
                    work = self._keep_comparing(self._comparison(node, crew), node.node_id)
                    crew.start(work, "a node is compared no longer", once=name)
            self._away_since = None
            await self._clock.sleep(self._pace.period_s)

    async def _refresh(self) -> None:
        """Find out which nodes are this server's, and what is written of them.

        Raises:
            UnavailableError: the store does not answer.
        """
        if self._shares is None:
            return
        self._marks = None  # by old ones, what has been written since would not be looked at
        now = self._clock.monotonic()
        unreached = {
            node_id
            for node_id, one in self._comparisons.items()
            if one.silent_since is not None and now - one.silent_since > _LEFT_AFTER_S
        }
        await self._shares.refresh(unreached)
        if own := self._shares.own:
            async with self._store.read() as tx:
                self._marks = await tx.sandboxes.marks(own, WATCHED)

    async def _note_heard(self, node_id: str) -> None:
        """Note which nodes were heard of, once in a while, or the first time that this one was.

        Raises:
            UnavailableError: the store does not answer.
        """
        now, noted_at = self._clock.monotonic(), self._noted_at
        is_due = noted_at is None or now - noted_at >= _NOTED_EVERY_S
        if node_id in self._noted and not is_due:
            return
        heard = {
            one
            for one, comparison in self._comparisons.items()
            if comparison.heard_at is not None
            and (one not in self._noted or noted_at is None or comparison.heard_at > noted_at)
        }
        if not heard:
            return
        self._noted_at = now
        self._noted |= heard
        async with self._store.write(Turn.BESIDE) as tx:
            await tx.nodes.heard(heard, self._clock.now())

    async def _keep_comparing(self, comparison: Comparison, node_id: str) -> None:
        async def look(is_hinted: bool) -> None:
            marks = None if is_hinted else self._marks
            await comparison.look(None if marks is None else marks.get(node_id, Mark()))
            # Last: a peer that comes back now must still find how long nobody looked.
            await self._note_heard(node_id)

        self._comparisons[node_id] = comparison
        try:
            await self._keep_at(look, topic_of_node(node_id), while_=self._is_one(node_id))
        finally:
            del self._comparisons[node_id]
            self._noted.discard(node_id)

    def _comparison(self, node: NodeControl, crew: Crew) -> Comparison:
        return Comparison(
            node,
            self._platform,
            worker=self,
            idleness=self._idleness,
            crew=crew,
            patience=self._pace.patience,
            away_since=self._away_since,
        )

    def _is_own(self, node_id: str) -> bool:
        return self._shares is None or node_id in self._shares.own

    def _is_one(self, node_id: str) -> Callable[[], bool]:
        return lambda: self._nodes.has(node_id) and self._is_own(node_id)

    async def _keep_at(
        self,
        look: Callable[[bool], Awaitable[None]],
        topic: str,
        *,
        while_: Callable[[], bool] = lambda: True,
    ) -> None:
        """Look again and again, whatever comes of it; a silent node holds up no other.

        `look` is told whether there was a hint.
        """
        is_hinted = True
        with self._bus.subscribe(topic) as hints:
            while while_():
                try:
                    await look(is_hinted)
                except SandyardError as error:
                    log.warning("a look failed: %s", error.message)
                except Exception:  # as above
                    log.exception("a look failed")
                is_hinted = await hints.wait(self._pace.period_s)
