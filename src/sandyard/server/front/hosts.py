"""Hosts: what a request's Host header says, and matchers for the dispatch table."""

import ipaddress
import re
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.types import Scope

from sandyard.server.core.wire import is_guests_port
from sandyard.server.front.dispatch import Matcher

_LABEL = re.compile(r"([1-9][0-9]{0,4})-(sandbox-[a-z0-9]{12})(?:-([a-z2-7]{26}))?")
_HOST = re.compile(r"(?P<name>[a-z0-9.-]+)(?::(?P<port>[1-9][0-9]{0,4}))?")
_USUAL = frozenset({"80", "443"})


@dataclass(frozen=True)
class PortName:
    """A host name that leads to a port of a sandbox: `{port}-{sandbox}` or
    `{port}-{sandbox}-{token}`, below a domain.

    `below` is that domain, with the port that the client uses.
    """

    port: int
    sandbox_id: str
    token: str | None
    below: str

    @property
    def host(self) -> str:
        """The name without its token, and the client's port."""
        return f"{self.port}-{self.sandbox_id}.{self.below}"

    @property
    def full_host(self) -> str:
        """The name as the client knows it."""
        token = "" if self.token is None else f"-{self.token}"
        return f"{self.port}-{self.sandbox_id}{token}.{self.below}"


def below(domain: str) -> Matcher:
    """Match requests for a domain and all names below it."""
    return lambda scope: any(is_below(one, domain) for one in _hosts_of(scope))


def named(names: Sequence[str]) -> Matcher:
    """Match requests for exactly these names, for IP addresses and for `localhost`.

    Without names, match all requests.
    """
    known = {one.lower().rstrip(".") for one in names} | {"localhost"}

    def matches(scope: Scope) -> bool:
        found = [_bare(one) for one in _hosts_of(scope)]
        return all(one in known or _is_address(one) for one in found)

    return matches if names else lambda _: True


def at_paths(matcher: Matcher, *, exactly: Sequence[str], prefixes: Sequence[str]) -> Matcher:
    """Match what `matcher` does, limited to some paths and those below some prefixes."""
    paths, starts = frozenset(exactly), tuple(f"{one}/" for one in prefixes)
    return lambda scope: (
        (scope["path"] in paths or scope["path"].startswith(starts)) and matcher(scope)
    )


def is_below(host: str, domain: str) -> bool:
    """Tell whether a Host header names a domain or a name below it, well formed or not.

    A malformed name below the domain of previews is never taken for the platform's own name.
    """
    name = _bare(host)
    wanted = _without_port(domain)
    return name == wanted or name.endswith(f".{wanted}")


def name_of(host: str, domain: str) -> PortName | None:
    """Return what a Host header says, None if it is not exactly the name of a sandbox's port.

    The client's port may be any: it may come through a proxy, or through a port that ssh forwards.
    A fully qualified name may end in a dot.
    """
    found = _HOST.fullmatch(host.lower())
    if found is None:
        return None
    name, port = found["name"].removesuffix("."), found["port"] or ""
    bare = _without_port(domain)
    label = _LABEL.fullmatch(name.removesuffix(f".{bare}")) if name.endswith(f".{bare}") else None
    if label is None or not is_guests_port(int(label[1])):
        return None
    below = bare if not port or (port in _USUAL and ":" not in domain) else f"{bare}:{port}"
    return PortName(int(label[1]), label[2], label[3], below)


def _hosts_of(scope: Scope) -> list[str]:
    return [value.decode("latin-1") for name, value in scope.get("headers", ()) if name == b"host"]


def _bare(host: str) -> str:
    return _without_port(host.lower().rpartition("@")[2]).rstrip(".")


def _without_port(host: str) -> str:
    return re.sub(r":[^:\]]*$", "", host)


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
