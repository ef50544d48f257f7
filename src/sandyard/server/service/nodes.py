"""The nodes of the installation: how each is reached, and what it said last."""

import asyncio
from collections.abc import Coroutine, Mapping
from typing import TypeVar

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import (
    MachineFact,
    MachineWish,
    NodeControl,
    NodeReport,
    NodeView,
    SnapshotFact,
    TemplateFact,
)
from sandyard.server.core.errors import DeadlineExceededError, SandyardError, UnavailableError
from sandyard.server.core.shapes import Shape
from sandyard.server.service.roster import Roster, Told
from sandyard.server.tasks import beside

REPORT_LIMIT_S = 5.0
_SHORT_S = 30.0
_CHECK_S = 15.0
_FRESH_S = 10.0
_SAVED_BESIDE_MIB = 64
_T = TypeVar("_T")


def believed_bytes(told: int, shape: Shape) -> int:
    """Return how large a saved machine is by what its node says, who may be anybody's by now:
    somebody pays for it, and it is no larger than all that the machine has."""
    most = (shape.memory_mib + shape.disk_mib + _SAVED_BESIDE_MIB) * 2**20
    return min(max(told, 0), most)


class PatientNode:
    """A node that nobody waits for longer than it lives; see core.contracts.node.NodeControl.

    What only has to be looked up has a limit. What may take long (a start, a save) is waited for as
    long as the node, asked beside, still reports.

    Raises, by any of its methods: UnavailableError if the node does not answer any more.
    """

    def __init__(self, node: NodeControl, clock: Clock) -> None:
        self._node = node
        self._clock = clock

    @property
    def node_id(self) -> str:
        """See NodeControl.node_id."""
        return self._node.node_id

    async def ensure_running(self, wish: MachineWish) -> MachineFact:
        """See NodeControl.ensure_running."""
        return await self._while_it_reports(self._node.ensure_running(wish))

    async def ensure_paused(self, sandbox_id: str, *, incarnation: int, version: int = 0) -> int:
        """See NodeControl.ensure_paused."""
        return await self._while_it_reports(
            self._node.ensure_paused(sandbox_id, incarnation=incarnation, version=version)
        )

    async def ensure_gone(self, sandbox_id: str, *, incarnation: int, version: int = 0) -> None:
        """See NodeControl.ensure_gone."""
        await self._while_it_reports(
            self._node.ensure_gone(sandbox_id, incarnation=incarnation, version=version)
        )

    async def ensure_snapshot(
        self, snapshot_id: str, *, sandbox_id: str, incarnation: int, version: int = 0
    ) -> SnapshotFact:
        """See NodeControl.ensure_snapshot."""
        return await self._while_it_reports(
            self._node.ensure_snapshot(
                snapshot_id, sandbox_id=sandbox_id, incarnation=incarnation, version=version
            )
        )

    async def drop_snapshot(self, snapshot_id: str) -> None:
        """See NodeControl.drop_snapshot."""
        await self._soon(self._node.drop_snapshot(snapshot_id), _SHORT_S)

    async def find_room(self, template: str, shape: Shape, *, count: int = 1) -> bool:
        """See NodeControl.find_room."""
        return await self._soon(self._node.find_room(template, shape, count=count), _SHORT_S)

    async def console(self, sandbox_id: str) -> bytes:
        """See NodeControl.console."""
        return await self._soon(self._node.console(sandbox_id), _SHORT_S)

    async def report(self) -> NodeReport:
        """See NodeControl.report."""
        return await self._soon(self._node.report(), REPORT_LIMIT_S)

    async def templates(self) -> tuple[TemplateFact, ...]:
        """See NodeControl.templates."""
        return await self._soon(self._node.templates(), REPORT_LIMIT_S)

    async def _soon(self, asked: Coroutine[object, object, _T], limit_s: float) -> _T:
        try:
            async with self._clock.timeout(limit_s):
                return await asked
        except TimeoutError as error:
            raise DeadlineExceededError(f"the node {self.node_id} does not answer") from error

    async def _while_it_reports(self, asked: Coroutine[object, object, _T]) -> _T:
        async with beside(_tried(asked)) as task:
            while not task.done():
                try:
                    async with self._clock.timeout(_CHECK_S):
                        await asyncio.wait([task])
                except TimeoutError:
                    await self.report()
            done = task.result()
        if isinstance(done, SandyardError):
            raise done
        return done


async def _tried(asked: Coroutine[object, object, _T]) -> _T | SandyardError:
    """Do what is asked, and return its error instead of raising that in a task of its own."""
    try:
        return await asked
    except SandyardError as error:
        return error


class Nodes:
    """See the module. What was said is a hint for where to ask first; asking decides.

    `controls` may change while they are used; where nodes come and go, `roster` knows of it.
    """

    def __init__(
        self,
        controls: Mapping[str, NodeControl],
        clock: Clock,
        roster: Roster | None = None,
    ) -> None:
        self._controls = controls
        self._roster = roster
        self._clock = clock
        self._said: dict[str, tuple[float, NodeView]] = {}

    def all(self) -> tuple[NodeControl, ...]:
        """Return every node."""
        return tuple(PatientNode(node, self._clock) for node in self._controls.values())

    def ids(self) -> tuple[str, ...]:
        """Return the ids of all nodes."""
        return tuple(self._controls)

    @property
    def are_remote(self) -> bool:
        """Whether they are on other hosts."""
        return self._roster is not None

    def takes_new(self, node_id: str) -> bool:
        """Tell whether new sandboxes may come to a node."""
        return self._roster is None or self._roster.takes_new(node_id)

    def is_there(self, node_id: str) -> bool:
        """Tell whether a node may be expected to answer."""
        return self._roster is None or self._roster.is_there(node_id)

    def is_lost(self, node_id: str | None) -> bool:
        """Tell whether a node was given up, and has not come back."""
        return self._roster is not None and self._roster.is_lost(node_id or "")

    async def is_still_lost(self, node_id: str | None) -> bool:
        """Tell the same as of now, where it matters to whoever has asked.

        Raises:
            UnavailableError: the store does not answer.
        """
        return self._roster is not None and await self._roster.is_still_lost(node_id or "")

    def get(self, node_id: str | None) -> NodeControl:
        """Return the node of that id.

        Raises:
            UnavailableError: this installation has none such.
        """
        node = self._controls.get(node_id or "")
        if node is None:
            raise UnavailableError(f"cannot reach the node {node_id}: it is not known here")
        return PatientNode(node, self._clock)

    def has(self, node_id: str | None) -> bool:
        """Tell whether there is such a node."""
        return node_id in self._controls

    async def report_of(self, node: NodeControl) -> NodeReport:
        """Ask a node what it holds.

        Raises:
            UnavailableError: it does not answer in time.
        """
        try:
            report = await node.report()
        except UnavailableError:
            self._said.pop(node.node_id, None)
            raise
        self._said[node.node_id] = (self._clock.monotonic(), report.view())
        return report

    def told(self, node_id: str) -> Told | None:
        """Return what a node said of itself, unasked, a moment ago; None if it said nothing."""
        return None if self._roster is None else self._roster.told(node_id)

    def lately(self, node_id: str) -> tuple[float, NodeView] | None:
        """Return what a node said a moment ago, and when by this process's clock; None where that
        is too long ago."""
        said, told = self._said.get(node_id), self.told(node_id)
        if told is not None and (said is None or said[0] < told.at):
            return told.at, told.view
        if said is not None and self._clock.monotonic() - said[0] < _FRESH_S:
            return said
        return None
