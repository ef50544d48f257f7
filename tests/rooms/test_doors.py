"""The doors that anyone can lean on, over real sockets: without a key, slowly, in a crowd."""

import asyncio
import base64
import json
import os
import socket
from contextlib import ExitStack, suppress
from pathlib import Path

import httpx
import pytest
from tests.support.door import BRIEF, SOON_S, Door, door
from tests.support.house import eventually, until

from sandyard.server.front.bodies import LargeBodies
from sandyard.server.front.engine import ConnectionLimits


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def posting(key: str, length: int) -> bytes:
    return (
        b"POST /v1/sandboxes HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        + f"Authorization: Bearer {key}\r\nContent-Length: {length}\r\n\r\n".encode()
    )


# --- bodies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_known", [False, True])
async def test_a_body_is_not_read_before_it_is_known_whose_it_is(
    tmp_path: Path, is_known: bool
) -> None:
    async with door(tmp_path) as opened:
        body = b"[" + b"[]," * (9 * 2**20) + b"[]]"
        before = resident_mib()
        key = opened.yard.key if is_known else "rt_live_" + "x" * 32
        head = posting(key, len(body))
        pieces = [body[at : at + 2**20] for at in range(0, len(body), 2**20)]
        asking = asyncio.ensure_future(opened.ask(head, *pieces))
        assert await opened.is_well()
        status, error = await asking
        assert (status, error["code"]) == (
            (400, "bad_request") if is_known else (401, "invalid_token")
        )
        assert resident_mib() - before < 100  # the body itself is held by this very process


async def test_a_body_that_does_not_come_is_not_waited_for(tmp_path: Path) -> None:
    async with door(tmp_path, patience=BRIEF) as opened:
        status, error = await opened.ask(posting(opened.yard.key, 1000), b'{"name"')
        assert (status, "body" in str(error["message"])) == (408, True)


# --- heads ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /" + b"x" * 20_000 + b" HTTP/1.1\r\nHost: x\r\n\r\n", 414),
        (b"GET /" + b"x" * 2_000_000, 414),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 70_000 + b"\r\n\r\n", 431),
        (b"GET / HTTP/1.1\r\nHost: x\r\nA: " + b"x" * 2_000_000, 431),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 300 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n" + b"a: b\r\n" * 1_000_000, 431),
        (b"nonsense\r\n\r\n", 400),
        (b"GET /healthz HTTP/1.1\r\nAccept: */*\r\n\r\n", 400),
    ],
)
async def test_a_head_that_is_too_much_is_refused(tmp_path: Path, head: bytes, status: int) -> None:
    async with door(tmp_path) as opened:
        before = resident_mib()
        told, error = await opened.ask(head)
        assert told == status
        assert str(error["message"]).startswith("cannot ")
        assert str(error["requestId"]).startswith("req_")
        assert error["requestId"] != "req_none"
        assert resident_mib() - before < 30
        # Also where another request came before it.
        first = b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n"
        reader, writer = await opened.knock()
        writer.write(first)
        await reader.readuntil(b"}")
        writer.write(head)
        assert int((await reader.readuntil(b"\r\n")).split()[1]) == status
        writer.close()


async def test_a_head_that_does_not_come_is_not_waited_for(tmp_path: Path) -> None:
    async with door(tmp_path, patience=BRIEF) as opened:
        for begun in (b"", b"GET / HT", b"GET / HTTP/1.1\r\nHost: x\r\n", b"\r\n"):
            status, error = await opened.ask(begun)
            assert (status, "rest of the request" in str(error["message"])) == (408, True)


async def test_a_client_that_sends_a_byte_now_and_then_gains_nothing(tmp_path: Path) -> None:
    async with door(tmp_path, patience=BRIEF) as opened:
        reader, writer = await opened.knock()

        async def drip() -> None:
            with suppress(ConnectionError):
                while True:
                    writer.write(b"\r\n")
                    await writer.drain()
                    await asyncio.sleep(0.05)

        dripping = asyncio.ensure_future(drip())
        async with asyncio.timeout(SOON_S):
            assert (await reader.read()).startswith(b"HTTP/1.1 408 ")
        dripping.cancel()
        writer.close()


