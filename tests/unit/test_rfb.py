"""A screen as RFB tells it, keys by name, windows as they are listed."""

import struct
import zlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.core.errors import InvalidArgumentError, UnavailableError
from sandyard.server.service.sandboxes.desktops import windows_in
from sandyard.server.service.sandboxes.keysyms import keysym_of, keysyms_of
from sandyard.server.service.sandboxes.rfb import Picture, Screen


class Said:
    """A stream that says what it was given, in pieces of a size, and keeps what it hears."""

    def __init__(self, said: bytes, piece: int = 7) -> None:
        self.left, self.heard, self._piece = said, b"", piece

    async def read(self, limit: int) -> bytes:
        found, self.left = self.left[: self._piece], self.left[self._piece :]
        return found[:limit]

    async def write(self, data: bytes) -> None:
        self.heard += data

    async def write_eof(self) -> None:
        pass


def hello(width: int = 3, height: int = 2, name: bytes = b"screen") -> bytes:
    head = struct.pack(">HH16xI", width, height, len(name)) + name
    return b"RFB 003.008\n\x01\x01" + bytes(4) + head


def rectangle(x: int, y: int, width: int, height: int, pixels: bytes) -> bytes:
    return struct.pack(">HHHHi", x, y, width, height, 0) + pixels


def update(*rectangles: bytes) -> bytes:
    return struct.pack(">BxH", 0, len(rectangles)) + b"".join(rectangles)


BLUE, RED = b"\xff\0\0\0", b"\0\0\xff\0"


async def picture(said: bytes) -> Picture:
    screen = Screen(Said(said))
    await screen.meet()
    return await screen.picture()


async def test_a_picture_is_put_together_of_what_comes() -> None:
    bell, cut = b"\x02", struct.pack(">BxxxI", 3, 4) + b"text"
    colours = struct.pack(">BxHH", 1, 0, 1) + bytes(6)
    said = hello() + bell + update(rectangle(0, 0, 3, 1, BLUE * 3)) + cut + colours
    found = await picture(
        said + update(rectangle(0, 1, 1, 1, RED), rectangle(1, 1, 2, 1, BLUE * 2))
    )
    assert (found.width, found.height) == (3, 2)
    assert found.pixels == b"\0\0\xff" * 3 + b"\xff\0\0" + b"\0\0\xff" * 2


async def test_a_screen_that_changes_its_size_is_asked_again() -> None:
    resized = struct.pack(">HHHHi", 0, 0, 1, 1, -223)
    found = await picture(hello() + update(resized) + update(rectangle(0, 0, 1, 1, RED)))
    assert (found.width, found.height, found.pixels) == (1, 1, b"\xff\0\0")


@given(st.integers(1, 9), st.integers(1, 9), st.data())
def test_a_png_has_the_pixels_in_it(width: int, height: int, data: st.DataObject) -> None:
    size = width * height * 3
    pixels = data.draw(st.binary(min_size=size, max_size=size))
    png = Picture(width, height, pixels).png()
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    at = png.index(b"IDAT")
    length = int.from_bytes(png[at - 4 : at], "big")
    rows = zlib.decompress(png[at + 4 : at + 4 + length])
    stride = width * 3 + 1
    assert b"".join(rows[i + 1 : i + stride] for i in range(0, len(rows), stride)) == pixels
    assert int.from_bytes(png[at + 4 + length : at + 8 + length], "big") == zlib.crc32(
        png[at : at + 4 + length]
    )


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-x\r\n\r\n", b"RFB 003.008\n\x01\x01\0\0\0\x01",
        hello(0, 5), hello(9000, 5), hello(name=b"x" * 5000),
        hello() + b"\x09", hello() + update(rectangle(1, 1, 3, 1, BLUE * 3)),
        hello() + update(struct.pack(">HHHHi", 0, 0, 1, 1, 7)),
        hello() + struct.pack(">BxxxI", 3, 2**31),
        hello() + update() * 30_000, hello() + b"\x02" * 30_000, hello(8000, 8000),
        hello() + update(*[struct.pack(">HHHHi", 0, 0, 4000, 2000, -223)] * 5000),
        hello() + update(struct.pack(">HHHHi", 0, 0, 0, 0, -223)),
    ],
)  # fmt: skip
async def test_what_makes_no_sense_ends_it(said: bytes) -> None:
    with pytest.raises(UnavailableError, match="sent invalid data"):
        await picture(said)


