"""Builds of templates by the E2B API, as far as no machine is needed."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import pytest
from tests.support.house import EACH_STORE, Yard, open_yard, store_section

from sandyard.server.app.installation import server_id_of
from sandyard.server.app.settings import E2bSettings
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.ids import new_uuid
from sandyard.server.core.records import (
    Build,
    BuildLine,
    BuildStatus,
    TemplateVersion,
    VersionAbout,
)
from sandyard.server.core.shapes import Shape
from sandyard.server.service.builds.builds import read
from sandyard.server.service.builds.plan import NewTemplate, Step, StepKind

HASH = "ab" * 32


@pytest.fixture(params=EACH_STORE)
async def yard(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Yard]:
    e2b = E2bSettings(images={"ubuntu": "base-minimal"})
    async with (
        store_section(request.param) as sections,
        open_yard(tmp_path, sections={"e2b": e2b, **sections}) as opened,
    ):
        yield opened


@pytest.fixture
async def client(yard: Yard) -> AsyncIterator[httpx.AsyncClient]:
    made = await yard.client.post("/v1/api-keys", json={"name": "e2b", "format": "e2b"})
    async with yard.client_of(None) as opened:
        opened.headers["X-API-Key"] = made.json()["data"]["key"]
        yield opened


async def announced(client: httpx.AsyncClient, name: str = "mine", **body: Any) -> dict[str, Any]:
    answer = await client.post("/v3/templates", json={"name": name, **body})
    assert answer.status_code == 202, answer.text
    told: dict[str, Any] = answer.json()
    return told


async def begun(client: httpx.AsyncClient, told: dict[str, Any], **body: Any) -> httpx.Response:
    path = f"/v2/templates/{told['templateID']}/builds/{told['buildID']}"
    return await client.post(path, json={"fromTemplate": "base-minimal", **body})


async def status(client: httpx.AsyncClient, told: dict[str, Any], **query: Any) -> dict[str, Any]:
    path = f"/templates/{told['templateID']}/builds/{told['buildID']}/status"
    answer = await client.get(path, params=query)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def plan(yard: Yard) -> tuple[NewTemplate, Shape]:
    """Return what the next build is to do."""
    async with yard.house.store.write(Turn.SHARED) as tx:
        found = await tx.builds.claim(
            server_id_of(yard.home), lease="x", lasts=timedelta(seconds=60)
        )
    assert found is not None
    return read(found.plan)


async def test_a_build_is_announced_described_and_followed(
    yard: Yard, client: httpx.AsyncClient
) -> None:
    told = await announced(
        client, "My_Template:v1", tags=["stable", "1.0"], cpuCount=3, memoryMB=768,
        minFreeDiskMb=3000, teamID="x",
    )  # fmt: skip
    assert told == {
        "templateID": "my-template", "buildID": told["buildID"], "public": False,
        "names": ["my-template"], "aliases": ["my-template"], "tags": ["v1", "stable", "1.0"],
    }  # fmt: skip
    UUID(told["buildID"])  # clients read it as one
    waiting = await status(client, told)
    assert (waiting["status"], waiting["logEntries"], waiting["logs"]) == ("waiting", [], [])
    own = await yard.client.get(f"/v1/templates/my-template/builds/{told['buildID']}")
    assert own.json()["data"]["status"] == "waiting"
    shown = (await yard.client.get("/v1/templates/my-template")).json()["data"]
    assert shown["status"] == "pending"
    path = f"/templates/my-template/files/{HASH}"
    files = await client.get(path)
    assert (files.status_code, files.json()["present"]) == (201, False)
    async with yard.client_of(None) as stranger:
        sent = await stranger.put(files.json()["url"], content=b"a tar archive")
        assert sent.status_code == 200, sent.text
        again = await stranger.put(files.json()["url"], content=b"a tar archive")
        assert again.status_code == 200, again.text
    assert (await client.get(path)).json()["present"] is True
    steps = [
        {"type": "COPY", "args": ["a/*", "b", "root", "0755"], "filesHash": HASH, "force": True},
        {"type": "RUN", "args": ["true", "root"]},
        {"type": "env", "args": ["A", "$B"]},
        {"type": "WORKDIR", "args": ["/w"]},
        {"type": "USER", "args": ["me"]},
    ]
    answer = await begun(client, told, steps=steps, startCmd="serve", readyCmd="true", force=True)
    assert (answer.status_code, answer.content) == (202, b"")
    assert (await status(client, told))["status"] == "building"
    wish, shape = await plan(yard)
    assert shape == Shape(3, 768, 3000)
    assert (wish.base, wish.start, wish.ready, wish.force) == (
        "base-minimal", "serve", "true", True
    )  # fmt: skip
    assert wish.tags == ("v1", "stable", "1.0")
    (upload,) = {one.upload for one in wish.steps if one.upload is not None}
    assert wish.steps == (
        Step(StepKind.COPY, ("a/*", "b", "root", "0755"), "step 1", upload, force=True),
        Step(StepKind.RUN, ("true", "root"), "step 2"),
        Step(StepKind.ENV, ("A", "$B"), "step 3"),
        Step(StepKind.WORKDIR, ("/w",), "step 4"),
        Step(StepKind.USER, ("me",), "step 5"),
    )
    # What one build needs, another one may need, too.
    assert (await client.get(path)).json()["present"] is True
    twice = await begun(client, told)
    assert (twice.status_code, "started before" in twice.json()["message"]) == (409, True)


async def test_a_name_alone_has_the_default_tag_and_an_image_an_account(
    yard: Yard, client: httpx.AsyncClient
) -> None:
    told = await announced(client)
    assert told["tags"] == ["default"]
    answer = await begun(
        client, told, fromTemplate=None, fromImage="docker.io/library/ubuntu:22.04"
    )
    assert answer.status_code == 202, answer.text
    wish, shape = await plan(yard)
    assert (wish.base, wish.image, wish.stands_for) == (
        "base-minimal", None, "docker.io/library/ubuntu:22.04"
    )  # fmt: skip
    assert (shape.vcpus, shape.memory_mib) == (2, 1024)


@pytest.mark.parametrize(
    ("body", "code", "told"),
    [
        ({"name": ""}, 400, "name"),
        ({"name": "a b"}, 400, "name"),
        ({"name": "x" * 80}, 400, "slug"),
        ({"name": "base-minimal"}, 400, "installation"),
        ({"name": "a", "cpuCount": 0}, 400, "vcpus"),
        ({"name": "a", "cpuCount": "2"}, 400, "cpuCount"),
        ({"name": "a", "memoryMB": 1}, 400, "memory"),
        ({"name": "a", "minFreeDiskMb": 2**40}, 400, "minFreeDiskMb"),
        ({"name": "a", "tags": ["a:b"]}, 400, "tag"),
        ({"name": "a", "tags": [f"t{n}" for n in range(30)]}, 400, "tags"),
        ({}, 400, "name"),
    ],
)
async def test_wrong_announcements(
    client: httpx.AsyncClient, body: dict[str, Any], code: int, told: str
) -> None:
    answer = await client.post("/v3/templates", json=body)
    assert answer.status_code == code, answer.text
    assert told in answer.json()["message"]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"fromTemplate": "no-such"}, "no-such"),
        ({"fromTemplate": None}, "exactly one"),
        ({"fromTemplate": None, "fromImage": "A B"}, "image"),
        ({"fromImageRegistry": {"type": "registry"}}, "sandyard registry add"),
        ({"steps": [{"type": "FLY"}]}, "'FLY' is none of RUN, COPY"),
        ({"steps": [{"type": "RUN"}]}, "step 1, RUN"),
        ({"steps": [{"type": "RUN", "args": ["a", "b", "c"]}]}, "step 1, RUN"),
        ({"steps": [{"type": "RUN", "args": ["\x00"]}]}, "steps"),
        ({"steps": [{"type": "RUN", "args": ["true", ""]}]}, "steps"),
        ({"steps": [{"type": "COPY", "args": ["a", "b"]}]}, "step 1, COPY"),
        ({"steps": [{"type": "COPY", "args": ["a", "b"], "filesHash": "../x"}]}, "filesHash"),
        ({"steps": [{"type": "COPY", "args": ["a", "b"], "filesHash": HASH}]}, "no such upload"),
        ({"steps": [{"type": "COPY", "args": ["a", "b", "", "9"], "filesHash": HASH}]}, "COPY"),
        ({"steps": [{"type": "ENV", "args": ["A"]}]}, "step 1, ENV"),
        ({"steps": [{"type": "ENV", "args": ["A B", "x"]}]}, "A B"),
        ({"steps": [{"type": "WORKDIR", "args": []}]}, "step 1, WORKDIR"),
        ({"steps": [{"type": "USER", "args": ["me", "maybe"]}]}, "step 1, USER"),
        ({"steps": [{"type": "RUN", "args": ["true"]}] * 501}, "500 steps"),
        ({"steps": [{"type": "RUN", "args": ["x" * 2**20 + "x"]}]}, "1 MiB"),
    ],
)
async def test_wrong_builds(client: httpx.AsyncClient, body: dict[str, Any], told: str) -> None:
    made = await announced(client)
    answer = await begun(client, made, **body)
    assert answer.status_code == 400, answer.text
    assert told in answer.json()["message"]
    assert (await status(client, made))["status"] == "waiting"  # it can be described once more


async def test_builds_and_files_of_others_are_not_there(
    yard: Yard, client: httpx.AsyncClient
) -> None:
    told = await announced(client)
    for path in (f"/templates/other/files/{HASH}", "/templates/other/tags"):
        assert (await client.get(path)).status_code == 404
    assert (await client.get("/templates/mine/files/xyz")).status_code == 400
    assert (await begun(client, told | {"templateID": "other"})).status_code == 404
    assert (await begun(client, told | {"buildID": new_uuid()})).status_code == 404
    assert (await begun(client, told | {"buildID": "x"})).status_code == 404
    url = httpx.URL((await client.get(f"/templates/mine/files/{HASH}")).json()["url"])
    async with yard.client_of(None) as stranger:
        for name, value in (("signature", "0" * 64), ("expires", "9" * 12), ("by", "x:y")):
            forged = await stranger.put(url.copy_set_param(name, value), content=b"x")
            assert forged.status_code == 401, forged.text
        other = url.copy_with(path=f"/templates/mine/files/{'cd' * 32}")
        assert (await stranger.put(other, content=b"x")).status_code == 401
        assert (await stranger.get(url)).status_code == 401  # it is for an upload alone
        assert (await stranger.put(url.path, content=b"x")).status_code == 401
    assert (await client.put(url.path, content=b"x")).status_code == 200  # by a key, too
    made = await yard.client.post(
        "/v1/api-keys", json={"name": "few", "format": "e2b", "scopes": ["sandbox:read"]}
    )
    async with yard.client_of(None) as reader:
        reader.headers["X-API-Key"] = made.json()["data"]["key"]
        for method, path in (
            ("POST", "/v3/templates"), ("GET", f"/templates/mine/files/{HASH}"),
            ("GET", "/templates/mine/tags"), ("POST", "/templates/tags"),
        ):  # fmt: skip
            body = {"name": "x", "target": "mine", "tags": ["x"]} if method == "POST" else None
            refused = await reader.request(method, path, json=body)
            assert refused.status_code in (403, 404), (path, refused.text)


async def test_a_failed_build_says_at_which_step(yard: Yard, client: httpx.AsyncClient) -> None:
    told = await announced(client)
    assert (await begun(client, told)).status_code == 202
    org_id, _ = await yard.first()
    now = datetime.now(UTC)
    lines = [
        BuildLine(number, now, f"step {number // 60}", f"{number}") for number in range(1, 151)
    ]
    async with yard.house.store.write(Turn.SHARED) as tx:
        found = await tx.builds.find(org_id, told["buildID"])
        assert found is not None
        await tx.builds.append(found.id, lines)
        await _end(tx, found, lines=150, error="why")
    first = await status(client, told)
    assert (first["status"], first["reason"]["message"], first["reason"]["step"]) == (
        "error", "why", "2"
    )  # fmt: skip
    assert [one["message"] for one in first["logEntries"]] == [str(n) for n in range(1, 101)]
    assert first["logEntries"][0]["step"] == "0"
    rest = await status(client, told, logsOffset=100)
    assert [one["message"] for one in rest["logEntries"]] == [str(n) for n in range(101, 151)]
    assert (await status(client, told, logsOffset=150))["logEntries"] == []
    path = f"/templates/mine/builds/{told['buildID']}/status"
    for query in (
        {"logsOffset": "x"},
        {"logsOffset": -1},
        {"limit": 1000},
        {"logsOffset": "9" * 30},
    ):
        assert (await client.get(path, params=query)).status_code == 400


async def _end(tx: Any, build: Build, *, lines: int, error: str) -> None:
    claimed = await tx.builds.claim("any", lease="x", lasts=timedelta(seconds=60))
    assert claimed is not None
    ended = replace(
        claimed,
        status=BuildStatus.FAILED,
        ended_at=datetime.now(UTC),
        lines=lines,
        error=error,
        phase="step 2",
    )
    assert await tx.builds.save(ended, lease="x", lasts=None) is not None


async def add_version(yard: Yard, number: int, *tags: str) -> str:
    """Write a version as a build would, and return its build's id."""
    org_id, _ = await yard.first()
    about = VersionAbout("mine", "Alpine", "headless", Shape(1, 256, 2048))
    async with yard.house.store.write(org_id) as tx:
        template = await tx.templates.find(org_id, "mine")
        assert template is not None
        version = TemplateVersion(
            org_id, "mine", number, f"{number:024x}", "r" * 64, 100, about, {}, new_uuid(),
            datetime.now(UTC),
        )  # fmt: skip
        await tx.versions.add(version)
        for tag in tags:
            template.tags[tag] = number  # type: ignore[index]
        await tx.templates.put(template)
    return version.build_id


