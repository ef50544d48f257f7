"""Ports of sandboxes of the E2B API, and connections that break, on real sockets."""

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.door import SOON_S, Door, door
from tests.support.e2b import Box, create, enveloped
from tests.support.house import EACH_STORE, store_section
from tests.support.listener import PORT, Listener, listening
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as websocket_server
from websockets.exceptions import ConnectionClosed, InvalidStatus

from sandyard.server.core import ops
from sandyard.server.core.contracts.store import Turn
from sandyard.server.e2b import ports as ports_of_e2b
from sandyard.server.fakes.driver import Conduct
from sandyard.server.front import ports

DOMAIN = "box.example"
SOCKETS, CLOSED, INTERPRETER = 4000, 5000, 49999
TOKEN = "e2b-traffic-access-token"


@dataclass
class Shown:
    """A sandbox of the E2B API whose ports lead to servers of the test's own."""

    opened: Door
    listener: Listener
    client: httpx.AsyncClient
    conduct: Conduct

    async def box(self, **body: Any) -> Box:
        """Create a sandbox."""
        return await create(self.client, **body)

    async def get(
        self, box: Box, path: str = "/", *, port: int = PORT, method: str = "GET", **headers: str
    ) -> httpx.Response:
        """Ask a port by its host name, as a stranger."""
        given = {"Host": f"{port}-{box.id}.{DOMAIN}", **headers}
        async with httpx.AsyncClient(timeout=SOON_S) as client:
            url = f"http://127.0.0.1:{self.opened.port}{path}"
            return await client.request(method, url, headers=given)


@pytest.fixture(params=EACH_STORE)
async def shown(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Shown]:
    async def echo(socket: ServerConnection) -> None:
        with suppress(ConnectionClosed):
            async for message in socket:
                await socket.send(message)

    async with (
        listening() as (listener, port),
        websocket_server(echo, "127.0.0.1", 0) as sockets,
    ):
        there = sockets.sockets[0].getsockname()[1]
        conduct = Conduct(ports={PORT: port, INTERPRETER: port, SOCKETS: there})
        async with (
            store_section(request.param) as store,
            door(tmp_path, saves=True, conduct=conduct, e2b_domain=DOMAIN, store=store) as opened,
            httpx.AsyncClient(
                base_url=f"http://127.0.0.1:{opened.port}",
                headers={"X-API-Key": opened.yard.key, "Host": f"api.{DOMAIN}"},
                timeout=SOON_S,
            ) as client,
        ):
            yield Shown(opened, listener, client, conduct)
    assert listener.open == 0


async def test_a_port_is_open_to_everyone_below_the_domain(shown: Shown) -> None:
    box = await shown.box()
    told = (await shown.get(box, "/a%2Fb?x=%41", Authorization="Bearer theirs")).json()["head"]
    assert told.startswith("GET /a%2Fb?x=%41 HTTP/1.1\r\n")
    assert f"Host: {PORT}-{box.id}.{DOMAIN}\r\n" in told
    assert "Authorization: Bearer theirs\r\n" in told
    assert "X-Forwarded-For: 127.0.0.1\r\n" in told
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "PATCH", "PROPFIND"):
        answer = await shown.get(box, "/m", method=method)
        assert answer.json()["head"].startswith(f"{method} /m ")
    moved = await shown.get(box, "/cookies")
    assert moved.status_code == 302
    closed = await shown.get(box, port=CLOSED)
    assert (closed.status_code, closed.json()) == (502, {
        "sandboxId": box.id, "message": "The sandbox is running but port is not open",
        "port": CLOSED, "code": 502,
    })  # fmt: skip
    assert (await shown.get(box, "/garbage")).status_code == 502
    assert (await shown.get(box, "/nothing")).status_code == 502
    uri = f"ws://{SOCKETS}-{box.id}.{DOMAIN}/"
    async with connect(uri, host="127.0.0.1", port=shown.opened.port, proxy=None) as socket:
        await socket.send("hello")
        assert await socket.recv() == "hello"


async def test_the_platforms_own_credentials_do_not_reach_a_port(shown: Shown) -> None:
    box = await shown.box()
    key = "e2b_" + "0" * 40
    headers = {
        "X-API-Key": key, "X-Access-Token": str(box.token), TOKEN: box.told["trafficAccessToken"],
        "Authorization": f"Bearer {shown.opened.yard.key}",
    }  # fmt: skip
    told = (await shown.get(box, "/", **headers)).json()["head"]
    for secret in headers.values():
        assert secret.removeprefix("Bearer ") not in told


