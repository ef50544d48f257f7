"""Workspaces and their files through the API: in folders, and in file systems of their own."""

import asyncio
import base64
import os
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from tests.support.house import Yard, open_yard
from tests.support.several import open_several

from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.ids import new_uuid
from sandyard.server.core.records import User, Workspace
from sandyard.server.service.people.organizations import join
from sandyard.server.service.workspaces.workspaces import Workspaces

ROUTE = "/v1/workspaces"
MIB = 2**20


@pytest.fixture(
    params=[
        "folders",
        pytest.param("images", marks=pytest.mark.root),
        pytest.param("several", marks=pytest.mark.postgres),
    ]
)
async def yard(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Yard]:
    own = {"volumes": "folders", "quota_mib": 64, "upload_mib": 8}
    if request.param == "several":
        async with open_several(sections={"workspaces": own}) as made:
            yield made
        return
    own["volumes"] = request.param
    async with open_yard(tmp_path, sections={"workspaces": own}) as made:
        yield made
    mounts = Path("/proc/self/mounts").read_text()
    assert str(tmp_path) not in mounts


@pytest.fixture
async def work(yard: Yard) -> "Work":
    answer = await yard.client.post(ROUTE, json={"name": "Data"})
    assert answer.status_code == 201, answer.text
    return Work(yard.client, answer.json()["data"])


def workspaces_of(yard: Yard) -> Workspaces:
    """Return what looks after workspaces."""
    house: Any = yard.house
    control = house.controls[0] if hasattr(house, "controls") else house.control
    found: Workspaces = control.services.workspaces
    return found


class Work:
    """A workspace, as a client sees it."""

    def __init__(self, client: httpx.AsyncClient, data: dict[str, Any]) -> None:
        self.client = client
        self.data = data
        self.url = f"{ROUTE}/{data['id']}"

    async def get(self, path: str = "", **query: Any) -> httpx.Response:
        return await self.client.get(f"{self.url}{path}", params=query)

    async def names(self, path: str = "", **query: Any) -> list[str]:
        answer = await self.get(f"/files{path}", **query)
        assert answer.status_code == 200, answer.text
        return [one["name"] for one in answer.json()]

    async def upload(self, name: str, data: bytes, path: str = "", **query: Any) -> httpx.Response:
        return await self.client.post(
            f"{self.url}/upload{path}", files={"file": (name, data)}, params=query
        )

    async def read(self, path: str, **headers: str) -> httpx.Response:
        return await self.client.get(f"{self.url}/direct", params={"id": path}, headers=headers)

    async def change(self, path: str, **body: Any) -> httpx.Response:
        return await self.client.put(f"{self.url}/files{path}", json=body)

    async def remove(self, *ids: str) -> httpx.Response:
        return await self.client.request("DELETE", f"{self.url}/files", json={"ids": ids})


async def test_a_workspace_from_its_making_to_its_end(yard: Yard, work: Work) -> None:
    _, user_id = await yard.first()
    made = work.data
    assert made["name"] == "Data"
    assert made["slug"].startswith("data-")
    assert (made["isPersonal"], made["ownerUserId"], made["sizeBytes"]) == (False, None, 0)
    assert (await work.get()).json()["data"] == made
    assert (await yard.client.get(f"{ROUTE}/{made['slug']}")).json()["data"]["id"] == made["id"]
    listed = (await yard.client.get(ROUTE)).json()["data"]
    assert listed["storage"] == {"usedBytes": 0, "quotaBytes": -1, "unlimited": True}
    own = [one for one in listed["workspaces"] if one["isPersonal"]]
    assert [one["ownerUserId"] for one in own] == [user_id]
    assert own[0]["ownerEmail"]
    renamed = await yard.client.patch(work.url, json={"name": "Däta"})
    assert renamed.json()["data"]["name"] == "Däta"
    assert renamed.json()["data"]["slug"] == made["slug"]
    usage = (await work.get("/usage")).json()["data"]
    assert (usage["inUse"], usage["mountedSandboxes"]) == (False, [])
    assert usage["counts"] == {"mountedSandboxes": 0, "installableAgents": 0, "customAgents": 0}
    assert (await work.upload("f", b"x")).status_code == 201
    assert (await yard.client.delete(work.url)).json()["data"] == {
        "id": made["id"],
        "deleted": True,
    }
    for path in ("", "/files", "/info", "/usage"):
        assert (await work.get(path)).status_code == 404
    assert (await yard.client.delete(work.url)).status_code == 404
    events = (await yard.client.get("/v1/activity")).json()["data"]["events"]
    kinds = [one["eventType"] for one in events if one["workspaceId"] == made["id"]]
    assert kinds == ["workspace.deleted", "workspace.renamed", "workspace.created"]


