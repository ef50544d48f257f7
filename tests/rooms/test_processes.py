"""Processes that outlive the request which started them, through the API, on fake machines."""

import base64
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.door import SOON_S, door
from tests.support.events import Heard, bytes_of, read_events
from tests.support.house import Yard, eventually, open_yard
from tests.support.several import open_several

from sandyard.server.api import events
from sandyard.server.core.node_ops import Report
from sandyard.server.fakes.programs import KEPT


@pytest.fixture(params=["one", pytest.param("several", marks=pytest.mark.postgres)])
async def yard(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Yard]:
    opening = open_yard(tmp_path, saves=True) if request.param == "one" else open_several()
    async with opening as made:
        yield made


def path_of(box: Mapping[str, object], *rest: object) -> str:
    return "/".join(map(str, (f"/v1/sandboxes/{box['id']}/processes", *rest)))


async def started(yard: Yard, box: Mapping[str, object], **body: object) -> dict[str, Any]:
    answer = await yard.client.post(path_of(box), json=body)
    assert answer.status_code == 201, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


async def output(
    yard: Yard, box: Mapping[str, object], pid: object, headers: Any = None, **query: Any
) -> Heard:
    answer = await yard.client.get(path_of(box, pid, "output"), params=query, headers=headers)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return read_events(answer.text)


async def test_a_process_is_started_told_of_and_its_output_read_again_from_any_byte(
    yard: Yard,
) -> None:
    box = await yard.create()
    made = await started(yard, box, command="count 3", tag="numbers", cwd="/srv", user="me")
    assert made["status"] == "exited"
    assert (made["command"], made["cwd"], made["user"]) == ("count 3", "/srv", "me")
    assert (made["tag"], made["outputBytes"], made["exitCode"]) == ("numbers", 6, 0)
    for which in (made["pid"], "numbers"):
        assert (await yard.client.get(path_of(box, which))).json()["data"] == made
    (listed,) = (await yard.client.get(path_of(box))).json()["data"]
    assert listed == made
    whole = await output(yard, box, made["pid"])
    assert whole[0] == ("output", "6", {"stream": "stdout", "data": "1\n2\n3\n"})
    end = {"exitCode": 0, "signal": None, "timedOut": False, "durationMs": 1}
    assert whole[1] == ("exit", None, end)
    assert (await output(yard, box, "numbers", offset=3))[0][2]["data"] == "\n3\n"
    exact = await output(yard, box, "numbers", offset=5, encoding="base64")
    assert base64.b64decode(exact[0][2]["data"]) == b"\n"
    again = await output(yard, box, "numbers", headers={"Last-Event-ID": "4"})
    assert again[0] == ("output", "6", {"stream": "stdout", "data": "3\n"})
    assert [one[0] for one in await output(yard, box, "numbers", offset=6)] == ["exit"]


async def test_what_is_not_kept_any_more_is_told(yard: Yard) -> None:
    box = await yard.create()
    made = await started(yard, box, argv=["spill", "300000"])
    heard = await output(yard, box, made["pid"], offset=100, encoding="base64")
    assert heard[0] == ("lost", str(300_000 - KEPT), {"bytes": 300_000 - KEPT - 100})
    assert bytes_of(heard) == bytes(KEPT)