async def test_a_session_of_the_platform_does_not_reach_a_port(
    shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def is_ours(*_: object) -> bool:
        return True

    box = await shown.box()
    sent: dict[str, Any] = {"Authorization": "Bearer eyJ.a", "X-API-Key": "eyJ.b"}
    head = (await shown.get(box, "/", **sent)).json()["head"]
    assert "eyJ.a" in head
    assert "eyJ.b" in head
    monkeypatch.setattr(ports_of_e2b, "has_session", is_ours)
    assert "eyJ" not in (await shown.get(box, "/", **sent)).json()["head"]


async def test_metrics_are_samples_of_the_guest_and_one_of_now(shown: Shown) -> None:
    box = await shown.box()
    now_s = int(time.time())

    async def heard(**query: int) -> list[int]:
        answer = await shown.client.get(f"/sandboxes/{box.id}/metrics", params=query)
        return [now_s - one["timestampUnix"] for one in answer.json()]

    def sample(ago_s: int, *, cpu_percent: float = 7.0) -> ops.Sample:
        return ops.Sample((now_s - ago_s) * 1000, cpu_percent, 2, 3, 4, 5)

    # What a guest says of itself may be anything.
    odd = (sample(-(10**6)), sample(8, cpu_percent=-1.0), sample(7, cpu_percent=1e300))
    shown.conduct.earlier = (sample(45), sample(30), sample(15), *odd)
    found = await heard()
    assert found[:3] == [45, 30, 15]
    assert (len(found), abs(found[3]) < SOON_S) == (4, True)
    assert (await heard(start=now_s - 30))[:2] == [30, 15]
    assert await heard(end=now_s - 20) == [45, 30]
    assert await heard(start=now_s - 40, end=now_s - 20) == [30]
    shown.conduct.earlier = [sample(ago) for ago in range(2000, 0, -1)]
    assert len(await heard()) == 241


async def test_a_code_interpreter_that_starts_is_waited_for(
    shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await shown.box()
    token = {TOKEN: box.told["trafficAccessToken"]}
    port = shown.conduct.ports.pop(INTERPRETER)
    asking = asyncio.ensure_future(
        shown.get(box, port=INTERPRETER, **token, **{"E2b-Template-Id": "theirs"})
    )
    assert await asyncio.wait({asking}, timeout=1) == (set(), {asking})
    shown.conduct.ports[INTERPRETER] = port
    answer = await asyncio.wait_for(asking, SOON_S)
    assert answer.status_code == 200
    told = answer.json()["head"]
    assert f"E2b-Sandbox-Id: {box.id}\r\nE2b-Template-Id: base-minimal\r\n" in told
    assert "theirs" not in told
    # Not forever, and not for those who may not use it.
    monkeypatch.setattr(ports_of_e2b, "_INTERPRETER_START_S", 0)
    del shown.conduct.ports[INTERPRETER]
    assert (await shown.get(box, port=INTERPRETER, **token)).status_code == 502
    assert (await shown.get(box, port=INTERPRETER)).status_code == 403


async def test_a_port_that_was_about_to_listen_is_waited_for_after_a_resume(shown: Shown) -> None:
    box = await shown.box(autoResume={"enabled": True})
    await shown.client.post(f"/sandboxes/{box.id}/pause")
    port = shown.conduct.ports.pop(PORT)
    asking = asyncio.ensure_future(shown.get(box))
    assert await asyncio.wait({asking}, timeout=2) == (set(), {asking})
    shown.conduct.ports[PORT] = port
    assert (await asyncio.wait_for(asking, SOON_S)).status_code == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: {host}\r\nHost: {host}\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nHost: {host}\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: {host}\r\nHost: localhost\r\nConnection: Upgrade\r\n"
        b"Upgrade: websocket\r\n\r\n",
    ],
)
async def test_a_request_with_several_hosts_is_refused(shown: Shown, head: bytes) -> None:
    box = await shown.box()
    host = f"{PORT}-{box.id}.{DOMAIN}".encode()
    reader, writer = await shown.opened.knock()
    writer.write(head.replace(b"{host}", host))
    writer.write_eof()
    async with asyncio.timeout(SOON_S):
        said = await reader.read()
    writer.close()
    assert said.startswith(b"HTTP/1.1 400 "), said
    assert b"several Host headers" in said


