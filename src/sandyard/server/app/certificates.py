"""The certificates on this host, and when each of them expires."""

import asyncio
import ssl
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from urllib.parse import urlsplit

from cryptography import x509

from sandyard.server.app.installation import NODE_FILE
from sandyard.server.app.settings import Settings
from sandyard.server.core.errors import UnavailableError

SOON = timedelta(days=14)
"""An expiry within this time is a problem."""
_LIMIT_S = 5.0
_INFO_MAX = 64 * 1024
OWN, AUTHORITY, PREVIEW, E2B = "own", "authority", "preview", "e2b"
MEND = {
    OWN: "restart the process: a certificate of its own is renewed every day",
    AUTHORITY: "see docs/howto/cluster.md, Certificates",
    PREVIEW: "renew preview.tls_certificate, and restart the server",
    E2B: "renew e2b.tls_certificate, and restart the server",
}


@dataclass(frozen=True)
class Certificate:
    """A certificate: whose it is, and until when it is valid."""

    name: str
    expires_at: datetime


def certificates_of(settings: Settings) -> Iterator[Certificate]:
    """Yield the certificates in files of this host. One that cannot be read is left out: what uses
    it reports that."""
    folder = settings.home / "cluster"
    files = []
    if settings.cluster.nats or (folder / NODE_FILE).exists():
        files += [(OWN, folder / "certificate.pem"), (AUTHORITY, folder / "authority.pem")]
    if settings.preview.tls_certificate is not None:
        files.append((PREVIEW, Path(settings.preview.tls_certificate)))
    if settings.e2b.tls_certificate is not None:
        files.append((E2B, Path(settings.e2b.tls_certificate)))
    for name, path in files:
        try:
            yield Certificate(name, expiry_of(path.read_bytes()))
        except (OSError, ValueError):
            continue


def expiry_of(pem: bytes) -> datetime:
    """Return until when a certificate is valid; of a chain, the first one.

    Raises:
        ValueError: it is not a certificate.
    """
    return x509.load_pem_x509_certificate(pem).not_valid_after_utc


async def nats_expiry(server: str) -> datetime:
    """Return until when the certificate of a NATS server (tls://HOST:PORT) is valid.

    Raises:
        UnavailableError: it does not answer.
    """
    place = urlsplit(server)
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # only its date is wanted, and it may have passed
    try:
        async with asyncio.timeout(_LIMIT_S):
            reader, writer = await asyncio.open_connection(
                place.hostname, place.port or 4222, limit=_INFO_MAX
            )
            try:
                await reader.readline()  # the server speaks first, and TLS begins after that
                await writer.start_tls(context)
                tls = writer.get_extra_info("ssl_object")
                der = tls.getpeercert(binary_form=True)
            finally:
                writer.close()
    except (OSError, TimeoutError, ValueError) as error:
        raise UnavailableError(f"NATS does not answer at {server}: {error}") from error
    return x509.load_der_x509_certificate(der).not_valid_after_utc
