"""The daemon that clients of E2B expect in a sandbox, on fake machines."""

import asyncio
import base64
import gzip
import hashlib
import json
import struct
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.e2b import STREAM, Box, create, enveloped, opened
from tests.support.house import EACH_STORE, Yard, eventually, open_yard, store_section

from sandyard.server.fakes.files import ROOM, FakeFiles
from sandyard.server.fakes.programs import FakeProgram

PROCESS, FILES = "process.Process", "filesystem.Filesystem"


@pytest.fixture(params=EACH_STORE)
async def yard(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Yard]:
    async with (
        store_section(request.param) as sections,
        open_yard(tmp_path, saves=True, sections=sections) as made,
    ):
        made.client.headers["X-API-Key"] = made.key
        yield made


@pytest.fixture
async def box(yard: Yard) -> AsyncIterator[Box]:
    made = await create(yard.client, envVars={"A": "1"})
    async with yard.client_of(None) as client:  # that has no key
        yield Box(client, made.id, made.token, made.told)


def basic(user: str) -> str:
    return "Basic " + base64.b64encode(f"{user}:".encode()).decode()


async def refusal(answer: httpx.Response) -> tuple[int, str]:
    return answer.status_code, answer.json()["code"]


async def pid_of(box: Box, *argv: str, **more: Any) -> int:
    """Start a program that runs on, and return its pid."""
    config = {"cmd": argv[0], "args": list(argv[1:])}
    body = enveloped({"process": config, **more})
    headers = box.headers(**{"Content-Type": STREAM})
    request = box.client.build_request("POST", f"/{PROCESS}/Start", content=body, headers=headers)
    started = asyncio.create_task(box.client.send(request))
    found: list[int] = []

    async def runs() -> bool:
        listed = (await box.call(f"{PROCESS}/List", {})).json()["processes"]
        words = [argv[0], *argv[1:]]
        found[:] = [
            one["pid"] for one in listed if [one["config"]["cmd"], *one["config"]["args"]] == words
        ]
        return bool(found)

    await eventually(runs)
    started.cancel()
    await asyncio.wait([started])
    return found[0]


# --- processes ------------------------------------------------------------------------------


async def test_a_program_runs_and_tells_its_end(box: Box) -> None:
    events, end = await box.run("echo", "hello")
    assert end == {}
    start, data, last = events
    assert start["start"]["pid"] > 0
    assert base64.b64decode(data["data"]["stdout"]) == b"echo hello"
    assert last["end"] == {"exitCode": 0, "exited": True, "status": "exit status 0"}
    events, _ = await box.run("exit", "3")
    assert events[-1]["end"]["exitCode"] == 3
    assert events[-1]["end"]["error"] == "exit status 3"
    # Whole, in pieces of 32 KiB at most.
    events, _ = await box.run("spill", "200000")
    pieces = [base64.b64decode(one["data"]["stdout"]) for one in events if "data" in one]
    assert b"".join(pieces) == bytes(200_000)
    assert max(map(len, pieces)) <= 32 * 1024


async def test_what_a_program_is_given(yard: Yard, box: Box) -> None:
    pid = await pid_of(box, "hang", tag="mine", stdin=False)
    (told,) = (await box.call(f"{PROCESS}/List", {})).json()["processes"]
    assert (told["pid"], told["tag"]) == (pid, "mine")
    assert told["config"] == {"cmd": "hang", "args": [], "envs": {}, "cwd": "~"}
    machine = yard.machine_of({"name": None, "id": box.id})
    wish = machine._programs.find(pid, None).wish
    assert wish.user == "root"
    assert dict(wish.env) == {
        "E2B_SANDBOX": "true", "E2B_SANDBOX_ID": box.id, "E2B_TEMPLATE_ID": "base-minimal"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "cwd"), [("/srv", "/srv"), ("a/b", "~/a/b"), ("~/x", "~/x"), ("", "~")]
)
async def test_directories_and_users(box: Box, given: str, cwd: str) -> None:
    config = {"cmd": "hang", "cwd": given, "envs": {"B": "2"}}
    body = enveloped({"process": config})
    headers = box.headers(Authorization=basic("somebody"), **{"Content-Type": STREAM})
    task = asyncio.create_task(box.client.post(f"/{PROCESS}/Start", content=body, headers=headers))

    async def runs() -> bool:
        return bool((await box.call(f"{PROCESS}/List", {})).json()["processes"])

    await eventually(runs)
    (told,) = (await box.call(f"{PROCESS}/List", {})).json()["processes"]
    assert told["config"]["cwd"] == cwd
    killed = await box.call(
        f"{PROCESS}/SendSignal", {"process": {"pid": told["pid"]}, "signal": "SIGNAL_SIGKILL"}
    )
    assert killed.json() == {}
    events = opened((await task).content)[0]
    end = events[-1]["event"]["end"]
    assert (end["exitCode"], end["exited"], end["status"]) == (-1, False, "signal: killed")


