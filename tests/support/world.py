"""The world outside, in a network namespace: DNS, web servers, QUIC and plain listeners.

    python -m tests.support.world FOLDER    serves until killed

`FOLDER/zone.json` has the names: `{"good.test": {"A": ["203.0.113.80"], "TTL": 30}}`; a name may
have a CNAME, and be TRUNCATED by UDP. It is read again for every question. `FOLDER/key.pem` and
`certificate.pem` are what TLS is served with, and at BAD `expired.pem`. Requests are answered with
what arrived, as JSON.
"""

import asyncio
import json
import ssl
import sys
from pathlib import Path
from typing import Any, cast

import dns.flags
import dns.message
import dns.rcode
import dns.rdataclass
import dns.rdatatype
import dns.rrset

from tests.support import quic

RESOLVER, GOOD, BAD, OTHER = "10.203.78.53", "203.0.113.200", "203.0.113.201", "203.0.113.202"
PRIVATE = "192.168.213.77"
ADDRESSES = (RESOLVER, GOOD, BAD, OTHER, PRIVATE)
ECHO_PORTS = (22, 9999)
_SIZE = 1024 * 1024


def answer(message: bytes, zone: dict[str, Any], *, by_tcp: bool) -> bytes:
    """Return the answer to a question."""
    query = dns.message.from_wire(message)
    asked = query.question[0]
    reply = dns.message.make_response(query)
    reply.flags |= dns.flags.RA
    name = asked.name.to_text(omit_final_dot=True).lower()
    kind = dns.rdatatype.to_text(asked.rdtype)
    entry = zone.get(name, zone.get("*." + name.partition(".")[2]))
    if entry is None:
        reply.set_rcode(dns.rcode.NXDOMAIN)
        return reply.to_wire()
    ttl = entry.get("TTL", 30)

    def add(owner: str, of: str, values: list[str]) -> None:
        reply.answer.append(dns.rrset.from_text(f"{owner}.", ttl, "IN", of, *values))

    if "CNAME" in entry:
        add(name, "CNAME", [f"{entry['CNAME']}."])
        name, entry = (
            entry["CNAME"],
            {**zone.get(entry["CNAME"], {}), "FORGED": entry.get("FORGED")},
        )
    if kind in entry:
        add(name, kind, entry[kind])
    if entry.get("FORGED"):
        add(entry["FORGED"], "A", [BAD])
    if entry.get("TRUNCATED") and not by_tcp:
        reply.answer.clear()
        reply.flags |= dns.flags.TC
    return reply.to_wire(max_size=65535)


class Datagrams(asyncio.DatagramProtocol):
    """Answers questions by UDP."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.transport: asyncio.DatagramTransport

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        zone = json.loads((self.folder / "zone.json").read_text())
        if not zone.get("SILENT"):
            self.transport.sendto(answer(data, zone, by_tcp=False), addr)


async def stream_of_questions(
    folder: Path, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    """Answer questions by TCP."""
    size = int.from_bytes(await reader.readexactly(2), "big")
    zone = json.loads((folder / "zone.json").read_text())
    said = answer(await reader.readexactly(size), zone, by_tcp=True)
    writer.write(len(said).to_bytes(2, "big") + said)
    await writer.drain()
    writer.close()


async def web(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Answer requests with what arrived."""
    try:
        while head := (await reader.readuntil(b"\r\n\r\n")).decode("latin-1"):
            method, target, _ = head.split(" ", 2)
            names = {
                line.partition(":")[0].lower(): line.partition(":")[2].strip()
                for line in head.splitlines()[1:]
            }
            body = b""
            if "chunked" in names.get("transfer-encoding", ""):
                while size := int((await reader.readline()).split(b";")[0], 16):
                    body += await reader.readexactly(size)
                    await reader.readexactly(2)
                await reader.readexactly(2)
            else:
                body = await reader.readexactly(int(names.get("content-length", 0)))
            if names.get("upgrade") == "echo":
                writer.write(b"HTTP/1.1 101 Go\r\nConnection: upgrade\r\nUpgrade: echo\r\n\r\n")
                await echo(reader, writer)
                return
            own = writer.get_extra_info("sockname")[0]
            said = json.dumps(
                {"at": own, "method": method, "target": target, "head": head, "body": len(body)}
            ).encode()
            if target == "/large":
                said = bytes(_SIZE)
            if target == "/slow":
                writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
                while True:
                    writer.write(b"4\r\ntick\r\n")
                    await writer.drain()
                    await asyncio.sleep(0.05)
            length, version = f"Content-Length: {len(said)}\r\n", "1.1"
            status = "302 Found\r\nLocation: https://other.test/" if target == "/away" else "200 OK"
            if target == "/old":
                length, version = "", "1.0"
            if target == "/until-it-ends":
                length = "Connection: close\r\n"
            writer.write(f"HTTP/{version} {status}\r\n{length}\r\n".encode())
            writer.write(b"" if method == "HEAD" else said)
            await writer.drain()
            if target in ("/until-it-ends", "/old"):
                break
    except (OSError, EOFError, asyncio.LimitOverrunError):
        pass
    finally:
        writer.close()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Greet, and send back what comes."""
    try:
        writer.write(b"hello ")
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except OSError:
        pass
    finally:
        writer.close()


async def main(folder: Path) -> None:
    """Serve until killed."""
    loop = asyncio.get_running_loop()
    for address in (RESOLVER, BAD):
        await loop.create_datagram_endpoint(lambda: Datagrams(folder), local_addr=(address, 53))
        await asyncio.start_server(
            lambda reader, writer: stream_of_questions(folder, reader, writer), address, 53
        )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "certificate.pem", folder / "key.pem")
    expired = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    expired.load_cert_chain(folder / "expired.pem")
    for address in (GOOD, BAD, OTHER, PRIVATE):
        await asyncio.start_server(web, address, 80)
        await asyncio.start_server(web, address, 443, ssl=expired if address == BAD else context)
        await quic.serve(address, folder / "certificate.pem", folder / "key.pem")
        for port in ECHO_PORTS:
            await asyncio.start_server(echo, address, port)
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
