"""A client for RFB (RFC 6143): screenshots, keys, a pointer.

The peer is an untrusted guest: every length is limited, and invalid data closes the connection.
"""

import asyncio
import struct
import zlib
from dataclasses import dataclass

from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.errors import UnavailableError

_SIDE_MAX = 8192
_AREA_MAX = 4096 * 2304
_STRIP = 1024 * 1024
_SIZES_MAX = 8
_STEPS_MAX, _STEPS_A_TURN = 20_000, 100
_NAME_MAX = 4096
_CUT_TEXT_MAX = 1024 * 1024
_PIECE = 256 * 1024
_RAW, _DESKTOP_SIZE = 0, -223
_TRUE_COLOUR = struct.pack(">BBBBHHHBBBxxx", 32, 24, 0, 1, 255, 255, 255, 16, 8, 0)
"""Four bytes a pixel: blue, green, red, nothing (section 7.4)."""


@dataclass(frozen=True)
class Picture:
    """A screenshot; `pixels` are red, green and blue, row by row."""

    width: int
    height: int
    pixels: bytes | bytearray

    def png(self) -> bytes:
        """Return it as a PNG (RFC 2083)."""
        stride = self.width * 3
        rows = b"".join(
            b"\0" + self.pixels[start : start + stride]
            for start in range(0, stride * self.height, stride)
        )
        head = struct.pack(">IIBBBBB", self.width, self.height, 8, 2, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + b"".join(
            (
                _chunk(b"IHDR", head),
                _chunk(b"IDAT", zlib.compress(rows, 1)),
                _chunk(b"IEND", b""),
            )
        )


class Screen:
    """One connection to a screen. Call `meet` first."""

    def __init__(self, stream: ByteStream) -> None:
        self._stream = stream
        self._buffer = bytearray()
        self._steps = 0
        self.width = self.height = 0

    async def meet(self) -> None:
        """Perform the handshake; other viewers remain connected.

        Raises:
            UnavailableError: the peer is not an RFB server, or requires a password.
        """
        version = await self._take(12)
        if not version.startswith(b"RFB 003."):
            raise _nonsense()
        await self._stream.write(b"RFB 003.008\n")
        kinds = await self._take((await self._take(1))[0])
        if not kinds:
            raise UnavailableError("the screen of the sandbox accepts no connections")
        if b"\x01" not in kinds:
            raise UnavailableError("the screen of the sandbox requires a password")
        await self._stream.write(b"\x01")
        if await self._take(4) != bytes(4):
            raise _nonsense()
        await self._stream.write(b"\x01")
        self.width, self.height = self._sides(*struct.unpack(">HH16x", await self._take(20)))
        (length,) = struct.unpack(">I", await self._take(4))
        if length > _NAME_MAX:
            raise _nonsense()
        await self._take(length)
        await self._stream.write(
            b"\0\0\0\0" + _TRUE_COLOUR + struct.pack(">BxHii", 2, 2, _RAW, _DESKTOP_SIZE)
        )

    async def picture(self) -> Picture:
        """Return a screenshot.

        Raises:
            UnavailableError: the peer sends invalid data.
        """
        sizes, covered = 0, 0
        pixels: bytearray | None = None
        await self._ask()
        while True:
            await self._until_update()
            (count,) = struct.unpack(">xH", await self._take(3))
            for _ in range(count):
                await self._step()
                x, y, width, height, encoding = struct.unpack(">HHHHi", await self._take(12))
                if encoding == _DESKTOP_SIZE:
                    self.width, self.height = self._sides(width, height)
                    pixels, covered, sizes = None, 0, sizes + 1
                    if sizes > _SIZES_MAX:
                        raise _nonsense()
                    await self._ask()
                    continue
                if encoding != _RAW or x + width > self.width or y + height > self.height:
                    raise _nonsense()
                if pixels is None:
                    pixels = bytearray(self.width * self.height * 3)
                await self._lay(pixels, x, y, width, height)
                covered += width * height
            if pixels is not None and covered >= self.width * self.height:
                return Picture(self.width, self.height, pixels)

    async def _lay(self, pixels: bytearray, x: int, y: int, width: int, height: int) -> None:
        """Receive a rectangle of four bytes per pixel, and copy it into the picture."""
        rows_a_strip = max(1, _STRIP // (width * 4)) if width else height
        for top in range(0, height, rows_a_strip):
            rows = min(rows_a_strip, height - top)
            _lay(pixels, self.width, x, y + top, width, await self._take(rows * width * 4))
            await asyncio.sleep(0)

    async def _step(self) -> None:
        """Count one message, of which a screenshot has few, and let other tasks run."""
        self._steps += 1
        if self._steps > _STEPS_MAX:
            raise _nonsense()
        if self._steps % _STEPS_A_TURN == 0:
            await asyncio.sleep(0)

    async def point(self, x: int, y: int, buttons: int) -> None:
        """Move the pointer to a position, with these buttons pressed (bit 0 is the left one)."""
        await self._stream.write(struct.pack(">BBHH", 5, buttons, x, y))

    async def press(self, keysym: int, *, is_down: bool) -> None:
        """Press or release a key."""
        await self._stream.write(struct.pack(">BBxxI", 4, is_down, keysym))

    async def settle(self) -> None:
        """Return once the screen has processed all previous input."""
        # It answers in order: a request for one pixel is answered after all input was read.
        await self._stream.write(struct.pack(">BBHHHH", 3, 0, 0, 0, 1, 1))
        self._steps = 0
        await self._until_update()
        (count,) = struct.unpack(">xH", await self._take(3))
        for _ in range(count):
            await self._step()
            _, _, width, height, encoding = struct.unpack(">HHHHi", await self._take(12))
            if encoding == _DESKTOP_SIZE:
                self.width, self.height = self._sides(width, height)
            elif encoding != _RAW or width * height > 1:
                raise _nonsense()
            else:
                await self._take(width * height * 4)

    async def _ask(self) -> None:
        await self._stream.write(struct.pack(">BBHHHH", 3, 0, 0, 0, self.width, self.height))

    async def _until_update(self) -> None:
        """Skip messages until the next update of the picture."""
        while True:
            await self._step()
            match (await self._take(1))[0]:
                case 0:
                    return
                case 1:  # SetColourMapEntries
                    _, count = struct.unpack(">xHH", await self._take(5))
                    await self._take(count * 6)
                case 2:  # Bell
                    continue
                case 3:  # ServerCutText
                    (length,) = struct.unpack(">xxxI", await self._take(7))
                    if length > _CUT_TEXT_MAX:
                        raise _nonsense()
                    await self._take(length)
                case _:
                    raise _nonsense()

    def _sides(self, width: int, height: int) -> tuple[int, int]:
        if not (0 < width <= _SIDE_MAX and 0 < height <= _SIDE_MAX) or width * height > _AREA_MAX:
            raise _nonsense()
        return width, height

    async def _take(self, count: int) -> bytes:
        while len(self._buffer) < count:
            data = await self._stream.read(_PIECE)
            if not data:
                raise UnavailableError("the connection to the screen of the sandbox broke")
            self._buffer += data
        found = bytes(self._buffer[:count])
        del self._buffer[:count]
        return found


def _lay(pixels: bytearray, width: int, x: int, y: int, columns: int, data: bytes) -> None:
    """Copy a rectangle of four bytes per pixel into a picture of three."""
    rgb = bytearray(len(data) // 4 * 3)
    rgb[0::3], rgb[1::3], rgb[2::3] = data[2::4], data[1::4], data[0::4]
    stride = columns * 3
    for row in range(len(rgb) // stride if stride else 0):
        start = ((y + row) * width + x) * 3
        pixels[start : start + stride] = rgb[row * stride : (row + 1) * stride]


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _nonsense() -> UnavailableError:
    return UnavailableError("the screen of the sandbox sent invalid data")
