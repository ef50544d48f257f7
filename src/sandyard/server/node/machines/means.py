"""What all machines of a node share: images, drivers, network, limits and other tools."""

from collections.abc import Callable
from dataclasses import dataclass

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.node.exports.shares import Exports
from sandyard.server.node.host.choice import Drivers
from sandyard.server.node.host.disks import Disks
from sandyard.server.node.host.network import Network
from sandyard.server.node.images.images import Images
from sandyard.server.node.machines.records import Records
from sandyard.server.node.machines.saved import Seals
from sandyard.server.tasks import Crew


@dataclass(frozen=True)
class NodeLimits:
    """The time limits of a node, and how much it starts at once.

    `odd_goldens_mib` limits the disk space of golden machines with unusual shapes. `boot_s` limits
    a boot, `no_progress_s` the silence of its console. `golden_rest_s` is how long a machine is
    left idle before it is saved as a golden machine. `attribute_cache_s` is how long a guest caches
    attributes of files in its mounts. Waits for a guest are longer on a slow host: see
    `Means.patience`.
    """

    boot_s: float
    no_progress_s: float
    boots_at_once: int
    restores_at_once: int
    heartbeat_s: float
    uses_goldens: bool
    odd_goldens_mib: int = 2048
    golden_rest_s: float = 4.0
    attribute_cache_s: int = 0
    agent_s: float = 15.0
    watch_period_s: float = 2.0
    poll_s: float = 0.05


@dataclass(frozen=True)
class Means:
    """The tools. `on_change` is called when a report would differ from the one before."""

    images: Images
    drivers: Drivers
    network: Network
    exports: Exports
    disks: Disks
    records: Records
    seals: Seals
    clock: Clock
    limits: NodeLimits
    crew: Crew
    on_change: Callable[[], None]

    def patience(self, seconds: float) -> float:
        """Return how long to wait, on this host, for what takes a guest less than `seconds`
        elsewhere."""
        return seconds * self.drivers.pace