async def test_ports_that_are_not_public(shown: Shown) -> None:
    box = await shown.box(network={"allowPublicTraffic": False})
    other = await shown.box()
    for token in (None, "x", other.told["trafficAccessToken"], box.token):
        headers: dict[str, Any] = {} if token is None else {TOKEN: token}
        answer = await shown.get(box, **headers)
        assert (answer.status_code, answer.json()["code"]) == (403, 403)
    good = {TOKEN: box.told["trafficAccessToken"]}
    assert (await shown.get(box, **good)).status_code == 200
    uri = f"ws://{SOCKETS}-{box.id}.{DOMAIN}/"
    with pytest.raises(InvalidStatus) as refused:
        async with connect(uri, host="127.0.0.1", port=shown.opened.port, proxy=None):
            pass
    assert refused.value.response.status_code == 403
    async with connect(
        uri, host="127.0.0.1", port=shown.opened.port, proxy=None, additional_headers=good
    ) as socket:
        await socket.send("in")
        assert await socket.recv() == "in"


async def test_the_port_of_the_interpreter_always_needs_the_token(shown: Shown) -> None:
    box = await shown.box()
    assert (await shown.get(box, port=INTERPRETER)).status_code == 403
    good = {TOKEN: box.told["trafficAccessToken"]}
    assert (await shown.get(box, port=INTERPRETER, **good)).status_code == 200


async def test_nothing_is_public_but_below_the_domain(shown: Shown) -> None:
    box = await shown.box()
    named = {"E2b-Sandbox-Id": box.id, "E2b-Sandbox-Port": str(PORT)}
    async with httpx.AsyncClient(timeout=SOON_S) as client:
        url = f"http://127.0.0.1:{shown.opened.port}/"
        refused = await client.get(url, headers=named)
        assert refused.status_code == 403
        good = {**named, TOKEN: box.told["trafficAccessToken"]}
        answer = await client.get(url, headers=good)
        assert (answer.status_code, answer.headers["cache-control"]) == (200, "no-store")
        # The cookies of the platform's own name are not the guest's, and none of its own stays.
        head = (await client.get(url, headers={**good, "Cookie": "a=1"})).json()["head"]
        assert "a=1" not in head
        answer = await client.get(f"{url}cookies", headers=good)
        assert "set-cookie" not in answer.headers
    # Sandboxes of the other API are not public at all.
    own = await shown.opened.yard.create()
    quiet = Box(shown.client, str(own["id"]), None)
    assert (await shown.get(quiet)).status_code == 403


async def test_the_host_that_a_port_is_shown(shown: Shown) -> None:
    box = await shown.box(network={"maskRequestHost": "own.example:${PORT}"})
    told = (await shown.get(box)).json()["head"]
    assert f"Host: own.example:{PORT}\r\n" in told


@pytest.mark.parametrize("port", [9111, 5900, 70000, 0])
async def test_ports_that_are_nobodys(shown: Shown, port: int) -> None:
    box = await shown.box()
    assert (await shown.get(box, port=port)).status_code in (401, 404, 502)
    assert shown.listener.heard == []


async def test_a_paused_sandbox_and_one_that_is_gone(shown: Shown) -> None:
    box = await shown.box()
    await shown.client.post(f"/sandboxes/{box.id}/pause")
    answer = await shown.get(box)
    assert (answer.status_code, answer.json()["message"]) == (502, "The sandbox was not found")
    await shown.client.delete(f"/sandboxes/{box.id}")
    assert (await shown.get(box)).status_code == 502
    wakes = await shown.box(autoResume={"enabled": True})
    await shown.client.post(f"/sandboxes/{wakes.id}/pause")
    assert (await shown.get(wakes)).status_code == 200


# --- connections that break -----------------------------------------------------------------