async def test_requests_one_upon_another_are_bounded(tmp_path: Path) -> None:
    async with door(tmp_path) as opened:
        before = resident_mib()
        crowd = [await opened.knock() for _ in range(20)]
        for _, writer in crowd:
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" * 9000)
        assert await opened.is_well()
        assert resident_mib() - before < 60
        async with asyncio.timeout(SOON_S):
            for reader, writer in crowd:
                with suppress(ConnectionError):
                    answered = await reader.read()
                    assert answered.count(b"HTTP/1.1 200 OK") < 50
                writer.close()
        # A few are served, each by itself.
        reader, writer = await opened.knock()
        writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n" * 5)
        for _ in range(5):
            assert b"200 OK" in await reader.readuntil(b"}")
        writer.close()


@pytest.mark.parametrize("more", [b"A: " + b"y" * 3_000_000, b"a: b\r\n" * 500_000])
async def test_what_comes_after_a_body_is_bounded(tmp_path: Path, more: bytes) -> None:
    async with door(tmp_path) as opened:
        head = b"POST /healthz HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
        reader, writer = await opened.knock()
        with suppress(ConnectionError):
            writer.write(head + b"1\r\nx\r\n0\r\n" + more)
            await writer.drain()
        assert await opened.is_well()
        with suppress(ConnectionError):
            async with asyncio.timeout(SOON_S):
                await reader.read()
        writer.close()


@pytest.mark.parametrize("is_known", [False, True])
async def test_a_burst_buys_no_time_for_a_body_that_stands_still(
    tmp_path: Path, is_known: bool
) -> None:
    async with door(tmp_path, patience=BRIEF) as opened:
        key = opened.yard.key if is_known else "x"
        head = posting(key, 20 * 2**20).replace(b"/v1/sandboxes", b"/v1/sandboxes/x/exec", 1)
        reader, writer = await opened.knock()
        with suppress(ConnectionError):
            writer.write(head + b" " * 2**20)
            await writer.drain()
        async with asyncio.timeout(SOON_S):
            with suppress(ConnectionError):
                while await reader.read(65536):
                    pass
        writer.close()


async def test_an_answer_is_never_another_requests(tmp_path: Path) -> None:
    async with door(tmp_path) as opened:
        box = await opened.yard.create()
        body = json.dumps({"command": "spill 3000000", "encoding": "base64"}).encode()
        path = f"/v1/sandboxes/{box['id']}/exec".encode()
        first = posting(opened.yard.key, len(body)).replace(b"/v1/sandboxes", path, 1) + body
        for second in (b"GET http://[ HTTP/1.1\r\n\r\n", b"nonsense\r\n\r\n"):
            reader, writer = await opened.knock()
            writer.write(first + second)
            async with asyncio.timeout(SOON_S):
                with suppress(ConnectionError):
                    assert not (await reader.read()).startswith(b"HTTP/1.1 4")
            writer.close()


async def test_large_bodies_are_bounded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sandyard.server.front.bodies.BODIES_MAX", 2**21)
    held: list[int] = []
    hold = LargeBodies.hold

    def hold_and_tell(bodies: LargeBodies, org_id: str, size: int) -> None:
        hold(bodies, org_id, size)
        held.append(sum(held[-1:]) + size)

    monkeypatch.setattr(LargeBodies, "hold", hold_and_tell)
    async with door(tmp_path) as opened:
        first, other = (
            posting(opened.yard.key, length).replace(b"/v1/sandboxes", b"/v1/sandboxes/x/exec", 1)
            for length in (2**20, 400_000)
        )
        async with asyncio.timeout(SOON_S):
            _, writer = await opened.knock()
            writer.write(first + b" " * 700_000)
            # Not before it is counted: which of two at once is the one too many is chance.
            await until(lambda: bool(held) and held[-1] >= 700_000)
            status, error = await opened.ask(other, b" " * 400_000)
            writer.close()
        assert status == 503
        assert "large body" in str(error["message"])


