"""Terminals for browsers, on fake machines."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from tests.support.door import SOON_S, Door, door
from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from sandyard.server.api import events
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.ids import digest_of_key
from sandyard.server.links.local import SystemClock


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Door]:
    async with door(tmp_path, saves=True) as made:
        yield made


async def ticket(opened: Door, box: Any, client: Any = None, **body: object) -> dict[str, Any]:
    answer = await (client or opened.yard.client).post(
        "/v1/terminal/sandbox-sessions", json={"sandboxId": box["id"], **body}
    )
    assert answer.status_code == 201, answer.text
    made: dict[str, Any] = answer.json()["data"]
    assert made["wsPath"] == f"/v1/terminal/sessions/{made['sessionId']}"
    return made


@asynccontextmanager
async def terminal(opened: Door, made: dict[str, Any], query: str = "") -> AsyncIterator[Any]:
    url = f"ws://127.0.0.1:{opened.port}{made['wsPath']}{query}"
    async with connect(url, proxy=None) as socket:
        yield socket


async def printed(socket: ClientConnection, size: int) -> bytes:
    said = b""
    async with asyncio.timeout(SOON_S):
        while len(said) < size:
            one = await socket.recv()
            assert isinstance(one, bytes), one
            said += one
    return said


async def refused(opened: Door, made: dict[str, Any], query: str = "") -> tuple[int, str]:
    with pytest.raises(InvalidStatus) as found:
        async with terminal(opened, made, query):
            pass
    response = found.value.response
    return response.status_code, json.loads(response.body)["error"]["code"]


async def test_keys_go_in_and_bytes_come_out(opened: Door) -> None:
    box = await opened.yard.create()
    made = await ticket(opened, box)
    async with terminal(opened, made, "?cols=132&rows=43") as socket:
        for keys, shown in (
            ("text é", "text é".encode()), (b"bytes \xff\xc3", b"bytes \xff\xc3"),
            (json.dumps({"type": "input", "data": "typed é\r"}), "typed é\r".encode()),
            ('{"type": "other"}', b'{"type": "other"}'), ("{not json", b"{not json"),
            ('{"type": "resize", "cols": 0, "rows": 1}',) * 2,
        ):  # fmt: skip
            await socket.send(keys)
            want = shown if isinstance(shown, bytes) else shown.encode()
            assert await printed(socket, len(want)) == want
        program: Any
        (program,) = opened.yard.machine_of(box)._programs._by_pid.values()
        assert (program.size.columns, program.size.rows) == (132, 43)
        await socket.send(json.dumps({"type": "resize", "cols": 99, "rows": 33}))
        async with asyncio.timeout(SOON_S):
            while program.size.columns != 99:
                await asyncio.sleep(0.01)
        data = b"x" * 100_000  # of more, a fake machine keeps the last
        await socket.send(data)
        assert await printed(socket, len(data)) == data
        program.send(9)
        async with asyncio.timeout(SOON_S):
            said = json.loads(await socket.recv())
            assert (said["type"], said["exitCode"]) == ("exit", 137)
            with pytest.raises(ConnectionClosed):
                await socket.recv()
    assert (await opened.yard.get(box))["lastActivityKind"] == "terminal"


async def test_who_was_cut_off_comes_back_to_the_same_shell(opened: Door) -> None:
    box = await opened.yard.create()
    made = await ticket(opened, box)
    async with terminal(opened, made) as socket:
        await socket.send("one")
        assert await printed(socket, 3) == b"one"
        socket.transport.abort()
    again = await ticket(opened, box, terminalId=made["terminalId"])
    assert again["terminalId"] == made["terminalId"]
    async with terminal(opened, again, "?offset=1") as socket:
        assert await printed(socket, 2) == b"ne"
        await socket.send("two")
        assert await printed(socket, 3) == b"two"
        (program,) = opened.yard.machine_of(box)._programs._by_pid.values()
        program.send(15)
    gone = await ticket(opened, box, terminalId=f"{made['terminalId'][:-1]}x")
    assert await refused(opened, gone) == (404, "not_found")
    for bad in ("x", "", "terminal-" + "x" * 100):
        body = {"sandboxId": box["id"], "terminalId": bad}
        answer = await opened.yard.client.post("/v1/terminal/sandbox-sessions", json=body)
        assert answer.json()["error"]["details"]["field"] == "terminalId"


async def test_a_ticket_is_for_one_use_and_one_thing(opened: Door) -> None:
    yard = opened.yard
    box = await yard.create()
    made = await ticket(opened, box)
    async with terminal(opened, made):
        pass
    assert await refused(opened, made) == (401, "invalid_token")
    preview = (await yard.client.get(f"/v1/sandboxes/{box['id']}/url?port=3000")).json()["data"]
    token = preview["url"].split(".")[0].rpartition("-")[2]
    for secret in ("x", token, "x" * 5000, "%00"):
        assert await refused(opened, {"wsPath": f"/v1/terminal/sessions/{secret}"})
    # Shown in the wrong place it is not used up either.
    async with yard.house.store.read() as tx:
        assert await tx.tickets.find(sha256(token.encode()).hexdigest()) is not None
    # Two at once: one gets it.
    made = await ticket(opened, box)

    async def try_it() -> int:
        try:
            async with terminal(opened, made):
                return 101
        except InvalidStatus as error:
            return error.response.status_code

    assert sorted(await asyncio.gather(*(try_it() for _ in range(5)))) == [101, *[401] * 4]
    async with yard.client_of(None) as nobody:
        answer = await nobody.get(made["wsPath"])
        assert answer.status_code == 401
    answer = await yard.client.get(made["wsPath"])
    assert "WebSocket" in answer.json()["error"]["message"]


async def test_who_may_have_one(opened: Door) -> None:
    yard = opened.yard
    box = await yard.create()
    org_id, user_id = await yard.first()
    reader = await yard.add_key(org_id, user_id, scopes=("sandbox:read",))
    member = await yard.add_key(org_id, await yard.add_member(org_id))
    for key, status in ((await yard.stranger(), 404), (reader, 403), (member, 404), (None, 401)):
        async with yard.client_of(key) as client:
            answer = await client.post(
                "/v1/terminal/sandbox-sessions", json={"sandboxId": box["id"]}
            )
            assert answer.status_code == status
    bad = await refused(opened, await ticket(opened, box), "?cols=0")
    assert bad == (400, "bad_request")
    assert await refused(opened, await ticket(opened, box), "?offset=x") == bad


class Later(SystemClock):
    """A clock that can be put forward."""

    by_s = 0.0

    def now(self) -> datetime:
        return datetime.fromtimestamp(super().now().timestamp() + self.by_s, UTC)


async def test_a_ticket_runs_out_in_a_minute(tmp_path: Path) -> None:
    clock = Later()
    async with door(tmp_path, saves=True, clock=clock) as opened:
        box = await opened.yard.create(idleTimeout=0)
        made = await ticket(opened, box)
        clock.by_s = 61
        assert await refused(opened, made) == (401, "token_expired")


@pytest.mark.parametrize("how", ["revoke", "rotate"])
async def test_it_is_closed_with_the_key_that_it_was_asked_for_with(
    opened: Door, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    monkeypatch.setattr(events, "BEAT_S", 0.05)
    yard = opened.yard
    box = await yard.create()
    org_id, user_id = await yard.first()
    key = await yard.add_key(org_id, user_id)
    async with yard.client_of(key) as client:
        made, later = await ticket(opened, box, client), await ticket(opened, box, client)
    async with terminal(opened, made) as socket:
        await socket.send("in")
        assert await printed(socket, 2) == b"in"
        async with yard.house.store.write(Turn.ALONE) as tx:
            (held,) = [
                one for one in await tx.keys.page(org_id, owner_user_id=None, limit=10)
                if key.startswith(one.prefix)
            ]  # fmt: skip
            is_revoked = {"revoked_at": datetime.now(UTC)}
            is_rotated = {"digest": digest_of_key("rt_live_another")}
            changed = is_revoked if how == "revoke" else is_rotated
            await tx.keys.replace(replace(held, **changed))
        with pytest.raises(ConnectionClosed):
            async with asyncio.timeout(SOON_S):
                while True:
                    await socket.recv()
        assert socket.close_code == 1008
    assert await refused(opened, later) == (401, "invalid_token")


@pytest.mark.parametrize("how", ["pause", "delete"])
async def test_it_ends_with_its_sandbox_and_says_so(opened: Door, how: str) -> None:
    box = await opened.yard.create()
    made, later = await ticket(opened, box), await ticket(opened, box)
    async with terminal(opened, made) as socket:
        await socket.send("in")
        await printed(socket, 2)
        if how == "pause":
            await opened.yard.act(box, "pause")
        else:
            await opened.yard.client.delete(f"/v1/sandboxes/{box['id']}")
        async with asyncio.timeout(SOON_S):
            said = await socket.recv()
            assert json.loads(said)["type"] == "error"
            with pytest.raises(ConnectionClosed):
                await socket.recv()
    if how == "pause":
        async with terminal(opened, later) as socket:  # which resumes it
            await socket.send("back")
            assert await printed(socket, 4) == b"back"
    else:
        assert await refused(opened, later) == (404, "not_found")
