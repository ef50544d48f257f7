"""What a sandbox may reach, and what it has reached."""

import builtins
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from sandyard.client import calls
from sandyard.client._async.transport import AsyncTransport


class AsyncNetwork:
    """The network rules of one sandbox, and its connections."""

    def __init__(self, transport: AsyncTransport, reference: str) -> None:
        self._transport = transport
        self._reference = reference

    async def rules(self) -> Mapping[str, Any]:
        """Return what the sandbox may reach."""
        return await self._transport.send(calls.network(self._reference))

    async def replace(
        self,
        *,
        egress: str = "allow",
        allow: Sequence[str] = (),
        deny: Sequence[str] = (),
        inspect: Sequence[str] = (),
        inject: Sequence[Mapping[str, Any]] = (),
    ) -> Mapping[str, Any]:
        """Replace what the sandbox may reach, and return it; see `ChangeOptions.network`. The rules
        are in force when this returns."""
        rules = {
            "egress": egress,
            "allow": list(allow),
            "deny": list(deny),
            "inspect": list(inspect),
            "inject": [dict(one) for one in inject],
        }
        return await self._transport.send(calls.set_network(self._reference, rules))

    async def connections(self, *, since: float | None = None) -> builtins.list[Mapping[str, Any]]:
        """Return what a sandbox with network rules reached or was refused, oldest first: the
        latest, or those after a time, in seconds since 1970."""
        call = calls.connections(self._reference, since)
        found: builtins.list[Mapping[str, Any]] = await self._transport.send(call)
        return found

    async def __call__(self) -> Mapping[str, Any]:
        """Return what the sandbox may reach. Deprecated: use `rules`."""
        warn_of("network()", "network.rules()")
        return await self.rules()


class AsyncFormerNames:
    """Names that methods of a sandbox had before; they will be removed."""

    @property
    def network(self) -> AsyncNetwork:
        """Its network rules, and its connections."""
        raise NotImplementedError

    async def set_network(
        self,
        *,
        egress: str = "allow",
        allow: Sequence[str] = (),
        deny: Sequence[str] = (),
        inspect: Sequence[str] = (),
        inject: Sequence[Mapping[str, Any]] = (),
    ) -> Mapping[str, Any]:
        """Replace what it may reach. Deprecated: use `network.replace`."""
        warn_of("set_network", "network.replace")
        return await self.network.replace(
            egress=egress, allow=allow, deny=deny, inspect=inspect, inject=inject
        )

    async def connections(self, *, since: float | None = None) -> builtins.list[Mapping[str, Any]]:
        """Return what it reached or was refused. Deprecated: use `network.connections`."""
        warn_of("connections", "network.connections")
        return await self.network.connections(since=since)


def warn_of(old: str, new: str) -> None:
    """Warn the caller's caller that a name is deprecated."""
    message = f"`{old}` of a sandbox is deprecated and will be removed; use `{new}`"
    warnings.warn(message, DeprecationWarning, stacklevel=3)
