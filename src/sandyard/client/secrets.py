"""Secrets that requests of sandboxes are given outside the machine."""

from collections.abc import Mapping, Sequence
from typing import Any

from sandyard.client.calls import Call, part_of
from sandyard.client.models import Secret
from sandyard.client.transport import AsyncTransport, Transport

_PATH = "/v1/secrets"


def _secret_of(data: Mapping[str, Any]) -> Secret:
    return Secret(
        id=data["id"],
        name=data["name"],
        hosts=tuple(data["hosts"]),
        last_used_at=data["lastUsedAt"],
        raw=data,
    )


def _add(name: str, value: str, hosts: Sequence[str]) -> Call[Secret]:
    body = {"name": name, "value": value, "hosts": list(hosts)}
    return Call("POST", _PATH, lambda a: _secret_of(a["data"]), body=body)


def _replace(name: str, value: str | None, hosts: Sequence[str] | None) -> Call[Secret]:
    given = {"value": value, "hosts": None if hosts is None else list(hosts)}
    body = {key: one for key, one in given.items() if one is not None}
    path = part_of(_PATH, name)
    return Call("PUT", path, lambda a: _secret_of(a["data"]), body=body, safe=True)


def _listing() -> Call[list[Secret]]:
    return Call("GET", _PATH, lambda a: [_secret_of(one) for one in a["data"]], safe=True)


def _delete(name: str) -> Call[None]:
    return Call("DELETE", part_of(_PATH, name), lambda _: None)


class SecretMethods:
    """The methods of `Sandyard` about secrets."""

    _transport: Transport

    def add_secret(self, name: str, value: str, hosts: Sequence[str]) -> Secret:
        """Keep a secret that may be sent to `hosts`: names, or with `*.` all below one."""
        return self._transport.send(_add(name, value, hosts))

    def replace_secret(
        self, name: str, value: str | None = None, *, hosts: Sequence[str] | None = None
    ) -> Secret:
        """Replace a secret's value, its hosts, or both. It is in force when this returns."""
        return self._transport.send(_replace(name, value, hosts))

    def secrets(self) -> list[Secret]:
        """Return the secrets by name, without their values."""
        return self._transport.send(_listing())

    def delete_secret(self, name: str) -> None:
        """Delete a secret. Requests that need it are refused from then on."""
        self._transport.send(_delete(name))


class AsyncSecretMethods:
    """See `SecretMethods`."""

    _transport: AsyncTransport

    async def add_secret(self, name: str, value: str, hosts: Sequence[str]) -> Secret:
        """See `Sandyard.add_secret`."""
        return await self._transport.send(_add(name, value, hosts))

    async def replace_secret(
        self, name: str, value: str | None = None, *, hosts: Sequence[str] | None = None
    ) -> Secret:
        """See `Sandyard.replace_secret`."""
        return await self._transport.send(_replace(name, value, hosts))

    async def secrets(self) -> list[Secret]:
        """See `Sandyard.secrets`."""
        return await self._transport.send(_listing())

    async def delete_secret(self, name: str) -> None:
        """See `Sandyard.delete_secret`."""
        await self._transport.send(_delete(name))
