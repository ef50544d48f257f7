"""Checks what clients of the E2B API need, for the doctor: names, certificates, keys."""

import asyncio
import socket
import ssl
from collections.abc import AsyncIterator
from pathlib import Path

from cryptography import x509

from sandyard.server.app.database import open_database
from sandyard.server.app.links import Finding
from sandyard.server.app.settings import Settings
from sandyard.server.core.errors import SandyardError
from sandyard.server.core.ids import E2B_KEY
from sandyard.server.tasks import in_thread

_LIMIT_S = 5.0
_KEYS_MAX = 1000
_MAKE_KEY = "make one: sandyard auth keys create NAME --e2b"
_ANY = "49983-sandbox-aaaaaaaaaaaa"


async def examine_e2b(settings: Settings) -> AsyncIterator[Finding]:
    """Check the E2B API."""
    if not settings.e2b.enabled:
        return
    if settings.e2b.domain is None:
        yield Finding(
            "ok", "the E2B API has no domain: clients set E2B_API_URL and E2B_SANDBOX_URL"
        )
    else:
        bare, _, port = settings.e2b.domain.partition(":")
        for name in (f"api.{bare}", f"{_ANY}.{bare}"):
            yield await _resolved(name, bare)
        if settings.e2b.tls_certificate is not None:
            yield _names(settings.e2b.tls_certificate, bare)
        yield await _spoken(f"api.{bare}", int(port or 443))
    yield await _keys(settings)


async def _resolved(name: str, domain: str) -> Finding:
    try:
        async with asyncio.timeout(_LIMIT_S):
            await in_thread(socket.getaddrinfo, name, None)
    except (OSError, TimeoutError):
        return Finding(
            "bad", f"{name} does not resolve, which clients of the E2B API ask for",
            f"add a DNS record for *.{domain} that leads to this server",
        )  # fmt: skip
    return Finding("ok", f"{name} resolves")


def _names(path: Path, domain: str) -> Finding:
    """Say whether a certificate is for all names below a domain."""
    try:
        certificate = x509.load_pem_x509_certificate(path.read_bytes())
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = extension.value.get_values_for_type(x509.DNSName)
    except (OSError, ValueError, x509.ExtensionNotFound) as error:
        return Finding("bad", f"cannot read e2b.tls_certificate: {error}", "check the file")
    if f"*.{domain}" not in names:
        return Finding(
            "bad", f"e2b.tls_certificate is for {', '.join(names) or 'no name'}",
            f"get one for *.{domain}",
        )  # fmt: skip
    return Finding("ok", f"e2b.tls_certificate is for *.{domain}")


async def _spoken(name: str, port: int) -> Finding:
    """Say whether something speaks TLS where clients expect the API."""
    context = ssl.create_default_context()
    # Whom it is trusted by is for the clients to say: they may have an authority of their own.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    try:
        async with asyncio.timeout(_LIMIT_S):
            _, writer = await asyncio.open_connection(name, port, ssl=context)
            writer.close()
    except (OSError, TimeoutError) as error:
        return Finding(
            "bad", f"nothing speaks TLS at {name}:{port}, where clients of the E2B API look for "
            f"it: {str(error) or 'no answer'}",
            "start the server; let a proxy terminate TLS there, or set e2b.port, "
            "e2b.tls_certificate and e2b.tls_key; see docs/howto/e2b.md",
        )  # fmt: skip
    return Finding("ok", f"TLS is spoken at {name}:{port}")


async def _keys(settings: Settings) -> Finding:
    """Say whether there is a key of the form that clients insist on."""
    try:
        async with open_database(settings) as store, store.read() as tx:
            for organization in await tx.organizations.every():
                keys = await tx.keys.page(organization.id, owner_user_id=None, limit=_KEYS_MAX)
                if any(one.prefix.startswith(E2B_KEY) for one in keys):
                    return Finding("ok", f"there are keys that begin with {E2B_KEY}")
    except SandyardError as error:
        return Finding("note", f"cannot look for keys of the E2B API: {error.message}")
    return Finding("note", f"no key begins with {E2B_KEY}, as clients of E2B insist on", _MAKE_KEY)
