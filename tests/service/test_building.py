"""Builds of templates and their bad days: each phase, with machines that only say they did it."""

import asyncio
import json
import sqlite3
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.support.clock import DrivenClock
from tests.support.desk import Desk, open_desk, still, until
from tests.support.nodes import FakeNode, Machine, MemoryStream

from sandyard.server.app.installation import secret_key
from sandyard.server.core import ops, wire
from sandyard.server.core.codec import encode
from sandyard.server.core.contracts.node import MachineRef, Opened, Origin
from sandyard.server.core.egress import Egress, Policy
from sandyard.server.core.errors import (
    ConflictError,
    InvalidArgumentError,
    LimitReachedError,
    NoCapacityError,
    NotFoundError,
    PayloadTooLargeError,
)
from sandyard.server.core.ids import new_uuid
from sandyard.server.core.node_ops import EnsureRunning, PrepareVersion
from sandyard.server.core.records import Build, BuildStatus, Upload
from sandyard.server.links.sql.seal import Seal
from sandyard.server.service.builds import boxes, cache, progress, recipes, removal
from sandyard.server.service.builds.plan import NewTemplate, Step, StepKind
from sandyard.server.tasks import concurrently

DIGEST = "sha256:" + "d" * 64
CONFIG = {"config": {"Env": ["A=image"], "User": "7"}}
IMAGE = NewTemplate("mine", image="registry.test/a:1")
STEPS = NewTemplate("mine", base="base-minimal", run=("first", "second"), env={"B": "c"})
PHASES = {
    "pull": recipes.FIND_IMAGE, "fetch": recipes.PULL_IMAGE, "unpack": recipes.UNPACK,
    "pack": recipes.PACK_TREE, "steps": "first", "pack the steps": recipes.PACK_SELF,
}  # fmt: skip


@dataclass
class Works:
    """What the machines of builds do: the commands they were given, in which one the build waits,
    and which fail."""

    commands: list[str] = field(default_factory=list)
    runs: list[ops.Run] = field(default_factory=list)
    waits_in: str = ""
    is_in: asyncio.Event = field(default_factory=asyncio.Event)
    go_on: asyncio.Event = field(default_factory=asyncio.Event)
    fails: dict[str, int] = field(default_factory=dict)
    says: dict[str, bytes] = field(default_factory=dict)
    secrets: list[tuple[str, bytes]] = field(default_factory=list)


class _Writing(MemoryStream):
    """A file that comes whole."""

    def __init__(self, machine: Machine, works: Works, path: bytes) -> None:
        super().__init__(machine)
        self._works, self._path = works, path.decode()
        self._decoder, self._whole = wire.Decoder(), bytearray()

    async def write(self, data: bytes) -> None:
        self._decoder.feed(data)
        while (frame := self._decoder.take_frame()) is not None:
            self._whole += frame.payload
            if not frame.payload:
                self._works.secrets.append((self._path, bytes(self._whole)))
                self.feed(_end(ops.FileEnd(len(self._whole))))


class BuildNode(FakeNode):
    """A node whose machines carry out the commands of builds in name alone."""

    def __init__(self, works: Works) -> None:
        super().__init__(templates=("base-minimal", "builder"))
        self.works = works

    @asynccontextmanager
    async def open(
        self, machine: MachineRef, operation: ops.Operation[Any]
    ) -> AsyncIterator[Opened[Any]]:
        async with super().open(machine, operation) as opened:
            found = self.machines[machine.sandbox_id]
            match operation:
                case ops.Run():
                    stream = MemoryStream(found)
                    async with concurrently(self._run(operation, stream)):
                        yield Opened(ops.Attached(1, 0), stream)
                case ops.Write():
                    yield Opened(ops.Done(), _Writing(found, self.works, operation.path))
                case ops.Read():
                    name = operation.path.decode().rpartition("/")[2]
                    data = {"digest": DIGEST.encode(), "config.json": json.dumps(CONFIG).encode()}
                    stream = MemoryStream(found)
                    stream.feed(wire.encode_frame(wire.Channel.STDOUT, data.get(name, b"ID=x")))
                    stream.feed(_end(ops.FileEnd(1)))
                    fact = ops.FileFact(operation.path, ops.FileKind.FILE, 4, 0o644, 0, 0, 0)
                    yield Opened(fact, stream)
                case _:
                    yield opened

    async def _run(self, wish: ops.Run, stream: MemoryStream) -> None:
        works = self.works
        command = str(wish.command)
        works.commands.append(command)
        works.runs.append(wish)
        if command == works.waits_in:
            works.is_in.set()
            await works.go_on.wait()
        said = memoryview(works.says.get(command, b""))
        for at in range(0, len(said), 65_536):
            stream.feed(wire.encode_frame(wire.Channel.STDOUT, bytes(said[at : at + 65_536])))
        stream.feed(_end(ops.Ended(works.fails.get(command, 0), 1)))


