"""The credentials that a process holds: headers for hosts, and an issuer of certificates."""

from collections.abc import Container
from pathlib import Path

from sandyard.server.core.egress import Credentials, Header, pattern_of
from sandyard.server.egress.http import Headers, RefusedError
from sandyard.server.egress.tls import Issuer


class Held:
    """Credentials, ready to use."""

    def __init__(self, credentials: Credentials, *, folder: Path) -> None:
        """Use credentials; see `Issuer` for `folder`.

        Raises:
            ValueError: the authority cannot be used.
        """
        self.stamp = credentials.stamp
        self.issuer = Issuer(credentials.certificate, credentials.key, folder=folder)
        self._headers = [(pattern_of(one.host), one) for one in credentials.headers]

    def added(self, host: str, headers: Headers) -> tuple[Headers, frozenset[str], int]:
        """Return headers with those that a host is given instead of the guest's own, the names of
        the secrets in them, and their number.

        Raises:
            RefusedError: a secret is missing.
        """
        given: dict[str, Header] = {}
        for pattern, one in self._headers:
            if pattern.matches(host):
                given[_plain(one.name)] = one
        added = []
        for header in given.values():
            if header.value is None:
                raise RefusedError(
                    502,
                    f"a secret for {host} is missing: {', '.join(header.secrets)}; it was deleted, "
                    "is not for this host, or is too long for a header",
                )
            added.append((header.name.encode(), header.value.encode()))
        kept = [
            (name, _without(value, given) if name.lower() == b"connection" else value)
            for name, value in headers
            if _plain(name.decode("latin-1")) not in given
        ]
        used = frozenset(secret for one in given.values() for secret in one.secrets)
        return [*kept, *added], used, len(added)


def _plain(name: str) -> str:
    """Return a header's name as servers read it that take names of variables (RFC 3875, 4.1.18)."""
    return name.lower().replace("_", "-")


def _without(value: bytes, given: Container[str]) -> bytes:
    """Return a Connection header that does not have given headers taken away on their way."""
    words = (one.strip() for one in value.decode("latin-1").split(","))
    return ", ".join(one for one in words if _plain(one) not in given).encode("latin-1")
