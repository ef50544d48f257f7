"""The nodes of the installation: how each is reached, and its last report."""

from collections.abc import Mapping
from dataclasses import replace

from typing_extensions import override

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import (
    NodeControl,
    NodeOperation,
    NodeReport,
    NodeView,
)
from sandyard.server.core.errors import DeadlineExceededError, UnavailableError
from sandyard.server.core.node_ops import Report
from sandyard.server.core.ops import AnswerT
from sandyard.server.core.records import JoinedNode
from sandyard.server.core.shapes import Shape
from sandyard.server.service.roster import Heartbeat, Roster
from sandyard.server.tasks import attended

_CHECK_S = 15.0
_FRESH_S = 10.0
_SAVED_BESIDE_MIB = 64


def believed_bytes(reported: int, shape: Shape) -> int:
    """Return the size of saved data as reported by a node, bounded by what the machine can have. A
    user pays for it, and the node may be compromised."""
    most = (shape.memory_mib + shape.disk_mib + _SAVED_BESIDE_MIB) * 2**20
    return min(max(reported, 0), most)


class PatientNode(NodeControl):
    """A node whose operations have limits. See core.contracts.node.NodeControl.

    An operation with a limit has to be answered within it. Others, such as a start or a save, are
    waited for as long as the node, polled in parallel, still reports.
    """

    def __init__(self, node: NodeControl, clock: Clock) -> None:
        self._node = node
        self._clock = clock

    @property
    @override
    def node_id(self) -> str:
        return self._node.node_id

    @override
    async def do(self, operation: NodeOperation[AnswerT]) -> AnswerT:
        asked = self._node.do(operation)
        if operation.limit_s is None:
            return await attended(asked, self._reports, every_s=_CHECK_S, clock=self._clock)
        try:
            async with self._clock.timeout(operation.limit_s):
                return await asked
        except TimeoutError as error:
            raise DeadlineExceededError(f"the node {self.node_id} does not answer") from error

    async def _reports(self) -> None:
        await self.do(Report())


class Nodes:
    """The nodes. Their last reports are hints for where to ask first; the answer decides.

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
        self._views: dict[str, tuple[float, NodeView]] = {}
        self._reported: dict[str, NodeView] = {}

    def all(self) -> tuple[NodeControl, ...]:
        """Return every node."""
        return tuple(PatientNode(node, self._clock) for node in self._controls.values())

    def ids(self) -> tuple[str, ...]:
        """Return the ids of all nodes."""
        return tuple(self._controls)

    @property
    def are_remote(self) -> bool:
        """Whether the nodes are on other hosts."""
        return self._roster is not None

    def joined(self, node_id: str) -> JoinedNode | None:
        """Return what is known of a node on another host."""
        return None if self._roster is None else self._roster.nodes.get(node_id)

    def takes_new(self, node_id: str) -> bool:
        """Tell whether new sandboxes may be placed on a node."""
        return self._roster is None or self._roster.takes_new(node_id)

    def is_there(self, node_id: str) -> bool:
        """Tell whether a node is expected to answer."""
        return self._roster is None or self._roster.is_there(node_id)

    def is_lost(self, node_id: str | None) -> bool:
        """Tell whether a node was given up and has not returned."""
        return self._roster is not None and self._roster.is_lost(node_id or "")

    def is_silent(self, node_id: str | None) -> bool:
        """Tell whether a node on another host has not been heard lately."""
        return self._roster is not None and self._roster.last_heartbeat(node_id or "") is None

    async def is_still_lost(self, node_id: str | None) -> bool:
        """Tell the same, as the store has it now.

        Raises:
            UnavailableError: the store does not answer.
        """
        return self._roster is not None and await self._roster.is_still_lost(node_id or "")

    def get(self, node_id: str | None) -> NodeControl:
        """Return the node with an id.

        Raises:
            UnavailableError: the installation has no such node.
        """
        node = self._controls.get(node_id or "")
        if node is None:
            raise UnavailableError(f"cannot reach the node {node_id}: it is not known here")
        return PatientNode(node, self._clock)

    def has(self, node_id: str | None) -> bool:
        """Tell whether a node exists."""
        return node_id in self._controls

    async def report_of(self, node: NodeControl) -> NodeReport:
        """Return a node's report.

        Raises:
            UnavailableError: it does not answer in time.
        """
        try:
            report = await node.do(Report())
        except UnavailableError:
            self._views.pop(node.node_id, None)
            raise
        view = self._reported[node.node_id] = report.view()
        self._views[node.node_id] = (self._clock.monotonic(), view)
        return report

    def last_heartbeat(self, node_id: str) -> Heartbeat | None:
        """Return a node's last heartbeat if it is recent, else None."""
        return None if self._roster is None else self._roster.last_heartbeat(node_id)

    def last_view(self, node_id: str) -> tuple[float, NodeView] | None:
        """Return a node's last heartbeat and its monotonic time, or None if it is too old."""
        view, heartbeat = self._views.get(node_id), self.last_heartbeat(node_id)
        if heartbeat is not None and (view is None or view[0] < heartbeat.at):
            return heartbeat.at, self._completed(node_id, heartbeat.view)
        if view is not None and self._clock.monotonic() - view[0] < _FRESH_S:
            return view
        return None

    def _completed(self, node_id: str, view: NodeView) -> NodeView:
        """Return a view with all versions, if the last report had the same."""
        known = self._reported.get(node_id)
        if not view.mark or known is None or known.versions_mark != view.mark:
            return view
        return replace(view, versions=known.versions, mark="")