def _end(value: object) -> bytes:
    return wire.encode_frame(wire.Channel.EXIT, json.dumps(encode(value)).encode())


@dataclass
class Site:
    """The services at work on builds."""

    desk: Desk
    works: Works

    async def build(self, wish: NewTemplate) -> Build:
        return await self.desk.services.builds.create(self.desk.actor, wish)

    async def now(self, build: Build) -> Build:
        return await self.desk.services.builds.get(self.desk.actor, build.slug, build.id)

    async def ended(self, build: Build) -> tuple[Build, list[str]]:
        """Return a build at its end, and its log; time passes as it needs to."""

        async def is_over() -> bool:
            await self.desk.clock.advance(0.5)
            return (await self.now(build)).ended_at is not None

        await until(is_over)
        return await self.now(build), await self.lines(build)

    async def lines(self, build: Build) -> list[str]:
        """Return the log as it is now."""
        async with self.desk.control.store.read() as tx:
            return [one.text for one in await tx.builds.read(build.id, after=0, limit=100)]

    async def latest(self) -> int | None:
        own = await self.desk.services.templates.own(self.desk.actor, "mine")
        return own.template.tags.get("latest")

    async def nothing_is_left(self) -> None:
        async def is_gone() -> bool:
            await self.desk.clock.advance(1)
            return not self.desk.node.machines

        await until(is_gone)


@asynccontextmanager
async def open_site(home: Path, works: Works, **more: Any) -> AsyncIterator[Site]:
    node = more.pop("node", None) or BuildNode(works)
    async with open_desk(home, nodes={"fake": node}, has_versions=True, **more) as desk:
        yield Site(desk, works)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with open_site(tmp_path, Works()) as made:
        yield made


async def test_an_image_and_steps_are_built_in_order(site: Site) -> None:
    build, lines = await site.ended(
        await site.build(replace(IMAGE, run=("first",), env={"B": "c"}))
    )
    assert build.status is BuildStatus.READY, (build.error, lines)
    assert [one for one in site.works.commands if one in PHASES.values()] == [
        recipes.FIND_IMAGE, recipes.PULL_IMAGE, recipes.UNPACK, recipes.PACK_TREE, "first",
        recipes.PACK_SELF,
    ]  # fmt: skip
    (version,) = (await site.desk.services.templates.own(site.desk.actor, "mine")).versions
    assert (version.about.env, version.about.user) == ({"A": "image", "B": "c"}, "7")
    assert version.source == {"image": "registry.test/a:1", "digest": DIGEST}
    # Of what was kept on the node, the version alone is left.
    assert [one for one in site.desk.node.templates_ready if "@" in one] == [
        f"mine@{version.digest}"
    ]
    await site.nothing_is_left()


async def test_a_build_reaches_what_its_rules_allow(site: Site) -> None:
    site.works.waits_in = PHASES["pull"]
    rules = Policy(Egress.DENY, ("Registry.test", "*.mirror.test"))
    build = await site.build(replace(IMAGE, run=("first",), network=rules))
    await until(_set(site.works.is_in))
    policies = [one.policy for one in site.desk.node.machines.values()]
    assert policies == [Policy(Egress.DENY, ("registry.test", "*.mirror.test"))]
    await site.desk.services.builds.cancel(site.desk.actor, "mine", build.id)
    await site.ended(build)
    with pytest.raises(InvalidArgumentError, match="a rule is"):
        await site.build(replace(IMAGE, network=Policy(allow=("*",))))


