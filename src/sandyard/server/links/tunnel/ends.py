"""Mutual TLS: identifies the other end of a connection by its certificate."""

import asyncio
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from sandyard.server.core.errors import UnauthenticatedError


@dataclass(frozen=True)
class Papers:
    """The paths of a certificate, its key, and the authority's certificate."""

    certificate: Path
    key: Path
    authority: Path


def context_of(papers: Papers, *, is_server: bool) -> ssl.SSLContext:
    """Return a TLS 1.3 context that requires a certificate from the other end.

    Host names are not verified: the peer is identified by the name in its certificate, see
    `name_of`.
    """
    purpose = ssl.PROTOCOL_TLS_SERVER if is_server else ssl.PROTOCOL_TLS_CLIENT
    context = ssl.SSLContext(purpose)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_REQUIRED
    context.load_cert_chain(papers.certificate, papers.key)
    context.load_verify_locations(papers.authority)
    return context


def name_of(tls: ssl.SSLObject) -> str:
    """Return the name of the other end: the only URI in its certificate.

    Raises:
        UnauthenticatedError: there is no URI, or more than one.
    """
    found = (tls.getpeercert() or {}).get("subjectAltName", ())
    names = [str(one[1]) for one in found if one[0] == "URI"]
    if len(names) != 1:
        raise UnauthenticatedError("cannot identify the peer by its certificate")
    return names[0]


def watch_over(writer: asyncio.StreamWriter) -> None:
    """Configure a socket to detect a dead host within five seconds, as heartbeats do, and to send
    small messages immediately.

    The kernel acknowledges for a process that is busy, so it is the host and the network that are
    judged; a process that stands still while its buffer is full is given up as well.
    """
    found = writer.get_extra_info("socket")
    options = (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 2),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 5_000),
    )
    for option in options:
        found.setsockopt(*option)