async def test_what_a_workspace_is_called(yard: Yard) -> None:
    first = await yard.client.post(ROUTE, json={"name": "A", "slug": "a"})
    assert first.json()["data"]["slug"] == "a"
    again = await yard.client.post(ROUTE, json={"name": "B", "slug": "a"})
    assert (again.status_code, again.json()["error"]["details"]["field"]) == (409, "slug")
    for body in (
        {},
        {"name": ""},
        {"name": "a\n"},
        {"name": "x" * 101},
        {"name": "a", "slug": "A"},
        {"name": "a", "slug": "personal-somebody"},
    ):
        assert (await yard.client.post(ROUTE, json=body)).status_code == 400
    other = {"name": "a", "orgId": "0a0c77bf-b77d-4a44-b2d6-9a9f0b5f3c1f"}
    assert (await yard.client.post(ROUTE, json=other)).status_code == 404
    keyed = {"Idempotency-Key": "one"}
    twice = [await yard.client.post(ROUTE, json={"name": "K"}, headers=keyed) for _ in range(2)]
    assert twice[0].json()["data"]["id"] == twice[1].json()["data"]["id"]
    # A slug is free once its workspace is gone.
    await yard.client.delete(f"{ROUTE}/a")
    assert (await yard.client.post(ROUTE, json={"name": "C", "slug": "a"})).status_code == 201


async def test_personal_ones_are_their_owners_and_stay(yard: Yard) -> None:
    org_id, _ = await yard.first()
    member = yard.client_of(await yard.add_key(org_id, await yard.add_member(org_id)))
    other = yard.client_of(await yard.add_key(org_id, await yard.add_member(org_id)))

    async def personal(client: httpx.AsyncClient, **query: Any) -> list[str]:
        found = (await client.get(ROUTE, params=query)).json()["data"]["workspaces"]
        return [one["id"] for one in found if one["isPersonal"]]

    async with member, other:
        (own,) = await personal(member)
        assert (await member.get(ROUTE, params={"all": True})).status_code == 403
        sizes = (await member.get(f"{ROUTE}/{own}")).json()["data"]["quotaBytes"]
        assert sizes == 64 * MIB
        assert len(await personal(yard.client)) == 1
        assert own in await personal(yard.client, all=True)
        assert (await member.get(f"{ROUTE}/{own}/files")).json() == []
        assert (await yard.client.get(f"{ROUTE}/{own}/files")).status_code == 200
        assert (await other.get(f"{ROUTE}/{own}/files")).status_code == 404
        assert (await other.get(f"{ROUTE}/{own}")).status_code == 404
        refused = await member.delete(f"{ROUTE}/{own}")
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "invalid_state")
        # Of one who is a member no more, admins dispose.
        async with yard.house.store.write(Turn.ALONE) as tx:
            found = await tx.workspaces.find(org_id, own)
            assert found is not None
            await tx.users.remove_member(org_id, str(found.owner_user_id), datetime.now(UTC))
        listed = (await yard.client.get(ROUTE, params={"all": True})).json()["data"]["workspaces"]
        assert next(one["ownerEmail"] for one in listed if one["id"] == own)
        assert (await yard.client.delete(f"{ROUTE}/{own}")).status_code == 200


