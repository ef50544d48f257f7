"""The examination of Bus."""

import asyncio

import pytest

from sandyard.server.core.contracts.bus import Bus
from sandyard.server.links.local import LocalBus, SystemClock


@pytest.fixture
def bus() -> Bus:
    return LocalBus(SystemClock())


async def test_a_hint_wakes_who_subscribed_before_it(bus: Bus) -> None:
    with bus.subscribe("a") as one, bus.subscribe("a") as two, bus.subscribe("b") as other:
        bus.hint("a")
        assert await one.wait(1)
        assert await two.wait(1)
        assert not await other.wait(0.01)
        assert not await one.wait(0.01)


async def test_a_hint_between_two_waits_is_not_lost(bus: Bus) -> None:
    with bus.subscribe("a") as one:
        bus.hint("a")
        bus.hint("a")
        await asyncio.sleep(0)
        assert await one.wait(1)


async def test_a_hint_to_nobody_is_fine(bus: Bus) -> None:
    bus.hint("nobody")
    with bus.subscribe("nobody") as late:
        assert not await late.wait(0.01)
