"""DNS for sandboxes: a forwarder in each slot that asks the host's own resolvers.

The sockets stand inside the slot, so nothing of the host's is reachable from there; the questions
go out from the host, so that also a resolver on the host's 127.0.0.53 can be used.
"""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Callable
from pathlib import Path

from sandyard.server.drivers.namespaces import in_namespace
from sandyard.server.node.host.firewall import GATEWAY_IP
from sandyard.server.tasks import in_thread

log = logging.getLogger(__name__)

_ANSWER_LIMIT_S = 4.0
_AT_ONCE = 24
_MESSAGE_MAX = 65535
_TCP_IDLE_S = 10.0
_PAUSE_S = 0.2


def host_resolvers(path: Path = Path("/etc/resolv.conf")) -> list[str]:
    """Return the addresses of the host's resolvers."""
    with contextlib.suppress(OSError):
        return [
            words[1]
            for line in path.read_text().splitlines()
            if len(words := line.split()) >= 2 and words[0] == "nameserver"
        ]
    return []


async def forward_dns(netns: str, resolvers: Callable[[], list[str]]) -> None:
    """Answer the questions of one slot until cancelled.

    Raises:
        InternalError: the slot is not there or its port is taken.
    """

    def listen() -> tuple[socket.socket, socket.socket]:
        udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK)
        udp.bind((GATEWAY_IP, 53))
        tcp = socket.create_server((GATEWAY_IP, 53), backlog=16)
        tcp.setblocking(False)
        return udp, tcp

    udp, tcp = await in_thread(in_namespace, netns, listen)
    with udp, tcp:
        forwarder = _Forwarder(resolvers)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(forwarder.serve_udp(udp))
            tasks.create_task(forwarder.serve_tcp(tcp))


class _Forwarder:
    def __init__(self, resolvers: Callable[[], list[str]]) -> None:
        self._resolvers = resolvers
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def serve_udp(self, udp: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    question, client = await loop.sock_recvfrom(udp, _MESSAGE_MAX)
                except OSError:
                    await asyncio.sleep(_PAUSE_S)
                    continue
                await self._slots.acquire()
                tasks.create_task(self._answer_udp(udp, question, client))

    async def _answer_udp(
        self, udp: socket.socket, question: bytes, client: tuple[str, int]
    ) -> None:
        try:
            for resolver in self._resolvers():
                with contextlib.suppress(OSError, TimeoutError):
                    answer = await _ask(resolver, question)
                    await asyncio.get_running_loop().sock_sendto(udp, answer, client)
                    return
        except OSError:
            log.debug("a question of a sandbox could not be answered", exc_info=True)
        finally:
            self._slots.release()

    async def serve_tcp(self, tcp: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            while True:
                try:
                    client, _ = await loop.sock_accept(tcp)
                except OSError:  # out of descriptors, say: not for ever
                    await asyncio.sleep(_PAUSE_S)
                    continue
                await self._slots.acquire()
                tasks.create_task(self._relay_tcp(client))

    async def _relay_tcp(self, client: socket.socket) -> None:
        try:
            with client:
                for resolver in self._resolvers():
                    with contextlib.suppress(OSError, TimeoutError):
                        async with asyncio.timeout(_TCP_IDLE_S):
                            await _relay(client, resolver)
                        return
        finally:
            self._slots.release()


async def _ask(resolver: str, question: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in resolver else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as upstream:
        await loop.sock_connect(upstream, (resolver, 53))
        await loop.sock_sendall(upstream, question)
        async with asyncio.timeout(_ANSWER_LIMIT_S):
            while True:
                answer = await loop.sock_recv(upstream, _MESSAGE_MAX)
                if answer[:2] == question[:2]:
                    return answer


async def _relay(client: socket.socket, resolver: str) -> None:
    loop = asyncio.get_running_loop()
    family = socket.AF_INET6 if ":" in resolver else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as upstream:
        await loop.sock_connect(upstream, (resolver, 53))

        async def copy(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := await loop.sock_recv(source, _MESSAGE_MAX):
                    await loop.sock_sendall(sink, data)
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_WR)

        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(copy(client, upstream))
            tasks.create_task(copy(upstream, client))
