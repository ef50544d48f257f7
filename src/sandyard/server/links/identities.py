"""The certificate authority of an installation, and the certificates that identify its hosts."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha1
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from sandyard.server.core.errors import InvalidArgumentError

_SKEW = timedelta(hours=2)  # clocks of hosts need not agree
_GUEST_SKEW = timedelta(days=2)
_AUTHORITY_LASTS = timedelta(days=20 * 365)
_SERVER_LASTS = timedelta(days=5 * 365)


def control_name(installation: str, server_id: str) -> str:
    """Return a control plane's name, a URI."""
    return f"sandyard://{installation}/control/{server_id}"


def node_name(installation: str, node_id: str) -> str:
    """Return a node's name, a URI."""
    return f"sandyard://{installation}/node/{node_id}"


def nats_name(installation: str, name: str) -> str:
    """Return a NATS server's name, a URI."""
    return f"sandyard://{installation}/nats/{name}"


def new_request() -> tuple[bytes, bytes]:
    """Return a new private key and a certificate signing request for it, in PEM.

    The request names no subject: the signer decides that.
    """
    key = _pem_of(ec.generate_private_key(ec.SECP256R1()))
    return key, request_of(key)


def request_of(private: bytes) -> bytes:
    """Return a certificate signing request for an existing private key, in PEM."""
    key = serialization.load_pem_private_key(private, None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(x509.Name([]))
        .sign(key, hashes.SHA256())
    )
    return request.public_bytes(serialization.Encoding.PEM)


def new_network_authority(name: str, now: datetime) -> tuple[str, str, str]:
    """Return a new authority for the TLS that is ended for sandboxes: its certificate and key, in
    PEM, and the hash of its name (`core.ops.Trust`)."""
    made = Authority.new(f"network {name}", now, skew=_GUEST_SKEW)
    subject = x509.load_pem_x509_certificate(made.certificate).subject
    # OpenSSL hashes the name in lower case, without the outermost sequence (X509_NAME_hash_ex(3)).
    plain = b"".join(
        x509.Name([x509.NameAttribute(one.oid, str(one.value).lower())]).public_bytes()[2:]
        for one in subject
    )
    number = int.from_bytes(sha1(plain, usedforsecurity=False).digest()[:4], "little")
    return made.certificate.decode(), made.key.decode(), f"{number:08x}"


@dataclass(frozen=True)
class Authority:
    """The certificate authority of an installation, in PEM; its key is secret."""

    certificate: bytes
    key: bytes = field(repr=False)

    @classmethod
    def new(cls, installation: str, now: datetime, *, skew: timedelta = _SKEW) -> "Authority":
        """Return a new authority, valid from `skew` ago."""
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"Sandyard {installation}"[:64])])
        certificate = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - skew)
            .not_valid_after(now + _AUTHORITY_LASTS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs=True), critical=True)
            .add_extension(
                x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False
            )
            .sign(key, hashes.SHA256())
        )
        return cls(certificate.public_bytes(serialization.Encoding.PEM), _pem_of(key))

    def sign(self, request: bytes, name: str, now: datetime, lasts: timedelta) -> bytes:
        """Return a certificate with this name for the key of a request.

        Everything else in the request is ignored.

        Raises:
            InvalidArgumentError: it is no request, or the type of its key is not accepted.
        """
        return self._signed(request, [x509.UniformResourceIdentifier(name)], now, lasts)

    def sign_server(self, request: bytes, name: str, hosts: Sequence[str], now: datetime) -> bytes:
        """Return the certificate of a server that is also valid for host names or addresses; see
        `sign`."""
        names = [x509.UniformResourceIdentifier(name), *map(_host_name, hosts)]
        return self._signed(request, names, now, _SERVER_LASTS)

    def _signed(
        self, request: bytes, names: list[x509.GeneralName], now: datetime, lasts: timedelta
    ) -> bytes:
        try:
            asked = x509.load_pem_x509_csr(request)
            is_own = asked.is_signature_valid
        except (ValueError, TypeError) as error:
            raise InvalidArgumentError(
                "cannot sign the request: it is not a certificate signing request"
            ) from error
        key = asked.public_key()
        if not is_own or not isinstance(key, ec.EllipticCurvePublicKey):
            raise InvalidArgumentError(
                "cannot sign the request: its key must be an elliptic-curve key"
            )
        signer = serialization.load_pem_private_key(self.key, None)
        assert isinstance(signer, ec.EllipticCurvePrivateKey)
        certificate = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([]))
            .issuer_name(x509.load_pem_x509_certificate(self.certificate).subject)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - _SKEW)
            .not_valid_after(now + lasts)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs=False), critical=True)
            .add_extension(
                x509.ExtendedKeyUsage(
                    [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
                ),
                critical=False,
            )
            .add_extension(x509.SubjectAlternativeName(names), critical=True)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key()),
                critical=False,
            )
            .sign(signer, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM)


def _host_name(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _pem_of(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs,
        crl_sign=signs,
        encipher_only=False,
        decipher_only=False,
    )
