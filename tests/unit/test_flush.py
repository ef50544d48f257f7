"""Flushes of a guest: each covers what was written before it, and one is at work at a time."""

import asyncio
import threading

import pytest

from sandyard.server.guest.ops import flush
from sandyard.server.guest.ops.flush import Flushes


class Disk:
    """A `sync` that ends when it may."""

    def __init__(self) -> None:
        self.begun = 0
        self.may_end = threading.Semaphore(0)

    def sync(self) -> None:
        self.begun += 1
        assert self.may_end.acquire(timeout=60)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    made = Disk()
    monkeypatch.setattr("os.sync", made.sync)
    return made


async def until_begun(disk: Disk, count: int) -> None:
    async with asyncio.timeout(60):
        while disk.begun < count:
            await asyncio.sleep(0.001)


async def test_it_returns_once_all_is_written(disk: Disk) -> None:
    flushing = asyncio.create_task(Flushes().flush())
    await until_begun(disk, 1)
    assert not flushing.done()
    disk.may_end.release()
    await asyncio.wait_for(flushing, 60)


async def test_what_was_written_during_one_is_covered_by_the_next(disk: Disk) -> None:
    flushes = Flushes()
    first = asyncio.create_task(flushes.flush())
    await until_begun(disk, 1)
    second = asyncio.create_task(flushes.flush())
    disk.may_end.release()
    await asyncio.wait_for(first, 60)
    await until_begun(disk, 2)
    assert not second.done()
    disk.may_end.release()
    await asyncio.wait_for(second, 60)


async def test_one_that_is_given_up_takes_no_second_thread(disk: Disk) -> None:
    flushes = Flushes()
    first = asyncio.create_task(flushes.flush())
    await until_begun(disk, 1)
    first.cancel()
    others = [asyncio.create_task(flushes.flush()) for _ in range(20)]
    await asyncio.wait([first], timeout=60)
    for _ in range(20):
        await asyncio.sleep(0)
    assert disk.begun == 1
    for _ in range(2):
        disk.may_end.release()
    await asyncio.wait_for(asyncio.gather(*others), 60)
    assert disk.begun == 2


async def test_nobody_waits_for_ever(disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flush, "_LIMIT_S", 0.01)
    flushes = Flushes()
    for _ in range(2):  # the second waits for the first
        with pytest.raises(TimeoutError):
            await flushes.flush()
    assert disk.begun == 1
    disk.may_end.release()
    async with asyncio.timeout(60):
        while flushes._latest is None or not flushes._latest.done():
            await asyncio.sleep(0.001)
