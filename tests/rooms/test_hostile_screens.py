"""Screens that lie: what a guest says in RFB harms neither the gateway nor the page of a viewer."""

import asyncio
import os
import struct
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from itertools import chain, repeat
from pathlib import Path
from typing import Any

import pytest
from playwright.async_api import Browser, Page, async_playwright
from tests.support.door import SOON_S, Door, door
from tests.support.house import until

from sandyard.server.core.wire import RFB_PORT
from sandyard.server.fakes.driver import Conduct

PARTS = 4
CHROMIUM = "/usr/bin/chromium"
QUIET = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update",
    "--enable-precise-memory-info",
    "--host-resolver-rules=MAP * 127.0.0.1",  # nothing is asked for elsewhere
]  # fmt: skip
SMALL = 64, 48
_MIB = 2**20
HEAP_MAX, RSS_MAX = 400 * _MIB, 150 * _MIB
RAW, ZLIB, TIGHT, ZRLE, CURSOR, DESKTOP_SIZE, EXT_DESKTOP_SIZE = 0, 6, 7, 16, -239, -223, -308


def rectangle(encoding: int, body: bytes = b"", *, at: tuple[int, ...] = (0, 0, *SMALL)) -> bytes:
    return struct.pack(">HHHHi", *at, encoding) + body


def update(*rectangles: bytes, count: int | None = None) -> bytes:
    return struct.pack(">BxH", 0, len(rectangles) if count is None else count) + b"".join(
        rectangles
    )


def hello(width: int = SMALL[0], height: int = SMALL[1], name: int = 4) -> bytes:
    # Four bytes a pixel, as noVNC asks for.
    form = struct.pack(">BBBBHHHBBBxxx", 32, 24, 0, 1, 255, 255, 255, 0, 8, 16)
    return struct.pack(">HH", width, height) + form + struct.pack(">I", name) + b"name"


Says = tuple[bytes, Callable[[], Iterator[bytes]]]


def once(said: bytes = b"", *, first: bytes | None = None) -> Says:
    """Say something once: after `first`, and once the client has said something to that."""
    return first or hello(), lambda: iter([said])


def endless(said: bytes, *, first: bytes | None = None, then: bytes = b"") -> Says:
    """Say something for ever, after `first` and `then`."""
    return first or hello(), lambda: chain([then], repeat(said))


