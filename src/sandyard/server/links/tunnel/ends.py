"""Mutual TLS: who is at the other end of a connection, by a certificate of the installation's."""

import asyncio
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path

from sandyard.server.core.errors import UnauthenticatedError


@dataclass(frozen=True)
class Papers:
    """Where an end's own certificate and key lie, and that of the installation's authority."""

    certificate: Path
    key: Path
    authority: Path


def context_of(papers: Papers, *, is_server: bool) -> ssl.SSLContext:
    """Return what TLS needs of an end; both ends show a certificate, and TLS is 1.3.

    Names of hosts are not looked at: who somebody is stands in the certificate, see `name_of`.
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
    """Return who is at the other end: the one URI in its certificate.

    Raises:
        UnauthenticatedError: it names nobody, or several.
    """
    found = (tls.getpeercert() or {}).get("subjectAltName", ())
    names = [str(one[1]) for one in found if one[0] == "URI"]
    if len(names) != 1:
        raise UnauthenticatedError("cannot tell who is at the other end by its certificate")
    return names[0]


def watch_over(writer: asyncio.StreamWriter) -> None:
    """Have the kernel find out within half a minute that the other end's host is gone, and send
    what is small at once."""
    found = writer.get_extra_info("socket")
    options = (
        (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1),
        (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
        (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10),
        (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
        (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
        (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 25_000),
    )
    for option in options:
        found.setsockopt(*option)
