"""A typed interface to network links, addresses and routes; pyroute2 has no types."""

import ipaddress
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any

from pyroute2 import AsyncIPRoute, NetlinkError

from sandyard.server.core.errors import InternalError

_NARROW = 8
_TRIES = 5


class Netlink:
    """Netlink in one network namespace."""

    def __init__(self, ip: AsyncIPRoute) -> None:
        self._ip = ip

    async def add_veth(self, name: str, *, peer: str, peer_netns: str) -> None:
        """Add a pair of links with one end in another namespace."""
        await self._link(
            "add", ifname=name, kind="veth", peer={"ifname": peer, "net_ns_fd": peer_netns}
        )

    async def add_tap(self, name: str, *, uid: int) -> None:
        """Add a tap device that an account may attach to."""
        await self._link("add", ifname=name, kind="tuntap", mode="tap", uid=uid)

    async def bring_up(
        self,
        name: str,
        *,
        address: ipaddress.IPv4Interface | None = None,
        mac: str | None = None,
    ) -> None:
        """Add addresses to a link, if any, and set it up."""
        index = await self._index(name)
        if mac is not None:
            await self._link("set", index=index, address=mac)
        if address is not None:
            await self._call(
                "addr", "add", index=index, address=str(address.ip),
                prefixlen=address.network.prefixlen,
            )  # fmt: skip
        await self._link("set", index=index, state="up")

    async def add_default_route(self, gateway: ipaddress.IPv4Address) -> None:
        """Add a default route through a gateway."""
        await self._call("route", "add", dst="default", gateway=str(gateway))

    async def add_neighbour(self, link: str, *, ip: str, mac: str) -> None:
        """Add a permanent neighbour entry, so that no packet waits for address resolution."""
        index = await self._index(link)
        await self._call("neigh", "add", dst=ip, lladdr=mac, ifindex=index, state="permanent")

    async def delete_link(self, name: str) -> None:
        """Delete a link together with its other end; does nothing if it does not exist."""
        found = await self._ip.link_lookup(ifname=name)
        if found:
            try:
                await self._ip.link("del", index=found[0])
            except NetlinkError as error:
                if error.code != 19:  # ENODEV: it has disappeared meanwhile
                    raise InternalError(f"cannot delete the link {name}: {error}") from error

    async def link_names(self) -> list[str]:
        """Return the names of all links."""
        return [str(link.get_attr("IFLA_IFNAME")) async for link in await self._ip.get_links()]

    async def routes(self) -> list[ipaddress.IPv4Network]:
        """Return the destinations of the main routing table, without the default route."""
        networks = []
        for route in await self._routes():
            destination = route.get_attr("RTA_DST")
            if destination is not None:
                networks.append(
                    ipaddress.IPv4Network((str(destination), int(route["dst_len"])), strict=False)
                )
        return networks

    async def neighbours(self) -> set[ipaddress.IPv4Network]:
        """Return the networks that this host is directly connected to.

        Very large networks, such as those of tunnels, are left out.
        """
        found = set()
        for route in await self._routes():
            names = ("RTA_GATEWAY", "RTA_VIA", "RTA_MULTIPATH")
            destination = route.get_attr("RTA_DST")
            is_direct = all(route.get_attr(name) is None for name in names)
            if destination is not None and is_direct and int(route["dst_len"]) >= _NARROW:
                found.add(
                    ipaddress.IPv4Network((str(destination), int(route["dst_len"])), strict=False)
                )
        return found

    async def _routes(self) -> list[Any]:
        for _ in range(_TRIES):
            with suppress(NetlinkError):  # they were changed while they were listed
                return [one async for one in await self._ip.get_routes(family=2, table=254)]
        raise InternalError("cannot list the host's routes: they change all the time")

    async def _index(self, name: str) -> int:
        found = await self._ip.link_lookup(ifname=name)
        if not found:
            raise InternalError(f"cannot find the link {name}")
        return int(found[0])

    async def _link(self, verb: str, **arguments: object) -> None:
        await self._call("link", verb, **arguments)

    async def _call(self, what: str, verb: str, **arguments: object) -> None:
        try:
            await getattr(self._ip, what)(verb, **arguments)
        except NetlinkError as error:
            raise InternalError(f"cannot {verb} {what} {arguments}: {error}") from error


@asynccontextmanager
async def netlink() -> AsyncIterator[Netlink]:
    """Open netlink in the network namespace of the current thread.

    (pyroute2's way to enter another namespace forks the process; see `namespaces.in_namespace`.)
    """
    async with AsyncIPRoute() as ip:
        yield Netlink(ip)
