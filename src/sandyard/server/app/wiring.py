"""Builds the house for one process: what stands behind each seam is decided here."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as package_version

from fastapi import FastAPI

from sandyard.server.api import Services, make_api
from sandyard.server.app.installation import secret_key
from sandyard.server.app.logs import request_id
from sandyard.server.app.metrics import Metrics, MetricsRoute
from sandyard.server.app.settings import Settings
from sandyard.server.core.contracts import Store
from sandyard.server.drivers.contract import Driver
from sandyard.server.drivers.fake import FakeDriver, FakeHost
from sandyard.server.drivers.qemu import QemuDriver
from sandyard.server.links.local import LocalBus, SystemClock
from sandyard.server.links.passwords import hash_password
from sandyard.server.links.sql import open_store
from sandyard.server.node.build import Builder
from sandyard.server.node.choice import Drivers
from sandyard.server.node.definitions import load_definitions
from sandyard.server.node.disks import Disks, Ext4Disks
from sandyard.server.node.fake import FakeDisks, FakeNetwork, make_fake_image
from sandyard.server.node.identity import Identity, take_identity
from sandyard.server.node.images import Images
from sandyard.server.node.network import Network, Slots, host_routes
from sandyard.server.node.node import Node, NodeLimits
from sandyard.server.node.residents import Residents
from sandyard.server.service.access import Access
from sandyard.server.service.bootstrap import ensure_first_organization
from sandyard.server.service.lifecycle import WORK, Lifecycle
from sandyard.server.service.placement import Placement
from sandyard.server.service.readiness import Readiness
from sandyard.server.service.reconcile import NODES, WORKABLE, Pace, Reconciler
from sandyard.server.service.sandboxes import Sandboxes, Waits
from sandyard.server.service.templates import Templates


@dataclass(frozen=True)
class House:
    """A running installation without its HTTP server."""

    api: FastAPI
    store: Store
    node: Node
    reconciler: Reconciler
    lifecycle: Lifecycle


def images_of(settings: Settings) -> Images:
    """Return the templates and images of an installation."""
    return Images(
        definitions=load_definitions(settings.templates_dir),
        images_dir=settings.images_dir,
        templates_dir=settings.home / "templates",
    )


def builder_of(settings: Settings) -> Builder:
    """Return the builder of an installation's templates."""
    return Builder(
        images_of(settings), cache_dir=settings.cache_dir, logs_dir=settings.home / "builds"
    )


async def identity_of(settings: Settings) -> Identity:
    """Return the installation's place on its host."""
    return take_identity(settings.home, routes=await host_routes(), subnet=settings.node.subnet)


def drivers_of(settings: Settings) -> list[Driver]:
    """Return the drivers that the settings allow, best first."""
    if settings.node.driver == "fake":
        return [FakeDriver(FakeHost())]
    every = _every_driver(settings)
    return [one for one in every if settings.node.driver in ("auto", one.name)]


def _every_driver(settings: Settings) -> list[Driver]:
    return [
        QemuDriver(
            accel=accel, binary=settings.node.qemu_binary, tb_size_mib=settings.node.tb_size_mib
        )
        for accel in ("kvm", "tcg")
    ]


def choice_of(settings: Settings, drivers: Sequence[Driver]) -> Drivers:
    """Return the choice among drivers, with this installation's memory of verdicts."""
    return Drivers(
        drivers,
        cache=settings.home / "cache" / "verdicts.json",
        known=_every_driver(settings),
    )


async def _void_leases(store: Store, clock: SystemClock) -> None:
    """Let every lease run out now: one server at a time uses a home, so they are a dead one's."""
    far, now = datetime.max.replace(tzinfo=UTC), clock.now()
    async with store.write() as tx:
        await tx.sandboxes.claim(WORKABLE, lease="void", now=far, until=now, limit=1_000_000)


@asynccontextmanager
async def open_house(
    settings: Settings, *, drivers: Sequence[Driver] | None = None
) -> AsyncIterator[House]:
    """Open store and node, adopt what lives, and give everything back on leaving.

    `drivers` takes the place of those that the settings allow. Machines live on: leaving lets go
    of them without ending them.
    """
    clock, bus = SystemClock(), LocalBus()
    images = images_of(settings)
    network: Network
    disks: Disks
    if settings.node.driver == "fake":
        network, disks = FakeNetwork(), FakeDisks()
        for slug in images.definitions:
            images.use(slug, make_fake_image(images))
    else:
        network = Slots(
            await identity_of(settings), allow=[str(one) for one in settings.node.allow]
        )
        disks = Ext4Disks()

    def on_change() -> None:
        bus.hint(NODES)
        bus.hint(WORK)

    node = Node(
        node_id="local",
        images=images,
        drivers=choice_of(settings, drivers or drivers_of(settings)),
        network=network,
        disks=disks,
        residents=Residents(settings.home / "machines"),
        clock=clock,
        limits=NodeLimits(
            boot_s=settings.node.boot_s,
            no_progress_s=settings.node.no_progress_s,
            boots_at_once=settings.node.boots_at_once,
            memory_floor_mib=settings.node.memory_floor_mib,
            disk_floor_mib=settings.node.disk_floor_mib,
        ),
        on_change=on_change,
    )
    async with open_store(settings.store_url, key=secret_key(settings.home)) as store:
        await ensure_first_organization(store, clock)
        await _void_leases(store, clock)
        async with node.running():
            placement = Placement({node.node_id: node})
            lifecycle = Lifecycle(store, bus, clock)
            sandboxes = Sandboxes(
                store=store,
                placement=placement,
                tunnel=node,
                lifecycle=lifecycle,
                bus=bus,
                clock=clock,
                hash_password=hash_password,
                waits=Waits(),
            )
            services = Services(
                access=Access(store, clock),
                sandboxes=sandboxes,
                templates=Templates(placement),
                readiness=Readiness(store, placement),
            )
            version = package_version("sandyard")
            metrics = Metrics(version=version)
            api = make_api(services, version=version, observe=metrics.observe, bind=request_id.set)
            api.add_route(
                "/metrics",
                MetricsRoute(metrics, node, settings.http.metrics_token).answer,
                include_in_schema=False,
            )
            reconciler = Reconciler(
                store=store,
                placement=placement,
                lifecycle=lifecycle,
                bus=bus,
                clock=clock,
                pace=Pace(),
            )
            yield House(api, store, node, reconciler, lifecycle)
