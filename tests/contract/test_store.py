"""The examination every store passes: SQLite, and a PostgreSQL of the run's own."""

import asyncio
import os
import random
import re
import sqlite3
import string
import struct
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from operator import attrgetter
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.ext.asyncio import create_async_engine
from tests.support.clock import AheadClock
from tests.support.house import eventually, until
from tests.support.postgres import postgres_url
from tests.support.store import place_database, recounted, written_in

from sandyard.server.app.backups import environment_of
from sandyard.server.core.contracts.store import Effects, Hold, Store, Turn
from sandyard.server.core.egress import Egress, Policy
from sandyard.server.core.errors import AlreadyExistsError, InternalError, UnavailableError
from sandyard.server.core.ids import digest_of_key, new_sandbox_id, new_uuid
from sandyard.server.core.money import Account
from sandyard.server.core.records import (
    ACTIVE_BUILDS,
    Activity,
    ActivityQuery,
    ApiKey,
    AutoTopup,
    Build,
    BuildLine,
    BuildStatus,
    InUse,
    JoinedNode,
    KeyedRequest,
    LedgerEntry,
    Mark,
    Membership,
    Mount,
    NodeSeen,
    NodeStart,
    Organization,
    PendingTopup,
    Project,
    Quarantined,
    Reason,
    RegistryCredential,
    RequestKey,
    RevokedKey,
    Ruled,
    Sandbox,
    SandboxQuery,
    Secret,
    Snapshot,
    SshKey,
    Standing,
    StoragePeriod,
    Template,
    TemplateVersion,
    Ticket,
    Upload,
    UsagePeriod,
    User,
    VersionAbout,
    VersionKey,
    Workspace,
)
from sandyard.server.core.shapes import Shape, ShapeSeconds
from sandyard.server.core.states import Status
from sandyard.server.links.identities import Authority, new_request
from sandyard.server.links.local import SystemClock
from sandyard.server.links.sql import migrations, open_store, read_schema
from sandyard.server.links.sql import store as store_module
from sandyard.server.links.sql.migrate import schema_of
from sandyard.server.links.sql.prepared import SQLITE, Prepared, Values
from sandyard.server.links.sql.store import POSTGRES, PostgresStore
from sandyard.server.links.sql.tables import metadata
from sandyard.server.service.people.bootstrap import ensure_first_organization
from sandyard.server.service.people.organizations import SignUp

NOW = datetime(2026, 5, 6, 10, 0, 0, 123456, tzinfo=UTC)
KEY = b"k" * 32
NEWEST, FIRST_FLOOR = "0028", "0016"
PING_S = store_module._PING_S
ORG, OTHER = new_uuid(), new_uuid()
USER, PROJECT = new_uuid(), new_uuid()


