"""Which nodes on other hosts there are, as of a moment ago; and giving up whoever is lost."""

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
from sandyard.server.tasks import beside

log = logging.getLogger(__name__)

_GRACE: Final = timedelta(seconds=0.5)
_LOOK_S: Final = 0.4
_CALM_S: Final = 5.0
_STILL_S: Final = 2.0
_TICK_S: Final = 0.25
_BACKLOG_S: Final = 1.0
_FRESH_S: Final = 3.0
_BRIEF_S: Final = 0.3
_MANY: Final = 3


@dataclass(frozen=True)
class Told:
    """What a node said of itself last: `at` by this process's clock, in seconds."""

    at: float
    epoch: int
    view: NodeView


class Roster:
    """The nodes as they were a moment ago. Run it, and refresh it once before.

    `can_hear` tells whether NATS answers; `elapsed` is a time that goes on while this host does not
    run, in seconds.
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
        self._looked_at = 0.0
        self._ticked_at: float | None = None
        self._went_on_at: float | None = None
        self._told: dict[str, Told] = {}
        self.nodes: dict[str, JoinedNode] = {}

    async def refresh(self) -> None:
        """Read the nodes.

        Raises:
            UnavailableError: the store does not answer.
        """
        async with self._store.glance() as tx:
            self.nodes = {one.id: one for one in await tx.joined_nodes.all()}
        self._told = {one: told for one, told in self._told.items() if one in self.nodes}

    def hear(self, node_id: str, beat: Beat) -> None:
        """Note what a node says of itself; an older process of it, one that says something all the
        time, and what comes late, are not believed."""
        node, now, known = self.nodes.get(node_id), self._clock.monotonic(), self._told.get(node_id)
        if beat.view is None or node is None or beat.epoch != node.epoch:
            return
        is_same = known is not None and known.epoch == beat.epoch
        if known is not None and is_same and (
            now - known.at < _BRIEF_S or beat.view.generation < known.view.generation
        ):  # fmt: skip
            return
        self._told[node_id] = Told(now, beat.epoch, beat.view)

    def told(self, node_id: str) -> Told | None:
        """Return what a node said of itself a moment ago; None if it said nothing."""
        told = self._told.get(node_id)
        if told is None or self._clock.monotonic() - told.at > _FRESH_S:
            return None
        return told

    def hears_late(self) -> bool:
        """Tell whether this process stood still until a moment ago: what it is told now may have
        waited for it, and be of a time long past."""
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
        """Keep them fresh, and give up whoever's lease has ended.

        Only after a while in which database and NATS both answered: where either was away, no node
        could say that it is there, and that is nobody's end.
        """
        async with beside(self._tick()):
            await self._look()

    async def _look(self) -> None:
        while True:
            began = self._elapsed()
            try:
                await self.refresh()
                await self._lose(began)
            except UnavailableError:
                self._calm_since = None
            except Exception:  # looked after at the next look
                log.exception("nodes could not be looked after")
            await self._clock.sleep(_LOOK_S)

    async def _lose(self, began: float) -> None:
        """Give up whoever is to be, in a look that `began` just now."""
        now = self._elapsed()
        # Where a look took long, the database or this process stood still.
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
        async with self._store.write(Turn.BESIDE) as tx:
            if self._elapsed() - now > _GRACE.total_seconds():
                return  # it waited for its turn, and so may what nodes have said meanwhile
            lost = await tx.joined_nodes.lose(grace=_GRACE)
        for node_id in lost:
            log.error("the node %s is lost: it has not been heard of", node_id)
        if len(lost) >= _MANY and 2 * len(lost) > len(self.nodes):
            log.error(
                "%d of %d nodes were lost at once: more likely it is what joins them; nothing of "
                "theirs is undone",
                len(lost),
                len(self.nodes),
            )

    def is_there(self, node_id: str) -> bool:
        """Tell whether a node has a lease."""
        node = self.nodes.get(node_id)
        return node is not None and node.has_lease

    def is_lost(self, node_id: str) -> bool:
        """Tell whether a node was given up, and has not come back."""
        node = self.nodes.get(node_id)
        return node is not None and node.lost_at is not None

    async def is_still_lost(self, node_id: str) -> bool:
        """Tell the same as of now: whoever is refused for it may have seen that it is back.

        Raises:
            UnavailableError: the store does not answer.
        """
        if self.is_lost(node_id):
            await self.refresh()
        return self.is_lost(node_id)

    def takes_new(self, node_id: str) -> bool:
        """Tell whether new sandboxes may come to a node."""
        node = self.nodes.get(node_id)
        return node is not None and node.has_lease and not node.is_draining
