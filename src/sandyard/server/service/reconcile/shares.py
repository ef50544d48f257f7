"""Which nodes this control plane compares, of those that several have: each is compared by one."""

from collections import Counter
from collections.abc import Collection
from datetime import timedelta
from typing import Final

from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.records import JoinedNode
from sandyard.server.service.roster import Roster

LASTS: Final = timedelta(seconds=6)


class Shares:
    """Takes up what nobody compares, and from whoever compares most as much as is fair.

    Nobody keeps a list of control planes: one that is new has nothing, and takes until it has as
    much as the others; what one compared that is gone is free once its time has run out.
    """

    def __init__(self, server_id: str, store: Store, roster: Roster) -> None:
        self._server_id = server_id
        self._store = store
        self._roster = roster
        self.own: frozenset[str] = frozenset()

    async def refresh(self, unreached: Collection[str] = ()) -> None:
        """Keep for a while longer what this control plane compares, and take up what it should.

        What is `unreached` from here, and perhaps not from elsewhere, it keeps only if nobody else
        takes it.

        Raises:
            UnavailableError: the store does not answer.
        """
        nodes = list(self._roster.nodes.values())
        free = [one.id for one in nodes if not one.is_compared]
        counts = Counter(one.compared_by for one in nodes if one.is_compared)
        counts.pop(self._server_id, None)
        if not self._roster.can_hear():
            # It can ask no node anything. Whoever can is to have them; if nobody can, there is
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
        async with self._store.write(Turn.BESIDE) as tx:
            return await tx.joined_nodes.have_compared(
                node_ids, by=self._server_id, over=over, lasts=LASTS, free_for=free_for
            )
