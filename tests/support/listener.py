"""What listens on a port of a fake machine: a small HTTP server of known manners, and bad ones."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

PORT = 3000
_SAID = {
    "chunks": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3\r\none\r\n3\r\ntwo\r\n0\r\nX-Trailer: 1\r\nSet-Cookie: a=1\r\nX-Request-Id: x\r\n"
    b"Content-Length: 9\r\n\r\n",
    "both": b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"5\r\nhello\r\n0\r\n\r\n",
    "crumbs": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    + b"1\r\na\r\n" * 300_000
    + b"0\r\n\r\n",
    "close": b"HTTP/1.1 200 OK\r\n\r\nuntil the end",
    "short": b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\nonly this",
    "garbage": b"SSH-2.0-OpenSSH_9.0\r\n" * 100,
    "nothing": b"",
    "early": b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\n\r\nno",
    "hints": b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"
    b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok",
    "cookies": b"HTTP/1.1 302 Found\r\nSet-Cookie: a=1; Domain=preview.localhost\r\n"
    b"Set-Cookie: sandyard_preview=evil\r\nLocation: http://localhost:3000/next\r\n"
    b"Content-Length: 0\r\n\r\n",
}


class Listener:
    """Answers by path; what it was sent is in `heard`, and who hung up in `left`. How much of what
    is large others took is in `spilled`."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.left = asyncio.Event()
        self.open = 0
        self.spilled = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.open += 1
        try:
            with suppress(ConnectionError, asyncio.IncompleteReadError):
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                self.heard.append(head)
                await self._answer(head, reader, writer)
        finally:
            self.open -= 1
            self.left.set()
            writer.close()

    async def _answer(
        self, head: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        path = head.split(" ")[1].split("?")[0].strip("/")
        word, _, rest = path.partition("/")
        if word in _SAID:
            writer.write(_SAID[word])
        elif word == "big":
            await self._spill(int(rest), writer)
        elif word in ("go", "trailing"):
            await self._take_body(head, rest, reader, writer)
        elif word == "status":
            said = f"HTTP/1.1 {rest} Said\r\nETag: x\r\nContent-Length: 5\r\n\r\n"
            writer.write(said.encode() + (b"" if rest in ("204", "304") else b"hello"))
        elif word == "ticking":
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
            while True:
                writer.write(b"data: 1\n\n")
                await writer.drain()
                await asyncio.sleep(0.1)
        elif word in ("events", "silent"):
            if word == "events":
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n\r\n")
                writer.write(b"data: 1\n\n")
            await reader.read(1)  # until the other side hangs up
        elif word == "endless":
            writer.write(b"HTTP/1.1 200 OK\r\n")
            while True:
                writer.write(b"X-Header: " + b"x" * 1000 + b"\r\n")
                await writer.drain()
        else:
            body = await _body(head, reader)
            shown = json.dumps({"head": head, "body": len(body), "sum": sum(body[:1000])}).encode()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(shown))
            writer.write(b"" if head.startswith("HEAD") else shown)
        await writer.drain()

    async def _take_body(
        self, head: str, how: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Ask for a body or not, as the path says, and send it back; without that, as it came."""
        if how == "away":
            writer.write(b"HTTP/1.1 417 No\r\nContent-Length: 2\r\n\r\nno")
            return
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" if how == "on" else b"")
        body = await (_body(head, reader) if how else reader.readuntil(b"\r\n\r\n"))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body)

    async def _spill(self, size: int, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Length: {size}\r\n\r\n".encode())
        for _ in range(size // 65536):
            writer.write(bytes(65536))
            await writer.drain()
            self.spilled += 65536


async def _body(head: str, reader: asyncio.StreamReader) -> bytes:
    low = head.lower()
    if "content-length: " in low:
        return await reader.readexactly(int(low.split("content-length: ")[1].split("\r\n")[0]))
    body = b""
    if "transfer-encoding: chunked" in low:
        while size := int(await reader.readline(), 16):
            body += await reader.readexactly(size)
            await reader.readline()
    return body


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[Listener, int]]:
    """Listen on a free port of loopback, and yield it."""
    listener = Listener()
    server = await asyncio.start_server(listener.serve, "127.0.0.1", 0, limit=2**20)
    async with server:
        yield listener, server.sockets[0].getsockname()[1]
