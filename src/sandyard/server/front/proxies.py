"""Who a client is behind proxies that the operator trusts."""

import ipaddress
from collections.abc import Sequence

from starlette.types import ASGIApp, Receive, Scope, Send

Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_Address = ipaddress.IPv4Address | ipaddress.IPv6Address
_HOPS_MAX = 32
_SECURE = {"http": "https", "ws": "wss"}


class TrustedProxies:
    """An application that sees the client's address and scheme as trusted proxies report them.

    X-Forwarded-For is read from its end, where the nearest proxy writes, for as long as the address
    that wrote is trusted. The client is the first address that is not. What is no address ends the
    search, so an application is never given anything else. From any other client the headers mean
    nothing.
    """

    def __init__(self, app: ASGIApp, trusted: Sequence[Network]) -> None:
        self._app = app
        self._trusted = trusted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        client = scope.get("client")
        nearest = _address(client[0]) if client else None
        if nearest is not None and self._is_trusted(nearest):
            found = self._client(scope["headers"], nearest)
            if found is not nearest:
                scope = {**scope, "client": (str(found), 0)}
            if _is_secure(scope["headers"]):
                scope = {**scope, "scheme": _SECURE.get(scope["scheme"], scope["scheme"])}
        await self._app(scope, receive, send)

    def _client(self, headers: Sequence[tuple[bytes, bytes]], nearest: _Address) -> _Address:
        values = [value for name, value in headers if name == b"x-forwarded-for"]
        found = nearest
        for one in reversed(b",".join(values).split(b",")[-_HOPS_MAX:]):
            hop = _address(one.decode("latin-1").strip())
            if hop is None:
                break
            found = hop
            if not self._is_trusted(hop):
                break
        return found

    def _is_trusted(self, address: _Address) -> bool:
        return any(address in network for network in self._trusted)


def _address(text: str) -> _Address | None:
    """Return the address in an entry, which may have a port; None if it is none."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    mapped = found.ipv4_mapped if isinstance(found, ipaddress.IPv6Address) else None
    return mapped or found


def _is_secure(headers: Sequence[tuple[bytes, bytes]]) -> bool:
    values = [value for name, value in headers if name == b"x-forwarded-proto"]
    return bool(values) and values[-1].rpartition(b",")[2].strip().lower() in (b"https", b"wss")
