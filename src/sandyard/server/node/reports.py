"""The report of a node."""

from sandyard.server.core.contracts.node import NodeReport, TemplateStatus
from sandyard.server.node.capacity import Capacity
from sandyard.server.node.generation import Generation
from sandyard.server.node.machines.means import Means
from sandyard.server.node.owners import Owners
from sandyard.server.node.pressure import Pressure
from sandyard.server.node.readiness import MachineCheck
from sandyard.server.node.snapshots import KeptSnapshots
from sandyard.server.node.stock.goldens import Goldens
from sandyard.server.node.stock.pool import Pool


class Reports:
    """Makes the node's report. What prevents it from starting machines is what `check` and
    `pressure` found."""

    def __init__(
        self,
        node_id: str,
        means: Means,
        owners: Owners,
        snapshots: KeptSnapshots,
        *,
        capacity: Capacity,
        goldens: Goldens,
        pool: Pool,
        check: MachineCheck,
        pressure: Pressure,
    ) -> None:
        self._node_id = node_id
        self._means = means
        self._owners = owners
        self._snapshots = snapshots
        self._capacity = capacity
        self._goldens = goldens
        self._pool = pool
        self._check = check
        self._pressure = pressure
        self._generation = Generation()

    def current(self) -> NodeReport:
        """Return the report as of now."""
        room = self._capacity.room()
        images = self._means.images
        report = NodeReport(
            node_id=self._node_id,
            machines=tuple(
                one.fact() for one in self._owners.all() if one.is_starting or one.phase is not None
            ),
            snapshots=tuple(self._snapshots.ids()),
            templates=tuple(
                one.slug for one in images.facts() if one.status is TemplateStatus.READY
            ),
            versions=tuple(images.versions.names()),
            missing=(*self._check.missing, *self._pressure.missing),
            is_short_of_memory=self._capacity.is_short_of_memory,
            memory_mib=room.memory_mib,
            disk_mib=room.disk_mib,
            shelves=tuple(self._pool.facts()),
            goldens=self._goldens.count,
            golden_kinds=tuple(self._goldens.facts()),
            limited=self._means.exports.limited(),
            unreadable=self._means.records.unreadable,
            enforces_rules=True,
            ends_tls=True,
        )
        return self._generation.of(report)
