"""Files of a sandbox through the API, on fake machines."""

import asyncio
import base64
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.door import SOON_S, door
from tests.support.events import read_events
from tests.support.house import Yard, eventually, open_yard
from tests.support.several import open_several

from sandyard.server.core.node_ops import Report
from sandyard.server.fakes.files import ROOM
from sandyard.server.service.sandboxes import frames


@pytest.fixture(params=["one", pytest.param("several", marks=pytest.mark.postgres)])
async def yard(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Yard]:
    opening = open_yard(tmp_path, saves=True) if request.param == "one" else open_several()
    async with opening as made:
        yield made


def files_of(box: Mapping[str, object], action: str = "") -> str:
    return f"/v1/sandboxes/{box['id']}/files{action and '/'}{action}"


async def put(yard: Yard, box: Mapping[str, object], path: str, data: bytes) -> None:
    answer = await yard.client.put(files_of(box), params={"path": path}, content=data)
    assert answer.status_code == 201, answer.text
    assert answer.json()["data"]["size"] == len(data)


async def read(yard: Yard, box: Mapping[str, object], path: str, **headers: str) -> httpx.Response:
    return await yard.client.get(files_of(box), params={"path": path}, headers=headers)


async def names(yard: Yard, box: Mapping[str, object], path: str, **query: Any) -> list[str]:
    answer = await yard.client.get(files_of(box, "list"), params={"path": path, **query})
    assert answer.status_code == 200, answer.text
    return [one["path"] for one in answer.json()["data"]["entries"]]


async def test_what_was_written_is_read_again_whole_and_in_parts(yard: Yard) -> None:
    box = await yard.create()
    data = os.urandom(700_000)
    await put(yard, box, "/a/b c/ü.bin", data)
    whole = await read(yard, box, "/a/b c/ü.bin")
    assert (whole.status_code, whole.content) == (200, data)
    assert whole.headers["content-length"] == "700000"
    assert whole.headers["accept-ranges"] == "bytes"
    assert whole.headers["content-disposition"] == "attachment; filename*=UTF-8''%C3%BC.bin"
    assert whole.headers["content-security-policy"] == "sandbox; default-src 'none'"
    for asked, part, told in (
        ("bytes=0-0", data[:1], "bytes 0-0/700000"),
        ("bytes=5-9", data[5:10], "bytes 5-9/700000"),
        ("bytes=699990-", data[-10:], "bytes 699990-699999/700000"),
        ("bytes=-7", data[-7:], "bytes 699993-699999/700000"),
        ("bytes=600000-9999999", data[600_000:], "bytes 600000-699999/700000"),
    ):
        answer = await read(yard, box, "/a/b c/ü.bin", Range=asked)
        assert (answer.status_code, answer.content) == (206, part), asked
        assert answer.headers["content-range"] == told
        assert answer.headers["content-length"] == str(len(part))
    answer = await read(yard, box, "/a/b c/ü.bin", Range="bytes=700000-")
    assert (answer.status_code, answer.headers["content-range"]) == (416, "bytes */700000")
    for odd in ("bytes=9-5", "bytes=a-b", "lines=1-2", "bytes=1-2,4-5"):
        assert (await read(yard, box, "/a/b c/ü.bin", Range=odd)).content == data
    head = await yard.client.head(files_of(box), params={"path": "/a/b c/ü.bin"})
    assert (head.status_code, head.headers["content-length"]) == (200, "700000")
    await put(yard, box, "below", b"")
    empty = await read(yard, box, "/workspace/below")
    assert (empty.status_code, empty.content) == (200, b"")


async def test_folders_are_made_listed_moved_copied_and_removed(yard: Yard) -> None:
    box = await yard.create()

    async def ask(action: str, status: int, **body: object) -> Any:
        answer = await yard.client.post(files_of(box, action), json=body)
        assert answer.status_code == status, answer.text
        return answer.json()["data"]

    made = await ask("mkdir", 201, path="/x/y", mode="750")
    assert (made["path"], made["name"], made["type"]) == ("/x/y", "y", "folder")
    await ask("mkdir", 201, path="/x/y")
    await put(yard, box, "/x/y/one", b"1")
    await put(yard, box, "/x/two", b"22")
    assert await names(yard, box, "/x") == ["/x/two", "/x/y"]
    assert await names(yard, box, "/x", depth=2) == ["/x/two", "/x/y", "/x/y/one"]
    answer = await yard.client.get(files_of(box, "list"), params={"path": "/x", "limit": 1})
    assert answer.json()["data"]["truncated"] is True
    moved = await ask("move", 200, **{"from": "/x/y", "to": "/x/z"})
    assert moved["path"] == "/x/z"
    copied = await ask("copy", 201, **{"from": "/x/z", "to": "/x/w"})
    assert copied["type"] == "folder"
    assert await names(yard, box, "/x", depth=9) == [
        "/x/two", "/x/w", "/x/w/one", "/x/z", "/x/z/one",
    ]  # fmt: skip
    found = await yard.client.get(files_of(box, "stat"), params={"path": "/x/two"})
    assert found.json()["data"]["size"] == 2
    assert found.json()["data"]["mode"] == "0644"
    for query, status in (({"path": "/x"}, 409), ({"path": "/x", "recursive": "true"}, 200)):
        answer = await yard.client.delete(files_of(box), params=query)
        assert answer.status_code == status, answer.text
    assert (await read(yard, box, "/x/two")).status_code == 404


