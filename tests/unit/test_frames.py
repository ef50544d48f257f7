"""What agents send after an answer: bounded, and never waited for without end."""

import asyncio
import json
from typing import Any

import pytest

from sandyard.server.core import ops
from sandyard.server.core.errors import (
    ConflictError,
    InternalError,
    InvalidArgumentError,
    LimitReachedError,
    NotFoundError,
    UnavailableError,
)
from sandyard.server.core.wire import Answer, Channel, encode_frame
from sandyard.server.links.local import SystemClock
from sandyard.server.node.agent import _refuse
from sandyard.server.service.sandboxes import frames
from sandyard.server.service.sandboxes.frames import Open, frames_of, send, told


class Agent:
    """Sends what it is given, and then stands still or breaks off."""

    def __init__(self, *pieces: bytes, stands_still: bool = False) -> None:
        self._pieces = list(pieces)
        self._stands_still = stands_still

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


async def test_frames_come_as_they_were_cut_and_end_with_the_last() -> None:
    data = encode_frame(Channel.STDOUT, b"abc") + encode_frame(Channel.EXIT, b"{}") + b"junk"
    agent: Any = Agent(data[:4], data[4:])
    found = [one async for one in frames_of(agent, SystemClock())]
    assert [one.payload for one in found] == [b"abc", b"{}"]
    assert told(ops.FileEnd, found[1]) == ops.FileEnd()


@pytest.mark.parametrize(
    ("pieces", "error"),
    [((), UnavailableError), ((b"\xff" * 9,), InternalError), ((b"\0\xff\0\0\0",), InternalError)],
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
    with pytest.raises(UnavailableError, match="go on"):
        [one async for one in frames_of(agent, SystemClock(), still_s=0.02)]
    monkeypatch.setattr(frames, "STILL_S", 0.02)
    with pytest.raises(UnavailableError, match="go on"):
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

    with pytest.raises(InternalError):
        told(ops.FileEnd, Frame(Channel.EXIT, payload))


def test_a_guest_says_why_to_users_and_not_to_its_node() -> None:
    for code, kind in (("absent", NotFoundError), ("conflict", ConflictError)):
        said = Answer({}, error=code, message="no")
        with pytest.raises(kind):
            _refuse(said, is_told=True)
        with pytest.raises(InvalidArgumentError):
            _refuse(said, is_told=False)
    assert not ops.SetUp.asked_by_users
    assert not ops.Wake.asked_by_users
    assert ops.Stat.asked_by_users
