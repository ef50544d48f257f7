"""What a cluster costs: writers of several organizations, and the tunnel to a node.

    .venv/bin/python -m bench.fleet [--seconds 5] [--rounds 500] [--mib 200]

The PostgreSQL is one of the bench's own, which waits for the disk at each commit, as one that keeps
what it was given does. Beside what organizations write in turns of their own stands the same with
one turn for all: the same statements, in the same run. Beside what goes through the tunnel, to a
node in a process of its own, stands the same on a node in this one; the machines are fake.
"""

import argparse
import asyncio
import json
import multiprocessing
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path

from tests.support import postgres
from tests.support.house import settings_of
from tests.support.nodes import a_wish
from tests.support.papers import INSTALLATION, Desk
from tests.support.ports import free_port

from bench.figures import percentile
from sandyard.server.app.metrics import Metrics
from sandyard.server.app.node import open_node
from sandyard.server.core.collect import Collector
from sandyard.server.core.contracts.node import MachineRef, NodeTunnel
from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.ids import new_sandbox_id, new_uuid
from sandyard.server.core.node_ops import EnsureRunning
from sandyard.server.core.ops import Dial, Execute
from sandyard.server.core.records import Organization, Project, Sandbox, User
from sandyard.server.core.shapes import Shape
from sandyard.server.core.states import Status
from sandyard.server.fakes.driver import ECHO_PORT, Conduct, FakeDriver, FakeHost
from sandyard.server.links.identities import Authority, control_name, node_name
from sandyard.server.links.local import SystemClock
from sandyard.server.links.sql import open_store
from sandyard.server.links.tunnel.client import NodeAddress, Tunnels
from sandyard.server.links.tunnel.server import serving
from sandyard.server.node.node import Node

_ORGANIZATIONS, _WRITERS_EACH = 16, 2
_NOW = datetime(2026, 1, 1, tzinfo=UTC)


async def _furnished(store: Store) -> list[Sandbox]:
    """Return a pattern of a sandbox for each organization."""
    patterns = []
    async with store.write(Turn.ALONE) as tx:
        user = User(new_uuid(), "bench@example.org", "Bench", _NOW)
        await tx.users.add(user)
        for number in range(_ORGANIZATIONS):
            org, project = new_uuid(), new_uuid()
            await tx.organizations.add(
                Organization(org, f"Org {number}", org, _NOW),
                Project(project, org, "Default", "default", True, _NOW),
            )
            patterns.append(
                Sandbox(
                    id="", org_id=org, owner_user_id=user.id, project_id=project, name=None,
                    status=Status.FAILED, version=1, incarnation=1, template="t",
                    shape=Shape(1, 512, 1024), idle_timeout_s=600, created_at=_NOW,
                    updated_at=_NOW,
                )
            )  # fmt: skip
    return patterns


async def _rate(stores: list[Store], patterns: list[Sandbox], seconds: float, turn: bool) -> float:
    """Return how many transactions a second all writers get through together."""
    until, done = time.perf_counter() + seconds, 0

    async def write(store: Store, pattern: Sandbox) -> None:
        nonlocal done
        while time.perf_counter() < until:
            async with store.write(pattern.org_id if turn else Turn.ALONE) as tx:
                await tx.sandboxes.insert(replace(pattern, id=new_sandbox_id()))
            done += 1

    began = time.perf_counter()
    async with asyncio.TaskGroup() as tasks:
        for number, pattern in enumerate(patterns):
            for writer in range(_WRITERS_EACH):
                tasks.create_task(write(stores[(number + writer) % len(stores)], pattern))
    return done / (time.perf_counter() - began)


async def _writes(seconds: float) -> dict[str, float]:
    async with (
        postgres.postgres_url() as url,
        open_store(url, key=b"k" * 32) as one,
        open_store(url, key=b"k" * 32) as other,
    ):
        patterns = await _furnished(one)
        stores = [one, other]
        await _rate(stores, patterns, 1, turn=True)
        alone, turns = [], []
        for _ in range(3):
            alone.append(await _rate(stores, patterns, seconds, turn=False))
            turns.append(await _rate(stores, patterns, seconds, turn=True))
    middle = sorted(turns)[1], sorted(alone)[1]
    return {
        "writes_a_second": round(middle[0], 1),
        "writes_a_second_in_one_turn": round(middle[1], 1),
        "ratio": round(middle[0] / middle[1], 2),
    }


