"""The examination every store passes: SQLite, and a PostgreSQL of the run's own."""

import asyncio
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from tests.support.postgres import postgres_url

from sandyard.server.core.contracts import Store
from sandyard.server.core.errors import AlreadyExistsError, InternalError, UnavailableError
from sandyard.server.core.ids import digest_of_key, new_sandbox_id, new_uuid
from sandyard.server.core.records import (
    Activity,
    ApiKey,
    Organization,
    Project,
    Reason,
    Sandbox,
    SandboxQuery,
    UsagePeriod,
    User,
)
from sandyard.server.core.shapes import Shape
from sandyard.server.core.states import Status, Wanted
from sandyard.server.links.sql import open_store

NOW = datetime(2026, 5, 6, 10, 0, 0, 123456, tzinfo=UTC)
KEY = b"k" * 32
ORG, OTHER = new_uuid(), new_uuid()
USER, PROJECT = new_uuid(), new_uuid()


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'store.db'}"
    else:
        async with postgres_url() as found:
            yield found


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    async with open_store(url, key=KEY) as opened:
        async with opened.write() as tx:
            for org, project in ((ORG, PROJECT), (OTHER, new_uuid())):
                await tx.accounts.add_organization(
                    Organization(org, "Org", org, NOW),
                    Project(project, org, "Default", "default", True, NOW),
                )
            user = User(USER, "me@example.org", "Me", NOW)
            await tx.accounts.add_member(user, org_id=ORG, role="admin")
        yield opened


