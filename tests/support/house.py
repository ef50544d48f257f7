"""A whole house on fake machines, in this process, with clients for it."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from sandyard.server.app.faces import MakeFace
from sandyard.server.app.house import House, open_house
from sandyard.server.app.settings import NodeSettings, PoolSettings, Settings
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.ids import digest_of_key, new_api_key, new_uuid
from sandyard.server.core.records import ApiKey, Role, User
from sandyard.server.fakes.driver import Conduct, FakeDriver, FakeHost, FakeMachine
from sandyard.server.links.local import SystemClock
from sandyard.server.node.node import Node
from sandyard.server.node.owner import Owner
from sandyard.server.service.people.organizations import SignUp, found_organization, join
from tests.support.postgres import postgres_url
from tests.support.store import place_database, recounted, written_in

URL = "http://sandyard.test"
EACH_STORE = ("sqlite", pytest.param("postgresql", marks=pytest.mark.postgres))
"""The kinds of databases, as parameters of a fixture that uses `store_section`."""


@dataclass
class Yard:
    """A house, its fake host, and a client of its first admin."""

    house: House
    host: FakeHost
    conduct: Conduct
    client: httpx.AsyncClient
    key: str
    home: Path
    database: str = ""
    """Its URL, where it is not a file in the home."""

    async def written(self) -> bytes:
        """Return all that is in the database, as whoever took that away could read it."""
        return await written_in(self.database or f"sqlite:///{self.home / 'sandyard.db'}")

    def client_of(self, key: str | None) -> httpx.AsyncClient:
        """Return a client with another credential."""
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        transport = httpx.ASGITransport(self.house.front, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url=URL, headers=headers, timeout=30)

    async def add_key(
        self, org_id: str, user_id: str, *, scopes: tuple[str, ...] = ("*",), **changes: Any
    ) -> str:
        """Add an API key and return its secret."""
        key = new_api_key(is_test=bool(changes.get("is_test")))
        async with self.house.store.write(Turn.ALONE) as tx:
            await tx.keys.add(
                ApiKey(
                    id=new_uuid(), org_id=org_id, owner_user_id=user_id, name="test",
                    prefix=key[:12], digest=digest_of_key(key), scopes=scopes,
                    created_at=datetime.now(UTC), **changes,
                )
            )  # fmt: skip
        return key

    async def first(self) -> tuple[str, str]:
        """Return the first organization's id and its admin's."""
        async with self.house.store.read() as tx:
            organization = (await tx.organizations.every())[0]
            members = await tx.users.members(organization.id)
        return organization.id, next(user.id for user, one in members if one.role == "admin")

    async def add_member(self, org_id: str, role: Role = "member") -> str:
        """Add a user to an organization and return its id."""
        now = datetime.now(UTC)
        user = User(new_uuid(), f"{new_uuid()}@example.org", "Somebody", now)
        async with self.house.store.write(Turn.ALONE) as tx:
            await tx.users.add(user)
            await join(tx, org_id, user, role, at=now)
        return user.id

    async def stranger(self) -> str:
        """Return a key of another organization's admin."""
        now = datetime.now(UTC) + timedelta(seconds=1)
        user = User(new_uuid(), f"{new_uuid()}@example.org", "Stranger", now)
        async with self.house.store.write(Turn.ALONE) as tx:
            await tx.users.add(user)
            sign_up = SignUp(10_000, "enterprise", 5)
            made = await found_organization(tx, "Other", user, sign_up=sign_up, at=now)
        return await self.add_key(made.organization.id, user.id)

    def machine_of(self, sandbox: Mapping[str, object]) -> FakeMachine:
        """Return the machine behind a sandbox."""
        hostname = sandbox["name"] or sandbox["id"]
        (found,) = (
            one for one in self.host.machines.values() if one.remembers.get("hostname") == hostname
        )
        return found

    async def get(self, sandbox: Mapping[str, object]) -> dict[str, object]:
        """Return a sandbox as it is now."""
        data: dict[str, object] = (await self.client.get(f"/v1/sandboxes/{sandbox['id']}")).json()[
            "data"
        ]
        return data

    async def execute(self, sandbox: Mapping[str, object], command: str) -> str:
        """Run a command and return what it said."""
        answer = await self.client.post(
            f"/v1/sandboxes/{sandbox['id']}/exec", json={"command": command}
        )
        assert answer.status_code == 200, answer.text
        return str(answer.json()["data"]["stdout"])

    async def act(self, sandbox: Mapping[str, object], action: str, **body: object) -> Any:
        """Ask for an action on a sandbox and return what it answered."""
        answer = await self.client.post(f"/v1/sandboxes/{sandbox['id']}/{action}", json=body)
        assert answer.status_code in (200, 201), answer.text
        return answer.json()["data"]

    async def create(self, **body: object) -> dict[str, object]:
        """Create a sandbox, wait until it has settled, and return it."""
        answer = await self.client.post("/v1/sandboxes", params={"wait": 20}, json=body)
        assert answer.status_code == 201, answer.text
        data: dict[str, object] = answer.json()["data"]
        return data


