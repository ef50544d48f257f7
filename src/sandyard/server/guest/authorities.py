"""The authorities that the user's programs trust: one more is added to every store of the image."""

import contextlib
import os
from pathlib import Path

from sandyard.server.guest.system import read_regular, replace_file

_CERTIFICATE = Path("/usr/local/share/ca-certificates/sandyard.crt")
# Where distributions read authorities when they make their bundles anew.
_SOURCES = (Path("/etc/pki/ca-trust/source/anchors"), Path("/etc/pki/trust/anchors"))
_HASHED = Path("/etc/ssl/certs")
# The first one that an image has is set in the environment of its programs.
_BUNDLES = (
    Path("/etc/ssl/certs/ca-certificates.crt"),  # Debian, Alpine
    Path("/etc/pki/ca-trust/extracted/pem/tls-ca-bundle.pem"),  # Fedora
    Path("/var/lib/ca-certificates/ca-bundle.pem"),  # SUSE
    Path("/etc/ssl/cert.pem"),
)
_ENVIRONMENT = Path("/etc/environment")
_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "GIT_SSL_CAINFO", "PIP_CERT")
_ADDED_TO_NODE = "NODE_EXTRA_CA_CERTS"


def add_authority(certificate: str, name_hash: str) -> None:
    """Add an authority's certificate (PEM); call it inside the user's root. May be repeated.

    Variables that name another bundle are left alone.

    Raises:
        OSError: a file cannot be written.
    """
    _CERTIFICATE.parent.mkdir(parents=True, exist_ok=True)
    replace_file(_CERTIFICATE, certificate, 0o644)
    for folder in _SOURCES:
        if folder.is_dir():
            replace_file(folder / _CERTIFICATE.name, certificate, 0o644)
    bundles = [one for one in _BUNDLES if one.exists()]
    if not bundles:
        _BUNDLES[0].parent.mkdir(parents=True, exist_ok=True)
        bundles = [_BUNDLES[0]]
    for path in {Path(os.path.realpath(one)) for one in bundles}:
        _append(path, certificate)
    if _HASHED.is_dir():
        with contextlib.suppress(FileExistsError):
            (_HASHED / f"{name_hash}.0").symlink_to(_CERTIFICATE)
    _add_variables({name: str(bundles[0]) for name in _VARIABLES})


def _add_variables(values: dict[str, str]) -> None:
    values[_ADDED_TO_NODE] = str(_CERTIFICATE)
    before = read_regular(_ENVIRONMENT) if _ENVIRONMENT.exists() else ""
    known = {line.strip().removeprefix("export ").partition("=")[0] for line in before.splitlines()}
    added = "".join(f"{name}={value}\n" for name, value in values.items() if name not in known)
    if added:
        _append(_ENVIRONMENT, added)


def _append(path: Path, text: str) -> None:
    """Add lines to a file, which may not exist, unless it has them."""
    before = read_regular(path) if path.exists() else ""
    if text in before:
        return
    separator = "" if not before or before.endswith("\n") else "\n"
    descriptor = os.open(
        path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644
    )
    with open(descriptor, "wb") as file:
        file.write((separator + text).encode())
