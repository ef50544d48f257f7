"""The nodes on other hosts, kept up to date; marks nodes without a lease as lost."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.cluster import Beat
from sandyard.server.core.contracts.node import NodeView
from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.errors import UnavailableError
from sandyard.server.core.records import JoinedNode
from sandyard.server.tasks import concurrently

log = logging.getLogger(__name__)

_GRACE: Final = timedelta(seconds=0.5)
_LOOK_S: Final = 0.4
_CALM_S: Final = 5.0
_STILL_S: Final = 2.0
_STEP: Final = timedelta(seconds=2)
_TICK_S: Final = 0.25
_BACKLOG_S: Final = 1.0
_FRESH_S: Final = 3.0
_BRIEF_S: Final = 0.3
_MANY: Final = 3


@dataclass(frozen=True)
class Heartbeat:
    """A node's last heartbeat. `at` is this process's monotonic time in seconds."""

    at: float
    epoch: int
    view: NodeView


class Roster:
    """The nodes as of the last refresh. Call `refresh` once, then run it.

    `can_hear` tells whether NATS answers. `elapsed` returns seconds that also pass while this host
    is suspended.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        can_hear: Callable[[], bool],
        elapsed: Callable[[], float] | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self.can_hear = can_hear
        self._elapsed = elapsed or clock.monotonic
        self._calm_since: float | None = None
        self._ahead = timedelta()  # the database's clock
        self._looked_at = 0.0
        self._ticked_at: float | None = None
        self._went_on_at: float | None = None
        self._heartbeats: dict[str, Heartbeat] = {}
        self.nodes: dict[str, JoinedNode] = {}

    async def refresh(self) -> None:
        """Read the nodes.

        Raises:
            UnavailableError: the store does not answer.
        """
        async with self._store.glance() as tx:
            self.nodes = {one.id: one for one in await tx.joined_nodes.all()}
        read_at = next((one.read_at for one in self.nodes.values()), None)
        if read_at is not None:
            ahead = read_at - self._clock.now()
            if abs(ahead - self._ahead) > _STEP:  # leases seem to have ended, or not to end
                self._ahead, self._calm_since = ahead, None
        self._heartbeats = {
            one: heartbeat for one, heartbeat in self._heartbeats.items() if one in self.nodes
        }

    def hear(self, node_id: str, beat: Beat) -> None:
        """Record a node's heartbeat. Heartbeats of an older process, too many, and late ones are
        ignored."""
        node, now, known = (
            self.nodes.get(node_id),
            self._clock.monotonic(),
            self._heartbeats.get(node_id),
        )
        if beat.view is None or node is None or beat.epoch != node.epoch:
            return
        is_same = known is not None and known.epoch == beat.epoch
        if known is not None and is_same and (
            now - known.at < _BRIEF_S or beat.view.generation < known.view.generation
        ):  # fmt: skip
            return
        self._heartbeats[node_id] = Heartbeat(now, beat.epoch, beat.view)

    def last_heartbeat(self, node_id: str) -> Heartbeat | None:
        """Return a node's last heartbeat if it is recent, else None."""
        heartbeat = self._heartbeats.get(node_id)
        if heartbeat is None or self._clock.monotonic() - heartbeat.at > _FRESH_S:
            return None
        return heartbeat

    def hears_late(self) -> bool:
        """Tell whether this process was suspended until just now: heartbeats may have waited and be
        out of date."""
        now = self._elapsed()
        if self._ticked_at is not None and now - self._ticked_at > _STILL_S:
            return True
        return self._went_on_at is not None and now - self._went_on_at < _BACKLOG_S

    async def _tick(self) -> None:
        while True:
            now = self._elapsed()
            if self._ticked_at is not None and now - self._ticked_at > _STILL_S:
                self._went_on_at = now
            self._ticked_at = now
            await self._clock.sleep(_TICK_S)

    async def run(self) -> None:
        """Keep the nodes up to date, and mark nodes without a lease as lost; never returns.

        This happens only after database and NATS have both answered for a while: without either, no
        node could extend its lease.
        """
        async with concurrently(self._tick()):
            await self._look()

    async def _look(self) -> None:
        while True:
            began = self._elapsed()
            try:
                await self.refresh()
                await self._lose(began)
            except UnavailableError:
                self._calm_since = None
            except Exception:  # handled by the next poll
                log.exception("unexpected error while polling nodes; retrying")
            await self._clock.sleep(_LOOK_S)

    async def _lose(self, began: float) -> None:
        """Mark nodes as lost, in a poll that started at `began`."""
        now = self._elapsed()
        # A slow poll means that the database or this process was suspended.
        if not self.can_hear() or now - began > _STILL_S or now - self._looked_at > _STILL_S:
            self._calm_since = None
        self._looked_at = now
        if self._calm_since is None:
            self._calm_since = now
        is_ending = [
            one for one in self.nodes.values() if one.lease_until and not one.has_lease
            and one.lost_at is None
        ]  # fmt: skip
        if not is_ending or now - self._calm_since < _CALM_S:
            return
        async with self._store.write(Turn.SHARED) as tx:
            if self._elapsed() - now > _GRACE.total_seconds():
                return  # it waited, and heartbeats may have waited as well
            lost = await tx.joined_nodes.lose(grace=_GRACE)
        for node_id in lost:
            log.error("node %s missed its lease; marking its sandboxes suspected_missing", node_id)
        if len(lost) >= _MANY and 2 * len(lost) > len(self.nodes):
            log.error(
                "%d of %d nodes missed their leases at once, likely a network fault; leaving "
                "their sandboxes unchanged",
                len(lost),
                len(self.nodes),
            )

    def is_there(self, node_id: str) -> bool:
        """Tell whether a node has a lease."""
        node = self.nodes.get(node_id)
        return node is not None and node.has_lease

    def is_lost(self, node_id: str) -> bool:
        """Tell whether a node was given up and has not returned."""
        node = self.nodes.get(node_id)
        return node is not None and node.lost_at is not None

    async def is_still_lost(self, node_id: str) -> bool:
        """Tell the same, as the store has it now: a caller that is refused may know that the node
        is back.

        Raises:
            UnavailableError: the store does not answer.
        """
        if self.is_lost(node_id):
            await self.refresh()
        return self.is_lost(node_id)

    def takes_new(self, node_id: str) -> bool:
        """Tell whether new sandboxes may be placed on a node."""
        node = self.nodes.get(node_id)
        return node is not None and node.has_lease and not node.is_draining