@asynccontextmanager
async def _a_machine(home: Path) -> AsyncIterator[tuple[Node, MachineRef]]:
    """Open a node with a fake machine on it."""
    host = FakeHost()
    async with open_node(
        settings_of(home, golden_machines=False),
        clock=SystemClock(),
        observer=Metrics(version="0"),
        on_change=lambda: None,
        drivers=[FakeDriver(host, Conduct())],
        node_id="n",
    ) as node:
        wish = a_wish(new_sandbox_id())
        await node.do(EnsureRunning(wish))
        yield node, MachineRef("n", wish.sandbox_id, 1)
    for one in list(host.machines.values()):
        one.die()
        one.close()


def _node(pipe: Connection, folder: Path) -> None:
    async def serve() -> None:
        desk = Desk(folder, Authority(*pipe.recv()))
        tls = desk.tls(node_name(INSTALLATION, "n"), is_server=True)
        async with (
            _a_machine(folder / "home") as (node, where),
            serving(node, address="127.0.0.1", port=0, tls=tls, may=lambda _: True) as port,
        ):
            pipe.send((port, where))
            await asyncio.to_thread(pipe.recv)

    asyncio.run(serve())


async def _execute(tunnel: NodeTunnel, where: MachineRef) -> float:
    began, collector = time.perf_counter(), Collector(2**20)
    async with tunnel.open(where, Execute("true", 5000)) as opened:
        while collector.feed(await opened.stream.read(65536)) is None:
            pass
    return time.perf_counter() - began


async def _echo_mib(tunnel: NodeTunnel, where: MachineRef, size_mib: int) -> float:
    """Return MiB a second, there and back."""
    piece, began = bytes(2**18), time.perf_counter()
    async with tunnel.open(where, Dial(ECHO_PORT)) as opened:

        async def send() -> None:
            for _ in range(size_mib * 4):
                await opened.stream.write(piece)
            await opened.stream.write_eof()

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(send())
            while await opened.stream.read(2**18):
                pass
    return size_mib / (time.perf_counter() - began)


async def _tunnel(rounds: int, mib: int) -> dict[str, float]:
    here, there = multiprocessing.Pipe()
    with tempfile.TemporaryDirectory(dir="/tmp", prefix="b-") as folder:
        desk = Desk.new(Path(folder) / "papers")
        process = multiprocessing.get_context("spawn").Process(
            target=_node, args=(there, desk.folder)
        )
        process.start()
        try:
            here.send((desk.authority.certificate, desk.authority.key))
            port, far = await asyncio.to_thread(here.recv)
            place = NodeAddress("127.0.0.1", port, node_name(INSTALLATION, "n"))
            tls = desk.tls(control_name(INSTALLATION, "c"), is_server=False)
            async with (
                _a_machine(Path(folder) / "home") as (node, near),
                Tunnels(tls, lambda _: place) as tunnel,
            ):
                took: dict[str, list[float]] = {"in process": [], "tunnel": []}
                for _ in range(rounds):
                    took["in process"].append(await _execute(node, near))
                    took["tunnel"].append(await _execute(tunnel, far))
                rates = [
                    (await _echo_mib(node, near, mib), await _echo_mib(tunnel, far, mib))
                    for _ in range(3)
                ]
            here.send("end")
            await asyncio.to_thread(process.join, 30)
        finally:
            process.kill()
            process.join()
    found = {}
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        by_way = [percentile(took[way], share) * 1000 for way in ("in process", "tunnel")]
        found[f"exec_{name}_ms"] = round(by_way[1], 2)
        found[f"exec_added_{name}_ms"] = round(by_way[1] - by_way[0], 2)
    near_mib, far_mib = sorted(rates)[1]
    return found | {
        "echo_mib_a_second": round(far_mib, 1),
        "echo_ratio": round(far_mib / near_mib, 2),
    }


def main() -> None:
    """Measure, and print it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=5)
    parser.add_argument("--rounds", type=int, default=500)
    parser.add_argument("--mib", type=int, default=200)
    given = parser.parse_args()
    print(json.dumps({"tunnel": asyncio.run(_tunnel(given.rounds, given.mib))}, indent=2))
    folder = postgres.start_server(free_port(), is_durable=True)
    try:
        print(json.dumps({"writes": asyncio.run(_writes(given.seconds))}, indent=2))
    finally:
        postgres.stop_server(folder)


if __name__ == "__main__":
    main()