async def test_a_process_reads_what_is_written_to_it_and_is_signalled(yard: Yard) -> None:
    box = await yard.create()
    cat = await started(yard, box, command="cat", stdin=True)
    assert (cat["status"], cat["stdin"], cat["exitCode"]) == ("running", True, None)
    answer = await yard.client.post(path_of(box, cat["pid"], "stdin"), json={"data": "hällo "})
    assert answer.json()["data"] == {"written": 7, "closed": False}
    body = {"data": base64.b64encode(b"\xff\0").decode(), "encoding": "base64", "close": True}
    answer = await yard.client.post(path_of(box, cat["pid"], "stdin"), json=body)
    assert answer.json()["data"] == {"written": 2, "closed": True}
    heard = await output(yard, box, cat["pid"])
    text = "".join(one[2]["data"] for one in heard if one[0] == "output")
    assert text == "hällo \ufffd\0"
    answer = await yard.client.post(path_of(box, cat["pid"], "stdin"), json={"data": "x"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "invalid_state")

    hanging = await started(yard, box, command="hang")
    head = await yard.client.head(path_of(box, hanging["pid"], "output"))
    assert (head.status_code, head.content) == (200, b"")

    shell = await started(yard, box, command="hang", pty={"cols": 100, "rows": 30}, tag="shell")
    assert shell["pty"] == {"cols": 100, "rows": 30}
    answer = await yard.client.post(path_of(box, "shell", "resize"), json={"cols": 9, "rows": 8})
    assert answer.json()["data"]["pty"] == {"cols": 9, "rows": 8}
    for signal in ("KILL", "sigkill", 9):
        made = await started(yard, box, command="hang")
        answer = await yard.client.post(
            path_of(box, made["pid"], "signal"), json={"signal": signal, "everything": True}
        )
        assert answer.json()["data"] == {"pid": made["pid"], "signal": "SIGKILL"}
        found = (await yard.client.get(path_of(box, made["pid"]))).json()["data"]
        assert (found["status"], found["signal"], found["exitCode"]) == ("exited", "SIGKILL", 137)
    answer = await yard.client.post(path_of(box, made["pid"], "signal"), json={})
    assert answer.status_code == 409


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "command"),
        ({"command": " "}, "command"),
        ({"command": "a\0b"}, "command"),
        ({"command": "a", "argv": ["b"]}, "command"),
        ({"argv": [""]}, "argv"),
        ({"argv": ["a", "b\0"]}, "argv"),
        ({"argv": ["a"] * 1025}, "argv"),
        ({"argv": ["a", "b" * 140_000]}, "argv"),
        ({"command": "a", "cwd": ""}, "cwd"),
        ({"command": "a", "user": ""}, "user"),
        ({"command": "a", "tag": "123"}, "tag"),
        ({"command": "a", "tag": "a/b"}, "tag"),
        ({"command": "a", "tag": "x" * 65}, "tag"),
        ({"command": "a", "timeout": 0}, "timeout"),
        ({"command": "a", "pty": {"cols": 0}}, "pty"),
        ({"command": "a", "pty": {"rows": 70_000}}, "pty"),
        ({"command": "a", "env": {"A=B": "c"}}, "env"),
    ],
)
async def test_what_cannot_be_started_is_refused_by_name(
    tmp_path: Path, body: dict[str, object], field: str
) -> None:
    async with open_yard(tmp_path) as yard:
        box = await yard.create()
        answer = await yard.client.post(path_of(box), json=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["details"]["field"].startswith(field), answer.text
        assert (await yard.client.get(path_of(box))).json()["data"] == []


async def test_what_makes_no_sense_is_refused(yard: Yard) -> None:
    box = await yard.create()
    made = await started(yard, box, command="hi")
    for which in (4242, "nobody", 10**11):
        answer = await yard.client.get(path_of(box, which))
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    for action, body, field in (
        ("signal", {"signal": "SIGNOTHING"}, "signal"),
        ("signal", {"signal": 0}, "signal"),
        ("signal", {"signal": "99"}, "signal"),
        ("stdin", {"data": "?", "encoding": "base64"}, "data"),
        ("stdin", {"data": "x" * (2**20 + 1)}, "data"),
        ("resize", {"cols": 0}, "pty"),
    ):
        answer = await yard.client.post(path_of(box, made["pid"], action), json=body)
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["details"]["field"] == field
    for query, headers in (({"offset": -1}, {}), ({}, {"Last-Event-ID": "-1"})):
        answer = await yard.client.get(
            path_of(box, made["pid"], "output"), params=query, headers=headers
        )
        assert answer.status_code == 400, answer.text
    async with yard.client_of(await yard.stranger()) as stranger:
        assert (await stranger.get(path_of(box))).status_code == 404
        assert (await stranger.post(path_of(box), json={"command": "hi"})).status_code == 404
    readers_key = await yard.add_key(*await yard.first(), scopes=("sandbox:read",))
    async with yard.client_of(readers_key) as reader:
        assert (await reader.get(path_of(box))).status_code == 403


async def test_a_paused_sandbox_is_resumed_by_a_use_and_not_by_a_look(yard: Yard) -> None:
    box = await yard.create()
    cat = await started(yard, box, command="cat", stdin=True, tag="cat")
    await yard.act(box, "pause")
    answer = await yard.client.get(path_of(box))
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "invalid_state")
    answer = await yard.client.post(
        path_of(box, "cat", "stdin"), json={"data": "on", "close": True}
    )
    assert answer.status_code == 200, answer.text
    assert (await yard.get(box))["status"] == "running"
    assert (await output(yard, box, cat["pid"]))[0][2]["data"] == "on"


async def test_the_feed_tells_of_starts_and_signals_and_not_what_was_said(yard: Yard) -> None:
    box = await yard.create()
    made = await started(yard, box, command="cat", stdin=True, env={"A": "s3cret"}, tag="t")
    await yard.client.post(path_of(box, made["pid"], "stdin"), json={"data": "s3cret"})
    await yard.client.post(path_of(box, made["pid"], "signal"), json={})
    said = (await yard.client.get(f"/v1/sandboxes/{box['id']}/activity")).json()["data"]["events"]
    kinds = [one["eventType"] for one in said if "process" in one["eventType"]]
    assert kinds == ["sandbox.process.signal", "sandbox.process"]
    assert "s3cret" not in str(said)
    assert (await yard.get(box))["lastActivityKind"] == "process.signal"