async def test_input_and_its_end(box: Box) -> None:
    pid = await pid_of(box, "cat", tag="cat")
    which: dict[str, Any] = {"process": {"pid": pid}}
    sent = {"input": {"stdin": base64.b64encode(b"one ").decode()}}
    assert (await box.call(f"{PROCESS}/SendInput", {**which, **sent})).json() == {}
    by_tag = {"process": {"tag": "cat"}, **sent}
    assert (await box.call(f"{PROCESS}/SendInput", by_tag)).json() == {}
    messages, end = await box.stream(
        f"{PROCESS}/StreamInput",
        {"start": which}, {"data": {"input": {"stdin": base64.b64encode(b"two").decode()}}},
        {"keepalive": {}}, {"data": {"input": {"stdin": ""}}},
    )  # fmt: skip
    assert (messages, end) == ([{}], {})
    followed = asyncio.create_task(box.stream(f"{PROCESS}/Connect", which))
    assert (await box.call(f"{PROCESS}/CloseStdin", which)).json() == {}
    events, end = await followed
    assert end == {}
    assert events[0]["event"]["start"]["pid"] == pid
    assert events[-1]["event"]["end"]["exitCode"] == 0
    again, _ = await box.stream(f"{PROCESS}/Connect", which)  # its end is kept
    assert [list(one["event"]) for one in again] == [["start"], ["end"]]


def called(monkeypatch: pytest.MonkeyPatch, kind: type, method: str) -> asyncio.Event:
    """Return what is set once a method has been called."""
    event, real = asyncio.Event(), getattr(kind, method)

    def noted(*given: Any) -> Any:
        event.set()
        return real(*given)

    monkeypatch.setattr(kind, method, noted)
    return event


