"""Opens a node: the machines of one host."""

import logging
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from sandyard.server.app.installation import kind_of_host, secret_key
from sandyard.server.app.settings import Settings
from sandyard.server.app.wiring import check_home, choice_of, drivers_of, identity_of, images_of
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.volumes import Volumes
from sandyard.server.core.errors import InternalError
from sandyard.server.drivers.contract import Driver
from sandyard.server.links.volumes import FolderVolumes, ImageVolumes
from sandyard.server.node.exports.exports import NfsExports
from sandyard.server.node.exports.shares import Exports
from sandyard.server.node.host.admission import Margins
from sandyard.server.node.host.disks import Disks, Ext4Disks
from sandyard.server.node.host.mounts import make_mounts
from sandyard.server.node.host.network import Network, Slots, check_accounts
from sandyard.server.node.machines.means import Means, NodeLimits
from sandyard.server.node.machines.records import Records
from sandyard.server.node.machines.saved import Seals
from sandyard.server.node.node import Node
from sandyard.server.node.stock.pool import MachineObserver, PoolLimits
from sandyard.server.tasks import Crew

log = logging.getLogger(__name__)

NODE_ID = "local"
"""The node of an installation on one machine."""


def limits_of(settings: Settings) -> NodeLimits:
    """Return a node's time limits, and how much it starts concurrently."""
    own = settings.node
    limits = {
        "boot_s": own.boot_s,
        "no_progress_s": own.no_progress_s,
        "heartbeat_s": own.heartbeat_s,
    }
    if own.driver == "fake":
        limits["golden_rest_s"] = 0.0
    return NodeLimits(
        boots_at_once=own.boots_at_once,
        restores_at_once=own.restores_at_once,
        uses_goldens=own.golden_machines,
        odd_goldens_mib=own.odd_goldens_mib,
        attribute_cache_s=settings.workspaces.attribute_cache_s,
        **limits,
    )


def margins_of(settings: Settings) -> Margins:
    """Return the resources that are kept free on the host."""
    own = settings.node
    return Margins(
        memory_floor_mib=own.memory_floor_mib,
        disk_floor_mib=own.disk_floor_mib,
        memory_overcommit=own.memory_overcommit,
        disk_overcommit=own.disk_overcommit,
        disk_reserve_mib=own.disk_reserve_mib,
    )


@asynccontextmanager
async def open_node(
    settings: Settings,
    *,
    clock: Clock,
    observer: MachineObserver,
    on_change: Callable[[], None],
    volumes: Volumes | None = None,
    node_id: str = NODE_ID,
    drivers: Sequence[Driver] | None = None,
    fills_pool: bool = True,
) -> AsyncIterator[Node]:
    """Open the node of a home, and adopt running machines; they keep running after the block.

    `drivers` replaces those that the settings allow. `volumes` are the workspaces that machines may
    mount; without it they mount nothing.
    """
    images = images_of(settings)
    network: Network
    disks: Disks
    exports: Exports
    if settings.node.driver == "fake":
        from sandyard.server.fakes.node import FakeDisks, FakeExports, FakeNetwork, make_fake_image

        network, disks, exports = FakeNetwork(), FakeDisks(), FakeExports(volumes)
        for slug in images.definitions:
            images.use(slug, make_fake_image(images))
    else:
        await check_home(settings)
        allow = [str(one) for one in settings.node.allow]
        identity = await identity_of(settings)
        await check_accounts(identity)
        network = Slots(
            identity,
            home=settings.home,
            allow=allow,
            resolvers=[str(one) for one in settings.node.dns],
            extra_ca=settings.node.extra_ca,
        )
        disks = Ext4Disks()
        exports = NfsExports(
            settings.home,
            network=network,
            volumes=volumes or FolderVolumes(settings.workspaces_dir),
            clock=clock,
            can_share=isinstance(volumes, ImageVolumes),
        )
        try:
            await make_mounts(settings.home, settings.workspaces_dir)
        except InternalError as error:
            log.warning(
                "cannot give hypervisors a mount namespace of their own: %s; continuing without it",
                error.message,
            )
    choice = choice_of(settings, drivers or drivers_of(settings), monotonic=clock.monotonic)
    key = secret_key(settings.home)
    node = Node(
        node_id=node_id,
        home=settings.home,
        means=Means(
            images=images,
            drivers=choice,
            network=network,
            exports=exports,
            disks=disks,
            records=Records(settings.home / "machines"),
            seals=Seals(key=key, host=kind_of_host(), drivers=choice),
            clock=clock,
            limits=limits_of(settings),
            crew=Crew(),
            on_change=on_change,
        ),
        pool_limits=PoolLimits(
            floor=settings.pool.floor,
            ceiling=settings.pool.ceiling,
            demand_window_s=settings.pool.demand_window_s,
            versions=settings.pool.versions,
        ),
        margins=margins_of(settings),
        observer=observer,
    )
    async with node.running(fills_pool=fills_pool):
        yield node
