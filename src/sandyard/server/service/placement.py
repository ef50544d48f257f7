"""Which node a sandbox goes to."""

from collections.abc import Mapping

from sandyard.server.core.contracts.node import NodeControl
from sandyard.server.core.errors import NoCapacityError
from sandyard.server.core.records import Sandbox


class Placement:
    """Chooses among the nodes of the installation, and finds the one a sandbox is on."""

    def __init__(self, nodes: Mapping[str, NodeControl]) -> None:
        self._nodes = nodes

    def choose(self, sandbox: Sandbox) -> NodeControl:
        """Return the node for a new sandbox.

        Raises:
            NoCapacityError: there is no node.
        """
        for node in self._nodes.values():
            return node
        raise NoCapacityError(f"cannot place {sandbox.id}: the installation has no node")

    def find(self, node_id: str | None) -> NodeControl | None:
        """Return the node of that id, if it is here."""
        return self._nodes.get(node_id) if node_id else None

    def all(self) -> tuple[NodeControl, ...]:
        """Return every node."""
        return tuple(self._nodes.values())
