"""The process itself: DNS, the gate, and the socket that receives configurations."""

import asyncio
import json
import logging
import socket
import ssl
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sandyard.server.core.codec import CodecError, decode
from sandyard.server.core.egress import Egress, Policy, Rules
from sandyard.server.egress.answers import Known, RuledAnswers
from sandyard.server.egress.config import CONFIG_MAX, Config
from sandyard.server.egress.dial import Dialer
from sandyard.server.egress.dns import Forwarder
from sandyard.server.egress.gate import Gate
from sandyard.server.egress.held import Held
from sandyard.server.egress.journal import Journal
from sandyard.server.egress.resolver import Resolver

log = logging.getLogger(__name__)

_TIDY_S = 3600.0
_SAID_S = 10.0
_CLIENTS_MAX = 4
Use = Callable[[Config], str]
"""Puts a configuration in force, and returns the stamp of the credentials, if there are any."""
_NOTHING = Rules(Policy(egress=Egress.DENY))


@dataclass(frozen=True)
class Sockets:
    """What a process works with: its listeners inside the slot, and what it was given."""

    dns_datagrams: socket.socket
    dns_streams: socket.socket
    connections: socket.socket
    control: socket.socket
    journals: Sequence[int]
    resolver_datagrams: Sequence[socket.socket]
    resolver_streams: Sequence[socket.socket]


async def work(sockets: Sockets, hosts: ssl.SSLContext) -> None:
    """Serve one sandbox until the process is killed; `hosts` checks hosts whose TLS is ended here.
    Without rules, nothing passes."""
    for one in (sockets.dns_datagrams, sockets.dns_streams, sockets.connections, sockets.control):
        one.setblocking(False)
    for one in (*sockets.resolver_datagrams, *sockets.resolver_streams):
        one.setblocking(False)
    journal = Journal(sockets.journals, time.time)  # noqa: TID251 - no test drives a process's clock
    resolver = Resolver(sockets.resolver_datagrams, sockets.resolver_streams)
    known = Known()
    answers = RuledAnswers(resolver, known, journal, _NOTHING)
    forwarder = Forwarder(answers)
    gate = Gate(_NOTHING, Dialer(resolver), known, journal, hosts)
    held: Held | None = None

    def use(config: Config) -> str:
        nonlocal held
        rules = config.rules()
        if config.credentials is not None:
            held = Held(config.credentials, folder=Path("/"))
        if not rules.ended or (held is not None and held.stamp != config.policy.stamp):
            held = None  # they are those of other rules
        resolver.servers = config.servers
        answers.rules = rules
        gate.use(rules, held)
        return "" if held is None else held.stamp

    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(resolver.serve())
        tasks.create_task(forwarder.serve_udp(sockets.dns_datagrams))
        tasks.create_task(forwarder.serve_tcp(sockets.dns_streams))
        tasks.create_task(gate.serve(sockets.connections))
        tasks.create_task(_listen(sockets.control, use))
        while True:
            await asyncio.sleep(_TIDY_S)
            journal.tidy()


async def _listen(control: socket.socket, use: Use) -> None:
    """Take configurations: a JSON line each, answered by a line. The node alone can connect."""
    free = asyncio.Semaphore(_CLIENTS_MAX)
    async with asyncio.TaskGroup() as tasks:
        while True:
            await free.acquire()
            client, _ = await asyncio.get_running_loop().sock_accept(control)
            tasks.create_task(_attend(client, use)).add_done_callback(lambda _: free.release())


async def _attend(client: socket.socket, use: Use) -> None:
    reader, writer = await asyncio.open_unix_connection(sock=client, limit=CONFIG_MAX)
    try:
        with suppress(OSError, ValueError):
            while line := await reader.readline():
                try:
                    answer = f"ok {use(decode(Config, json.loads(line)))}\n".encode()
                except (CodecError, ValueError) as error:
                    # Not what it was: it may have secrets.
                    log.error("cannot use a configuration: %s", type(error).__name__)
                    answer = b"refused\n"
                async with asyncio.timeout(_SAID_S):
                    writer.write(answer)
                    await writer.drain()
    finally:
        writer.close()
