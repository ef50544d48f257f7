"""Two control planes and three nodes on one PostgreSQL, in this process, seen as one yard.

One of the nodes never answers, one of the servers is killed after a few requests, and nothing
passes between them but by NATS, the tunnel and the database.
"""

import asyncio
import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from sandyard.server.app.control import Control, open_control
from sandyard.server.app.installation import secret_key
from sandyard.server.app.metrics import Metrics
from sandyard.server.app.node import open_node
from sandyard.server.app.wiring import open_volumes, sign_up_of
from sandyard.server.core.contracts.node import NodeControl, NodeOperation
from sandyard.server.core.contracts.store import Store
from sandyard.server.core.errors import UnavailableError, UnsupportedError
from sandyard.server.core.node_ops import EnsureGone, Report, WithdrawWorkspace
from sandyard.server.fakes.driver import Conduct, FakeDriver, FakeHost
from sandyard.server.front.dispatch import Dispatch
from sandyard.server.links.identities import control_name, node_name
from sandyard.server.links.local import SystemClock
from sandyard.server.links.nats.bus import hinting
from sandyard.server.links.nats.client import Inbox, RemoteNode
from sandyard.server.links.nats.link import Link, linked
from sandyard.server.links.nats.server import answering
from sandyard.server.links.sql import open_store
from sandyard.server.links.tunnel.client import NodeAddress, Tunnels
from sandyard.server.links.tunnel.server import serving
from sandyard.server.node.node import Node
from sandyard.server.service.people.bootstrap import ensure_first_organization
from sandyard.server.service.reconcile.compare import SilenceLimits
from sandyard.server.service.reconcile.reconciler import Pace
from tests.support.house import Yard, assert_added_up, settings_of
from tests.support.nats import nats_server
from tests.support.papers import Desk
from tests.support.postgres import postgres_url

PACE = Pace(
    period_s=0.2,
    lease_s=1.0,
    retry_s=0.2,
    retry_max_s=0.4,
    patience=SilenceLimits(node_silent_s=1.0),
)
NODE_IDS = ("one", "two", "three")
SILENT = "three"
_LIVES = 4  # requests that the second server answers before it is killed


class SilentNode:
    """A node that is known and never answers."""

    def __init__(self, node_id: str) -> None:
        self.node_id = node_id

    async def do(self, operation: NodeOperation[Any]) -> Any:
        """Raise, as for a node that cannot be reached; but a workspace it never had is withdrawn.

        The removal of a workspace waits for every node, and here this one would never come back.
        """
        if not isinstance(operation, WithdrawWorkspace):
            raise UnavailableError(f"the node {self.node_id} does not answer")


@dataclass
class SeveralHouse:
    """What a yard looks at of a house, where there are several."""

    controls: list[Control]
    store: Store
    nodes: list[NodeControl]

    @property
    def front(self) -> Dispatch:
        """The faces of the first."""
        return self.controls[0].front

    @property
    def api(self) -> FastAPI:
        """One of the applications."""
        return self.controls[0].api

    @property
    def node(self) -> "SeveralHouse":
        """All nodes as one."""
        return self

    async def do(self, operation: NodeOperation[Any]) -> Any:
        """Return what they hold together, or remove a machine wherever it is."""
        match operation:
            case Report():
                reports = [await one.do(operation) for one in self.nodes]
                return replace(
                    reports[0],
                    machines=tuple(fact for one in reports for fact in one.machines),
                    snapshots=tuple(name for one in reports for name in one.snapshots),
                    shelves=tuple(shelf for one in reports for shelf in one.shelves),
                )
            case EnsureGone():
                for one in self.nodes:
                    await one.do(operation)
                return None
            case _:
                raise UnsupportedError(f"{operation.op} concerns one node")


class _InTurn(httpx.AsyncBaseTransport):
    """Sends requests to the servers in turn; the second is killed after a few."""

    def __init__(self, controls: list[Control], tasks: "list[asyncio.Task[None]]") -> None:
        self._transports = [
            httpx.ASGITransport(one.front, raise_app_exceptions=False) for one in controls
        ]
        self._tasks = tasks
        self._count = 0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self._count += 1
        if self._count > 2 * _LIVES:
            # As a crash would: what it was at work on is dropped where it is.
            self._tasks[1].cancel()
            return await self._transports[0].handle_async_request(request)
        return await self._transports[self._count % 2].handle_async_request(request)


