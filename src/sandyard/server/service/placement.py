"""Chooses the node for a sandbox: one that has the template and the most free capacity."""

import asyncio
import logging
import random
from collections import deque
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import GoldenFact, NodeView
from sandyard.server.core.errors import UnavailableError
from sandyard.server.core.node_ops import FindRoom
from sandyard.server.core.records import Snapshot
from sandyard.server.core.shapes import Shape
from sandyard.server.service.nodes import Nodes

log = logging.getLogger(__name__)

_LOT: Final = 8
_SUNK_S: Final = 180.0
_ON_ITS_WAY_S: Final = 0.5
_LONG_AGO_S: Final = 15.0


@dataclass(frozen=True)
class Placed:
    """The chosen node. `is_waiting` says that its pool has a machine ready."""

    node_id: str
    is_waiting: bool = False


@dataclass(frozen=True)
class _Sent:
    """A sandbox placed on a node, and the monotonic time `at` which."""

    at: float
    template: str
    shape: Shape

    def is_of(self, template: str, shape: Shape) -> bool:
        kind = self.template, self.shape.vcpus, self.shape.memory_mib
        return kind == (template, shape.vcpus, shape.memory_mib)


@dataclass(frozen=True)
class _Ranked:
    """The rank of a node; higher tiers are better."""

    node_id: str
    is_able: bool
    has_room: bool
    has_waiting: bool
    has_golden: bool
    memory_mib: int
    disk_mib: int

    @property
    def tier(self) -> tuple[bool, ...]:
        """What is compared before free capacity, the most important first."""
        return self.is_able, self.has_room, self.has_waiting, self.has_golden


class Placement:
    """Chooses by what nodes report; the node itself decides in the end.

    With several control planes, one of the best is chosen `by_lot`: reports are slightly out of
    date, and all would choose the single best. Recent placements are subtracted from a node's
    capacity.
    """

    def __init__(self, nodes: Nodes, clock: Clock, *, by_lot: bool = False) -> None:
        self._nodes = nodes
        self._clock = clock
        self._by_lot = by_lot
        self._failed: dict[str, float] = {}
        self._sent: dict[str, deque[_Sent]] = {}

    def note_failure(self, node_id: str | None, why: str) -> None:
        """Note that a start failed on a node despite free capacity: for some minutes it is tried
        last."""
        if node_id is not None:
            self._failed[node_id] = self._clock.monotonic()
            log.warning(
                "node %s could not start a machine and is tried last for %g minutes: %s",
                node_id,
                _SUNK_S / 60,
                why,
            )

    def _has_failed(self, node_id: str) -> bool:
        failed_at = self._failed.get(node_id)
        return failed_at is not None and self._clock.monotonic() - failed_at < _SUNK_S

    async def choose(self, template: str, shape: Shape, *, but: str | None = None) -> Placed:
        """Return the node for a new sandbox of a template, other than `but`.

        Raises:
            NoCapacityError: no node has capacity now; the message says what is short.
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
                    placed = Placed(node_id, await node.do(FindRoom(template, shape)))
                except UnavailableError as error:
                    trouble = error
                else:
                    self._note(node_id, template, shape)
                    return placed
        raise trouble or UnavailableError(
            f"cannot place a sandbox of {template}: no node that answers can start one now"
        )

    async def choose_for(self, snapshot: Snapshot, shape: Shape, *, count: int = 1) -> Placed:
        """Return the node for sandboxes from a snapshot: the one that stores it.

        Raises: see `choose`.
        """
        node = self._nodes.get(snapshot.node_id)
        await node.do(FindRoom(snapshot.template, shape, count=count))
        return Placed(node.node_id)

    def _note(self, node_id: str, template: str, shape: Shape) -> None:
        now = self._clock.monotonic()
        sent = self._sent.setdefault(node_id, deque())
        sent.append(_Sent(now, template, shape))
        while sent[0].at < now - _LONG_AGO_S:
            sent.popleft()

    def _since(self, node_id: str, at: float) -> list[_Sent]:
        """Return what was placed on a node after its last report."""
        if not self._by_lot:
            return []  # it is asked, and answers with its current state
        return [one for one in self._sent.get(node_id, ()) if one.at > at - _ON_ITS_WAY_S]

    async def _asked(self, node_id: str) -> tuple[float, NodeView] | None:
        """Return a node's current view, or None if it does not answer."""
        now = self._clock.monotonic()
        try:
            return now, (await self._nodes.report_of(self._nodes.get(node_id))).view()
        except UnavailableError:
            return None

    async def _able(
        self, template: str, shape: Shape, *, but: Collection[str | None], asks_all: bool
    ) -> tuple[list[str], bool]:
        """Return nodes that have a template, best first, and whether all nodes were considered.

        The order is: able to start machines and no recent failed start, free capacity, a waiting
        machine, a golden, then most free memory. A node without a heartbeat while others have one
        may be cut off, and is skipped unless `asks_all`.
        """
        ids = [one for one in self._nodes.ids() if one not in but and self._nodes.takes_new(one)]
        views = {one: self._nodes.last_view(one) for one in ids}
        ranked = self._ranked(views, template, shape)
        unknown = [
            one for one, view in views.items() if view is None or view[1].is_unsure_of(template)
        ]
        has_others = self._by_lot and any(one.has_room and one.is_able for one in ranked)
        leaves_some = bool(unknown) and has_others and not asks_all
        if unknown and not leaves_some:
            async with asyncio.TaskGroup() as tasks:
                asking = {one: tasks.create_task(self._asked(one)) for one in unknown}
            views |= {one: task.result() for one, task in asking.items()}
            ranked = self._ranked(views, template, shape)
        # Equal ones keep their order.
        ranked.sort(key=lambda one: (one.tier, one.memory_mib, one.disk_mib), reverse=True)
        if self._by_lot and ranked:
            best = [one for one in ranked[:_LOT] if one.tier == ranked[0].tier]
            ranked[: len(best)] = random.sample(best, len(best))
        return [one.node_id for one in ranked], not leaves_some

    def _ranked(
        self, views: Mapping[str, tuple[float, NodeView] | None], template: str, shape: Shape
    ) -> list[_Ranked]:
        """Return the rank of each node that has a template."""
        ranked = []
        for node_id, last in views.items():
            if last is None or not last[1].has(template):
                continue
            at, view = last
            sent = self._since(node_id, at)
            memory_mib = view.memory_mib - sum(one.shape.memory_mib for one in sent)
            disk_mib = view.disk_mib - sum(one.shape.disk_mib for one in sent)
            taken = sum(one.is_of(template, shape) for one in sent)
            golden = GoldenFact(template, shape.vcpus, shape.memory_mib)
            ranked.append(
                _Ranked(
                    node_id,
                    is_able=not view.is_unable and not self._has_failed(node_id),
                    has_room=memory_mib >= shape.memory_mib and disk_mib >= shape.disk_mib,
                    has_waiting=_waiting(view, template, shape) > taken,
                    has_golden=golden in view.goldens,
                    memory_mib=memory_mib,
                    disk_mib=disk_mib,
                )
            )
        return ranked


def _waiting(view: NodeView, template: str, shape: Shape) -> int:
    """Return how many machines wait on a node for a template and shape. A disk can only grow."""
    kind = template, shape.vcpus, shape.memory_mib
    return sum(
        one.size
        for one in view.shelves
        if (one.template, one.vcpus, one.memory_mib) == kind and one.disk_mib <= shape.disk_mib
    )
