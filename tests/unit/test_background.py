"""Hypervisors in the background stand still while a create is served, and no longer."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from sandyard.server.drivers import background
from sandyard.server.drivers.background import Background
from sandyard.server.drivers.processes import DetachedProcess, boot_id, start_time

pytestmark = pytest.mark.slow  # holds last a second at most: for that, time must pass


@pytest.fixture
def process() -> Iterator[DetachedProcess]:
    # In a session of its own: its low priority is that of the whole session.
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"], start_new_session=True)
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


async def test_a_hold_stops_what_is_in_the_background_and_ends(
    process: DetachedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_HOLD_S", 1.0)
    made = Background()
    with made.entry() as entry:
        entry.add(process)
        assert os.getpriority(os.PRIO_PROCESS, process.pid) == 10
        await until(process, stopped=False)
        made.hold()
        await made.calm()
        await until(process, stopped=False)
        monkeypatch.setattr(background, "_HOLD_S", 30.0)
        monkeypatch.setattr(background, "_HOLD_MAX_S", 30.0)
        monkeypatch.setattr(made, "_next_hold", 0.0)
        made.hold()
        await until(process, stopped=True)
        made.resume()
        await until(process, stopped=False)


async def test_what_joins_during_a_hold_is_stopped_and_what_leaves_runs(
    process: DetachedProcess, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "_HOLD_S", 30.0)
    monkeypatch.setattr(background, "_HOLD_MAX_S", 30.0)
    made = Background()
    made.hold()
    with suppress(RuntimeError), made.entry() as entry:
        entry.add(process)
        await until(process, stopped=True)
        raise RuntimeError
    await until(process, stopped=False)
    made.resume()


class Time:
    """A loop's time, moved by hand."""

    def __init__(self) -> None:
        self.now = 0.0
        self.due: list[tuple[float, Callable[[], None]]] = []

    def time(self) -> float:
        return self.now

    def call_at(self, at: float, act: Callable[[], None]) -> Any:
        one = (at, act)
        self.due.append(one)

        def cancel() -> None:
            if one in self.due:
                self.due.remove(one)

        return SimpleNamespace(cancel=cancel)

    def move(self, seconds: float) -> None:
        self.now += seconds
        for at, act in list(self.due):
            if at <= self.now:
                act()


def test_holds_leave_at_least_half_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Creates without a pause between them do not keep the pool from being filled."""
    time, sent = Time(), [signal.SIGCONT]
    monkeypatch.setattr(background, "asyncio", SimpleNamespace(
        get_running_loop=lambda: time, Event=asyncio.Event,
    ))  # fmt: skip
    monkeypatch.setattr(background, "set_nice", lambda *_: None)
    made, process = Background(), SimpleNamespace(pid=0, send=sent.append)
    held = 0
    with made.entry() as entry:
        entry.add(process)  # type: ignore[arg-type]
        for _ in range(10_000):
            made.hold()
            held += sent[-1] is signal.SIGSTOP
            time.move(0.002)
    assert 0.4 < held / 10_000 <= 0.51
    assert sent[-1] is signal.SIGCONT


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
