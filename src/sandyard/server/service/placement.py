"""Which node a sandbox goes to: one that can start it, has room, and has most of it."""

from dataclasses import dataclass

from sandyard.server.core.contracts.node import NodeControl, NodeReport
from sandyard.server.core.errors import UnavailableError
from sandyard.server.core.records import Snapshot
from sandyard.server.core.shapes import Shape
from sandyard.server.service.nodes import Nodes


@dataclass(frozen=True)
class Placed:
    """A node for a sandbox; `is_waiting` says that a machine for it runs there already."""

    node_id: str
    is_waiting: bool = False


class Placement:
    """Chooses among the nodes by what they report; the node itself has the last word."""

    def __init__(self, nodes: Nodes) -> None:
        self._nodes = nodes

    async def choose(self, template: str, shape: Shape, *, but: str | None = None) -> Placed:
        """Return the node for a new sandbox of a template, another than `but`.

        Raises:
            NoCapacityError: no node has room now; the message says what is short.
            UnavailableError: no node that answers can start it.
        """
        trouble: UnavailableError | None = None
        for node in await self._able(template, shape, but=but):
            try:
                return Placed(node.node_id, await node.find_room(template, shape))
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

    async def has_another(self, template: str, shape: Shape, *, but: str) -> bool:
        """Tell whether another node than this could start a sandbox."""
        return bool(await self._able(template, shape, but=but))

    async def _able(self, template: str, shape: Shape, *, but: str | None) -> list[NodeControl]:
        """Return nodes that have a template, best first: a machine waits, then most memory left."""
        found: list[tuple[NodeControl, NodeReport]] = []
        for node in self._nodes.all():
            if node.node_id == but or not self._nodes.takes_new(node.node_id):
                continue
            try:
                report = await self._nodes.lately(node)
            except UnavailableError:
                continue
            if template in report.templates:
                found.append((node, report))
        found.sort(key=lambda one: _rank(one[1], template, shape), reverse=True)
        return [node for node, _ in found]


def _rank(report: NodeReport, template: str, shape: Shape) -> tuple[bool, bool, int, int]:
    waits = any(
        one.size > 0
        and (one.template, one.vcpus, one.memory_mib) == (template, shape.vcpus, shape.memory_mib)
        for one in report.shelves
    )
    fits = report.memory_mib >= shape.memory_mib and report.disk_mib >= shape.disk_mib
    return fits, waits, report.memory_mib, report.disk_mib