@pytest.fixture(autouse=True)
def patience(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy database is not what most of these tests are about."""
    monkeypatch.setattr(store_module, "_PING_S", 20.0)


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    if request.param == "sqlite":
        place_database(tmp_path / "store.db")
        yield f"sqlite:///{tmp_path / 'store.db'}"
    else:
        async with postgres_url(is_unused=True) as found:  # see `assert_indexed`
            yield found


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
async def new_url(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[str]:
    """A database without a schema."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'store.db'}"
    else:
        async with postgres_url(is_new=True) as found:
            yield found


@pytest.fixture
async def store(url: str) -> AsyncIterator[Store]:
    async with open_store(url, key=KEY) as opened:
        await furnish(opened)
        if isinstance(opened, PostgresStore):
            async with searches(opened) as found:
                yield opened
            await assert_indexed(url, found)
        else:
            yield opened


@asynccontextmanager
async def searches(store: PostgresStore) -> AsyncIterator[dict[str, Sequence[object]]]:
    """Yield the statements that search in the block, each with values that it had once."""
    found: dict[str, Sequence[object]] = {}

    def note(_connection: object, _cursor: object, statement: str, values: Any, *_: object) -> None:
        if statement.startswith(("SELECT", "UPDATE", "DELETE", "WITH")):
            found.setdefault(statement, values)

    event.listen(store.engine.sync_engine, "before_cursor_execute", note)
    yield found
    event.remove(store.engine.sync_engine, "before_cursor_execute", note)


async def assert_indexed(url: str, found: Mapping[str, Sequence[object]]) -> None:
    """Fail where a statement reads through a table, except for those that are to return all."""
    connection = await asyncpg.connect(url)
    try:
        await connection.execute("SET enable_seqscan = off")
        slow = []
        for statement, values in found.items():
            if statement.startswith("SELECT pg_advisory") or not values:
                continue
            plan = await connection.fetch(f"EXPLAIN {statement}", *values)
            if any(is_read_through(lines) for lines in pairwise([*plan, ("",)])):
                slow.append(statement + "\n" + "\n".join(line[0] for line in plan))
        assert not slow, "\n\n".join(slow)
    finally:
        await connection.close()


def is_read_through(lines: tuple[Sequence[str], Sequence[str]]) -> bool:
    """Tell of a line of a plan, and the next, whether it reads all of a table or an index."""
    this, after = (line[0] for line in lines)
    is_whole_index = "Index" in this and " on " in this and "Index Cond" not in after
    return "Seq Scan" in this or (is_whole_index and "Bitmap" not in this)


async def furnish(store: Store) -> None:
    """Add two organizations, and one who belongs to the first."""
    async with store.write(Turn.ALONE) as tx:
        for org, project in ((ORG, PROJECT), (OTHER, new_uuid())):
            await tx.organizations.add(
                Organization(org, "Org", org, NOW),
                Project(project, org, "Default", "default", True, NOW),
            )
        user = User(USER, "me@example.org", "Me", NOW)
        await tx.users.add(user)
        await tx.users.put_member(Membership(ORG, USER, "admin", NOW, NOW))


def sandbox(**changes: object) -> Sandbox:
    plain = Sandbox(
        id=new_sandbox_id(), org_id=ORG, owner_user_id=USER, project_id=PROJECT, name=None,
        status=Status.PENDING, version=1, incarnation=1, template="t",
        shape=Shape(1, 512, 1024), idle_timeout_s=600, created_at=NOW, updated_at=NOW,
    )  # fmt: skip
    return replace(plain, **changes)  # type: ignore[arg-type]


HALF_A_MINUTE, OVER = timedelta(seconds=30), timedelta(seconds=-1)


by_id = attrgetter("id")


def line_of(one: Sandbox) -> Activity:
    return Activity(
        id=new_uuid(), org_id=ORG, actor_user_id=USER, actor_type="user", event_type="e",
        resource_type="sandbox", resource_id=one.id, severity="info", status="s", title="t",
        summary="", created_at=NOW, sandbox_id=one.id, attributes={"a": 1},
    )  # fmt: skip


def held(lease: str, lasts: timedelta = HALF_A_MINUTE) -> Hold:
    return Hold("server", lease, lasts)


async def insert(store: Store, *sandboxes: Sandbox) -> None:
    async with store.write(Turn.ALONE) as tx:
        for one in sandboxes:
            await tx.sandboxes.insert(one)


async def run_by_hand(url: str, work: Callable[[Connection], None]) -> None:
    """Do something in the database beside the store."""
    if url.startswith("sqlite"):
        engine = create_engine(url)
        with engine.begin() as connection:
            work(connection)
        engine.dispose()
    else:
        there = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"))
        async with there.begin() as connecting:
            await connecting.run_sync(work)
        await there.dispose()


async def run_sql(url: str, *statements: str) -> None:
    def run(connection: Connection) -> None:
        for statement in statements:
            connection.execute(text(statement))

    await run_by_hand(url, run)


async def exists(store: Store, sandbox_id: str) -> bool:
    async with store.read() as tx:
        return await tx.sandboxes.find(sandbox_id) is not None


async def find(store: Store, sandbox_id: str) -> Sandbox:
    async with store.read() as tx:
        found = await tx.sandboxes.find(sandbox_id)
    assert found is not None
    return found


async def test_a_sandbox_comes_back_as_it_was_stored(store: Store) -> None:
    one = sandbox(
        name="ünï 🏖", tags=("b", "a"), env={"A": "\U0001f600"}, authorized_keys=("ssh-ed25519 x",),
        root_password_hash="$2b$x", metadata={"deep": [1, None, {"x": "y"}]}, auto_resume=False,
        expires_at=NOW + timedelta(days=1), lives_s=86_400, pauses_at_end=True,
        public_ports=True, port_host="x:${PORT}", node_id="n", driver="d", ip="10.0.0.1", os="o",
        reason=Reason("c", "m"), started_at=NOW, paused_at=NOW, last_activity_at=NOW,
        last_activity_kind="exec",
    )  # fmt: skip
    async with store.write(Turn.ALONE) as tx:
        inserted = await tx.sandboxes.insert(one)
    assert inserted == replace(one, owner_display_name="Me", owner_email="me@example.org")
    found = await find(store, one.id)
    assert found == inserted
    assert found.created_at.tzinfo is UTC


async def test_when_a_sandbox_was_used_is_written_where_that_was_a_use(store: Store) -> None:
    one = sandbox(last_activity_at=NOW, last_activity_kind="exec")
    await insert(store, one)
    later = NOW + timedelta(seconds=1)
    changed = replace(one, last_activity_at=later, last_activity_kind="resumed")
    async with store.write(Turn.ALONE) as tx:
        changed = await tx.sandboxes.replace(changed) or changed
    assert (await find(store, one.id)).last_activity_kind == "exec"
    async with store.write(Turn.ALONE) as tx:
        assert await tx.sandboxes.replace(changed, is_use=True) is not None
    found = await find(store, one.id)
    assert (found.last_activity_at, found.last_activity_kind) == (later, "resumed")


async def test_a_glance_is_one_statement_that_reads(store: Store) -> None:
    one = sandbox(name="box")
    await insert(store, one)
    async with store.glance() as tx:
        found = await tx.sandboxes.find(one.id)
    async with store.glance() as tx:
        assert await tx.sandboxes.find_named(ORG, "box") == found
        with pytest.raises(InternalError, match="one statement"):
            await tx.sandboxes.find(one.id)
    async with store.glance() as tx:
        with pytest.raises(InternalError, match="write"):
            await tx.activity.touch(one.id, at=NOW, kind="exec")
        with pytest.raises(InternalError, match="write"):
            await tx.sandboxes.insert(sandbox())
        with pytest.raises(InternalError, match="write"):
            await tx.leases.claim(frozenset(Status), hold=held("a"), limit=1)
    with pytest.raises(KeyError):
        async with store.glance() as tx:
            raise KeyError
    async with store.glance() as tx:
        assert await tx.sandboxes.find(new_sandbox_id()) is None


async def test_env_is_not_readable_in_the_database(store: Store, url: str) -> None:
    one = sandbox(env={"TOKEN": "hunter2-secret"})
    await insert(store, one)
    written = await written_in(url)
    assert one.id.encode() in written
    assert b"hunter2-secret" not in written
    async with AsyncExitStack() as held:
        stranger = await held.enter_async_context(open_store(url, key=b"other"))
        with pytest.raises(InternalError, match=r"secret\.key"):
            await find(stranger, one.id)


@pytest.mark.parametrize("url", ["sqlite"], indirect=True)
async def test_a_database_that_is_a_file_is_closed_to_others(store: Store, tmp_path: Path) -> None:
    await insert(store, sandbox())
    files = list(tmp_path.iterdir())
    assert files
    for path in files:
        assert path.stat().st_mode & 0o077 == 0, path


async def test_a_name_is_unique_among_the_live_ones_of_an_organization(store: Store) -> None:
    one = sandbox(name="box")
    await insert(store, one)
    with pytest.raises(AlreadyExistsError):
        await insert(store, sandbox(name="box"))
    gone = replace(one, status=Status.DESTROYED)
    async with store.write(Turn.ALONE) as tx:
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
    async with store.write(Turn.ALONE) as tx:
        stored = await tx.sandboxes.replace(replace(one, status=Status.CREATING))
    assert stored is not None
    assert stored.version == 2
    async with store.write(Turn.ALONE) as tx:
        assert await tx.sandboxes.replace(replace(one, status=Status.FAILED)) is None
    assert (await find(store, one.id)).status is Status.CREATING


async def test_effects_are_written_with_a_change_or_not_at_all(store: Store) -> None:
    one, began, ended = sandbox(), NOW + SECOND, NOW + 3 * SECOND
    made, ran, stopped = (line_of(one) for _ in range(3))
    async with store.write(ORG) as tx:
        await tx.sandboxes.insert(one, effects=Effects(line=made))
    period = UsagePeriod(one.id, ORG, 1, one.shape, began)
    async with store.write(ORG) as tx:
        running = await tx.sandboxes.replace(
            replace(one, status=Status.RUNNING), effects=Effects(line=ran, opens=period)
        )
    assert running is not None
    late = Effects(line_of(one), replace(period, incarnation=2), closes_at=ended)
    async with store.write(ORG) as tx:
        assert await tx.sandboxes.replace(one, effects=late) is None
        assert await tx.sandboxes.replace(running, lease="not held", effects=late) is None
    async with store.read() as tx:
        [opened] = await tx.usage.of_sandbox(one.id)
        assert replace(opened, id=period.id) == period
    async with store.write(ORG) as tx:
        paused = replace(running, status=Status.PAUSED, name="ünï '$1' :x %s")
        effects = Effects(stopped, closes_at=ended)
        assert await tx.sandboxes.replace(paused, is_use=True, effects=effects) is not None
    async with store.read() as tx:
        assert await tx.usage.of_sandbox(one.id) == [replace(opened, ended_at=ended)]
        lines = await tx.activity.page(ActivityQuery(ORG, 10, matches={"sandbox_id": one.id}))
    assert sorted(lines, key=by_id) == sorted([made, ran, stopped], key=by_id)
    with pytest.raises(AlreadyExistsError):
        async with store.write(ORG) as tx:
            double = sandbox(name=paused.name)
            await tx.sandboxes.insert(double, effects=Effects(line_of(double)))
    assert not await exists(store, double.id)


async def test_any_number_of_periods_is_charged_at_once(store: Store) -> None:
    one = sandbox(status=Status.RUNNING)
    await insert(store, one)
    async with store.write(ORG) as tx:
        await tx.usage.open(UsagePeriod(one.id, ORG, 1, one.shape, NOW))
        [period] = await tx.usage.of_sandbox(one.id)
        others = [replace(period, id=period.id + number) for number in range(1, 12_000)]
        await tx.usage.charge([*others, replace(period, posted=7)])
        assert await tx.usage.of_sandbox(one.id) == [replace(period, posted=7)]


async def test_a_period_ends_no_earlier_than_it_began(store: Store) -> None:
    one = sandbox(status=Status.RUNNING)
    await insert(store, one)
    async with store.write(ORG) as tx:
        await tx.usage.open(UsagePeriod(one.id, ORG, 1, one.shape, NOW))
        effects = Effects(closes_at=NOW - SECOND)
        assert await tx.sandboxes.replace(replace(one, status=Status.PAUSED), effects=effects)
        [period] = await tx.usage.of_sandbox(one.id)
    assert period.ended_at == NOW


async def test_a_row_that_is_behind_goes_on_from_where_its_node_is(store: Store) -> None:
    one = sandbox()
    await insert(store, one)
    async with store.write(ORG) as tx:
        assert await tx.sandboxes.catch_up(one, version=9, incarnation=3)
    later = await find(store, one.id)
    assert (later.version, later.incarnation, later.status) == (9, 3, one.status)
    async with store.write(ORG) as tx:
        assert not await tx.sandboxes.catch_up(one, version=12, incarnation=4)
        assert await tx.sandboxes.replace(one) is None
        assert await tx.sandboxes.replace(later) is not None


async def test_a_transaction_is_all_or_nothing(store: Store) -> None:
    one = sandbox()
    with pytest.raises(RuntimeError):
        async with store.write(Turn.ALONE) as tx:
            await tx.sandboxes.insert(one)
            raise RuntimeError
    async with store.read() as tx:
        assert await tx.sandboxes.find(one.id) is None


async def test_fifty_writers_lose_no_update(store: Store) -> None:
    one = sandbox(incarnation=0)
    await insert(store, one)

    async def bump() -> None:
        for _ in range(3):
            async with store.write(ORG) as tx:
                found = await tx.sandboxes.find(one.id)
                assert found is not None
                changed = replace(found, incarnation=found.incarnation + 1)
                assert await tx.sandboxes.replace(changed) is not None

    async with asyncio.TaskGroup() as tasks:
        for _ in range(50):
            tasks.create_task(bump())
    assert (await find(store, one.id)).incarnation == 150


async def test_those_that_are_gone_are_not_read_through_for_those_that_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As SQLite plans it, which uses a partial index only where the statement spells it out."""
    path, statements = tmp_path / "sandyard.db", list[tuple[str, Any]]()
    fetch = Prepared.fetch

    def note(_c: object, _cursor: object, statement: str, values: Any, *_: object) -> None:
        statements.append((statement, values))

    def noted(self: Prepared, connection: sqlite3.Connection, values: Values) -> Any:
        plan = self.plan(SQLITE, values)
        statements.append((plan.text, plan.bound(values)))
        return fetch(self, connection, values)

    monkeypatch.setattr(Prepared, "fetch", noted)
    async with open_store(f"sqlite:///{path}", key=KEY) as store:
        event.listen(Engine, "before_cursor_execute", note)
        try:
            async with store.read() as tx:
                await tx.sandboxes.page(SandboxQuery("org", limit=10))
                running = frozenset({Status.RUNNING})
                await tx.sandboxes.page(SandboxQuery("org", limit=10, statuses=running))
                await tx.sandboxes.named("n", limit=2)
                await tx.sandboxes.mounting("w")
        finally:
            event.remove(Engine, "before_cursor_execute", note)
    asked = [one for one in statements if "FROM sandboxes" in one[0]]
    assert len(asked) == 4
    with closing(sqlite3.connect(path)) as plain:
        for statement, values in asked:
            plan = [row[3] for row in plain.execute(f"EXPLAIN QUERY PLAN {statement}", values)]
            (how,) = (one for one in plan if " sandboxes" in one)
            assert how.startswith("SEARCH"), f"{how}\n{statement}"
            assert "ix_sandboxes_org_created" not in how, f"{how}\n{statement}"


async def test_how_the_sandboxes_of_a_node_stand(store: Store) -> None:
    why, gone = Reason("code", "message"), frozenset({Status.RUNNING, Status.PAUSED})
    here = sandbox(
        status=Status.PAUSED, node_id="n", reason=why, version=3, incarnation=2,
        expires_at=NOW, pauses_at_end=True, started_at=NOW, env={"secret": "x"},
    )  # fmt: skip
    plain = sandbox(status=Status.RUNNING, node_id="n")
    over, later = sandbox(expires_at=NOW), sandbox(expires_at=NOW + timedelta(seconds=1))
    paused = sandbox(expires_at=NOW, lives_s=1, pauses_at_end=True)
    await insert(
        store, here, plain, over, later, paused, sandbox(status=Status.RUNNING, node_id="m"),
        sandbox(status=Status.FAILED, node_id="n"), sandbox(), sandbox(expires_at=NOW, node_id="n"),
    )  # fmt: skip
    async with store.write(Turn.SHARED) as tx:
        await tx.activity.touch(plain.id, at=NOW, kind="k")
    async with store.read() as tx:
        found = {one.id: one for one in await tx.sandboxes.standing("n", gone, known={})}
        assert set(found) == {here.id, plain.id}
        for one in found.values():
            whole = await tx.sandboxes.find(one.id)
            assert vars(one) == {name: getattr(whole, name) for name in vars(one)}
        assert found[here.id].reason == why
        assert found[plain.id].last_activity_at == NOW
        (ended,) = await tx.sandboxes.unplaced_until(NOW, frozenset({Status.PENDING}))
        assert ended.id == over.id
        assert await tx.sandboxes.unplaced_until(NOW, gone) == []


@pytest.mark.parametrize("count", [3, 60])
async def test_what_is_known_of_a_nodes_sandboxes_is_not_read_again(
    store: Store, count: int
) -> None:
    both = frozenset({Status.RUNNING, Status.PAUSED})
    paused = [sandbox(status=Status.PAUSED, node_id="n") for _ in range(count)]
    moves, runs, goes, used = (sandbox(status=Status.RUNNING, node_id="n") for _ in range(4))
    await insert(store, *paused, moves, runs, goes, used)

    async def standing(known: Mapping[str, Standing]) -> dict[str, Standing]:
        async with store.read() as tx:
            found = await tx.sandboxes.standing("n", both, known=known)
            assert len({one.id for one in found}) == len(found)
            for one in found:
                whole = await tx.sandboxes.find(one.id)
                if one.reason is None or one.reason.code != "as it is known":
                    assert vars(one) == {name: getattr(whole, name) for name in vars(one)}
            return {one.id: one for one in found}

    first = await standing({})
    assert first == await standing(first)
    is_known = {one: replace(first[one], reason=Reason("as it is known", "")) for one in first}
    async with store.write(Turn.SHARED) as tx:
        await tx.activity.touch(used.id, at=NOW, kind="k")
    async with store.write(ORG) as tx:
        for one in (moves, *paused[1:]):
            written = replace(one, incarnation=7, status=Status.PAUSED)
            assert await tx.sandboxes.replace(written)
        assert await tx.sandboxes.replace(replace(goes, status=Status.DESTROYED))
    found = await standing(is_known)
    assert set(found) == {one.id for one in (*paused, moves, runs, used)}
    assert found[used.id].last_activity_at == NOW
    assert {found[one.id].incarnation for one in (moves, *paused[1:])} == {7}
    # Where much has changed, to read all is the least.
    assert (found[paused[0].id] is is_known[paused[0].id]) is (count < 50)
    assert await standing(found) == found


async def test_an_organization_waits_for_its_own_writers_and_for_whoever_writes_alone(
    store: Store, url: str
) -> None:
    is_shared = url.startswith("postgresql")
    begun: list[Turn | str] = []

    async def write(by: Store, turn: Turn | str) -> None:
        async with by.write(turn):
            begun.append(turn)

    async with open_store(url, key=KEY) as peer, asyncio.TaskGroup() as tasks:
        async with store.write(ORG):
            for turn in (ORG, OTHER, Turn.SHARED) if is_shared else (ORG,):
                tasks.create_task(write(peer, turn))
            if is_shared:
                await until(lambda: len(begun) == 2)
                tasks.create_task(write(store, OTHER))
                await until(lambda: len(begun) == 3)
            alone = tasks.create_task(write(peer, Turn.ALONE))
            await asyncio.wait([alone], timeout=0.2)
            assert ORG not in begun
            assert not alone.done()
        await until(lambda: {ORG, Turn.ALONE} <= set(begun))
        async with store.write(Turn.ALONE):
            begun.clear()
            for turn in (ORG, Turn.SHARED, Turn.ALONE):
                tasks.create_task(write(peer, turn))
            await asyncio.wait([asyncio.create_task(asyncio.sleep(0.2))])
            assert begun == []


async def test_a_turn_sees_what_was_committed_while_it_waited(store: Store, url: str) -> None:
    one = sandbox(incarnation=0)
    await insert(store, one)

    async def bump(by: Store) -> None:
        async with by.write(ORG) as tx:
            found = await tx.sandboxes.find(one.id)
            assert found is not None
            changed = replace(found, incarnation=found.incarnation + 1)
            assert await tx.sandboxes.replace(changed) is not None

    async with open_store(url, key=KEY) as peer, asyncio.TaskGroup() as tasks:
        for _ in range(20):
            tasks.create_task(bump(store))
            tasks.create_task(bump(peer))
    assert (await find(store, one.id)).incarnation == 40


async def test_processes_lose_nothing_of_each_others(store: Store, url: str) -> None:
    times = 20
    async with asyncio.timeout(60):
        writers = [
            await asyncio.create_subprocess_exec(
                sys.executable, "-m", "tests.support.writer", url, str(times), KEY.decode()
            )
            for _ in range(2)
        ]
        assert [await one.wait() for one in writers] == [0, 0]
    async with store.read() as tx:
        giver, taker = [await tx.credits.account(one.id) for one in await tx.organizations.every()]
    assert (giver.balance_cents, taker.balance_cents) == (-2 * times, 2 * times)
    assert (giver.used_cents, taker.used_cents) == (2 * times, 2 * times)


def _message(kind: bytes, body: bytes) -> bytes:
    """Return a message of PostgreSQL's protocol."""
    return kind + struct.pack("!I", len(body) + 4) + body


@pytest.mark.postgres
async def test_a_server_that_is_suspended_within_a_statement_blocks_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """No limit of PostgreSQL's own applies to it: see `store._suspended`."""
    monkeypatch.setattr(store_module, "_SUSPENDED_S", 1)
    monkeypatch.setattr(store_module, "_LOOK_S", 0.1)
    async with postgres_url() as url, open_store(url, key=KEY) as store:
        await furnish(store)
        parts = urlsplit(url)
        reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
        named = {"user": parts.username or "", "database": parts.path[1:]}
        named |= {"application_name": "sandyard", "options": "-c statement_timeout=500"}
        words = b"".join(f"{one}\0{value}\0".encode() for one, value in named.items()) + b"\0"
        writer.write(_message(b"", struct.pack("!I", 196608) + words))
        begin = f"BEGIN; {store_module._locks(ORG)}\0"
        writer.write(_message(b"Q", begin.encode()))
        async with asyncio.timeout(20):
            while not (await reader.read(65536)).endswith(b"Z\0\0\0\x05T"):
                pass
        # A statement without its values: parse, describe, flush.
        writer.write(_message(b"P", b"s\0SELECT 1\0\0\0") + _message(b"D", b"Ss\0"))
        writer.write(_message(b"H", b""))
        await writer.drain()
        async with asyncio.timeout(20), asyncio.TaskGroup() as tasks:

            async def pinging() -> None:
                while True:
                    await store.ping()
                    await asyncio.sleep(0.1)

            looking = tasks.create_task(pinging())
            async with store.write(ORG) as tx:
                await tx.sandboxes.insert(sandbox())
            looking.cancel()
        assert "of a server that is suspended" in caplog.text
        writer.close()


@pytest.mark.postgres
async def test_what_somebody_writes_now_is_left_to_the_next_claim() -> None:
    pending = frozenset({Status.PENDING})
    async with postgres_url() as url, open_store(url, key=KEY) as store:
        await furnish(store)
        written, other = sandbox(), sandbox()
        await insert(store, written, other)

        async def claimed(lease: str) -> list[str]:
            async with store.write(Turn.SHARED) as tx:
                found = await tx.leases.claim(pending, hold=held(lease), limit=9)
            return [one.sandbox.id for one in found]

        async with store.write(ORG) as tx:
            assert await tx.sandboxes.replace(written) is not None
            assert await claimed("a") == [other.id]
        assert await claimed("b") == [written.id]


@pytest.mark.postgres
async def test_two_who_forget_the_same_do_not_wait_for_each_other() -> None:
    async with postgres_url() as url, open_store(url, key=KEY) as store:
        await furnish(store)
        async with store.write(ORG) as tx:
            for number in range(3):
                await tx.tickets.put(Ticket(str(number), "k", ORG, "sb", "me", "", NOW))
                await tx.requests.add(
                    RequestKey(ORG, USER, "r", str(number)), KeyedRequest("d", ()), at=NOW
                )
        later = NOW + timedelta(seconds=1)
        async with store.write(ORG) as tx, store.write(OTHER) as other:
            await tx.tickets.forget(before=later)
            await tx.requests.forget(before=later)
            await other.tickets.forget(before=later)
            await other.requests.forget(before=later)
        async with store.read() as tx:
            assert await tx.tickets.find("1") is None
            assert await tx.requests.find(RequestKey(ORG, USER, "r", "1")) is None


@pytest.mark.postgres
async def test_a_turn_that_does_not_come_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POSTGRES, "connect_args", {"server_settings": {"lock_timeout": "100"}})
    async with AsyncExitStack() as held:
        url = await held.enter_async_context(postgres_url())
        store = await held.enter_async_context(open_store(url, key=KEY))
        peer = await held.enter_async_context(open_store(url, key=KEY))
        async with store.write(ORG):
            with pytest.raises(UnavailableError):
                async with peer.write(ORG):
                    pass
        async with peer.write(ORG):
            pass


