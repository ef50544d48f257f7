"""Questions to the host's resolvers, over sockets that were opened in the host's network.

A process in a slot's network cannot open such sockets, so it is given some at its start. Each
question goes over one of them at random, with a random number, which makes answers hard to forge.
"""

import asyncio
import contextlib
import ctypes
import logging
import random
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import dns.exception
import dns.flags
import dns.message
import dns.rcode
import dns.rdatatype
import dns.rrset

from sandyard.server.core.egress import Address
from sandyard.server.egress.config import Server
from sandyard.server.egress.dns import (
    MESSAGE_MAX,
    QUERIES_BURST,
    QUERIES_PER_S,
    TokenBucket,
    receive,
    send,
)

log = logging.getLogger(__name__)

_LIMITS_S, _SERVERS_MAX = (1.0, 4.0), 3
_PAYLOAD = 4096
_KEPT_MAX, _KEPT_S, _FAILURE_KEPT_S = 1024, 300.0, 2.0
_KEPT_RECORDS_MAX, _ANSWER_MAX = 64, 16 * 1024
_PAUSE_S = 0.1
_libc = ctypes.CDLL(None, use_errno=True)
_random = random.SystemRandom()


class UnresolvedError(Exception):
    """No resolver has an answer."""


@dataclass(frozen=True)
class Found:
    """What a resolver answered: the records that lead from the name to its answer, and that."""

    rcode: int
    records: tuple[dns.rrset.RRset, ...]
    ttl_s: float

    @property
    def addresses(self) -> list[Address]:
        """The addresses in the answer."""
        return [
            Address(one.address)
            for records in self.records
            if records.rdtype == dns.rdatatype.A
            for one in records
        ]