async def test_a_terminal(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = await pid_of(box, "cat", pty={"size": {"cols": 80, "rows": 24}})
    which = {"process": {"pid": pid}}
    size = {"pty": {"size": {"cols": 100, "rows": 40}}}
    assert (await box.call(f"{PROCESS}/Update", {**which, **size})).json() == {}
    wrong = {"pty": {"size": {"cols": 0, "rows": 40}}}
    assert await refusal(await box.call(f"{PROCESS}/Update", {**which, **wrong})) == (
        400, "invalid_argument",
    )  # fmt: skip
    attached = called(monkeypatch, FakeProgram, "attached")
    followed = asyncio.create_task(box.stream(f"{PROCESS}/Connect", which))
    await asyncio.wait_for(attached.wait(), 20)
    typed = {"input": {"pty": base64.b64encode(b"typed").decode()}}
    await box.call(f"{PROCESS}/SendInput", {**which, **typed})
    await box.call(f"{PROCESS}/SendSignal", {**which, "signal": 15})
    events, _ = await followed
    data = [one["event"]["data"] for one in events if "data" in one["event"]]
    assert b"".join(base64.b64decode(one["pty"]) for one in data) == b"typed"


@pytest.mark.parametrize(
    ("message", "code"),
    [
        ({}, "invalid_argument"),
        ({"process": {}}, "invalid_argument"),
        ({"process": {"cmd": ""}}, "invalid_argument"),
        ({"process": {"cmd": 1}}, "invalid_argument"),
        ({"process": {"cmd": "a\x00b"}}, "invalid_argument"),
        ({"process": {"cmd": "a", "args": "b"}}, "invalid_argument"),
        ({"process": {"cmd": "a", "args": ["x" * 200_000]}}, "invalid_argument"),
        ({"process": {"cmd": "a", "envs": {"1": "x"}}}, "invalid_argument"),
        ({"process": {"cmd": "a", "envs": []}}, "invalid_argument"),
        ({"process": {"cmd": "a"}, "tag": "7"}, "invalid_argument"),
        (
            {"process": {"cmd": "a"}, "pty": {"size": {"cols": 99999}}},
            "invalid_argument",
        ),
    ],
)
async def test_what_cannot_be_started_is_refused(
    box: Box, message: dict[str, Any], code: str
) -> None:
    messages, end = await box.stream(f"{PROCESS}/Start", message)
    assert messages == []
    assert end["error"]["code"] == code
    assert end["error"]["message"]


@pytest.mark.parametrize("junk", ["[" * 1000 + "]" * 1000, "[" + "{}," * 30_000 + "{}]"])
async def test_a_message_that_takes_long_to_parse_is_refused(box: Box, junk: str) -> None:
    url = f"{PROCESS}/SendSignal"
    body = f'{{"process": {{"pid": 1}}, "junk": {junk}}}'.encode()
    answer = await box.send(url, body, **{"Content-Type": "application/json"})
    assert await refusal(answer) == (400, "invalid_argument")


@pytest.mark.parametrize("method", ["SendInput", "SendSignal", "CloseStdin", "Update"])
async def test_a_process_that_has_ended_is_not_found(box: Box, method: str) -> None:
    events, _ = await box.run("echo", "hello")
    pid = events[0]["start"]["pid"]
    message = {
        "process": {"pid": pid}, "input": {"stdin": "YQ=="}, "signal": "SIGNAL_SIGKILL",
        "pty": {"size": {"cols": 1, "rows": 1}},
    }  # fmt: skip
    assert await refusal(await box.call(f"{PROCESS}/{method}", message)) == (404, "not_found")


@pytest.mark.parametrize("method", ["SendInput", "SendSignal", "CloseStdin", "Update"])
async def test_a_process_that_is_not_there(box: Box, method: str) -> None:
    message = {
        "process": {"pid": 4_000_000}, "input": {"stdin": "YQ=="}, "signal": "SIGNAL_SIGTERM",
        "pty": {"size": {"cols": 1, "rows": 1}},
    }  # fmt: skip
    assert await refusal(await box.call(f"{PROCESS}/{method}", message)) == (404, "not_found")
    _, end = await box.stream(f"{PROCESS}/Connect", {"process": {"tag": "nobody"}})
    assert end["error"]["code"] == "not_found"
    unheard = await box.call(f"{PROCESS}/{method}", {**message, "process": {"tag": "t" * 100_000}})
    assert unheard.status_code in (400, 404)
    empty = {**message, "input": {"stdin": ""}}
    assert await refusal(await box.call(f"{PROCESS}/{method}", empty)) == (404, "not_found")
    nameless = await box.call(f"{PROCESS}/{method}", {"process": {}})
    assert await refusal(nameless) == (400, "invalid_argument")


async def test_input_of_a_process_that_takes_none(box: Box) -> None:
    pid = await pid_of(box, "hang", stdin=False)
    message = {"process": {"pid": pid}, "input": {"stdin": "YQ=="}}
    answer = await box.call(f"{PROCESS}/SendInput", message)
    assert await refusal(answer) == (400, "failed_precondition")


async def test_a_deadline_ends_the_call(box: Box) -> None:
    pid = await pid_of(box, "hang")
    began = time.monotonic()
    messages, end = await box.stream(
        f"{PROCESS}/Connect", {"process": {"pid": pid}}, **{"Connect-Timeout-Ms": "2000"}
    )
    assert time.monotonic() - began < 10
    assert end["error"]["code"] == "deadline_exceeded"
    assert [list(one["event"]) for one in messages] == [["start"]]
    assert (await box.call(f"{PROCESS}/List", {})).json()["processes"]  # and not the process


async def test_silence_is_interrupted_by_signs_of_life(box: Box) -> None:
    pid = await pid_of(box, "hang")
    messages, _ = await box.stream(
        f"{PROCESS}/Connect", {"process": {"pid": pid}},
        **{"Connect-Timeout-Ms": "5000", "Keepalive-Ping-Interval": "1"},
    )  # fmt: skip
    assert {"event": {"keepalive": {}}} in messages


# --- framing and types ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "method", "status"),
    [
        ("application/proto", "List", 415),
        ("application/connect+proto", "Start", 415),
        ("application/json", "Start", 415),
        (STREAM, "List", 415),
        ("text/plain", "List", 415),
        ("application/json; charset=utf-8", "List", 200),
        ("APPLICATION/JSON", "List", 200),
    ],
)
async def test_types_of_messages(box: Box, kind: str, method: str, status: int) -> None:
    headers = box.headers(**{"Content-Type": kind})
    answer = await box.client.post(f"/{PROCESS}/{method}", content=b"{}", headers=headers)
    assert answer.status_code == status, answer.text


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", "invalid_argument"),
        (b"\x00", "invalid_argument"),
        (struct.pack(">BI", 0, 10) + b"{}", "invalid_argument"),
        (struct.pack(">BI", 1, 2) + b"{}", "unimplemented"),
        (struct.pack(">BI", 8, 2) + b"{}", "invalid_argument"),
        (struct.pack(">BI", 0, 5 * 1024 * 1024), "resource_exhausted"),
        (struct.pack(">BI", 0, 2) + b"[]", "invalid_argument"),
        (struct.pack(">BI", 0, 2) + b"{x", "invalid_argument"),
        (enveloped({"process": {"cmd": "echo"}}, {"process": {"cmd": "echo"}}), "invalid_argument"),
        (enveloped({}, flags=2), "invalid_argument"),
    ],
)
async def test_envelopes_that_are_none(box: Box, body: bytes, code: str) -> None:
    answer = await box.send(f"{PROCESS}/Start", body)
    assert answer.status_code == 200
    messages, end = opened(answer.content)
    assert (messages, end["error"]["code"]) == ([], code)
    assert (await box.run("echo"))[1] == {}


