"""Network, disks and images for fake machines, without root, namespaces or large files."""

import asyncio
import socket
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path

from typing_extensions import override

from sandyard.server.core.contracts.volumes import Volumes
from sandyard.server.core.egress import Credentials, Policy
from sandyard.server.core.errors import NoCapacityError
from sandyard.server.drivers.contract import Place
from sandyard.server.fakes.driver import AGENT_SOCKET
from sandyard.server.node.exports.shares import Exports, Share
from sandyard.server.node.host.disks import Disks
from sandyard.server.node.host.network import Network
from sandyard.server.node.images.image import ROOTS, write_manifest
from sandyard.server.node.images.images import Images
from sandyard.server.tasks import Crew

_PLACES = 65536


class FakeNetwork(Network):
    """See node.host.network.Network."""

    def __init__(self, places: int = _PLACES) -> None:
        self._free = list(range(places - 1, -1, -1))
        self.in_use: set[int] = set()
        self.rules: dict[int, Policy] = {}
        self.credentials: dict[int, Credentials | None] = {}

    @override
    async def open(
        self, *, in_use: Iterable[int], crew: Crew, on_change: Callable[[], None] = lambda: None
    ) -> None:
        self.in_use = set(in_use)
        self._free = [number for number in self._free if number not in self.in_use]

    @override
    async def close(self) -> None:
        pass

    @override
    async def take(self) -> Place:
        if not self._free:
            raise NoCapacityError("cannot place one more machine: all slots are in use")
        number = self._free.pop()
        self.in_use.add(number)
        return self.place(number)

    @override
    def place(self, number: int) -> Place:
        return Place(number, f"fake-{number}", "tap0", "02:00:00:00:00:02", f"fake:{number}", 0)

    @override
    async def restrict(
        self,
        place: Place,
        policy: Policy,
        *,
        folder: Path,
        credentials: Credentials | None = None,
    ) -> None:
        """Record the rules."""
        self.rules[place.number] = policy
        if credentials is not None or not policy.ends_tls:
            self.credentials[place.number] = credentials

    @override
    def stamp(self, place: Place) -> str | None:
        held = self.credentials.get(place.number)
        return None if held is None else held.stamp

    @override
    async def give_back(self, place: Place) -> None:
        self.rules.pop(place.number, None)
        self.credentials.pop(place.number, None)
        if place.number in self.in_use:
            self.in_use.discard(place.number)
            self._free.append(place.number)

    @override
    async def dial(self, place: Place, port: int, *, folder: Path, limit_s: float) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            async with asyncio.timeout(limit_s):
                path = str(folder / AGENT_SOCKET)
                await asyncio.get_running_loop().sock_connect(connection, path)
        except BaseException:
            connection.close()
            raise
        return connection


class FakeDisks(Disks):
    """See node.host.disks.Disks."""

    @override
    async def make(self, path: Path, *, size_mib: int, uid: int) -> None:
        path.write_bytes(b"")

    @override
    async def copy(self, source: Path, path: Path) -> None:
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


class FakeExports(Exports):
    """See node.exports.shares.Exports: it opens volumes, and nothing is exported."""

    def __init__(self, volumes: Volumes | None = None) -> None:
        self._volumes = volumes
        self.shares: dict[int, Share] = {}

    @override
    async def open(self, shares: Iterable[tuple[Place, Share]], crew: Crew) -> None:
        self.shares = {place.number: share for place, share in shares}

    @override
    async def close(self) -> None:
        pass

    @override
    def limited(self) -> tuple[str, ...]:
        """Return nothing: no feature is missing."""
        return ()

    @override
    async def check(self) -> None:
        pass

    @override
    async def grant(self, place: Place, share: Share) -> None:
        if self._volumes is not None:
            for one in share.mounts:
                async with self._volumes.open(one.workspace_id, one.quota_bytes):
                    pass
        self.shares[place.number] = share

    @override
    async def revoke(self, place: Place) -> None:
        self.shares.pop(place.number, None)

    @override
    async def withdraw(self, workspace_id: str) -> None:
        for number, share in self.shares.items():
            left = tuple(one for one in share.mounts if one.workspace_id != workspace_id)
            self.shares[number] = replace(share, mounts=left)