async def test_nobody_elses_and_not_without_the_scope(yard: Yard, work: Work) -> None:
    await work.upload("f", b"secret")
    url = work.url
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", url, {}),
        ("PATCH", url, {"json": {"name": "mine"}}),
        ("DELETE", url, {"params": {"force": True}}),
        ("GET", f"{url}/usage", {}),
        ("GET", f"{url}/files", {}),
        ("GET", f"{url}/files/f", {}),
        ("GET", f"{url}/info", {}),
        ("GET", f"{url}/info/f", {}),
        ("POST", f"{url}/files", {"json": {"name": "n"}}),
        ("POST", f"{url}/upload", {"files": {"file": ("n", b"")}}),
        ("PUT", f"{url}/files/f", {"json": {"operation": "write", "contents": ""}}),
        ("PUT", f"{url}/files", {"json": {"operation": "copy", "target": "/", "ids": ["f"]}}),
        ("DELETE", f"{url}/files", {"json": {"ids": ["f"]}}),
        ("GET", f"{url}/direct", {"params": {"id": "f"}}),
    ]
    org_id, user_id = await yard.first()
    reader = yard.client_of(await yard.add_key(org_id, user_id, scopes=("files:read",)))
    writer = yard.client_of(await yard.add_key(org_id, user_id, scopes=("files:write",)))
    async with writer:
        assert (await writer.request(*calls[8][:2], **calls[8][2])).status_code == 201
        assert (await writer.get(url)).status_code == 403
    nobody = yard.client_of(await yard.add_key(org_id, user_id, scopes=("sandbox:read",)))
    async with yard.client_of(await yard.stranger()) as stranger, reader, nobody:
        for method, where, options in calls:
            assert (await stranger.request(method, where, **options)).status_code == 404, where
            assert (await nobody.request(method, where, **options)).status_code == 403, where
            is_read = (await reader.request(method, where, **options)).status_code != 403
            assert is_read == (method == "GET"), (method, where)
    assert (await work.read("f")).content == b"secret"


async def test_files_are_made_listed_and_told_of(work: Work) -> None:
    made = await work.client.post(
        f"{work.url}/files", json={"name": "notes.txt", "type": "file", "contents": "grüße"}
    )
    assert made.status_code == 201, made.text
    entry = made.json()["data"]
    assert {name: entry[name] for name in ("id", "path", "value", "name", "type", "size")} == {
        "id": "/notes.txt", "path": "/notes.txt", "value": "notes.txt", "name": "notes.txt",
        "type": "file", "size": 7,
    }  # fmt: skip
    assert entry["mimeType"] == "text/plain"
    assert entry["date"].endswith("Z")
    for kind in ("folder", "directory"):
        body = {"name": kind, "type": kind}
        assert (await work.client.post(f"{work.url}/files/src/a b", json=body)).status_code == 201
    again = await work.client.post(f"{work.url}/files/src/a b", json={"name": "folder"})
    assert again.status_code == 409
    await work.upload(".hidden", b"h")
    listed = (await work.get("/files")).json()
    assert [one["name"] for one in listed] == ["src", "notes.txt"]
    assert (listed[0]["type"], listed[0]["lazy"], listed[0]["count"]) == ("folder", True, 1)
    assert "lazy" not in listed[1]
    assert await work.names(showHidden=True) == ["src", ".hidden", "notes.txt"]
    assert await work.names("/src/a b") == ["directory", "folder"]
    assert await work.names("/notes.txt") == ["notes.txt"]
    assert (await work.get("/files/nothing")).status_code == 404
    whole = (await work.get("/info/")).json()["data"]
    assert (whole["size"], whole["files"], whole["folders"], whole["count"]) == (8, 2, 4, 6)
    (drive,) = (await work.get("/info")).json()
    assert drive["free"] + drive["used"] == drive["total"]
    assert 0 < drive["used"] < MIB
    assert (await work.get()).json()["data"]["sizeBytes"] == drive["used"]