async def test_a_message_that_is_too_large(box: Box) -> None:
    for method, kind in (("List", "application/json"), ("Start", STREAM)):
        headers = box.headers(**{"Content-Type": kind})
        answer = await box.client.post(
            f"/{PROCESS}/{method}", content=b" " * (5 * 1024 * 1024), headers=headers
        )
        assert answer.status_code == 413, answer.text
    for content in (b"[]", b"x", b'"', b'{"a":' * 60_000):
        headers = box.headers(**{"Content-Type": "application/json"})
        answer = await box.client.post(f"/{PROCESS}/List", content=content, headers=headers)
        assert await refusal(answer) == (400, "invalid_argument")


# --- who may --------------------------------------------------------------------------------


async def test_only_the_token_of_this_sandbox_lets_in(yard: Yard, box: Box) -> None:
    other = await create(yard.client)
    for token in (None, "", "x", other.token, yard.key, box.told["trafficAccessToken"]):
        thief = Box(box.client, box.id, token)
        for answer in (
            await thief.call(f"{PROCESS}/List", {}),
            await thief.send(f"{PROCESS}/Start", enveloped({"process": {"cmd": "echo"}})),
            await box.client.get("/files", params={"path": "x"}, headers=thief.headers()),
            await box.client.get("/envs", headers=thief.headers()),
        ):
            assert (answer.status_code, answer.json()["code"]) == (401, 401), token
    assert (
        await box.client.get("/health", headers=Box(box.client, box.id, None).headers())
    ).status_code == 204
    # The API's key does not open a sandbox, and the sandbox's token opens nothing else.
    headers = {"X-API-Key": str(box.token)}
    assert (await box.client.get("/v2/sandboxes", headers=headers)).status_code == 401
    bearer = {"Authorization": f"Bearer {box.token}"}
    assert (await box.client.get("/v1/sandboxes", headers=bearer)).status_code == 401


async def test_a_token_ends_with_its_sandbox_and_not_with_a_pause(yard: Yard, box: Box) -> None:
    await yard.client.post(f"/sandboxes/{box.id}/pause")
    assert (await box.client.get("/health", headers=box.headers())).status_code == 502
    answer = await box.call(f"{PROCESS}/List", {})
    assert answer.status_code == 502
    assert answer.json() == {
        "sandboxId": box.id, "message": "The sandbox was not found", "code": 502
    }  # fmt: skip
    await yard.client.post(f"/v2/sandboxes/{box.id}/connect", json={})
    assert (await box.run("echo"))[1] == {}
    await yard.client.delete(f"/sandboxes/{box.id}")
    for answer in (
        await box.call(f"{PROCESS}/List", {}),
        await box.client.get("/health", headers=box.headers()),
        await box.client.get("/files", params={"path": "x"}, headers=box.headers()),
    ):
        assert answer.status_code == 502


async def test_a_sandbox_that_resumes_by_itself(yard: Yard) -> None:
    box = await create(yard.client, autoResume={"enabled": True})
    await yard.client.post(f"/sandboxes/{box.id}/pause")
    for _ in range(3):  # this wakes nothing
        assert (await yard.client.get("/health", headers=box.headers())).status_code == 502
    assert (await box.run("echo", "awake"))[1] == {}
    assert (await yard.client.get("/health", headers=box.headers())).status_code == 204