async def test_a_follower_hears_at_once_and_is_told_of_a_pause(tmp_path: Path) -> None:
    async with door(tmp_path, saves=True) as opened:
        yard = opened.yard
        box = await yard.create()
        made = await started(yard, box, command="cat", stdin=True)
        url = f"http://127.0.0.1:{opened.port}{path_of(box, made['pid'], 'output')}"
        headers = {"Authorization": f"Bearer {yard.key}"}
        async with (
            httpx.AsyncClient(timeout=SOON_S) as client,
            client.stream("GET", url, headers=headers) as answer,
        ):
            pieces = answer.aiter_text()
            said = await anext(pieces)
            for word in ("one", "two"):
                await yard.client.post(path_of(box, made["pid"], "stdin"), json={"data": word})
                while word not in said:
                    said += await anext(pieces)
            assert (await yard.get(box))["status"] == "running"
            await yard.act(box, "pause")
            said += "".join([one async for one in pieces])
        heard = read_events(said)
        assert [one[1] for one in heard] == ["3", "6", None]
        assert heard[-1][0] == "error"
        assert heard[-1][2]["code"] == "invalid_state"
        assert heard[-1][2]["details"] == {"status": "paused"}
        # It goes on after a resume from where it was.
        await yard.client.post(
            path_of(box, made["pid"], "stdin"), json={"data": "three", "close": True}
        )
        rest = await output(yard, box, made["pid"], offset=6)
        assert [one[2].get("data") for one in rest] == ["three", None]


async def test_a_stream_ends_with_the_key_that_opened_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "BEAT_S", 0.05)
    async with door(tmp_path) as opened:
        yard = opened.yard
        box = await yard.create()
        made = await started(yard, box, command="hang")
        answer = await yard.client.post("/v1/api-keys", json={"name": "brief"})
        key = answer.json()["data"]
        url = f"http://127.0.0.1:{opened.port}{path_of(box, made['pid'], 'output')}"
        headers = {"Authorization": f"Bearer {key['key']}"}
        async with (
            httpx.AsyncClient(timeout=SOON_S) as client,
            client.stream("GET", url, headers=headers) as stream,
        ):
            pieces = stream.aiter_text()
            said = ""
            while said.count(": alive") < 2:
                said += await anext(pieces)
            await yard.client.delete(f"/v1/api-keys/{key['id']}")
            said += "".join([one async for one in pieces])
        (last,) = read_events(said)
        assert (last[0], last[2]["code"]) == ("error", "invalid_token")
        # Who left is not followed any more: nothing of it is open.
        await eventually(lambda: is_unused(yard, box))


async def is_unused(yard: Yard, box: Mapping[str, object]) -> bool:
    machines = (await yard.house.node.do(Report())).machines
    return not any(one.is_used for one in machines if one.sandbox_id == box["id"])


async def test_input_is_streamed_and_what_was_written_is_not_written_again(yard: Yard) -> None:
    box = await yard.create()
    made = await started(yard, box, command="cat", stdin=True)
    path, data = path_of(box, made["pid"], "stdin"), bytes(range(256)) * 4096

    async def fed(content: bytes, **query: Any) -> tuple[int, Any]:
        answer = await yard.client.put(
            path, params=query, content=content,
            headers={"Content-Type": "application/octet-stream"},
        )  # fmt: skip
        return answer.status_code, answer.json().get("data") or answer.json()["error"]

    assert await fed(data[:1000], offset=0) == (200, {"written": 1000, "closed": False})
    # The answer was lost: all of it again, and more.
    assert await fed(data[:5000], offset=0) == (200, {"written": 5000, "closed": False})
    status, error = await fed(b"x", offset=6000)
    assert (status, error["details"]["field"]) == (400, "offset")
    assert await fed(data[5000:6000]) == (200, {"written": 1000, "closed": False})
    rest = {"written": len(data) - 6000, "closed": True}
    assert await fed(data[6000:], offset=6000, close=True) == (200, rest)
    shown = (await yard.client.get(path_of(box, made["pid"]))).json()["data"]
    assert (shown["inputBytes"], shown["outputBytes"]) == (len(data), len(data))
    status, error = await fed(b"late")
    assert (status, error["code"]) == (409, "invalid_state")
    answer = await yard.client.put(path_of(box, 9999, "stdin"), content=b"x")
    assert answer.status_code == 404


async def test_a_relative_folder_is_below_the_workspace_and_made_on_request(yard: Yard) -> None:
    box = await yard.create()
    made = await started(yard, box, command="count 1", cwd="a/b", makeCwd=True, user=1000)
    assert (made["cwd"], made["user"]) == ("/workspace/a/b", "1000")
    listed = await yard.client.get(f"/v1/sandboxes/{box['id']}/files/stat?path=a/b")
    assert listed.json()["data"]["type"] == "folder"
    done = await yard.client.post(
        f"/v1/sandboxes/{box['id']}/exec",
        json={"command": "x", "cwd": "c", "makeCwd": True, "user": 0},
    )
    assert done.status_code == 200, done.text
    listed = await yard.client.get(f"/v1/sandboxes/{box['id']}/files/stat?path=c")
    assert listed.status_code == 200
    refused = await yard.client.post(path_of(box), json={"command": "x", "cwd": ""})
    assert refused.json()["error"]["details"]["field"] == "cwd"