async def test_uploads_come_whole_or_not_at_all(work: Work) -> None:
    data = os.urandom(3 * MIB)
    made = await work.upload("ü ber.bin", data, "/in/here")
    assert made.status_code == 201, made.text
    assert made.json()["data"]["id"] == "/in/here/ü ber.bin"
    assert (await work.read("/in/here/ü ber.bin")).content == data
    # The folder in the query, and another name, which comes after the file.
    form = {"file": ("a.txt", b"one")}
    made = await work.client.post(
        f"{work.url}/upload", files=form, data={"name": "b.txt"}, params={"id": "/in"}
    )
    assert made.json()["data"]["id"] == "/in/b.txt"
    boundary = "X"
    late = (
        b'--X\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\ntwo\r\n'
        b'--X\r\nContent-Disposition: form-data; name="name"\r\n\r\nc.txt\r\n--X--\r\n'
    )
    headers = {"Content-Type": f"multipart/form-data; boundary={boundary}"}

    async def send(body: bytes, **more: str) -> httpx.Response:
        return await work.client.post(
            f"{work.url}/upload", content=body, headers={**headers, **more}
        )

    assert (await send(late)).json()["data"]["id"] == "/c.txt"
    assert (await work.upload("c.txt", b"three")).status_code == 201
    assert (await work.read("c.txt")).content == b"three"
    assert (await work.upload("c.txt", b"four", overwrite=False)).status_code == 409
    before = await work.names(showHidden=True)
    first = b'--X\r\nContent-Disposition: form-data; name="file"; filename='
    for body in (
        late[:-30],  # broken off
        late[:70],
        b"",
        b"nonsense",
        late.replace(b'name="file"', b'name="other"'),  # no file
        first + b'""\r\n\r\nx\r\n--X--\r\n',  # no name
        first + b'"../up"\r\n\r\nx\r\n--X--\r\n',
        first + b'".."\r\n\r\nx\r\n--X--\r\n',
        first + b'"a/b"\r\n\r\nx\r\n--X--\r\n',
        first + b'"a\x00b"\r\n\r\nx\r\n--X--\r\n',
        first + b"\"\"; filename*=utf-8''%00\r\n\r\nx\r\n--X--\r\n",
        first + b"\"\"; filename*=utf-7''+2AA-\r\n\r\nx\r\n--X--\r\n",
        first + b'"base64:%"\r\n\r\nx\r\n--X--\r\n'.replace(b"%", b"!"),
        first + b'".sandyard-passing-1"\r\n\r\nx\r\n--X--\r\n',
        first + b'"a"\r\n\r\nx\r\n' + first + b'"b"\r\n\r\nx\r\n--X--\r\n',  # two
        first + b'"a"\r\nX-Long: ' + b"x" * 20_000 + b"\r\n\r\nx\r\n--X--\r\n",
    ):
        answer = await send(body)
        assert answer.status_code == 400, (body[:90], answer.text)
    for kind in (
        "application/json", "multipart/form-data", "text/plain; boundary=X",
        "multipart/form-data; boundary=" + "x" * 300,
    ):  # fmt: skip
        assert (await send(late, **{"Content-Type": kind})).status_code == 400
    assert await work.names(showHidden=True) == before
    named = first + b"\"\"; filename*=UTF-8''%C3%BC%20x\r\n\r\nx\r\n--X--\r\n"
    assert (await send(named)).json()["data"]["id"] == "/ü x"
    assert (await work.upload("c.txt", b"x", "/c.txt")).status_code == 404  # a file is no folder


