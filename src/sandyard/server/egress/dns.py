"""DNS for sandboxes: reads the queries of a guest, and sends it answers.

Guests are hostile: only plain queries with one question are answered by others, and everything else
is answered here (RFC 1035, 4.1; RFC 6891 for the one additional record). Each guest has a token
bucket. While it is empty nothing is read, so that the kernel drops a flood, which costs no more
than the permitted rate.
"""

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

log = logging.getLogger(__name__)

QUERIES_PER_S, QUERIES_BURST = 100, 300
_AT_ONCE = 24
_TCP_AT_ONCE = 8
_TCP_IDLE_S = 10.0
_PAUSE_S = 0.2
_BUFFER = 64 * 1024
_QUESTION_MAX = 1024  # a name has 255 bytes at most, the options of EDNS a few dozen
MESSAGE_MAX = 65535
_UDP_MIN, _UDP_MAX = 512, 4096
_PORT = 53
_HEAD = struct.Struct(">HHHHHH")
_IS_ANSWER, _IS_TRUNCATED, _WANTS_RECURSION = 0x8000, 0x0200, 0x0100
_OPCODE, _RCODE = 0x7800, 0x000F
FORMERR, SERVFAIL, NOTIMP, REFUSED = 1, 2, 4, 5
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

    @property
    def kind(self) -> int:
        """The type that is asked for."""
        return int.from_bytes(self.question[-4:-2], "big")

    @property
    def is_usual(self) -> bool:
        """Whether it is of the class that the internet has."""
        return self.question[-2:] == b"\0\1"

    @property
    def is_root(self) -> bool:
        """Whether it is for the root of all names."""
        return self.question[0] == 0

    @property
    def name(self) -> str:
        """The name that is asked for, in lower case; empty if it is no name of a host."""
        labels, at = [], 0
        while (length := self.question[at]) != 0:
            labels.append(self.question[at + 1 : at + 1 + length])
            at += 1 + length
        is_plain = all(one.isascii() and b"." not in one for one in labels)
        return b".".join(labels).decode().lower() if is_plain else ""


class Answers(Protocol):
    """Finds answers to queries."""

    async def __call__(self, message: bytes, query: Query, *, over_tcp: bool) -> bytes:
        """Return the response to a query; `message` is all of it.

        Raises:
            OSError, TimeoutError, EOFError: there is none.
        """
        ...


class BadQueryError(Exception):
    """A message that is not forwarded; `rcode` says why (RFC 1035, 4.1.1), `question` is its
    question, if it could be parsed."""

    def __init__(self, rcode: int, question: bytes = b"") -> None:
        super().__init__(f"refused with rcode {rcode}")
        self.rcode = rcode
        self.question = question


def parse(message: bytes) -> Query:
    """Return the parsed query.

    Raises:
        BadQueryError: it is not an ordinary query with one question, or is malformed.
    """
    if not _HEAD.size < len(message) <= _QUESTION_MAX:
        raise BadQueryError(FORMERR)
    _, flags, questions, answers, authorities, additional = _HEAD.unpack_from(message)
    if flags & _IS_ANSWER:
        raise BadQueryError(FORMERR)
    if flags & _OPCODE:
        raise BadQueryError(NOTIMP)
    if questions != 1 or answers or authorities or additional > 1:
        raise BadQueryError(FORMERR)
    end = _end_of_name(message, _HEAD.size) + 4
    if end > len(message):
        raise BadQueryError(FORMERR)
    (kind,) = struct.unpack_from(">H", message, end - 4)
    question = message[_HEAD.size : end]
    if kind in _REFUSED_TYPES:
        raise BadQueryError(REFUSED, question)
    if not additional:
        if end != len(message):
            raise BadQueryError(FORMERR)
        return Query(question, _UDP_MIN)
    return Query(question, _udp_size(message[end:]))


def _udp_size(record: bytes) -> int:
    """Return the UDP size in the OPT record of a query, which must be the last part of the
    message."""
    if len(record) < 11 or record[0]:
        raise BadQueryError(FORMERR)
    kind, size, _, length = struct.unpack_from(">HHIH", record, 1)
    if kind != _OPT or len(record) != 11 + length:
        raise BadQueryError(FORMERR)
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
    raise BadQueryError(FORMERR)


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


def dns_sockets(address: str) -> tuple[socket.socket, socket.socket]:
    """Return sockets for `Forwarder` at an address: for datagrams, and for connections.

    Raises:
        OSError: the port is taken.
    """
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
    try:
        udp.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _BUFFER)
        udp.bind((address, _PORT))
        tcp = socket.create_server((address, _PORT), backlog=16)
    except BaseException:
        udp.close()
        raise
    tcp.setblocking(False)
    return udp, tcp


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


class Forwarder:
    """Serves the sockets of one guest; the module docstring says what it forwards."""

    def __init__(self, answers: Answers) -> None:
        self._answers = answers
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
            answer = await self._answer(message, over_tcp=False)
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
                        message = await receive(client, _QUESTION_MAX)
                    await asyncio.sleep(self._bucket.delay())
                    answer = await self._answer(message, over_tcp=True)
                    if answer is None:
                        return
                    async with asyncio.timeout(_TCP_IDLE_S):
                        await send(client, answer)
        finally:
            self._connections.release()

    async def _answer(self, message: bytes, *, over_tcp: bool) -> bytes | None:
        """Return the response to a message; None if it is too short for a header."""
        if len(message) < _HEAD.size:
            return None
        try:
            query = parse(message)
        except BadQueryError as error:
            # To answer an answer could begin an endless exchange.
            is_answer = message[2] & 0x80
            return None if is_answer else refusal(message, error.rcode, error.question)
        with contextlib.suppress(OSError, TimeoutError, EOFError):
            answer = await self._answers(message, query, over_tcp=over_tcp)
            return answer if over_tcp else fitted(answer, query)
        return refusal(message, SERVFAIL, query.question)


async def send(connection: socket.socket, message: bytes) -> None:
    """Send a message on a connection (RFC 1035, 4.2.2)."""
    framed = struct.pack(">H", len(message)) + message
    await asyncio.get_running_loop().sock_sendall(connection, framed)


async def receive(connection: socket.socket, limit: int) -> bytes:
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
