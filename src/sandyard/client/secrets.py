"""Calls of secrets, which requests of sandboxes are given outside the machine."""

from collections.abc import Mapping, Sequence
from typing import Any

from sandyard.client.calls import Call, part_of
from sandyard.client.models import Secret

_PATH = "/v1/secrets"


def _secret_of(data: Mapping[str, Any]) -> Secret:
    return Secret(
        id=data["id"],
        name=data["name"],
        hosts=tuple(data["hosts"]),
        last_used_at=data["lastUsedAt"],
        raw=data,
    )


def add(name: str, value: str, hosts: Sequence[str]) -> Call[Secret]:
    """Add a secret."""
    body = {"name": name, "value": value, "hosts": list(hosts)}
    return Call("POST", _PATH, lambda a: _secret_of(a["data"]), body=body)


def replace(name: str, value: str | None, hosts: Sequence[str] | None) -> Call[Secret]:
    """Replace a secret, its hosts, or both."""
    given = {"value": value, "hosts": None if hosts is None else list(hosts)}
    body = {key: one for key, one in given.items() if one is not None}
    path = part_of(_PATH, name)
    return Call("PUT", path, lambda a: _secret_of(a["data"]), body=body, safe=True)


def listing() -> Call[list[Secret]]:
    """List the secrets."""
    return Call("GET", _PATH, lambda a: [_secret_of(one) for one in a["data"]], safe=True)


def delete(name: str) -> Call[None]:
    """Delete a secret."""
    return Call("DELETE", part_of(_PATH, name), lambda _: None)