async def test_what_is_too_much_is_refused_and_costs_nobody_else(yard: Yard, work: Work) -> None:
    other = Work(
        yard.client, (await yard.client.post(ROUTE, json={"name": "Other"})).json()["data"]
    )
    large = await work.upload("large", b"x" * (8 * MIB + 1))
    assert (large.status_code, large.json()["error"]["code"]) == (413, "payload_too_large")
    answers = [await work.upload(f"f{one}", b"x" * 8 * MIB) for one in range(9)]
    codes = [one.status_code for one in answers]
    assert codes[0] == 201
    assert codes[-1] == 413
    assert codes.index(413) in (7, 8)  # all of its room could be used
    assert "full" in answers[-1].json()["error"]["message"]
    held = codes.count(201)
    assert await work.names() == [f"f{one}" for one in range(held)]
    (drive,) = (await work.get("/info")).json()
    assert drive["free"] < 8 * MIB
    copied = await work.change("/f0", operation="copy", target="/copy")
    assert copied.status_code == 413
    body = {"operation": "copy", "target": "/to", "ids": ["/f0"]}
    await work.client.post(f"{work.url}/files", json={"name": "to", "type": "folder"})
    (done,) = (await work.client.put(f"{work.url}/files", json=body)).json()["data"]["results"]
    assert done["error"]["code"] == "payload_too_large"
    await work.remove("/to")
    assert "copy" not in await work.names(showHidden=True)
    assert (await other.upload("f", b"x" * MIB)).status_code == 201
    listed = (await yard.client.get(ROUTE)).json()["data"]["storage"]
    assert listed["usedBytes"] >= held * 8 * MIB + MIB
    # What is kept is charged for.
    assert (await work.remove("/f0")).json()["data"]["done"] == 1
    assert (await work.upload("g", b"x" * 7 * MIB)).status_code == 201
    org_id, _ = await yard.first()
    async with yard.house.store.read() as tx:
        periods = await tx.storage.of("workspace", work.data["id"])
        found = await tx.workspaces.find(org_id, work.data["id"])
    assert found is not None
    (still,) = [one for one in periods if one.ended_at is None]
    assert still.size_bytes == found.size_bytes
    await yard.client.delete(work.url)
    async with yard.house.store.read() as tx:
        periods = await tx.storage.of("workspace", work.data["id"])
    assert all(one.ended_at is not None for one in periods)


async def test_files_are_renamed_moved_copied_and_written(work: Work) -> None:
    await work.upload("a", b"a", "/x")
    done = await work.change("/x/a", operation="rename", target="b")
    assert done.json()["data"]["id"] == "/x/b"
    done = await work.change("/x/b", operation="copy", target="/y")  # no folder: its path
    assert done.json()["data"]["id"] == "/y"
    done = await work.change("/y", operation="move", target="/x")  # a folder: into it
    assert done.json()["data"]["id"] == "/x/y"
    assert (await work.change("/x", operation="copy", target="/z")).status_code == 200
    assert await work.names("/z") == ["b", "y"]
    done = await work.change("/z/new/w", operation="write", contents="written")
    assert (done.status_code, done.json()["data"]["size"]) == (200, 7)
    assert (await work.change("/z/new/w", operation="write", contents="")).status_code == 200
    assert (await work.read("/z/new/w")).content == b""
    for path, body, status in (
        ("/x/b", {"operation": "move", "target": "/x/y"}, 409),
        ("/x/b", {"operation": "rename", "target": "y"}, 409),
        ("/x/b", {"operation": "rename", "target": "../y"}, 400),
        ("/x/b", {"operation": "rename", "target": ""}, 400),
        ("/x/b", {"operation": "rename"}, 400),
        ("/x/b", {"operation": "move", "target": "/../y"}, 400),
        ("/x/b", {"operation": "write"}, 400),
        ("/x/b", {"operation": "eat"}, 400),
        ("/x", {"operation": "write", "contents": "x"}, 400),
        ("/x", {"operation": "move", "target": "/x/x"}, 400),
        ("/x", {"operation": "copy", "target": "/x/x"}, 400),
        ("/nothing", {"operation": "copy", "target": "/n"}, 404),
        ("/", {"operation": "write", "contents": "x"}, 400),
        ("/", {"operation": "move", "target": "/z"}, 400),
    ):
        answer = await work.change(path, **body)
        assert answer.status_code == status, (path, body, answer.text)
    done = await work.change("/x/b", operation="move", target="/x/y", overwrite=True)
    assert done.status_code == 200
    assert await work.names("/x") == ["y"]


