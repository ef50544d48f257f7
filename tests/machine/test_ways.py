"""Previews and terminals, in real machines."""

import hashlib
import json
import os
import socket
import subprocess
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from tests.support.server import RealServer, longer, some, wait_until
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import ClientConnection, connect

pytestmark = [pytest.mark.machine, pytest.mark.whole_memory]

SINK = """
    import hashlib, http.server, socket, sys

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            size = int(self.path.strip("/") or 5)
            self.send_response(200)
            self.send_header("Content-Length", str(size))
            self.end_headers()
            while size:
                size -= self.wfile.write(bytes(min(size, 65536)))

        def do_POST(self):
            left, digest = int(self.headers["Content-Length"]), hashlib.sha256()
            while left:
                data = self.rfile.read(min(left, 65536))
                left -= len(data)
                digest.update(data)
            said = digest.hexdigest().encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        def log_message(self, *_):
            pass

    class Server(http.server.ThreadingHTTPServer):
        address_family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET

    Server((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"""
ECHO = """
    import base64, hashlib, socketserver

    class Handler(socketserver.StreamRequestHandler):
        def frame(self):
            first, second = self.rfile.read(2)
            size = second & 127
            if size > 125:
                size = int.from_bytes(self.rfile.read(2 if size == 126 else 8), "big")
            mask, data = self.rfile.read(4), self.rfile.read(size)
            long = mask * (size // 4 + 1)
            plain = int.from_bytes(data, "big") ^ int.from_bytes(long[:size], "big")
            return first, plain.to_bytes(size, "big")

        def handle(self):
            key = b""
            while line := self.rfile.readline().strip():
                if line.lower().startswith(b"sec-websocket-key:"):
                    key = line.split(b":", 1)[1].strip()
            told = base64.b64encode(
                hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
            self.wfile.write(b"HTTP/1.1 101 Go\\r\\nUpgrade: websocket\\r\\n"
                             b"Connection: Upgrade\\r\\nSec-WebSocket-Accept: " + told
                             + b"\\r\\n\\r\\n")
            while True:
                first, data = self.frame()
                size = len(data)
                head = bytes([size]) if size < 126 else bytes([127]) + size.to_bytes(8, "big")
                self.wfile.write(bytes([first]) + head + data)
                if first & 15 == 8:
                    return

    socketserver.ThreadingTCPServer(("0.0.0.0", 8765), Handler).serve_forever()
"""


def serve(server: RealServer, box: str, program: str, *arguments: object) -> None:
    """Have a program listen in a sandbox, and return once it does."""
    path = f"/tmp/serve-{arguments[-1] if arguments else 0}.py"
    answer = server.client.put(
        f"/v1/sandboxes/{box}/files",
        params={"path": path},
        content=textwrap.dedent(program).encode(),
    )
    assert answer.status_code < 300, answer.text
    words = " ".join(map(str, arguments))
    server.execute(box, f"nohup python3 {path} {words} >/tmp/said 2>&1 & true")


def host_of(server: RealServer, box: str, port: int) -> str:
    """Return the host name of a port, with its token."""
    answer = server.client.get(f"/v1/sandboxes/{box}/url", params={"port": port})
    assert answer.status_code == 200, answer.text
    return urlsplit(str(answer.json()["data"]["url"])).netloc


def ask(server: RealServer, host: str, path: str = "/") -> httpx.Response:
    """Ask once for something on a port."""
    return httpx.get(
        f"http://127.0.0.1:{server.port}{path}", headers={"Host": host}, timeout=longer(30)
    )


def until_served(server: RealServer, host: str) -> None:
    wait_until(lambda: ask(server, host).status_code == 200, what="something listens")


