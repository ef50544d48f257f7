"""What a whole cluster does on this host: creates by two control planes, and what many nodes cost.

    .venv/bin/python -m bench.cluster [--creates 600] [--clients 24] [--nodes 200]

PostgreSQL, three NATS servers, a balancer, two control planes and three nodes run as processes of
their own, in namespaces on a bridge (tests/support/lab.py); the machines are fake, and none waits
in a pool. The many nodes are one process that says of each that it is there, and answers what it
is asked with nothing. Beside the choice among a thousand nodes stands the plain look through a
list of as many.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, suppress
from datetime import UTC, datetime
from multiprocessing.connection import Connection

import httpx
from tests.support.lab import Lab, lab
from tests.support.nodes import FakeNode

from bench.figures import percentile
from sandyard.server.app.cluster import nats_tls, open_fleet
from sandyard.server.app.installation import secret_key
from sandyard.server.core.contracts.cluster import Application, Beat, Hello, Joining
from sandyard.server.core.contracts.node import NodeReport, NodeView
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.errors import UnavailableError
from sandyard.server.core.ids import digest_of_key, new_api_key, new_uuid
from sandyard.server.core.node_ops import Report
from sandyard.server.core.records import ApiKey, NodeStart, User
from sandyard.server.core.shapes import Shape
from sandyard.server.links.identities import new_request
from sandyard.server.links.local import SystemClock
from sandyard.server.links.nats.client import Inbox
from sandyard.server.links.nats.link import Link, linked
from sandyard.server.links.nats.register import NatsPresence
from sandyard.server.links.nats.server import answering
from sandyard.server.links.nats.tokens import Key, KeyLogin, NatsToken, Role
from sandyard.server.links.sql import open_store
from sandyard.server.service.nodes import Nodes
from sandyard.server.service.people.organizations import SignUp, found_organization
from sandyard.server.service.placement import Placement

_SHAPE = Shape(1, 512, 1024)
_VIEWS = 1000


async def _organizations(made: Lab, count: int) -> list[str]:
    """Found organizations, and return a key of each."""
    keys, now = [], datetime.now(UTC)
    settings = made.settings
    async with open_store(settings.store_url, key=secret_key(settings.home)) as store:
        for number in range(count):
            user = User(new_uuid(), f"{new_uuid()}@example.org", f"User {number}", now)
            async with store.write(Turn.ALONE) as tx:
                await tx.users.add(user)
                sign_up = SignUp(100_000_000, "enterprise", 5)
                founded = await found_organization(
                    tx, f"Organization {number}", user, sign_up=sign_up, at=now
                )
                keys.append(new_api_key())
                key = ApiKey(
                    id=new_uuid(), org_id=founded.organization.id, owner_user_id=user.id,
                    name="bench", prefix=keys[-1][:12], digest=digest_of_key(keys[-1]),
                    scopes=("*",), created_at=now,
                )  # fmt: skip
                await tx.keys.add(key)
    return keys


def _creates(
    made: Lab, keys: list[str], count: int, clients: int, *, what: str = "creates"
) -> dict[str, float]:
    """Create sandboxes by several clients, each of the next organization, and delete them: each at
    once, as part of what is timed, where `what` is lives."""

    def work(number: int) -> list[float]:
        took = []
        headers = {"Authorization": f"Bearer {keys[number % len(keys)]}"}
        with httpx.Client(base_url=str(made.client.base_url), headers=headers, timeout=60) as own:
            for _ in range(count // clients):
                began = time.perf_counter()
                body = {"template": "base-minimal", "idleTimeout": 0}
                answer = own.post("/v1/sandboxes?wait=30", json=body)
                answer.raise_for_status()
                took.append(time.perf_counter() - began)
                path = f"/v1/sandboxes/{answer.json()['data']['id']}?async=true"
                if what == "lives":
                    own.delete(path).raise_for_status()
                else:
                    left.append((headers, path))
        return took

    left = list[tuple[dict[str, str], str]]()
    with ThreadPoolExecutor(clients) as threads:
        began = time.perf_counter()
        took = [one for part in threads.map(work, range(clients)) for one in part]
        seconds = time.perf_counter() - began
    with httpx.Client(base_url=str(made.client.base_url), timeout=60) as client:
        for headers, path in left:
            client.delete(path, headers=headers).raise_for_status()
    return {
        f"{what}_per_s": round(len(took) / seconds, 1),
        f"{what}_create_p50_ms": round(percentile(took, 0.5) * 1000, 1),
        f"{what}_create_p99_ms": round(percentile(took, 0.99) * 1000, 1),
    }


def _many(pipe: Connection, lab_settings: dict[str, object], count: int) -> None:
    asyncio.run(_be_there(pipe, lab_settings, count))


async def _be_there(pipe: Connection, given: dict[str, object], count: int) -> None:
    from sandyard.server.app.settings import Settings

    settings = Settings(**given)  # type: ignore[arg-type]
    async with AsyncExitStack() as held:
        beats = []
        async with open_fleet(settings) as (fleet, installation):
            for number in range(count):
                key = Key.new(Role.USER)
                _, request = new_request()
                application = Application(request.decode(), key.name)
                joining = Joining(await fleet.invite(), f"many-{number}", application)
                identity = await fleet.join(joining)
                node = FakeNode(identity.node_id, templates=())
                tls = nats_tls(settings.cluster.nats, installation.nats.certificate.decode())
                login = KeyLogin(key, NatsToken(identity.token))
                link = Link(settings.cluster.nats, "many", login, tls, is_quiet=True)
                presence = NatsPresence(link, Inbox(link, node.node_id))
                await held.enter_async_context(answering(node, link))
                await held.enter_async_context(linked(link))
                beats.append((node.node_id, presence, link, application))
        for _, _, link, _ in beats:
            await link.until_up()

        async def beat(node_id: str, presence: NatsPresence, application: Application) -> None:
            start = NodeStart("boot", node_id, "0", "10.0.0.1", 8700)
            epoch = None
            while True:
                with suppress(UnavailableError):
                    if epoch is None:
                        epoch = (await presence.hello(node_id, Hello(start, application))).epoch
                    await presence.beat(node_id, Beat(epoch, NodeView()))
                await asyncio.sleep(1)

        async with asyncio.TaskGroup() as tasks:
            running = [
                tasks.create_task(beat(node_id, presence, application))
                for node_id, presence, _, application in beats
            ]
            pipe.send("there")
            await asyncio.get_running_loop().run_in_executor(None, pipe.recv)
            for one in running:
                one.cancel()


def _cpu_s(pid: int) -> float:
    with open(f"/proc/{pid}/stat") as file:
        fields = file.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _idle(made: Lab, count: int, seconds: float) -> dict[str, float]:
    """Tell how much of a core a control plane uses while so many nodes are there, idle."""
    given = {
        "home": str(made.settings.home),
        "store": {"url": made.url},
        "cluster": {"nats": made.servers, "address": made.controls[0].address},
    }
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_many, args=(there, given, count))
    process.start()
    here.recv()
    time.sleep(5)
    pids = [one.process.pid for one in made.controls if one.process is not None]
    before = [_cpu_s(pid) for pid in pids]
    time.sleep(seconds)
    used = [(_cpu_s(pid) - was) / seconds for pid, was in zip(pids, before, strict=True)]
    ups = sum(one.has_lease for one in made.known().values())
    here.send("enough")
    process.join()
    return {"nodes_up": ups, "idle_cpu_percent_of_a_core": round(100 * max(used), 1)}


async def _placement() -> dict[str, float]:
    """Choose among a thousand nodes, and look through a list of as many."""
    clock = SystemClock()
    fakes = {f"n{number}": FakeNode(f"n{number}") for number in range(_VIEWS)}
    for number, node in enumerate(fakes.values()):
        node.room = 10 + number
    nodes = Nodes(fakes, clock)
    placement = Placement(nodes, clock, by_lot=True)
    for one in nodes.all():
        await nodes.report_of(one)
    took, plain = [], []
    reports = [await one.do(Report()) for one in fakes.values()]
    for _ in range(300):
        began = time.perf_counter()
        await placement.choose("base-minimal", _SHAPE)
        took.append(time.perf_counter() - began)
        began = time.perf_counter()
        max(reports, key=_room)
        plain.append(time.perf_counter() - began)
    return {
        "placement_p50_ms": round(percentile(took, 0.5) * 1000, 2),
        "placement_p99_ms": round(percentile(took, 0.99) * 1000, 2),
        "plain_look_p50_ms": round(percentile(plain, 0.5) * 1000, 2),
    }


def _room(report: NodeReport) -> tuple[int, int]:
    waits = [one for one in report.shelves if one.size]
    return len(waits), report.memory_mib


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--creates", type=int, default=600)
    parser.add_argument("--clients", type=int, default=24)
    parser.add_argument("--organizations", type=int, default=12)
    parser.add_argument("--nodes", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=20)
    given = parser.parse_args()
    figures = asyncio.run(_placement())
    # What a pool makes ahead would be made beside what is timed, on the same processors.
    no_pool = {"SANDYARD_POOL__FLOOR": "0", "SANDYARD_POOL__CEILING": "0"}
    with lab("one", "two", "three", **no_pool) as made:
        keys = asyncio.run(_organizations(made, given.organizations))
        _creates(made, keys, given.clients * 2, given.clients)  # warm
        figures |= _creates(made, keys, given.creates, given.clients)
        figures |= _creates(made, keys, given.creates, given.clients, what="lives")
        alone = _creates(made, keys[:1], given.creates // 2, given.clients, what="lives")
        figures |= {f"of_one_organization_{name}": value for name, value in alone.items()}
        figures |= _idle(made, given.nodes, given.seconds)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
