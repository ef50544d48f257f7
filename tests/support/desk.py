"""The services by themselves: on fake nodes, with a clock that a test drives, and no HTTP."""

import asyncio
import contextlib
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

from sandyard.server.app.control import Control, open_control
from sandyard.server.app.installation import secret_key
from sandyard.server.app.metrics import Metrics
from sandyard.server.app.wiring import sign_up_of
from sandyard.server.core.contracts.cluster import Beat
from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.records import Activity, ActivityQuery, JoinedNode, NodeStart, Sandbox
from sandyard.server.core.states import Status
from sandyard.server.links.local import LocalBus
from sandyard.server.links.sql import open_store
from sandyard.server.links.volumes import FolderVolumes
from sandyard.server.node.membership import Telling
from sandyard.server.service.actor import Actor
from sandyard.server.service.people.bootstrap import ensure_first_organization
from sandyard.server.service.reconcile.reconciler import Pace
from sandyard.server.service.roster import Roster
from sandyard.server.service.sandboxes.create import NewSandbox
from sandyard.server.service.sandboxes.execute import Command, CommandOutcome
from sandyard.server.service.services import Services
from tests.support.clock import DrivenClock, are_threads_at_work, count_threads, turn
from tests.support.house import settings_of
from tests.support.nodes import FakeNode, TunnelTo
from tests.support.store import place_database

_LIMIT_S = 100.0
_LOOKS = 200
_QUIET = 4
_LEASE = timedelta(seconds=4)


