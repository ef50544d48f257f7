"""The frames on a connection of the tunnel, of limited size.

    kind     1 byte
    length   4 bytes, big-endian
    payload  length bytes

The control plane sends a request (`ASK`, JSON), and the node accepts or refuses it. Then both send
data until each has sent `END`. `LEAVE` ends the operation; after the node has returned it, the
connection can be used for the next one. Each side sends at most `WINDOW` bytes that the other has
not acknowledged (`TAKEN`), so both can always read, and control frames are never delayed by data. A
side that violates this is disconnected.
"""

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Final

from sandyard.server.core.errors import SandyardError, error_of, kind_of
from sandyard.server.core.wire import Versions

VERSIONS: Final = Versions(now=1, suffices=1, oldest=1)
"""See there for what changes them."""
PIECE: Final = 256 * 1024
WINDOW: Final = 4 * PIECE
_HEAD_MAX: Final = 16 * 1024 * 1024  # an operation and what goes with it; see core.wire.REQUEST_MAX
_HEADER: Final = 5


class FrameKind(IntEnum):
    """The kind of a frame."""

    ASK = 1
    ANSWER = 2
    REFUSE = 3  # before an answer, or in the place of more bytes
    DATA = 4
    END = 5  # of the bytes in this direction
    LEAVE = 6
    TAKEN = 7  # how many bytes, in 4 bytes, big-endian


_LONGEST: Final[Mapping[FrameKind, int]] = {
    FrameKind.ASK: _HEAD_MAX,
    FrameKind.ANSWER: _HEAD_MAX,
    FrameKind.REFUSE: 64 * 1024,
    FrameKind.DATA: PIECE,
    FrameKind.END: 0,
    FrameKind.LEAVE: 0,
    FrameKind.TAKEN: 4,
}


class BrokenError(Exception):
    """The connection was lost, or the other side broke the protocol; it cannot be used any more."""


@dataclass(frozen=True)
class Frame:
    """One frame."""

    kind: FrameKind
    payload: bytes


class Line:
    """A connection that carries frames."""

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        longest: int = _HEAD_MAX,
    ) -> None:
        self._longest = longest
        self._reader = reader
        self._writer = writer
        self._header: bytes | None = None  # of a frame whose rest has not come yet

    @property
    def is_open(self) -> bool:
        """Whether the connection is open, as far as is known."""
        is_lost = self._reader.at_eof() or self._reader.exception() is not None
        return not is_lost and not self._writer.is_closing()

    async def hear(self) -> Frame:
        """Return the next frame. If cancelled, no frame is lost.

        Raises:
            BrokenError: the connection has ended.
        """
        try:
            if self._header is None:
                self._header = await self._reader.readexactly(_HEADER)
            kind, length = FrameKind(self._header[0]), int.from_bytes(self._header[1:], "big")
            if length > min(_LONGEST[kind], self._longest):
                raise BrokenError("a frame is too long")
            payload = await self._reader.readexactly(length) if length else b""
            self._header = None
            return Frame(kind, payload)
        except (OSError, EOFError, ValueError) as error:
            raise BrokenError(str(error)) from error

    async def say(self, kind: FrameKind, payload: bytes = b"") -> None:
        """Send a frame, and return once there is room for more.

        Raises:
            BrokenError: the connection has ended.
        """
        if self._writer.is_closing():
            raise BrokenError("the connection is closed")
        try:
            self._writer.write(bytes((kind,)) + len(payload).to_bytes(4, "big"))
            if payload:
                self._writer.write(payload)
            await self._writer.drain()
        except OSError as error:
            raise BrokenError(str(error)) from error

    def hang_up(self) -> None:
        """Close the connection immediately."""
        self._writer.transport.abort()


def head(values: Mapping[str, object]) -> bytes:
    """Return a payload with these values."""
    return json.dumps(values).encode()


def values_of(payload: bytes) -> dict[str, Any]:
    """Return the values in a frame.

    Raises:
        BrokenError: they are malformed.
    """
    try:
        found = json.loads(payload)
    except (ValueError, RecursionError) as error:
        raise BrokenError("a frame is not JSON") from error
    if not isinstance(found, dict):
        raise BrokenError("a frame is not an object")
    return found


def refusal(error: SandyardError) -> bytes:
    """Return a payload with an error."""
    return head(
        {
            "kind": kind_of(error),
            "code": error.code.value,
            "message": error.text,
            "facts": error.facts,
        }
    )


def refused(payload: bytes) -> SandyardError:
    """Return the error in a payload.

    Raises:
        BrokenError: it is malformed.
    """
    values = values_of(payload)
    code, message, facts = values.get("code"), values.get("message"), values.get("facts")
    if not isinstance(code, str) or not isinstance(message, str) or not isinstance(facts, dict):
        raise BrokenError("an error has an invalid format")
    known = {str(name): one for name, one in facts.items() if isinstance(one, str | int)}
    return error_of(str(values.get("kind")), code, message, known)
