"""Hypervisors in the background stand still while a create is served, and no longer."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from sandyard.server.drivers import background
from sandyard.server.drivers.background import Background
from sandyard.server.drivers.processes import DetachedProcess, boot_id, start_time

pytestmark = pytest.mark.slow  # holds last a second at most: for that, time must pass


@pytest.fixture
def process() -> Iterator[DetachedProcess]:
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    started = start_time(child.pid)
    assert started is not None
    found = DetachedProcess.find(child.pid, started=started, boot=boot_id())
    assert found is not None
    yield found
    found.close()
    child.kill()
    child.wait()


def is_stopped(process: DetachedProcess) -> bool:
    return Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


async def until(process: DetachedProcess, *, stopped: bool) -> None:
    async with asyncio.timeout(20):
        while is_stopped(process) != stopped:
            await asyncio.sleep(0.001)


async def test_a_hold_stops_what_is_in_the_background_and_ends(process: DetachedProcess) -> None:
    made = Background()
    with made.entry() as entry:
        entry.add(process)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 10
        await until(process, stopped=False)
        made.hold()
        await until(process, stopped=True)
        await made.calm()
        await until(process, stopped=False)


async def test_what_joins_during_a_hold_is_stopped_and_what_leaves_runs(
    process: DetachedProcess,
) -> None:
    made = Background()
    made.hold()
    with suppress(RuntimeError), made.entry() as entry:
        entry.add(process)
        await until(process, stopped=True)
        raise RuntimeError
    await until(process, stopped=False)
    made.resume()


async def test_holds_leave_at_least_half_of_the_time(
    process: DetachedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Creates without a pause between them do not keep the pool from being filled."""
    monkeypatch.setattr(background, "_HOLD_S", 0.03)
    monkeypatch.setattr(background, "_HOLD_MAX_S", 0.1)
    made = Background()
    loop = asyncio.get_running_loop()
    held = 0.0
    with made.entry() as entry:
        entry.add(process)
        began = last = loop.time()
        while last - began < 1.5:
            made.hold()
            was_held = is_stopped(process)
            await asyncio.sleep(0.002)
            now = loop.time()
            held += (now - last) * was_held
            last = now
    assert 0.2 < held / (last - began) < 0.6
    made.resume()


async def test_a_hold_that_is_extended_ends_all_the_same(
    process: DetachedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_HOLD_S", 30)
    monkeypatch.setattr(background, "_HOLD_MAX_S", 0.05)
    made = Background()
    with made.entry() as entry:
        entry.add(process)
        made.hold()
        made.hold()
        await made.calm()
        await until(process, stopped=False)
