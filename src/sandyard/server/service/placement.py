"""Which node a sandbox goes to: one that can start it, has room, and has most of it."""

import asyncio
import random
from dataclasses import dataclass
from typing import Final

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import NodeView
from sandyard.server.core.errors import UnavailableError
from sandyard.server.core.records import Snapshot
from sandyard.server.core.shapes import Shape
from sandyard.server.service.nodes import Nodes

_LOT: Final = 8
_SUNK_S: Final = 180.0


@dataclass(frozen=True)
class Placed:
    """A node for a sandbox; `is_waiting` says that a machine for it runs there already."""

    node_id: str
    is_waiting: bool = False


class Placement:
    """Chooses among the nodes by what they report; the node itself has the last word.

    Where several choose at once, one of the best is taken `by_lot`: what they go by is a moment
    old, and the best of all would be everybody's.
    """

    def __init__(self, nodes: Nodes, clock: Clock, *, by_lot: bool = False) -> None:
        self._nodes = nodes
        self._clock = clock
        self._by_lot = by_lot
        self._failed: dict[str, float] = {}

    def note_failure(self, node_id: str | None) -> None:
        """Note that a node could not start what had room there: for minutes it is asked last."""
        if node_id is not None:
            self._failed[node_id] = self._clock.monotonic()

    def _has_failed(self, node_id: str) -> bool:
        failed_at = self._failed.get(node_id)
        return failed_at is not None and self._clock.monotonic() - failed_at < _SUNK_S

    async def choose(self, template: str, shape: Shape, *, but: str | None = None) -> Placed:
        """Return the node for a new sandbox of a template, another than `but`.

        Raises:
            NoCapacityError: no node has room now; the message says what is short.
            UnavailableError: no node that answers can start it.
        """
        trouble: UnavailableError | None = None
        for node_id in await self._able(template, shape, but=but):
            try:
                node = self._nodes.get(node_id)
                return Placed(node_id, await node.find_room(template, shape))
            except UnavailableError as error:
                trouble = error
        raise trouble or UnavailableError(
            f"cannot place a sandbox of {template}: no node that answers can start one now"
        )

    async def choose_for(self, snapshot: Snapshot, shape: Shape, *, count: int = 1) -> Placed:
        """Return the node for sandboxes from a snapshot: the one where that lies.

        Raises: see `choose`.
        """
        node = self._nodes.get(snapshot.node_id)
        await node.find_room(snapshot.template, shape, count=count)
        return Placed(node.node_id)

    async def _asked(self, node_id: str) -> NodeView | None:
        """Return what a node says now, None if it does not answer."""
        try:
            return (await self._nodes.report_of(self._nodes.get(node_id))).view()
        except UnavailableError:
            return None

    async def _able(self, template: str, shape: Shape, *, but: str | None) -> list[str]:
        """Return nodes that have a template, best first: no start failed there lately, there is
        room, a machine waits, then most memory left."""
        ranked: list[tuple[tuple[bool, bool, bool], int, int, str]] = []
        ids = [one for one in self._nodes.ids() if one != but and self._nodes.takes_new(one)]
        views = {one: self._nodes.lately(one) for one in ids}
        if unknown := [one for one, view in views.items() if view is None]:
            async with asyncio.TaskGroup() as tasks:
                asking = {one: tasks.create_task(self._asked(one)) for one in unknown}
            views |= {one: task.result() for one, task in asking.items()}
        for node_id, view in views.items():
            if view is not None and template in view.templates:
                tier = (not self._has_failed(node_id), *_tier(view, template, shape))
                ranked.append((tier, view.memory_mib, view.disk_mib, node_id))
        # Of those that are alike, the order stays as it is.
        ranked.sort(key=lambda one: one[:3], reverse=True)
        if self._by_lot and ranked:
            best = [one for one in ranked[:_LOT] if one[0] == ranked[0][0]]
            ranked[: len(best)] = random.sample(best, len(best))
        return [one[3] for one in ranked]


def _tier(view: NodeView, template: str, shape: Shape) -> tuple[bool, bool]:
    waits = any(
        one.size > 0
        and (one.template, one.vcpus, one.memory_mib) == (template, shape.vcpus, shape.memory_mib)
        for one in view.shelves
    )
    fits = view.memory_mib >= shape.memory_mib and view.disk_mib >= shape.disk_mib
    return fits, waits