def sandbox(**changes: object) -> Sandbox:
    plain = Sandbox(
        id=new_sandbox_id(), org_id=ORG, owner_user_id=USER, project_id=PROJECT, name=None,
        status=Status.PENDING, wanted=Wanted.RUNNING, version=1, incarnation=1, template="t",
        shape=Shape(1, 512, 1024), idle_timeout_s=600, created_at=NOW, updated_at=NOW,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


async def insert(store: Store, *sandboxes: Sandbox) -> None:
    async with store.write() as tx:
        for one in sandboxes:
            await tx.sandboxes.insert(one)


async def find(store: Store, sandbox_id: str) -> Sandbox:
    async with store.read() as tx:
        found = await tx.sandboxes.find(sandbox_id)
    assert found is not None
    return found


async def test_a_sandbox_comes_back_as_it_was_stored(store: Store) -> None:
    one = sandbox(
        name="ünï 🏖", tags=("b", "a"), env={"A": "\U0001f600"}, ssh_keys=("ssh-ed25519 x",),
        root_password_hash="$2b$x", metadata={"deep": [1, None, {"x": "y"}]}, auto_resume=False,
        expires_at=NOW + timedelta(days=1), node_id="n", driver="d", ip="10.0.0.1", os="o",
        reason=Reason("c", "m"), started_at=NOW, paused_at=NOW, last_activity_at=NOW,
        last_activity_kind="exec",
    )  # fmt: skip
    await insert(store, one)
    found = await find(store, one.id)
    assert found == replace(one, owner_display_name="Me", owner_email="me@example.org")
    assert found.created_at.tzinfo is UTC


async def test_env_is_not_readable_in_the_database(store: Store, url: str, tmp_path: Path) -> None:
    one = sandbox(env={"TOKEN": "hunter2-secret"})
    await insert(store, one)
    if url.startswith("sqlite"):
        for path in tmp_path.iterdir():
            assert b"hunter2-secret" not in path.read_bytes()
    async with AsyncExitStack() as held:
        stranger = await held.enter_async_context(open_store(url, key=b"other"))
        with pytest.raises(InternalError, match=r"secret\.key"):
            await find(stranger, one.id)


async def test_the_database_is_closed_to_others(store: Store, url: str, tmp_path: Path) -> None:
    await insert(store, sandbox())
    if url.startswith("sqlite"):
        for path in tmp_path.iterdir():
            assert path.stat().st_mode & 0o077 == 0, path


async def test_a_name_is_unique_among_the_live_ones_of_an_organization(store: Store) -> None:
    one = sandbox(name="box")
    await insert(store, one)
    with pytest.raises(AlreadyExistsError):
        await insert(store, sandbox(name="box"))
    gone = replace(one, status=Status.DESTROYED)
    async with store.write() as tx:
        assert await tx.sandboxes.replace(gone) is not None
        assert await tx.sandboxes.find_named(ORG, "box") is None
    second = sandbox(name="box")
    await insert(store, second)
    async with store.read() as tx:
        found = await tx.sandboxes.find_named(ORG, "box")
        assert found is not None
        assert found.id == second.id
        assert await tx.sandboxes.find_named(OTHER, "box") is None


async def test_a_write_names_the_version_it_read(store: Store) -> None:
    one = sandbox()
    await insert(store, one)
    async with store.write() as tx:
        stored = await tx.sandboxes.replace(replace(one, status=Status.CREATING))
    assert stored is not None
    assert stored.version == 2
    async with store.write() as tx:
        assert await tx.sandboxes.replace(replace(one, status=Status.FAILED)) is None
    assert (await find(store, one.id)).status is Status.CREATING


async def test_a_transaction_is_all_or_nothing(store: Store) -> None:
    one = sandbox()
    with pytest.raises(RuntimeError):
        async with store.write() as tx:
            await tx.sandboxes.insert(one)
            raise RuntimeError
    async with store.read() as tx:
        assert await tx.sandboxes.find(one.id) is None


async def test_fifty_writers_lose_no_update(store: Store) -> None:
    one = sandbox(incarnation=0)
    await insert(store, one)

    async def bump() -> None:
        for _ in range(3):
            async with store.write() as tx:
                found = await tx.sandboxes.find(one.id)
                assert found is not None
                changed = replace(found, incarnation=found.incarnation + 1)
                assert await tx.sandboxes.replace(changed) is not None

    async with asyncio.TaskGroup() as tasks:
        for _ in range(50):
            tasks.create_task(bump())
    assert (await find(store, one.id)).incarnation == 150


async def test_no_two_workers_hold_the_same_sandbox(store: Store) -> None:
    await insert(store, *(sandbox() for _ in range(40)))
    claimed: list[str] = []

    async def work(number: int) -> None:
        while True:
            async with store.write() as tx:
                found = await tx.sandboxes.claim(
                    frozenset({Status.PENDING}), lease=f"w{number}", now=NOW,
                    until=NOW + timedelta(seconds=30), limit=3,
                )  # fmt: skip
            if not found:
                return
            claimed.extend(claim.sandbox.id for claim in found)

    async with asyncio.TaskGroup() as tasks:
        for number in range(8):
            tasks.create_task(work(number))
    assert len(claimed) == len(set(claimed)) == 40


async def test_a_lease_guards_runs_out_and_is_given_back(store: Store) -> None:
    one = sandbox()
    await insert(store, one)
    until = NOW + timedelta(seconds=30)
    pending = frozenset({Status.PENDING})
    async with store.write() as tx:
        (claim,) = await tx.sandboxes.claim(pending, lease="a", now=NOW, until=until, limit=9)
        assert await tx.sandboxes.replace(claim.sandbox, lease="b") is None
        kept = await tx.sandboxes.replace(claim.sandbox, lease="a")
        assert kept is not None
        assert await tx.sandboxes.claim(pending, lease="b", now=NOW, until=until, limit=9) == []
        later = until + timedelta(seconds=1)
        assert await tx.sandboxes.claim(pending, lease="b", now=later, until=later, limit=9)
        assert not await tx.sandboxes.extend(one.id, lease="a", until=until)
        assert await tx.sandboxes.extend(one.id, lease="b", until=None)
        assert await tx.sandboxes.claim(pending, lease="c", now=NOW, until=until, limit=9)
        # A change without a lease (the owner's) takes it from whoever holds it.
        assert await tx.sandboxes.replace(kept) is not None
        assert not await tx.sandboxes.extend(one.id, lease="c", until=until)


async def test_pages_are_newest_first_and_meet_without_gap_or_repeat(store: Store) -> None:
    made = [
        sandbox(created_at=NOW + timedelta(seconds=number // 2), tags=("even",) * (number % 2 == 0))
        for number in range(9)
    ]
    await insert(store, *made, sandbox(status=Status.DESTROYED), sandbox(status=Status.ORPHANED))
    seen: list[Sandbox] = []
    after = None
    while True:
        async with store.read() as tx:
            page = await tx.sandboxes.page(SandboxQuery(org_id=ORG, limit=4, after=after))
        if not page:
            break
        seen += page
        after = (page[-1].created_at, page[-1].id)
    keys = [(one.created_at, one.id) for one in seen]
    assert keys == sorted(((one.created_at, one.id) for one in made), reverse=True)


async def test_filters_narrow(store: Store) -> None:
    await insert(
        store,
        sandbox(tags=("a", "b"), template="x"),
        sandbox(tags=("a",), template="y", status=Status.FAILED),
        sandbox(status=Status.DESTROYED),
    )

    async def count(**filters: object) -> int:
        async with store.read() as tx:
            query = SandboxQuery(org_id=ORG, limit=99, **filters)  # type: ignore[arg-type]
            return len(await tx.sandboxes.page(query))

    assert await count() == 2
    assert await count(tags=("a",)) == 2
    assert await count(tags=("a", "b")) == 1
    assert await count(template="x") == 1
    assert await count(exclude_template="x") == 1
    assert await count(statuses=frozenset({Status.DESTROYED})) == 1
    assert await count(owner_user_id=new_uuid()) == 0
    assert await count(project_id=PROJECT) == 2
    async with store.read() as tx:
        assert await tx.sandboxes.page(SandboxQuery(org_id=OTHER, limit=9)) == []


async def test_at_most_one_usage_period_is_open(store: Store) -> None:
    one = sandbox()
    await insert(store, one)
    period = UsagePeriod(one.id, ORG, 1, one.shape, NOW)
    async with store.write() as tx:
        await tx.usage.open(period)
    with pytest.raises(InternalError):
        async with store.write() as tx:
            await tx.usage.open(period)
    async with store.write() as tx:
        # A clock that was set back cannot make a period of negative length.
        assert await tx.usage.close(one.id, NOW - timedelta(hours=1))
        assert not await tx.usage.close(one.id, NOW)
        assert await tx.usage.of_sandbox(one.id) == [replace(period, ended_at=NOW)]


async def test_activity_is_kept_and_use_is_noted(store: Store) -> None:
    one = sandbox()
    await insert(store, one)
    line = Activity(
        id=new_uuid(), org_id=ORG, actor_user_id=USER, actor_type="user", event_type="e",
        resource_type="sandbox", resource_id=one.id, severity="info", status="s", title="t",
        summary="", created_at=NOW, sandbox_id=one.id, attributes={"a": 1},
    )  # fmt: skip
    async with store.write() as tx:
        await tx.activity.append(line)
        await tx.activity.touch(one.id, at=NOW, kind="exec")
        assert await tx.activity.of_sandbox(one.id) == [line]
    found = await find(store, one.id)
    assert (found.last_activity_at, found.last_activity_kind) == (NOW, "exec")
    assert found.version == one.version


async def test_keys_are_found_by_digest_with_their_owners_role(store: Store) -> None:
    key = ApiKey(
        id=new_uuid(), org_id=ORG, owner_user_id=USER, name="k", prefix="rt_live_abcd",
        digest=digest_of_key("secret"), scopes=("sandbox:read",), created_at=NOW,
    )  # fmt: skip
    async with store.write() as tx:
        await tx.accounts.add_key(key)
        holder = await tx.accounts.find_key(digest_of_key("secret"))
        assert holder is not None
        assert (holder.key, holder.role) == (key, "admin")
        assert await tx.accounts.find_key(digest_of_key("other")) is None
        await tx.accounts.touch_key(key.id, NOW)
        await tx.accounts.revoke_keys(ORG, name="k", at=NOW)
        holder = await tx.accounts.find_key(digest_of_key("secret"))
        assert holder is not None
        assert holder.key.revoked_at == NOW
        first = await tx.accounts.first_organization()
        assert first is not None
        assert await tx.accounts.find_project(ORG, None) is not None
        assert await tx.accounts.find_project(OTHER, PROJECT) is None


async def test_a_store_that_is_not_there_is_unavailable() -> None:
    url = "postgresql://nobody@127.0.0.1:1/none"
    with pytest.raises(UnavailableError):
        async with open_store(url, key=KEY):
            pass
    with pytest.raises(InternalError):
        async with open_store("mysql://x", key=KEY):
            pass


async def test_a_newer_schema_is_refused_in_words(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'newer.db'}"
    async with open_store(url, key=KEY):
        pass
    with sqlite3.connect(url.removeprefix("sqlite:///")) as raw:
        raw.execute("UPDATE alembic_version SET version_num = '9999'")
    raw.close()
    with pytest.raises(InternalError, match="newer Sandyard"):
        async with open_store(url, key=KEY):
            pass