def settings_of(
    home: Path, *, pool: int = 0, sections: Mapping[str, Any] | None = None, **node: object
) -> Settings:
    """Return settings for fake machines in a home of a test's own."""
    plenty = {"memory_overcommit": 1e6, "disk_overcommit": 1e6}
    return Settings(
        **(sections or {}),
        home=home,
        node=NodeSettings.model_validate(
            {"driver": "fake", "memory_floor_mib": 0, "disk_floor_mib": 0, **plenty, **node}
        ),
        pool=PoolSettings(floor=pool, ceiling=pool),
    )


@asynccontextmanager
async def store_section(kind: str) -> AsyncIterator[dict[str, Any]]:
    """Yield sections of settings for a new database of a kind."""
    if kind == "sqlite":
        yield {}
        return
    async with postgres_url() as url:
        yield {"store": {"url": url}}


@asynccontextmanager
async def open_yard(
    home: Path,
    *,
    host: FakeHost | None = None,
    keep: bool = False,
    pool: int = 0,
    conduct: Conduct | None = None,
    saves: bool = False,
    clock: Clock | None = None,
    works: bool = True,
    sections: Mapping[str, Any] | None = None,
    faces: Sequence[MakeFace] = (),
    **node: object,
) -> AsyncIterator[Yard]:
    """Open a house and run its reconciler; with `keep`, its machines outlive it.

    With `saves` its driver can save machines, so that there are golden ones, and with `pool` so
    many wait.
    """
    host = host or FakeHost()
    conduct = conduct or Conduct()
    driver = FakeDriver(host, conduct, saves=saves or pool > 0)
    settings = settings_of(home, pool=pool, sections=sections, **node)
    place_database(home / "sandyard.db")
    try:
        async with (
            open_house(settings, drivers=[driver], clock=clock, faces=faces) as house,
            asyncio.TaskGroup() as tasks,
        ):
            reconciling = tasks.create_task(house.reconciler.run() if works else asyncio.sleep(0))
            metering = tasks.create_task(house.meter.run() if works else asyncio.sleep(0))
            looking = tasks.create_task(house.control.services.readiness.run())
            yard = Yard(house, host, conduct, httpx.AsyncClient(), "", home, settings.store_url)
            await yard.client.aclose()
            yard.key = await yard.add_key(*await yard.first())
            async with yard.client_of(yard.key) as client:
                yard.client = client
                yield yard
            await assert_counted(house)
            reconciling.cancel()
            metering.cancel()
            looking.cancel()
    finally:
        for machine in list(host.machines.values()):
            if not keep:
                machine.die()
                machine.close()
        for _ in range(5):  # what was closed is gone, also what was being accepted just then
            await asyncio.sleep(0.002)


async def assert_counted(house: House) -> None:
    """Fail if resources are reserved for other machines than there are, or sums are wrong."""
    assert isinstance(house.node, Node)
    counted = {one for one in house.node._ledger.everyone if isinstance(one, Owner)}
    owners = house.node._owners
    assert counted == set(owners.all())
    assert set(owners._users) <= counted
    await assert_added_up(house.store)


async def assert_added_up(store: Store) -> None:
    """Fail if what an organization's sandboxes take together is not what their rows say."""
    async with store.read() as tx:
        now = SystemClock().now()
        for one in await tx.organizations.every():
            assert await tx.usage.in_use(one.id, now) == await recounted(tx, one.id, now)


async def eventually(condition: Callable[[], Awaitable[bool]], *, limit_s: float = 60.0) -> None:
    """Return once an async condition holds; fail at the limit."""
    async with asyncio.timeout(limit_s):
        while not await condition():
            await asyncio.sleep(0.01)


async def looked(yard: Yard) -> None:
    """Return once the reconciler has compared the node once more, from the report to its end."""
    (comparison,) = yard.house.reconciler._comparisons.values()
    for _ in range(2):  # the first may have begun before
        before = comparison.heard_at
        await until(lambda: comparison.heard_at != before)  # noqa: B023 - awaited here


async def until(condition: Callable[[], bool], *, limit_s: float = 60.0) -> None:
    """Return once a condition holds; fail at the limit."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.001)