class Resolver:
    """Asks the resolvers. Use it while `serve` runs."""

    def __init__(
        self, datagrams: Sequence[socket.socket], streams: Sequence[socket.socket]
    ) -> None:
        self.servers: tuple[Server, ...] = ()
        self._datagrams = datagrams
        self._streams = list(streams)
        self._waiting: dict[
            tuple[int, Server, int],
            tuple[dns.message.Message, asyncio.Future[dns.message.Message]],
        ] = {}
        self._kept: dict[tuple[str, int], tuple[float, Found]] = {}
        self._asking: dict[tuple[str, int], asyncio.Task[Found | None]] = {}
        self._tasks: asyncio.TaskGroup | None = None
        now = asyncio.get_running_loop().time
        self._bucket = TokenBucket(QUERIES_PER_S, QUERIES_BURST, now)

    async def serve(self) -> None:
        """Receive answers until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            for one in self._datagrams:
                tasks.create_task(self._receive(one))

    async def find(self, name: str, kind: int) -> Found:
        """Return the answer to a question; it is kept for as long as it may be.

        Raises:
            UnresolvedError: there is none.
        """
        key, now = (name, kind), asyncio.get_running_loop().time()
        kept = self._kept.get(key)
        if kept is not None and kept[0] > now:
            return kept[1]
        asking = self._asking.get(key)
        if asking is None:
            assert self._tasks is not None
            asking = self._asking[key] = self._tasks.create_task(self._find(name, kind))
            asking.add_done_callback(lambda _: self._asking.pop(key, None))
        found = await asyncio.shield(asking)
        if found is None:
            raise UnresolvedError(name)
        return found

    async def _find(self, name: str, kind: int) -> Found | None:
        # Names come from requests, too, not only from questions, which are limited on their own.
        await asyncio.sleep(self._bucket.delay())
        # A datagram may be lost: each server is asked again, and waited for longer.
        for limit_s, server in product(_LIMITS_S, self.servers[:_SERVERS_MAX]):
            try:
                async with asyncio.timeout(limit_s):
                    answer = await self._ask(server, name, kind)
                if answer.rcode() in (dns.rcode.NOERROR, dns.rcode.NXDOMAIN):
                    found = _found(answer)
                    self._keep(name, kind, found)
                    return found
            except (OSError, TimeoutError, EOFError, dns.exception.DNSException):
                continue
            except Exception:  # whatever a resolver answers, this goes on
                log.exception("a resolver's answer cannot be read")
        return None

    def _keep(self, name: str, kind: int, found: Found) -> None:
        if sum(len(one) for one in found.records) > _KEPT_RECORDS_MAX:
            return
        while len(self._kept) >= _KEPT_MAX:
            del self._kept[next(iter(self._kept))]
        # Never nothing: a guest's question and the dial that follows it shall agree.
        keeps_s = min(max(found.ttl_s, _FAILURE_KEPT_S), _KEPT_S)
        self._kept.pop((name, kind), None)
        self._kept[name, kind] = (asyncio.get_running_loop().time() + keeps_s, found)

    async def _ask(self, server: Server, name: str, kind: int) -> dns.message.Message:
        query = dns.message.make_query(
            name, dns.rdatatype.RdataType(kind), use_edns=0, payload=_PAYLOAD
        )
        answer = await self._ask_by_datagram(server, query)
        if answer.flags & dns.flags.TC:
            with contextlib.suppress(OSError, EOFError, dns.exception.DNSException):
                return await self._ask_by_stream(server, query)
        return answer

    async def _ask_by_datagram(
        self, server: Server, query: dns.message.Message
    ) -> dns.message.Message:
        family = socket.AF_INET6 if ":" in server.address else socket.AF_INET
        usable = [one for one in self._datagrams if one.family == family]
        if not usable:
            raise OSError("no socket for this kind of address")
        chosen = _random.choice(usable)
        key = (chosen.fileno(), server, query.id)
        if key in self._waiting:
            raise OSError("the number is in use")
        came = asyncio.get_running_loop().create_future()
        self._waiting[key] = (query, came)
        try:
            await asyncio.get_running_loop().sock_sendto(
                chosen, query.to_wire(), (server.address, server.port)
            )
            answer: dns.message.Message = await came
            return answer
        finally:
            del self._waiting[key]

    async def _receive(self, datagrams: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                data, sender = await loop.sock_recvfrom(datagrams, MESSAGE_MAX)
            except OSError:  # a resolver that is down, for example
                await asyncio.sleep(_PAUSE_S)
                continue
            number = int.from_bytes(data[:2], "big")
            key = (datagrams.fileno(), Server(sender[0], sender[1]), number)
            query, came = self._waiting.get(key, (None, None))
            if query is None or came is None or came.done():
                continue
            try:
                came.set_result(_answer_to(query, data))
            except Exception:  # not an answer to this: one may still come
                log.debug("a resolver's datagram cannot be read", exc_info=True)

    async def _ask_by_stream(
        self, server: Server, query: dns.message.Message
    ) -> dns.message.Message:
        family = socket.AF_INET6 if ":" in server.address else socket.AF_INET
        chosen = next((one for one in self._streams if one.family == family), None)
        if chosen is None:  # all are in use
            raise OSError("no socket for this kind of address")
        self._streams.remove(chosen)
        try:
            await asyncio.get_running_loop().sock_connect(chosen, (server.address, server.port))
            await send(chosen, query.to_wire())
            return _answer_to(query, await receive(chosen, _ANSWER_MAX))
        finally:
            _disconnect(chosen)
            self._streams.append(chosen)


def _answer_to(query: dns.message.Message, data: bytes) -> dns.message.Message:
    answer = dns.message.from_wire(data, ignore_trailing=True, raise_on_truncation=False)
    if not query.is_response(answer):
        raise EOFError("the resolver answered something else")
    return answer


def _found(answer: dns.message.Message) -> Found:
    """Return the records that lead from the question to its answer; others prove nothing."""
    assert isinstance(answer, dns.message.QueryMessage)
    chain = answer.resolve_chaining()
    records = (*chain.cnames, *(() if chain.answer is None else (chain.answer,)))
    return Found(answer.rcode(), records, float(chain.minimum_ttl) if records else _FAILURE_KEPT_S)


def _disconnect(stream: socket.socket) -> None:
    """Make a socket usable for another connection (connect(2), AF_UNSPEC)."""
    _libc.connect(stream.fileno(), bytes(16), 16)
