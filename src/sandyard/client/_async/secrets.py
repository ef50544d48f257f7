"""Secrets that requests of sandboxes are given outside the machine."""

from collections.abc import Sequence

from sandyard.client import secrets
from sandyard.client._async.transport import AsyncTransport
from sandyard.client.models import Secret


class AsyncSecretMethods:
    """The methods of `AsyncSandyard` about secrets."""

    _transport: AsyncTransport

    async def add_secret(self, name: str, value: str, hosts: Sequence[str]) -> Secret:
        """Keep a secret that may be sent to `hosts`: names, or with `*.` all below one."""
        return await self._transport.send(secrets.add(name, value, hosts))

    async def replace_secret(
        self, name: str, value: str | None = None, *, hosts: Sequence[str] | None = None
    ) -> Secret:
        """Replace a secret's value, its hosts, or both. It is in force when this returns."""
        return await self._transport.send(secrets.replace(name, value, hosts))

    async def secrets(self) -> list[Secret]:
        """Return the secrets by name, without their values."""
        return await self._transport.send(secrets.listing())

    async def delete_secret(self, name: str) -> None:
        """Delete a secret. Requests that need it are refused from then on."""
        await self._transport.send(secrets.delete(name))
