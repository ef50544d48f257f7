"""Templates of organizations through the API: requests, uploads, versions and tags; no machine."""

import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.support.house import Yard, open_yard

from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.ids import new_uuid
from sandyard.server.core.records import BuildLine, BuildStatus, TemplateVersion, VersionAbout
from sandyard.server.core.shapes import Shape

ROUTE = "/v1/templates"
LEASE = timedelta(seconds=30)
SMALL = {"builds": {"upload_mib": 1}, "plans": {"enterprise": {"builds": 3, "templates": 3}}}


@pytest.fixture
async def yard(tmp_path: Path) -> AsyncIterator[Yard]:
    async with open_yard(tmp_path, sections=SMALL) as made:
        yield made


async def post(yard: Yard, status: int = 202, **body: object) -> Any:
    answer = await yard.client.post(ROUTE, json={"slug": "mine", **body})
    assert answer.status_code == status, answer.text
    return answer.json()["data"] if status == 202 else answer.json()["error"]


async def get(yard: Yard, path: str, status: int = 200) -> Any:
    answer = await yard.client.get(f"{ROUTE}/{path}")
    assert answer.status_code == status, answer.text
    return answer.json()["data"] if status == 200 else answer.json()["error"]


async def add_version(yard: Yard, number: int, slug: str = "mine") -> str:
    """Write a version as a build would, and return its digest."""
    org_id, _ = await yard.first()
    about = VersionAbout(
        slug, "Alpine", "headless", Shape(1, 256, 2048), {"OFMINE": "x"}, "me", "/w"
    )
    digest = f"{number:024x}"
    async with yard.house.store.write(org_id) as tx:
        template = await tx.templates.find(org_id, slug)
        assert template is not None
        version = TemplateVersion(
            org_id, slug, number, digest, "r" * 64, 100, about, {"image": "x"}, new_uuid(),
            datetime.now(UTC),
        )  # fmt: skip
        await tx.versions.add(version)
        template.tags["latest"] = number  # type: ignore[index]
        await tx.templates.put(template)
    return digest


async def test_a_build_is_requested_listed_and_cancelled(yard: Yard) -> None:
    made = await post(yard, base="base-minimal", run=["true"], name="Mine", description="of mine")
    assert (made["slug"], made["version"]) == ("mine", 1)
    told = await get(yard, f"mine/builds/{made['buildId']}")
    assert (told["status"], told["sandboxId"], told["error"]) == ("queued", None, None)
    template = await get(yard, "mine")
    assert (template["status"], template["name"], template["digest"]) == ("building", "Mine", None)
    assert "mine" in [one["slug"] for one in (await yard.client.get(ROUTE)).json()["data"]]
    error = (await yard.client.post("/v1/sandboxes", json={"template": "mine"})).json()["error"]
    assert (error["code"], error["details"]["reason"]) == ("invalid_state", "template_not_built")

    second = await post(yard, base="base-minimal")
    assert second["version"] == 2
    assert [one["version"] for one in await get(yard, "mine/builds")] == [2, 1]
    path = f"{ROUTE}/mine/builds/{made['buildId']}/cancel"
    assert (await yard.client.post(path)).status_code == 200
    assert (
        await yard.client.post(f"{ROUTE}/other/builds/{made['buildId']}/cancel")
    ).status_code == 404
    await get(yard, f"mine/builds/{new_uuid()}", 404)
    await get(yard, "mine/builds/no-uuid", 404)
    await get(yard, "nothing/builds", 404)
    await get(yard, "nothing/versions", 404)
    await get(yard, "nothing/logs", 404)


