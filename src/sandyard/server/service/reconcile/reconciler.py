"""Reconciles actual state with desired state: the one worker of the platform.

Each sandbox that needs work is leased, worked on, and released. Losing the lease (the owner deleted
the sandbox, another server took over) ends the work; the next comparison finds what it did. In
parallel, every node's report is compared with the store.

Several servers may do this concurrently: a lease names its holder and guards every write.
"""

import asyncio
import logging
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial

from sandyard.server.core.contracts.node import NodeControl
from sandyard.server.core.contracts.store import Hold, Turn
from sandyard.server.core.errors import ConflictError, SandyardError, UnavailableError
from sandyard.server.core.ids import new_secret
from sandyard.server.core.records import Claim, Mark
from sandyard.server.core.states import ENDING, Event, Status
from sandyard.server.service.reconcile.compare import (
    EXPIRED,
    WATCHED,
    Comparison,
    SilenceLimits,
)
from sandyard.server.service.reconcile.idle import Idleness
from sandyard.server.service.reconcile.revoking import Revoking
from sandyard.server.service.reconcile.shares import Shares
from sandyard.server.service.reconcile.work import Work
from sandyard.server.service.sandboxes.lifecycle import WORK
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.tasks import Crew, Task, attended

log = logging.getLogger(__name__)


def topic_of_node(node_id: str) -> str:
    """Return the topic of hints about changes on a node."""
    return f"node:{node_id}"


_NOTED_EVERY_S = 4.0
_LEFT_AFTER_S = 10.0
_RETRIES_MAX = 10_000
_random = random.SystemRandom()
_STARTING = frozenset({Status.PENDING, Status.CREATING, Status.RESUMING})


@dataclass(frozen=True)
class Pace:
    """How often the reconciler polls, and its limits. Work that cannot be completed is tried again
    after `retry_s`, and then less and less often, up to `retry_max_s`."""

    period_s: float = 2.0
    lease_s: float = 30.0
    retry_s: float = 2.0
    retry_max_s: float = 16.0
    start_limit_s: float = 300.0
    workers: int = 64
    patience: SilenceLimits = field(default_factory=SilenceLimits)