async def test_a_sandbox_that_resumes_by_itself_has_time_for_what_it_was_woken_for(
    yard: Yard,
) -> None:
    box = await create(yard.client, timeout=2, autoPause=True, autoResume={"enabled": True})

    async def is_paused() -> bool:
        told = await yard.client.get(f"/sandboxes/{box.id}")
        return bool(told.json()["state"] == "paused")

    await eventually(is_paused)
    assert (await box.run("echo"))[1] == {}
    told = (await yard.client.get(f"/sandboxes/{box.id}")).json()
    left = datetime.fromisoformat(told["endAt"]) - datetime.now(UTC)
    assert timedelta(seconds=250) < left < timedelta(seconds=301)


async def test_two_connects_at_once_resume_once(yard: Yard, box: Box) -> None:
    await yard.client.post(f"/sandboxes/{box.id}/pause")
    path = f"/v2/sandboxes/{box.id}/connect"
    answers = await asyncio.gather(*(yard.client.post(path, json={}) for _ in range(5)))
    assert {one.status_code for one in answers} <= {200, 201}
    (shown,) = (await yard.client.get("/v1/sandboxes")).json()["data"]
    assert shown["status"] == "running"


@pytest.mark.parametrize("name", ["ünï", "a b", "x" * 65, "a\nb"])
async def test_names_of_users(box: Box, name: str) -> None:
    answer = await box.call(f"{FILES}/Stat", {"path": "/"}, Authorization=basic(name))
    is_possible = name in ("ünï", "a b")
    assert answer.status_code == (200 if is_possible else 400), answer.text


async def test_a_user_that_does_not_exist(box: Box) -> None:
    answer = await box.call(f"{FILES}/Stat", {"path": "/"}, Authorization=basic("nobody"))
    assert await refusal(answer) == (401, "unauthenticated")
    read = await box.client.get(
        "/files", params={"path": "x", "username": "nobody"}, headers=box.headers()
    )
    assert read.status_code == 401
    broken = await box.call(f"{FILES}/Stat", {"path": "/"}, Authorization="Basic !")
    assert broken.status_code == 400


async def test_a_page_elsewhere_may_ask(box: Box) -> None:
    asked = {"Origin": "https://evil.test", "Access-Control-Request-Method": "POST",
             "Access-Control-Request-Headers": "x-access-token,content-type"}  # fmt: skip
    named = {"E2b-Sandbox-Id": box.id, "E2b-Sandbox-Port": "49983"}
    answer = await box.client.options(f"/{PROCESS}/List", headers={**asked, **named})
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in answer.headers
    # Without the token it gets nothing, with a stolen one what its holder would.
    headers = {"Origin": "https://evil.test", "Content-Type": "application/json", **named}
    refused = await box.client.post(f"/{PROCESS}/List", content=b"{}", headers=headers)
    assert refused.status_code == 401
    # The control API is for no page.
    none = await box.client.options("/v2/sandboxes", headers=asked)
    assert "access-control-allow-origin" not in none.headers


# --- files ----------------------------------------------------------------------------------


async def write(box: Box, path: str, data: bytes, **headers: str) -> httpx.Response:
    return await box.client.post(
        "/files", params={"path": path}, content=data,
        headers=box.headers(**{"Content-Type": "application/octet-stream", **headers}),
    )  # fmt: skip


async def read(box: Box, path: str, **headers: str) -> httpx.Response:
    return await box.client.get("/files", params={"path": path}, headers=box.headers(**headers))


async def test_files_are_written_and_read(box: Box) -> None:
    written = await write(box, "deep/héllo.txt", b"\x00\xffdata")
    (told,) = written.json()
    assert told == {"name": "héllo.txt", "type": "file", "path": "/root/deep/héllo.txt"}
    for path in ("deep/héllo.txt", "~/deep/héllo.txt", "/root/deep/../deep/héllo.txt"):
        found = await read(box, path)
        assert (found.status_code, found.content) == (200, b"\x00\xffdata")
        assert found.headers["content-length"] == "6"
    assert "sandbox" in found.headers["content-security-policy"]
    part = await read(box, "deep/héllo.txt", Range="bytes=1-2")
    assert (part.status_code, part.content) == (206, b"\xffd")
    assert part.headers["content-range"] == "bytes 1-2/6"
    assert (await read(box, "deep/héllo.txt", Range="bytes=-2")).content == b"ta"
    assert (await read(box, "deep/héllo.txt", Range="bytes=6-")).status_code == 416
    head = await box.client.head("/files", params={"path": "deep/héllo.txt"}, headers=box.headers())
    assert (head.status_code, head.headers["content-length"], head.content) == (200, "6", b"")
    assert (await read(box, "absent")).status_code == 404
    assert (await read(box, "deep")).status_code == 400
    assert (await read(box, "/denied/x")).status_code == 403
    assert (await write(box, "deep", b"")).status_code == 400
    assert (await write(box, "", b"")).status_code == 400
    assert (await write(box, "x" * 300, b"")).status_code in (200, 400)
    assert (await write(box, "full", bytes(ROOM + 1))).status_code == 507