@pytest.mark.postgres
async def test_a_server_that_stands_still_within_a_statement_loses_its_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(
        POSTGRES, "connect_args", {"server_settings": {"statement_timeout": "1000"}}
    )
    async with postgres_url() as url, open_store(url, key=KEY) as store:
        with pytest.raises(UnavailableError):
            async with store.write(ORG) as tx:
                # Another statement than ever before: it is prepared, and not executed.
                reading = asyncio.create_task(tx.sandboxes.page(SandboxQuery(ORG, limit=10)))
                await asyncio.sleep(0)
                time.sleep(3)
                await reading
        async with store.write(ORG):
            pass


async def connections_of(url: str, *, end: bool = False) -> list[str]:
    """Return the states of a database's connections, or end them all."""
    admin = await asyncpg.connect(url.rpartition("/")[0] + "/postgres")
    try:
        what = "pg_terminate_backend(pid)" if end else "state"
        found = await admin.fetch(
            f"SELECT {what} FROM pg_stat_activity "
            "WHERE datname = $1 AND backend_type = 'client backend'",
            url.rpartition("/")[2],
        )
        return [row[0] for row in found]
    finally:
        await admin.close()


@asynccontextmanager
async def tls(url: str, folder: Path) -> AsyncIterator[tuple[Path, Path]]:
    """Have the server offer TLS, as `localhost`; yield its authority, and one that is another's."""
    now = datetime.now(UTC)
    ours, other = (Authority.new(new_uuid(), now) for _ in range(2))
    for name, one in (("ours", ours), ("other", other)):
        (folder / name).write_bytes(one.certificate)
    key, request = new_request()
    admin = await asyncpg.connect(url)
    try:
        data = Path(await admin.fetchval("SHOW data_directory"))
        for name, content in (
            ("server.key", key), ("server.crt", ours.sign_server(request, "x", ["localhost"], now)),
        ):  # fmt: skip
            (data / name).write_bytes(content)
            (data / name).chmod(0o600)
            os.chown(data / name, data.stat().st_uid, data.stat().st_gid)
        await admin.execute("ALTER SYSTEM SET ssl = on")
        await admin.execute("SELECT pg_reload_conf()")
        yield folder / "ours", folder / "other"
        await admin.execute("ALTER SYSTEM RESET ssl")
        await admin.execute("SELECT pg_reload_conf()")
    finally:
        await admin.close()


@pytest.mark.postgres
async def test_tls_is_verified_as_the_url_says(tmp_path: Path) -> None:
    async def opens(url: str) -> bool:
        async with open_store(url, key=KEY) as store:
            await store.ping()
            engine = store.engine  # type: ignore[attr-defined]
            async with engine.connect() as connection:
                query = text("SELECT ssl FROM pg_stat_ssl WHERE pid = pg_backend_pid()")
                return bool((await connection.execute(query)).scalar())

    async with postgres_url() as url, tls(url, tmp_path) as (ours, other):
        named = url.replace("127.0.0.1", "localhost")

        async def is_on() -> bool:
            return await opens(f"{url}?sslmode=prefer")

        await eventually(is_on)
        assert not await opens(f"{url}?sslmode=disable")
        for good in (
            f"{url}?sslmode=require", f"{url}?sslmode=verify-ca&sslrootcert={ours}",
            f"{named}?sslmode=verify-full&sslrootcert={ours}",
        ):  # fmt: skip
            assert await opens(good), good
        for bad in (
            f"{url}?sslmode=verify-full&sslrootcert={ours}",  # it is not called so
            f"{named}?sslmode=verify-full&sslrootcert={other}",
            f"{named}?sslmode=verify-full",  # the system does not know it
            f"{named}?sslmode=require&sslrootcert={other}",
            f"{named}?sslrootcert={other}",
        ):
            with pytest.raises(UnavailableError, match="cannot trust the database's certificate"):
                await opens(bad)
        with pytest.raises(UnavailableError, match="cannot use sslrootcert="):
            await opens(f"{named}?sslmode=verify-full&sslrootcert={tmp_path}/none")
        with pytest.raises(InternalError, match="sslmode is one of"):
            await opens(f"{url}?sslmode=sometimes")
        with pytest.raises(InternalError, match="needs sslrootcert"):
            await opens(f"{url}?sslmode=verify-ca")
        # pg_dump is given what the server goes by.
        found = environment_of(f"{named}?sslrootcert={ours}")
        assert (found["PGSSLMODE"], found["PGSSLROOTCERT"]) == ("verify-ca", str(ours))
        assert "PGSSLROOTCERT" in environment_of(f"{named}?sslmode=verify-full")
        assert "PGSSLMODE" not in environment_of(url)


