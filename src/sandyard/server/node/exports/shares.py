"""What a machine may mount, and who sees to that it can."""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

from sandyard.server.core.contracts.node import MountWish
from sandyard.server.core.ops import MountAll, MountPoint
from sandyard.server.drivers.contract import Place
from sandyard.server.tasks import Crew

# Within firewall.SHARE_PORTS, and none that the kernel gives to the node's own connections.
_PORTS = range(20_000, 32_000)
_CLIENT_BYTES = 12  # a server keeps it, in a form twice as long, with a host's name in a file's


@dataclass(frozen=True)
class Part:
    """The workspaces that one file server exports to one machine.

    `port` is the server's, on the machine's gateway; `client` is the name the machine mounts by.
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
    """What a machine may mount: an organization's workspaces, from ports of its gateway, as a
    client of this name.

    Port and name are the machine's own as long as it goes on from where it stood. A clone gets
    others: the kernel of each keeps sequence numbers of its own for what it asks a server, and two
    that go by one name would be taken for one.

    What may only be read comes from a server of its own, at the port above; not so in a machine
    that mounted before there was a second (`is_split`).
    """

    org_id: str
    port: int
    client: str = field(repr=False)
    mounts: tuple[MountWish, ...] = ()
    is_split: bool = False

    @property
    def parts(self) -> tuple[Part, ...]:
        """What each of its file servers exports.

        A workspace that is mounted both ways is exported for writing alone.
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

    @property
    def operations(self) -> list[MountAll]:
        """What the machine is asked to do, in this order: one path may lie below another."""
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
    """Return what a machine that begins anew may mount."""
    return Share(
        org_id, secrets.choice(_PORTS), secrets.token_hex(_CLIENT_BYTES), mounts, is_split=True
    )


class Exports(Protocol):
    """Lets machines mount workspaces, in their places."""

    async def open(self, shares: Iterable[tuple[Place, Share]], crew: Crew) -> None:
        """Look after what machines that live on have mounted, and remove what else is left."""
        ...

    async def close(self) -> None:
        """Leave running what machines use; the next process finds it."""
        ...

    def limited(self) -> tuple[str, ...]:
        """Return what mounted workspaces cannot do on this host, a sentence each."""
        ...

    async def check(self) -> None:
        """Return if workspaces can be mounted on this host.

        Raises:
            UnsupportedError: they cannot; the message says what is missing.
        """
        ...

    async def grant(self, place: Place, share: Share) -> None:
        """Return once the machine in a place can mount what it may, and nothing else.

        Raises:
            UnavailableError: not now.
            NotFoundError: a workspace was removed.
        """
        ...

    async def revoke(self, place: Place) -> None:
        """Have nothing mounted in a place any more; nothing happens if nothing is."""
        ...

    async def withdraw(self, workspace_id: str) -> None:
        """Have a workspace mounted nowhere any more."""
        ...