async def test_tags(yard: Yard, client: httpx.AsyncClient) -> None:
    await announced(client)
    first = await add_version(yard, 1, "default", "v1")
    second = await add_version(yard, 2, "v2", "latest")

    async def assign(target: str, *tags: str) -> httpx.Response:
        return await client.post("/templates/tags", json={"target": target, "tags": tags})

    done = await assign("mine:v1", "production", "latest")
    assert done.status_code == 201, done.text
    assert done.json() == {
        "tags": ["production", "latest"], "buildID": first
    }  # fmt: skip
    assert (await assign("team/mine", "x")).json()["buildID"] == first  # the default
    assert (await assign("mine:v2", "default")).json()["buildID"] == second
    assert (await assign("mine", "y")).json()["buildID"] == second
    for target, tags, code in (
        ("mine:v9", ["a"], 404), ("other", ["a"], 404), ("mine", ["mine:"], 400), ("mine", [], 400),
("mine", ["ok", "not ok"], 400), ("a b", ["x"], 400),
    ):  # fmt: skip
        assert (await assign(target, *tags)).status_code == code, target
    listed = {
        one["tag"]: one["buildID"] for one in (await client.get("/templates/mine/tags")).json()
    }
    assert listed == {
        "production": first, "latest": first, "v1": first, "x": first, "v2": second,
        "default": second, "y": second,
    }  # fmt: skip

    async def drop(*tags: str) -> httpx.Response:
        body = {"name": "mine", "tags": tags}
        return await client.request("DELETE", "/templates/tags", json=body)

    assert (await drop("x", "default")).status_code == 400
    assert (await drop("production", "x", "none")).status_code == 204
    left = {one["tag"] for one in (await client.get("/templates/mine/tags")).json()}
    assert left == {"latest", "v1", "v2", "default", "y"}
    named = await client.get("/templates/aliases/team%2FMine")
    assert named.json() == {"templateID": "mine", "public": False}
