"""QUIC, as HTTP/3 uses it: a server that says where it is, and a client.

python -m tests.support.quic NAME ADDRESS LIMIT    prints what the server says, or "unanswered"
"""

import asyncio
import ssl
import sys
from pathlib import Path

from aioquic.asyncio.client import connect
from aioquic.asyncio.server import serve as open_server
from aioquic.quic.configuration import QuicConfiguration

_ALPN = ["h3"]


async def serve(address: str, certificate: Path, key: Path) -> None:
    """Serve at an address until the loop ends."""
    configuration = QuicConfiguration(is_client=False, alpn_protocols=_ALPN)
    configuration.load_cert_chain(certificate, key)

    def answer(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(address.encode())
        writer.write_eof()

    await open_server(address, 443, configuration=configuration, stream_handler=answer)


async def ask(name: str, address: str, limit_s: float) -> str:
    """Return what the server says that is at an address and has a name. Its certificate is not
    checked."""
    configuration = QuicConfiguration(
        is_client=True, alpn_protocols=_ALPN, server_name=name, verify_mode=ssl.CERT_NONE,
        idle_timeout=limit_s,
    )  # fmt: skip
    try:
        async with connect(address, 443, configuration=configuration) as client:
            reader, writer = await client.create_stream()
            writer.write_eof()
            return (await reader.read()).decode()
    except ConnectionError:
        return "unanswered"


if __name__ == "__main__":
    sys.stdout.write(asyncio.run(ask(sys.argv[1], sys.argv[2], float(sys.argv[3]))))
