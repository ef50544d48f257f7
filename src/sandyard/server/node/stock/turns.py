"""Decides who starts next when only a limited number of machines may start at once.

Starts that a request waits for go before those made ahead. Among equals organizations take turns,
so that a request for a hundred machines does not make others wait for all of them.
"""

import asyncio
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from enum import IntEnum


class Rank(IntEnum):
    """The urgency of a start; lower values go first."""

    ASKED = 0  # a request waits for it
    AHEAD = 1  # for the pool
    GOLDEN = 2


class Turns:
    """Admits `limit` starts at once; the others wait, ordered by rank and then by organization in
    turn."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._queues: dict[Rank, OrderedDict[str, deque[asyncio.Future[None]]]] = {
            rank: OrderedDict() for rank in Rank
        }

    @property
    def is_wanted(self) -> bool:
        """Tell whether a start that is waiting would be delayed by one made ahead."""
        return bool(self._queues[Rank.ASKED])

    @asynccontextmanager
    async def take(self, rank: Rank, org_id: str = "") -> AsyncIterator[None]:
        """Wait for a turn and hold it until the end of the block."""
        await self._wait(rank, org_id)
        try:
            yield
        finally:
            self._free += 1
            self._admit()

    async def _wait(self, rank: Rank, org_id: str) -> None:
        turn = asyncio.get_running_loop().create_future()
        self._queues[rank].setdefault(org_id, deque()).append(turn)
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # let in and cancelled at the same moment
                self._free += 1
            self._drop(rank, org_id, turn)
            self._admit()
            raise

    def _admit(self) -> None:
        while self._free > 0 and (turn := self._next()) is not None:
            self._free -= 1
            turn.set_result(None)

    def _next(self) -> "asyncio.Future[None] | None":
        for queues in self._queues.values():
            while queues:
                org_id, queue = next(iter(queues.items()))
                turn = queue.popleft()
                if queue:
                    queues.move_to_end(org_id)
                else:
                    del queues[org_id]
                if not turn.done():
                    return turn
        return None

    def _drop(self, rank: Rank, org_id: str, turn: "asyncio.Future[None]") -> None:
        queue = self._queues[rank].get(org_id)
        if queue is not None and turn in queue:
            queue.remove(turn)
            if not queue:
                del self._queues[rank][org_id]