async def test_what_a_file_system_would_not_do_is_told_by_reason(yard: Yard) -> None:
    box = await yard.create()
    await put(yard, box, "/f", b"x")
    for answer, status, reason in (
        (await read(yard, box, "/none"), 404, "absent"),
        (await read(yard, box, "/workspace"), 400, "is_a_folder"),
        (await read(yard, box, "/f/g"), 400, "not_a_folder"),
        (await read(yard, box, "/denied"), 403, "denied"),
        (await yard.client.get(files_of(box, "list"), params={"path": "/f"}), 400, "not_a_folder"),
        (await yard.client.put(files_of(box), params={"path": "/tmp"}, content=b""), 400,
         "is_a_folder"),
        (await yard.client.post(files_of(box, "mkdir"), json={"path": "/f", "parents": False}),
         409, "exists"),
        (await yard.client.post(files_of(box, "move"), json={"from": "/f", "to": "/tmp"}), 409,
         "exists"),
        (await yard.client.put(files_of(box), params={"path": "/f"}, content=bytes(ROOM + 1)),
         409, "no_space"),
    ):  # fmt: skip
        assert answer.status_code == status, answer.text
        assert answer.json()["error"]["details"]["reason"] == reason
    assert (await read(yard, box, "/f")).content == b"x"


async def test_a_path_may_be_of_any_bytes(yard: Yard) -> None:
    box = await yard.create()
    odd = b"/tmp/\xff\n " + b"x" * 240
    in_base64 = base64.b64encode(odd).decode()
    url = f"{files_of(box)}?path=/tmp/%FF%0A+" + "x" * 240
    answer = await yard.client.put(url, content=b"odd")
    assert answer.status_code == 201, answer.text
    for found in (
        await yard.client.get(url),
        await yard.client.get(files_of(box), params={"pathBase64": in_base64}),
    ):
        assert found.content == b"odd"
    listed = await yard.client.get(files_of(box, "list"), params={"path": "/tmp"})
    (entry,) = listed.json()["data"]["entries"]
    assert (entry["pathBase64"], entry["path"][5]) == (in_base64, "\ufffd")
    body = {"fromBase64": in_base64, "to": "/tmp/even"}
    assert (await yard.client.post(files_of(box, "move"), json=body)).status_code == 200
    assert await names(yard, box, "/tmp") == ["/tmp/even"]


async def test_what_makes_no_sense_is_refused(yard: Yard) -> None:
    box = await yard.create()
    for query in (
        {}, {"path": ""}, {"path": "/a\0b"}, {"path": "/" + "a" * 256}, {"path": "/a" * 2100},
        {"pathBase64": "?"}, {"path": "/a", "pathBase64": "L2E="}, {"path": "/a", "user": ""},
    ):  # fmt: skip
        answer = await yard.client.get(files_of(box), params=query)
        assert answer.status_code == 400, (query, answer.text)
        assert answer.json()["error"]["details"]["field"]
    for field, query in (
        ("mode", {"mode": "8"}),
        ("mode", {"mode": "77777"}),
        ("owner", {"owner": ""}),
    ):
        answer = await yard.client.put(files_of(box), params={"path": "/a", **query}, content=b"")
        assert (answer.status_code, answer.json()["error"]["details"]["field"]) == (400, field)
    for action, body in (("move", {"from": "/a"}), ("copy", {"to": "/a"}), ("mkdir", {})):
        answer = await yard.client.post(files_of(box, action), json=body)
        assert answer.status_code == 400, answer.text
    async with yard.client_of(await yard.stranger()) as stranger:
        assert (await stranger.get(files_of(box), params={"path": "/a"})).status_code == 404
    key = await yard.add_key(*await yard.first(), scopes=("sandbox:read",))
    async with yard.client_of(key) as reader:
        assert (await reader.get(files_of(box), params={"path": "/a"})).status_code == 403