@pytest.mark.parametrize(
    ("given", "kept_"),
    [
        (None, None),
        (Policy(), Policy()),
        (Policy(Egress.DENY, ("a.test",)), Policy(Egress.DENY, ("a.test",))),
        (Policy(inspect=("a.test",)), None),
    ],
)
async def test_the_rules_of_a_build_belong_to_the_version(
    site: Site, given: Policy | None, kept_: Policy | None
) -> None:
    build, lines = await site.ended(await site.build(replace(STEPS, network=given)))
    assert build.status is BuildStatus.READY, lines
    async with site.desk.control.store.read() as tx:
        (version,) = await tx.versions.of(site.desk.actor.org_id, "mine")
    assert version.about.network == kept_


@pytest.mark.parametrize("phase", PHASES)
async def test_a_build_is_cancelled_in_each_phase(site: Site, phase: str) -> None:
    site.works.waits_in = PHASES[phase]
    build = await site.build(replace(IMAGE, run=("first",)))
    await until(_set(site.works.is_in))
    await site.desk.services.builds.cancel(site.desk.actor, "mine", build.id)
    build, lines = await site.ended(build)
    assert (build.status, lines[-1]) == (
        BuildStatus.CANCELLED, "the build ended: it was cancelled"
    )  # fmt: skip
    assert await site.latest() is None
    assert not any("@" in one for one in site.desk.node.templates_ready)
    await site.nothing_is_left()


@pytest.mark.parametrize("phase", PHASES)
async def test_a_build_whose_server_ends_in_a_phase_is_begun_again(
    tmp_path: Path, phase: str
) -> None:
    works, clock = Works(waits_in=PHASES[phase]), DrivenClock()
    node = BuildNode(works)
    async with open_site(tmp_path, works, node=node, clock=clock) as site:
        build = await site.build(replace(IMAGE, run=("first",)))
        await until(_set(works.is_in))
    works.waits_in = ""
    async with open_site(tmp_path, works, node=node, clock=clock) as site:
        build, lines = await site.ended(build)
        assert build.status is BuildStatus.READY, (build.error, lines)
        assert "the build starts again: its server ended" in lines
        assert await site.latest() == 1
        assert len([one for one in node.templates_ready if "@" in one]) == 1
        await site.nothing_is_left()


async def test_of_two_builds_at_once_the_later_one_is_the_latest(site: Site) -> None:
    site.works.waits_in = "first"
    slow = await site.build(STEPS)
    await until(_set(site.works.is_in))
    quick, _ = await site.ended(await site.build(replace(STEPS, run=("other",))))
    assert (quick.status, quick.number) == (BuildStatus.READY, 2)
    site.works.go_on.set()
    slow, _ = await site.ended(slow)
    assert (slow.status, slow.number) == (BuildStatus.READY, 1)
    own = await site.desk.services.templates.own(site.desk.actor, "mine")
    assert [one.number for one in own.versions] == [2, 1]
    assert await site.latest() == 2


async def test_a_build_beyond_the_limit_of_the_plan_waits_for_its_turn(site: Site) -> None:
    builds, actor = site.desk.services.builds, site.desk.actor
    limited = replace(actor, limits={"builds": 1})
    site.works.waits_in = "first"
    first = await builds.create(limited, STEPS)
    await until(_set(site.works.is_in))
    second, third = [await builds.create(limited, STEPS) for _ in range(2)]
    other, _ = await site.ended(await site.build(replace(STEPS, run=("other",))))
    assert other.status is BuildStatus.READY, "another limit is not theirs"
    assert [(await site.now(one)).status for one in (first, second, third)] == [
        BuildStatus.BUILDING, BuildStatus.QUEUED, BuildStatus.QUEUED
    ]  # fmt: skip
    assert [await builds.place(await site.now(one)) for one in (first, second, third)] == [
        None, 1, 2
    ]  # fmt: skip
    # One that waits is cancelled at once, from the list.
    (listed,) = [one for one in await builds.list(actor, "mine") if one.id == second.id]
    assert (await builds.cancel(actor, "mine", listed.id)).status is BuildStatus.CANCELLED
    site.works.waits_in = ""
    site.works.go_on.set()
    for one in (first, third):
        assert (await site.ended(one))[0].status is BuildStatus.READY