async def test_a_repeated_request_is_one_build(yard: Yard) -> None:
    body, headers = {"slug": "mine", "base": "base-minimal"}, {"Idempotency-Key": "k"}
    both = [await yard.client.post(ROUTE, json=body, headers=headers) for _ in range(2)]
    assert both[0].json()["data"] == both[1].json()["data"]
    answer = await yard.client.post(ROUTE, json={**body, "run": ["x"]}, headers=headers)
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "idempotency_key_reused")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "base"), ({"base": "base-minimal", "image": "alpine"}, "image"),
        ({"base": "nothing"}, "base"), ({"base": "builder"}, "base"),
        ({"base": "base-minimal:other"}, "base"), ({"base": "a b"}, "base"),
        ({"slug": "base-ubuntu", "base": "base-minimal"}, "slug"),
        ({"slug": "builder", "base": "base-minimal"}, "slug"),
        ({"slug": "../x", "base": "base-minimal"}, "slug"), ({"upload": "x"}, "upload"),
        ({"upload": new_uuid()}, "upload"), ({"dockerfile": "FROM x", "context": "y"}, "context"),
        ({"base": "base-minimal", "defaults": {"memory": "1TB"}}, "defaults.memory"),
        ({"base": "base-minimal", "defaults": {"vcpus": 0}}, "defaults.vcpus"),
        ({"base": "base-minimal", "defaultUser": ""}, "defaultUser"),
        ({"base": "base-minimal", "files": [{"path": "/x"}]}, "files"),
        ({"base": "base-minimal", "files": [{"path": "/x", "contents": "a", "mode": "rw"}]},
         "files"),
        ({"base": "base-minimal", "files": [{"path": "/x", "contentsBase64": "%"}]}, "files"),
        ({"base": "base-minimal", "run": "true"}, "run"),
        ({"base": "base-minimal", "run": [1]}, None),
        ({"base": "base-minimal", "env": {"A B": "x"}}, "env"),
    ],
)  # fmt: skip
async def test_what_is_wrong_is_refused_by_name(
    yard: Yard, body: dict[str, Any], field: str | None
) -> None:
    error = await post(yard, 400, **body)
    assert error["code"] == "bad_request"
    if field is not None:
        assert error["details"]["field"] == field, error
    assert await get(yard, "mine", 404)


async def test_an_upload_is_kept_for_its_organization_alone(yard: Yard) -> None:
    answer = await yard.client.post(f"{ROUTE}/uploads", content=b"x" * 1000)
    assert answer.status_code == 201, answer.text
    made = answer.json()["data"]
    assert made["sizeBytes"] == 1000
    assert [one.name for one in (yard.home / "uploads").iterdir()] == [made["uploadId"]]
    async with yard.client_of(await yard.stranger()) as stranger:
        body = {"slug": "mine", "upload": made["uploadId"]}
        answer = await stranger.post(ROUTE, json=body)
        assert (answer.status_code, answer.json()["error"]["details"]["field"]) == (400, "upload")
    too_large = await yard.client.post(f"{ROUTE}/uploads", content=b"x" * (2**20 + 1))
    assert too_large.status_code == 413
    assert len(list((yard.home / "uploads").iterdir())) == 1
    build = await post(yard, upload=made["uploadId"])
    assert build["version"] == 1


async def test_another_organizations_templates_are_not_there(yard: Yard) -> None:
    made = await post(yard, base="base-minimal")
    digest = await add_version(yard, 1)
    async with yard.client_of(await yard.stranger()) as stranger:
        for method, path in (
            ("GET", ""), ("GET", "/builds"), ("GET", f"/builds/{made['buildId']}"),
            ("POST", f"/builds/{made['buildId']}/cancel"), ("GET", "/logs"), ("GET", "/versions"),
            ("GET", f"/logs?build={made['buildId']}"), ("DELETE", "/versions/1"), ("DELETE", ""),
            ("DELETE", "/tags/latest"),
        ):  # fmt: skip
            answer = await stranger.request(method, f"{ROUTE}/mine{path}")
            assert answer.status_code == 404, (method, path)
        answer = await stranger.put(f"{ROUTE}/mine/tags/x", json={"version": 1})
        assert answer.status_code == 404
        assert "mine" not in [one["slug"] for one in (await stranger.get(ROUTE)).json()["data"]]
        for reference in ("mine", f"mine@{digest}", "mine:latest", "mine:1"):
            answer = await stranger.post("/v1/sandboxes", json={"template": reference})
            assert answer.status_code == 400, reference
            assert "known are base-" in answer.json()["error"]["message"]
        # The same slug is free for it.
        answer = await stranger.post(ROUTE, json={"slug": "mine", "base": "base-minimal"})
        assert answer.json()["data"]["version"] == 1