async def test_a_use_resumes_and_is_told_in_the_feed(yard: Yard) -> None:
    box = await yard.create()
    await put(yard, box, "/kept", b"s3cret")
    await yard.act(box, "pause")
    assert (await read(yard, box, "/kept")).content == b"s3cret"
    said = (await yard.client.get(f"/v1/sandboxes/{box['id']}/activity")).json()["data"]["events"]
    kinds = [one for one in said if one["eventType"].startswith("sandbox.file")]
    assert [one["eventType"] for one in kinds] == ["sandbox.file.read", "sandbox.file.written"]
    assert kinds[0]["attributes"]["path"] == "/kept"
    assert "s3cret" not in str(said)


async def test_an_upload_that_breaks_off_leaves_nothing(tmp_path: Path) -> None:
    async with door(tmp_path) as opened:
        yard = opened.yard
        box = await yard.create()
        await put(yard, box, "/f", b"before")

        async def is_used() -> bool:
            return not await is_unused(yard, box)

        reader, writer = await opened.knock()
        head = (
            f"PUT {files_of(box)}?path=/f HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n"
            f"Authorization: Bearer {yard.key}\r\n\r\n"
        )
        writer.write(head.encode() + bytes(500_000))
        await writer.drain()
        await eventually(is_used)
        writer.close()
        await writer.wait_closed()
        del reader
        await eventually(lambda: is_unused(yard, box))
        assert (await read(yard, box, "/f")).content == b"before"


async def test_an_upload_may_take_longer_than_an_agent_may_stand_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frames, "STILL_S", 1.5)
    async with door(tmp_path) as opened:
        yard = opened.yard
        box = await yard.create()
        url = f"http://127.0.0.1:{opened.port}{files_of(box)}"
        headers = {"Authorization": f"Bearer {yard.key}"}

        async def body() -> AsyncIterator[bytes]:
            for _ in range(60):
                yield b"x"
                await asyncio.sleep(0.05)

        async with httpx.AsyncClient(timeout=SOON_S, headers=headers) as client:
            answer = await client.put(url, params={"path": "/slow"}, content=body())
        assert answer.status_code == 201, answer.text
        found = await read(yard, box, "/slow")
        assert set(found.content) == set(b"x")


async def test_large_files_go_through(tmp_path: Path) -> None:
    async with door(tmp_path) as opened:
        yard = opened.yard
        box = await yard.create()
        url = f"http://127.0.0.1:{opened.port}{files_of(box)}"
        headers = {"Authorization": f"Bearer {yard.key}", "Content-Type": "text/plain"}
        size = ROOM - 5

        async def body() -> AsyncIterator[bytes]:
            for start in range(0, size, 2**20):
                yield bytes(min(2**20, size - start))

        async with httpx.AsyncClient(timeout=SOON_S, headers=headers) as client:
            answer = await client.put(url, params={"path": "/large"}, content=body())
            assert answer.json()["data"]["size"] == size, answer.text
            count = 0
            async with client.stream("GET", url, params={"path": "/large"}) as stream:
                async for piece in stream.aiter_bytes():
                    count += len(piece)
            assert count == size


async def is_unused(yard: Yard, box: Mapping[str, object]) -> bool:
    machines = (await yard.house.node.do(Report())).machines
    return not any(one.is_used for one in machines if one.sandbox_id == box["id"])


# --- watching -------------------------------------------------------------------------------------