async def test_files_of_a_form(box: Box) -> None:
    many = [("file", ("a.txt", b"one")), ("note", (None, b"ignored")), ("file", ("d/b.txt", b""))]
    answer = await box.client.post("/files", files=many, headers=box.headers())
    assert [one["path"] for one in answer.json()] == ["/root/a.txt", "/root/d/b.txt"]
    assert (await read(box, "a.txt")).content == b"one"
    named = await box.client.post(
        "/files", params={"path": "/tmp/c"}, files=many[:1], headers=box.headers()
    )
    assert [one["path"] for one in named.json()] == ["/tmp/c"]
    large = bytes(range(256)) * 20_000
    await box.client.post("/files", files={"file": ("big", large)}, headers=box.headers())
    assert (await read(box, "big")).content == large
    for kind, body in (
        ("multipart/form-data; boundary=x", b"--x\r\nbroken"),
        ("multipart/form-data", b"--x--"),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data; "
         b'name="file"\r\n\r\nno name\r\n--x--\r\n'),
        ("text/plain", b"x"),
        ("", b"x"),
    ):  # fmt: skip
        answer = await box.client.post(
            "/files", content=body, headers=box.headers(**{"Content-Type": kind})
        )
        assert answer.status_code in (400, 415), (kind, body)


async def test_packed_bodies(box: Box) -> None:
    data = b"x" * 3_000_000
    packed = await write(box, "z", gzip.compress(data), **{"Content-Encoding": "gzip"})
    assert packed.status_code == 200
    assert (await read(box, "z")).content == data
    several = gzip.compress(b"one ") + gzip.compress(b"two")
    await write(box, "z", several, **{"Content-Encoding": "gzip"})
    assert (await read(box, "z")).content == b"one two"
    for body in (b"no gzip", gzip.compress(data)[:-20], b"", gzip.compress(b"x") + b"rest"):
        broken = await write(box, "y", body, **{"Content-Encoding": "gzip"})
        assert broken.status_code == 400, body
    assert (await write(box, "y", b"", **{"Content-Encoding": "br"})).status_code == 400


async def test_metadata_of_files(box: Box) -> None:
    answer = await write(box, "m", b"1", **{"X-Metadata-Kind": "a b", "X-Metadata-Other": "c"})
    assert answer.json()[0]["metadata"] == {"kind": "a b", "other": "c"}
    told = (await box.call(f"{FILES}/Stat", {"path": "m"})).json()["entry"]
    assert told["metadata"] == {"kind": "a b", "other": "c"}
    await write(box, "m", b"2")
    assert "metadata" not in (await box.call(f"{FILES}/Stat", {"path": "m"})).json()["entry"]
    for headers in (
        {"X-Metadata-A": "a\tb"},
        {"X-Metadata-" + "k" * 247: "v"},
        {"X-Metadata-A": "v" * 5000},
    ):
        assert (await write(box, "m", b"3", **headers)).status_code == 400


