"""What agents send after an answer: bounded, and never waited for without end."""

import asyncio
import json
from collections import Counter
from typing import Any

import pytest
from tests.support.clock import DrivenClock

from sandyard.server.core import ops
from sandyard.server.core.codec import encode
from sandyard.server.core.collect import Collector
from sandyard.server.core.errors import (
    AgentError,
    ConflictError,
    InvalidArgumentError,
    LimitReachedError,
    NotFoundError,
    UnavailableError,
)
from sandyard.server.core.wire import Answer, Channel, encode_frame
from sandyard.server.links.local import SystemClock
from sandyard.server.node.agent import _refuse
from sandyard.server.service.sandboxes import frames
from sandyard.server.service.sandboxes.frames import Open, decoded, frames_of, send
from sandyard.server.service.sandboxes.pace import FrameRates


class Agent:
    """Sends what it is given, and then stands still or breaks off."""

    def __init__(self, *pieces: bytes, stands_still: bool = False) -> None:
        self._pieces = list(pieces)
        self._stands_still = stands_still
        self.spent: list[int] = []

    async def read(self, limit: int) -> bytes:
        if self._pieces:
            return self._pieces.pop(0)
        if self._stands_still:
            await asyncio.Event().wait()
        return b""

    async def write(self, data: bytes) -> None:
        if self._stands_still:
            await asyncio.Event().wait()

    async def write_eof(self) -> None:
        pass

    async def spend(self, frames: int) -> None:
        self.spent.append(frames)
        await asyncio.sleep(0)


async def test_frames_come_as_they_were_cut_and_end_with_the_last() -> None:
    data = encode_frame(Channel.STDOUT, b"abc") + encode_frame(Channel.EXIT, b"{}") + b"junk"
    agent: Any = Agent(data[:4], data[4:])
    found = [one async for one in frames_of(agent, SystemClock())]
    assert [one.payload for one in found] == [b"abc", b"{}"]
    assert decoded(ops.FileEnd, found[1]) == ops.FileEnd()


@pytest.mark.parametrize(
    ("pieces", "error"),
    [((), UnavailableError), ((b"\xff" * 9,), AgentError), ((b"\0\xff\0\0\0",), AgentError)],
)
async def test_nonsense_and_an_early_end_are_errors(
    pieces: tuple[bytes, ...], error: type[Exception]
) -> None:
    agent: Any = Agent(*pieces)
    with pytest.raises(error):
        [one async for one in frames_of(agent, SystemClock())]


async def test_an_agent_that_stands_still_is_not_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agent: Any = Agent(encode_frame(Channel.STDOUT, b"x"), stands_still=True)
    with pytest.raises(UnavailableError, match="stopped responding"):
        [one async for one in frames_of(agent, SystemClock(), still_s=0.02)]
    monkeypatch.setattr(frames, "STILL_S", 0.02)
    with pytest.raises(UnavailableError, match="stopped responding"):
        await send(agent, SystemClock(), b"x")


async def test_tiny_frames_leave_the_others_their_turn() -> None:
    # No more than may come at once: it is not for a wait that the others have their turn.
    agent: Any = Agent(encode_frame(Channel.STDOUT, b"") * 1_900)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    waiting = asyncio.ensure_future(others())
    with pytest.raises(UnavailableError):
        async for _ in frames_of(agent, SystemClock()):
            pass
    waiting.cancel()
    assert turns >= 8
    assert sum(agent.spent) == 1_900
    assert max(agent.spent) <= 200


async def test_all_streams_of_a_sandbox_and_of_an_organization_have_one_budget() -> None:
    clock = DrivenClock()
    pace, decoded = FrameRates(clock), Counter[str]()

    async def stream(sandbox_id: str, org_id: str) -> None:
        while True:
            decoded[sandbox_id] += 200
            decoded[org_id] += 200
            await pace.spend(sandbox_id, org_id, 200)

    names = [("box", "org")] * 30 + [(f"other {n}", "org") for n in range(10)] + [("b", "o")]
    streams = [asyncio.ensure_future(stream(*one)) for one in names]
    for _ in range(20):
        await clock.advance(0.5)
    for one in streams:
        one.cancel()
    await asyncio.wait(streams)
    # Ten seconds of what each may have, and what may come at once.
    slack = 200 * len(names) + 2_000
    assert decoded["box"] <= 10 * 10_000 + slack
    assert decoded["org"] <= 10 * 20_000 + slack
    assert 10 * 10_000 - slack <= decoded["b"] <= 10 * 10_000 + slack  # nobody else's budget


async def test_an_honest_stream_is_not_slowed_down() -> None:
    clock = DrivenClock()
    pace = FrameRates(clock)
    for _ in range(10):
        await pace.spend("box", "org", 200)  # no time passes, and none is waited for


def test_a_collector_looks_at_so_many_frames_at_a_time() -> None:
    end = encode(ops.Ended(exit_code=3, duration_ms=5, timed_out=False))
    collector = Collector(100)
    data = encode_frame(Channel.STDOUT, b"x") * 1_000
    assert collector.feed(data, most=400) is None
    assert (collector.frames, collector.is_behind) == (400, True)
    collector.feed(b"", most=600)
    assert collector.frames == 1_000
    collector.feed(b"", most=600)
    assert not collector.is_behind
    ended = collector.feed(encode_frame(Channel.EXIT, json.dumps(end).encode()), most=1)
    assert ended is not None
    assert (ended.exit_code, collector.stdout, collector.is_truncated) == (3, b"x" * 100, True)


def test_what_is_open_is_counted_by_organization(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "OPEN_MAX", 2)
    opened = Open()
    with (
        opened.one("a"),
        opened.one("a"),
        opened.one("b"),
        pytest.raises(LimitReachedError, match="2 are open"),
        opened.one("a"),
    ):
        pass
    with opened.one("a"):
        pass


@pytest.mark.parametrize(
    "payload", [b"", b"[]", b"{", b"[" * 100_000, json.dumps({"count": "x"}).encode()]
)
def test_what_makes_no_sense_is_said_to(payload: bytes) -> None:
    from sandyard.server.core.wire import Frame

    with pytest.raises(AgentError):
        decoded(ops.FileEnd, Frame(Channel.EXIT, payload))


def test_a_guest_says_why_to_users_and_not_to_its_node() -> None:
    for code, kind in (("absent", NotFoundError), ("conflict", ConflictError)):
        said = Answer({}, error=code, message="no")
        with pytest.raises(kind):
            _refuse(said, is_for_user=True)
        with pytest.raises(InvalidArgumentError):
            _refuse(said, is_for_user=False)
    assert not ops.SetUp.asked_by_users
    assert not ops.Wake.asked_by_users
    assert ops.Stat.asked_by_users
