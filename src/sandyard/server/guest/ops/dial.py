"""DIAL: a connection to a port of the machine, with what listens on loopback included."""

import asyncio
import socket

from sandyard.server.core import ops, wire
from sandyard.server.guest.streams import answer, copy
from sandyard.server.guest.system import RefusedError


async def dial(wish: ops.Dial, connection: socket.socket, decoder: wire.Decoder) -> None:
    """See core.ops.Dial."""
    port = wish.port
    if not 1 <= port <= 65535 or port == wire.AGENT_PORT:
        raise RefusedError(f"cannot connect to port {port}: it is not one of the sandbox's own")
    there = await _connect_local(port)
    with there:
        await answer(connection, ops.Done())
        await asyncio.get_running_loop().sock_sendall(there, decoder.take_raw())
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(copy(connection, there))
            tasks.create_task(copy(there, connection))


async def _connect_local(port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        there = socket.socket(family, socket.SOCK_STREAM)
        there.setblocking(False)
        try:
            await loop.sock_connect(there, (host, port))
        except OSError:
            there.close()
        else:
            there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return there
    raise RefusedError(f"cannot connect to port {port}: nothing listens there")
