"""DNS for sandboxes: a forwarder in each slot that queries the host's resolvers.

Its sockets are inside the slot, so no address of the host is reachable from there. Queries are sent
from the host: a resolver on the host's 127.0.0.53 can be used, and names known only to the host's
resolvers can be resolved in sandboxes too.

Guests are hostile: the forwarder forwards only plain queries with one question and answers
everything else itself (RFC 1035, 4.1; RFC 6891 for the one additional record). Each slot has a
token bucket. While it is empty the forwarder does not read, so that the kernel drops a flood, which
costs the server's event loop no more than the permitted rate.
"""

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from sandyard.server.drivers.namespaces import in_namespace
from sandyard.server.node.host.firewall import GATEWAY_IP
from sandyard.server.tasks import in_thread

log = logging.getLogger(__name__)

QUERIES_PER_S, QUERIES_BURST = 100, 300
_ANSWER_LIMIT_S = 4.0
_AT_ONCE = 24
_TCP_AT_ONCE = 8
_TCP_IDLE_S = 10.0
_PAUSE_S = 0.2
_BUFFER = 64 * 1024
_QUESTION_MAX = 1024  # a name has 255 bytes at most, the options of EDNS a few dozen
_MESSAGE_MAX = 65535
_UDP_MIN, _UDP_MAX = 512, 4096
_PORT = 53
_HEAD = struct.Struct(">HHHHHH")
_IS_ANSWER, _IS_TRUNCATED, _WANTS_RECURSION = 0x8000, 0x0200, 0x0100
_OPCODE, _RCODE = 0x7800, 0x000F
_FORMERR, _SERVFAIL, _NOTIMP, _REFUSED = 1, 2, 4, 5
_LABEL_MAX, _NAME_MAX = 63, 255
_OPT = 41
# Transfers (RFC 5936, RFC 1995), the mailbox types that RFC 1035 retired with them, and the types
# of a transaction's own records (TKEY, TSIG): queries for them are not lookups of a name.
_REFUSED_TYPES = frozenset({249, 250, 251, 252, 253, 254})


Resolver = tuple[str, int]
"""The address and port of a DNS server."""


@dataclass(frozen=True)
class Query:
    """A query that may be forwarded."""

    question: bytes
    """The question section: name, type and class."""
    udp_size: int
    """How many bytes the client takes in one datagram."""


class BadQueryError(Exception):
    """A message that is not forwarded; `rcode` says why (RFC 1035, 4.1.1), `question` is its
    question, if it could be parsed."""

    def __init__(self, rcode: int, question: bytes = b"") -> None:
        super().__init__(f"refused with rcode {rcode}")
        self.rcode = rcode
        self.question = question


def host_resolvers(path: Path = Path("/etc/resolv.conf")) -> list[Resolver]:
    """Return the host's resolvers."""
    with contextlib.suppress(OSError):
        return [
            (words[1], _PORT)
            for line in path.read_text().splitlines()
            if len(words := line.split()) >= 2 and words[0] == "nameserver"
        ]
    return []


def parse(message: bytes) -> Query:
    """Return the parsed query.

    Raises:
        BadQueryError: it is not an ordinary query with one question, or is malformed.
    """
    if not _HEAD.size < len(message) <= _QUESTION_MAX:
        raise BadQueryError(_FORMERR)
    _, flags, questions, answers, authorities, additional = _HEAD.unpack_from(message)
    if flags & _IS_ANSWER:
        raise BadQueryError(_FORMERR)
    if flags & _OPCODE:
        raise BadQueryError(_NOTIMP)
    if questions != 1 or answers or authorities or additional > 1:
        raise BadQueryError(_FORMERR)
    end = _end_of_name(message, _HEAD.size) + 4
    if end > len(message):
        raise BadQueryError(_FORMERR)
    (kind,) = struct.unpack_from(">H", message, end - 4)
    question = message[_HEAD.size : end]
    if kind in _REFUSED_TYPES:
        raise BadQueryError(_REFUSED, question)
    if not additional:
        if end != len(message):
            raise BadQueryError(_FORMERR)
        return Query(question, _UDP_MIN)
    return Query(question, _udp_size(message[end:]))