async def test_signed_urls(yard: Yard, box: Box) -> None:
    await write(box, "signed", b"for all")
    named = {"E2b-Sandbox-Id": box.id, "E2b-Sandbox-Port": "49983"}

    def signature(path: str, operation: str, user: str, expires: int | None = None) -> str:
        text = f"{path}:{operation}:{user}:{box.token}"
        text += "" if expires is None else f":{expires}"
        digest = hashlib.sha256(text.encode()).digest()
        return "v1_" + base64.b64encode(digest).rstrip(b"=").decode()

    async def get(**query: str) -> httpx.Response:
        return await box.client.get("/files", params=query, headers=named)

    soon, past = int(time.time()) + 60, int(time.time()) - 60
    for user in ("", "root"):
        good = signature("signed", "read", user)
        more = {"username": user} if user else {}
        assert (await get(path="signed", signature=good, **more)).content == b"for all"
    ok = await get(
        path="signed", signature=signature("signed", "read", "", soon),
        signature_expiration=str(soon),
    )  # fmt: skip
    assert ok.status_code == 200
    over = await get(
        path="signed", signature=signature("signed", "read", "", past),
        signature_expiration=str(past),
    )  # fmt: skip
    assert (over.status_code, over.json()["message"]) == (401, "signature is already expired")
    for query in (
        {"path": "other", "signature": signature("signed", "read", "")},
        {"path": "signed", "signature": signature("signed", "write", "")},
        {"path": "signed", "signature": signature("signed", "read", ""), "username": "root"},
        {"path": "signed", "signature": signature("signed", "read", "", soon)},
        {"path": "signed", "signature": "v1_x", "signature_expiration": "x"},
        {"path": "signed", "signature": "ünï"},
    ):
        assert (await get(**query)).status_code == 401, query
    put = await box.client.post(
        "/files", params={"path": "new", "signature": signature("new", "write", "")},
        content=b"1", headers={**named, "Content-Type": "application/octet-stream"},
    )  # fmt: skip
    assert put.status_code == 200
    # It is for the account that was signed, whatever another header says.
    as_ghost = await box.client.get(
        "/files", params={"path": "signed", "signature": signature("signed", "read", "")},
        headers={**named, "Authorization": basic("nobody")},
    )  # fmt: skip
    assert as_ghost.status_code == 200
    # A signature is for files, and for nothing else.
    other = await box.client.post(
        f"/{PROCESS}/List", params={"path": "", "signature": signature("", "read", "")},
        content=b"{}", headers={**named, "Content-Type": "application/json"},
    )  # fmt: skip
    assert other.status_code == 401


async def test_the_calls_about_files(box: Box) -> None:
    made = await box.call(f"{FILES}/MakeDir", {"path": "d/e"})
    entry = made.json()["entry"]
    assert (entry["path"], entry["type"]) == ("/root/d/e", "FILE_TYPE_DIRECTORY")
    assert (entry["permissions"], entry["owner"], entry["size"]) == ("drwxr-xr-x", "root", "0")
    assert await refusal(await box.call(f"{FILES}/MakeDir", {"path": "d/e"})) == (
        409, "already_exists",
    )  # fmt: skip
    await write(box, "d/f", b"123")
    in_the_way = await box.call(f"{FILES}/MakeDir", {"path": "d/f"})
    assert await refusal(in_the_way) == (400, "invalid_argument")
    listed = (await box.call(f"{FILES}/ListDir", {"path": "d", "depth": 0})).json()["entries"]
    assert [(one["name"], one["size"]) for one in listed] == [("e", "0"), ("f", "3")]
    assert listed[1]["modifiedTime"].endswith("Z")
    moved = await box.call(f"{FILES}/Move", {"source": "d/f", "destination": "g/h"})
    assert moved.json()["entry"]["path"] == "/root/g/h"
    for _ in range(2):
        assert (await box.call(f"{FILES}/Remove", {"path": "g"})).json() == {}
    assert await refusal(await box.call(f"{FILES}/Stat", {"path": "g"})) == (404, "not_found")
    assert await refusal(await box.call(f"{FILES}/ListDir", {"path": "g"})) == (404, "not_found")
    denied = await box.call(f"{FILES}/Stat", {"path": "/denied/x"})
    assert await refusal(denied) == (403, "permission_denied")
    for path in ("a\x00b", "\ud800", "x/" * 3000):
        odd = await box.call(f"{FILES}/Stat", {"path": path})
        assert await refusal(odd) == (400, "invalid_argument")
        odd = await box.call(f"{FILES}/Move", {"source": "/tmp", "destination": path})
        assert await refusal(odd) == (400, "invalid_argument")
    assert (await read(box, "x/" * 3000)).status_code == 400


