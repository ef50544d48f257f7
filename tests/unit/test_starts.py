"""The agent's queue of processes to start."""

import asyncio
import socket

import pytest

from sandyard.server.core.errors import UnavailableError
from sandyard.server.core.refusals import meaning_of
from sandyard.server.core.wire import Answer, Refusal
from sandyard.server.guest import starts
from sandyard.server.guest.starts import Starts
from sandyard.server.guest.system import BusyError
from sandyard.server.node.agent import _refuse


async def test_what_else_is_ready_goes_between_two_starts() -> None:
    queue, order = Starts(), list[str]()
    host, agent = socket.socketpair()

    async def start(number: int) -> None:
        async with queue.turn(agent):
            order.append(f"start {number}")  # as long as it may take, nothing else runs

    async def heartbeat() -> None:
        for _ in range(5):
            order.append("heartbeat")
            await asyncio.sleep(0)

    with host, agent:
        async with asyncio.TaskGroup() as tasks:
            for number in range(50):
                tasks.create_task(start(number))
            tasks.create_task(heartbeat())
    assert [one for one in order if one != "heartbeat"] == [f"start {n}" for n in range(50)]
    # The last heartbeat was answered long before the last start.
    assert max(n for n, one in enumerate(order) if one == "heartbeat") < 40


async def test_too_many_are_refused_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(starts, "WAITING_MAX", 5)
    queue, free = Starts(), asyncio.Event()
    host, agent = socket.socketpair()
    started = 0

    async def start() -> None:
        nonlocal started
        async with queue.turn(agent):
            await free.wait()
            started += 1

    with host, agent:
        waiting = [asyncio.create_task(start()) for _ in range(4 + 5)]
        await asyncio.sleep(0.01)
        with pytest.raises(BusyError, match="none was started"):
            await start()
        free.set()
        await asyncio.gather(*waiting)
        assert started == 9
        await start()
    told = meaning_of(Refusal.BUSY, "")
    assert isinstance(told, UnavailableError)
    assert "nothing was done" in told.message
    for is_for_user in (True, False):  # of commands, too, which the node runs as well
        with pytest.raises(UnavailableError):
            _refuse(Answer({}, error="busy", message="x"), is_for_user=is_for_user)


async def test_a_start_that_hangs_does_not_keep_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(starts, "_HELD_S", 0.01)
    queue, never = Starts(), asyncio.Event()
    host, agent = socket.socketpair()

    async def hangs() -> None:
        async with queue.turn(agent):
            await never.wait()

    with host, agent:
        hanging = [asyncio.create_task(hangs()) for _ in range(20)]
        async with asyncio.timeout(10), queue.turn(agent):
            pass
        for one in hanging:
            one.cancel()
        await asyncio.wait(hanging)
        assert queue._turns._value == 4  # each turn was given back once


async def test_what_the_host_gave_up_is_not_started() -> None:
    queue, free = Starts(), asyncio.Event()
    pairs = [socket.socketpair() for _ in range(6)]
    started = []

    async def start(number: int) -> None:
        async with queue.turn(pairs[number][1]):
            await free.wait()
            started.append(number)

    waiting = [asyncio.create_task(start(number)) for number in range(6)]
    await asyncio.sleep(0)
    pairs[5][0].close()
    free.set()
    ends = await asyncio.gather(*waiting, return_exceptions=True)
    assert started == [0, 1, 2, 3, 4]
    assert isinstance(ends[5], ConnectionResetError)
    for host, agent in pairs:
        host.close()
        agent.close()
