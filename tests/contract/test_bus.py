"""The examination of Bus."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from tests.support.nats import NatsServer, nats_server

from sandyard.server.core.contracts.bus import Bus
from sandyard.server.links.local import LocalBus, SystemClock
from sandyard.server.links.nats.bus import hinting
from sandyard.server.links.nats.link import linked


async def a_bus(server: NatsServer, name: str, held: AsyncExitStack) -> Bus:
    link = server.control_link(name)
    bus = await held.enter_async_context(hinting(link, SystemClock()))
    await held.enter_async_context(linked(link))
    async with asyncio.timeout(10):
        await link.until_up()
    return bus


@pytest.fixture(params=["local", "nats", "nats-between-two"])
async def buses(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[tuple[Bus, Bus]]:
    """One that hints, and one that is hinted."""
    async with AsyncExitStack() as held:
        if request.param == "local":
            bus = LocalBus(SystemClock())
            yield bus, bus
            return
        server = held.enter_context(nats_server(tmp_path / "nats"))
        one = await a_bus(server, "one", held)
        yield one, one if request.param == "nats" else await a_bus(server, "two", held)


async def test_a_hint_wakes_who_subscribed_before_it(buses: tuple[Bus, Bus]) -> None:
    hints, bus = buses
    with bus.subscribe("a") as one, bus.subscribe("a") as two, bus.subscribe("sandbox:b") as other:
        hints.hint("a")
        assert await one.wait(5)
        assert await two.wait(5)
        assert not await other.wait(0.01)
        assert not await one.wait(0.01)
        hints.hint("sandbox:b")
        assert await other.wait(5)


async def test_a_hint_between_two_waits_is_not_lost(buses: tuple[Bus, Bus]) -> None:
    hints, bus = buses
    with bus.subscribe("a") as one:
        hints.hint("a")
        hints.hint("a")
        await asyncio.sleep(0)
        assert await one.wait(5)


async def test_a_hint_to_nobody_is_fine(buses: tuple[Bus, Bus]) -> None:
    hints, bus = buses
    hints.hint("nobody")
    with bus.subscribe("nobody") as late:
        await late.wait(0.01)  # one that is long on its way wakes for nothing, and that is all
