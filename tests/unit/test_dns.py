"""The DNS forwarder: what it passes on, what it refuses, and how fast."""

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.egress import dns
from sandyard.server.egress.dns import BadQueryError, Forwarder, TokenBucket, parse
from sandyard.server.node.host.dns import HostAnswers

FORMERR, SERVFAIL, NOTIMP, REFUSED = 1, 2, 4, 5
A, AXFR, IXFR, TSIG, ANY = 1, 252, 251, 250, 255


def question(name: bytes = b"example.test", kind: int = A) -> bytes:
    labels = b"".join(bytes([len(one)]) + one for one in name.split(b".") if one)
    return labels + b"\0" + struct.pack(">HH", kind, 1)


def message(
    *, flags: int = 0x0100, counts: tuple[int, int, int, int] = (1, 0, 0, 0), body: bytes = b""
) -> bytes:
    return struct.pack(">HHHHHH", 7, flags, *counts) + (body or question())


def opt(size: int = 1232, options: bytes = b"") -> bytes:
    return b"\0" + struct.pack(">HHIH", 41, size, 0, len(options)) + options


def test_plain_queries_pass() -> None:
    assert parse(message()) == dns.Query(question(), 512)
    with_edns = message(counts=(1, 0, 0, 1), body=question() + opt(1232, b"\0\x0a\0\x08cookies!"))
    assert parse(with_edns) == dns.Query(question(), 1232)
    assert parse(message(body=question(b""))).question == b"\0\0\1\0\1"  # the root
    huge = message(counts=(1, 0, 0, 1), body=question() + opt(65_535))
    assert parse(huge).udp_size == 4096


@pytest.mark.parametrize(
    ("given", "rcode"),
    [
        (message(flags=0x2800), NOTIMP),  # an update
        (message(flags=0x2000), NOTIMP),  # a notification
        (message(flags=0x8100), FORMERR),  # an answer
        (message(body=question(kind=AXFR)), REFUSED),
        (message(body=question(kind=IXFR)), REFUSED),
        (message(body=question(kind=TSIG)), REFUSED),
        (message(counts=(2, 0, 0, 0), body=question() + question()), FORMERR),
        (message(counts=(0, 0, 0, 0)), FORMERR),
        (message(counts=(1, 1, 0, 0)), FORMERR),
        (message(counts=(1, 0, 1, 0)), FORMERR),
        (message(counts=(1, 0, 0, 2), body=question() + opt() + opt()), FORMERR),
        (message(counts=(1, 0, 0, 1), body=question() + opt()[:-1]), FORMERR),
        (message(counts=(1, 0, 0, 1), body=question() + b"\0" + opt()[1:3] + b"x" * 9), FORMERR),
        (message(body=question() + b"SSH-2.0-tunnel"), FORMERR),
        (message(body=b"\xc0\x0c\0\1\0\1"), FORMERR),  # a name that points at itself
        (message(body=question(b"x" * 63 + b"." + b"y" * 63 + b"." + b"z" * 200)), FORMERR),
        (message(body=question()[:-1]), FORMERR),
        (message(body=b"\x3fshort"), FORMERR),
        (message(counts=(1, 0, 0, 1), body=question() + opt(512, b"x" * 2000)), FORMERR),
    ],
)
def test_what_is_no_lookup_of_a_name_is_refused(given: bytes, rcode: int) -> None:
    with pytest.raises(BadQueryError) as refused:
        parse(given)
    assert refused.value.rcode == rcode


@given(st.binary(max_size=1500))
def test_any_bytes_are_parsed_or_refused(given: bytes) -> None:
    try:
        query = parse(given)
    except BadQueryError:
        return
    assert query.question in given
    assert 512 <= query.udp_size <= 4096


def test_a_bucket_lets_a_burst_through_and_then_its_rate() -> None:
    now = [0.0]
    bucket = TokenBucket(10, 5, lambda: now[0])
    assert [bucket.delay() for _ in range(5)] == [0.0] * 5
    assert bucket.delay() == pytest.approx(0.1)
    now[0] += 1000
    assert [bucket.delay() for _ in range(6)] == [0.0] * 5 + [pytest.approx(0.1)]


# --- with sockets -------------------------------------------------------------------------


Answer = Callable[[bytes], bytes]


def answered(asked: bytes, records: bytes = b"") -> bytes:
    """Return an answer to a message, with whatever lies behind its question."""
    return asked[:2] + struct.pack(">HHHHH", 0x8180, 1, 0, 0, 0) + question() + records


