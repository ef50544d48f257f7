"""Network, disks and images for fake machines, without root, namespaces or large files."""

import asyncio
import socket
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from sandyard.server.core.contracts.volumes import Volumes
from sandyard.server.core.egress import Credentials, Policy
from sandyard.server.core.errors import NoCapacityError
from sandyard.server.drivers.contract import Place
from sandyard.server.drivers.fake import AGENT_SOCKET
from sandyard.server.node.exports.shares import Share
from sandyard.server.node.images.image import ROOTS, write_manifest
from sandyard.server.node.images.images import Images
from sandyard.server.tasks import Crew

_PLACES = 65536


class FakeNetwork:
    """See node.host.network.Network."""

    def __init__(self, places: int = _PLACES) -> None:
        self._free = list(range(places - 1, -1, -1))
        self.in_use: set[int] = set()
        self.rules: dict[int, Policy] = {}
        self.credentials: dict[int, Credentials | None] = {}

    async def open(
        self, *, in_use: Iterable[int], crew: Crew, on_change: Callable[[], None] = lambda: None
    ) -> None:
        """See node.host.network.Network.open."""
        self.in_use = set(in_use)
        self._free = [number for number in self._free if number not in self.in_use]

    async def close(self) -> None:
        """See node.host.network.Network.close."""

    async def take(self) -> Place:
        """See node.host.network.Network.take."""
        if not self._free:
            raise NoCapacityError("cannot place one more machine: all slots are in use")
        number = self._free.pop()
        self.in_use.add(number)
        return self.place(number)

    def place(self, number: int) -> Place:
        """See node.host.network.Network.place."""
        return Place(number, f"fake-{number}", "tap0", "02:00:00:00:00:02", f"fake:{number}", 0)

    async def restrict(
        self,
        place: Place,
        policy: Policy,
        *,
        folder: Path,
        credentials: Credentials | None = None,
    ) -> None:
        """See node.host.network.Network.restrict: the rules are noted."""
        self.rules[place.number] = policy
        if credentials is not None or not policy.ends_tls:
            self.credentials[place.number] = credentials

    def stamp(self, place: Place) -> str | None:
        """See node.host.network.Network.stamp."""
        held = self.credentials.get(place.number)
        return None if held is None else held.stamp

    async def give_back(self, place: Place) -> None:
        """See node.host.network.Network.give_back."""
        self.rules.pop(place.number, None)
        self.credentials.pop(place.number, None)
        if place.number in self.in_use:
            self.in_use.discard(place.number)
            self._free.append(place.number)

    async def dial(self, place: Place, port: int, *, folder: Path, limit_s: float) -> socket.socket:
        """See node.host.network.Network.dial."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            async with asyncio.timeout(limit_s):
                path = str(folder / AGENT_SOCKET)
                await asyncio.get_running_loop().sock_connect(connection, path)
        except BaseException:
            connection.close()
            raise
        return connection


class FakeDisks:
    """See node.host.disks.Disks."""

    async def make(self, path: Path, *, size_mib: int, uid: int) -> None:
        """See node.host.disks.Disks.make."""
        path.write_bytes(b"")

    async def copy(self, source: Path, path: Path) -> None:
        """See node.host.disks.Disks.copy."""
        path.write_bytes(source.read_bytes())


def make_fake_image(images: Images) -> str:
    """Create an image of empty files unless it exists, and return its digest."""
    digest = "fake"
    folder = images.images_dir / digest
    folder.mkdir(parents=True, exist_ok=True)
    for name in (*ROOTS, "vmlinuz", "initrd"):
        (folder / name).touch()
    write_manifest(folder, os="None", size_bytes=0, inputs={"toolsRecipe": "fake"})
    return digest


class FakeExports:
    """See node.exports.shares.Exports: it opens volumes, and nothing is exported."""

    def __init__(self, volumes: Volumes | None = None) -> None:
        self._volumes = volumes
        self.shares: dict[int, Share] = {}

    async def open(self, shares: Iterable[tuple[Place, Share]], crew: Crew) -> None:
        """See node.exports.shares.Exports.open."""
        self.shares = {place.number: share for place, share in shares}

    async def close(self) -> None:
        """See node.exports.shares.Exports.close."""

    def limited(self) -> tuple[str, ...]:
        """See node.exports.shares.Exports.limited: nothing is missing."""
        return ()

    async def check(self) -> None:
        """See node.exports.shares.Exports.check."""

    async def grant(self, place: Place, share: Share) -> None:
        """See node.exports.shares.Exports.grant."""
        if self._volumes is not None:
            for one in share.mounts:
                async with self._volumes.open(one.workspace_id, one.quota_bytes):
                    pass
        self.shares[place.number] = share

    async def revoke(self, place: Place) -> None:
        """See node.exports.shares.Exports.revoke."""
        self.shares.pop(place.number, None)

    async def withdraw(self, workspace_id: str) -> None:
        """See node.exports.shares.Exports.withdraw."""
        for number, share in self.shares.items():
            left = tuple(one for one in share.mounts if one.workspace_id != workspace_id)
            self.shares[number] = replace(share, mounts=left)
