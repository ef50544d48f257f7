"""Who is held still when the host's disk runs full."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sandyard.server.drivers.contract import End
from sandyard.server.links.local import SystemClock
from sandyard.server.node.machines.watch import Pulse
from sandyard.server.node.pressure import HELD, Pressure


class Writer:
    """Stands in for a machine whose disk grows by so much from look to look."""

    def __init__(self, grows: int, size: int = 0) -> None:
        self.grows = grows
        self.body = SimpleNamespace(used_mib=size)
        self.guest = SimpleNamespace(pulse=Pulse())
        self.record = SimpleNamespace(sandbox_id="x")

    @property
    def is_held(self) -> bool:
        return bool(self.guest.pulse.held_for == HELD)

    async def hold_still(self, why: End) -> None:
        self.guest.pulse.held_for = why

    async def let_go_on(self) -> None:
        self.guest.pulse.held_for = None


async def run(tmp_path: Path, writers: list[Writer], *, free: int, looks: int) -> int:
    """Let them write until so many looks have passed, and return what is left."""
    left = free
    pressure = Pressure(
        tmp_path, little_mib=512, running=lambda: _all(writers), clock=SystemClock(),
        on_change=lambda: None, free=lambda _: left,
    )  # fmt: skip
    for _ in range(looks):
        await pressure.look()
        for one in writers:
            if not one.is_held:
                one.body.used_mib += one.grows
                left -= one.grows
    return left


def _all(writers: list[Writer]) -> Any:
    return writers


async def test_the_one_that_writes_is_held_and_not_the_largest(tmp_path: Path) -> None:
    large, fast, idle = Writer(0, 9000), Writer(50), Writer(0)
    left = await run(tmp_path, [large, fast, idle], free=700, looks=30)
    assert (fast.is_held, large.is_held, idle.is_held) == (True, False, False)
    assert left > 300


async def test_many_slow_writers_are_held_before_nothing_is_left(tmp_path: Path) -> None:
    slow, idle = [Writer(3) for _ in range(10)], Writer(0, 5000)
    left = await run(tmp_path, [*slow, idle], free=600, looks=300)
    assert left > 64
    assert all(one.is_held for one in slow)
    assert not idle.is_held


async def test_nobody_is_held_where_nobody_writes(tmp_path: Path) -> None:
    quiet = [Writer(0, 1000) for _ in range(4)]
    await run(tmp_path, quiet, free=100, looks=10)
    assert not any(one.is_held for one in quiet)