def both_on_one_port() -> tuple[socket.socket, socket.socket]:
    """Return a UDP socket and a listening TCP socket with the same port of 127.0.0.1."""
    while True:
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        tcp = socket.socket(socket.AF_INET, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            udp.bind(("127.0.0.1", 0))
            tcp.bind(udp.getsockname())
        except OSError:  # another process has the port for TCP
            udp.close()
            tcp.close()
        else:
            tcp.listen()
            return udp, tcp


@asynccontextmanager
async def forwarding(answer: Answer) -> AsyncIterator[tuple[tuple[str, int], list[bytes]]]:
    """Yield the address of a forwarder, UDP and TCP, and what its resolver was asked."""
    loop = asyncio.get_running_loop()
    asked: list[bytes] = []

    class Resolver(asyncio.DatagramProtocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast("asyncio.DatagramTransport", transport)

        def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
            asked.append(data)
            # A stranger's answer comes first: another id, and another question.
            self.transport.sendto(b"\xff\xff" + answered(data)[2:], addr)
            self.transport.sendto(answered(data).replace(b"example", b"exbmple"), addr)
            self.transport.sendto(answer(data), addr)

    async def by_tcp(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        size = int.from_bytes(await reader.readexactly(2))
        data = await reader.readexactly(size)
        asked.append(data)
        said = answer(data)
        writer.write(len(said).to_bytes(2) + said)
        writer.close()
        await writer.wait_closed()

    upstream, behind = both_on_one_port()
    resolver = upstream.getsockname()
    transport, _ = await loop.create_datagram_endpoint(Resolver, sock=upstream)
    server = await asyncio.start_server(by_tcp, sock=behind)
    udp, tcp = both_on_one_port()
    with udp, tcp:
        forwarder = Forwarder(HostAnswers(lambda: [resolver]))
        serving = [
            asyncio.create_task(forwarder.serve_udp(udp)),
            asyncio.create_task(forwarder.serve_tcp(tcp)),
        ]
        try:
            yield udp.getsockname(), asked
        finally:
            for task in serving:
                task.cancel()
            await asyncio.wait(serving)
            server.close()
            await server.wait_closed()
            transport.close()


async def ask_udp(address: tuple[str, int], sent: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as client:
        await loop.sock_connect(client, address)
        await loop.sock_sendall(client, sent)
        async with asyncio.timeout(10):
            return await loop.sock_recv(client, 65_535)


async def ask_tcp(address: tuple[str, int], sent: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*address)
    try:
        writer.write(len(sent).to_bytes(2) + sent)
        async with asyncio.timeout(10):
            return await reader.readexactly(int.from_bytes(await reader.readexactly(2)))
    finally:
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize("ask", [ask_udp, ask_tcp])
async def test_lookups_reach_the_resolver_and_nothing_else_does(
    ask: Callable[[tuple[str, int], bytes], Awaitable[bytes]],
) -> None:
    async with forwarding(lambda data: answered(data, b"records")) as (address, asked):
        assert await ask(address, message()) == answered(message(), b"records")
        refused = await ask(address, message(body=question(kind=AXFR)))
        assert (refused[3] & 15, refused[:2]) == (REFUSED, message()[:2])
        assert refused[12:] == question(kind=AXFR)  # clients look for their question
        assert (await ask(address, message(flags=0x2800)))[3] & 15 == NOTIMP
        assert asked == [message()]


async def test_an_answer_that_is_too_large_for_a_datagram_is_truncated() -> None:
    large = b"r" * 3000
    with_edns = message(counts=(1, 0, 0, 1), body=question() + opt(4096))
    async with forwarding(lambda data: answered(data, large)) as (address, _):
        cut = await ask_udp(address, message())
        assert len(cut) <= 512
        assert cut[2] & 0x02  # truncated: asked again over TCP
        assert await ask_udp(address, with_edns) == answered(with_edns, large)
        assert await ask_tcp(address, message()) == answered(message(), large)


async def test_a_resolvers_refusal_is_passed_on_though_it_repeats_nothing() -> None:
    """As of one that cannot read EDNS."""

    def cannot_read(data: bytes) -> bytes:
        return data[:2] + struct.pack(">HHHHH", 0x8181, 0, 0, 0, 0)

    async with forwarding(cannot_read) as (address, _):
        assert await ask_udp(address, message()) == cannot_read(message())
    query = parse(message())
    for other in (b"", b"\0" * 11, message(), struct.pack(">HHHHHH", 7, 0x8180, 0, 0, 0, 0)):
        assert not dns.is_answer_to(other, message(), query)


async def test_a_flood_of_one_slot_reaches_its_resolver_at_the_permitted_rate(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dns, "QUERIES_PER_S", 0.001)
    monkeypatch.setattr(dns, "QUERIES_BURST", 20)
    async with forwarding(answered) as (address, asked):
        for _ in range(20):
            await ask_udp(address, message())
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as flood:
            for _ in range(500):
                flood.sendto(message(), address)
        reader, writer = await asyncio.open_connection(*address)
        writer.write(len(message()).to_bytes(2) + message())
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await reader.read(1)
        writer.close()
        await writer.wait_closed()
        assert len(asked) == 20


async def test_without_a_resolver_a_client_is_answered_at_once() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as udp:
        udp.bind(("127.0.0.1", 0))
        serving = asyncio.create_task(Forwarder(HostAnswers(list)).serve_udp(udp))
        try:
            said = await ask_udp(udp.getsockname(), message())
            assert (said[3] & 15, said[12:]) == (SERVFAIL, question())
        finally:
            serving.cancel()
            await asyncio.wait([serving])