async def test_credentials_are_named_by_id_and_never_shown(yard: Yard) -> None:
    route = "/v1/registry-credentials"
    body = {"host": "ghcr.io", "username": "me", "password": "of-mine-alone"}
    answer = await yard.client.post(route, json=body)
    assert answer.status_code == 201, answer.text
    made = answer.json()["data"]
    assert set(made) == {"id", "host", "username", "createdAt"}
    listed = await yard.client.get(route)
    assert [one["id"] for one in listed.json()["data"]] == [made["id"]]
    feed = await yard.client.get("/v1/activity")
    assert "of-mine-alone" not in answer.text + listed.text + feed.text
    assert b"of-mine-alone" not in await yard.written()
    for wrong in (
        {"host": "http://ghcr.io"}, {"host": "a/b"}, {"host": ""}, {"host": "-a"},
        {"username": ""}, {"username": "a:b"}, {"password": ""}, {"password": "a\nb"},
        {"password": None},
    ):  # fmt: skip
        answer = await yard.client.post(route, json={**body, **wrong})
        assert answer.status_code == 400, wrong
        assert answer.json()["error"]["details"]["field"] == next(iter(wrong))
        assert "of-mine-alone" not in answer.text

    await post(yard, image="ghcr.io/a/b:1", credentials=made["id"])
    await post(yard, dockerfile="FROM ghcr.io/a/b", credentials=made["id"])
    for more in (
        {"image": "alpine"}, {"image": "docker.io/a/b"}, {"image": "ghcr.io:444/a/b"},
        {"base": "base-minimal"},
    ):  # fmt: skip
        error = await post(yard, 400, credentials=made["id"], **more)
        assert error["details"]["field"] == "credentials", more
    async with yard.client_of(await yard.stranger()) as stranger:
        wish = {"slug": "x", "image": "ghcr.io/a/b", "credentials": made["id"]}
        answer = await stranger.post(ROUTE, json=wish)
        assert (answer.status_code, answer.json()["error"]["details"]["field"]) == (
            400, "credentials",
        )  # fmt: skip
        assert (await stranger.delete(f"{route}/{made['id']}")).status_code == 404
    assert (await yard.client.delete(f"{route}/{made['id']}")).status_code == 200
    assert (await yard.client.delete(f"{route}/{made['id']}")).status_code == 404


async def test_scopes_are_needed(yard: Yard) -> None:
    org_id, user_id = await yard.first()
    made = await post(yard, base="base-minimal")
    async with yard.client_of(await yard.add_key(org_id, user_id, scopes=("sandbox:*",))) as plain:
        assert (await plain.get(f"{ROUTE}/mine")).status_code == 200
        assert (await plain.get(f"{ROUTE}/mine/builds/{made['buildId']}")).status_code == 403
        answer = await plain.post(ROUTE, json={"slug": "x", "base": "base-minimal"})
        assert answer.json()["error"]["details"]["requiredScope"] == "template:write"
        assert (await plain.post(f"{ROUTE}/uploads", content=b"x")).status_code == 403
    reader = yard.client_of(await yard.add_key(org_id, user_id, scopes=("template:read",)))
    async with reader:
        assert (await reader.get(f"{ROUTE}/mine/builds")).status_code == 200
        assert (await reader.delete(f"{ROUTE}/mine")).status_code == 403


async def test_limits_of_the_plan(yard: Yard) -> None:
    made = [await post(yard, slug=slug, base="base-minimal") for slug in ("a", "b", "c", "a")]
    # Builds beyond the plan's limit are queued.
    places = [(await get(yard, f"{one['slug']}/builds/{one['buildId']}"))["place"] for one in made]
    assert places == [1, 2, 3, 4]
    assert [one["place"] for one in await get(yard, "a/builds")] == [4, 1]
    org_id, _ = await yard.first()
    async with yard.house.store.write(org_id) as tx:
        for slug in ("b", "a"):
            for build in await tx.builds.page(org_id, slug, limit=9):
                taken = await tx.builds.claim("s", lease=build.id, lasts=LEASE)
                assert taken is not None
                ended = replace(taken, status=BuildStatus.FAILED, ended_at=datetime.now(UTC))
                await tx.builds.save(ended, lease=build.id, lasts=None)
    error = await post(yard, 409, slug="d", base="base-minimal")
    assert error["details"]["limit"] == "templates"
    assert (await post(yard, slug="a", base="base-minimal"))["version"] == 3
    assert [one["place"] for one in await get(yard, "a/builds")] == [2, 1, None]


