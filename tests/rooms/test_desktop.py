"""Desktops, on fake machines whose screens are the test's own."""

import asyncio
import base64
import re
import struct
from collections.abc import AsyncIterator
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from tests.support.door import SOON_S, Door, door
from websockets.asyncio.client import connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from sandyard.server.core.wire import RFB_PORT
from sandyard.server.fakes.driver import Conduct
from sandyard.server.service.sandboxes import desktops

WIDTH, HEIGHT = 4, 2
FIXED = {4: 8, 5: 6, 3: 10, 0: 20}  # the lengths of what clients say, by its first byte


class FakeScreen:
    """As much of a server of RFB as is asked of one; it keeps what it hears."""

    def __init__(self) -> None:
        self.heard: list[bytes] = []
        self.open = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            writer.write(b"RFB 003.008\n")
            await reader.readexactly(12)
            writer.write(b"\x01\x01")
            await reader.readexactly(1)
            writer.write(bytes(4))
            await reader.readexactly(1)
            writer.write(struct.pack(">HH16xI", WIDTH, HEIGHT, 4) + b"fake")
            while True:
                kind = (await reader.readexactly(1))[0]
                if kind == 2:
                    (count,) = struct.unpack(">xH", await reader.readexactly(3))
                    await reader.readexactly(count * 4)
                    continue
                said = await reader.readexactly(FIXED[kind] - 1)
                if kind == 3:
                    _, x, y, width, height = struct.unpack(">BHHHH", said)
                    pixels = b"\1\2\3\0" * (width * height)
                    writer.write(struct.pack(">BxHHHHHi", 0, 1, x, y, width, height, 0) + pixels)
                elif kind in (4, 5):
                    self.heard.append(bytes([kind]) + said)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self.open -= 1
            writer.close()


@pytest.fixture
async def screen(tmp_path: Path) -> AsyncIterator[tuple[Door, FakeScreen, dict[str, Any]]]:
    fake = FakeScreen()
    server = await asyncio.start_server(fake.serve, "127.0.0.1", 0)
    async with server:
        conduct = Conduct(ports={RFB_PORT: server.sockets[0].getsockname()[1]})
        async with door(tmp_path, saves=True, conduct=conduct) as opened:
            box = await opened.yard.create(template="desktop-ubuntu", name="desk")
            yield opened, fake, box
        for _ in range(500):
            if not fake.open:
                break
            await asyncio.sleep(0.01)
    assert fake.open == 0


async def act(opened: Door, action: str, status: int = 200, **body: object) -> Any:
    answer = await opened.yard.client.post(f"/v1/sandboxes/desk/desktop/{action}", json=body)
    assert answer.status_code == status, answer.text
    return answer.json()


async def test_a_picture_is_taken_and_hands_are_put_on(screen: Any) -> None:
    opened, fake, _ = screen
    answer = await opened.yard.client.get("/v1/sandboxes/desk/desktop/screenshot")
    assert (answer.status_code, answer.headers["content-type"]) == (200, "image/png")
    assert answer.content.startswith(b"\x89PNG")
    for action, body, heard in (
        ("click", {"x": 1, "y": 1}, "0500 0501 0500"), ("move", {"x": 3, "y": 0}, "0500"),
        ("click", {"x": 1, "y": 1, "button": "right", "count": 2}, "0500 0504 0500 0504 0500"),
        ("scroll", {"x": 0, "y": 0, "dy": -2}, "0500 0508 0500 0508 0500"),
        ("scroll", {"x": 0, "y": 0, "dx": 1}, "0500 0540 0500"),
        ("type", {"text": "aé\r\n"}, "0401 0400 0401 0400 0401 0400"),
        ("key", {"keys": "ctrl+c"}, "0401 0401 0400 0400"),
    ):  # fmt: skip
        fake.heard.clear()
        assert (await act(opened, action, **body))["data"] == {"done": True}
        assert " ".join(one[:2].hex() for one in fake.heard) == heard, action
    assert [one[-4:] for one in fake.heard[:2]] == [b"\0\0\xff\xe3", b"\0\0\0\x63"]
    fake.heard.clear()
    await act(opened, "drag", fromX=0, fromY=0, toX=3, toY=1)
    assert fake.heard[1][1] == 1
    assert fake.heard[-1] == b"\x05\x00\x00\x03\x00\x01"
    fake.heard.clear()
    long = "x" * 5000
    await act(opened, "type", text=long)
    assert len(fake.heard) == 2 * len(long)