async def test_a_watched_folder_tells_what_changes_until_it_is_gone(tmp_path: Path) -> None:
    async with door(tmp_path, saves=True) as opened:
        yard = opened.yard
        box = await yard.create()
        await put(yard, box, "/d/e/f", b"x")
        url = f"http://127.0.0.1:{opened.port}{files_of(box, 'watch')}"
        async with httpx.AsyncClient(timeout=SOON_S) as client:
            # As a browser does it, without a header.
            query = {"path": "/d", "recursive": "true", "api_key": yard.key}
            async with client.stream("GET", url, params=query) as answer:
                assert answer.headers["content-type"].startswith("text/event-stream")
                await put(yard, box, "/d/new", b"x")
                await put(yard, box, "/d/e/f", b"y")
                moving = {"from": "/d/new", "toBase64": base64.b64encode(b"/d/\xff").decode()}
                await yard.client.post(files_of(box, "move"), json=moving)
                await yard.client.delete(files_of(box), params={"path": "/d", "recursive": "true"})
                said = "".join([one async for one in answer.aiter_text()])
            heard = [one[2] for one in read_events(said)]
            assert [(one.get("type"), one.get("path")) for one in heard[:3]] == [
                ("created", "/d/new"), ("modified", "/d/e/f"), ("moved", "/d/\ufffd"),
            ]  # fmt: skip
            assert heard[2]["pathBase64"] == moving["toBase64"]
            assert (heard[2]["from"], heard[2]["folder"]) == ("/d/new", False)
            assert (heard[-1]["code"], heard[-1]["details"]) == ("not_found", {"reason": "absent"})
            # To watch is no use: the sandbox is paused all the same, and that is told.
            query = {"path": "/workspace", "token": yard.key}
            async with client.stream("GET", url, params=query) as answer:
                assert await is_unused(yard, box)
                await yard.act(box, "pause")
                said = "".join([one async for one in answer.aiter_text()])
            assert read_events(said)[-1][2]["details"] == {"status": "paused"}
        for path, status in (("/none", 404), ("/denied", 403), ("bad\0", 400)):
            answer = await yard.client.get(files_of(box, "watch"), params={"path": path})
            assert answer.status_code == status, answer.text
        head = await yard.client.head(files_of(box, "watch"), params={"path": "/workspace"})
        assert (head.status_code, head.content) == (200, b"")


# --- signed URLs ----------------------------------------------------------------------------------


async def signed(yard: Yard, box: Mapping[str, object], **body: object) -> dict[str, str]:
    answer = await yard.client.post(files_of(box, "sign"), json=body)
    assert answer.status_code == 201, answer.text
    data: dict[str, str] = answer.json()["data"]
    return data


async def test_a_signed_url_reads_or_writes_one_file_without_a_key(yard: Yard) -> None:
    box = await yard.create(name="named")
    await put(yard, box, "/f ü", b"0123456789")
    async with yard.client_of(None) as nobody:
        reading = await signed(yard, box, path="/f ü")
        assert (await nobody.get(reading["url"])).content == b"0123456789"
        part = await nobody.get(reading["url"], headers={"Range": "bytes=2-3"})
        assert (part.status_code, part.content) == (206, b"23")
        assert (await nobody.head(reading["url"])).headers["content-length"] == "10"
        writing = await signed(yard, {"id": "named"}, path="/g", method="put", expiresIn=60)
        assert writing["method"] == "PUT"
        assert (await nobody.put(writing["url"], content=b"new")).status_code == 201
        assert (await read(yard, box, "/g")).content == b"new"
        odd = base64.b64encode(b"/\xff").decode()
        writing_odd = await signed(yard, box, pathBase64=odd, method="PUT")
        assert (await nobody.put(writing_odd["url"], content=b"odd")).status_code == 201
        # For what it was made, and for nothing else.
        url = reading["url"]
        for other, method in (
            (url, "PUT"), (url, "DELETE"), (writing["url"], "GET"),
            (url.replace("path=%2Ff", "path=%2Fg"), "GET"),
            (url.replace("user=root", "user=nobody"), "GET"),
            (url.replace("expires=", "expires=9"), "GET"),
            (url.replace("/files?", "/files/stat?"), "GET"),
            (url.replace(str(box["id"]), "named"), "GET"),
            (url + "&user=nobody", "GET"), (url + "&mode=4755", "GET"),
            (writing["url"] + "&owner=nobody", "PUT"), (url + "x", "GET"),
            (url.partition("&signature")[0], "GET"), (url + "%00", "GET"),
        ):  # fmt: skip
            answer = await nobody.request(method, other)
            assert answer.status_code == 401, (method, other, answer.text)
        for body, field in (
            ({"path": "/f", "method": "POST"}, "method"),
            ({"path": "/f", "expiresIn": 0}, "expiresIn"),
            ({"path": "/f", "expiresIn": 604_801}, "expiresIn"),
            ({"path": "/f", "user": "a\nb"}, "user"),
            ({}, "path"),
        ):
            answer = await yard.client.post(files_of(box, "sign"), json=body)
            assert answer.status_code == 400, answer.text
            assert answer.json()["error"]["details"]["field"] == field
        answer = await yard.client.post(files_of({"id": "none"}, "sign"), json={"path": "/f"})
        assert answer.status_code == 404


