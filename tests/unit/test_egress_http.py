"""HTTP between a guest and hosts, over pairs of sockets."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, asynccontextmanager

import pytest

from sandyard.server.egress import http
from sandyard.server.egress.http import Headers, RefusedError, Upstream, converse, unchanged
from sandyard.server.egress.streams import Counter, PlainStream

GET = b"GET /%d HTTP/1.1\r\nHost: a.test\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


@asynccontextmanager
async def conversing(
    reached: Callable[[str], socket.socket],
    *,
    adapt: Callable[[Headers], Headers] = unchanged,
) -> AsyncIterator[socket.socket]:
    """Yield a guest's end of a conversation with hosts that `reached` returns sockets of."""
    ours, guests = socket.socketpair()
    for one in (ours, guests):
        one.setblocking(False)

    async def reach(host: str) -> Upstream:
        found = reached(host)
        found.setblocking(False)
        return Upstream(PlainStream(found), Counter())

    async def work() -> None:
        try:
            await converse(PlainStream(ours), b"", 80, reach, adapt)
        finally:
            ours.close()

    async with asyncio.TaskGroup() as tasks, asyncio.timeout(20):
        tasks.create_task(work())
        with guests:
            yield guests


async def all_of(guest: socket.socket) -> bytes:
    loop, said = asyncio.get_running_loop(), b""
    while data := await loop.sock_recv(guest, 65536):
        said += data
    return said


async def test_a_response_that_is_there_at_once_keeps_the_connection(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "_KEPT_S", 60)
    ours, hosts = socket.socketpair()
    hosts.sendall(OK + OK)
    loop = asyncio.get_running_loop()
    async with conversing(lambda _: ours) as guest:
        # Both in one piece, and then one that is refused with another behind it.
        await loop.sock_sendall(
            guest, GET % 1 + GET % 2 + b"TRACE / HTTP/1.1\r\nHost: a\r\n\r\n" + GET % 3
        )
        said = await all_of(guest)
    assert said.count(b"200 OK") == 2
    assert b"HTTP/1.1 405 " in said
    with hosts:
        assert hosts.recv(65536).count(b"GET ") == 2


async def test_a_connection_that_was_idle_is_not_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(http, "_KEPT_S", 0)
    loop = asyncio.get_running_loop()
    pairs = [socket.socketpair() for _ in range(2)]
    with ExitStack() as held:
        for _, hosts in pairs:
            held.enter_context(hosts).sendall(OK)
        left = iter([ours for ours, _ in pairs])
        async with conversing(lambda _: next(left)) as guest:
            await loop.sock_sendall(guest, GET % 1 + GET % 2)
            guest.shutdown(socket.SHUT_WR)
            assert (await all_of(guest)).count(b"200 OK") == 2
        assert [hosts.recv(65536) for _, hosts in pairs] == [GET % 1, GET % 2]


async def test_headers_have_a_limit_in_one_piece_too() -> None:
    def unreachable(host: str) -> socket.socket:
        raise AssertionError(host)

    loop = asyncio.get_running_loop()
    async with conversing(unreachable) as guest:
        head = b"GET / HTTP/1.1\r\nHost: a.test\r\nX: " + b"x" * 65_530 + b"\r\n\r\n"
        await loop.sock_sendall(guest, head)
        assert b"HTTP/1.1 400 " in await all_of(guest)


async def test_a_host_that_breaks_a_connection_is_told_of() -> None:
    listener = socket.create_server(("127.0.0.1", 0))

    def reached(_: str) -> socket.socket:
        found = socket.create_connection(listener.getsockname())
        there, _ = listener.accept()
        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
        there.close()
        return found

    loop = asyncio.get_running_loop()
    with listener:
        async with conversing(reached) as guest:
            await loop.sock_sendall(guest, GET % 1)
            assert b"HTTP/1.1 502 " in await all_of(guest)


async def test_headers_are_changed_on_the_way() -> None:
    ours, hosts = socket.socketpair()
    hosts.sendall(OK)

    def adapt(headers: Headers) -> Headers:
        if any(value == b"no" for _, value in headers):
            raise RefusedError(502, "not this one")
        return [*headers, (b"X-Key", b"value")]

    loop = asyncio.get_running_loop()
    async with conversing(lambda _: ours, adapt=adapt) as guest:
        await loop.sock_sendall(guest, GET % 1 + b"GET / HTTP/1.1\r\nHost: a.test\r\nX: no\r\n\r\n")
        said = await all_of(guest)
    assert b"HTTP/1.1 502 " in said
    with hosts:
        assert hosts.recv(65536) == GET[:-2] % 1 + b"X-Key: value\r\n\r\n"


@pytest.mark.parametrize("ends", [True, False])
async def test_a_guest_that_ends_has_its_answer(*, ends: bool) -> None:
    ours, hosts = socket.socketpair()
    hosts.sendall(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nall of it")
    hosts.shutdown(socket.SHUT_WR)
    loop = asyncio.get_running_loop()
    async with conversing(lambda _: ours) as guest:
        await loop.sock_sendall(guest, GET % 1)
        if ends:
            guest.shutdown(socket.SHUT_WR)
        assert b"all of it" in await all_of(guest)
    hosts.close()
