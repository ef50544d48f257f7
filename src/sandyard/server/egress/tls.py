"""Certificates for hosts whose TLS is ended here, and the check of the hosts themselves."""

import os
import ssl
from collections import OrderedDict
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

BACKDATED: Final = timedelta(days=2)
"""How long ago certificates become valid: guests' clocks err."""
_LIVES, _USED = timedelta(days=30), timedelta(days=1)
_CONTEXTS_MAX = 256
_NAME_MAX = 64  # of a common name (RFC 5280, A.1)
_PROTOCOLS = ["http/1.1"]
_BUNDLES = (
    "/etc/ssl/certs/ca-certificates.crt",  # Debian, Alpine, Arch
    "/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem",  # Fedora
    "/etc/ssl/ca-bundle.pem",  # SUSE
)


def host_context(extra: str | None = None) -> ssl.SSLContext:
    """Return a context that checks hosts by the authorities that this machine trusts, and by those
    in the file `extra`. They are all loaded now."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    bundle = next((one for one in _BUNDLES if Path(one).exists()), None)
    if bundle is None:
        context.load_default_certs()
    else:
        context.load_verify_locations(bundle)
    if extra:
        context.load_verify_locations(extra)
    context.set_alpn_protocols(_PROTOCOLS)
    return context


def rehearse(hosts: ssl.SSLContext) -> None:
    """Issue a certificate, and begin TLS as both ends: what is loaded when it is first needed is
    loaded now. Processes that see no files cannot load it later."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "rehearsal")])
    now = datetime.now(UTC)
    authority = (
        x509.CertificateBuilder(name, name, key.public_key(), 1, now - BACKDATED, now + _LIVES)
        .sign(key, hashes.SHA256())
        .public_bytes(serialization.Encoding.PEM)
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    with TemporaryDirectory() as folder:
        issuer = Issuer(authority.decode(), private.decode(), folder=Path(folder))
        context = issuer.context("rehearsal.test")
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = hosts.wrap_bio(to_client, to_server, server_hostname="rehearsal.test")
    server = context.wrap_bio(to_server, to_client, server_side=True)
    # It ends with the client's refusal: it does not know the authority.
    for end in (client, server, client):
        with suppress(ssl.SSLError):
            end.do_handshake()


class Issuer:
    """Issues certificates in the name of an authority, and keeps them for a day."""

    def __init__(self, certificate: str, key: str, *, folder: Path) -> None:
        """Issue by an authority's certificate and key (PEM). A certificate is in `folder` for a
        moment, because TLS reads them from files alone.

        Raises:
            ValueError: they cannot be used.
        """
        self._authority = x509.load_pem_x509_certificate(certificate.encode())
        loaded = serialization.load_pem_private_key(key.encode(), None)
        if not isinstance(loaded, ec.EllipticCurvePrivateKey):
            raise ValueError("the authority's key is of another kind")
        self._key = loaded
        self._folder = folder
        self._own = ec.generate_private_key(ec.SECP256R1())
        self._contexts: OrderedDict[str, tuple[datetime, ssl.SSLContext]] = OrderedDict()

    def context(self, host: str) -> ssl.SSLContext:
        """Return a context with a certificate for a host."""
        now = datetime.now(UTC)
        made_at, context = self._contexts.get(host, (None, None))
        if context is None or made_at is None or not now - _USED < made_at <= now:
            context = self._made(host, now)
            self._contexts[host] = (now, context)
        self._contexts.move_to_end(host)
        if len(self._contexts) > _CONTEXTS_MAX:
            self._contexts.popitem(last=False)
        return context

    def _made(self, host: str, now: datetime) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.options |= ssl.OP_NO_RENEGOTIATION
        context.set_alpn_protocols(_PROTOCOLS)
        key = self._own.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        path = self._folder / "host.pem"
        path.unlink(missing_ok=True)
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with open(descriptor, "wb") as file:
                file.write(self._issued(host, now) + key)
            context.load_cert_chain(path)
        finally:
            path.unlink(missing_ok=True)
        return context

    def _issued(self, host: str, now: datetime) -> bytes:
        authority, public = self._authority, self._own.public_key()
        made = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host[:_NAME_MAX])]))
            .issuer_name(authority.subject)
            .public_key(public)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - BACKDATED)
            .not_valid_after(now + _LIVES)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        return made.public_bytes(serialization.Encoding.PEM)