@asynccontextmanager
async def open_several(**options: Any) -> AsyncIterator[Yard]:
    """Open all of it in a home that is short enough for sockets; see the module."""
    host, conduct, clock = FakeHost(), Conduct(), SystemClock()
    async with AsyncExitStack() as held:
        home = Path(
            held.enter_context(tempfile.TemporaryDirectory(prefix=f"sy-{os.getpid()}-", dir="/tmp"))
        )
        secret_key(home)
        url = await held.enter_async_context(postgres_url())
        nats = held.enter_context(nats_server(home / "nats"))
        desk, metrics = Desk.new(home / "papers"), Metrics(version="0")
        nodes, links, places = dict[str, Node](), list[Link](), dict[str, NodeAddress]()
        for node_id in NODE_IDS:
            if node_id == SILENT:
                continue
            own = home / node_id
            (own).mkdir()
            (own / "secret.key").write_bytes((home / "secret.key").read_bytes())
            node = await held.enter_async_context(
                open_node(
                    settings_of(own, **options),
                    clock=clock,
                    observer=metrics,
                    on_change=lambda: None,
                    node_id=node_id,
                    drivers=[FakeDriver(host, conduct)],
                )
            )
            nodes[node_id] = node
            links.append(nats.node_link(node_id))
            await held.enter_async_context(answering(node, links[-1]))
            name = node_name("test", node_id)
            port = await held.enter_async_context(
                serving(
                    node, address="127.0.0.1", port=0, tls=desk.tls(name, is_server=True),
                    may=lambda who: who.startswith(control_name("test", "")),
                )
            )  # fmt: skip
            places[node_id] = NodeAddress("127.0.0.1", port, name)
        tasks = await held.enter_async_context(asyncio.TaskGroup())
        controls, running = [], []
        settings = settings_of(home, **options)
        volumes = await held.enter_async_context(open_volumes(settings, clock))
        for server_id in ("a", "b"):
            store = await held.enter_async_context(open_store(url, key=secret_key(home)))
            await ensure_first_organization(store, clock, sign_up_of(settings))
            links.append(nats.control_link(server_id))
            inbox = Inbox(links[-1], server_id)
            remote = {one: RemoteNode(links[-1], inbox, one) for one in nodes}
            bus = await held.enter_async_context(hinting(links[-1], clock))
            tls = desk.tls(control_name("test", server_id), is_server=False)
            control = await held.enter_async_context(
                open_control(
                    settings,
                    server_id=server_id,
                    store=store,
                    nodes={**remote, SILENT: SilentNode(SILENT)},
                    tunnel=await held.enter_async_context(Tunnels(tls, places.get)),
                    volumes=volumes,
                    bus=bus,
                    clock=clock,
                    metrics=metrics,
                    version="0",
                    pace=PACE,
                )
            )
            controls.append(control)
            running.append(tasks.create_task(control.reconciler.run()))
        for link in links:
            await held.enter_async_context(linked(link))
        async with asyncio.timeout(20):
            for link in links:
                await link.until_up()
        running.append(tasks.create_task(controls[0].meter.run()))
        house: Any = SeveralHouse(controls, controls[0].store, list(nodes.values()))
        yard = Yard(house, host, conduct, httpx.AsyncClient(), "", home, url)
        await yard.client.aclose()
        yard.key = await yard.add_key(*await yard.first())
        yard.client = await held.enter_async_context(
            httpx.AsyncClient(
                transport=_InTurn(controls, running),
                base_url="http://sandyard.test",
                headers={"Authorization": f"Bearer {yard.key}"},
                timeout=30,
            )
        )
        try:
            yield yard
            await assert_added_up(controls[0].store)
        finally:
            for task in running:
                task.cancel()
    for machine in list(host.machines.values()):
        machine.die()
        machine.close()
    await asyncio.sleep(0.01)
