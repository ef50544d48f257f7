"""The byte streams of one operation on a tunnel connection; used by both sides."""

import asyncio
from collections import deque

from typing_extensions import override

from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.errors import SandyardError, UnavailableError
from sandyard.server.links.tunnel.frames import (
    PIECE,
    WINDOW,
    BrokenError,
    FrameKind,
    Line,
    refusal,
    refused,
)

_AT_ONCE = 64


class TunnelExchange(ByteStream):
    """See core.contracts.node.ByteStream. Nothing arrives unless `run` runs concurrently."""

    def __init__(self, line: Line) -> None:
        self._line = line
        self._came: deque[bytes] = deque()
        self._held = 0  # bytes that came and were not taken
        self._owed = 0  # bytes taken but not yet acknowledged
        self._may_send = WINDOW
        self._changed = asyncio.Condition()
        self._has_ended = False
        self._has_sent_end = False  # that nothing more is written
        self._trouble: SandyardError | None = None
        self._is_over = False

    async def run(self) -> None:
        """Receive frames until the other side has left.

        Raises:
            BrokenError: the connection was lost, or the other side broke the protocol.
        """
        heard = 0
        try:
            while True:
                frame = await self._line.hear()
                match frame.kind:
                    case FrameKind.LEAVE:
                        return
                    case FrameKind.DATA if frame.payload and not self._has_ended:
                        self._came.append(frame.payload)
                        self._held += len(frame.payload)
                        if self._held > WINDOW:
                            raise BrokenError("more data was sent than the window allows")
                    case FrameKind.END if not self._has_ended:
                        self._has_ended = True
                    case FrameKind.REFUSE:
                        self._trouble = refused(frame.payload)
                    case FrameKind.TAKEN if any(frame.payload):
                        self._may_send += int.from_bytes(frame.payload, "big")
                        if self._may_send > WINDOW:
                            raise BrokenError("more data was acknowledged than was sent")
                    case _:
                        raise BrokenError("unexpected frame")
                await self._tell()
                heard += 1
                if not heard % _AT_ONCE:  # received frames are handled without a pause
                    await asyncio.sleep(0)
        except BrokenError:
            self._trouble = UnavailableError("the connection to the node was lost")
            raise
        finally:
            self._is_over = True
            await self._tell()

    def end(self) -> None:
        """Stop sending: the connection may carry another operation from now on."""
        self._is_over = True

    async def _tell(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    @override
    async def read(self, limit: int) -> bytes:
        """Return what arrived before an error, then raise the error."""
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._came or self._has_ended or self._trouble or self._is_over
            )
        if not self._came:
            if self._has_ended:
                return b""
            if self._trouble is not None:
                raise self._trouble
            raise UnavailableError("the other side has left")
        data = self._came.popleft()
        if len(data) > limit:
            self._came.appendleft(data[limit:])
            data = data[:limit]
        self._held -= len(data)
        self._owed += len(data)
        if self._owed >= WINDOW // 2 and not self._is_over:
            owed, self._owed = self._owed, 0
            await self._say(FrameKind.TAKEN, owed.to_bytes(4, "big"))
        return data

    @override
    async def write(self, data: bytes) -> None:
        for start in range(0, len(data), PIECE):
            piece = data[start : start + PIECE]
            await self._until_there_is_room(len(piece))
            if self._trouble is not None:
                raise self._trouble
            if self._is_over:
                raise UnavailableError("the other side has left")
            self._may_send -= len(piece)
            await self._say(FrameKind.DATA, piece)

    async def _until_there_is_room(self, size: int) -> None:
        async with self._changed:
            await self._changed.wait_for(
                lambda: self._may_send >= size or self._trouble is not None or self._is_over
            )

    @override
    async def write_eof(self) -> None:
        """End the stream; calling it again has no effect."""
        if not self._has_sent_end:
            self._has_sent_end = True
            await self._say(FrameKind.END)

    async def refuse(self, error: SandyardError) -> None:
        """Send an error to the other side in place of more bytes."""
        await self._say(FrameKind.REFUSE, refusal(error))

    async def _say(self, kind: FrameKind, payload: bytes = b"") -> None:
        if self._is_over:  # the connection may be another operation's by now
            raise UnavailableError("the operation is over")
        try:
            await self._line.say(kind, payload)
        except BrokenError as error:
            raise UnavailableError("the connection to the node was lost") from error