async def test_watches(box: Box) -> None:
    await box.call(f"{FILES}/MakeDir", {"path": "w"})
    opened_ = await box.call(f"{FILES}/CreateWatcher", {"path": "w", "includeEntry": True})
    watcher = {"watcherId": opened_.json()["watcherId"]}
    assert (await box.call(f"{FILES}/GetWatcherEvents", watcher)).json() == {"events": []}
    await write(box, "w/a", b"1")
    await box.call(f"{FILES}/Move", {"source": "w/a", "destination": "w/b"})
    await box.call(f"{FILES}/Remove", {"path": "w/b"})
    events = (await box.call(f"{FILES}/GetWatcherEvents", watcher)).json()["events"]
    assert [(one["name"], one["type"]) for one in events] == [
        ("a", "EVENT_TYPE_CREATE"), ("a", "EVENT_TYPE_RENAME"), ("b", "EVENT_TYPE_CREATE"),
        ("b", "EVENT_TYPE_REMOVE"),
    ]  # fmt: skip
    assert (await box.call(f"{FILES}/GetWatcherEvents", watcher)).json() == {"events": []}
    assert (await box.call(f"{FILES}/RemoveWatcher", watcher)).json() == {}
    assert await refusal(await box.call(f"{FILES}/GetWatcherEvents", watcher)) == (404, "not_found")
    for name in ("", "x", "e30=", "x" * 100_000, base64.urlsafe_b64encode(b'["a",1,2]').decode()):
        answer = await box.call(f"{FILES}/RemoveWatcher", {"watcherId": name})
        assert await refusal(answer) == (404, "not_found"), name
    await write(box, "file", b"")
    for path, code in (("absent", "not_found"), ("file", "invalid_argument")):
        _, end = await box.stream(f"{FILES}/WatchDir", {"path": path})
        assert end["error"]["code"] == code
        answer = await box.call(f"{FILES}/CreateWatcher", {"path": path})
        assert answer.json()["code"] == code


async def test_a_watch_that_is_streamed(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    await box.call(f"{FILES}/MakeDir", {"path": "w"})
    watched = called(monkeypatch, FakeFiles, "watched")
    watching = asyncio.create_task(box.stream(f"{FILES}/WatchDir", {"path": "w"}))
    await asyncio.wait_for(watched.wait(), 20)
    await write(box, "w/a", b"1")
    await box.call(f"{FILES}/Remove", {"path": "w"})
    messages, end = await watching
    assert messages[:2] == [
        {"start": {}}, {"filesystem": {"name": "a", "type": "EVENT_TYPE_CREATE"}}
    ]  # fmt: skip
    assert end["error"]["code"] == "not_found"


async def test_a_watch_ends_at_its_deadline(box: Box) -> None:
    await box.call(f"{FILES}/MakeDir", {"path": "w"})
    deadline = {"Connect-Timeout-Ms": "500"}
    _, end = await box.stream(f"{FILES}/WatchDir", {"path": "w"}, **deadline)
    assert end["error"]["code"] == "deadline_exceeded"


async def test_the_rest_of_the_daemon(box: Box) -> None:
    env = (await box.client.get("/envs", headers=box.headers())).json()
    assert (env["A"], env["E2B_SANDBOX_ID"]) == ("1", box.id)
    figures = (await box.client.get("/metrics", headers=box.headers())).json()
    assert figures["cpu_count"] == 1
    for method, path in (("POST", "/init"), ("POST", "/freeze"), ("GET", "/unheard")):
        answer = await box.client.request(method, path, headers=box.headers())
        assert (answer.status_code, answer.json()["code"]) == (404, 404)
    absent = Box(box.client, "sandbox-aaaaaaaaaaaa", box.token)
    assert (await absent.call(f"{PROCESS}/List", {})).status_code == 401
    assert (await box.client.get("/health", headers=absent.headers())).status_code == 502
    # What names no sandbox is a request to the API itself.
    for headers in (
        {"E2b-Sandbox-Id": "x", "E2b-Sandbox-Port": "49983"},
        {"E2b-Sandbox-Id": box.id, "E2b-Sandbox-Port": "x"},
        {"E2b-Sandbox-Id": box.id},
    ):
        answer = await box.client.get("/files", headers=headers)
        assert answer.status_code == 404
        assert "error" in answer.json()


async def test_what_a_process_was_given_is_in_no_feed(yard: Yard, box: Box) -> None:
    await box.run("echo", "s3cret-word")
    feed = (await yard.client.get("/v1/activity")).text
    assert "process" in feed
    assert "s3cret-word" not in feed
    assert str(box.token) not in feed
    assert str(box.token).encode() not in await yard.written()
    assert json.dumps(box.told["trafficAccessToken"]).encode() not in await yard.written()


async def test_a_watcher_that_is_nested_deeply_is_none(box: Box) -> None:
    given = base64.urlsafe_b64encode(b"[" * 12_000).decode()
    answer = await box.call(f"{FILES}/GetWatcherEvents", {"watcherId": given})
    assert await refusal(answer) == (404, "not_found")
