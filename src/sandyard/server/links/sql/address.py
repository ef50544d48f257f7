"""Reads the URL of a PostgreSQL database, with the parameters for TLS that libpq's URLs have."""

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from sqlalchemy import URL, make_url

from sandyard.server.core.errors import InternalError, UnavailableError

_MODES: Final = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")
_MAY_BE_PLAIN: Final = frozenset({"disable", "allow", "prefer"})
_NAMES: Final = ("sslmode", "ssl", "sslrootcert", "sslcert", "sslkey")
_SYSTEM: Final = "system"
_SYSTEM_FILE: Final = "/etc/ssl/certs/ca-certificates.crt"


@dataclass(frozen=True)
class Tls:
    """How a connection to a database is secured: one of libpq's modes, or None for the default; and
    the files of the trusted authority and of the client's own certificate and key."""

    mode: str | None = None
    root: str | None = None
    certificate: str | None = None
    key: str | None = None


def tls_of(url: str) -> Tls:
    """Return how the connections to a database are secured.

    `sslmode` is one of libpq's (postgresql.org/docs/current/libpq-ssl.html): by default `prefer`,
    which uses TLS if the server offers it and verifies nothing. `sslrootcert` is the file of the
    trusted authority, by default ~/.postgresql/root.crt. Without any, `verify-full` trusts the
    system's authorities. With `sslrootcert`, TLS is always verified.

    Raises:
        InternalError: the mode is unknown, or lacks an authority.
    """
    given = {name: _one(make_url(url), name) for name in _NAMES}
    mode, root = given["sslmode"] or given["ssl"], given["sslrootcert"]
    if mode is not None and mode not in _MODES:
        raise InternalError(f"cannot open the database: sslmode is one of {', '.join(_MODES)}")
    if mode == "disable":
        return Tls(mode)
    if mode is None or mode in _MAY_BE_PLAIN:
        if root is None and given["sslcert"] is None:
            return Tls(mode)
        mode = "require" if root is None else "verify-ca"
    root = root or _usual_root()
    if mode == "verify-full" and root in (None, _SYSTEM):
        root = ssl.get_default_verify_paths().cafile or _SYSTEM_FILE
    elif root == _SYSTEM or (mode == "verify-ca" and root is None):
        raise InternalError(
            f"cannot open the database: sslmode={mode} needs sslrootcert, the file of an authority "
            "of your own; public authorities are for verify-full"
        )
    return Tls(mode, root, given["sslcert"], given["sslkey"])


def read_postgres_url(url: str) -> tuple[URL, dict[str, Any]]:
    """Return the URL for SQLAlchemy, and what its driver is given besides; see `tls_of`.

    Raises:
        InternalError: see `tls_of`.
        UnavailableError: a file cannot be used.
    """
    tls = tls_of(url)
    parsed = make_url(url).set(drivername="postgresql+asyncpg").difference_update_query(_NAMES)
    if tls.mode is None:
        return parsed, {}
    return parsed, {"ssl": tls.mode if tls.mode in _MAY_BE_PLAIN else _context(tls)}


def _one(url: URL, name: str) -> str | None:
    found = url.query.get(name)
    return found if isinstance(found, str) or found is None else found[-1]


def _usual_root() -> str | None:
    path = Path("~/.postgresql/root.crt").expanduser()
    return str(path) if path.exists() else None


def _context(tls: Tls) -> ssl.SSLContext:
    try:
        context = ssl.create_default_context(cafile=tls.root)
        context.check_hostname = tls.mode == "verify-full"
        # As with libpq, an authority that is there is also used where that is not required.
        context.verify_mode = ssl.CERT_NONE if tls.root is None else ssl.CERT_REQUIRED
        if tls.certificate is not None:
            context.load_cert_chain(tls.certificate, tls.key)
    except (OSError, ssl.SSLError) as error:
        raise UnavailableError(
            f"cannot use sslrootcert={tls.root} or sslcert={tls.certificate} for the database: "
            f"{error}"
        ) from error
    return context
