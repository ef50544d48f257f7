"""Contexts through the API, on fake machines whose interpreters know a few words."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.door import SOON_S, door
from tests.support.events import Heard, read_events
from tests.support.house import Yard, eventually, open_yard
from tests.support.several import open_several

from sandyard.server.service.sandboxes import contexts


@pytest.fixture(params=["one", pytest.param("several", marks=pytest.mark.postgres)])
async def yard(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Yard]:
    opening = open_yard(tmp_path, saves=True) if request.param == "one" else open_several()
    async with opening as made:
        yield made


def path_of(box: Mapping[str, object], *rest: object) -> str:
    return "/".join(map(str, (f"/v1/sandboxes/{box['id']}/contexts", *rest)))


async def made(yard: Yard, box: Mapping[str, object], **body: object) -> dict[str, Any]:
    answer = await yard.client.post(path_of(box), json=body)
    assert answer.status_code == 201, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


async def run(
    yard: Yard, box: Mapping[str, object], context: Mapping[str, Any], code: str, **body: object
) -> Heard:
    answer = await yard.client.post(
        path_of(box, context["id"], "run"), json={"code": code, **body}, timeout=SOON_S
    )
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return read_events(answer.text)


END: tuple[str, str | None, dict[str, Any]] = ("end", None, {})


async def test_code_is_run_and_its_reports_are_told(yard: Yard) -> None:
    box = await yard.create()
    context = await made(yard, box, cwd="/srv", user="me")
    assert (context["language"], context["cwd"], context["user"]) == ("python", "/srv", "me")
    assert await run(yard, box, context, "print é") == [("stdout", None, {"text": "é"}), END]
    value = {"text": "42", "isMain": True, "truncated": False}
    assert await run(yard, box, context, "value 42") == [("result", None, value), END]
    error = {"name": "Error", "value": "it", "traceback": "at line 1"}
    assert await run(yard, box, context, "raise it") == [("error", None, error), END]
    fed = await run(yard, box, context, "input", stdin="a\nb")
    assert fed[0] == ("stdout", None, {"text": "a\nb"})


async def test_contexts_are_found_by_any_client_and_end_one_by_one(yard: Yard) -> None:
    box = await yard.create()
    body = {"language": "node"}
    keyed = {"Idempotency-Key": "k"}
    one, again = [
        (await yard.client.post(path_of(box), json=body, headers=keyed)).json()["data"]
        for _ in range(2)
    ]
    assert one == again
    two = await made(yard, box)
    listed = (await yard.client.get(path_of(box))).json()["data"]
    assert listed == [one, two]
    assert (await yard.client.get(path_of(box, two["id"]))).json()["data"] == two
    assert (await yard.act(box, f"contexts/{one['id']}/restart"))["id"] == one["id"]
    repeated = await yard.client.post(path_of(box), json=body, headers=keyed)
    assert repeated.json()["data"]["id"] == one["id"]
    removed = await yard.client.delete(path_of(box, one["id"]))
    assert removed.json()["data"] == {"id": one["id"], "deleted": True}
    assert (await yard.client.get(path_of(box))).json()["data"] == [two]
    assert (await yard.client.delete(path_of(box, one["id"]))).status_code == 404
    for wrong in ("context-python-0", "x", "context-perl-1"):
        answer = await yard.client.post(path_of(box, wrong, "run"), json={"code": "print x"})
        assert answer.status_code == 404, answer.text
    # A process of the user's own is none.
    await yard.client.post(f"/v1/sandboxes/{box['id']}/processes", json={"command": "hang"})
    assert (await yard.client.get(path_of(box))).json()["data"] == [two]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"code": "x", "timeout": 0}, "timeout"),
        ({"code": "x", "timeout": 86_400_001}, "timeout"),
        ({"code": "x" * (2**20 + 1)}, "code"),
        ({"code": "x", "stdin": "x" * (2**20 + 1)}, "stdin"),
        ({"code": "\ud800"}, "code"),
        ({}, "code"),
    ],
)
async def test_what_cannot_be_run_is_refused(tmp_path: Path, body: Any, field: str) -> None:
    async with open_yard(tmp_path) as yard:
        box = await yard.create()
        context = await made(yard, box)
        answer = await yard.client.post(
            path_of(box, context["id"], "run"), content=json.dumps(body)
        )
        assert answer.status_code == 400, answer.text
        assert answer.json()["error"]["details"]["field"] == field


async def test_code_is_interrupted_at_its_time(yard: Yard, monkeypatch: pytest.MonkeyPatch) -> None:
    box = await yard.create()
    context = await made(yard, box)
    late = {"name": "TimeoutError", "value": "it took over 0.1 s", "traceback": ""}
    assert await run(yard, box, context, "hang", timeout=100) == [("error", None, late), END]
    process = f"/v1/sandboxes/{box['id']}/processes"
    (same,) = (await yard.client.get(process)).json()["data"]
    assert same["status"] == "running"
    # What goes on after that is ended, and the context has a new interpreter.
    monkeypatch.setattr(contexts, "_GRACE_S", 0.2)
    assert await run(yard, box, context, "stubborn", timeout=100) == [("error", None, late), END]
    assert (await run(yard, box, context, "print x"))[0][0] == "stdout"
    old, new = (await yard.client.get(process)).json()["data"]
    assert (old["pid"], old["signal"], new["status"]) == (same["pid"], "SIGKILL", "running")


async def test_an_interpreter_that_ends_in_its_code_has_a_successor(yard: Yard) -> None:
    box = await yard.create()
    context = await made(yard, box)
    (name, _, error), end = await run(yard, box, context, "die")
    assert (name, error["name"], end) == ("error", "InterpreterEnded", END)
    assert "exit code 3" in error["value"]
    assert (await run(yard, box, context, "print x"))[0][0] == "stdout"


async def test_a_context_whose_interpreter_has_ended_is_gone(yard: Yard) -> None:
    box = await yard.create()
    context = await made(yard, box)
    processes = f"/v1/sandboxes/{box['id']}/processes"
    await yard.client.post(f"{processes}/{context['id']}/signal", json={"signal": "KILL"})
    assert (await yard.client.get(path_of(box))).json()["data"] == []
    for method, rest, body in (
        ("GET", (), None), ("DELETE", (), None), ("POST", ("run",), {"code": "print x"}),
    ):  # fmt: skip
        path = path_of(box, context["id"], *rest)
        answer = await yard.client.request(method, path, json=body)
        assert answer.status_code == 404, answer.text
        assert answer.json()["error"]["details"] == {"reason": "no_context"}


async def test_pieces_of_code_run_one_after_another(yard: Yard) -> None:
    box = await yard.create()
    context = await made(yard, box)
    heard = await asyncio.gather(
        *(run(yard, box, context, f"print {number}") for number in range(8))
    )
    assert heard == [[("stdout", None, {"text": str(number)}), END] for number in range(8)]


async def test_code_is_interrupted_if_its_client_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with door(tmp_path) as opened:
        yard = opened.yard
        box = await yard.create()
        context = await made(yard, box)
        url = f"http://127.0.0.1:{opened.port}{path_of(box, context['id'], 'run')}"
        headers = {"Authorization": f"Bearer {yard.key}"}
        for word, grace_s in (("hang", 30.0), ("stubborn", 0.2)):
            monkeypatch.setattr(contexts, "_GRACE_S", grace_s)
            async with (
                httpx.AsyncClient(timeout=SOON_S, headers=headers) as client,
                client.stream("POST", url, json={"code": word}) as answer,
            ):
                assert answer.status_code == 200
                await asyncio.sleep(0.1)
            said = await run(yard, box, context, "print free", timeout=5000)
            assert said[0] == ("stdout", None, {"text": "free"})
        signals = [
            one["signal"]
            for one in (await yard.client.get(f"/v1/sandboxes/{box['id']}/processes")).json()[
                "data"
            ]
        ]
        assert signals == ["SIGKILL", None]


async def begun(yard: Yard, box: Mapping[str, object], context: Mapping[str, Any]) -> Any:
    """Run code that does not end, and return once it runs."""

    async def fed() -> int:
        listed = (await yard.client.get(f"/v1/sandboxes/{box['id']}/processes")).json()["data"]
        return int(listed[-1]["inputBytes"])

    before = await fed()
    running = asyncio.ensure_future(run(yard, box, context, "hang"))

    async def runs() -> bool:
        return await fed() > before

    await eventually(runs)
    return running


async def test_a_context_that_is_deleted_while_it_runs_code_stays_deleted(yard: Yard) -> None:
    box = await yard.create(name="mine")
    context = await made(yard, box)
    running = await begun(yard, box, context)
    # By name: it is the same context.
    path = f"/v1/sandboxes/mine/contexts/{context['id']}"
    assert (await yard.client.delete(path)).status_code == 200
    (_, _, error), end = await running
    assert (error["name"], end) == ("InterpreterEnded", END)
    assert (await yard.client.get(path)).status_code == 404
    assert (await yard.client.get(path_of(box))).json()["data"] == []


async def test_a_restart_ends_what_runs_and_leaves_one_interpreter(yard: Yard) -> None:
    box = await yard.create()
    context = await made(yard, box)
    for _ in range(3):
        running = await begun(yard, box, context)
        assert (await yard.act(box, f"contexts/{context['id']}/restart"))["id"] == context["id"]
        assert (await running)[-1] == END
        listed = (await yard.client.get(f"/v1/sandboxes/{box['id']}/processes")).json()["data"]
        assert [one["status"] for one in listed].count("running") == 1
        assert (await run(yard, box, context, "print x"))[0][0] == "stdout"


async def test_code_that_is_run_during_restarts_finds_its_context(yard: Yard) -> None:
    box = await yard.create()
    context = await made(yard, box)
    restart = path_of(box, context["id"], "restart")

    async def restarts() -> None:
        for _ in range(5):
            assert (await yard.client.post(restart)).status_code == 200

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(restarts())
        heard = [tasks.create_task(run(yard, box, context, "print x")) for _ in range(20)]
    for (_, _, said), end in (one.result() for one in heard):
        assert said.get("text") == "x" or said["name"] == "InterpreterEnded"
        assert end == END
    assert (await run(yard, box, context, "print x"))[0][0] == "stdout"


async def test_a_context_has_one_turn_under_every_name_of_its_sandbox(yard: Yard) -> None:
    box = await yard.create(name="mine")
    context = await made(yard, box)
    running = await begun(yard, box, context)
    other = asyncio.ensure_future(run(yard, {"id": "mine"}, context, "print after"))
    await yard.client.post(path_of(box, context["id"], "interrupt"))
    assert (await running)[-1] == END
    assert await other == [("stdout", None, {"text": "after"}), END]


async def test_a_pause_ends_a_run_and_keeps_the_context(yard: Yard) -> None:
    box = await yard.create()
    context = await made(yard, box)
    running = asyncio.ensure_future(run(yard, box, context, "hang"))

    async def runs() -> bool:
        listed = await yard.client.get(f"/v1/sandboxes/{box['id']}/processes")
        return bool(listed.json()["data"][0]["inputBytes"])

    await eventually(runs)
    await yard.act(box, "pause")
    (name, _, error) = (await running)[-1]
    assert (name, error["code"]) == ("error", "invalid_state")
    assert (await yard.client.get(path_of(box))).status_code == 409
    await yard.act(box, "resume")
    (kept,) = (await yard.client.get(path_of(box))).json()["data"]
    assert kept["id"] == context["id"]
