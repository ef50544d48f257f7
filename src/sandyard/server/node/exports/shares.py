"""What a machine may mount, and the interface of the component that provides it."""

import secrets
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Protocol

from sandyard.server.core.contracts.node import MountWish
from sandyard.server.core.ops import MountAll, MountPoint
from sandyard.server.drivers.contract import Place
from sandyard.server.tasks import Crew

# Within firewall.SHARE_PORTS, and none that the kernel gives to the node's own connections.
_PORTS = range(20_000, 32_000)
_CLIENT_BYTES = 12  # a server stores it, twice as long and with a host's name, as a file's name


@dataclass(frozen=True)
class Part:
    """The workspaces that one file server exports to one machine.

    `port` is the server's port on the machine's gateway; `client` is the NFS client name of the
    machine.
    """

    port: int
    client: str = field(repr=False)
    writable: tuple[MountWish, ...] = ()
    read_only: tuple[MountWish, ...] = ()

    @property
    def mounts(self) -> dict[str, MountWish]:
        """Its workspaces by id."""
        return {one.workspace_id: one for one in self.writable + self.read_only}


@dataclass(frozen=True)
class Share:
    """What a machine may mount: an organization's workspaces, from ports of its gateway, with a
    client name.

    A machine keeps its ports and name as long as its state continues. A clone gets new ones: each
    kernel keeps its own sequence numbers for a server, and two clients with one name would be
    treated as one.

    Read-only workspaces come from a second server, on the next port, except in machines that
    mounted before that server existed (`is_split`).
    """

    org_id: str
    port: int
    client: str = field(repr=False)
    mounts: tuple[MountWish, ...] = ()
    is_split: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        """What each of its file servers exports.

        A workspace that is mounted both read-only and writable is only exported as writable.
        """
        writable = {one.workspace_id for one in self.mounts if not one.read_only}
        written = tuple(one for one in self.mounts if one.workspace_id in writable)
        read = tuple(one for one in self.mounts if one.workspace_id not in writable)
        if not self.is_split:
            return (Part(self.port, self.client, written, read),)
        parts = (
            Part(self.port, self.client, writable=written),
            Part(self.port + 1, self.client, read_only=read),
        )
        return tuple(one for one in parts if one.mounts)

    def only(self, workspace_ids: Collection[str]) -> "Share":
        """Return the share with these of its workspaces alone."""
        mounts = tuple(one for one in self.mounts if one.workspace_id in workspace_ids)
        return replace(self, mounts=mounts)

    @property
    def operations(self) -> list[MountAll]:
        """The mount operations of the agent, in order: a path may be inside another."""
        ports = {name: part.port for part in self.parts for name in part.mounts}
        return [
            MountAll(
                port,
                self.client,
                [MountPoint(one.workspace_id, one.path, one.read_only) for one in group],
            )
            for port, group in groupby(self.mounts, lambda one: ports[one.workspace_id])
        ]


def new_share(org_id: str, mounts: tuple[MountWish, ...]) -> Share:
    """Return what a machine that starts from the beginning may mount."""
    return Share(
        org_id, secrets.choice(_PORTS), secrets.token_hex(_CLIENT_BYTES), mounts, is_split=True
    )


class Exports(Protocol):
    """Lets machines mount workspaces, by slot."""

    async def open(self, shares: Iterable[tuple[Place, Share]], crew: Crew) -> None:
        """Resume the servers of running machines, and remove all others."""
        ...

    async def close(self) -> None:
        """Leave the servers of running machines alone; the next process takes them over."""
        ...

    def limited(self) -> tuple[str, ...]:
        """Return the limitations of mounted workspaces on this host, one sentence each."""
        ...

    async def check(self) -> None:
        """Return if workspaces can be mounted on this host.

        Raises:
            UnsupportedError: they cannot; the message says what is missing.
        """
        ...

    async def grant(self, place: Place, share: Share) -> None:
        """Return once the machine in a slot can mount exactly this share.

        Raises:
            UnavailableError: not at the moment.
            NotFoundError: a workspace was removed.
        """
        ...

    async def revoke(self, place: Place) -> None:
        """Stop exporting to a slot; does nothing if nothing is exported."""
        ...

    async def withdraw(self, workspace_id: str) -> None:
        """Stop exporting a workspace to any slot."""
        ...
