"""How long a machine that boots is waited for, on a host that has no time for it."""

import asyncio
import os
from types import SimpleNamespace
from typing import Any

import pytest
from tests.support.clock import DrivenClock, count_threads

from sandyard.server.core.errors import DeadlineExceededError, UnavailableError
from sandyard.server.drivers.processes import starved_s
from sandyard.server.node.machines import start


class Machine:
    """Boots for so many seconds and says nothing meanwhile."""

    handle = {"pid": os.getpid()}  # noqa: RUF012 - one for all

    async def wait(self) -> None:
        await asyncio.Event().wait()

    async def stall(self) -> None:
        return None

    async def console(self) -> bytes:
        return b""


async def boot(
    monkeypatch: pytest.MonkeyPatch, *, takes_s: float, starved: float
) -> "asyncio.Task[None]":
    """Return how a boot ended that takes so long; of its time a part is waited for a processor."""
    clock = DrivenClock()
    monkeypatch.setattr(start, "starved_s", lambda _: starved * clock.monotonic())

    class Link:
        async def ask(self, *_: object, **__: object) -> None:
            if clock.monotonic() < takes_s:
                raise UnavailableError("not yet")

    limits = SimpleNamespace(boot_s=60.0, no_progress_s=25.0, poll_s=1.0)
    means: Any = SimpleNamespace(clock=clock, limits=limits, patience=lambda seconds: seconds)
    body: Any = SimpleNamespace(append_console=lambda _: None)
    machine: Any = Machine()
    link: Any = Link()
    booting = asyncio.create_task(start.await_agent(machine, link, body, means))
    for _ in range(2000):
        await asyncio.sleep(0.001)
        if booting.done():
            break
        await clock.advance(1.0)
    await asyncio.wait([booting])
    return booting


async def test_a_machine_that_gets_no_processor_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert (await boot(monkeypatch, takes_s=200, starved=0.88)).exception() is None
    assert (await boot(monkeypatch, takes_s=20, starved=0.0)).exception() is None


@pytest.mark.parametrize("starved", [0.0, 0.5, 1.0])
async def test_a_machine_that_stands_still_is_given_up(
    monkeypatch: pytest.MonkeyPatch, starved: float
) -> None:
    """Whatever the kernel counts: ten times its limit is the end."""
    ended = (await boot(monkeypatch, takes_s=10**9, starved=starved)).exception()
    assert isinstance(ended, DeadlineExceededError)
    assert "no progress" in ended.message


@pytest.mark.parametrize(("starved", "takes_s"), [(0.0, 30), (0.5, 60), (1.0, 300)])
async def test_time_without_a_processor_does_not_count_up_to_ten_times_the_limit(
    monkeypatch: pytest.MonkeyPatch, starved: float, takes_s: float
) -> None:
    count_threads()
    clock = DrivenClock()
    monkeypatch.setattr(start, "starved_s", lambda _: 1000 + starved * clock.monotonic())
    machine: Any = Machine()
    means: Any = SimpleNamespace(clock=clock)
    began = clock.monotonic()
    waiting = asyncio.create_task(start.use_up(machine, 30, means))
    for _ in range(2000):
        await asyncio.sleep(0.001)
        if waiting.done():
            break
        await clock.advance(1.0)
    await asyncio.wait([waiting])
    # The clock goes on while what was starved is read in a thread.
    assert takes_s <= clock.monotonic() - began <= takes_s * 1.5 + 2


def test_what_a_process_waited_for_is_read_from_the_kernel() -> None:
    assert 0 <= starved_s(os.getpid()) <= starved_s(os.getpid()) + 1e-9
    assert starved_s(2**30) == 0
