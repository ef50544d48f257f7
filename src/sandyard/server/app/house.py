"""Opens an installation on one machine: a control plane and its node in one process."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version as package_version

from fastapi import FastAPI

from sandyard.server.app.clocks import agree_at_first, agreeing, read_host
from sandyard.server.app.control import Control, open_control
from sandyard.server.app.database import is_sqlite, open_database
from sandyard.server.app.faces import MakeFace
from sandyard.server.app.installation import server_id_of
from sandyard.server.app.metrics import metrics_of
from sandyard.server.app.node import NODE_ID, open_node
from sandyard.server.app.settings import Settings
from sandyard.server.app.wiring import open_volumes, sign_up_of
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Store
from sandyard.server.drivers.contract import Driver
from sandyard.server.front.dispatch import Dispatch
from sandyard.server.links.local import AgreedClock, LocalBus
from sandyard.server.node.node import Node
from sandyard.server.service.money.metering import Meter
from sandyard.server.service.people.bootstrap import ensure_first_organization
from sandyard.server.service.reconcile.reconciler import Reconciler, topic_of_node
from sandyard.server.service.sandboxes.lifecycle import Lifecycle


@dataclass(frozen=True)
class House:
    """A running installation without its HTTP server."""

    control: Control
    node: Node

    @property
    def api(self) -> FastAPI:
        """The RunTools API alone."""
        return self.control.api

    @property
    def front(self) -> Dispatch:
        """The application of the HTTP listener: all faces."""
        return self.control.front

    @property
    def store(self) -> Store:
        """The store."""
        return self.control.store

    @property
    def reconciler(self) -> Reconciler:
        """The reconciler; it is to be run."""
        return self.control.reconciler

    @property
    def lifecycle(self) -> Lifecycle:
        """The service that changes a sandbox's status."""
        return self.control.lifecycle

    @property
    def meter(self) -> Meter:
        """The service that charges for usage; it is to be run."""
        return self.control.meter


@asynccontextmanager
async def open_house(
    settings: Settings,
    *,
    drivers: Sequence[Driver] | None = None,
    clock: Clock | None = None,
    fills_pool: bool = True,
    faces: Sequence[MakeFace] = (),
) -> AsyncIterator[House]:
    """Open store and node, adopt running machines, and release everything when the block ends.

    A SQLite database of an older version is copied and migrated; see `links.sql.open_store`.

    `drivers` replaces those that the settings allow, `clock` the host's. `faces` are served in
    addition to the standard ones. Machines keep running after the block.
    """
    agreed = AgreedClock()
    clock = clock or agreed
    await agree_at_first(agreed, read_host)
    bus, version = LocalBus(clock), package_version("sandyard")
    metrics = metrics_of(settings)
    async with open_database(settings, clock=clock, migrates=is_sqlite(settings)) as store:
        await ensure_first_organization(store, clock, sign_up_of(settings))
        async with (
            agreeing(agreed, store, read_host),
            open_volumes(settings, clock) as volumes,
            open_node(
                settings,
                volumes=volumes,
                clock=clock,
                observer=metrics,
                on_change=lambda: bus.hint(topic_of_node(NODE_ID)),
                drivers=drivers,
                fills_pool=fills_pool,
            ) as node,
            open_control(
                settings,
                server_id=server_id_of(settings.home),
                store=store,
                nodes={node.node_id: node},
                tunnel=node,
                volumes=volumes,
                bus=bus,
                clock=clock,
                metrics=metrics,
                version=version,
                faces=faces,
            ) as control,
        ):
            yield House(control, node)