async def test_a_signed_url_ends_with_its_time_and_with_its_signer(yard: Yard) -> None:
    org_id, user_id = await yard.first()
    box = await yard.create()
    await put(yard, box, "/f", b"x")
    async with yard.client_of(None) as nobody:
        brief = await signed(yard, box, path="/f", expiresIn=1)

        async def has_expired() -> bool:
            answer = await nobody.get(brief["url"])
            return answer.status_code == 401 and "token_expired" in answer.text

        await eventually(has_expired)
        made = await yard.client.post(
            "/v1/api-keys", json={"name": "brief", "scopes": ["sandbox:*"]}
        )
        key = made.json()["data"]
        async with yard.client_of(key["key"]) as other:
            answer = await other.post(files_of(box, "sign"), json={"path": "/f"})
            url = answer.json()["data"]["url"]
        assert (await nobody.get(url)).content == b"x"
        await yard.client.patch(f"/v1/api-keys/{key['id']}", json={"scopes": ["sandbox:read"]})
        assert (await nobody.get(url)).status_code == 401
        await yard.client.patch(f"/v1/api-keys/{key['id']}", json={"scopes": ["sandbox:write"]})
        assert (await nobody.get(url)).status_code == 200
        # A key that is rotated keeps its id; what its old secret signed ends all the same.
        key = (await yard.client.post(f"/v1/api-keys/{key['id']}/rotate")).json()["data"]
        assert (await nobody.get(url)).status_code == 401
        async with yard.client_of(key["key"]) as other:
            answer = await other.post(files_of(box, "sign"), json={"path": "/f"})
            url = answer.json()["data"]["url"]
        assert (await nobody.get(url)).content == b"x"
        await yard.client.delete(f"/v1/api-keys/{key['id']}")
        assert (await nobody.get(url)).status_code == 401
        # A member's is worth what the member sees, an admin's what an admin does.
        member = await yard.add_member(org_id)
        members = await yard.add_key(org_id, member)
        async with yard.client_of(members) as theirs:
            assert (await theirs.post(files_of(box, "sign"), json={"path": "/f"})).is_error
            own = (await theirs.post("/v1/sandboxes", json={}, params={"wait": 10})).json()["data"]
            await put(yard, own, "/f", b"y")
        admins = (await signed(yard, own, path="/f"))["url"]
        assert (await nobody.get(admins)).content == b"y"
        assert user_id != member


async def test_no_key_is_taken_from_an_address_but_where_a_browser_has_no_other_way(
    yard: Yard,
) -> None:
    box = await yard.create()
    async with yard.client_of(None) as nobody:
        for path in (files_of(box, "list"), f"/v1/sandboxes/{box['id']}"):
            answer = await nobody.get(path, params={"api_key": yard.key, "path": "/"})
            assert answer.status_code == 401
        path = f"/v1/sandboxes/{box['id']}/events"
        twice = await nobody.get(path, params={"api_key": yard.key, "token": yard.key})
        assert (twice.status_code, twice.json()["error"]["details"]["field"]) == (400, "api_key")
        assert (await nobody.head(path, params={"token": yard.key})).status_code == 200


async def test_a_file_is_read_if_it_has_changed_and_written_if_it_has_not(yard: Yard) -> None:
    box = await yard.create()
    path = f"{files_of(box)}?path=/f"

    async def put(content: bytes, **headers: str) -> httpx.Response:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return await yard.client.put(path, content=content, headers=named)

    missing = await put(b"x", If_Match="*")
    assert (missing.status_code, missing.json()["error"]["code"]) == (412, "precondition_failed")
    made = await put(b"one", If_None_Match="*")
    assert made.status_code == 201
    etag = made.json()["data"]["etag"]
    assert (await put(b"two", If_None_Match="*")).status_code == 412
    read = await yard.client.get(path)
    assert (read.content, read.headers["etag"]) == (b"one", etag)
    same = await yard.client.get(path, headers={"If-None-Match": etag})
    assert (same.status_code, same.content, same.headers["etag"]) == (304, b"", etag)
    stat = await yard.client.get(f"{files_of(box)}/stat?path=/f")
    assert stat.json()["data"]["etag"] == etag
    changed = await put(b"two", If_Match=etag)
    assert changed.status_code == 201
    assert (await put(b"three", If_Match=etag)).status_code == 412
    assert (await put(b"three", If_Match=changed.json()["data"]["etag"])).status_code == 201
    again = await yard.client.get(path, headers={"If-None-Match": etag})
    assert (again.status_code, again.content) == (200, b"three")
    for headers in ({"If_Match": "x"}, {"If_None_Match": etag}):
        wrong = await put(b"", **headers)
        assert wrong.status_code == 400
        assert wrong.json()["error"]["details"]["field"] == next(iter(headers)).replace("_", "-")
