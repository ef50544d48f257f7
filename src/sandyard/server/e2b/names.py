"""Names: which sandbox and port a request is for.

The host name says it (`{port}-{sandbox}.{domain}`), or two headers do, where clients are given one
URL for all sandboxes.
"""

from dataclasses import dataclass
from typing import Final

from starlette.types import Scope

from sandyard.server.core.ids import is_sandbox_id
from sandyard.server.front.dispatch import Matcher
from sandyard.server.front.headers import first
from sandyard.server.front.hosts import is_below, name_of

ENVD_PORT: Final = 49983
"""The port at which clients expect the daemon of a sandbox."""
_ID, _PORT = b"e2b-sandbox-id", b"e2b-sandbox-port"
_PORT_DIGITS = 5


@dataclass(frozen=True)
class Target:
    """A port of a sandbox. `host` is the host name of the request, if that named the sandbox."""

    sandbox_id: str
    port: int
    host: str | None = None


def target_of(scope: Scope, domain: str | None) -> Target | None:
    """Return what a request is for, None if it is for the API itself."""
    headers = scope["headers"]
    host = first(headers, b"host") or ""
    if domain is not None and is_below(host, domain):
        name = name_of(host, domain)
        if name is not None and name.token is None:
            return Target(name.sandbox_id, name.port, name.host)
    sandbox_id, port = first(headers, _ID), first(headers, _PORT)
    if sandbox_id is None or port is None or not is_sandbox_id(sandbox_id):
        return None
    if not (port.isascii() and port.isdigit() and len(port) <= _PORT_DIGITS):
        return None
    return Target(sandbox_id, int(port))


def for_envd(matcher: Matcher, domain: str | None) -> Matcher:
    """Match what `matcher` does, limited to the daemon of a sandbox."""

    def matches(scope: Scope) -> bool:
        target = target_of(scope, domain) if matcher(scope) else None
        return target is not None and target.port == ENVD_PORT

    return matches


def for_port(matcher: Matcher, domain: str | None) -> Matcher:
    """Match what `matcher` does, limited to the other ports of sandboxes."""

    def matches(scope: Scope) -> bool:
        target = target_of(scope, domain) if matcher(scope) else None
        return target is not None and target.port != ENVD_PORT

    return matches


def client_domain(scope: Scope, domain: str | None) -> str | None:
    """Return the domain that is sent to clients, under which they find sandboxes.

    Without one in the settings it is the host that the client used: told none, it would send the
    sandbox's token to E2B's own domain.
    """
    if domain is not None:
        return domain
    return (first(scope["headers"], b"host") or "").removeprefix("api.") or None