def _udp_size(record: bytes) -> int:
    """Return the UDP size in the OPT record of a query, which must be the last part of the
    message."""
    if len(record) < 11 or record[0]:
        raise BadQueryError(_FORMERR)
    kind, size, _, length = struct.unpack_from(">HHIH", record, 1)
    if kind != _OPT or len(record) != 11 + length:
        raise BadQueryError(_FORMERR)
    return int(max(_UDP_MIN, min(size, _UDP_MAX)))


def _end_of_name(message: bytes, at: int) -> int:
    """Return the offset after an uncompressed name; compression makes no sense in a question."""
    start = at
    while at < len(message):
        length = message[at]
        at += 1 + length
        if length > _LABEL_MAX or at - start > _NAME_MAX:
            break
        if not length:
            return at
    raise BadQueryError(_FORMERR)


def refusal(message: bytes, rcode: int, question: bytes) -> bytes:
    """Return a response without records to a message that has at least a header.

    Clients accept a response only if it repeats their question.
    """
    number, flags, *_ = _HEAD.unpack_from(message)
    kept = flags & (_OPCODE | _WANTS_RECURSION)
    head = _HEAD.pack(number, _IS_ANSWER | kept | rcode, int(bool(question)), 0, 0, 0)
    return head + question


def is_answer_to(answer: bytes, message: bytes, query: Query) -> bool:
    """Tell whether a resolver's message answers this query: same id and same question, or no
    question in a refusal from a server that could not parse it."""
    if len(answer) < _HEAD.size or answer[:2] != message[:2]:
        return False
    _, flags, questions, *_ = _HEAD.unpack_from(answer)
    repeated = answer[_HEAD.size : _HEAD.size + len(query.question)]
    is_refusal = questions == 0 and bool(flags & _RCODE)
    return bool(flags & _IS_ANSWER) and (is_refusal or repeated.lower() == query.question.lower())


def fitted(answer: bytes, query: Query) -> bytes:
    """Return a response as one datagram of a size that the client accepts, truncated and marked as
    such if necessary.

    A client repeats the query over TCP if the response is truncated.
    """
    if len(answer) <= query.udp_size:
        return answer
    number, flags, *_ = _HEAD.unpack_from(answer)
    return _HEAD.pack(number, flags | _IS_TRUNCATED, 1, 0, 0, 0) + query.question


class TokenBucket:
    """Permits `rate` queries per second, and up to `burst` at once after a quiet period."""

    def __init__(self, rate: float, burst: int, now: Callable[[], float]) -> None:
        self._rate = rate
        self._burst = burst
        self._now = now
        self._tokens = float(burst)
        self._at = now()

    def delay(self) -> float:
        """Take one token, and return the seconds that the caller has to wait."""
        now = self._now()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate) - 1
        self._at = now
        return max(0.0, -self._tokens / self._rate)


async def forward_dns(netns: str, resolvers: Callable[[], Sequence[Resolver]]) -> None:
    """Answer the queries of one slot until cancelled.

    Raises:
        InternalError: the slot does not exist or its port is taken.
    """

    def listen() -> tuple[socket.socket, socket.socket]:
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        udp.bind((GATEWAY_IP, 53))
        tcp = socket.create_server((GATEWAY_IP, 53), backlog=16)
        tcp.setblocking(False)
        return udp, tcp

    udp, tcp = await in_thread(in_namespace, netns, listen)
    with udp, tcp:
        forwarder = Forwarder(resolvers)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(forwarder.serve_udp(udp))
            tasks.create_task(forwarder.serve_tcp(tcp))