async def following(shown: Shown, box: Box) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Start a process that says nothing, and return the connection once it runs."""
    body = enveloped({"process": {"cmd": "hang"}})
    reader, writer = await shown.opened.knock()
    head = (
        f"POST /process.Process/Start HTTP/1.1\r\nHost: 49983-{box.id}.{DOMAIN}\r\n"
        f"X-Access-Token: {box.token}\r\nContent-Type: application/connect+json\r\n"
        f"Content-Length: {len(body)}\r\n\r\n"
    )
    writer.write(head.encode() + body)
    async with asyncio.timeout(SOON_S):
        assert b"200" in await reader.readline()
        await reader.readuntil(b'"start"')
    return reader, writer


async def is_reset(reader: asyncio.StreamReader) -> bool:
    try:
        async with asyncio.timeout(SOON_S):
            while await reader.read(1000):
                pass
    except ConnectionResetError:
        return True
    return False


@pytest.mark.parametrize("how", ["killed", "died", "paused"])
async def test_a_stream_is_reset_when_its_machine_goes(shown: Shown, how: str) -> None:
    box = await shown.box()
    reader, writer = await following(shown, box)
    if how == "killed":
        await shown.client.delete(f"/sandboxes/{box.id}")
    elif how == "paused":
        await shown.client.post(f"/sandboxes/{box.id}/pause")
    else:
        shown.opened.yard.machine_of({"name": None, "id": box.id}).die()
    assert await is_reset(reader)
    writer.close()
    health = await shown.client.get("/health", headers={**box.headers(), "Host": "x"})
    assert health.status_code == 502


async def test_what_is_open_ends_when_the_owner_leaves_the_organization(
    shown: Shown, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ports, "_CHECK_S", 0.05)
    box = await shown.box()
    url = f"http://127.0.0.1:{shown.opened.port}/events"
    uri = f"ws://{SOCKETS}-{box.id}.{DOMAIN}/"
    async with (
        httpx.AsyncClient(headers={"Host": f"{PORT}-{box.id}.{DOMAIN}"}) as client,
        client.stream("GET", url) as events,
        connect(uri, host="127.0.0.1", port=shown.opened.port, proxy=None) as socket,
    ):
        feed = events.aiter_raw()
        await anext(feed)
        await socket.send("hello")
        assert await socket.recv() == "hello"
        yard = shown.opened.yard
        org_id, user_id = await yard.first()
        async with yard.house.store.write(Turn.ALONE) as tx:
            assert await tx.users.remove_member(org_id, user_id, at=datetime.now(UTC))
        async with asyncio.timeout(SOON_S):
            with pytest.raises(httpx.RemoteProtocolError):
                await anext(feed)
            with pytest.raises(ConnectionClosed):
                await socket.recv()
    assert (await shown.get(box)).status_code == 403


async def test_a_client_that_leaves_ends_nothing(shown: Shown) -> None:
    box = await shown.box()
    for _ in range(3):
        _, writer = await following(shown, box)
        writer.close()
    headers = {**box.headers(), "Host": f"49983-{box.id}.{DOMAIN}"}

    async def running() -> int:
        answer = await shown.client.post("/process.Process/List", json={}, headers=headers)
        return len(answer.json()["processes"])

    assert await running() == 3


async def test_many_streams_at_once(shown: Shown) -> None:
    box = await shown.box()
    streams = [await following(shown, box) for _ in range(200)]
    headers = {**box.headers(), "Host": f"49983-{box.id}.{DOMAIN}"}
    answer = await shown.client.post("/process.Process/List", json={}, headers=headers)
    assert len(answer.json()["processes"]) == 200
    for _, writer in streams:
        writer.close()


async def test_an_upload_that_is_cut_off(shown: Shown) -> None:
    box = await shown.box()
    _, writer = await shown.opened.knock()
    head = (
        f"POST /files?path=big HTTP/1.1\r\nHost: 49983-{box.id}.{DOMAIN}\r\n"
        f"X-Access-Token: {box.token}\r\nContent-Type: application/octet-stream\r\n"
        "Content-Length: 100000000\r\n\r\n"
    )
    writer.write(head.encode() + bytes(1_000_000))
    await writer.drain()
    writer.close()
    headers = {**box.headers(), "Host": f"49983-{box.id}.{DOMAIN}"}
    answer = await shown.client.post(
        "/filesystem.Filesystem/Stat", json={"path": "/"}, headers=headers
    )
    assert json.loads(answer.content)["entry"]["type"] == "FILE_TYPE_DIRECTORY"
