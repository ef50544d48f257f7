"""Processes attached to by WebSocket, on fake machines."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.door import BRIEF, SOON_S, Door, door
from tests.support.house import Yard, eventually, until
from websockets.asyncio.client import ClientConnection, connect
from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as websocket_server
from websockets.exceptions import ConnectionClosed, InvalidStatus

from sandyard.client import Exited, Printed, TransferError
from sandyard.client.attach import Attachment
from sandyard.client.config import ClientConfig
from sandyard.client.models import ProcessEvent
from sandyard.server.api import events
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.node_ops import Report

QUIET = ("alive", "taken")


@pytest.fixture
async def opened(tmp_path: Path) -> AsyncIterator[Door]:
    async with door(tmp_path, saves=True) as made:
        yield made


async def started(yard: Yard, box: Mapping[str, object], **body: object) -> int:
    answer = await yard.client.post(f"/v1/sandboxes/{box['id']}/processes", json=body)
    assert answer.status_code == 201, answer.text
    return int(answer.json()["data"]["pid"])


def url_of(opened: Door, box: Mapping[str, object], process: object, query: str = "") -> str:
    path = f"/v1/sandboxes/{box['id']}/processes/{process}/attach"
    return f"ws://127.0.0.1:{opened.port}{path}{query and '?'}{query}"


@asynccontextmanager
async def attached(opened: Door, url: str, **options: Any) -> AsyncIterator[ClientConnection]:
    headers = {"Authorization": f"Bearer {opened.yard.key}"}
    async with connect(url, additional_headers=headers, proxy=None, **options) as socket:
        yield socket


async def heard(socket: ClientConnection, *, beats: bool = False) -> list[Any]:
    """Return all that is sent until it is closed: messages, and (stream, bytes)."""
    said: list[Any] = []
    async with asyncio.timeout(SOON_S):
        while True:
            try:
                one = await socket.recv()
            except ConnectionClosed:
                return said
            if isinstance(one, bytes):
                said.append((one[0], one[1:]))
            elif beats or json.loads(one)["type"] not in QUIET:
                said.append(json.loads(one))


async def told(socket: ClientConnection) -> Any:
    async with asyncio.timeout(SOON_S):
        while True:
            one = await socket.recv()
            if isinstance(one, bytes):
                return one[0], one[1:]
            if json.loads(one)["type"] not in QUIET:
                return json.loads(one)


async def test_what_is_printed_comes_out_and_what_is_sent_goes_in(opened: Door) -> None:
    box = await opened.yard.create()
    pid = await started(opened.yard, box, command="cat", stdin=True)
    async with attached(opened, url_of(opened, box, pid)) as socket:
        assert await told(socket) == {"type": "attached", "pid": pid, "offset": 0, "lost": 0}
        await socket.send(b"\0\xff")
        assert await told(socket) == (1, b"\0\xff")
        await socket.send('{"type": "input", "data": "hü"}')
        assert await told(socket) == (1, "hü".encode())
        await socket.send('{"type": "input", "data": "AAE=", "encoding": "base64"}')
        assert await told(socket) == (1, b"\0\1")
        # What makes no sense, or cannot be, is told and changes nothing.
        for message in (
            "", "{", "[]", '{"type": "x"}', '{"type": "resize", "cols": "a"}', '{"type": null}',
            '{"type": "resize", "cols": 0}', '{"type": "resize"}', "[" * 9000,
            '{"type": "signal", "signal": "SIGNOPE"}', '{"type": "input", "data": "\\ud800"}',
        ):  # fmt: skip
            await socket.send(message)
            said = await told(socket)
            assert said["type"] == "refused", message
            assert said["code"] in ("bad_request", "invalid_state"), said
        await socket.send('{"type": "end"}')
        await socket.send(b"too late")
        assert (await told(socket))["code"] == "invalid_state"
        assert [one for one in await heard(socket, beats=True) if one["type"] != "taken"] == [
            {"type": "exit", "exitCode": 0, "signal": None, "timedOut": False, "durationMs": 1}
        ]
    assert socket.close_code == 1000
    # Again from a byte on, after its end, by a name.
    async with attached(opened, url_of(opened, box, pid, "offset=3")) as socket:
        said = await heard(socket)
        assert said[0]["offset"] == 3
        assert b"".join(one[1] for one in said[1:-1]) == "ü".encode() + b"\0\1"
    async with attached(opened, url_of(opened, box, pid)) as socket:  # from now on
        assert [one["type"] for one in await heard(socket)] == ["attached", "exit"]


async def test_a_terminal_is_resized_and_signalled(opened: Door) -> None:
    box = await opened.yard.create()
    size = {"cols": 80, "rows": 24}
    pid = await started(opened.yard, box, command="hang", pty=size, tag="shell")
    async with attached(opened, url_of(opened, box, "shell", "offset=0")) as socket:
        assert (await told(socket))["pid"] == pid
        await socket.send('{"type": "resize", "cols": 132, "rows": 50}')
        path = f"/v1/sandboxes/{box['id']}/processes/{pid}"

        async def is_resized() -> bool:
            data = (await opened.yard.client.get(path)).json()["data"]
            return bool(data["pty"] == {"cols": 132, "rows": 50})

        await eventually(is_resized)
        await socket.send('{"type": "signal", "signal": "TERM", "everything": true}')
        assert (await heard(socket))[-1]["type"] == "exit"


async def test_who_may_not_is_answered_before_there_is_a_socket(opened: Door) -> None:
    yard = opened.yard
    box = await yard.create()
    pid = await started(yard, box, command="hang")
    org_id, user_id = await yard.first()
    poor = await yard.add_key(org_id, user_id, scopes=("sandbox:read",))
    stranger = await yard.stranger()
    for query, headers, status, code in (
        ("", {}, 401, "unauthorized"),
        ("", {"X-API-Key": "rt_live_" + "x" * 32}, 401, "invalid_token"),
        (f"api_key={yard.key}&token={yard.key}", {}, 400, "bad_request"),
        (f"api_key={poor}", {}, 403, "forbidden"),
        (f"token={stranger}", {}, 404, "not_found"),
        (f"api_key={yard.key}&offset=x", {}, 400, "bad_request"),
        (f"api_key={yard.key}&offset=999", {}, 400, "bad_request"),
    ):
        with pytest.raises(InvalidStatus) as caught:
            async with connect(
                url_of(opened, box, pid, query), additional_headers=headers, proxy=None
            ):
                pass
        response = caught.value.response
        error = json.loads(response.body)["error"]
        assert (response.status_code, error["code"]) == (status, code), query
        assert error["requestId"].startswith("req_")
    for process in ("999999", "no-such-tag", "a%00b"):
        with pytest.raises(InvalidStatus) as caught:
            async with attached(opened, url_of(opened, box, process)):
                pass
        assert caught.value.response.status_code in (400, 404)
    with pytest.raises(InvalidStatus) as caught:
        async with attached(opened, f"ws://127.0.0.1:{opened.port}/v1/nowhere"):
            pass
    assert caught.value.response.status_code in (403, 404)
    async with connect(url_of(opened, box, pid, f"token={yard.key}"), proxy=None) as socket:
        assert (await told(socket))["pid"] == pid
    plain = await yard.client.get(f"/v1/sandboxes/{box['id']}/processes/{pid}/attach")
    assert (plain.status_code, "WebSocket" in plain.text) == (400, True)


async def test_it_ends_with_a_pause_and_goes_on_after_it(opened: Door) -> None:
    yard = opened.yard
    box = await yard.create()
    pid = await started(yard, box, command="cat", stdin=True)
    async with attached(opened, url_of(opened, box, pid)) as socket:
        await socket.send(b"one")
        assert [await told(socket), await told(socket)][1] == (1, b"one")
        await yard.act(box, "pause")
        (last,) = await heard(socket)
        assert (last["type"], last["code"]) == ("error", "invalid_state")
        assert last["details"] == {"status": "paused"}
    assert socket.close_code == 1011
    async with attached(opened, url_of(opened, box, pid, "offset=1")) as socket:  # resumes it
        await socket.send('{"type": "input", "data": "two"}')
        await socket.send('{"type": "end"}')
        assert [one[1] for one in await heard(socket) if isinstance(one, tuple)] == [b"ne", b"two"]


async def test_it_ends_with_the_key_that_opened_it(
    opened: Door, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(events, "BEAT_S", 0.05)
    yard = opened.yard
    box = await yard.create()
    pid = await started(yard, box, command="hang")
    key = (await yard.client.post("/v1/api-keys", json={"name": "brief"})).json()["data"]
    url = url_of(opened, box, pid, f"api_key={key['key']}")
    async with connect(url, proxy=None) as socket:
        for _ in range(3):
            await socket.recv()
        await yard.client.delete(f"/v1/api-keys/{key['id']}")
        last = (await heard(socket, beats=True))[-1]
        assert (last["type"], last["code"]) == ("error", "invalid_token")
    assert socket.close_code == 1008
    # Who left is not followed any more, whether they said so or not.
    for is_polite in (True, False):
        async with attached(opened, url_of(opened, box, pid)) as socket:
            assert (await told(socket))["pid"] == pid
            assert not await is_unused(yard, box)
            if not is_polite:
                socket.transport.abort()
                break
        await eventually(lambda: is_unused(yard, box))
    await eventually(lambda: is_unused(yard, box))


async def test_a_message_that_is_too_large_and_one_who_never_reads(tmp_path: Path) -> None:
    async with door(tmp_path, patience=BRIEF) as opened:
        yard = opened.yard
        box = await yard.create()
        pid = await started(yard, box, command="cat", stdin=True)
        async with attached(opened, url_of(opened, box, pid)) as socket:
            await told(socket)
            with pytest.raises(ConnectionClosed):
                await socket.send(bytes(1024 * 1024 + 1))
                await socket.recv()
        assert socket.close_code == 1009
        noisy = await started(yard, box, command="flood")
        url = url_of(opened, box, noisy)
        async with AsyncExitStack() as opening, httpx.AsyncClient(timeout=60) as client:
            for _ in range(3):
                stuck = await connect(
                    url, additional_headers={"X-API-Key": yard.key}, proxy=None, max_queue=1
                )
                opening.callback(stuck.transport.abort)
            answer = await client.get(f"http://127.0.0.1:{opened.port}/healthz")
            assert answer.status_code == 200
            assert not await is_unused(yard, box)
            # They are cut off: what is printed for them has no end of its own.
            await eventually(lambda: is_unused(yard, box), limit_s=SOON_S)


HANDSHAKE = (
    "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
    "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
)


async def raw(opened: Door, text: str) -> tuple[bytes, bytes]:
    """Send something, and return head and body of what comes back until it is closed."""
    reader, writer = await opened.knock()
    writer.write(text.encode())
    try:
        async with asyncio.timeout(SOON_S):
            said = await reader.read()
    except ConnectionResetError:
        said = b""
    writer.close()
    head, _, body = said.partition(b"\r\n\r\n")
    return head, body


async def test_a_handshake_that_is_none_is_refused_and_nothing_hangs(opened: Door) -> None:
    get = "GET /v1/sandboxes/x/processes/1/attach HTTP/1.1\r\nHost: x\r\n"
    for text, status in (
        (f"{get}{HANDSHAKE}Content-Length: 3\r\n\r\nabc", 400),
        (f"{get}{HANDSHAKE}" + "".join(f"X-{n}: y\r\n" for n in range(130)) + "\r\n", 400),
        (f"{get}{HANDSHAKE}Cookie: {'c' * 9000}\r\n\r\n", 400),
        (f"{get}{HANDSHAKE}\r\n".replace("13", "12", 1), 400),
        (f"{get}{HANDSHAKE}\r\n".replace("dGhlIHNhbXBsZSBub25jZQ==", "short"), 400),
        (f"{get}{HANDSHAKE}\r\n".replace("GET", "POST", 1), 400),
        (f"{get}{HANDSHAKE}\r\n", 401),
        (f"{get}{HANDSHAKE}X-API-Key: {opened.yard.key}\r\n\r\n", 404),
        (get.replace("sandboxes/x/processes/1/attach", "nothing") + HANDSHAKE
         + f"X-API-Key: {opened.yard.key}\r\n\r\n", 404),
        (f"GET /healthz HTTP/1.1\r\nHost: x\r\n{HANDSHAKE}\r\n", 404),
    ):  # fmt: skip
        head, body = await raw(opened, text)
        assert head.startswith(f"HTTP/1.1 {status} ".encode()), (text[:200], head)
        error = json.loads(body)["error"]
        assert error["message"].startswith("cannot "), error
        assert status == 400 or error["requestId"].encode() in head


async def test_no_socket_is_opened_behind_an_answer_that_is_due(opened: Door) -> None:
    yard = opened.yard
    box = await yard.create()
    events = f"GET /v1/sandboxes/{box['id']}/events HTTP/1.1\r\nHost: x\r\nX-API-Key: {yard.key}"
    for together in (True, False):
        reader, writer = await opened.knock()
        writer.write(f"{events}\r\n\r\n".encode())
        if not together:
            await reader.readuntil(b'"running"')
        writer.write(f"GET /v1/none HTTP/1.1\r\nHost: x\r\n{HANDSHAKE}\r\n".encode())
        async with asyncio.timeout(SOON_S):
            assert b"101 Switching" not in await reader.read()
        writer.close()
    await until(lambda: not yard.house.control.services.feed._open._shares._held)


async def test_who_sends_pings_and_reads_nothing_is_not_kept(opened: Door) -> None:
    box = await opened.yard.create()
    pid = await started(opened.yard, box, command="hang")
    path = f"/v1/sandboxes/{box['id']}/processes/{pid}/attach"
    reader, writer = await opened.knock()
    head = f"GET {path} HTTP/1.1\r\nHost: x\r\n{HANDSHAKE}X-API-Key: {opened.yard.key}\r\n\r\n"
    writer.write(head.encode())
    await reader.readuntil(b"\r\n\r\n")
    ping = bytes((0x89, 0x80 | 125)) + bytes(4) + bytes(125)
    with pytest.raises(ConnectionError):
        for _ in range(10_000):
            writer.write(ping * 500)
            await writer.drain()
    writer.close()
    await eventually(lambda: is_unused(opened.yard, box))


async def test_what_is_asked_by_messages_counts_as_what_is_asked_by_requests(
    tmp_path: Path,
) -> None:
    async with door(tmp_path) as opened:
        yard = opened.yard
        org_id, _ = await yard.first()
        async with yard.house.store.write(Turn.ALONE) as tx:
            organization = await tx.organizations.find(org_id)
            assert organization is not None
            limits = {**organization.limits, "requestsPerMinute": 30}
            await tx.organizations.replace(replace(organization, limits=limits))
        box = await yard.create()
        size = {"cols": 80, "rows": 24}
        pid = await started(yard, box, command="hang", pty=size)
        async with attached(opened, url_of(opened, box, pid)) as socket:
            for _ in range(60):
                await socket.send('{"type": "resize", "cols": 81, "rows": 24}')
            said = None
            while said is None or said["type"] != "refused":
                said = await told(socket)
            assert said["code"] == "rate_limited"


async def test_sockets_are_counted_at_the_door(tmp_path: Path) -> None:
    async with door(tmp_path, connections=16, connections_per_address=3) as opened:
        yard = opened.yard
        box = await yard.create()
        pid = await started(yard, box, command="hang")
        url = url_of(opened, box, pid)
        for _ in range(5):  # none is left behind that would count
            async with attached(opened, url), attached(opened, url), attached(opened, url):
                with pytest.raises((InvalidStatus, ConnectionClosed, OSError, EOFError)):
                    async with attached(opened, url):
                        pass
            await eventually(lambda: is_unused(yard, box))


async def is_unused(yard: Yard, box: Mapping[str, object]) -> bool:
    machines = (await yard.house.node.do(Report())).machines
    return not any(one.is_used for one in machines if one.sandbox_id == box["id"])


async def test_much_input_that_comes_back_stops_nothing(opened: Door) -> None:
    box = await opened.yard.create()
    pid = await started(opened.yard, box, command="cat", stdin=True)
    config = ClientConfig(f"http://127.0.0.1:{opened.port}", opened.yard.key)
    path = f"/v1/sandboxes/{box['id']}/processes/{pid}"

    def echo() -> tuple[int, ProcessEvent | None]:
        count, last = 0, None
        with Attachment(config, path, exact=True) as there:

            def feed() -> None:
                for _ in range(24):
                    there.write(bytes(2**20))
                there.end()

            feeding = threading.Thread(target=feed)
            feeding.start()
            for last in there.events():
                count += len(last.data) if isinstance(last, Printed) else 0
            feeding.join()
        return count, last

    async with asyncio.timeout(SOON_S):
        count, last = await asyncio.to_thread(echo)
    assert (count, last) == (24 * 2**20, Exited(0, None, False))


async def test_a_reader_who_is_late_may_ping(opened: Door) -> None:
    box = await opened.yard.create()
    pid = await started(opened.yard, box, command="cat", stdin=True)
    async with attached(opened, url_of(opened, box, pid), max_queue=1) as socket:
        for _ in range(12):
            await socket.send(bytes(2**20))
        await socket.ping()
        await socket.send('{"type": "end"}')
        said = await heard(socket)
    assert said[-1]["type"] == "exit"
    assert socket.close_code == 1000


async def test_input_goes_on_after_a_break_only_where_nothing_of_it_can_be_lost() -> None:
    ends: list[str] = []

    async def serve(socket: ServerConnection) -> None:
        await socket.send('{"type": "attached", "pid": 1, "offset": 0, "lost": 0}')
        taken = 0
        async for message in socket:
            if isinstance(message, str):
                ends.append(message)
                if len(ends) == 2:
                    await socket.send(
                        '{"type": "exit", "exitCode": 0, "signal": null, "timedOut": false}'
                    )
                return
            taken += len(message)
            if message == b"lost":
                return
            await socket.send(json.dumps({"type": "taken", "bytes": taken}))

    async with websocket_server(serve, "127.0.0.1", 0) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        config = ClientConfig(f"http://127.0.0.1:{port}", "rt_live_x")

        def run(*pieces: bytes) -> list[ProcessEvent]:
            with Attachment(config, "/p", exact=True) as there:
                for piece in pieces:
                    there.write(piece)
                threading.Timer(0.2, there.end).start()
                return list(there.events())

        # The end was not heard of: it is told again over the next connection.
        assert await asyncio.to_thread(run, b"all of it") == [Exited(0, None, False)]
        assert len(ends) == 2
        with pytest.raises(TransferError, match="on its way"):
            await asyncio.to_thread(run, b"lost")
