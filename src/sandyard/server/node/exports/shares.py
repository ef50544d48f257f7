"""What a machine may mount, and who sees to that it can."""

import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Protocol

from sandyard.server.core.contracts.node import MountWish
from sandyard.server.core.ops import MountAll, MountPoint
from sandyard.server.drivers.contract import Place
from sandyard.server.tasks import Crew

_PORTS = range(20_000, 60_000)
_CLIENT_BYTES = 12  # a server keeps it, in a form twice as long, with a host's name in a file's


@dataclass(frozen=True)
class Share:
    """What a machine may mount: an organization's workspaces, from a port of its gateway, as a
    client of this name.

    Port and name are the machine's own as long as it goes on from where it stood. A clone gets
    others: the kernel of each keeps sequence numbers of its own for what it asks a server, and two
    that go by one name would be taken for one.
    """

    org_id: str
    port: int
    client: str = field(repr=False)
    mounts: tuple[MountWish, ...] = ()

    @property
    def operation(self) -> MountAll:
        """What the machine is asked to do."""
        points = [MountPoint(one.workspace_id, one.path, one.read_only) for one in self.mounts]
        return MountAll(self.port, self.client, points)


def new_share(org_id: str, mounts: tuple[MountWish, ...]) -> Share:
    """Return what a machine that begins anew may mount."""
    return Share(org_id, secrets.choice(_PORTS), secrets.token_hex(_CLIENT_BYTES), mounts)


class Exports(Protocol):
    """Lets machines mount workspaces, in their places."""

    def slots(self) -> list[int]:
        """Return the numbers of the places that file servers of an earlier process have."""
        ...

    async def open(self, shares: Iterable[tuple[Place, Share]], crew: Crew) -> None:
        """Look after what machines that live on have mounted, and remove what else is left."""
        ...

    async def close(self) -> None:
        """Let go of what machines use, which goes on, and give back the rest."""
        ...

    async def prepare(self, org_id: str) -> None:
        """Return once there is somebody to mount an organization's workspaces from.

        Raises:
            UnsupportedError: there cannot be, here.
            UnavailableError: not now.
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
