"""Starts with a key, as the agent remembers them."""

import asyncio
from typing import Any, cast

import pytest

from sandyard.server.core import ops
from sandyard.server.guest import repeats
from sandyard.server.guest.repeats import Repeats
from sandyard.server.guest.system import RefusedError, ReusedKeyError
from sandyard.server.guest.table import Entry


class Begin:
    """Starts processes, each when it is told to."""

    def __init__(self) -> None:
        self.count = 0
        self.go = asyncio.Event()
        self.fails = False

    async def __call__(self) -> Entry:
        self.count += 1
        await self.go.wait()
        if self.fails:
            raise RefusedError("cannot")
        return cast("Any", object())  # type: ignore[no-any-return]  # only passed on


async def test_starts_at_once_with_one_key_are_one() -> None:
    known, begin, wish = Repeats(), Begin(), ops.Start("true", key="k")
    waiting = [asyncio.ensure_future(known.once(wish, begin)) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(ReusedKeyError):
        await known.once(ops.Start("false", key="k"), begin)
    begin.go.set()
    first, *others = await asyncio.gather(*waiting)
    assert [one is first for one in others] == [True, True]
    assert await known.once(wish, begin) is first
    assert begin.count == 1
    assert await known.once(ops.Start("true"), begin) is not first
    assert await known.once(ops.Start("true", key="other"), begin) is not first


async def test_a_start_that_failed_is_tried_again() -> None:
    known, begin, wish = Repeats(), Begin(), ops.Start("true", key="k")
    begin.fails = True
    waiting = [asyncio.ensure_future(known.once(wish, begin)) for _ in range(2)]
    await asyncio.sleep(0)
    begin.go.set()
    for one in waiting:  # the second tries itself once the first has failed
        with pytest.raises(RefusedError):
            await one
    assert begin.count == 2
    begin.fails = False
    assert await known.once(wish, begin) is await known.once(wish, begin)


async def test_the_oldest_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(repeats, "_KEPT_MAX", 10)
    known, begin = Repeats(), Begin()
    begin.go.set()
    made = [await known.once(ops.Start("true", key=str(one)), begin) for one in range(30)]
    assert await known.once(ops.Start("true", key="29"), begin) is made[29]
    assert await known.once(ops.Start("true", key="0"), begin) is not made[0]
    monkeypatch.setattr(repeats, "_KEPT_S", -1.0)
    assert await known.once(ops.Start("true", key="29"), begin) is not made[29]