class Cable:
    """What lies between a server and its database; while it is cut, nothing passes."""

    def __init__(self) -> None:
        self.is_whole = asyncio.Event()
        self.is_whole.set()

    @asynccontextmanager
    async def to(self, url: str) -> AsyncIterator[str]:
        """Yield the URL of the same database, by way of this cable."""
        port = make_url(url).port

        async def carry(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
            while data := await source.read(65536):
                await self.is_whole.wait()
                target.write(data)
            target.close()

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await self.is_whole.wait()
            its_reader, its_writer = await asyncio.open_connection("127.0.0.1", port)
            with suppress(ConnectionError):
                await asyncio.gather(carry(reader, its_writer), carry(its_reader, writer))
            for one in (writer, its_writer):
                one.close()

        async with await asyncio.start_server(serve, "127.0.0.1", 0) as server:
            own = server.sockets[0].getsockname()[1]
            yield url.replace(f":{port}/", f":{own}/")
            self.is_whole.set()


@pytest.mark.postgres
async def test_without_an_answer_to_a_ping_nothing_waits_for_the_database(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    cable = Cable()
    async with AsyncExitStack() as held:
        url = await held.enter_async_context(postgres_url())
        cut = await held.enter_async_context(cable.to(url))
        peer = await held.enter_async_context(open_store(url, key=KEY))
        store = await held.enter_async_context(open_store(cut, key=KEY))
        await furnish(store)
        await store.ping()

        async def read() -> None:
            async with store.read() as tx:
                await tx.organizations.every()

        async def glance() -> None:
            async with store.glance() as tx:
                await tx.sandboxes.find("x")

        async def write() -> None:
            async with store.write(ORG) as tx:
                await tx.facts.moment("x")

        await asyncio.gather(*(read() for _ in range(3)))
        cable.is_whole.clear()
        # More than there are connections: some wait for one, some for their turn.
        works = [one() for _ in range(20) for one in (read, glance, write)]
        waiting = [asyncio.create_task(one) for one in works]
        await asyncio.sleep(0)
        with monkeypatch.context() as patched, pytest.raises(UnavailableError):
            patched.setattr(store_module, "_PING_S", PING_S)
            await store.ping()
        assert "the database does not answer; failing what waits for it" in caplog.messages
        async with asyncio.timeout(9):  # one turn alone is waited for for ten seconds
            outcomes = await asyncio.gather(*waiting, return_exceptions=True)
            assert {type(one) for one in outcomes} == {UnavailableError}
            for late in (read, glance, write):
                with pytest.raises(UnavailableError):
                    await late()
        cable.is_whole.set()
        await store.ping()
        for again in (read, glance, write):
            await again()
        async with peer.write(ORG):
            pass


@pytest.mark.postgres
async def test_a_host_that_stood_still_does_not_take_the_database_for_silent(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cable = Cable()
    async with AsyncExitStack() as held:
        url = await held.enter_async_context(
            cable.to(await held.enter_async_context(postgres_url()))
        )
        store = await held.enter_async_context(open_store(url, key=KEY))
        await furnish(store)
        await store.ping()
        monkeypatch.setattr(store_module, "_PING_S", PING_S)
        cable.is_whole.clear()
        pinging = asyncio.create_task(store.ping())
        for _ in range(10):  # it is sent
            await asyncio.sleep(0)
        time.sleep(PING_S + 0.2)
        cable.is_whole.set()
        await pinging


@pytest.mark.postgres
async def test_connections_that_were_ended_cost_nobody_anything() -> None:
    async with postgres_url() as url, open_store(url, key=KEY) as store:

        async def look() -> None:
            async with store.read() as tx:
                await tx.organizations.every()
                await asyncio.sleep(0.05)

        async with asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(look())
        assert len(await connections_of(url, end=True)) >= 8
        async with asyncio.TaskGroup() as tasks:
            for _ in range(8):
                tasks.create_task(look())
        await connections_of(url, end=True)
        async with store.write(Turn.ALONE) as tx:
            await tx.organizations.every()
        await connections_of(url, end=True)
        async with store.glance() as tx:
            assert await tx.sandboxes.find(new_sandbox_id()) is None
        with pytest.raises(UnavailableError):  # what was under way is not begun again
            async with store.write(Turn.ALONE) as tx:
                await connections_of(url, end=True)
                await tx.organizations.every()


@pytest.mark.postgres
async def test_a_database_that_says_nothing_is_not_waited_for_without_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(POSTGRES, "connect_args", {"command_timeout": 3})
    async with postgres_url() as url, open_store(url, key=KEY) as store:
        await furnish(store)
        one = sandbox()
        await insert(store, one)
        other = await asyncpg.connect(url)
        try:
            await other.execute("BEGIN; LOCK TABLE sandboxes")
            with pytest.raises(UnavailableError):
                await find(store, one.id)
            with pytest.raises(UnavailableError):
                async with store.glance() as tx:
                    await tx.sandboxes.find(one.id)
            with pytest.raises(UnavailableError):
                async with store.read() as tx:
                    await tx.sandboxes.page(SandboxQuery(ORG, limit=1))
            with pytest.raises(UnavailableError):
                await insert(store, sandbox())
        finally:
            await other.close()
        assert (await find(store, one.id)).id == one.id
        async with store.read() as tx:
            assert len(await tx.sandboxes.page(SandboxQuery(ORG, limit=9))) == 1


@pytest.mark.postgres
async def test_a_schema_that_others_change_meanwhile_is_seen_at_the_next_try() -> None:
    """As when one control plane is newer, and the other is still at work."""
    async with postgres_url() as url, open_store(url, key=KEY) as store:
        await furnish(store)
        one = sandbox()
        await insert(store, one)

        async def looked() -> Sandbox | None:
            async with store.read() as tx:
                return await tx.sandboxes.find(one.id)

        assert await looked()
        other = await asyncpg.connect(url)
        try:
            await other.execute("ALTER TABLE sandboxes ALTER COLUMN version TYPE bigint")
            await other.execute("ALTER TABLE sandboxes ADD COLUMN later integer DEFAULT 7")
        finally:
            await other.close()
        with pytest.raises(UnavailableError):
            await looked()
        assert await looked()
        async with store.glance() as tx:
            assert await tx.sandboxes.find(one.id)


@pytest.mark.postgres
async def test_a_connection_that_ends_before_the_commit_is_told_as_such() -> None:
    async with postgres_url() as url, open_store(url, key=KEY) as store:
        await furnish(store)
        with pytest.raises(UnavailableError, match="outcome is unknown"):
            async with store.write(ORG) as tx:
                await tx.sandboxes.insert(sandbox())
                await connections_of(url, end=True)
        async with store.read() as tx:
            assert await tx.sandboxes.on_node(None, frozenset(Status)) == []


@pytest.mark.postgres
@pytest.mark.parametrize("succeeds", [False, True])
async def test_what_is_broken_off_is_done_or_not_and_leaves_no_transaction_open(
    succeeds: bool,
) -> None:
    async with (
        postgres_url() as url,
        open_store(url, key=KEY) as store,
        open_store(url, key=KEY) as peer,
    ):
        await furnish(store)
        for within in [one / 2000 for one in range(24)] * 2:
            pair = sandbox(), sandbox()

            async def work(pair: tuple[Sandbox, Sandbox] = pair) -> None:
                async with store.write(ORG) as tx:
                    await tx.sandboxes.insert(pair[0])
                    await asyncio.sleep(0)
                    await tx.sandboxes.insert(pair[1])
                    if not succeeds:
                        raise ZeroDivisionError

            doing = asyncio.create_task(work())
            await asyncio.sleep(within)
            doing.cancel()
            with suppress(asyncio.CancelledError, ZeroDivisionError):
                await doing
            async with asyncio.timeout(5), peer.write(ORG) as tx:  # nobody has the turn any more
                there = [await tx.sandboxes.find(one.id) is not None for one in pair]
            assert there[0] == there[1]
            assert succeeds or not there[0]
            if not doing.cancelled() and succeeds:
                assert there[0]

        async def is_idle() -> bool:
            return set(await connections_of(url)) <= {"idle"}

        await eventually(is_idle)


async def test_the_time_of_leases_is_the_databases_own(store: Store, url: str) -> None:
    """Of two servers whose clocks are hours apart neither takes what the other holds."""
    pending = frozenset({Status.PENDING})
    ahead = AheadClock()
    ahead.ahead = timedelta(hours=1)
    one = sandbox()
    async with store.write(ORG) as tx:
        await tx.sandboxes.insert(one, hold=held("a"))
    if url.startswith("postgresql"):  # SQLite's writers are on one host, and go by its clock
        async with (
            open_store(url, key=KEY, clock=ahead) as peer,
            peer.write(Turn.SHARED) as tx,
        ):
            assert not await tx.leases.waits(pending)
            assert await tx.leases.claim(pending, hold=held("b"), limit=9) == []
    async with store.write(ORG) as tx:
        assert await tx.leases.extend(one.id, lease="a", lasts=timedelta(milliseconds=30))

    async def waits() -> bool:
        async with store.read() as tx:
            return await tx.leases.waits(pending)

    await eventually(waits)


async def test_no_two_workers_hold_the_same_sandbox(store: Store) -> None:
    await insert(store, *(sandbox() for _ in range(40)))
    claimed: list[str] = []

    async def work(number: int) -> None:
        while True:
            async with store.write(Turn.SHARED) as tx:
                found = await tx.leases.claim(
                    frozenset({Status.PENDING}), hold=held(f"w{number}"), limit=3
                )
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
    pending = frozenset({Status.PENDING})
    async with store.write(Turn.ALONE) as tx:
        assert await tx.leases.waits(pending | {Status.CREATING})
        assert not await tx.leases.waits(frozenset({Status.CREATING}))
        (claim,) = await tx.leases.claim(pending, hold=held("a"), limit=9)
        assert not await tx.leases.waits(pending)
        assert await tx.sandboxes.replace(claim.sandbox, lease="b") is None
        kept = await tx.sandboxes.replace(claim.sandbox, lease="a")
        assert kept is not None
        assert await tx.leases.claim(pending, hold=held("b"), limit=9) == []
        assert await tx.leases.extend(one.id, lease="a", lasts=OVER)
        assert await tx.leases.waits(pending)
        # Until somebody takes it, one that ran out is still whose it was.
        assert await tx.leases.extend(one.id, lease="a", lasts=HALF_A_MINUTE)
        assert not await tx.leases.waits(pending)
        assert await tx.leases.extend(one.id, lease="a", lasts=OVER)
        assert await tx.leases.claim(pending, hold=held("b"), limit=9)
        assert not await tx.leases.extend(one.id, lease="a", lasts=HALF_A_MINUTE)
        assert await tx.leases.extend(one.id, lease="b", lasts=None)
        assert await tx.leases.claim(pending, hold=held("c"), limit=9)
        # A change without a lease (the owner's) takes it from whoever holds it.
        assert await tx.sandboxes.replace(kept) is not None
        assert not await tx.leases.extend(one.id, lease="c", lasts=HALF_A_MINUTE)


async def test_the_leases_of_one_server_end_and_those_of_its_peers_stay(store: Store) -> None:
    mine, other = sandbox(), sandbox()
    pending = frozenset({Status.PENDING})
    async with store.write(Turn.ALONE) as tx:
        await tx.sandboxes.insert(mine, hold=Hold("one", "a", HALF_A_MINUTE))
        await tx.sandboxes.insert(other, hold=Hold("two", "b", HALF_A_MINUTE))
        assert await tx.leases.claim(pending, hold=held("c"), limit=9) == []
        await tx.leases.void("one")
        claimed = await tx.leases.claim(pending, hold=held("c"), limit=9)
        assert [one.sandbox.id for one in claimed] == [mine.id]
        assert not await tx.leases.extend(mine.id, lease="a", lasts=OVER)
        assert await tx.leases.extend(other.id, lease="b", lasts=OVER)


async def test_a_reader_sees_everything_as_of_one_moment(store: Store) -> None:
    one, other = sandbox(), sandbox()
    await insert(store, one, other)
    async with store.read() as tx:
        before = await tx.sandboxes.find(one.id)
        async with store.write(Turn.ALONE) as writing:
            for which in (one, other):
                await writing.sandboxes.replace(replace(which, status=Status.FAILED))
        after = await tx.sandboxes.find(other.id)
        assert before is not None
        assert after is not None
        assert (before.status, after.status) == (Status.PENDING, Status.PENDING)
    assert (await find(store, other.id)).status is Status.FAILED


async def test_several_bring_a_new_database_up_to_date_at_once(new_url: str) -> None:
    async def open_one() -> None:
        async with open_store(new_url, key=KEY) as opened:
            await opened.ping()

    async with asyncio.TaskGroup() as tasks:
        for _ in range(4):
            tasks.create_task(open_one())


async def test_the_store_tells_the_time(store: Store) -> None:
    before = SystemClock().now()
    async with store.read() as tx:
        now = await tx.facts.now()
    assert before - timedelta(seconds=1) < now < SystemClock().now() + timedelta(seconds=1)


async def test_nodes_are_known_by_when_they_were_heard_of(store: Store) -> None:
    later = NOW + timedelta(seconds=5)
    async with store.write(Turn.ALONE) as tx:
        assert await tx.nodes.find("n") is None
        await tx.nodes.heard({"n"}, NOW)
        await tx.nodes.heard({"n", "o"}, later)
        await tx.nodes.heard({"m"}, NOW)
        assert await tx.nodes.find("o") == NodeSeen("o", later, later)
        assert await tx.nodes.find("n") == NodeSeen("n", NOW, later)
        assert await tx.nodes.find("m") is not None


async def test_a_snapshot_is_held_while_it_is_made(store: Store) -> None:
    shot = Snapshot(
        id=new_uuid(), org_id=ORG, owner_user_id=USER, sandbox_id=new_sandbox_id(), node_id="n",
        name=None, template="t", os=None, shape=Shape(1, 512, 1024), is_ready=False,
        is_hidden=False, size_bytes=0, created_at=NOW, held_until=NOW + timedelta(seconds=1),
    )  # fmt: skip
    until = NOW + timedelta(seconds=9)
    async with store.write(Turn.ALONE) as tx:
        await tx.snapshots.insert(shot)
        assert await tx.snapshots.extend(shot.id, held_until=until)
        (found,) = await tx.snapshots.on_node("n")
        assert (found.is_made(NOW), found.is_made(until)) == (True, False)
        assert await tx.snapshots.complete(shot.id, size_bytes=7)
        found = await tx.snapshots.find(ORG, shot.id) or shot
        assert (found.is_made(NOW), found.size_bytes, found.held_until) == (False, 7, None)
        other = replace(shot, id=new_uuid(), name="other")
        await tx.snapshots.insert(other)
        await tx.snapshots.rename(other.id, None)
        await tx.snapshots.rename(shot.id, "other")
        names = {one.id: one.name for one in await tx.snapshots.on_node("n")}
        assert names == {shot.id: "other", other.id: None}
        await tx.snapshots.remove(other.id, at=NOW)
        await tx.snapshots.forget([other.id])
        assert await tx.snapshots.remove(shot.id, at=NOW)
        assert not await tx.snapshots.extend(shot.id, held_until=until)
        assert not await tx.snapshots.remove(shot.id, at=NOW)
    async with store.write(Turn.ALONE) as tx:
        assert await tx.snapshots.removed("n") == {shot.id: NOW}
        assert await tx.snapshots.removed("m") == {}
        await tx.snapshots.forget([new_uuid()])
        assert await tx.snapshots.removed("n") == {shot.id: NOW}
        await tx.snapshots.forget([shot.id])
        assert await tx.snapshots.removed("n") == {}


async def test_a_keyed_request_can_be_forgotten(store: Store) -> None:
    key, made = RequestKey(ORG, USER, "POST /x", "k"), KeyedRequest("d", ("a", "b"))
    async with store.write(Turn.ALONE) as tx:
        await tx.requests.add(key, made, at=NOW)
        await tx.requests.add(replace(key, key="other"), made, at=NOW)
        assert await tx.requests.find(key) == made
        await tx.requests.remove(key)
        assert await tx.requests.find(key) is None
        await tx.requests.forget(before=NOW)
        assert await tx.requests.find(replace(key, key="other")) == made
        await tx.requests.forget(before=NOW + timedelta(seconds=1))
        assert await tx.requests.find(replace(key, key="other")) is None


async def test_a_status_of_a_newer_server_hides_one_sandbox_and_no_other(
    store: Store, url: str
) -> None:
    one, other = sandbox(node_id="n"), sandbox(node_id="n")
    await insert(store, one, other)
    newer = (
        "PRAGMA ignore_check_constraints=1"
        if url.startswith("sqlite")
        else "ALTER TABLE sandboxes DROP CONSTRAINT ck_sandboxes_status"
    )
    changed = f"UPDATE sandboxes SET status = 'hibernated' WHERE id = '{other.id}'"
    await run_sql(url, newer, changed)
    async with store.read() as tx:
        assert [found.id for found in await tx.sandboxes.page(SandboxQuery(ORG, limit=9))] == [
            one.id
        ]
        assert [found.id for found in await tx.sandboxes.on_node("n", frozenset(Status))] == [
            one.id
        ]
        with pytest.raises(UnavailableError, match=other.id):
            await tx.sandboxes.find(other.id)


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
    assert await count(is_test=True) == 0
    every = {
        "statuses": frozenset({Status.PENDING, Status.FAILED}), "tags": ("b", "a"),
        "owner_user_id": USER, "project_id": PROJECT, "is_test": False, "template": "x",
        "exclude_template": "y",
    }  # fmt: skip
    assert await count(**every, after=(NOW + timedelta(days=1), "")) == 1
    assert await count(**every, after=(NOW - timedelta(days=1), "")) == 0
    async with store.read() as tx:
        assert await tx.sandboxes.page(SandboxQuery(org_id=OTHER, limit=9)) == []


async def test_at_most_one_usage_period_is_open(store: Store) -> None:
    one = sandbox()
    await insert(store, one)
    period = UsagePeriod(one.id, ORG, 1, one.shape, NOW)
    async with store.write(Turn.ALONE) as tx:
        await tx.usage.open(period)
    with pytest.raises(InternalError):
        async with store.write(Turn.ALONE) as tx:
            await tx.usage.open(period)
    async with store.write(Turn.ALONE) as tx:
        # A clock that was set back cannot make a period of negative length.
        assert await tx.usage.close(one.id, NOW - timedelta(hours=1))
        assert not await tx.usage.close(one.id, NOW)
        assert await tx.usage.of_sandbox(one.id) == [replace(period, ended_at=NOW, id=1)]


async def test_activity_is_kept_and_use_is_noted(store: Store) -> None:
    one = sandbox()
    await insert(store, one)
    line = line_of(one)
    async with store.write(Turn.ALONE) as tx:
        await tx.activity.append(line)
        await tx.activity.touch(one.id, at=NOW, kind="exec")
        query = ActivityQuery(ORG, 10, matches={"sandbox_id": one.id})
        assert await tx.activity.page(query) == [line]
        assert await tx.activity.page(replace(query, seen_by=USER)) == [line]
        assert await tx.activity.page(replace(query, seen_by=new_uuid())) == []
        assert await tx.activity.page(replace(query, org_id=OTHER)) == []
        assert await tx.activity.page(replace(query, after=(NOW, line.id))) == []
        assert await tx.activity.page(replace(query, until=NOW)) == []
    found = await find(store, one.id)
    assert (found.last_activity_at, found.last_activity_kind) == (NOW, "exec")
    assert found.version == one.version


async def test_keys_are_found_by_digest_with_their_owners_role(store: Store) -> None:
    key = ApiKey(
        id=new_uuid(), org_id=ORG, owner_user_id=USER, name="k", prefix="rt_live_abcd",
        digest=digest_of_key("secret"), scopes=("sandbox:read",), created_at=NOW,
    )  # fmt: skip
    async with store.write(Turn.ALONE) as tx:
        await tx.keys.add(key)
        holder = await tx.keys.holder(digest_of_key("secret"))
        assert holder is not None
        shown = replace(key, owner_display_name="Me", owner_email="me@example.org")
        assert (holder.key, holder.role, holder.plan) == (shown, "admin", "enterprise")
        assert await tx.keys.holder(digest_of_key("other")) is None
        await tx.keys.touch(key.id, NOW)
        assert await tx.keys.find(OTHER, key.id) is None
        assert await tx.keys.page(ORG, owner_user_id=USER, limit=5) == [
            replace(shown, last_used_at=NOW)
        ]
        await tx.keys.replace(replace(key, revoked_at=NOW))
        holder = await tx.keys.holder(digest_of_key("secret"))
        assert holder is not None
        assert holder.key.revoked_at == NOW
        assert await tx.keys.page(ORG, owner_user_id=None, limit=5) == []
        assert await tx.projects.find(ORG, None) is not None
        assert await tx.projects.find(OTHER, PROJECT) is None
        # A key of somebody who is no longer a member is nobody's.
        assert await tx.users.removed_at(ORG, USER) is None
        assert await tx.users.remove_member(ORG, USER, NOW)
        assert not await tx.users.remove_member(ORG, USER, NOW + timedelta(seconds=1))
        assert await tx.users.removed_at(ORG, USER) == NOW + timedelta(seconds=1)
        assert await tx.keys.holder(digest_of_key("secret")) is None


async def test_a_key_of_ssh_is_an_organizations_once(store: Store) -> None:
    key = SshKey(new_uuid(), ORG, USER, "k", "ssh-ed25519 AA", "SHA256:x", "ssh-ed25519", NOW)
    async with store.write(Turn.ALONE) as tx:
        await tx.ssh_keys.add(key)
        assert await tx.ssh_keys.every(ORG) == [key]
        assert await tx.ssh_keys.find(OTHER, key.id) is None
        assert not await tx.ssh_keys.remove(OTHER, key.id)
    with pytest.raises(AlreadyExistsError):
        async with store.write(Turn.ALONE) as tx:
            await tx.ssh_keys.add(replace(key, id=new_uuid()))
    async with store.write(Turn.ALONE) as tx:
        await tx.ssh_keys.touch(key.id, NOW)
        assert await tx.ssh_keys.find(ORG, key.id) == replace(key, last_used_at=NOW)
        await tx.ssh_keys.add(replace(key, id=new_uuid(), org_id=OTHER))
        assert await tx.ssh_keys.remove(ORG, key.id)


async def test_what_is_in_quarantine_keeps_when_it_was_found(store: Store) -> None:
    one = Quarantined(
        id="sandbox-aaaaaaaaaaaa", kind="machine", node_id="a", incarnation=2, version=5,
        phase="running", template="base-ubuntu", shape=Shape(2, 1024, 10_240), found_at=NOW,
    )  # fmt: skip
    later = NOW + timedelta(hours=1)
    two = replace(
        one, id=new_uuid(), kind="snapshot", node_id="b", found_at=later, size_bytes=2**40
    )
    async with store.write(Turn.ALONE) as tx:
        for machine in (two, one):
            await tx.quarantine.put(machine)
    async with store.read() as tx:
        assert await tx.quarantine.all() == [one, two]
        assert await tx.quarantine.on_node("b") == [two]
    saved = replace(one, phase="paused", version=6, found_at=later, is_unwanted=True)
    async with store.write(Turn.ALONE) as tx:
        await tx.quarantine.put(saved)
        assert await tx.quarantine.on_node("a") == [replace(one, phase="paused", version=6)]
        assert await tx.quarantine.condemn(one.id)
        assert not await tx.quarantine.condemn("sandbox-cccccccccccc")
        await tx.quarantine.put(one)
        assert await tx.quarantine.on_node("a") == [replace(one, is_unwanted=True)]
        again = replace(one, incarnation=3, template="other", found_at=later)
        await tx.quarantine.put(again)
        assert await tx.quarantine.on_node("a") == [again]
        await tx.quarantine.remove([one.id])
        await tx.quarantine.remove([])
        assert await tx.quarantine.all() == [two]


async def test_revoked_keys_are_removed_from_each_sandbox_once_a_start(store: Store) -> None:
    key_id, other = new_uuid(), new_uuid()
    taken = {"ssh_key_ids": (other, key_id), "authorized_keys": ("ssh-ed25519 B", "ssh-ed25519 A")}
    up = sandbox(status=Status.RUNNING, node_id="a", started_at=NOW, incarnation=3, **taken)
    paused = sandbox(status=Status.PAUSED, started_at=NOW, **taken)
    without = sandbox(status=Status.RUNNING, started_at=NOW, ssh_key_ids=(other, ""))
    gone = sandbox(status=Status.DESTROYED, **taken)
    elsewhere = sandbox(org_id=OTHER, **taken)
    await insert(store, up, paused, without, gone, elsewhere)
    # As long as a key may be with its comment.
    line = "ssh-ed25519 A " + "".join(random.choices(string.ascii_letters, k=12_000))
    key = SshKey(key_id, ORG, USER, "k", line, "SHA256:x", "ssh-ed25519", NOW)
    async with store.write(ORG) as tx:
        found = await tx.sandboxes.with_ssh_key(ORG, key_id)
        assert {one.id for one in found} == {up.id, paused.id}
        assert await tx.sandboxes.with_ssh_key(ORG, "%") == []
        for one in (up, paused, gone):
            await tx.revoked_keys.add(one.id, key)
    pending = RevokedKey(up.id, "SHA256:x", line, ORG, "a", 3, NOW)
    async with store.read() as tx:
        assert await tx.revoked_keys.pending() == [pending]
    async with store.write(ORG) as tx:
        await tx.revoked_keys.removed(pending)
        assert await tx.revoked_keys.pending() == []
        # It came up again, perhaps from a snapshot that has the key; another did meanwhile.
        later = NOW + timedelta(seconds=5)
        for one in (up, paused):
            stored = await tx.sandboxes.find(one.id)
            assert stored is not None
            changed = replace(stored, status=Status.RUNNING, started_at=later)
            assert await tx.sandboxes.replace(changed) is not None
        found_now = {one.sandbox_id for one in await tx.revoked_keys.pending()}
        assert found_now == {up.id, paused.id}
        # What was removed before that start says nothing of this one.
        await tx.revoked_keys.removed(pending)
        await tx.revoked_keys.clear()
        assert len(await tx.revoked_keys.pending()) == 2


async def test_organizations_are_found_by_slug_and_counted_to_two(store: Store) -> None:
    async with store.read() as tx:
        assert await tx.organizations.are_several()
        organization = await tx.organizations.find(ORG)
        assert organization is not None
        assert await tx.organizations.find_slug(organization.slug) == organization
        assert await tx.organizations.find_slug(organization.slug.upper()) is None
        assert await tx.organizations.find_slug("") is None


async def test_live_sandboxes_of_a_name_are_found_in_every_organization(store: Store) -> None:
    older = sandbox(name="same", ssh_key_ids=("", new_uuid()), authorized_keys=("a", "b"))
    newer = sandbox(name="same", org_id=OTHER, created_at=NOW + timedelta(seconds=1))
    gone = sandbox(name="same", org_id=OTHER, status=Status.DESTROYED)
    await insert(store, newer, older, gone, sandbox(name="other"))
    async with store.read() as tx:
        assert [one.id for one in await tx.sandboxes.named("same", limit=9)] == [older.id, newer.id]
        assert [one.id for one in await tx.sandboxes.named("same", limit=1)] == [older.id]
        assert await tx.sandboxes.named("SAME", limit=9) == []
        (found,) = await tx.sandboxes.named("same", limit=1)
        assert found.ssh_key_ids == older.ssh_key_ids


async def test_a_ticket_is_taken_once_or_found_again_and_again(store: Store) -> None:
    ticket = Ticket("d" * 64, "terminal", ORG, new_sandbox_id(), "user:x", "detail", NOW)
    async with store.write(Turn.ALONE) as tx:
        await tx.tickets.put(ticket)
        await tx.tickets.put(replace(ticket, detail="later"))
        assert await tx.tickets.find(ticket.digest) == replace(ticket, detail="later")
        assert await tx.tickets.find("e" * 64) is None

    async with store.write(Turn.ALONE) as tx:
        assert await tx.tickets.take(ticket.digest, "preview") is None

    async def take() -> bool:
        async with store.write(Turn.ALONE) as tx:
            return await tx.tickets.take(ticket.digest, "terminal") is not None

    assert sum(await asyncio.gather(*(take() for _ in range(10)))) == 1
    async with store.write(Turn.ALONE) as tx:
        await tx.tickets.put(ticket)
        await tx.tickets.put(replace(ticket, digest="e" * 64, expires_at=NOW + timedelta(days=1)))
        await tx.tickets.forget(before=NOW + timedelta(seconds=1))
        assert await tx.tickets.find(ticket.digest) is None
        assert await tx.tickets.find("e" * 64) is not None


ABOUT = VersionAbout("t", "Alpine", "headless", Shape(1, 512, 1024), {"KEY": "secret"}, "me", "/")


def version(number: int, **changes: Any) -> TemplateVersion:
    plain = TemplateVersion(
        ORG, "t", number, f"d{number}", "r" * 64, 100, ABOUT, {"image": "x"}, new_uuid(), NOW
    )
    return replace(plain, **changes)


async def test_templates_and_their_versions(store: Store) -> None:
    mine = Template(ORG, "t", "T", "", NOW, NOW, {"latest": 1}, 1)
    theirs = replace(mine, org_id=OTHER)
    first, second, third = version(1), version(2), version(3, org_id=OTHER)
    async with store.write(ORG) as tx:
        for one in (mine, replace(mine, slug="a"), theirs):
            await tx.templates.put(one)
        for version_ in (first, second, third):
            await tx.versions.add(version_)
        mine = replace(mine, name="U", tags={"latest": 2, "x": 1}, last_number=2)
        await tx.templates.put(mine)
    async with store.read() as tx:
        assert await tx.templates.find(ORG, "t") == mine
        assert await tx.templates.find(ORG, "nothing") is None
        assert [one.slug for one in await tx.templates.of(ORG)] == ["a", "t"]
        assert await tx.versions.of(ORG, "t") == [second, first]
        assert (await tx.versions.kept(ORG)).count == 2
        assert (await tx.versions.kept(ORG)).size_bytes == 200
        assert await tx.versions.about(ORG, "t", "d1") == ABOUT
        assert await tx.versions.about(ORG, "t", "d3") is None
        assert await tx.versions.removed() == []
        assert await tx.versions.every() == [_key(one) for one in (first, second, third)]
        assert not await tx.versions.is_used(first)
    await insert(store, sandbox(template="t@d1", status=Status.RUNNING))
    await insert(store, sandbox(template="t@d2", status=Status.DESTROYED))
    async with store.write(ORG) as tx:
        assert await tx.versions.remove(second, at=NOW)
        assert not await tx.versions.remove(second, at=NOW)
        assert await tx.versions.of(ORG, "t") == [first]
        assert await tx.versions.every() == [_key(one) for one in (first, third)]
        assert not await tx.versions.is_kept(second)
        assert await tx.versions.is_kept(first)
        assert await tx.versions.is_used(first)
        assert not await tx.versions.is_used(second)
        await tx.versions.forget(first)  # it is not removed
        assert await tx.templates.remove(ORG, "t", at=NOW)
        assert not await tx.templates.remove(ORG, "t", at=NOW)
        removed = await tx.versions.removed()
        assert {one.build_id for one in removed} == {first.build_id, second.build_id}
        assert await tx.versions.about(ORG, "t", "d1") == ABOUT
        await tx.versions.forget(second)
        assert [one.build_id for one in await tx.versions.removed()] == [first.build_id]
        assert await tx.versions.of(OTHER, "t") == [third]
        assert await tx.templates.find(OTHER, "t") == theirs


def _key(version: TemplateVersion) -> VersionKey:
    return VersionKey(version.org_id, version.slug, version.digest)


def build(**changes: Any) -> Build:
    plain = Build(
        new_uuid(), ORG, "t", 1, USER, BuildStatus.QUEUED, NOW, {"run": ["secret"]}, {"role": "x"}
    )
    return replace(plain, **changes)


async def test_a_build_is_worked_on_by_one_server_at_a_time(store: Store) -> None:
    later = NOW + timedelta(seconds=1)
    first, second = build(), build(number=2, created_at=later, server_id="b")
    async with store.write(ORG) as tx:
        for one in (second, first):
            await tx.builds.add(one)
    async with store.write(Turn.SHARED) as tx:
        assert await tx.builds.claim("a", lease="1", lasts=HALF_A_MINUTE) == first
        # The other needs what is on another server.
        assert await tx.builds.claim("a", lease="2", lasts=HALF_A_MINUTE) is None
        assert await tx.builds.claim("b", lease="3", lasts=OVER) == second
        assert await tx.builds.claim("b", lease="4", lasts=HALF_A_MINUTE) == second
        # Only whoever begins it has the plan again.
        first = replace(first, plan={})
        working = replace(first, status=BuildStatus.BUILDING, phase="x", stages=("t@1",), lines=2)
        assert await tx.builds.save(working, lease="1", lasts=HALF_A_MINUTE) == working
        assert await tx.builds.save(working, lease="0", lasts=HALF_A_MINUTE) is None
        assert await tx.builds.cancel(ORG, first.id, at=NOW)
        assert not await tx.builds.cancel(OTHER, first.id, at=NOW)
        cancelled = replace(working, is_cancelled=True)
        assert await tx.builds.save(working, lease="1", lasts=HALF_A_MINUTE) == cancelled
        assert await tx.builds.count(ORG, *ACTIVE_BUILDS) == 2
        ended = replace(working, status=BuildStatus.CANCELLED, ended_at=NOW, error="why")
        assert await tx.builds.save(ended, lease="1", lasts=None) is not None
        assert not await tx.builds.cancel(ORG, first.id, at=NOW)
        assert await tx.builds.claim("a", lease="5", lasts=HALF_A_MINUTE) is None
    async with store.read() as tx:
        assert await tx.builds.count(ORG, *ACTIVE_BUILDS) == 1
        assert await tx.builds.find(ORG, first.id) == replace(ended, is_cancelled=True)
        assert await tx.builds.find(OTHER, first.id) is None
        assert [one.number for one in await tx.builds.page(ORG, "t", limit=9)] == [2, 1]
        assert [one.number for one in await tx.builds.page(ORG, "t", limit=1)] == [2]
    # The second one's server has its lease, and later does not return.
    async with store.write(Turn.SHARED) as tx:
        day = later + timedelta(days=1)
        assert await tx.builds.give_up(before=day, at=NOW, error="gone") == []
        assert await tx.builds.save(second, lease="4", lasts=None) is not None
        assert await tx.builds.give_up(before=later, at=NOW, error="gone") == []
        (given_up,) = await tx.builds.give_up(before=day, at=NOW, error="gone")
        assert (given_up.id, given_up.status) == (second.id, BuildStatus.FAILED)
        assert (given_up.error, given_up.ended_at) == ("gone", NOW)
        third = build(number=3)  # any server can work on it
        await tx.builds.add(third)
        assert await tx.builds.give_up(before=day, at=NOW, error="gone") == []


async def test_a_build_begins_when_fewer_of_its_organization_are_in_progress(store: Store) -> None:
    times = [NOW + timedelta(seconds=number) for number in range(4)]
    limited = [build(number=n, created_at=at, at_once=2) for n, at in enumerate(times)]
    other = build(number=9, created_at=NOW + timedelta(minutes=1), at_once=None)
    waiting = build(status=BuildStatus.WAITING)
    async with store.write(ORG) as tx:
        for one in (*reversed(limited), other, waiting):
            await tx.builds.add(one)
        assert [await tx.builds.place(one) for one in (*limited, other)] == [1, 2, 3, 4, 5]
    async with store.write(Turn.SHARED) as tx:
        # One has a lease and has not begun, the other has begun and its server has gone.
        assert await tx.builds.claim("a", lease="1", lasts=HALF_A_MINUTE) == limited[0]
        assert await tx.builds.claim("a", lease="2", lasts=OVER) == limited[1]
        begun = replace(limited[1], status=BuildStatus.BUILDING, started_at=NOW, plan={})
        assert await tx.builds.save(begun, lease="2", lasts=OVER) == begun
        found = await tx.builds.claim("b", lease="3", lasts=HALF_A_MINUTE)
        assert found is not None
        assert found.id == begun.id, "it goes on before others begin"
        assert await tx.builds.claim("a", lease="4", lasts=HALF_A_MINUTE) == other
        assert await tx.builds.claim("a", lease="5", lasts=HALF_A_MINUTE) is None
        ended = replace(begun, status=BuildStatus.FAILED, ended_at=NOW)
        assert await tx.builds.save(ended, lease="3", lasts=None) is not None
        # The unlimited one counts as well.
        assert await tx.builds.claim("a", lease="6", lasts=HALF_A_MINUTE) is None
        done = replace(other, status=BuildStatus.READY, ended_at=NOW)
        assert await tx.builds.save(done, lease="4", lasts=None) is not None
        assert await tx.builds.claim("a", lease="7", lasts=HALF_A_MINUTE) == limited[2]
        assert await tx.builds.claim("a", lease="8", lasts=HALF_A_MINUTE) is None


async def test_a_build_of_a_server_that_has_gone_keeps_no_other_from_beginning(
    store: Store,
) -> None:
    bound = build(server_id="gone", at_once=1)
    waiting = build(number=2, created_at=NOW + timedelta(seconds=1), at_once=1)
    async with store.write(ORG) as tx:
        await tx.builds.add(bound)
        await tx.builds.add(waiting)
    async with store.write(Turn.SHARED) as tx:
        assert await tx.builds.claim("gone", lease="1", lasts=HALF_A_MINUTE) == bound
        assert await tx.builds.claim("b", lease="2", lasts=HALF_A_MINUTE) is None
        begun = replace(bound, status=BuildStatus.BUILDING, started_at=NOW, plan={})
        assert await tx.builds.save(begun, lease="1", lasts=OVER) == begun
        assert await tx.builds.claim("b", lease="3", lasts=HALF_A_MINUTE) == waiting


async def test_old_builds_are_removed(store: Store) -> None:
    days = [NOW - timedelta(days=number) for number in range(6)]
    every = [
        build(number=6 - number, created_at=at, ended_at=at, status=BuildStatus.FAILED, lines=1)
        for number, at in enumerate(days)
    ]
    active = build(number=0, created_at=NOW - timedelta(days=9))
    other = build(slug="other", created_at=days[3], ended_at=days[3], status=BuildStatus.READY)
    async with store.write(ORG) as tx:
        await tx.templates.put(Template(ORG, "t", "T", "", NOW, NOW, {}, 6))
        await tx.versions.add(version(3, build_id=every[3].id))
        for one in (*every, active, other):
            await tx.builds.add(one)
            await tx.builds.append(one.id, [BuildLine(1, NOW, "p", "line")])
        await tx.builds.prune(ORG, "t", keep=3, keep_logs=2)
    left = [*every[:4], active]
    async with store.read() as tx:
        assert [one.id for one in await tx.builds.page(ORG, "t", limit=9)] == [
            one.id for one in left
        ]
        logs = [len(await tx.builds.read(one.id, after=0, limit=9)) for one in (*left, other)]
        assert logs == [1, 1, 0, 0, 1, 1]
        emptied = await tx.builds.find(ORG, every[2].id)
        assert emptied is not None
        assert emptied.lines == 0
    async with store.write(ORG) as tx:
        await tx.templates.remove(ORG, "t", at=NOW)
        assert await tx.builds.page(ORG, "t", limit=9) == [replace(active, plan={})]


async def test_a_build_waits_to_be_described(store: Store) -> None:
    first, second = (build(status=BuildStatus.WAITING, plan={"tags": [n]}) for n in ("a", "b"))
    async with store.write(ORG) as tx:
        for one in (first, second):
            await tx.builds.add(one)
    async with store.write(Turn.SHARED) as tx:
        assert await tx.builds.claim("a", lease="1", lasts=HALF_A_MINUTE) is None
        assert await tx.builds.count(ORG, BuildStatus.WAITING) == 2
        assert await tx.builds.count(ORG, *ACTIVE_BUILDS) == 0
        assert await tx.builds.count(OTHER, BuildStatus.WAITING) == 0
        assert await tx.builds.waiting(ORG, first.id) == first
        assert await tx.builds.waiting(OTHER, first.id) is None
        described = replace(first, status=BuildStatus.QUEUED, plan={"run": ["x"]}, server_id="a")
        assert await tx.builds.describe(described)
        assert not await tx.builds.describe(described)
        assert await tx.builds.waiting(ORG, first.id) is None
        assert await tx.builds.claim("a", lease="1", lasts=HALF_A_MINUTE) == described
        await tx.builds.expire(before=NOW, at=NOW, error="late")
        assert await tx.builds.waiting(ORG, second.id) == second
        await tx.builds.expire(before=NOW + HALF_A_MINUTE, at=NOW, error="late")
        ended = await tx.builds.find(ORG, second.id)
        assert ended is not None
        assert (ended.status, ended.ended_at, ended.error) == (BuildStatus.FAILED, NOW, "late")
        assert not await tx.builds.describe(second)
        third = build(status=BuildStatus.WAITING)
        await tx.builds.add(third)
        assert await tx.builds.cancel(ORG, third.id, at=NOW)
        assert not await tx.builds.describe(third)
        assert await tx.builds.count(ORG, BuildStatus.WAITING) == 0


async def test_credentials_for_registries(store: Store) -> None:
    first = RegistryCredential(new_uuid(), ORG, USER, "ghcr.io", "me", "pa:ss ünï", NOW)
    second = replace(first, id=new_uuid(), created_at=NOW + HALF_A_MINUTE)
    async with store.write(ORG) as tx:
        await tx.credentials.add(first)
        await tx.credentials.add(second)
    async with store.write(ORG) as tx:
        assert await tx.credentials.of(ORG) == [second, first]
        assert await tx.credentials.of(OTHER) == []
        assert await tx.credentials.find(ORG, first.id) == first
        assert await tx.credentials.find(OTHER, first.id) is None
        assert not await tx.credentials.remove(OTHER, first.id)
        assert await tx.credentials.remove(ORG, first.id)
        assert not await tx.credentials.remove(ORG, first.id)


async def test_sandboxes_with_rules_are_listed_without_them(store: Store) -> None:
    rules = Policy(egress=Egress.DENY)
    ruled = sandbox(node_id="n", network=rules, status=Status.RUNNING)
    others = (
        sandbox(network=rules),
        sandbox(node_id="n"),
        sandbox(node_id="n", network=rules, status=Status.DESTROYED),
    )
    async with store.write(ORG) as tx:
        for one in (ruled, *others):
            await tx.sandboxes.insert(one)
    async with store.read() as tx:
        assert await tx.sandboxes.ruled() == [Ruled(ruled.id, ORG, "n", Status.RUNNING)]


async def test_the_tables_are_what_the_migrations_make(new_url: str) -> None:
    async with open_store(new_url, key=KEY):
        pass

    def look(connection: Connection) -> None:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, metadata) == []

    await run_by_hand(new_url, look)


async def test_secrets_and_facts_of_the_installation_have_names_of_any_length(
    store: Store,
) -> None:
    # As the service names an organization's network authority.
    name = f"network authority {new_uuid()}"
    async with store.write(ORG) as tx:
        await tx.secrets.add(name, {"key": "value"})
        await tx.facts.note(name, NOW)
    async with store.read() as tx:
        assert await tx.secrets.find(name) == {"key": "value"}
        assert await tx.facts.moment(name) == NOW


async def test_secrets_of_organizations(store: Store) -> None:
    first = Secret(new_uuid(), ORG, "TOKEN", ("a.test", "*.b.test"), "v\u00e4lue", NOW, NOW)
    other = replace(first, id=new_uuid(), name="OTHER")
    async with store.write(ORG) as tx:
        await tx.org_secrets.add(first)
        await tx.org_secrets.add(other)
    with pytest.raises(AlreadyExistsError):
        async with store.write(ORG) as tx:
            await tx.org_secrets.add(replace(first, id=new_uuid()))
    async with store.write(ORG) as tx:
        assert await tx.org_secrets.of(ORG) == [other, first], "by name"
        assert await tx.org_secrets.of(OTHER) == []
        assert await tx.org_secrets.find(OTHER, "TOKEN") is None
        later = replace(first, value="next", hosts=("c.test",), changed_at=NOW + HALF_A_MINUTE)
        assert await tx.org_secrets.replace(later)
        assert not await tx.org_secrets.replace(replace(later, org_id=OTHER))
        await tx.org_secrets.used(ORG, "TOKEN", at=NOW + HALF_A_MINUTE)
        await tx.org_secrets.used(ORG, "TOKEN", at=NOW)
        assert await tx.org_secrets.find(ORG, "TOKEN") == replace(
            later, last_used_at=NOW + HALF_A_MINUTE
        )
        assert not await tx.org_secrets.remove(OTHER, "TOKEN")
        assert await tx.org_secrets.remove(ORG, "TOKEN")
        assert not await tx.org_secrets.remove(ORG, "TOKEN")


async def test_the_log_of_a_build_and_uploads(store: Store) -> None:
    lines = [BuildLine(number, NOW, "run", f"{number} ünï") for number in range(1, 5)]
    upload = Upload(new_uuid(), ORG, USER, "server", 10, "d" * 64, NOW)
    async with store.write(Turn.SHARED) as tx:
        await tx.builds.append("x", lines)
        await tx.uploads.add(upload)
    async with store.write(Turn.SHARED) as tx:
        assert await tx.builds.read("x", after=0, limit=2) == lines[:2]
        assert await tx.builds.read("x", after=2, limit=9) == lines[2:]
        assert await tx.builds.read("y", after=0, limit=9) == []
        assert await tx.uploads.find(ORG, upload.id) == upload
        assert await tx.uploads.find(OTHER, upload.id) is None
        assert (await tx.uploads.kept(ORG)).size_bytes == 10
        assert await tx.uploads.old("server", before=NOW) == []
        assert await tx.uploads.old("server", before=NOW + HALF_A_MINUTE) == [upload]
        assert await tx.uploads.old("other", before=NOW + HALF_A_MINUTE) == []
        await tx.uploads.remove(upload.id)
        assert await tx.uploads.find(ORG, upload.id) is None


async def test_workspaces_are_found_changed_and_forgotten(store: Store) -> None:
    def workspace(org_id: str, slug: str, at: datetime, **changes: object) -> Workspace:
        plain = Workspace(new_uuid(), org_id, None, slug, slug, False, at, at)
        return replace(plain, **changes)  # type: ignore[arg-type]

    first = workspace(ORG, "data", NOW)
    second = workspace(ORG, "more", NOW + timedelta(seconds=1), owner_user_id=USER)
    # Somebody calls one as another's id reads.
    third = workspace(ORG, first.id, NOW + timedelta(seconds=2))
    other = workspace(OTHER, "data", NOW)
    async with store.write(Turn.ALONE) as tx:
        for one in (first, second, third, other):
            assert await tx.workspaces.add(one)
        assert not await tx.workspaces.add(workspace(ORG, "data", NOW))
    async with store.read() as tx:
        assert await tx.workspaces.find(ORG, first.id) == first
        assert await tx.workspaces.find(ORG, "data") == first
        assert await tx.workspaces.find(OTHER, "data") == other
        assert await tx.workspaces.find(OTHER, first.id) is None
        assert [one.id for one in await tx.workspaces.of(ORG)] == [third.id, second.id, first.id]
    gone = replace(first, slug=first.id + "-gone", removed_at=NOW)
    large = replace(second, size_bytes=2**40, quota_bytes=2**41, last_accessed_at=NOW)
    async with store.write(Turn.ALONE) as tx:
        await tx.workspaces.replace(gone)
        await tx.workspaces.replace(large)
        assert await tx.workspaces.find(ORG, first.id) == third
        assert await tx.workspaces.find(ORG, "more") == large
        assert first.id not in [one.id for one in await tx.workspaces.of(ORG)]
        assert gone in await tx.workspaces.every()
        await tx.workspaces.erase(gone.id)
        assert gone not in await tx.workspaces.every()
        assert await tx.workspaces.add(workspace(ORG, "data", NOW))


async def test_what_is_mounted_is_kept_and_found_by_workspace(store: Store) -> None:
    work, more = new_uuid(), new_uuid()
    both = (Mount(work, "/workspace"), Mount(more, "/workspace/möre", read_only=True))
    box = sandbox(mounts=both, status=Status.RUNNING)
    later = sandbox(mounts=both[:1], created_at=NOW + timedelta(seconds=1), name="later")
    gone = sandbox(mounts=both, status=Status.DESTROYED)
    # Twice in one, at two paths.
    twice = sandbox(mounts=(Mount(more, "/workspace/a"), Mount(more, "/workspace/b")))
    async with store.write(Turn.ALONE) as tx:
        for one in (later, box, gone, twice, sandbox()):
            await tx.sandboxes.insert(one)
    async with store.read() as tx:
        found = await tx.sandboxes.find(box.id)
        assert found is not None
        assert found.mounts == both
        assert [one.id for one in await tx.sandboxes.mounting(work)] == [box.id, later.id]
        assert {one.id for one in await tx.sandboxes.mounting(more)} == {box.id, twice.id}
        assert await tx.sandboxes.mounting(new_uuid()) == []
        assert await tx.sandboxes.mounted() == {work, more}
    async with store.write(Turn.ALONE) as tx:
        # Whoever has read it before, and writes it now, does not bring back what was forgotten.
        await tx.sandboxes.forget_mounts(work)
        written = await tx.sandboxes.replace(replace(found, name="renamed"))
        assert written is not None
        known = await tx.sandboxes.find(box.id)
        assert known is not None
        assert (known.name, known.mounts) == ("renamed", both[1:])
        assert await tx.sandboxes.mounting(work) == []
        assert await tx.sandboxes.mounted() == {more}


async def test_members_and_organizations_know_each_other(store: Store) -> None:
    async with store.write(Turn.ALONE) as tx:
        await tx.users.put_member(Membership(OTHER, USER, "member", NOW, NOW))
        mine = [(org.id, member.role) for org, member in await tx.users.organizations_of(USER)]
        assert sorted(mine) == sorted([(ORG, "admin"), (OTHER, "member")])
        ((user, member),) = await tx.users.members(OTHER)
        assert (user.id, member.role, member.created_at) == (USER, "member", NOW)
        later = NOW + timedelta(days=1)
        await tx.users.put_member(Membership(OTHER, USER, "admin", later, later))
        found = await tx.users.member(OTHER, USER)
        assert found == Membership(OTHER, USER, "admin", NOW, later)
        user = replace(user, external_id="sub", is_operator=True)
        await tx.users.replace(user)
        assert await tx.users.find(external_id="sub") == user
        assert await tx.users.find(email="me@example.org") == user
    with pytest.raises(AlreadyExistsError):
        async with store.write(Turn.ALONE) as tx:
            await tx.users.add(User(new_uuid(), "other@example.org", "O", NOW, external_id="sub"))


async def test_a_project_that_is_removed_leaves_what_it_held_to_another(store: Store) -> None:
    project = Project(new_uuid(), ORG, "P", "p", False, NOW)
    one = replace(sandbox(), project_id=project.id)
    async with store.write(Turn.ALONE) as tx:
        await tx.projects.add(project)
    await insert(store, one)
    async with store.write(Turn.ALONE) as tx:
        heir = await tx.projects.find(ORG, None)
        assert heir is not None
        await tx.projects.remove(project, heir=heir)
        assert await tx.projects.every(ORG) == [heir]
    assert (await find(store, one.id)).project_id == heir.id


async def test_a_line_of_the_ledger_with_a_reference_is_posted_once(store: Store) -> None:
    entry = LedgerEntry(new_uuid(), ORG, "grant", 5, None, "d", "ref", 5, NOW)
    async with store.write(Turn.ALONE) as tx:
        await tx.credits.post(entry)
        await tx.credits.save(Account(ORG, balance_cents=5, granted_cents=5, carried=-7))
        assert await tx.credits.find(ORG, "grant", "ref") == entry
        assert await tx.credits.history(ORG, limit=5) == [entry]
        assert await tx.credits.history(OTHER, limit=5) == []
        assert (await tx.credits.account(ORG)).left == 5_000_007
    with pytest.raises(AlreadyExistsError):
        async with store.write(Turn.ALONE) as tx:
            await tx.credits.post(replace(entry, id=new_uuid()))
    async with store.write(Turn.ALONE) as tx:
        # Without one, or of another type or organization, it is another line.
        for other in (
            replace(entry, id=new_uuid(), reference_id=None),
            replace(entry, id=new_uuid(), reference_id=None),
            replace(entry, id=new_uuid(), type="topup"),
            replace(entry, id=new_uuid(), org_id=OTHER),
        ):
            await tx.credits.post(other)
        pending = PendingTopup("key", 501, NOW)
        wish = AutoTopup(ORG, True, 1, 501, "cus", NOW, pending)
        await tx.credits.save_auto_topup(wish)
        assert await tx.credits.auto_topup(ORG) == wish
        assert await tx.credits.auto_topup(OTHER) == AutoTopup(OTHER)
        assert await tx.credits.topped_up() == [ORG]
        newest, *rest = await tx.credits.history(ORG, limit=9)
        assert await tx.credits.history(ORG, limit=9, after_id=newest.id) == rest
        assert await tx.credits.history(OTHER, limit=9, after_id=newest.id) == []


async def test_usage_is_charged_and_counted(store: Store) -> None:
    one = sandbox()
    await insert(store, one)
    kept = StoragePeriod("snapshot", "s", ORG, 10, NOW)
    async with store.write(Turn.ALONE) as tx:
        assert await tx.usage.owing() == []
        await tx.usage.open(UsagePeriod(one.id, ORG, 1, one.shape, NOW))
        await tx.storage.open(kept)
        assert await tx.usage.owing() == [ORG]
        (period,) = await tx.usage.unsettled(ORG)
        (stored,) = await tx.storage.unsettled(ORG)
        await tx.usage.charge([replace(period, posted=9, is_settled=True)])
        assert await tx.usage.unsettled(ORG) == []
        assert (await tx.usage.of_sandbox(one.id))[0].posted == 9
        assert await tx.storage.close("snapshot", "s", NOW - timedelta(days=1))
        await tx.storage.charge([replace(stored, posted=1, is_settled=True)])
        assert await tx.usage.owing() == []
        (left,) = await tx.storage.of("snapshot", "s")
        assert (left.ended_at, left.posted) == (NOW, 1)
        found = await tx.usage.within(ORG, since=NOW, owner_user_id=USER)
        assert [one.id for one in found] == [period.id]
        assert await tx.usage.within(ORG, since=NOW, owner_user_id=new_uuid()) == []
        assert await tx.usage.within(OTHER, since=NOW, owner_user_id=None) == []
        later = NOW + timedelta(seconds=90, microseconds=7)
        shape = one.shape
        in_use = await tx.usage.in_use(ORG, later)
        assert in_use == InUse(
            1, shape.vcpus, shape.memory_mib, shape.disk_mib, tests=0, paid=shape
        )
        await tx.usage.charge([replace(period, posted=5, is_settled=False)])
        in_use = await tx.usage.in_use(ORG, later)
        owed = ShapeSeconds(shape.vcpus * 90, shape.memory_mib * 90, shape.disk_mib * 90)
        assert (in_use.owed, in_use.posted) == (owed, 5)
        assert await tx.usage.in_use(OTHER, later) == InUse()
        account = Account(ORG, 700, 900, 200, 5)
        await tx.credits.save(account)
        assert await tx.credits.position(ORG, later) == (in_use, account)
        assert await tx.credits.position(OTHER, later) == (InUse(), Account(OTHER))
        assert (await tx.credits.position(new_uuid(), later))[0] == InUse()
    with pytest.raises(InternalError):
        async with store.write(Turn.ALONE) as tx:
            await tx.storage.open(kept)
            await tx.storage.open(kept)


async def test_what_is_in_use_is_what_the_rows_come_to_whatever_happens_to_them(
    store: Store, url: str
) -> None:
    chance = Random(7)
    later = NOW + timedelta(seconds=90)
    shapes = (Shape(1, 512, 1024), Shape(8, 16_384, 2_000_000))
    boxes: list[Sandbox] = []
    for turn in range(150):
        at = NOW + timedelta(milliseconds=chance.randrange(60_000))
        try:
            async with store.write(Turn.ALONE) as tx:
                match chance.randrange(6):
                    case 0:
                        one = sandbox(
                            org_id=chance.choice((ORG, OTHER)), is_test=chance.random() < 0.3,
                            shape=chance.choice(shapes), status=chance.choice(list(Status)),
                        )  # fmt: skip
                        await tx.sandboxes.insert(one)
                        boxes.append(one)
                    case 1 | 2 if boxes:
                        place = chance.randrange(len(boxes))
                        wish = replace(
                            boxes[place], status=chance.choice(list(Status)),
                            shape=chance.choice(shapes),
                        )  # fmt: skip
                        boxes[place] = await tx.sandboxes.replace(wish) or boxes[place]
                    case 3 if boxes:
                        one = chance.choice(boxes)
                        free = chance.random() < 0.2
                        await tx.usage.open(
                            UsagePeriod(one.id, one.org_id, turn, one.shape, at, is_free=free)
                        )
                    case 4 if boxes:
                        await tx.usage.close(chance.choice(boxes).id, at)
                    case 5 if found := await tx.usage.unsettled(chance.choice((ORG, OTHER))):
                        period = chance.choice(found)
                        settled = chance.random() < 0.5
                        await tx.usage.charge([replace(period, posted=turn, is_settled=settled)])
                    case _:
                        pass
                if chance.random() < 0.1:
                    raise InternalError("undone")
        except InternalError:  # one was open already, or it was undone
            boxes = [one for one in boxes if await exists(store, one.id)]
            boxes = [await find(store, one.id) for one in boxes]
        async with store.read() as tx:
            for org in (ORG, OTHER):
                assert await tx.usage.in_use(org, later) == await recounted(tx, org, later)
    async with store.read() as tx:
        used = await tx.usage.in_use(ORG, later)
        assert used.active
        assert used.owed.disk_mib_seconds
    # Rows that somebody removes by hand are not counted either.
    await run_sql(url, "DELETE FROM usage_periods", "DELETE FROM sandboxes")
    async with store.read() as tx:
        assert await tx.usage.in_use(ORG, later) == InUse()


async def test_moments_are_remembered(store: Store) -> None:
    async with store.write(Turn.ALONE) as tx:
        assert await tx.facts.moment("a") is None
        await tx.facts.note("a", NOW)
        await tx.facts.note("a", NOW + timedelta(days=1))
        assert await tx.facts.moment("a") == NOW + timedelta(days=1)


async def test_a_store_from_before_there_was_money_is_brought_up_to_date(new_url: str) -> None:
    """With data of the version before: who ran it runs it, and what was used stays free."""
    org, user, box = new_uuid(), new_uuid(), new_sandbox_id()

    def fill(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(Path(migrations.__file__).parent))
        config.attributes["connection"] = connection
        command.upgrade(config, "0002")
        for statement in (
            f"INSERT INTO organizations VALUES ('{org}', 'Default', 'default', 5)",
            f"INSERT INTO users VALUES ('{user}', 'admin@localhost', 'Admin', 6)",
            f"INSERT INTO memberships VALUES ('{org}', '{user}', 'admin')",
            f"INSERT INTO projects VALUES ('{PROJECT}', '{org}', 'D', 'default', true, 5)",
            "INSERT INTO sandboxes (id, org_id, owner_user_id, project_id, status, wanted, version,"
            " incarnation, template, tags, vcpus, memory_mib, disk_mib, idle_timeout_s, env_sealed,"
            " ssh_keys, metadata, auto_resume, created_at, updated_at) VALUES "
            f"('{box}', '{org}', '{user}', '{PROJECT}', 'running', 'running', 1, 1, 't', '[]', 1,"
            " 512, 1024, 0, '', '[]', '{}', true, 7, 7)",
            "INSERT INTO usage_periods (sandbox_id, org_id, incarnation, vcpus, memory_mib,"
            f" disk_mib, started_at, ended_at) VALUES ('{box}', '{org}', 1, 1, 512, 1024, 7, 8),"
            f" ('{box}', '{org}', 2, 1, 512, 1024, 9, NULL)",
        ):
            connection.execute(text(statement))

    await run_by_hand(new_url, fill)
    with pytest.raises(InternalError, match=r"its schema is 0002.*sandyard admin migrate"):
        async with open_store(new_url, key=KEY):
            pass
    assert (await read_schema(new_url)).present == "0002"
    for _ in range(2):
        async with open_store(new_url, key=KEY, migrates=True) as store:
            sign_up = SignUp(10_000, "enterprise", 5)
            found = await ensure_first_organization(store, SystemClock(), sign_up)
            assert (found[0].id, found[1].id, found[1].is_operator) == (org, user, True)
            async with store.read() as tx:
                assert (await tx.credits.account(org)).balance_cents == 10_000
                ((_, member),) = await tx.users.members(org)
                assert member.created_at == found[1].created_at
                assert await tx.workspaces.personal(org, user) is not None
                periods = await tx.usage.of_sandbox(box)
                now = SystemClock().now()
                used = await tx.usage.in_use(org, now)
                assert used == await recounted(tx, org, now)
                assert used.active == 1
            # What ran at that moment is charged from then on.
            assert [(one.is_free, one.is_settled) for one in periods] == [
                (True, True), (True, True), (False, False),
            ]  # fmt: skip
            assert periods[1].ended_at == periods[2].started_at
            assert periods[1].ended_at is not None
            assert abs(datetime.now(UTC) - periods[1].ended_at) < timedelta(minutes=1)
            assert periods[2].ended_at is None


async def test_a_store_that_is_not_there_is_unavailable() -> None:
    url = "postgresql://nobody@127.0.0.1:1/none"
    with pytest.raises(UnavailableError):
        async with open_store(url, key=KEY):
            pass
    with pytest.raises(InternalError):
        async with open_store("mysql://x", key=KEY):
            pass


@pytest.mark.parametrize("floor", ["9998", NEWEST])
async def test_a_newer_schema_is_used_above_its_floor_and_refused_below(
    url: str, floor: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with open_store(url, key=KEY):
        pass
    await run_sql(
        url,
        "UPDATE alembic_version SET version_num = '9999'",
        f"UPDATE schema_floor SET revision = '{floor}'",
        "ALTER TABLE sandboxes ADD COLUMN later integer NOT NULL DEFAULT 7",
    )
    if floor == NEWEST:
        async with open_store(url, key=KEY, migrates=True) as store:
            await furnish(store)
            one = sandbox()
            await insert(store, one)
            assert (await find(store, one.id)).shape == one.shape
        assert "of a newer version" in caplog.text
        assert (await read_schema(url)).is_ahead
    else:
        for migrates in (False, True):
            with pytest.raises(InternalError, match="newer Sandyard"):
                async with open_store(url, key=KEY, migrates=migrates):
                    pass


def at(revision: str) -> Callable[[Connection], None]:
    """Return what makes the schema as it was at a revision."""

    def make(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(Path(migrations.__file__).parent))
        config.attributes["connection"] = connection
        command.upgrade(config, revision)

    return make


async def test_what_a_database_was_before_its_migration_is_kept_beside(tmp_path: Path) -> None:
    path = tmp_path / "sandyard.db"
    await run_by_hand(f"sqlite:///{path}", at("0014"))
    (tmp_path / "sandyard.db.schema-0009").touch()
    async with open_store(f"sqlite:///{path}", key=KEY, migrates=True):
        pass
    kept = tmp_path / "sandyard.db.schema-0014"
    assert sorted(tmp_path.glob("*.schema-*")) == [kept]
    assert kept.stat().st_mode & 0o777 == 0o600
    for there, revision in ((path, NEWEST), (kept, "0014")):
        with closing(sqlite3.connect(there)) as raw:
            assert raw.execute("SELECT version_num FROM alembic_version").fetchall() == [
                (revision,)
            ]


async def test_without_a_copy_nothing_is_migrated(tmp_path: Path) -> None:
    path = tmp_path / "sandyard.db"
    await run_by_hand(f"sqlite:///{path}", at("0014"))
    (tmp_path / "sandyard.db.schema-0014.part").mkdir()  # nothing can be written there
    with pytest.raises(UnavailableError, match=r"cannot copy the database.*free some space"):
        async with open_store(f"sqlite:///{path}", key=KEY, migrates=True):
            pass
    assert (await read_schema(f"sqlite:///{path}")).present == "0014"


async def test_a_migration_that_ends_midway_leaves_the_schema_as_it_was(
    new_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await run_by_hand(new_url, at("0014"))

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr("alembic.op.create_index", broken)  # of the second one, after its table
        with pytest.raises(ZeroDivisionError):
            async with open_store(new_url, key=KEY, migrates=True):
                pass
    schema = await read_schema(new_url)
    assert (schema.present, schema.missing[0]) == ("0014", "0015")
    async with open_store(new_url, key=KEY, migrates=True) as store:
        await furnish(store)
    assert not (await read_schema(new_url)).is_behind


def shape_of(connection: Connection) -> dict[str, dict[str, bool]]:
    """Return each table's columns, and whether a row may leave them out."""
    found = inspect(connection)
    return {
        table: {
            one["name"]: one["nullable"] or one["default"] is not None
            for one in found.get_columns(table)
        }
        for table in found.get_table_names()
    }


def indexes_of(connection: Connection) -> dict[str, set[str | None]]:
    """Return the names of each table's indexes."""
    found = inspect(connection)
    return {
        table: {one["name"] for one in found.get_indexes(table)}
        for table in found.get_table_names()
    }


def test_no_migration_blocks_servers_at_work_by_indexing_a_table_they_write() -> None:
    """An index of a large table takes minutes, and writers wait for it. One that is wanted needs a
    step that makes it CONCURRENTLY, after the transaction of the migrations."""
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        at(FIRST_FLOOR)(connection)
        old = indexes_of(connection)
        at(NEWEST)(connection)
        new = indexes_of(connection)
    engine.dispose()
    assert {table: new[table] - names for table, names in old.items() if new[table] - names} == {}


def test_a_migration_that_an_older_server_cannot_live_with_raises_the_floor() -> None:
    """An older server reads and writes the columns that it knows, and no others."""
    folder = Path(migrations.__file__).parent / "versions"
    revisions = sorted(path.name[:4] for path in folder.glob("0*.py"))
    engine = create_engine("sqlite://")
    with engine.begin() as connection:
        for before, revision in pairwise(revisions):
            at(before)(connection)
            old, floor = shape_of(connection), schema_of(connection).floor
            at(revision)(connection)
            new = shape_of(connection)
            breaks = [
                (table, name)
                for table, columns in old.items()
                for name in columns
                if name not in new.get(table, {})
            ] + [
                (table, name)
                for table in old.keys() & new.keys()
                for name, may_be_absent in new[table].items()
                if name not in old[table] and not may_be_absent
            ]
            (path,) = folder.glob(f"{revision}_*.py")
            raises = re.search(r'^floor = "(\d+)"$', path.read_text(), re.M)
            # Before the first floor no server could use a database of a newer version.
            assert not breaks or raises or revision < FIRST_FLOOR, (revision, breaks, floor)
    engine.dispose()


# --- nodes on other hosts -----------------------------------------------------------------------

SECOND = timedelta(seconds=1)
HERE = NodeStart("boot-1", "host-a:/home", "0.1", "10.0.0.2", 8700)


async def joined(store: Store, node_id: str = "node-1", name: str = "one") -> None:
    async with store.write(Turn.ALONE) as tx:
        await tx.joined_nodes.add(JoinedNode(node_id, name, NOW))


async def started(store: Store, start: NodeStart, lasts: timedelta = 60 * SECOND) -> int | None:
    async with store.write(Turn.SHARED) as tx:
        return await tx.joined_nodes.start("node-1", start, lasts=lasts)


async def test_a_node_starts_under_the_next_epoch_and_has_a_lease(store: Store) -> None:
    await joined(store)
    async with store.read() as tx:
        (before,) = await tx.joined_nodes.all()
    assert (before.epoch, before.has_lease, before.lost_at) == (0, False, None)
    assert await started(store, HERE) == 1
    assert await started(store, HERE) == 1  # its word came twice
    assert await started(store, replace(HERE, boot="boot-2")) == 2  # it was killed
    async with store.read() as tx:
        after = await tx.joined_nodes.find("node-1")
        assert await tx.joined_nodes.find("node-2") is None
    assert after is not None
    assert (after.epoch, after.has_lease, after.host, after.port) == (2, True, "10.0.0.2", 8700)


async def test_another_place_is_refused_while_a_lease_is_held(store: Store) -> None:
    copy = replace(HERE, boot="boot-2", place="host-b:/home")
    assert await started(store, copy) is None  # nobody knows it
    await joined(store)
    assert await started(store, HERE) == 1
    assert await started(store, copy) is None
    async with store.write(Turn.SHARED) as tx:
        beats = {("node-1", 1), ("node-2", 1)}
        assert await tx.joined_nodes.beat(beats, lasts=-SECOND) == {("node-1", 1)}
    assert await started(store, copy) == 2
    async with store.write(Turn.SHARED) as tx:
        beats = {("node-1", 1), ("node-1", 2)}
        assert await tx.joined_nodes.beat(beats, lasts=60 * SECOND) == {("node-1", 2)}


async def test_whoever_does_not_beat_is_lost_until_it_does(store: Store) -> None:
    await joined(store)
    await joined(store, "node-2", "another")
    async with store.write(Turn.SHARED) as tx:
        assert await tx.joined_nodes.lose(grace=SECOND) == []
    await started(store, HERE, -2 * SECOND)
    async with store.write(Turn.SHARED) as tx:
        assert await tx.joined_nodes.lose(grace=60 * SECOND) == []
        assert await tx.joined_nodes.lose(grace=SECOND) == ["node-1"]
        assert await tx.joined_nodes.lose(grace=SECOND) == []
    async with store.read() as tx:
        another, lost = await tx.joined_nodes.all()
    assert (another.lost_at, lost.lost_at) == (None, lost.lease_until)
    async with store.write(Turn.SHARED) as tx:
        assert await tx.joined_nodes.beat({("node-1", 1)}, lasts=60 * SECOND)
    async with store.read() as tx:
        _, back = await tx.joined_nodes.all()
    assert (back.has_lease, back.lost_at) == (True, None)


async def test_what_ends_on_a_lost_node_waits_until_the_node_is_back(store: Store) -> None:
    await joined(store)
    ending = [sandbox(node_id="node-1", status=one) for one in (Status.DESTROYING, Status.PAUSING)]
    starting = sandbox(node_id="node-1", status=Status.CREATING)
    elsewhere = sandbox(node_id="node-2", status=Status.DESTROYING)  # of a single host: not joined
    async with store.write(Turn.ALONE) as tx:
        for one in (*ending, starting, elsewhere):
            await tx.sandboxes.insert(one)

    async def claimed(lease: str) -> set[str]:
        async with store.write(Turn.SHARED) as tx:
            wanted = frozenset({Status.DESTROYING, Status.PAUSING, Status.CREATING})
            found = await tx.leases.claim(wanted, hold=held(lease), limit=9)
            for one in found:
                assert await tx.leases.extend(one.sandbox.id, lease=lease, lasts=None)
            assert await tx.leases.waits(frozenset({Status.PAUSING})) == (len(found) == 4)
        return {one.sandbox.id for one in found}

    everything = {one.id for one in (*ending, starting, elsewhere)}
    assert await claimed("a") == everything
    await started(store, HERE, -2 * SECOND)
    async with store.write(Turn.SHARED) as tx:
        assert await tx.joined_nodes.lose(grace=SECOND) == ["node-1"]
    assert await claimed("b") == {starting.id, elsewhere.id}
    async with store.write(Turn.SHARED) as tx:
        assert await tx.joined_nodes.beat({("node-1", 1)}, lasts=60 * SECOND)
    assert await claimed("c") == everything


async def test_no_lease_outlives_its_holder_because_the_clock_was_set_back(
    store: Store, url: str
) -> None:
    await joined(store)
    await started(store, HERE, 4 * SECOND)
    one = sandbox()
    async with store.write(ORG) as tx:
        await tx.sandboxes.insert(one, hold=held("a"))
    async with store.write(Turn.SHARED) as tx:
        assert await tx.duties.take("x", "a", lasts=HALF_A_MINUTE)
        assert await tx.duties.take("x", "a", lasts=HALF_A_MINUTE)
        assert not await tx.duties.take("x", "b", lasts=HALF_A_MINUTE)
    # As if they had been taken two hours from now.
    later = 2 * 3600 * 1_000_000
    await run_sql(
        url,
        f"UPDATE joined_nodes SET lease_until = lease_until + {later}",
        f"UPDATE sandboxes SET lease_until = lease_until + {later}",
        f"UPDATE duties SET until = until + {later}",
    )
    async with store.write(Turn.SHARED) as tx:
        assert await tx.duties.take("x", "b", lasts=HALF_A_MINUTE)
        assert [claim.sandbox.id for claim in await tx.leases.claim(
            frozenset({Status.PENDING}), hold=held("b"), limit=9
        )] == [one.id]  # fmt: skip
        (node,) = await tx.joined_nodes.all()
        assert not node.has_lease
        # One that lives has the time to say so.
        assert await tx.joined_nodes.lose(grace=timedelta()) == []
        (node,) = await tx.joined_nodes.all()
        assert (node.has_lease, node.lost_at) == (True, None)


async def test_a_duty_is_one_servers_until_it_ends(store: Store) -> None:
    async with store.write(Turn.SHARED) as tx:
        assert await tx.duties.take("x", "a", lasts=-SECOND)
        assert await tx.duties.take("y", "a", lasts=HALF_A_MINUTE)
        assert await tx.duties.take("x", "b", lasts=HALF_A_MINUTE)
        assert not await tx.duties.take("x", "a", lasts=HALF_A_MINUTE)


async def compared(store: Store, by: str, *node_ids: str, **options: Any) -> frozenset[str]:
    async with store.write(Turn.SHARED) as tx:
        return await tx.joined_nodes.have_compared(
            node_ids, by=by, **{"lasts": 60 * SECOND, **options}
        )


async def test_each_node_is_compared_by_one_control_plane(store: Store) -> None:
    for number in (1, 2):
        await joined(store, f"node-{number}", f"{number}")
    assert await compared(store, "a", "node-1", "node-3") == {"node-1"}
    assert await compared(store, "b", "node-1", "node-2") == {"node-2"}
    assert await compared(store, "a", "node-1", "node-2") == {"node-1"}
    async with store.read() as tx:
        assert [(one.compared_by, one.is_compared) for one in await tx.joined_nodes.all()] == [
            ("a", True), ("b", True),
        ]  # fmt: skip
    assert await compared(store, "b", "node-1", over="c") == frozenset()
    assert await compared(store, "b", "node-1", over="a", lasts=-2 * SECOND) == {"node-1"}
    assert await compared(store, "c", "node-1", free_for=60 * SECOND) == frozenset()
    assert await compared(store, "c", "node-1", free_for=SECOND) == {"node-1"}


async def test_those_who_write_many_nodes_at_once_do_not_wait_for_each_other_in_a_ring(
    store: Store,
) -> None:
    ids = [f"node-{number}" for number in range(40)]
    for one in ids:
        await joined(store, one, one)

    async def work(number: int) -> None:
        mixed = random.sample(ids, len(ids))
        await compared(store, "a", *mixed, over=f"{number}", lasts=-SECOND)
        async with store.write(Turn.SHARED) as tx:
            await tx.joined_nodes.beat([(one, 0) for one in mixed], lasts=-SECOND)
        async with store.write(Turn.SHARED) as tx:
            await tx.joined_nodes.lose(grace=timedelta())
        async with store.write(Turn.SHARED) as tx:
            await tx.nodes.heard(mixed, NOW)

    async with asyncio.TaskGroup() as tasks:
        for number in range(12):
            tasks.create_task(work(number))


async def test_a_mark_is_another_once_anything_is_written_of_what_a_node_has(store: Store) -> None:
    async def mark() -> Mark | None:
        async with store.read() as tx:
            return (await tx.sandboxes.marks(["n", "m"], frozenset({Status.RUNNING}))).get("n")

    assert await mark() is None
    box = replace(sandbox(), node_id="n", status=Status.RUNNING)
    async with store.write(Turn.ALONE) as tx:
        await tx.sandboxes.insert(box)
        await tx.sandboxes.insert(replace(sandbox(), node_id="other", status=Status.RUNNING))
    assert await mark() == Mark(1, box.version, box.updated_at)
    async with store.write(Turn.ALONE) as tx:
        box = await tx.sandboxes.replace(box) or box
    assert await mark() == Mark(1, box.version, box.updated_at)
    shot = Snapshot(
        id=new_uuid(), org_id=ORG, owner_user_id=USER, sandbox_id=box.id, node_id="n",
        name=None, template="t", os=None, shape=Shape(1, 512, 1024), is_ready=False,
        is_hidden=False, size_bytes=0, created_at=NOW, held_until=NOW,
    )  # fmt: skip
    async with store.write(Turn.ALONE) as tx:
        await tx.snapshots.insert(shot)
        await tx.snapshots.insert(replace(shot, id=new_uuid(), is_ready=True))
        await tx.snapshots.insert(replace(shot, id=new_uuid(), is_ready=True, is_hidden=True))
    assert await mark() == Mark(1, box.version, box.updated_at, 3, 2)
    async with store.write(Turn.ALONE) as tx:
        await tx.sandboxes.replace(replace(box, status=Status.DESTROYED))
    assert await mark() == Mark(snapshots=3, unready=2)


async def test_a_node_is_drained_and_forgotten(store: Store) -> None:
    await joined(store)
    async with store.write(Turn.ALONE) as tx:
        assert await tx.joined_nodes.drain("node-1", is_draining=True)
        assert not await tx.joined_nodes.drain("node-2", is_draining=True)
        (node,) = await tx.joined_nodes.all()
        assert node.is_draining
        assert await tx.joined_nodes.forget("node-1")
        assert not await tx.joined_nodes.forget("node-1")
        assert await tx.joined_nodes.all() == []


async def test_an_invite_is_good_once_and_for_a_while(store: Store) -> None:
    async with store.write(Turn.ALONE) as tx:
        await tx.invites.add("a" * 64, lasts=60 * SECOND)
        await tx.invites.add("b" * 64, lasts=-SECOND)
    for digest, is_good in (("a", True), ("a", False), ("b", False), ("c", False)):
        async with store.write(Turn.ALONE) as tx:
            assert await tx.invites.take(digest * 64) is is_good
    async with store.write(Turn.ALONE) as tx:
        await tx.invites.add("b" * 64, lasts=60 * SECOND)  # the old one is gone


async def test_the_installation_keeps_secrets_of_its_own(store: Store) -> None:
    async with store.read() as tx:
        assert await tx.secrets.find("authority") is None
    async with store.write(Turn.ALONE) as tx:
        await tx.secrets.add("authority", {"key": "k", "certificate": "ü"})
    async with store.read() as tx:
        assert await tx.secrets.find("authority") == {"key": "k", "certificate": "ü"}
    async with store.write(Turn.ALONE) as tx:
        await tx.secrets.replace("authority", {"key": "new"})
        await tx.secrets.replace("nothing", {"key": "new"})
        assert await tx.secrets.find("authority") == {"key": "new"}
        assert await tx.secrets.find("nothing") is None
    with pytest.raises(InternalError):
        async with store.write(Turn.ALONE) as tx:
            await tx.secrets.add("authority", {"key": "other"})
