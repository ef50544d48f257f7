"""Who is held still when the host's disk runs full."""

from pathlib import Path
from typing import Any

from sandyard.server.core.contracts.node import Phase
from sandyard.server.drivers.contract import End
from sandyard.server.links.local import SystemClock
from sandyard.server.node.pressure import HELD, Pressure


class Writer:
    """Stands in for the owner of a machine whose disk grows by so much from look to look."""

    sandbox_id = "x"
    is_stalled = False

    def __init__(self, grows: int, size: int = 0) -> None:
        self.grows = grows
        self.used_mib = size
        self.phase = Phase.RUNNING

    @property
    def is_held(self) -> bool:
        return self.phase is Phase.HELD

    async def hold(self, why: End) -> None:
        assert why == HELD
        self.phase = Phase.HELD

    async def release(self) -> None:
        self.phase = Phase.RUNNING


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
                one.used_mib += one.grows
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
