"""Connections to the world outside, by name or address."""

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress

from sandyard.server.core.egress import Address
from sandyard.server.egress.resolver import Resolver, UnresolvedError
from sandyard.server.egress.streams import prepare

_DIAL_S, _TRIES = 8.0, 4
_A = 1


class DialError(Exception):
    """There is no connection; the message says why."""


class Dialer:
    """Dials. A name is resolved here, so that what the guest believes of it does not matter."""

    def __init__(self, resolver: Resolver) -> None:
        self._resolver = resolver

    async def by_name(
        self, name: str, port: int, may_reach: Callable[[Address], bool]
    ) -> tuple[socket.socket, Address]:
        """Return a connection to a port of a name, at one of its addresses that may be reached, and
        that address.

        Raises:
            DialError: the name has no address that may be reached, or none answers.
        """
        try:
            found = await self._resolver.find(name, _A)
        except UnresolvedError as error:
            raise DialError("the name cannot be resolved") from error
        addresses = [one for one in found.addresses if may_reach(one)]
        if not addresses:
            raise DialError(
                "its address is private or denied" if found.addresses else "the name has no address"
            )
        for one in addresses[:_TRIES]:
            with suppress(DialError):
                return await self.by_address(one, port), one
        raise DialError("it does not answer")

    async def by_address(self, address: Address, port: int) -> socket.socket:
        """Return a connection to a port of an address.

        Raises:
            DialError: it does not answer.
        """
        upstream = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        prepare(upstream)
        try:
            async with asyncio.timeout(_DIAL_S):
                await asyncio.get_running_loop().sock_connect(upstream, (str(address), port))
        except (OSError, TimeoutError) as error:
            upstream.close()
            raise DialError("it does not answer") from error
        except BaseException:
            upstream.close()
            raise
        return upstream
