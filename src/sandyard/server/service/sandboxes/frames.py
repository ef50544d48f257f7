"""Reads what agents send after an answer, frame by frame, with limits on pace and silence."""

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from sandyard.server.core.codec import CodecError, decode
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.errors import (
    AgentError,
    LimitReachedError,
    UnavailableError,
)
from sandyard.server.core.limits import Allotment
from sandyard.server.core.wire import FRAME_MAX, Channel, Decoder, Frame, WireError, encode_frame

STILL_S = 60.0
"""For so long an agent may stand still in the middle of something."""
OPEN_MAX = 256
"""So many things that take long may be open at once, an organization."""
_READ = 256 * 1024
_FRAMES_A_TURN = 200
_T = TypeVar("_T")


class PacedStream(ByteStream, Protocol):
    """A stream with a limited frame rate. See `Reach`."""

    async def spend(self, frames: int) -> None:
        """Count decoded frames, and return once more may be decoded."""
        ...


class Open:
    """Counts open streams per organization, so that none takes all connections."""

    def __init__(self) -> None:
        self._shares = Allotment(each=OPEN_MAX)

    @contextmanager
    def one(self, org_id: str) -> Iterator[None]:
        """Count one while the block lasts.

        Raises:
            LimitReachedError: the organization has too many open.
        """
        if not self._shares.take(org_id, 1):
            raise LimitReachedError(
                f"cannot open another file or stream: {OPEN_MAX} are open; close some first",
                limit=OPEN_MAX,
            )
        try:
            yield
        finally:
            self._shares.give_back(org_id, 1)


async def frames_of(
    stream: PacedStream, clock: Clock, *, still_s: float | None = None
) -> AsyncIterator[Frame]:
    """Yield frames up to the last one. Between frames the agent may be silent for STILL_S, or
    `still_s`.

    Raises:
        UnavailableError: the agent is silent for too long, or closed the connection early.
        ConflictError: the sandbox was paused or ended.
        InternalError: the agent violated the protocol.
    """
    decoder, frames = Decoder(), 0
    while True:
        try:
            async with clock.timeout(STILL_S if still_s is None else still_s):
                data = await stream.read(_READ)
        except TimeoutError as error:
            raise UnavailableError("the agent of the sandbox stopped responding") from error
        if not data:
            raise UnavailableError(
                "the agent of the sandbox closed the connection; if it restarted, its processes"
                " have ended"
            )
        decoder.feed(data)
        while True:
            try:
                frame = decoder.take_frame()
            except WireError as error:
                raise AgentError from error
            if frame is None:
                break
            frames += 1
            yield frame
            if frame.channel is Channel.EXIT:
                return
            if frames == _FRAMES_A_TURN:
                await stream.spend(frames)
                frames = 0
        await stream.spend(frames)
        frames = 0


async def send(stream: ByteStream, clock: Clock, payload: bytes) -> None:
    """Send a frame of input; an empty one ends the input.

    Raises:
        UnavailableError: the agent does not read it, or is gone.
    """
    try:
        async with clock.timeout(STILL_S):
            await stream.write(encode_frame(Channel.STDIN, payload))
    except TimeoutError as error:
        raise UnavailableError("the agent of the sandbox stopped responding") from error


async def pass_on(
    body: AsyncIterator[bytes], stream: ByteStream, ending: "asyncio.Task[Any]", clock: Clock
) -> None:
    """Send a stream as input, and return when the other side has finished.

    Only its acceptance of data, and its end after the last byte, have a time limit. The stream
    itself may take any time.
    """
    try:
        async for piece in body:
            for start in range(0, len(piece), FRAME_MAX):
                if ending.done():
                    return
                await send(stream, clock, piece[start : start + FRAME_MAX])
        if not ending.done():
            await send(stream, clock, b"")
    except UnavailableError:
        if not ending.done():
            raise
    try:
        async with clock.timeout(STILL_S):
            await asyncio.wait([ending])
    except TimeoutError as error:
        raise UnavailableError("the agent of the sandbox stopped responding") from error


def decoded(kind: type[_T], frame: Frame) -> _T:
    """Return a frame's JSON.

    Raises:
        AgentError: it is invalid.
    """
    try:
        return decode(kind, json.loads(frame.payload))
    except (CodecError, ValueError, RecursionError) as error:
        raise AgentError from error
