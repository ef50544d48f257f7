"""Decides which nodes this control plane compares. Each node is compared by one control plane."""

from collections import Counter
from collections.abc import Collection
from datetime import timedelta
from typing import Final

from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.records import JoinedNode
from sandyard.server.service.roster import Roster

LASTS: Final = timedelta(seconds=6)


class Shares:
    """Takes over nodes that no control plane compares, and a fair share from the one that compares
    most.

    There is no list of control planes. A new one has no nodes, and takes nodes until it has as many
    as the others. The nodes of one that is gone become free when its leases expire.
    """

    def __init__(self, server_id: str, store: Store, roster: Roster) -> None:
        self._server_id = server_id
        self._store = store
        self._roster = roster
        self.own: frozenset[str] = frozenset()

    async def refresh(self, unreached: Collection[str] = ()) -> None:
        """Extend the leases on this control plane's nodes, and take over others as needed.

        Nodes that are `unreached` from here, and perhaps reachable from elsewhere, are kept only if
        no other control plane takes them.

        Raises:
            UnavailableError: the store does not answer.
        """
        nodes = list(self._roster.nodes.values())
        free = [one.id for one in nodes if not one.is_compared]
        counts = Counter(one.compared_by for one in nodes if one.is_compared)
        counts.pop(self._server_id, None)
        if not self._roster.can_hear():
            # It reaches no node. Servers that do take them over; if there is none, there is
            # still what only the store is needed for.
            rest = {one.id for one in nodes if one.is_compared} & self._held(nodes)
            self.own = frozenset(rest) | await self._take(free, free_for=LASTS)
            return
        wanted = {*free, *self._held(nodes)} - {*unreached}
        own = await self._take(sorted(wanted))
        left = [one for one in free if one in unreached]
        own |= await self._take(left, free_for=LASTS)
        own |= frozenset(unreached) & self._held(nodes) - {*free}
        for other, most in counts.most_common(1):
            theirs = [
                one.id
                for one in nodes
                if one.is_compared and one.compared_by == other and one.id not in unreached
            ]
            own |= await self._take(theirs[: max(0, (most - len(own)) // 2)], over=other)
        self.own = own

    def _held(self, nodes: Collection[JoinedNode]) -> set[str]:
        return {one.id for one in nodes if one.compared_by == self._server_id}

    async def _take(
        self,
        node_ids: list[str],
        *,
        over: str | None = None,
        free_for: timedelta = timedelta(),
    ) -> frozenset[str]:
        if not node_ids:
            return frozenset()
        async with self._store.write(Turn.SHARED) as tx:
            return await tx.joined_nodes.have_compared(
                node_ids, by=self._server_id, over=over, lasts=LASTS, free_for=free_for
            )