def packed(size: int, first: bytes = b"") -> bytes:
    """Return a stream of zlib that is very much longer once unpacked."""
    squeeze = zlib.compressobj(9)
    data = squeeze.compress(first) + b"".join(
        squeeze.compress(bytes(_MIB)) for _ in range(size // _MIB)
    )
    return data + squeeze.flush(zlib.Z_SYNC_FLUSH)


BOMB = packed(512 * _MIB)


def clipboard(data: bytes) -> bytes:
    """Return a clipboard that its extension packs: provide, text."""
    return struct.pack(">BxxxiI", 3, -4 - len(data), 0x10000001) + data


CAPS = struct.pack(">BxxxiII", 3, -8, 0x1F000001, 2**31)
LIES: dict[str, Says] = {
    "a picture of 65535 by 65535": once(
        update(rectangle(RAW, bytes(100))), first=hello(65535, 65535)
    ),
    "a picture of nothing": once(update(rectangle(RAW)), first=hello(0, 0)),
    "another size, which is huge": once(update(rectangle(DESKTOP_SIZE, at=(0, 0, 65535, 65535)))),
    "sizes without end": endless(
        update(*(rectangle(DESKTOP_SIZE, at=(0, 0, 1 + one % 7 * 900, 900)) for one in range(50)))
    ),
    "screens without end": once(
        update(rectangle(EXT_DESKTOP_SIZE, b"\xff\0\0\0" + bytes(16) * 255))
    ),
    "a name of 4 GiB": endless(bytes(65536), first=hello(name=2**32 - 1)),
    "a clipboard of 2 GiB": endless(bytes(65536), then=struct.pack(">BxxxI", 3, 2**31 - 1)),
    "a clipboard that is packed": once(
        CAPS + clipboard(packed(512 * _MIB, struct.pack(">I", 500 * _MIB)))
    ),
    "a clipboard that lies about its length": once(
        CAPS + clipboard(zlib.compress(struct.pack(">I", 2**32 - 1) + b"text"))
    ),
    "colours without end": endless(struct.pack(">BxHH", 1, 0, 65535) + bytes(65535 * 6)),
    "rectangles without end": endless(
        update(*[rectangle(RAW, at=(0, 0, 0, 0))] * 1000, count=65535)
    ),
    "rectangles that are elsewhere": endless(
        update(rectangle(RAW, bytes(400), at=(65000, 65000, 10, 10)))
    ),
    "a rectangle that is larger than the picture": endless(
        bytes(65536), then=update(rectangle(RAW, at=(0, 0, 65535, 65535)))
    ),
    "bells without end": endless(b"\2" * 65536),
    "an encoding that there is not": once(update(rectangle(12345, bytes(100)))),
    "a message that there is not": once(b"\xf7" + bytes(100)),
    "a pointer of 65535 by 65535": endless(
        bytes(65536), then=update(rectangle(CURSOR, at=(0, 0, 65535, 65535)))
    ),
    "a pointer that lies beside itself": once(
        update(rectangle(CURSOR, bytes(64 * 48 * 4 + 8 * 48), at=(900, 900, 64, 48)))
    ),
    "pixels that unpack to very many": once(
        update(rectangle(ZLIB, struct.pack(">I", len(BOMB)) + BOMB))
    ),
    "tiles that unpack to very many": once(
        update(rectangle(ZRLE, struct.pack(">I", len(BOMB)) + BOMB))
    ),
    "a JPEG that is none": once(update(rectangle(TIGHT, b"\x90\xff\xff\x03" + bytes(70_000)))),
    "a kind of Tight that there is not": once(update(rectangle(TIGHT, b"\xf0" + bytes(100)))),
    "a palette of nothing": once(update(rectangle(TIGHT, b"\x40\1\0" + bytes(100)))),
    "noise": endless(os.urandom(65536)),
}


class LyingScreen:
    """A server of RFB that shakes hands, and then says what it is told to."""

    def __init__(self) -> None:
        self.says: Says = once()
        self.said = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(b"RFB 003.008\n")
            await reader.readexactly(12)
            writer.write(b"\x01\x01")
            await reader.readexactly(1)
            writer.write(bytes(4))
            await reader.readexactly(1)
            first, pieces = self.says
            writer.write(first)
            self.said += len(first)
            await reader.readexactly(1)  # the client has taken that in
            for piece in pieces():
                writer.write(piece)
                await writer.drain()
                self.said += len(piece)
            while await reader.read(65536):
                pass
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()


@pytest.fixture
async def screen(tmp_path: Path) -> AsyncIterator[tuple[Door, LyingScreen]]:
    lying = LyingScreen()
    server = await asyncio.start_server(lying.serve, "127.0.0.1", 0)
    async with server:
        conduct = Conduct(ports={RFB_PORT: server.sockets[0].getsockname()[1]})
        async with door(tmp_path, saves=True, conduct=conduct) as opened:
            await opened.yard.create(template="desktop-ubuntu", name="desk", idleTimeout=0)
            yield opened, lying


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        found = await playwright.chromium.launch(executable_path=CHROMIUM, args=QUIET)
        yield found
        await found.close()


@asynccontextmanager
async def visited(browser: Browser, opened: Door) -> AsyncIterator[Page]:
    """Open the desktop's page, as whoever has a key in it."""
    context = await browser.new_context(viewport={"width": 900, "height": 600})
    await context.add_init_script(f"sessionStorage.setItem('sandyard-key', {opened.yard.key!r})")
    page = await context.new_page()
    try:
        await page.goto(f"http://127.0.0.1:{opened.port}/desktop/desk")
        yield page
    finally:
        await context.close()


def rss() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def look(page: Page) -> tuple[int, str]:
    """Return how much memory a page has taken, and what it says; it must answer in time."""
    async with asyncio.timeout(SOON_S):
        heap = await page.evaluate("performance.memory.usedJSHeapSize")
        return int(heap), str(await page.text_content("#said"))


@pytest.mark.parametrize("part", range(PARTS))
async def test_a_screen_that_lies_harms_neither_gateway_nor_page(
    screen: tuple[Door, LyingScreen], browser: Browser, part: int
) -> None:
    opened, lying = screen
    before = rss()
    for what, says in list(LIES.items())[part::PARTS]:
        lying.says, lying.said = says, 0
        async with visited(browser, opened) as page:
            await until(lambda: lying.said > 0)
            # As long as it may take until a page has swallowed some of it.
            for _ in range(4):
                heap, _ = await look(page)
                assert heap < HEAP_MAX, (what, heap)
                assert await opened.is_well(), what
                await page.wait_for_timeout(200)
            # The screen comes to its senses: the same page shows it.
            lying.says = once(update(rectangle(RAW, b"\x20\x80\x40\0" * 64 * 48)))
            await settle(page, what)
        assert rss() - before < RSS_MAX, (what, rss() - before)


async def settle(page: Page, what: str) -> None:
    """Return once a page that came back shows a picture."""
    picture: Any = """() => {
        const canvas = document.querySelector('#screen canvas');
        if (!canvas || canvas.width !== 64) return false;
        const [red, green, blue] = canvas.getContext('2d').getImageData(5, 5, 1, 1).data;
        return red === 0x20 && green === 0x80 && blue === 0x40;
    }"""
    async with asyncio.timeout(SOON_S * 2):
        await page.reload()
        while not await page.evaluate(picture):
            if await page.is_visible("#again"):
                await page.click("#again", timeout=SOON_S * 1000)
            await page.wait_for_timeout(100)
    assert (await look(page))[0] < HEAP_MAX, what