class Forwarder:
    """Serves one slot's sockets; the module docstring says what it forwards."""

    def __init__(self, resolvers: Callable[[], Sequence[Resolver]]) -> None:
        self._resolvers = resolvers
        self._queries = asyncio.Semaphore(_AT_ONCE)
        self._connections = asyncio.Semaphore(_TCP_AT_ONCE)
        self._bucket = TokenBucket(QUERIES_PER_S, QUERIES_BURST, asyncio.get_running_loop().time)

    async def serve_udp(self, udp: socket.socket) -> None:
        """Answer datagrams until cancelled."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._queries.acquire()
                try:
                    message, client = await loop.sock_recvfrom(udp, _QUESTION_MAX + 1)
                    await asyncio.sleep(self._bucket.delay())
                except OSError:
                    self._queries.release()
                    await asyncio.sleep(_PAUSE_S)
                    continue
                tasks.create_task(self._answer_udp(udp, message, client))

    async def _answer_udp(
        self, udp: socket.socket, message: bytes, client: tuple[str, int]
    ) -> None:
        try:
            answer = await self._answer(message, _ask_udp)
            if answer is not None:
                await asyncio.get_running_loop().sock_sendto(udp, answer, client)
        except OSError:
            log.debug("a DNS query of a sandbox failed", exc_info=True)
        finally:
            self._queries.release()

    async def serve_tcp(self, tcp: socket.socket) -> None:
        """Answer connections until cancelled."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._connections.acquire()
                try:
                    client, _ = await loop.sock_accept(tcp)
                except OSError:  # out of descriptors, for example
                    self._connections.release()
                    await asyncio.sleep(_PAUSE_S)
                    continue
                tasks.create_task(self._serve_connection(client))

    async def _serve_connection(self, client: socket.socket) -> None:
        try:
            with client, contextlib.suppress(OSError, TimeoutError, EOFError):
                while True:
                    async with asyncio.timeout(_TCP_IDLE_S):
                        message = await _receive(client, _QUESTION_MAX)
                    await asyncio.sleep(self._bucket.delay())
                    answer = await self._answer(message, _ask_tcp)
                    if answer is None:
                        return
                    async with asyncio.timeout(_TCP_IDLE_S):
                        await _send(client, answer)
        finally:
            self._connections.release()

    async def _answer(self, message: bytes, ask: "_Ask") -> bytes | None:
        """Return the response to a message; None if it is too short for a header."""
        if len(message) < _HEAD.size:
            return None
        try:
            query = parse(message)
        except BadQueryError as error:
            # To answer an answer could begin an endless exchange.
            is_answer = message[2] & 0x80
            return None if is_answer else refusal(message, error.rcode, error.question)
        for resolver in self._resolvers():
            with contextlib.suppress(OSError, TimeoutError, EOFError):
                async with asyncio.timeout(_ANSWER_LIMIT_S):
                    return await ask(resolver, message, query)
        return refusal(message, _SERVFAIL, query.question)


_Ask = Callable[[Resolver, bytes, Query], Awaitable[bytes]]


def _socket_for(resolver: Resolver, kind: socket.SocketKind) -> socket.socket:
    family = socket.AF_INET6 if ":" in resolver[0] else socket.AF_INET
    return socket.socket(family, kind | socket.SOCK_NONBLOCK)


async def _ask_udp(resolver: Resolver, message: bytes, query: Query) -> bytes:
    loop = asyncio.get_running_loop()
    with _socket_for(resolver, socket.SOCK_DGRAM) as upstream:
        await loop.sock_connect(upstream, resolver)
        await loop.sock_sendall(upstream, message)
        while True:
            answer = await loop.sock_recv(upstream, _MESSAGE_MAX)
            if is_answer_to(answer, message, query):
                return fitted(answer, query)


async def _ask_tcp(resolver: Resolver, message: bytes, query: Query) -> bytes:
    with _socket_for(resolver, socket.SOCK_STREAM) as upstream:
        await asyncio.get_running_loop().sock_connect(upstream, resolver)
        await _send(upstream, message)
        answer = await _receive(upstream, _MESSAGE_MAX)
        if not is_answer_to(answer, message, query):
            raise EOFError("the resolver answered something else")
        return answer


async def _send(connection: socket.socket, message: bytes) -> None:
    framed = struct.pack(">H", len(message)) + message
    await asyncio.get_running_loop().sock_sendall(connection, framed)


async def _receive(connection: socket.socket, limit: int) -> bytes:
    """Return the next message of a connection (RFC 1035, 4.2.2).

    Raises:
        EOFError: the connection ended, or the message is longer than `limit`.
    """
    (length,) = struct.unpack(">H", await _exactly(connection, 2))
    if length > limit:
        raise EOFError("the message is too long")
    return await _exactly(connection, length)


async def _exactly(connection: socket.socket, length: int) -> bytes:
    loop = asyncio.get_running_loop()
    found = bytearray()
    while len(found) < length:
        more = await loop.sock_recv(connection, length - len(found))
        if not more:
            raise EOFError("the connection ended")
        found += more
    return bytes(found)
