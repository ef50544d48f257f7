"""DNS for sandboxes without rules: a forwarder in each slot that queries the host's resolvers.

Its sockets are inside the slot, so no address of the host is reachable from there. Queries are sent
from the host: a resolver on the host's 127.0.0.53 can be used, and names known only to the host's
resolvers can be resolved in sandboxes too.
"""

import asyncio
import contextlib
import socket
from collections.abc import Callable, Sequence
from pathlib import Path

from sandyard.server.drivers.namespaces import in_namespace
from sandyard.server.egress.dns import (
    MESSAGE_MAX,
    Forwarder,
    Query,
    Resolver,
    dns_sockets,
    is_answer_to,
    receive,
    send,
)
from sandyard.server.node.host.firewall import GATEWAY_IP
from sandyard.server.tasks import in_thread

_ANSWER_LIMIT_S = 4.0
_PORT = 53


def host_resolvers(path: Path = Path("/etc/resolv.conf")) -> list[Resolver]:
    """Return the host's resolvers."""
    with contextlib.suppress(OSError):
        return [
            (words[1], _PORT)
            for line in path.read_text().splitlines()
            if len(words := line.split()) >= 2 and words[0] == "nameserver"
        ]
    return []


async def forward_dns(netns: str, resolvers: Callable[[], Sequence[Resolver]]) -> None:
    """Answer the queries of one slot until cancelled.

    Raises:
        InternalError: the slot does not exist or its port is taken.
    """
    udp, tcp = await in_thread(in_namespace, netns, lambda: dns_sockets(GATEWAY_IP))
    with udp, tcp:
        forwarder = Forwarder(HostAnswers(resolvers))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(forwarder.serve_udp(udp))
            tasks.create_task(forwarder.serve_tcp(tcp))


class HostAnswers:
    """See egress.dns.Answers: those of the first resolver that has one."""

    def __init__(self, resolvers: Callable[[], Sequence[Resolver]]) -> None:
        self._resolvers = resolvers

    async def __call__(self, message: bytes, query: Query, *, over_tcp: bool) -> bytes:
        """See egress.dns.Answers."""
        ask = _ask_tcp if over_tcp else _ask_udp
        for resolver in self._resolvers():
            with contextlib.suppress(OSError, TimeoutError, EOFError):
                async with asyncio.timeout(_ANSWER_LIMIT_S):
                    return await ask(resolver, message, query)
        raise EOFError("no resolver has an answer")


def _socket_for(resolver: Resolver, kind: socket.SocketKind) -> socket.socket:
    family = socket.AF_INET6 if ":" in resolver[0] else socket.AF_INET
    return socket.socket(family, kind | socket.SOCK_NONBLOCK)


async def _ask_udp(resolver: Resolver, message: bytes, query: Query) -> bytes:
    loop = asyncio.get_running_loop()
    with _socket_for(resolver, socket.SOCK_DGRAM) as upstream:
        await loop.sock_connect(upstream, resolver)
        await loop.sock_sendall(upstream, message)
        while True:
            answer = await loop.sock_recv(upstream, MESSAGE_MAX)
            if is_answer_to(answer, message, query):
                return answer


async def _ask_tcp(resolver: Resolver, message: bytes, query: Query) -> bytes:
    with _socket_for(resolver, socket.SOCK_STREAM) as upstream:
        await asyncio.get_running_loop().sock_connect(upstream, resolver)
        await send(upstream, message)
        answer = await receive(upstream, MESSAGE_MAX)
        if not is_answer_to(answer, message, query):
            raise EOFError("the resolver answered something else")
        return answer