@pytest.mark.core
def test_what_listens_anywhere_in_a_sandbox_is_shown(server: RealServer) -> None:
    box = str(server.create(name="shown")["id"])
    assert ask(server, host_of(server, box, 3001)).status_code == 502
    for address, port in (("127.0.0.1", 3001), ("::1", 3002), ("0.0.0.0", 3003)):
        serve(server, box, SINK, address, port)
        host = host_of(server, box, port)
        until_served(server, host)
        assert ask(server, host, "/7").content == bytes(7)
    # Paused, it is woken; what listened goes on listening.
    server.act(box, "pause")
    assert ask(server, host, "/9").content == bytes(9)
    assert server.get(box)["lastActivityKind"] == "preview"
    # The command line gives out such an address as well; the same one for some minutes.
    said = urlsplit(server.run("sandbox", "url", "shown", "3003").stdout.strip())
    assert (said.scheme, said.path) == ("http", "/")
    assert ask(server, said.netloc, "/8").content == bytes(8)
    assert json.loads(server.run("sandbox", "url", box, "3003", "--json").stdout)["port"] == 3003
    # A name that resolves by itself, as a browser's does.
    fetched = subprocess.run(
        ["curl", "-s", "--noproxy", "*", "--resolve", f"{host}:127.0.0.1", f"http://{host}/11"],
        capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert fetched == bytes(11)


@pytest.mark.core
def test_large_bodies_go_through_and_stay_nowhere(server: RealServer) -> None:
    box = str(server.create()["id"])
    serve(server, box, SINK, "127.0.0.1", 3000)
    host = host_of(server, box, 3000)
    until_served(server, host)

    def resident() -> int:
        assert server.process is not None
        status = Path(f"/proc/{server.process.pid}/status").read_text()
        return int(status.split("VmRSS:")[1].split()[0]) * 1024

    before, size, most = resident(), some(200_000_000), 0
    with httpx.Client(headers={"Host": host}, timeout=longer(120)) as client:
        url = f"http://127.0.0.1:{server.port}"
        with client.stream("GET", f"{url}/{size}") as down:
            got = 0
            for piece in down.iter_raw():
                got += len(piece)
                most = max(most, resident())
        assert got == size

        def pieces() -> Iterator[bytes]:
            nonlocal most
            for _ in range(size // 100_000):
                most = max(most, resident())
                yield bytes(100_000)

        length = size // 100_000 * 100_000
        up = client.post(f"{url}/", content=pieces(), headers={"Content-Length": str(length)})
        assert up.text == hashlib.sha256(bytes(length)).hexdigest()
    assert most - before < 40_000_000


@contextmanager
def websocket(server: RealServer, host: str) -> Iterator[ClientConnection]:
    found = socket.create_connection(("127.0.0.1", server.port))
    with connect(
        f"ws://{host}/", sock=found, max_size=2**25, open_timeout=longer(30),
        close_timeout=longer(10),
    ) as connected:  # fmt: skip
        yield connected


@pytest.mark.core
def test_websockets_go_through_and_end_with_what_they_hang_on(server: RealServer) -> None:
    box = str(server.create(idleTimeout=0)["id"])
    serve(server, box, ECHO)
    host = host_of(server, box, 8765)
    knock = "python3 -c 'import socket; socket.create_connection((\"127.0.0.1\", 8765))'"
    wait_until(lambda: server.execute(box, knock)["exitCode"] == 0, what="something listens")
    with websocket(server, host) as open_:
        for size in (0, 1, 125, 1024 * 1024, some(4 * 1024 * 1024)):
            data = os.urandom(size)
            open_.send(data)
            assert open_.recv(timeout=longer(60)) == data
    for end in ("pause", "delete"):
        with websocket(server, host) as open_:
            open_.send("x")
            open_.recv(timeout=longer(60))
            if end == "pause":
                server.act(box, "pause")
            else:
                server.delete(box)
            with pytest.raises(ConnectionClosed):
                open_.recv(timeout=longer(30))


# --- terminals --------------------------------------------------------------------------------


def ticket(server: RealServer, box: str, **body: object) -> dict[str, Any]:
    answer = server.client.post("/v1/terminal/sandbox-sessions", json={"sandboxId": box, **body})
    assert answer.status_code == 201, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


@contextmanager
def terminal(
    server: RealServer, made: dict[str, Any], query: str = ""
) -> Iterator[ClientConnection]:
    url = f"ws://127.0.0.1:{server.port}{made['wsPath']}{query}"
    with connect(url, proxy=None, open_timeout=longer(30)) as open_:
        yield open_


def read_until(open_: ClientConnection, wanted: bytes, said: bytes = b"") -> bytes:
    until = time.monotonic() + longer(60)
    while wanted not in said:
        assert time.monotonic() < until, said
        piece = open_.recv(timeout=longer(60))
        assert isinstance(piece, bytes), (piece, said)
        said += piece
    return said


@pytest.mark.core
def test_a_terminal_is_a_login_shell_that_waits_for_who_was_cut_off(server: RealServer) -> None:
    box = str(server.create(env={"MINE": "1"})["id"])
    made = ticket(server, box)
    with terminal(server, made, "?cols=91&rows=31") as open_:
        open_.send("shopt -q login_shell && echo in $MINE $(pwd) $TERM $(stty size)\r")
        said = read_until(open_, b"in 1 /root xterm-256color 31 91")
        open_.send(json.dumps({"type": "resize", "cols": 120, "rows": 40}))
        open_.send(json.dumps({"type": "input", "data": "sleep 0.3; stty size\r"}))
        said = read_until(open_, b"40 120", said)
        # A character in two pieces, and keys that end what runs.
        open_.send(b"echo \xc3")
        open_.send(b"\xa9t\xc3\xa9\r")
        said = read_until(open_, "\nété".encode()[1:4], said)
        open_.send("cat >/tmp/pasted\r")
        line = "x" * 79 + "\n"
        pasted = line * (some(1024 * 1024) // 80)
        for start in range(0, len(pasted), 65536):
            open_.send(pasted[start : start + 65536].encode())
        open_.send(b"\x04")
        open_.send("wc -c </tmp/pasted; echo done-$((1+1))\r")
        said = read_until(open_, b"done-2", said)
        assert str(len(pasted)).encode() in said[-400:]
        # What is typed ahead of it Ctrl-C takes along, so it waits until there is something to end:
        # a process that says so itself, for between two commands Bash may miss it.
        open_.send("sh -c 'echo sle$((1+1))ping; exec sleep 1000'\r")
        said = read_until(open_, b"sle2ping", said)
        open_.send(b"\x03")
        before, key, after = read_until(open_, b"^C", said).partition(b"^C")
        said = before + key + read_until(open_, b"# ", after)
        open_.send("kept=here; echo inter$((1+1))rupted\r")
        said = read_until(open_, b"inter2rupted", said)
        open_.socket.close()
    again = ticket(server, box, terminalId=made["terminalId"])
    with terminal(server, again, f"?offset={len(said)}") as open_:
        open_.send("echo $kept again; exit 9\r")
        read_until(open_, b"here again")
        while isinstance(end := open_.recv(timeout=longer(30)), bytes):
            pass
        assert (json.loads(end)["type"], json.loads(end)["exitCode"]) == ("exit", 9)
