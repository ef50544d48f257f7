"""The control plane alone: a server of its own on fake machines, asked over kept connections.

    .venv/bin/python -m bench.control [--rounds 200] [--rows 10,1000,10000]

What a request costs is the processor time of the server's process, divided by the requests; that
of the client, another process, is not in it. Beside it stands the same done by hand: the durable
write of one row, and an answer from the same web server with nothing behind it.
"""

import argparse
import asyncio
import json
import multiprocessing
import os
import socket
import sqlite3
import tempfile
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

from tests.support.house import open_yard

from bench.figures import percentile
from sandyard.server.app.serve import http_server
from sandyard.server.app.settings import HttpSettings
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.ids import new_sandbox_id
from sandyard.server.core.states import Status

_RICH = {"billing": {"sign_up_cents": 10**9}}
_AT_ONCE = 16


class Client:
    """Speaks HTTP over one kept connection, with as little of its own as can be."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, key: str):
        self._reader = reader
        self._writer = writer
        self._key = key

    async def ask(self, method: str, path: str, body: object = None) -> tuple[int, object]:
        data = b"" if body is None else json.dumps(body).encode()
        self._writer.write(
            f"{method} {path} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {self._key}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n".encode()
            + data
        )
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = head.partition("content-length: ")[2].partition("\r")[0]
        answer = await self._reader.readexactly(int(length or 0))
        return int(head.split()[1]), json.loads(answer) if answer else None


class Server:
    """A server in a process of its own."""

    def __init__(self, pipe: Connection, port: int, key: str) -> None:
        self._pipe = pipe
        self.port = port
        self.key = key

    def cpu_s(self) -> float:
        self._pipe.send("cpu")
        return float(self._pipe.recv())

    def fill(self, rows: int) -> None:
        self._pipe.send(rows)
        assert self._pipe.recv() == "filled"

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Client]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        try:
            yield Client(reader, writer, self.key)
        finally:
            writer.close()


def _serve(pipe: Connection) -> None:
    asyncio.run(_served(pipe))


async def _served(pipe: Connection) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    loop = asyncio.get_running_loop()
    with tempfile.TemporaryDirectory() as home:
        async with open_yard(Path(home), sections=_RICH) as yard:
            server = http_server(yard.house.front, HttpSettings(connections_per_address=1000))

            async def fill(rows: int) -> None:
                async with yard.house.store.read() as tx:
                    (pattern,) = await tx.sandboxes.on_node("local", frozenset({Status.RUNNING}))
                async with yard.house.store.write(Turn.ALONE) as tx:
                    for _ in range(rows):
                        await tx.sandboxes.insert(
                            replace(pattern, id=new_sandbox_id(), name=None, status=Status.FAILED)
                        )

            def answer() -> None:
                while (asked := pipe.recv()) != "end":
                    if asked == "cpu":
                        pipe.send(time.process_time())
                    else:
                        asyncio.run_coroutine_threadsafe(fill(int(asked)), loop).result()
                        pipe.send("filled")
                server.should_exit = True

            pipe.send((listener.getsockname()[1], yard.key))
            answering = threading.Thread(target=answer)
            answering.start()
            await server.serve(sockets=[listener])
            answering.join()


@asynccontextmanager
async def a_server() -> AsyncIterator[Server]:
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(there,))
    process.start()
    try:
        port, key = here.recv()
        yield Server(here, port, key)
        here.send("end")
        process.join(30)
    finally:
        process.kill()
        process.join()


Work = Callable[[Client], Awaitable[None]]


async def costs(server: Server, work: Work, times: int, *, at_once: int = 1) -> dict[str, float]:
    """Do the same many times and return what one took: of the server's processor, and in all."""
    took: list[float] = []
    before, started = server.cpu_s(), time.perf_counter()

    async def some(share: int) -> None:
        async with server.client() as client:
            for _ in range(share):
                began = time.perf_counter()
                await work(client)
                took.append(time.perf_counter() - began)

    await asyncio.gather(*(some(times // at_once) for _ in range(at_once)))
    return {
        "cpu ms": round((server.cpu_s() - before) * 1000 / len(took), 2),
        "p50 ms": round(percentile(took, 0.5) * 1000, 2),
        "a second": round(len(took) / (time.perf_counter() - started), 1),
    }


async def _create(client: Client) -> str:
    status, answer = await client.ask("POST", "/v1/sandboxes?wait=0", {})
    assert status == 201, answer
    return str(answer["data"]["id"])  # type: ignore[index]  # checked above


async def _settled(client: Client, box: str) -> None:
    status, _ = await client.ask("GET", f"/v1/sandboxes/{box}?wait=10")
    assert status == 200


async def measured(rounds: int, rows: list[int]) -> dict[str, dict[str, float]]:
    figures: dict[str, dict[str, float]] = {}
    async with a_server() as server, server.client() as client:
        box = await _create(client)
        await _settled(client, box)
        made: list[str] = []

        async def get(one: Client) -> None:
            assert (await one.ask("GET", f"/v1/sandboxes/{box}"))[0] == 200

        async def page(one: Client) -> None:
            assert (await one.ask("GET", "/v1/sandboxes?limit=50&status=failed"))[0] == 200

        async def execute(one: Client) -> None:
            body = {"command": "true"}
            assert (await one.ask("POST", f"/v1/sandboxes/{box}/exec", body))[0] == 200

        async def create(one: Client) -> None:
            made.append(await _create(one))

        async def delete(one: Client) -> None:
            status, _ = await one.ask("DELETE", f"/v1/sandboxes/{made.pop()}?wait=10")
            assert status in (200, 204), status

        async def live(one: Client) -> None:
            mine = await _create(one)
            await _settled(one, mine)
            status, _ = await one.ask("DELETE", f"/v1/sandboxes/{mine}?wait=10")
            assert status in (200, 204), status

        async def openapi(one: Client) -> None:
            assert (await one.ask("GET", "/healthz"))[0] == 200

        async def bursts() -> None:
            figures["creates, 16 at once"] = await costs(
                server, create, rounds * 2, at_once=_AT_ONCE
            )
            await costs(server, delete, len(made))
            figures["lives, 16 at once"] = await costs(server, live, rounds, at_once=_AT_ONCE)

        filled = 0
        await costs(server, get, 20)  # what is built at first use is not what is measured
        await costs(server, live, 5)
        for wanted in rows:
            server.fill(wanted - filled)
            filled = wanted
            figures[f"get, {wanted} rows"] = await costs(server, get, rounds)
            figures[f"page of 50, {wanted} rows"] = await costs(server, page, rounds)
            figures[f"exec, {wanted} rows"] = await costs(server, execute, rounds)
            figures[f"create, {wanted} rows"] = await costs(server, create, rounds)
            figures[f"delete, {wanted} rows"] = await costs(server, delete, len(made))
            if wanted == rows[0]:
                await bursts()
        figures["health, the web server alone"] = await costs(server, openapi, rounds)
    return figures


def by_hand(times: int) -> dict[str, float]:
    """Write one row durably, as often as asked."""
    took = []
    with tempfile.TemporaryDirectory() as home, closing(sqlite3.connect(f"{home}/db")) as database:
        for pragma in ("journal_mode=WAL", "synchronous=FULL"):
            database.execute(f"PRAGMA {pragma}")
        database.execute("CREATE TABLE rows (id INTEGER PRIMARY KEY, what TEXT)")
        cpu = time.process_time()
        for _ in range(times):
            began = time.perf_counter()
            with database:
                database.execute("INSERT INTO rows (what) VALUES (?)", (os.urandom(100).hex(),))
            took.append(time.perf_counter() - began)
        cpu = time.process_time() - cpu
    return {"cpu ms": round(cpu * 1000 / times, 2), "p50 ms": round(percentile(took, 0.5) * 1e3, 2)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--rows", default="10,1000,10000")
    asked = parser.parse_args()
    figures = asyncio.run(measured(asked.rounds, [int(one) for one in asked.rows.split(",")]))
    figures["one durable row, by hand"] = by_hand(asked.rounds)
    for name, found in figures.items():
        print(f"{name:32}", "  ".join(f"{key} {value:8}" for key, value in found.items()))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
