"""The nodes of the installation: how each is reached, and what it said last."""

from collections.abc import Mapping

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import NodeControl, NodeReport
from sandyard.server.core.errors import DeadlineExceededError, UnavailableError

REPORT_LIMIT_S = 5.0
_FRESH_S = 10.0


class Nodes:
    """See the module. What was said is a hint for where to ask first; asking decides."""

    def __init__(self, controls: Mapping[str, NodeControl], clock: Clock) -> None:
        self._controls = dict(controls)
        self._clock = clock
        self._said: dict[str, tuple[float, NodeReport]] = {}

    def all(self) -> tuple[NodeControl, ...]:
        """Return every node."""
        return tuple(self._controls.values())

    def get(self, node_id: str | None) -> NodeControl:
        """Return the node of that id.

        Raises:
            UnavailableError: this installation has none such.
        """
        node = self._controls.get(node_id or "")
        if node is None:
            raise UnavailableError(f"cannot reach the node {node_id}: it is not known here")
        return node

    def has(self, node_id: str | None) -> bool:
        """Tell whether there is such a node."""
        return node_id in self._controls

    async def report_of(self, node: NodeControl) -> NodeReport:
        """Ask a node what it holds.

        Raises:
            UnavailableError: it does not answer in time.
        """
        try:
            async with self._clock.timeout(REPORT_LIMIT_S):
                report = await node.report()
        except TimeoutError as error:
            self._said.pop(node.node_id, None)
            raise DeadlineExceededError(f"the node {node.node_id} does not answer") from error
        except UnavailableError:
            self._said.pop(node.node_id, None)
            raise
        self._said[node.node_id] = (self._clock.monotonic(), report)
        return report

    async def lately(self, node: NodeControl) -> NodeReport:
        """Return what a node said a moment ago, asking it where that is too long ago.

        Raises: see `report_of`.
        """
        said = self._said.get(node.node_id)
        if said is not None and self._clock.monotonic() - said[0] < _FRESH_S:
            return said[1]
        return await self.report_of(node)
