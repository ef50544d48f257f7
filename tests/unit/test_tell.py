"""Telling the host of a command, and noticing when it has disconnected."""

import asyncio
import socket
from collections.abc import Iterator

import pytest
from tests.unit.test_table import living

from sandyard.server.core.wire import Channel, Decoder
from sandyard.server.guest.ops.processes import hear_end, hear_input, tell
from sandyard.server.guest.streams import receive

HEAR = pytest.mark.parametrize("hear", [hear_input, hear_end])


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, socket.socket]]:
    host, agent = socket.socketpair()
    with host, agent:
        for one in (host, agent):
            one.setblocking(False)
        yield host, agent


Ends = tuple[socket.socket, socket.socket]


async def test_the_next_request_can_be_read_after_the_end(ends: Ends) -> None:
    host, agent = ends
    async with living() as (_, entry, pipes):
        with entry.followed(0) as follower:
            pipes.exits(3)
            assert await tell(entry, follower, agent, hear_end(entry, agent, Decoder()))
        # At once: nothing of the first may still be watching the connection.
        async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(receive(agent))
            for _ in range(5):
                await asyncio.sleep(0)
            host.send(b"next")
        assert reading.result() == b"next"
        decoder = Decoder()
        decoder.feed(host.recv(65536))
        frame = decoder.take_frame()
        assert frame is not None
        assert frame.channel is Channel.EXIT


@HEAR
async def test_a_host_that_disconnects_is_noticed(ends: Ends, hear: object) -> None:
    host, agent = ends
    async with living() as (_, entry, _pipes):
        with entry.followed(0) as follower:
            async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
                telling = tasks.create_task(
                    tell(entry, follower, agent, hear(entry, agent, Decoder()))  # type: ignore[operator]
                )
                await asyncio.sleep(0.01)
                assert not telling.done()
                host.close()
        assert telling.result() is False


@HEAR
async def test_a_host_that_disconnects_is_noticed_while_it_does_not_read(
    ends: Ends, hear: object
) -> None:
    host, agent = ends
    async with living() as (_, entry, pipes):
        with entry.followed(0) as follower:
            async with asyncio.timeout(5), asyncio.TaskGroup() as tasks:
                telling = tasks.create_task(
                    tell(entry, follower, agent, hear(entry, agent, Decoder()))  # type: ignore[operator]
                )
                await pipes.prints(bytes(10_000_000), limit_s=0.2)
                assert not telling.done()
                host.close()
        assert telling.result() is False