async def test_what_cannot_be_done_is_said_and_not_done(
    screen: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, fake, _ = screen
    for action, body, field in (
        ("click", {"x": WIDTH, "y": 0}, "x"), ("click", {"x": -1, "y": 0}, "x"), ("click", {}, "x"),
        ("click", {"x": 0, "y": 0, "button": "fourth"}, "button"),
        ("key", {"keys": "hyper"}, "keys"),
        ("click", {"x": 0, "y": 0, "count": 6}, "count"), ("type", {"text": "\x1b"}, "text"),
        ("type", {"text": "x" * 10_001}, "text"), ("type", {"text": "\0"}, "text"),
        ("scroll", {"x": 0, "y": 0, "dy": 101}, "dy"), ("drag", {"fromX": 0}, "fromY"),
    ):  # fmt: skip
        error = (await act(opened, action, 400, **body))["error"]
        assert error["details"]["field"] == field, error
    assert fake.heard == []
    # No desktop in it: that is no fault of the client's.
    await opened.yard.create(template="base-minimal", name="plain")
    for path in ("vnc", "desktop/screenshot", "desktop/windows"):
        answer = await opened.yard.client.get(f"/v1/sandboxes/plain/{path}")
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "invalid_state")
    plain = (await opened.yard.client.get("/v1/sandboxes/plain")).json()["data"]
    assert (plain["vncReady"], plain["vncUrl"]) == (False, None)
    # Not there yet.
    monkeypatch.setattr(desktops, "_THERE_TRIES", 2)
    opened.yard.conduct.ports.clear()
    answer = await opened.yard.client.get("/v1/sandboxes/desk/desktop/screenshot")
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")

    # Something else listens there.
    async def say_nonsense(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(b"x" * 100)
        writer.close()

    garbage = await asyncio.start_server(say_nonsense, "127.0.0.1", 0)
    async with garbage:
        opened.yard.conduct.ports[RFB_PORT] = garbage.sockets[0].getsockname()[1]
        answer = await opened.yard.client.get("/v1/sandboxes/desk/desktop/screenshot")
        assert answer.status_code == 503


async def test_a_browser_sees_it_by_a_ticket_for_one_look(screen: Any) -> None:
    opened, _, box = screen
    assert (box["vncReady"], box["vncUrl"]) == (
        True, f"http://127.0.0.1:{opened.port}/desktop/{box['id']}",
    )  # fmt: skip
    made = (await opened.yard.client.get("/v1/sandboxes/desk/vnc")).json()["data"]
    url, _, ticket = made["url"].partition("#ticket=")
    assert (url, made["host"], made["port"]) == (box["vncUrl"], "127.0.0.1", opened.port)
    where = f"ws://127.0.0.1:{opened.port}/v1/desktop/sessions/{ticket}"
    protocols: Any = ["binary"]
    async with (
        connect(where, proxy=None, subprotocols=protocols) as socket,
        asyncio.timeout(SOON_S),
    ):
        assert await socket.recv() == b"RFB 003.008\n"
        await socket.send(b"RFB 003.008\n")
        assert await socket.recv() == b"\x01\x01"
        assert socket.subprotocol == "binary"
        with pytest.raises(InvalidStatus):
            async with connect(where, proxy=None):
                pass
        await opened.yard.act(box, "pause")
        with pytest.raises(ConnectionClosed):
            while True:
                await socket.recv()
    # A terminal's ticket opens no desktop.
    other = await opened.yard.client.post(
        "/v1/terminal/sandbox-sessions", json={"sandboxId": box["id"]}
    )
    where = f"ws://127.0.0.1:{opened.port}/v1/desktop/sessions/{other.json()['data']['sessionId']}"
    with pytest.raises(InvalidStatus):
        async with connect(where, proxy=None):
            pass
    events = (await opened.yard.client.get("/v1/sandboxes/desk/activity")).json()["data"]["events"]
    assert any(one["eventType"] == "sandbox.vnc.connected" for one in events)


async def test_pages_are_made_of_their_own_files_alone(screen: Any) -> None:
    opened, _, box = screen
    async with opened.yard.client_of(None) as nobody:
        for path in (f"/desktop/{box['id']}", "/terminal/x", "/web/key.js", "/web/page.css",
                     "/web/vendor/novnc/core/rfb.js", "/web/vendor/xterm/xterm.mjs",
                     "/web/vendor/xterm/LICENSE.txt"):  # fmt: skip
            answer = await nobody.get(path)
            assert answer.status_code == 200, path
            policy = answer.headers["content-security-policy"]
            allowed = re.search(r"script-src 'self'(?: 'sha256-([^']*)')?;", policy)
            assert allowed is not None
            assert "sourceMappingURL" not in answer.text
            # Of what lies within a page nothing runs but what brings its own files.
            within = re.findall(r"<script[^>]*>(.+?)</script>", answer.text, re.DOTALL)
            digests = [base64.b64encode(sha256(one.encode()).digest()).decode() for one in within]
            assert digests == ([allowed[1]] if allowed[1] else []), path
        for path in ("/web/", "/web/x.js", "/web/../http.py", "/web/%2e%2e/http.py", "/web/vendor",
                     "/web/desktop.html", "/web//etc/passwd", "/desktop",
                     "/terminal/a/b"):  # fmt: skip
            assert (await nobody.get(path)).status_code == 404, path
