"""Requests that are repeated, and requests that want what is unknown refused."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.house import Yard, open_yard
from tests.support.several import open_several

STRICT = {"Sandyard-Strict": "1"}


@pytest.fixture(params=["one", pytest.param("several", marks=pytest.mark.postgres)])
async def yard(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Yard]:
    own = {"workspaces": {"volumes": "folders", "quota_mib": 64}}
    opening = (
        open_yard(tmp_path, sections=own) if request.param == "one" else open_several(sections=own)
    )
    async with opening as made:
        yield made


async def posted(yard: Yard, path: str, body: Any, key: str = "k") -> httpx.Response:
    return await yard.client.post(path, json=body, headers={"Idempotency-Key": key})


def refused(answer: httpx.Response) -> tuple[int, str, str]:
    error = answer.json()["error"]
    return answer.status_code, error["code"], error["details"]["field"]


REUSED = (400, "idempotency_key_reused", "Idempotency-Key")


async def test_a_repeated_start_finds_the_process_of_the_first(yard: Yard) -> None:
    box = await yard.create()
    path = f"/v1/sandboxes/{box['id']}/processes"
    body = {"command": "hang"}
    first, *others = await asyncio.gather(*(posted(yard, path, body) for _ in range(5)))
    assert first.status_code == 201
    pid = first.json()["data"]["pid"]
    assert [one.json()["data"]["pid"] for one in others] == [pid] * 4
    await yard.client.post(f"{path}/{pid}/signal", json={"signal": "SIGKILL"})
    ended = (await posted(yard, path, body)).json()["data"]
    assert (ended["pid"], ended["signal"]) == (pid, "SIGKILL")
    assert refused(await posted(yard, path, {"command": "count 3"})) == REUSED
    other = (await posted(yard, path, body, "another")).json()["data"]
    assert other["pid"] != pid
    assert len((await yard.client.get(path)).json()["data"]) == 2
    # Of another sandbox it is another request.
    second = await yard.create()
    made = await posted(yard, f"/v1/sandboxes/{second['id']}/processes", body)
    assert made.json()["data"]["status"] == "running"
    assert (await posted(yard, path, body, "two words")).status_code == 400


async def test_a_repeated_request_for_a_signature_gets_the_same(yard: Yard) -> None:
    box = await yard.create()
    path = f"/v1/sandboxes/{box['id']}/files/sign"
    first = await posted(yard, path, {"path": "/a", "expiresIn": 60})
    assert first.status_code == 201
    assert (await posted(yard, path, {"path": "/a", "expiresIn": 60})).json()["data"] == (
        first.json()["data"]
    )
    assert refused(await posted(yard, path, {"path": "/b", "expiresIn": 60})) == REUSED
    other = await posted(yard, path, {"path": "/a", "expiresIn": 600}, "another")
    assert other.json()["data"]["url"] != first.json()["data"]["url"]


async def test_a_repeated_request_for_a_terminal_gets_the_same_ticket(yard: Yard) -> None:
    box = await yard.create()
    path, body = "/v1/terminal/sandbox-sessions", {"sandboxId": box["id"]}
    first, second = await asyncio.gather(*(posted(yard, path, body) for _ in range(2)))
    assert first.status_code == 201
    assert first.json()["data"] == second.json()["data"]
    other = (await posted(yard, path, body, "another")).json()["data"]
    assert other["sessionId"] != first.json()["data"]["sessionId"]
    assert other["terminalId"] != first.json()["data"]["terminalId"]
    assert refused(await posted(yard, path, {**body, "terminalId": "terminal-x"})) == REUSED


async def test_a_repeated_entry_of_a_workspace_is_made_once(yard: Yard) -> None:
    work = (await yard.client.post("/v1/workspaces", json={"name": "Data"})).json()["data"]
    path = f"/v1/workspaces/{work['id']}/files"
    body = {"name": "a.txt", "type": "file", "contents": "one", "overwrite": False}
    first = await posted(yard, path, body)
    assert first.status_code == 201, first.text
    assert (await yard.client.post(path, json=body)).status_code == 409
    again = await posted(yard, path, body)
    assert (again.status_code, again.json()["data"]) == (201, first.json()["data"])
    assert refused(await posted(yard, path, {**body, "contents": "two"})) == REUSED
    folder = {"name": "sub", "type": "folder"}
    made = [(await posted(yard, path, folder, "folder")).json()["data"] for _ in range(2)]
    assert made[0] == made[1]
    # What failed was not made, and is tried again.
    blocked = {**body, "name": "b.txt"}
    await yard.client.post(path, json=blocked)
    assert (await posted(yard, path, blocked, "b")).status_code == 409
    removed = await yard.client.request("DELETE", path, json={"ids": ["/b.txt"]})
    assert removed.status_code == 200
    assert (await posted(yard, path, blocked, "b")).status_code == 201
    await yard.client.request("DELETE", path, json={"ids": ["/b.txt"]})
    assert (await posted(yard, path, blocked, "b")).status_code == 404


async def test_a_repeated_upload_is_made_once(yard: Yard) -> None:
    work = (await yard.client.post("/v1/workspaces", json={"name": "Data"})).json()["data"]
    path = f"/v1/workspaces/{work['id']}/upload?overwrite=false"
    made = [
        await yard.client.post(
            path, files={"file": ("c.bin", b"three")}, headers={"Idempotency-Key": "up"}
        )
        for _ in range(2)
    ]
    assert [one.status_code for one in made] == [201, 201]
    assert made[0].json()["data"] == made[1].json()["data"]
    without = await yard.client.post(path, files={"file": ("c.bin", b"three")})
    assert without.status_code == 409


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/v1/sandboxes", {"nmae": "x"}, "nmae"),
        ("/v1/sandboxes", {"resources": {"cpus": 2}}, "resources.cpus"),
        ("/v1/sandboxes", {"mounts": [{"workspaceid": "x"}]}, "mounts.0.workspaceid"),
        ("/v1/sandboxes?wiat=5", {}, "wiat"),
        ("/v1/sandboxes/{box}/exec", {"command": "x", "time": 5}, "time"),
        ("/v1/sandboxes/{box}/processes", {"command": "x", "pty": {"columns": 9}}, "pty.columns"),
        ("/v1/workspaces", {"name": "x", "quota": 5}, "quota"),
    ],
)
async def test_what_is_unknown_is_refused_by_name_if_that_is_wanted(
    yard: Yard, path: str, body: Any, field: str
) -> None:
    box = await yard.create()
    path = path.format(box=box["id"])
    answer = await yard.client.post(path, json=body, headers=STRICT)
    assert refused(answer) == (400, "bad_request", field)
    if "mounts" not in body:  # of which a field is required
        without = await yard.client.post(path, json=body)
        assert without.is_success, without.text


async def test_what_is_known_is_not_refused(yard: Yard) -> None:
    mine = (await yard.client.get("/v1/organizations/current")).json()
    free = {"metadata": {"any": {"name": 1}}, "env": {"ANY": "x"}}
    answer = await yard.client.post(
        f"/v1/sandboxes?wait=5&orgId={mine['data']['id']}",
        json={**free, "tags": ["a"]},
        headers=STRICT,
    )
    assert answer.status_code == 201, answer.text
    box = answer.json()["data"]["id"]
    files = f"/v1/sandboxes/{box}/files"
    written = await yard.client.put(
        files, params={"path": "/a", "mode": "0600"}, content=b"x", headers=STRICT
    )
    assert written.status_code == 201
    signed = await yard.client.post(f"{files}/sign", json={"path": "/a"}, headers=STRICT)
    url = httpx.URL(signed.json()["data"]["url"])
    without_key = {"Authorization": "", **STRICT}
    assert (await yard.client.get(url.raw_path.decode(), headers=without_key)).content == b"x"
    listed = await yard.client.get("/v1/sandboxes?limit=5&status=running", headers=STRICT)
    assert listed.status_code == 200
    assert refused(await yard.client.get("/v1/sandboxes?page=2", headers=STRICT))[2] == "page"