async def test_versions_are_tagged_chosen_and_deleted(yard: Yard) -> None:
    await post(yard, base="base-minimal")
    first, second = await add_version(yard, 1), await add_version(yard, 2)
    found = await get(yard, "mine/versions")
    assert [(one["version"], one["tags"], one["digest"]) for one in found] == [
        (2, ["latest"], second), (1, [], first),
    ]  # fmt: skip
    assert (found[0]["defaultUser"], found[0]["workdir"]) == ("me", "/w")
    assert "OFMINE" not in json.dumps(found)
    assert b"OFMINE" not in await yard.written()
    answer = await yard.client.put(f"{ROUTE}/mine/tags/old", json={"version": 1})
    assert answer.status_code == 200
    assert [one["tags"] for one in answer.json()["data"]] == [["latest"], ["old"]]
    for tag, version in (("1", 1), ("x y", 1), ("-", 1), ("old", 3), ("old", "1")):
        answer = await yard.client.put(f"{ROUTE}/mine/tags/{tag}", json={"version": version})
        assert answer.status_code == 400, (tag, version)

    wanted = {"mine": second, "mine:old": first, "mine:1": first, f"mine@{first[:12]}": None}
    wanted |= {f"mine@{first}": first, "mine:latest": second}
    for reference, digest in wanted.items():
        answer = await yard.client.post("/v1/sandboxes", json={"template": reference})
        # No node has it: it was never built.
        assert answer.status_code in (201, 503), answer.text
        if answer.status_code == 201 and digest is not None:
            data = answer.json()["data"]
            assert (data["template"], data["templateDigest"]) == ("mine", digest)
    for reference in ("mine:nothing", "mine:9", "mine@ffffff", "mine@x", "base-minimal:old"):
        answer = await yard.client.post("/v1/sandboxes", json={"template": reference})
        assert answer.status_code == 400, reference
        assert answer.json()["error"]["details"]["field"] == "template"
    answer = await yard.client.post("/v1/sandboxes", json={"template": "base-minimal:latest"})
    assert answer.status_code == 201
    assert answer.json()["data"]["templateDigest"] is None

    assert (await yard.client.delete(f"{ROUTE}/mine/versions/2")).status_code == 200
    assert (await yard.client.delete(f"{ROUTE}/mine/versions/2")).status_code == 404
    assert [one["tags"] for one in await get(yard, "mine/versions")] == [["latest", "old"]]
    assert (await yard.client.delete(f"{ROUTE}/mine/tags/old")).status_code == 200
    assert (await yard.client.delete(f"{ROUTE}/mine/tags/old")).status_code == 404
    assert (await yard.client.delete(f"{ROUTE}/mine")).status_code == 200
    assert (await yard.client.delete(f"{ROUTE}/mine")).status_code == 404
    assert (await yard.client.delete(f"{ROUTE}/base-minimal")).status_code == 404
    assert await get(yard, "mine", 404)


async def test_a_log_is_followed_from_any_line_to_its_end(yard: Yard) -> None:
    made = await post(yard, base="base-minimal")
    now, lease = datetime.now(UTC), "l"
    lines = [BuildLine(number, now, "steps", f"line {number}") for number in range(1, 4)]
    async with yard.house.store.write(Turn.SHARED) as tx:
        build = await tx.builds.claim("s", lease=lease, lasts=LEASE)
        assert build is not None
        await tx.builds.append(build.id, lines[:2])

    async def told(**headers: str) -> list[tuple[str, Any]]:
        found = []
        path = f"{ROUTE}/mine/logs"
        async with yard.client.stream("GET", path, headers=headers) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            name = ""
            async for line in answer.aiter_lines():
                if line.startswith("event: "):
                    name = line[7:]
                elif line.startswith("data: "):
                    data = json.loads(line[6:])
                    found.append((name, data.get("text", data.get("status"))))
        return found

    async with asyncio.TaskGroup() as tasks:
        whole = tasks.create_task(told())
        rest = tasks.create_task(told(**{"Last-Event-ID": "2"}))
        await asyncio.sleep(0)
        async with yard.house.store.write(Turn.SHARED) as tx:
            await tx.builds.append(build.id, lines[2:])
            ended = replace(build, ended_at=now, status=BuildStatus.FAILED, error="why")
            assert await tx.builds.save(ended, lease=lease, lasts=None) is not None
    assert whole.result() == [
        ("line", "line 1"), ("line", "line 2"), ("line", "line 3"), ("end", "failed"),
    ]  # fmt: skip
    assert rest.result() == [("line", "line 3"), ("end", "failed")]
    assert (await get(yard, "mine"))["error"] == "why"
    assert (await get(yard, f"mine/builds/{made['buildId']}"))["error"] == "why"
    answer = await yard.client.get(f"{ROUTE}/mine/logs", headers={"Last-Event-ID": "x"})
    assert answer.status_code == 400
    answer = await yard.client.post(f"{ROUTE}/mine/builds/{made['buildId']}/cancel")
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "invalid_state")