async def test_of_several_each_is_told(work: Work) -> None:
    for name in ("a", "b", "c"):
        await work.upload(name, name.encode())
    url = f"{work.url}/files"
    await work.client.post(url, json={"name": "to", "type": "folder"})
    body: dict[str, Any] = {"operation": "copy", "target": "/to", "ids": ["/a", "b", "/gone"]}
    done = (await work.client.put(url, json=body)).json()["data"]
    assert (done["done"], done["failed"]) == (2, 1)
    assert [one["ok"] for one in done["results"]] == [True, True, False]
    assert done["results"][0]["entry"]["id"] == "/to/a"
    assert done["results"][2]["error"]["code"] == "not_found"
    body = {"operation": "move", "target": "/to", "ids": ["/a", "/c"]}
    done = (await work.client.put(url, json=body)).json()["data"]
    assert [one["ok"] for one in done["results"]] == [False, True]
    assert done["results"][0]["error"]["code"] == "conflict"
    assert await work.names("/to") == ["a", "b", "c"]
    done = (await work.remove("/to", "/a", "/a")).json()["data"]
    assert [one["ok"] for one in done["results"]] == [True, True, False]
    assert await work.names() == ["b"]
    for ids in ([], ["/b"] * 251):
        assert (await work.remove(*ids)).status_code == 400
    assert (await work.client.put(url, json={**body, "target": "/b"})).status_code == 400
    assert (await work.client.put(url, json={**body, "target": "/no"})).status_code == 404
    assert (await work.client.request("DELETE", url)).status_code == 400


async def test_a_file_is_read_whole_in_parts_and_never_runs_here(work: Work) -> None:
    data = os.urandom(700_000)
    await work.upload("page.html", data)
    whole = await work.read("/page.html")
    assert (whole.status_code, whole.content) == (200, data)
    assert whole.headers["content-type"].startswith("text/html")
    assert whole.headers["content-security-policy"] == "sandbox; default-src 'none'"
    assert whole.headers["x-content-type-options"] == "nosniff"
    assert whole.headers["content-disposition"].startswith("inline;")
    kept = await work.get("/direct", id="page.html", download="true")
    assert kept.headers["content-disposition"] == "attachment; filename*=UTF-8''page.html"
    for asked, part, told in (
        ("bytes=0-0", data[:1], "bytes 0-0/700000"),
        ("bytes=699990-", data[-10:], "bytes 699990-699999/700000"),
        ("bytes=-5", data[-5:], "bytes 699995-699999/700000"),
        ("bytes=-900000", data, "bytes 0-699999/700000"),
        ("bytes=10-999999", data[10:], "bytes 10-699999/700000"),
    ):
        some = await work.read("/page.html", Range=asked)
        assert (some.status_code, some.content) == (206, part), asked
        assert some.headers["content-range"] == told
    for asked in ("bytes=700000-", "bytes=-0"):
        none = await work.read("/page.html", Range=asked)
        assert (none.status_code, none.headers["content-range"]) == (416, "bytes */700000")
    for asked in ("bytes=5-2", "bytes=-", "lines=0-1", "bytes=0-1,3-4", "bytes=a-b"):
        assert (await work.read("/page.html", Range=asked)).status_code == 200
    head = await work.client.head(f"{work.url}/direct", params={"id": "/page.html"})
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "700000", b"")
    await work.upload("empty", b"")
    empty = await work.read("/empty", Range="bytes=0-")
    assert (empty.status_code, empty.content) == (200, b"")
    assert (await work.read("/")).status_code == 400
    assert (await work.get("/direct")).status_code == 400


async def test_no_way_of_writing_a_path_leads_out(yard: Yard, work: Work) -> None:
    await work.upload("f", b"in")
    # Where a path that led out of the workspace would lead, one folder up or two.
    outside = [yard.home / "workspaces" / "out", yard.home / "out"]
    for folder in outside:
        folder.mkdir()
        (folder / "kept").write_bytes(b"s3cret")
    for path in (
        "..", "/..", "a/../../x", "../out/kept", "../../out/kept", "/../../../out/kept", "f/..",
        "..%2fout%2fkept", "..%2f..%2fout%2fkept", "%2e%2e/%2e%2e/out/kept",
        "..%252f..%252fout%252fkept", "..\\..\\out\\kept", "/out/kept", "f\0", "\0", "//out//kept",
        "....//out/kept", str(outside[1] / "kept"),
        "base64:" + base64.b64encode(b"../../out/kept").decode(), "base64:%%%", "base64:é",
    ):  # fmt: skip
        address = quote(path, safe="").replace(".", "%2e")  # nothing for a client to tidy up
        for answer in (
            await work.read(path),
            await work.client.get(f"{work.url}/files/{address}"),
            await work.client.get(f"{work.url}/info/{address}"),
            await work.change("/f", operation="copy", target=f"{path}/x"),
        ):
            # One name of a folder that is made is fine: it lies within.
            assert answer.status_code in (400, 404) or "out" in path, (path, answer.text)
            assert b"s3cret" not in answer.content
        (gone,) = (
            (await work.remove(path)).json().get("data", {"results": [{"ok": False}]})["results"]
        )
        assert not gone["ok"] or "out" in path
        for folder in outside:
            assert [(one.name, one.read_bytes()) for one in folder.iterdir()] == [
                ("kept", b"s3cret")
            ], path
    assert (await work.read("/f")).content == b"in"