class Reconciler:
    """Runs the work. It compares the nodes of `shares`, or all without it. For `away_since` see
    `Comparison`."""

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
        self._retries: dict[str, int] = {}
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

    def new_hold(self) -> Hold:
        """Return a new lease, to be written together with the desired state and passed to
        `run_now`."""
        return Hold(self._server_id, new_secret(), self._lasts)

    async def run_now(self, claim: Claim, *, limit_s: float) -> None:
        """Work now on a sandbox that was just leased. Return when the work is done, or after
        `limit_s`.

        The work continues beyond the limit, and its outcome is stored. If the server ends, the next
        one finds the lease void or expired.
        """
        task = self._begin(claim)
        if task is not None and limit_s > 0:
            try:
                async with self._clock.timeout(limit_s):
                    await asyncio.wait([task])
            except TimeoutError:
                pass

    def release(self, sandbox_id: str, hold: Hold) -> None:
        """Release a lease in the background, if it was written and is not in use."""
        self._crew.start(
            self._release(sandbox_id, hold), "a lease was not given back", quietly=True
        )

    async def _release(self, sandbox_id: str, hold: Hold) -> None:
        try:
            async with self._store.write(Turn.SHARED) as tx:
                was_held = await tx.leases.extend(sandbox_id, lease=hold.lease, lasts=None)
        except UnavailableError:
            return  # it expires
        if was_held:
            self._bus.hint(WORK)

    def _begin(self, claim: Claim) -> Task | None:
        task = self._crew.start(
            self._carry_out(claim), "unexpected error while working on a sandbox; retrying"
        )
        # Deletes and pauses take no slot of starts: while a node is away, they last long.
        if task is not None and claim.sandbox.status in ENDING:
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
        # After success the status needs no work, so the lease has no effect and is not released.
        was_full = self._starting >= self._pace.workers
        self._starting -= 1
        if was_full:
            self._bus.hint(WORK)

    # --- work on one sandbox --------------------------------------------------------------

    async def _claims(self) -> list[Claim]:
        """Lease sandboxes that need work. Deletes and pauses never wait behind starts."""
        room = self._pace.workers - self._starting
        hold, claims = self.new_hold(), list[Claim]()
        try:
            async with self._store.glance() as tx:
                # A write waits for the disk, and most polls find nothing.
                wanted = ENDING | _STARTING if room > 0 else ENDING
                if not await tx.leases.waits(wanted):
                    return []
            async with self._store.write(Turn.SHARED) as tx:
                claims = await tx.leases.claim(ENDING, hold=hold, limit=self._pace.workers)
                self._more_end = len(claims) == self._pace.workers
                if room > 0:
                    claims += await tx.leases.claim(_STARTING, hold=hold, limit=room)
        except UnavailableError:
            log.warning("the store does not answer; retrying")
        except Exception:  # the loop must continue after any error
            log.exception("unexpected error of the store; retrying")
        return claims

    async def _carry_out(self, claim: Claim) -> None:
        """Work on a sandbox for as long as its lease can be extended."""
        try:
            await attended(
                self._work.on(claim),
                partial(self._extend, claim),
                every_s=self._pace.lease_s / 3,
                clock=self._clock,
            )
            self._retries.pop(claim.sandbox.id, None)
        except ConflictError:
            self._retries.pop(claim.sandbox.id, None)
            log.debug(
                "the sandbox changed meanwhile; dropping the work",
                extra={"sandbox_id": claim.sandbox.id},
            )
        except UnavailableError as error:
            log.info(
                "cannot complete the work now: %s; retrying",
                error.message,
                extra={"sandbox_id": claim.sandbox.id},
            )
            await self._try_again_later(claim)
        except Exception:  # the crew logs it
            await self._try_again_later(claim)
            raise

    async def _try_again_later(self, claim: Claim) -> None:
        pause_s = self._pause_s(claim.sandbox.id)
        try:
            async with self._store.write(Turn.SHARED) as tx:
                await tx.leases.extend(
                    claim.sandbox.id, lease=claim.lease, lasts=timedelta(seconds=pause_s)
                )
        except UnavailableError:
            log.warning("cannot shorten a lease; it will expire")

    def _pause_s(self, sandbox_id: str) -> float:
        """Return after how long to try again: twice as long each time, and not all at once when a
        node or the store returns."""
        retries = self._retries.pop(sandbox_id, 0)
        self._retries[sandbox_id] = retries + 1
        while len(self._retries) > _RETRIES_MAX:  # other servers go on with those
            del self._retries[next(iter(self._retries))]
        longest_s = min(self._pace.retry_s * 2.0 ** min(retries, 30), self._pace.retry_max_s)
        return longest_s * _random.uniform(0.5, 1)

    async def _extend(self, claim: Claim) -> None:
        """Extend a lease.

        Raises:
            ConflictError: another server has it.
        """
        try:
            async with self._store.write(Turn.SHARED) as tx:
                is_held = await tx.leases.extend(
                    claim.sandbox.id, lease=claim.lease, lasts=self._lasts
                )
        except UnavailableError:
            return  # not known to be lost; the guard on every write decides
        if not is_held:
            raise ConflictError("the lease was lost to another server")

    async def _expire_unplaced(self, _: bool) -> None:
        """Delete sandboxes that have reached their end and are on no node, and so in no report."""
        async with self._store.read() as tx:
            unplaced = await tx.sandboxes.unplaced_until(self._clock.now(), WATCHED)
        for sandbox in unplaced:
            await self._lifecycle.apply(sandbox, Event.DELETE, reason=EXPIRED)

    async def _revoke(self, _: bool) -> None:
        await self._revoking.look(self._crew)

    # --- what nodes report ----------------------------------------------------------------

    async def _compare_all(self, crew: Crew) -> None:
        """Keep comparing every node that exists and that this server is responsible for."""
        while True:
            try:
                await self._refresh()
            except UnavailableError as error:
                log.warning("cannot read which nodes to compare: %s; retrying", error.message)
            except Exception:  # the loop must continue after any error
                log.exception("unexpected error while reading which nodes to compare; retrying")
            for node in self._nodes.all():
                name = f"compare {node.node_id}"
                if self._is_own(node.node_id) and not crew.is_at(name):
                    work = self._keep_comparing(self._comparison(node, crew), node.node_id)
                    crew.start(work, "a node is compared no longer", once=name)
            self._away_since = None
            await self._clock.sleep(self._pace.period_s)

    async def _refresh(self) -> None:
        """Read which nodes this server compares, and the marks of their rows.

        Raises:
            UnavailableError: the store does not answer.
        """
        if self._shares is None:
            return
        self._marks = None  # stale marks would hide what was written since
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
        """Store which nodes were heard from, every few seconds, or at once for a node's first time.

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
        async with self._store.write(Turn.SHARED) as tx:
            await tx.nodes.heard(heard, self._clock.now())

    async def _keep_comparing(self, comparison: Comparison, node_id: str) -> None:
        async def look(is_hinted: bool) -> None:
            marks = None if is_hinted else self._marks
            await comparison.look(None if marks is None else marks.get(node_id, Mark()))
            # Last: a server that returns now must still see how long no server was comparing.
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
        """Call `look` at each hint and every period, whatever its outcome. A silent node delays no
        other.

        `look` receives whether there was a hint.
        """
        is_hinted = True
        with self._bus.subscribe(topic) as hints:
            while while_():
                try:
                    await look(is_hinted)
                except SandyardError as error:
                    log.warning("comparison failed: %s; retrying", error.message)
                except Exception:  # as above
                    log.exception("unexpected error in a comparison; retrying")
                is_hinted = await hints.wait(self._pace.period_s)