@dataclass
class Desk:
    """Services on nodes, and who uses them."""

    control: Control
    nodes: dict[str, FakeNode]
    clock: DrivenClock
    actor: Actor
    kill: Callable[[], Awaitable[None]]
    home: Path

    @property
    def services(self) -> Services:
        """What routes would call."""
        return self.control.services

    @property
    def node(self) -> FakeNode:
        """The first node."""
        return next(iter(self.nodes.values()))

    async def create(self, **wish: Any) -> Sandbox:
        """Create a sandbox and return it once it is no longer on its way up."""
        wish = {"template": "base-minimal", **wish}
        made = await self.services.creation.create(self.actor, NewSandbox(**wish))
        return await self.until(made, *(frozenset(Status) - {Status.PENDING, Status.CREATING}))

    async def get(self, sandbox: Sandbox) -> Sandbox:
        """Return a sandbox as it is now, also one that is gone."""
        async with self.control.store.read() as tx:
            found = await tx.sandboxes.find(sandbox.id)
        assert found is not None
        return found

    async def until(self, sandbox: Sandbox, *statuses: Status) -> Sandbox:
        """Return a sandbox once its status is one of these.

        No time passes meanwhile, unless a slow machine is long in coming to it: what was driven
        past it is then given another second, and another.
        """
        looked = 0

        async def holds() -> bool:
            nonlocal looked
            looked += 1
            if looked % _LOOKS == 0:
                await self.clock.advance(1.0)
            return (await self.get(sandbox)).status in statuses

        await until(holds)
        return await self.get(sandbox)

    def back_up(self) -> None:
        """Keep the database as it is now."""
        self._copy(self.home / "sandyard.db", self.home / "backup.db")

    def restore(self) -> None:
        """Have the database be again as it was kept."""
        self._copy(self.home / "backup.db", self.home / "sandyard.db")

    def _copy(self, source: Path, target: Path) -> None:
        with closing(sqlite3.connect(source)) as before, closing(sqlite3.connect(target)) as after:
            before.backup(after)

    async def drive(self, seconds: float, step: float = 2.0) -> None:
        """Let time pass, look by look, and let what each look begins come to its end."""
        passed = 0.0
        while passed < seconds:
            await self.clock.advance(min(step, seconds - passed))
            passed += step
            await still()

    async def execute(
        self, sandbox: Sandbox, line: str, actor: Actor | None = None
    ) -> CommandOutcome:
        """Run a command."""
        command = Command(line, 5000, "/", {}, None, "root")
        return await self.services.commands.execute(actor or self.actor, sandbox.id, command)

    async def feed(self, sandbox: Sandbox) -> list[Activity]:
        """Return what became of a sandbox, oldest first."""
        query = ActivityQuery(self.actor.org_id, 100, matches={"sandbox_id": sandbox.id})
        async with self.control.store.read() as tx:
            return list(reversed(await tx.activity.page(query)))

    def machine(self, sandbox: Sandbox) -> Any:
        """Return the machine behind a sandbox, on whichever node it is."""
        (found,) = (
            one.machines[sandbox.id] for one in self.nodes.values() if sandbox.id in one.machines
        )
        return found


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Return once a condition holds; fail at a limit of real time."""
    async with asyncio.timeout(_LIMIT_S):
        while not await condition():
            await asyncio.sleep(0.001)


async def still() -> None:
    """Let what was begun come to its end: turns of the loop, and of the threads that commit."""
    async with asyncio.timeout(_LIMIT_S):
        quiet = 0
        while quiet < _QUIET:
            await turn()
            await asyncio.sleep(0.002)
            quiet = 0 if are_threads_at_work() else quiet + 1


@asynccontextmanager
async def open_desk(
    home: Path,
    *,
    nodes: Mapping[str, FakeNode] | None = None,
    clock: DrivenClock | None = None,
    server_id: str = "server",
    works: bool = True,
    pace: Pace | None = None,
    nodes_tell: bool = False,
    has_versions: bool = False,
    sections: Mapping[str, Any] | None = None,
) -> AsyncIterator[Desk]:
    """Open the services on fake nodes and run the reconciler, unless it is not to work.

    Where it `has_versions`, builds of templates are carried out. Where `nodes_tell`, nodes do as
    those on other hosts: they have joined, and say each second that they are there and what they
    have.
    """
    count_threads()
    clock = clock or DrivenClock()
    own = dict(nodes or {"fake": FakeNode()})
    place_database(home / "sandyard.db")
    settings = settings_of(home, sections=sections)
    async with open_store(settings.store_url, key=secret_key(home), clock=clock) as store:
        await ensure_first_organization(store, clock, sign_up_of(settings))
        roster = await _joined(store, clock, own) if nodes_tell else None
        async with (
            open_control(
                settings,
                server_id=server_id,
                store=store,
                nodes=own,
                roster=roster,
                tunnel=TunnelTo(own),
                volumes=FolderVolumes(home / "workspaces"),
                bus=LocalBus(clock),
                clock=clock,
                metrics=Metrics(version="0"),
                version="0",
                pace=pace,
            ) as control,
            asyncio.TaskGroup() as tasks,
        ):
            telling = []
            if roster is not None:
                telling = [
                    tasks.create_task(_told(roster, store, clock, one)) for one in own.values()
                ]
                telling.append(tasks.create_task(roster.run()))
            working = tasks.create_task(control.reconciler.run() if works else asyncio.sleep(0))
            building = control.services.building.run() if has_versions else asyncio.sleep(0)
            telling.append(tasks.create_task(building))

            async def kill() -> None:
                working.cancel()
                await asyncio.wait([working])

            await still()
            yield Desk(control, own, clock, await _admin(store), kill, home)
            for one in (working, *telling):
                one.cancel()


async def _joined(store: Store, clock: DrivenClock, nodes: Mapping[str, FakeNode]) -> Roster:
    roster = Roster(store, clock, can_hear=lambda: True)
    await roster.refresh()
    for node_id in nodes.keys() - roster.nodes:
        async with store.write(Turn.ALONE) as tx:
            await tx.joined_nodes.add(JoinedNode(node_id, node_id, clock.now()))
    for node in nodes.values():
        if not node.is_silent:
            start = NodeStart("boot", "place", "0", "127.0.0.1", 1)
            async with store.write(Turn.ALONE) as tx:
                await tx.joined_nodes.start(node.node_id, start, lasts=_LEASE)
    await roster.refresh()
    return roster


async def _told(roster: Roster, store: Store, clock: DrivenClock, node: FakeNode) -> None:
    telling = Telling()
    telling.of(node)
    while True:
        with contextlib.suppress(TimeoutError):
            async with clock.timeout(0.5):
                view = await telling.view()
            if view is not None:
                node.asked.pop()  # it asked itself
                async with store.write(Turn.SHARED) as tx:
                    await tx.joined_nodes.beat({(node.node_id, 1)}, lasts=_LEASE)
                roster.hear(node.node_id, Beat(1, view))
        await clock.sleep(1)


async def _admin(store: Store) -> Actor:
    async with store.read() as tx:
        organization = (await tx.organizations.every())[0]
        ((user, _),) = await tx.users.members(organization.id)
    return Actor(organization.id, user.id, "admin", frozenset({"*"}), "user")


def member_of(actor: Actor, user_id: str) -> Actor:
    """Return another user of the same organization, who is no admin."""
    return replace(actor, user_id=user_id, role="member")
