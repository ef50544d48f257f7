"""What a node's machines are made with; the same for all of them."""

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
    """How long a node waits, and how much it starts at once.

    `odd_goldens_mib` is what golden machines of unusual shapes may take together on disk. `boot_s`
    bounds a boot, `no_progress_s` the silence of its console; `golden_rest_s` is how long
    a machine is left alone before it is saved as a golden one. `attribute_cache_s` is how long a
    guest caches attributes of files in its mounts. What is waited for in a guest
    is given more on a slow host: see `Means.patience`.
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
    """See the module. `on_change` is told that a report would say something else now."""

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
        """Return how long to wait here for what takes a guest less than `seconds` elsewhere."""
        return seconds * self.drivers.pace
