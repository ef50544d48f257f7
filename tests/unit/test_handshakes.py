"""Connections that are silent in their TLS handshake are counted, and make room for others."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from tests.support.papers import Desk
from websockets.asyncio.client import connect

from sandyard.server.app.serve import http_server, listen
from sandyard.server.app.settings import HttpSettings
from sandyard.server.links.tunnel import handshakes
from sandyard.server.links.tunnel.handshakes import Handshakes


class Listener:
    def __init__(self, port: int, client: ssl.SSLContext, made: Handshakes) -> None:
        self.port = port
        self.client = client
        self.made = made

    async def ask(self, *, source: str = "127.0.0.1") -> bytes:
        reader, writer = await asyncio.open_connection(
            "127.0.0.1", self.port, ssl=self.client, local_addr=(source, 0)
        )
        try:
            writer.write(b"at once")  # with the end of the handshake
            return await reader.readexactly(7)
        finally:
            writer.close()

    def silent(self, *, source: str = "127.0.0.1") -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), source_address=(source, 0))


@pytest.fixture
async def listener(tmp_path: Path) -> AsyncIterator[Listener]:
    desk = Desk.new(tmp_path / "desk")
    server_side = desk.tls("sandyard:server", is_server=True)
    client_side = desk.tls("sandyard:client", is_server=False)
    tasks = set()

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(await reader.readexactly(7))
        await writer.drain()
        writer.close()

    def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.create_task(echo(reader, writer)))

    made = Handshakes(server_side, limit_s=30)
    server = await made.streams(take, "127.0.0.1", 0, limit=1024)
    yield Listener(server.sockets[0].getsockname()[1], client_side, made)
    server.close()
    made.close()
    if tasks:
        await asyncio.wait(tasks)


async def pending(made: Handshakes, count: int) -> None:
    async with asyncio.timeout(20):
        while len(made._pending) != count:
            await asyncio.sleep(0.001)


async def test_what_comes_with_the_handshake_is_not_lost(listener: Listener) -> None:
    assert await asyncio.gather(*(listener.ask() for _ in range(20))) == [b"at once"] * 20
    await pending(listener.made, 0)
    assert not listener.made._pending._counts


async def test_silent_connections_make_room(
    listener: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(handshakes, "_MOST", 8)
    monkeypatch.setattr(handshakes, "_MOST_BY_SOURCE", 4)
    held = [listener.silent() for _ in range(6)]
    await pending(listener.made, 4)
    # The oldest of that source went.
    loop = asyncio.get_running_loop()
    for one in held[:2]:
        one.setblocking(False)
        with suppress(ConnectionResetError):
            assert await loop.sock_recv(one, 1) == b""
    held += [listener.silent(source=f"127.0.0.{number}") for number in (2, 3, 4, 5, 6, 7)]
    await pending(listener.made, 8)
    assert await listener.ask() == b"at once"
    assert await listener.ask(source="127.0.0.9") == b"at once"
    assert len(listener.made._pending) <= 8
    for one in held:
        one.close()
    await pending(listener.made, 0)


async def test_nothing_is_left_when_the_listener_closes(listener: Listener) -> None:
    held = [listener.silent() for _ in range(3)]
    await pending(listener.made, 3)
    listener.made.close()
    await pending(listener.made, 0)
    for one in held:
        one.close()


async def test_http_and_websockets_are_spoken_after_the_handshake(tmp_path: Path) -> None:
    desk = Desk.new(tmp_path / "desk")

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.accept"})
            told = await receive()
            await send({"type": "websocket.send", "text": f"{scope['scheme']} {told['text']}"})
            await send({"type": "websocket.close"})
            return
        body = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": []})
        said = f"{scope['scheme']} {scope['client'][0]} {scope['client'][1]} ".encode() + body
        await send({"type": "http.response.body", "body": said})

    made = Handshakes(desk.tls("sandyard:server", is_server=True), limit_s=30)
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        server = http_server(app, HttpSettings(), handshakes=made)
        serving = asyncio.create_task(server._serve([listener]))
        client = desk.tls("sandyard:client", is_server=False)
        async with httpx.AsyncClient(verify=client) as http:
            ports = set()
            for _ in range(2):
                answer = await http.post(f"https://127.0.0.1:{port}/", content=b"hello")
                scheme, address, own_port, body = answer.text.split()
                assert (scheme, address, body) == ("https", "127.0.0.1", "hello")
                ports.add(own_port)
            assert len(ports) == 1  # by one connection
        async with connect(f"wss://127.0.0.1:{port}/", ssl=client) as socket_:
            await socket_.send("hello")
            assert await socket_.recv() == "wss hello"
        server.should_exit = True
        await serving
