"""Which node a sandbox goes to: one that can start it, has room, and has most of it."""

import asyncio
import random
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import GoldenFact, NodeView
from sandyard.server.core.errors import UnavailableError
from sandyard.server.core.records import Snapshot
from sandyard.server.core.shapes import Shape
from sandyard.server.service.nodes import Nodes

_LOT: Final = 8
_SUNK_S: Final = 180.0
_ON_ITS_WAY_S: Final = 0.5
_LONG_AGO_S: Final = 15.0


@dataclass(frozen=True)
class Placed:
    """A node for a sandbox; `is_waiting` says that a machine for it runs there already."""

    node_id: str
    is_waiting: bool = False


@dataclass(frozen=True)
class _Sent:
    """What was placed on a node `at` a moment, by this process's clock."""

    at: float
    template: str
    shape: Shape

    def is_of(self, template: str, shape: Shape) -> bool:
        kind = self.template, self.shape.vcpus, self.shape.memory_mib
        return kind == (template, shape.vcpus, shape.memory_mib)


@dataclass(frozen=True)
class _Ranked:
    """What there is to be said for a node; of tiers the greatest is the best."""

    node_id: str
    tier: tuple[bool, ...]
    has_room: bool
    memory_mib: int
    disk_mib: int


class Placement:
    """Chooses among the nodes by what they report; the node itself has the last word.

    Where several choose at once, one of the best is taken `by_lot`: what they go by is a moment
    old, and the best of all would be everybody's. What was placed since then is counted all the
    same.
    """

    def __init__(self, nodes: Nodes, clock: Clock, *, by_lot: bool = False) -> None:
        self._nodes = nodes
        self._clock = clock
        self._by_lot = by_lot
        self._failed: dict[str, float] = {}
        self._sent: dict[str, deque[_Sent]] = {}

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
        asked, is_last = {but}, False
        while not is_last:
            able, is_last = await self._able(template, shape, but=asked, asks_all=len(asked) > 1)
            for node_id in able:
                asked.add(node_id)
                try:
                    node = self._nodes.get(node_id)
                    placed = Placed(node_id, await node.find_room(template, shape))
                except UnavailableError as error:
                    trouble = error
                else:
                    self._note(node_id, template, shape)
                    return placed
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

    def _note(self, node_id: str, template: str, shape: Shape) -> None:
        now = self._clock.monotonic()
        sent = self._sent.setdefault(node_id, deque())
        sent.append(_Sent(now, template, shape))
        while sent[0].at < now - _LONG_AGO_S:
            sent.popleft()

    def _since(self, node_id: str, at: float) -> list[_Sent]:
        """Return what was placed on a node that it did not know of at a moment."""
        if not self._by_lot:
            return []  # it is asked, and says what is so now
        return [one for one in self._sent.get(node_id, ()) if one.at > at - _ON_ITS_WAY_S]

    async def _asked(self, node_id: str) -> tuple[float, NodeView] | None:
        """Return what a node says now, None if it does not answer."""
        now = self._clock.monotonic()
        try:
            return now, (await self._nodes.report_of(self._nodes.get(node_id))).view()
        except UnavailableError:
            return None

    async def _able(
        self, template: str, shape: Shape, *, but: Collection[str | None], asks_all: bool
    ) -> tuple[list[str], bool]:
        """Return nodes that have a template, best first: no start failed there lately, there is
        room, a machine waits, a golden one is there, then most memory left; and whether those are
        all.

        Who says nothing of itself while others do may be cut off, and is not waited for, but where
        that `asks_all`.
        """
        ids = [one for one in self._nodes.ids() if one not in but and self._nodes.takes_new(one)]
        views = {one: self._nodes.lately(one) for one in ids}
        ranked = self._ranked(views, template, shape)
        unknown = [one for one, view in views.items() if view is None]
        has_others = self._by_lot and any(one.has_room for one in ranked)
        leaves_some = bool(unknown) and has_others and not asks_all
        if unknown and not leaves_some:
            async with asyncio.TaskGroup() as tasks:
                asking = {one: tasks.create_task(self._asked(one)) for one in unknown}
            views |= {one: task.result() for one, task in asking.items()}
            ranked = self._ranked(views, template, shape)
        # Of those that are alike, the order stays as it is.
        ranked.sort(key=lambda one: (one.tier, one.memory_mib, one.disk_mib), reverse=True)
        if self._by_lot and ranked:
            best = [one for one in ranked[:_LOT] if one.tier == ranked[0].tier]
            ranked[: len(best)] = random.sample(best, len(best))
        return [one.node_id for one in ranked], not leaves_some

    def _ranked(
        self, views: Mapping[str, tuple[float, NodeView] | None], template: str, shape: Shape
    ) -> list[_Ranked]:
        """Return what there is to be said for each node that has a template."""
        ranked = []
        for node_id, said in views.items():
            if said is None or template not in said[1].templates:
                continue
            at, view = said
            sent = self._since(node_id, at)
            memory_mib = view.memory_mib - sum(one.shape.memory_mib for one in sent)
            disk_mib = view.disk_mib - sum(one.shape.disk_mib for one in sent)
            taken = sum(one.is_of(template, shape) for one in sent)
            has_room = memory_mib >= shape.memory_mib and disk_mib >= shape.disk_mib
            tier = (
                not self._has_failed(node_id),
                has_room,
                _waiting(view, template, shape) > taken,
                GoldenFact(template, shape.vcpus, shape.memory_mib) in view.goldens,
            )
            ranked.append(_Ranked(node_id, tier, has_room, memory_mib, disk_mib))
        return ranked


def _waiting(view: NodeView, template: str, shape: Shape) -> int:
    """Return how many machines wait on a node for sandboxes of a kind: a disk can only grow."""
    kind = template, shape.vcpus, shape.memory_mib
    return sum(
        one.size
        for one in view.shelves
        if (one.template, one.vcpus, one.memory_mib) == kind and one.disk_mib <= shape.disk_mib
    )