async def test_names_that_are_no_text_are_named_all_the_same(yard: Yard, work: Work) -> None:
    name = base64.b64encode(b"/a/\xff\xfe").decode()
    await work.upload("seed", b"seed", "/a")
    made = await work.change("/a/seed", operation="move", target=f"base64:{name}")
    assert made.status_code == 200, made.text
    (entry,) = (await work.get("/files/a")).json()
    assert entry["id"] == f"base64:{name}"
    assert (await work.read(entry["id"])).content == b"seed"
    assert (await work.get(f"/files/{entry['id']}")).json()[0]["size"] == 4
    assert (await work.remove(entry["id"])).json()["data"]["done"] == 1
    headers = {"Content-Type": "application/json"}
    strange = await work.client.post(
        f"{work.url}/files", content=b'{"name": "\\ud800"}', headers=headers
    )
    assert strange.status_code == 400


async def test_many_at_once_lose_nothing(work: Work) -> None:
    await work.upload("one", b"x")
    renamed = await asyncio.gather(
        *(work.change("/one", operation="rename", target=f"n{turn}") for turn in range(12))
    )
    assert sorted(one.status_code for one in renamed) == [200, *[404] * 11]
    assert len(await work.names()) == 1
    made = await asyncio.gather(*(work.upload("same", bytes([turn]) * 1000) for turn in range(12)))
    assert {one.status_code for one in made} == {201}
    content = (await work.read("same")).content
    assert content == content[:1] * 1000
    assert len(await work.names(showHidden=True)) == 2


async def test_an_organization_has_no_more_than_its_plan_grants(yard: Yard, work: Work) -> None:
    org_id, _ = await yard.first()
    async with yard.house.store.write(Turn.ALONE) as tx:
        organization = await tx.organizations.find(org_id)
        assert organization is not None
        await tx.organizations.replace(replace(organization, limits={"storageGb": 0}))
    refused = await work.upload("f", b"x")
    assert (refused.status_code, refused.json()["error"]["code"]) == (413, "payload_too_large")
    assert "in all" in refused.json()["error"]["message"]
    listed = (await yard.client.get(ROUTE)).json()["data"]["storage"]
    assert (listed["quotaBytes"], listed["unlimited"]) == (0, False)


async def test_names_with_line_ends_are_other_names(yard: Yard, work: Work) -> None:
    for name in ("a", "a\n", "a\nb"):
        made = await work.client.post(
            f"{work.url}/files", json={"name": name, "contents": repr(name)}
        )
        assert made.status_code == 201
    done = await work.client.put(
        f"{work.url}/files/a%0A", json={"operation": "write", "contents": "new"}
    )
    assert done.json()["data"]["id"] == "/a\n"
    assert (await work.read("/a")).text == "'a'"
    assert (await work.read("/a\n")).text == "new"
    assert len((await work.client.get(f"{work.url}/files/a%0Ab")).json()) == 1
    assert (await work.client.get(f"{work.url}/files/%0A")).status_code == 404
    assert (await work.get("/files/x%0A")).status_code == 404


async def test_the_deepest_paths_are_refused_and_what_a_guest_made_goes(
    yard: Yard, work: Work
) -> None:
    for depth, status in ((200, 201), (257, 400), (2000, 400)):
        made = await work.upload("f", b"x", id="a/" * depth)
        assert made.status_code == status, depth
    place = yard.home / "workspaces" / work.data["id"]
    here = os.open(place, os.O_RDONLY)
    for _ in range(1500):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    assert (await work.upload("f", b"x")).status_code == 201
    assert (await work.get("/info/d")).status_code == 400
    assert (await yard.client.delete(work.url)).status_code == 200
    assert not place.exists()
    await workspaces_of(yard).look_around()


