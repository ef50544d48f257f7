"""Work that is never left behind."""

import asyncio
import logging
import threading

import pytest

from sandyard.server.core.errors import UnavailableError
from sandyard.server.tasks import Crew, concurrently, in_thread, to_the_end


async def test_what_a_crew_does_is_over_when_its_block_is_left() -> None:
    ended: list[str] = []

    async def work(name: str) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(name)

    async with Crew() as crew:
        assert crew.is_there
        crew.start(work("a"), "a failed")
        crew.start(work("b"), "b failed")
        await asyncio.sleep(0)
    assert sorted(ended) == ["a", "b"]
    assert not crew.is_there


async def test_work_that_fails_is_told_and_takes_nothing_along(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def fail(error: Exception) -> None:
        raise error

    done = asyncio.Event()

    async def go_on() -> None:
        await asyncio.sleep(0.001)
        done.set()

    with caplog.at_level(logging.DEBUG):
        async with Crew() as crew:
            crew.start(fail(UnavailableError("not now")), "one thing failed")
            crew.start(fail(UnavailableError("no matter")), "another failed", quietly=True)
            crew.start(fail(ValueError("a bug")), "a third failed")
            crew.start(go_on(), "it does not go on")
            await asyncio.wait_for(done.wait(), 30)
    told = {(one.levelname, one.getMessage()) for one in caplog.records if "failed" in one.message}
    assert told == {
        ("WARNING", "one thing failed: not now"),
        ("DEBUG", "another failed: no matter"),
        ("ERROR", "unexpected error: a third failed"),
    }


async def test_of_what_has_a_name_there_is_one_at_a_time() -> None:
    gate, begun = asyncio.Event(), 0

    async def work() -> None:
        nonlocal begun
        begun += 1
        await gate.wait()

    async with Crew() as crew:
        first = crew.start(work(), "failed", once="it")
        assert crew.start(work(), "failed", once="it") is None
        assert crew.is_at("it")
        gate.set()
        assert first is not None
        await first
        await asyncio.sleep(0)
        assert not crew.is_at("it")
        again = crew.start(work(), "failed", once="it")
        assert again is not None
        await again
    assert begun == 2


async def test_outside_its_block_a_crew_begins_nothing() -> None:
    async def work() -> None:
        raise AssertionError("it was begun")

    crew = Crew()
    assert crew.start(work(), "failed") is None
    async with crew:
        # Cancelled before its first step: the work itself is closed, not forgotten.
        crew.start(work(), "failed")
    assert crew.start(work(), "failed") is None


async def test_an_error_of_the_block_comes_out_as_it_is() -> None:
    with pytest.raises(KeyError):
        async with Crew() as crew:
            crew.start(asyncio.Event().wait(), "failed")
            raise KeyError("x")


async def test_what_runs_beside_ends_with_the_block_and_its_error_ends_the_block() -> None:
    async with concurrently(asyncio.Event().wait()) as task:
        assert not task.done()
    assert task.cancelled()

    async def fail() -> None:
        raise UnavailableError("not now")

    with pytest.raises(UnavailableError):
        async with concurrently(fail()):
            await asyncio.Event().wait()


async def test_who_is_cancelled_waits_for_the_thread_and_for_what_must_be_whole() -> None:
    release, ended = threading.Event(), []

    def block() -> None:
        release.wait(5)
        ended.append("thread")

    async def whole() -> None:
        await asyncio.sleep(0.01)
        ended.append("whole")

    for work in (in_thread(block), to_the_end(whole())):
        task = asyncio.ensure_future(work)
        await asyncio.sleep(0.002)
        task.cancel()
        asyncio.get_running_loop().call_later(0.01, release.set)
        with pytest.raises(asyncio.CancelledError):
            await task
    assert ended == ["thread", "whole"]