@pytest.mark.parametrize(
    ("said", "why"),
    [
        (b"", "sandbox broke"), (hello() + update(rectangle(0, 0, 1, 1, RED)), "sandbox broke"),
        (b"RFB 003.008\n\x00", "accepts no connections"), (b"RFB 003.008\n\x01\x02", "password"),
    ],
)  # fmt: skip
async def test_a_screen_that_shows_nothing_says_why(said: bytes, why: str) -> None:
    with pytest.raises(UnavailableError, match=why):
        await picture(said)


@given(st.binary(max_size=300))
async def test_any_bytes_at_all_end_in_words(said: bytes) -> None:
    with pytest.raises(UnavailableError):
        await picture(hello(2000, 2000) + said)


async def test_keys_and_pointer_are_as_the_protocol_has_them() -> None:
    stream = Said(hello() + update(rectangle(0, 0, 1, 1, RED)), piece=10_000)
    screen = Screen(stream)
    await screen.meet()
    assert stream.heard.startswith(b"RFB 003.008\n\x01\x01")
    stream.heard = b""
    await screen.point(1, 258, 5)
    await screen.press(0xFF0D, is_down=True)
    assert stream.heard == b"\x05\x05\x00\x01\x01\x02" + b"\x04\x01\x00\x00\x00\x00\xff\x0d"
    await screen.settle()


@pytest.mark.parametrize(
    ("keys", "numbers"),
    [
        ("Return", [0xFF0D]), ("ctrl+c", [0xFFE3, 0x63]), ("Ctrl+Shift+T", [0xFFE3, 0xFFE1, 0x54]),
        ("+", [0x2B]), ("ctrl++", [0xFFE3, 0x2B]), ("F12", [0xFFC9]), ("é", [0xE9]),
        ("€", [0x010020AC]), ("alt+Page_Down", [0xFFE9, 0xFF56]),
    ],
)  # fmt: skip
def test_keys_have_the_names_that_people_give_them(keys: str, numbers: list[int]) -> None:
    assert keysyms_of(keys) == numbers


@pytest.mark.parametrize("keys", ["", "nokey", "ctrl+nokey", "a+b+c+d+e+f+g+h+i", "\n", "ctrl+"])
def test_what_is_no_key_is_said_to_be_none(keys: str) -> None:
    with pytest.raises(InvalidArgumentError):
        keysyms_of(keys)


def test_characters_are_typed_by_their_keys() -> None:
    assert [keysym_of(one) for one in "a\n\té€"] == [0x61, 0xFF0D, 0xFF09, 0xE9, 0x010020AC]


def test_windows_are_read_as_they_are_listed() -> None:
    said = """0x00800008  0 254    62   100  904  508  xterm.XTerm           desk user@desk: ~
0x00a00008 -1 253    0    770  1280 30   tint2.Tint2           N/A tint2
0x00b00008  0 300    5    6    7    8    x.Y  desk
nonsense \x1b[2J
0x00c00008  0 x    5    6    7    8    x.Y  desk title
8388616
"""
    found = windows_in(said)
    assert [(one.program, one.title, one.is_active) for one in found] == [
        ("XTerm", "user@desk: ~", True), ("Tint2", "tint2", False), ("Y", "", False),
    ]  # fmt: skip
    assert (found[0].pid, found[0].x, found[0].y, found[0].width) == (254, 62, 100, 904)
    assert windows_in("") == []
    assert len(windows_in("0x1 0 1 1 1 1 1 a.b h t\n" * 10_000)) <= 501
    assert windows_in("0x1 0 1 1 1 1 1 a.b h t\n²")[0].is_active is False
    assert windows_in(f"0x{'1' * 100} 0 1 1 1 1 1 a.b h t\n{'9' * 9000}") == []
