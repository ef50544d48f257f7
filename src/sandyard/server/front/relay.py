"""The one relay: bytes both ways between two streams, no faster than either side takes them."""

import asyncio

from sandyard.server.core.contracts.node import ByteStream

PIECE = 128 * 1024


async def relay(one: ByteStream, other: ByteStream) -> None:
    """Carry bytes both ways until both sides have ended, or one is gone, which ends the other.

    The end of one direction is passed on and the other continues, as between sockets.

    Raises: what the streams raise.
    """
    try:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(_carry(one, other))
            tasks.create_task(_carry(other, one))
    except BaseExceptionGroup as group:
        raise group.exceptions[0] from group


async def _carry(source: ByteStream, sink: ByteStream) -> None:
    while data := await source.read(PIECE):
        await sink.write(data)
    await sink.write_eof()