async def test_a_connection_in_steady_use_is_kept(tmp_path: Path) -> None:
    brief = ConnectionLimits(head_s=0.2, still_s=0.1, look_s=0.02)
    async with door(tmp_path, patience=brief, keep_alive_s=3) as opened:
        reader, writer = await opened.knock()
        loop = asyncio.get_running_loop()
        until_s = loop.time() + 6
        while loop.time() < until_s:
            writer.write(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
            assert b"200 OK" in await reader.readuntil(b"}")
            await asyncio.sleep(0.05)
        writer.close()


async def test_line_ends_between_requests_are_nothing(tmp_path: Path) -> None:
    async with door(tmp_path, patience=BRIEF) as opened:
        box = await opened.yard.create()
        body = json.dumps({"command": "x"}).encode()
        path = f"/v1/sandboxes/{box['id']}/exec".encode()
        request = posting(opened.yard.key, len(body)).replace(b"/v1/sandboxes", path, 1) + body
        reader, writer = await opened.knock()
        for _ in range(3):
            writer.write(request + b"\r\n")
            assert b"200 OK" in await reader.readuntil(b"}}")
            writer.write(b"\r\n\r\n")
        writer.close()


# --- crowds ---------------------------------------------------------------------------------------


async def test_a_silent_crowd_keeps_nobody_out(tmp_path: Path) -> None:
    async with door(tmp_path, connections=20, connections_per_address=1000) as opened:
        crowd = []
        for number in range(200):
            reader, writer = await opened.knock()
            if number % 2:
                writer.write(b"GET / HT")  # a head that does not come is no question
            crowd.append((reader, writer))
            if number % 20 == 0:
                assert await opened.is_well()
        assert await opened.is_well()
        # The oldest of them made room.
        async with asyncio.timeout(SOON_S):
            with suppress(ConnectionError):
                assert await crowd[0][0].read() == b""
        for _, writer in crowd:
            writer.close()


async def begun(opened: Door) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection whose request is under way: its head was read, its body is waited for."""
    reader, writer = await opened.knock()
    head = posting(opened.yard.key, 2)
    writer.write(head.replace(b"\r\n\r\n", b"\r\nExpect: 100-continue\r\n\r\n"))
    async with asyncio.timeout(SOON_S):
        await reader.readuntil(b"100 Continue\r\n\r\n")
    return reader, writer


async def test_those_who_have_asked_are_kept_in_a_crowd(tmp_path: Path) -> None:
    async with door(tmp_path, connections=24, connections_per_address=1000) as opened:
        crowd = [await begun(opened) for _ in range(21)]  # as many as strangers may have
        status, error = await opened.ask(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (status, error["code"]) == (503, "unavailable")
        reader, writer = crowd[0]
        writer.write(b"{}")
        assert (await reader.readuntil(b"\r\n")).startswith(b"HTTP/1.1 201 ")
        # Whose that was is known: its source has room that strangers do not have.
        assert await opened.is_well()
        for _, writer in crowd:
            writer.close()


async def test_one_address_cannot_take_all_connections(tmp_path: Path) -> None:
    async with door(tmp_path, connections=1000, connections_per_address=16) as opened:
        crowd = [await opened.knock() for _ in range(16)]
        assert await opened.is_well()  # in place of the oldest that asked for nothing
        for _, writer in crowd:
            writer.close()
        crowd = [await begun(opened) for _ in range(16)]
        status, error = await opened.ask(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n")
        assert (status, "connections_per_address" in str(error["message"])) == (503, True)
        for _, writer in crowd:
            writer.close()
        await eventually(opened.is_well)


async def test_who_reads_no_answer_is_left(tmp_path: Path) -> None:
    async with door(tmp_path, patience=BRIEF) as opened:
        box = await opened.yard.create()
        body = json.dumps({"command": "spill 16777216"}).encode()
        path = f"/v1/sandboxes/{box['id']}/exec".encode()
        request = posting(opened.yard.key, len(body)).replace(b"/v1/sandboxes", path, 1) + body
        loop = asyncio.get_running_loop()
        with socket.create_connection(("127.0.0.1", opened.port)) as deaf:
            deaf.setblocking(False)
            await loop.sock_sendall(deaf, request)
            # A client that reads nothing learns of it when it writes again.
            async with asyncio.timeout(SOON_S):
                with pytest.raises(ConnectionError):
                    while True:
                        await loop.sock_sendall(deaf, b"GET / HTTP/1.1\r\n")
                        await asyncio.sleep(0.05)
        assert await opened.is_well()


# --- what commands print --------------------------------------------------------------------------


async def test_answers_that_nobody_reads_do_not_fill_the_memory(tmp_path: Path) -> None:
    async with door(tmp_path) as opened:
        box = await opened.yard.create()
        body = json.dumps({"command": "spill 16777216"}).encode()
        path = f"/v1/sandboxes/{box['id']}/exec".encode()
        request = posting(opened.yard.key, len(body)).replace(b"/v1/sandboxes", path, 1) + body
        loop, before, slowest = asyncio.get_running_loop(), resident_mib(), 0.0
        with ExitStack() as held:
            for _ in range(6):
                deaf = held.enter_context(socket.create_connection(("127.0.0.1", opened.port)))
                deaf.setblocking(False)
                await loop.sock_sendall(deaf, request)
            machine = opened.yard.machine_of(box)
            await until(lambda: len(machine.executing) == 6)
            for _ in range(50):
                assert await opened.is_well()
                slowest = max(slowest, resident_mib() - before)
        # Together 1.2 GB as JSON, 192 MiB as they are.
        assert slowest < 500


async def test_all_of_a_large_output_comes_and_room_is_given_back(tmp_path: Path) -> None:
    async with door(tmp_path) as opened:
        box = await opened.yard.create()
        room = opened.yard.house.control.services.commands.room
        free = room.free
        url = f"http://127.0.0.1:{opened.port}/v1/sandboxes/{box['id']}/exec"
        headers = {"Authorization": f"Bearer {opened.yard.key}"}
        async with httpx.AsyncClient(headers=headers, timeout=60) as client:
            for encoding in ("base64", "utf-8"):
                answer = await client.post(
                    url, json={"command": "spill 17000000", "encoding": encoding}
                )
                data = answer.json()["data"]
                raw = data["stdout"].encode()
                output = base64.b64decode(raw) if encoding == "base64" else raw
                assert output == bytes(16 * 2**20)
                assert (data["truncated"], data["exitCode"]) == (True, 0)
                await until(lambda: room.free == free)


async def test_one_hostile_agent_leaves_the_others_their_share(tmp_path: Path) -> None:
    async with door(tmp_path) as opened:
        box = await opened.yard.create()
        client = opened.yard.client_of(opened.yard.key)
        path = f"/v1/sandboxes/{box['id']}/exec"
        async with client, asyncio.TaskGroup() as tasks:
            hostile = [
                tasks.create_task(client.post(path, json={"command": "crumbs 200000"}))
                for _ in range(6)
            ]
            machine = opened.yard.machine_of(box)
            await until(lambda: len(machine.executing) == 6)
            turns = 0
            # So many of others' requests are served meanwhile, whatever the machine's speed.
            while not all(one.done() for one in hostile) and turns < 100:
                assert await opened.is_well()
                turns += 1
            assert turns == 100
            for one in hostile:
                one.cancel()