async def test_the_queue_of_an_organization_is_bounded(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandyard.server.service.builds.builds._QUEUED_MAX", 2)
    builds, actor = site.desk.services.builds, site.desk.actor
    with pytest.raises(LimitReachedError, match="allows 0"):
        await builds.create(replace(actor, limits={"builds": 0}), STEPS)
    limited = replace(actor, limits={"builds": 1})
    site.works.waits_in = "first"
    for _ in range(2):
        await builds.create(limited, STEPS)
    with pytest.raises(LimitReachedError, match="cannot queue another build: 2 of"):
        await builds.create(limited, STEPS)
    # What waits will be versions.
    monkeypatch.setattr("sandyard.server.service.builds.builds._QUEUED_MAX", 9)
    with pytest.raises(LimitReachedError, match="allows 2"):
        await builds.create(replace(limited, limits={"templateVersions": 2}), STEPS)


async def test_a_template_on_a_desktop_has_one(tmp_path: Path) -> None:
    works = Works()
    node = BuildNode(works)
    node.templates_ready = (*node.templates_ready, "desktop-ubuntu")
    async with open_site(tmp_path, works, node=node) as site:
        services, actor = site.desk.services, site.desk.actor
        await site.ended(await site.build(replace(STEPS, base="desktop-ubuntu")))
        await site.ended(await site.build(replace(STEPS, slug="other", base="mine")))
        await site.ended(await site.build(replace(STEPS, slug="plain")))
        kinds = {one.slug: one.kind for one in await services.templates.all(actor)}
        assert (kinds["mine"], kinds["other"], kinds["plain"]) == ("desktop", "desktop", "headless")
        box, plain = [await site.desk.create(template=one) for one in ("other", "plain")]
        assert (await services.desktops.issue(actor, box.id)).sandbox_id == box.id
        with pytest.raises(ConflictError, match="has none"):
            await services.desktops.issue(actor, plain.id)
        # Nor is it lost on the way through a snapshot, or with the template.
        snapshot = await services.snapshots.create(actor, box.id, "kept")
        await services.templates.remove(actor, "other")
        copy = await site.desk.create(template=None, snapshot=snapshot.id)
        assert (await site.desk.get(copy)).has_desktop


async def test_a_build_that_nobody_follows_ends_in_its_time(tmp_path: Path) -> None:
    async with open_site(tmp_path, Works(), sections={"builds": {"limit_s": 150}}) as site:
        site.works.waits_in = "first"
        build = await site.build(STEPS)
        await until(_set(site.works.is_in))
        await site.desk.clock.advance(150 - 60)
        assert (await site.now(build)).ended_at is None
        await site.desk.clock.advance(60)
        build, _ = await site.ended(build)
        assert (build.status, build.error) == (BuildStatus.FAILED, "it took longer than 150 s")
        await site.nothing_is_left()


async def test_a_template_that_is_deleted_ends_its_builds(site: Site) -> None:
    site.works.waits_in = "second"
    build = await site.build(STEPS)
    await until(_set(site.works.is_in))
    await site.desk.services.templates.remove(site.desk.actor, "mine")
    await site.nothing_is_left()
    assert not any("@" in one for one in site.desk.node.templates_ready)

    async def is_over() -> bool:
        await site.desk.clock.advance(0.5)
        async with site.desk.control.store.read() as tx:
            found = await tx.builds.find(build.org_id, build.id)
        return found is None or found.status is BuildStatus.CANCELLED

    await until(is_over)


async def test_a_base_that_is_deleted_meanwhile_ends_a_build_that_needs_it(site: Site) -> None:
    await site.ended(await site.build(STEPS))
    waiting = await site.build(replace(STEPS, slug="other", base="mine"))
    await site.desk.services.templates.remove(site.desk.actor, "mine")
    build, _ = await site.ended(waiting)
    assert build.status in (BuildStatus.READY, BuildStatus.FAILED)
    await site.nothing_is_left()


async def test_a_command_that_fails_ends_the_build_with_its_code(site: Site) -> None:
    site.works.fails["second"] = 7
    site.works.says["second"] = b"\x1b[31mwhy\x1b[0m\nnot"
    build, lines = await site.ended(await site.build(STEPS))
    assert build.status is BuildStatus.FAILED
    assert build.error == "running: second: a command ended with 7; the log shows what it printed"
    assert lines == [
        "running: first", "running: second", "why", "not", f"the build ended: {build.error}"
    ]  # fmt: skip
    await site.nothing_is_left()


async def test_a_command_that_floods_its_log_ends_the_build(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(boxes, "_FLOOD", 2)
    site.works.says["first"] = b"flood\n" * 600_000  # less than twice the size of a log
    site.works.says["second"] = b"flood\n" * 800_000
    build, lines = await site.ended(await site.build(STEPS))
    assert build.status is BuildStatus.FAILED
    assert build.error == (
        "running: second: a command printed over 4 MiB; redirect its output to a file"
    )
    assert "running: second" not in lines  # the first one has filled the log
    await site.nothing_is_left()


async def test_a_template_that_never_gets_ready_is_no_version(site: Site) -> None:
    async def never(_: PrepareVersion) -> None:
        raise ConflictError("the template's `ready` did not succeed within 120 s")

    site.desk.node.prepare_version = never  # type: ignore[assignment, method-assign]
    build, _ = await site.ended(await site.build(STEPS))
    assert build.status is BuildStatus.FAILED
    assert "did not succeed" in (build.error or "")
    assert await site.latest() is None
    await site.nothing_is_left()


async def test_a_build_waits_for_capacity(site: Site) -> None:
    room, site.desk.node.room = site.desk.node.room, 0
    build = await site.build(STEPS)

    async def waits() -> bool:
        await site.desk.clock.advance(0.5)
        return any(one.startswith("waiting: ") for one in await site.lines(build))

    await until(waits)
    site.desk.node.room = room
    build, _ = await site.ended(build)
    assert build.status is BuildStatus.READY


# --- what is kept for later builds --------------------------------------------------------------


async def kept(site: Site) -> list[str]:
    found = await site.desk.services.snapshots.page(site.desk.actor, limit=100, after=None)
    return [one.name or "" for one in found]


async def test_steps_are_taken_up_where_an_earlier_build_left_them(site: Site) -> None:
    await site.ended(await site.build(STEPS))
    assert len(await kept(site)) == 1  # after the last step; the first one took no time
    site.works.commands.clear()
    more = replace(STEPS, run=(*STEPS.run, "third"))
    build, lines = await site.ended(await site.build(more))
    assert build.status is BuildStatus.READY
    assert lines[:3] == [
        "cached: running: first", "cached: running: second", "running: third"
    ]  # fmt: skip
    assert not {"first", "second"} & set(site.works.commands)
    forced, lines = await site.ended(await site.build(replace(more, force=True)))
    assert "running: first" in lines
    assert forced.status is BuildStatus.READY
    assert len(await kept(site)) == 2


async def test_an_image_whose_steps_are_kept_is_not_pulled_again(site: Site) -> None:
    wish = replace(IMAGE, run=("first",))
    await site.ended(await site.build(wish))
    site.works.commands.clear()
    build, _ = await site.ended(await site.build(wish))
    assert build.status is BuildStatus.READY
    assert recipes.FIND_IMAGE in site.works.commands
    assert not {recipes.PULL_IMAGE, recipes.UNPACK, "first"} & set(site.works.commands)


async def test_what_is_kept_and_does_not_start_is_done_again(site: Site) -> None:
    wish = replace(IMAGE, run=("first",))
    await site.ended(await site.build(wish))
    node, start = site.desk.node, site.desk.node.ensure_running

    async def refuse(asked: EnsureRunning) -> Any:
        if asked.wish.origin is Origin.SNAPSHOT:
            raise ConflictError("cannot start this: the snapshot is damaged")
        return await start(asked)

    node.ensure_running = refuse  # type: ignore[method-assign]
    site.works.commands.clear()
    build, lines = await site.ended(await site.build(wish))
    assert build.status is BuildStatus.READY, (build.error, lines)
    assert any(one.startswith("building without the cache") for one in lines)
    assert recipes.PULL_IMAGE in site.works.commands
    await site.nothing_is_left()


async def test_a_build_with_secrets_keeps_nothing_and_masks_them(site: Site) -> None:
    site.works.says["first"] = b"it is hunter2hunter2\n"
    wish = replace(STEPS, secrets={"KEY": "hunter2hunter2"})
    build, lines = await site.ended(await site.build(wish))
    assert build.status is BuildStatus.READY
    assert "it is ***" in lines
    assert ("/run/secrets/KEY", b"hunter2hunter2") in site.works.secrets
    assert await kept(site) == []
    assert await plan_of(site, build) == {}


async def test_old_builds_are_removed(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "LIST_MAX", 2)
    monkeypatch.setattr(progress, "_LOGS_KEPT", 1)
    first, _ = await site.ended(await site.build(STEPS))
    site.works.fails["bad"] = 1
    await site.ended(await site.build(replace(STEPS, run=("bad",))))
    third, _ = await site.ended(await site.build(replace(STEPS, run=("third",))))
    last, _ = await site.ended(await site.build(replace(STEPS, run=("last",))))
    every = await site.desk.services.builds.list(site.desk.actor, "mine")
    assert [one.id for one in every] == [last.id, third.id, first.id], "that of a version is kept"
    async with site.desk.control.store.read() as tx:
        assert await tx.builds.read(third.id, after=0, limit=9) == []
        assert await tx.builds.read(last.id, after=0, limit=9) != []


async def test_uploads_at_once_share_the_limit(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    uploads, actor = site.desk.services.uploads, site.desk.actor
    monkeypatch.setattr(uploads, "_size_max", 1000)
    going = asyncio.Event()

    async def body() -> AsyncIterator[bytes]:
        yield bytes(300)
        await going.wait()
        yield bytes(300)

    taking = [asyncio.create_task(uploads.take(actor, body())) for _ in range(3)]
    await still()
    going.set()
    done = await asyncio.gather(*taking, return_exceptions=True)
    kept = [one for one in done if not isinstance(one, BaseException)]
    assert len(kept) == 1
    assert sum(isinstance(one, PayloadTooLargeError) for one in done) == 2
    assert len(list(uploads._folder.iterdir())) == 1


async def test_what_another_server_keeps_meanwhile_counts(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads, actor = site.desk.services.uploads, site.desk.actor
    monkeypatch.setattr(uploads, "_size_max", 1000)
    upload_id = uploads.named(actor, "mine", "hash")
    await uploads.take(actor, pieces(b"before"), upload_id=upload_id)

    async def body() -> AsyncIterator[bytes]:
        yield bytes(100)
        now = site.desk.clock.now()
        other = Upload(new_uuid(), actor.org_id, actor.user_id, "other", 950, "d", now)
        async with site.desk.control.store.write(actor.org_id) as tx:
            await tx.uploads.add(other)

    with pytest.raises(PayloadTooLargeError):
        await uploads.take(actor, body(), upload_id=upload_id)
    assert b"".join([one async for one in uploads.read(upload_id)]) == b"before"


async def pieces(*every: bytes) -> AsyncIterator[bytes]:
    for one in every:
        yield one


async def plan_of(site: Site, build: Build) -> Any:
    """Return what the database has of the plan of a build that has ended."""
    with closing(sqlite3.connect(site.desk.home / "sandyard.db")) as database:
        ((sealed,),) = database.execute("SELECT plan_sealed FROM builds WHERE id = ?", (build.id,))
    return json.loads(Seal(secret_key(site.desk.home)).open(sealed)["plan"])


async def test_a_build_that_was_never_started_leaves_no_secrets(tmp_path: Path) -> None:
    async with open_desk(tmp_path, nodes={"fake": BuildNode(Works())}) as desk:
        site = Site(desk, Works())
        build = await site.build(replace(STEPS, secrets={"KEY": "hunter2hunter2"}))
        await desk.services.builds.cancel(desk.actor, "mine", build.id)
        assert (await site.now(build)).status is BuildStatus.CANCELLED
        assert await plan_of(site, build) == {}


async def test_what_builds_keep_is_bounded_and_theirs_alone(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await site.desk.create()
    with pytest.raises(InvalidArgumentError, match="build-cache-"):
        await site.desk.services.snapshots.create(site.desk.actor, box.id, "build-cache-mine")
    await site.desk.services.snapshots.create(site.desk.actor, box.id, "mine")
    monkeypatch.setattr(cache, "_MOST", 2)
    for one in ("a", "b", "c", "d"):
        await site.ended(await site.build(replace(STEPS, run=(one,))))
    assert len(await kept(site)) == 3
    monkeypatch.setattr(cache, "_LASTS", timedelta())
    await site.ended(await site.build(replace(STEPS, run=("e",))))
    assert await kept(site) == ["mine"]


async def test_a_build_that_cannot_keep_its_machine_succeeds(site: Site) -> None:
    async def full(*_: object, **__: object) -> None:
        raise NoCapacityError("the host's disk is full")

    site.desk.node.ensure_snapshot = full  # type: ignore[assignment, method-assign]
    build, lines = await site.ended(await site.build(STEPS))
    assert build.status is BuildStatus.READY
    assert "not cached: the host's disk is full" in lines


async def test_dockerfiles_keep_their_layers_whether_they_succeed_or_not(site: Site) -> None:
    wish = NewTemplate("mine", dockerfile="FROM scratch")
    site.works.fails[recipes.BUILD] = 1
    build, _ = await site.ended(await site.build(wish))
    assert build.status is BuildStatus.FAILED
    (first,) = await kept(site)
    site.works.fails.clear()
    build, _ = await site.ended(await site.build(wish))
    assert build.status is BuildStatus.READY
    (second,) = await kept(site)
    assert first != second
    assert first.rpartition("-")[0] == second.rpartition("-")[0]


def _set(event: asyncio.Event) -> Callable[[], Coroutine[Any, Any, bool]]:
    async def is_set() -> bool:
        return event.is_set()

    return is_set


# --- steps --------------------------------------------------------------------------------------


def step(kind: StepKind, *args: str, number: int = 1, **more: Any) -> Step:
    return Step(kind, args, f"step {number}", **more)


async def test_steps_are_taken_as_who_and_where_those_before_them_said(site: Site) -> None:
    async def archive() -> AsyncIterator[bytes]:
        yield b"an archive"

    uploads, actor = site.desk.services.uploads, site.desk.actor
    upload_id = uploads.named(actor, "mine", "hash")
    await uploads.take(actor, archive(), upload_id=upload_id)
    steps = (
        step(StepKind.RUN, "first", number=1),
        step(StepKind.USER, "me", "true", number=2),
        step(StepKind.WORKDIR, "/w", number=3),
        step(StepKind.ENV, "B", "$A-b", number=4),
        step(StepKind.RUN, "second", number=5),
        step(StepKind.RUN, "third", "other", number=6),
        step(StepKind.COPY, "a/*", "b/", "", "0750", number=7, upload=upload_id),
        step(StepKind.COPY, "c", "d", "x:y", "", number=8, upload=upload_id),
    )
    wish = NewTemplate(
        "mine", base="base-minimal", env={"A": "a"}, steps=steps, tags=("v1", "default"),
        start="serve", stands_for="ubuntu:22.04",
    )  # fmt: skip
    build, lines = await site.ended(await site.build(wish))
    assert build.status is BuildStatus.READY, (build.error, lines)
    assert lines[:9] == [
        "using the template base-minimal for the image ubuntu:22.04", "running: first", "user: me",
        "working directory: /w", "running: second", "running: third", "copying a/* to /w/b/",
        "copying c to /w/d", "keeping the root file system",
    ]  # fmt: skip
    ran = {str(one.command): one for one in site.works.runs}
    assert (ran["first"].user, ran["first"].cwd, ran["first"].env) == ("root", "~", {"A": "a"})
    assert (ran["second"].user, ran["second"].cwd) == ("me", "/w")
    assert ran["second"].env == {"A": "a", "B": "a-b"}
    assert (ran["third"].user, ran["third"].cwd) == ("other", "/w")
    assert ran[recipes.ADD_USER].env == {"NAME": "me", "SUDO": "true"}
    assert ran[recipes.MAKE_WORKDIR].env == {"TARGET": "/w", "OWNER": "me:", "WHO": "me"}
    copies = [one for one in site.works.runs if one.command == recipes.COPY]
    assert [one.env for one in copies] == [
        {"SOURCE": "a", "TARGET": "/w/b/", "OWNER": "me:", "WHO": "me", "MODE": "0750"},
        {"SOURCE": "c", "TARGET": "/w/d", "OWNER": "x:y", "WHO": "me", "MODE": ""},
    ]
    assert site.works.secrets.count((recipes.ARCHIVE, b"an archive")) == 2
    own = await site.desk.services.templates.own(actor, "mine")
    assert own.template.tags == {"v1": 1, "default": 1, "latest": 1}
    about = own.versions[0].about
    assert (about.user, about.workdir, about.env) == ("me", "/w", {"A": "a", "B": "a-b"})
    command = dict(site.works.secrets)[recipes.COMMAND_FILE]
    assert json.loads(command) == {
        "shell": "serve", "env": {"A": "a", "B": "a-b"}, "user": "me", "workdir": "/w",
    }  # fmt: skip
    assert await uploads.has(actor, upload_id)  # other builds may need it


async def test_a_step_that_fails_is_told_by_its_phase(site: Site) -> None:
    site.works.fails["second"] = 1
    steps = (step(StepKind.RUN, "first"), step(StepKind.RUN, "second", number=2))
    build, _ = await site.ended(
        await site.build(NewTemplate("mine", base="base-minimal", steps=steps))
    )
    assert build.status is BuildStatus.FAILED
    async with site.desk.control.store.read() as tx:
        (last,) = await tx.builds.read(build.id, after=build.lines - 1, limit=9)
    assert last.phase == "step 2"


async def test_a_step_with_force_is_taken_again_and_all_after_it(site: Site) -> None:
    def wish(*, force: bool) -> NewTemplate:
        second = step(StepKind.RUN, "second", number=2, force=force)
        steps = (step(StepKind.RUN, "first"), second, step(StepKind.RUN, "third", number=3))
        return NewTemplate("mine", base="base-minimal", steps=steps)

    await site.ended(await site.build(wish(force=False)))
    _, lines = await site.ended(await site.build(wish(force=False)))
    assert lines[:3] == ["cached: running: first", "cached: running: second",
                         "cached: running: third"]  # fmt: skip
    site.works.commands.clear()
    await site.ended(await site.build(wish(force=True)))
    assert {"second", "third"} <= set(site.works.commands)


async def test_a_build_that_is_never_described_ends(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(removal, "WAITS", timedelta(seconds=300))
    builds, actor = site.desk.services.builds, site.desk.actor
    build = await builds.announce(actor, NewTemplate("mine", tags=("v1",)))
    assert build.status is BuildStatus.WAITING
    wish = NewTemplate("mine", base="base-minimal", run=("first",))
    with pytest.raises(NotFoundError):
        await builds.describe(actor, build.id, replace(wish, slug="other"))
    await site.desk.clock.advance(200)
    assert (await site.now(build)).status is BuildStatus.WAITING

    async def is_over() -> bool:
        await site.desk.clock.advance(10)
        return (await site.now(build)).ended_at is not None

    await until(is_over)
    build = await site.now(build)
    assert (build.status, build.error) == (
        BuildStatus.FAILED, "it was announced, and not started within two hours"
    )  # fmt: skip
    with pytest.raises(ConflictError, match="started before"):
        await builds.describe(actor, build.id, wish)


async def test_builds_that_wait_are_bounded(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandyard.server.service.builds.builds._WAITING_MAX", 2)
    builds, actor = site.desk.services.builds, site.desk.actor
    first = await builds.announce(actor, NewTemplate("mine"))
    await builds.announce(actor, NewTemplate("mine"))
    with pytest.raises(LimitReachedError, match="waiting for their steps"):
        await builds.announce(actor, NewTemplate("mine"))
    await builds.cancel(actor, "mine", first.id)
    await builds.announce(actor, NewTemplate("mine"))