async def test_what_is_replaced_is_told_as_it_is(work: Work) -> None:
    await work.upload("f", b"f", "/full")
    await work.upload("file", b"file")
    await work.client.post(f"{work.url}/files", json={"name": "empty", "type": "folder"})
    for operation in ("move", "copy"):
        for source, target in (("/full", "/file"), ("/file", "/file"), ("/full", "/full/x/full")):
            for overwrite in (False, True):
                answer = await work.change(
                    source, operation=operation, target=target, overwrite=overwrite
                )
                if source == target and overwrite:
                    assert answer.status_code == 200, answer.text
                else:
                    assert answer.status_code in (400, 409), answer.text
    assert (await work.read("/file")).content == b"file"
    assert (await work.read("/full/f")).content == b"f"
    hidden = (".sandyard-passing-1", "x/.sandyard-passing-1")
    for name in hidden:
        assert (await work.change("/file", operation="move", target=name)).status_code == 400


async def test_links_are_shown_as_such_and_batches_may_be_long(yard: Yard, work: Work) -> None:
    await work.upload("f", b"f" * 10)
    place = yard.home / "workspaces" / work.data["id"]
    (place / "in").symlink_to("f")
    (place / "out").symlink_to("/etc/passwd")
    told = {one["name"]: (one["isLink"], one["size"]) for one in (await work.get("/files")).json()}
    assert told == {"f": (False, 10), "in": (True, 10), "out": (True, 0)}
    copied = await work.change("/out", operation="copy", target="/too")
    assert copied.status_code == 200, copied.text
    assert os.readlink(place / "too") == "/etc/passwd"
    long = "/".join(["n" * 250] * 4)
    done = (await work.remove(*[f"/{long}/{number}" for number in range(250)])).json()["data"]
    assert done["failed"] == 250


async def test_what_was_deleted_is_not_made_again_by_who_comes_late(yard: Yard, work: Work) -> None:
    await work.upload("f", b"f")
    answers = await asyncio.gather(
        *(work.upload(f"{turn}", b"x") for turn in range(5)),
        yard.client.delete(work.url),
        *(work.upload(f"late{turn}", b"x") for turn in range(5)),
        *(work.get("/info") for _ in range(5)),
    )
    odd = [one.text for one in answers if one.status_code not in (200, 201, 404, 503)]
    assert not odd
    await workspaces_of(yard).look_around()
    assert not list((yard.home / "workspaces").glob(f"{work.data['id']}*"))


async def test_a_large_folder_is_listed_whole(yard: Yard, work: Work) -> None:
    await work.upload("f", b"")
    place = yard.home / "workspaces" / work.data["id"]
    (place / "many").mkdir()
    for number in range(3000):
        (place / "many" / f"{number:04}").touch()
    assert await work.names("/many") == [f"{number:04}" for number in range(3000)]
    (entry,) = [one for one in (await work.get("/files")).json() if one["name"] == "many"]
    assert entry["count"] == 3000


async def test_who_joins_has_a_workspace_whatever_has_its_name_or_was_there_before(
    yard: Yard,
) -> None:
    org_id, _ = await yard.first()
    now = datetime.now(UTC)
    user = User(new_uuid(), "new@example.org", "New", now)
    taken = Workspace(new_uuid(), org_id, None, f"personal-{user.id}", "T", False, now, now)
    async with yard.house.store.write(Turn.ALONE) as tx:
        await tx.users.add(user)
        await tx.workspaces.add(taken)  # as one could be named in an earlier version
        made = await join(tx, org_id, user, "member", at=now)
        assert await join(tx, org_id, user, "member", at=now) == made
        assert await tx.workspaces.find(org_id, made.id) == made
        assert made.id != taken.id
        gone = replace(made, slug=f"removed:{made.id}", removed_at=now)
        await tx.workspaces.replace(gone)
        again = await join(tx, org_id, user, "member", at=now)
        assert again.id != made.id
        assert await tx.workspaces.find(org_id, again.id) == again
