"""Network, disks and images for fake machines: no root, no namespace, no file worth mentioning."""

import asyncio
import socket
from collections.abc import Iterable
from pathlib import Path

from sandyard.server.core.errors import NoCapacityError
from sandyard.server.drivers.contract import Place
from sandyard.server.drivers.fake import AGENT_SOCKET
from sandyard.server.node.images.images import Images, write_manifest
from sandyard.server.tasks import Crew

_PLACES = 65536


class FakeNetwork:
    """See node.host.network.Network."""

    def __init__(self, places: int = _PLACES) -> None:
        self._free = list(range(places - 1, -1, -1))
        self.in_use: set[int] = set()

    async def open(self, *, in_use: Iterable[int], crew: Crew) -> None:
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

    async def give_back(self, place: Place) -> None:
        """See node.host.network.Network.give_back."""
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

    async def copy(self, source: Path, path: Path, *, sync: bool = False) -> None:
        """See node.host.disks.Disks.copy."""
        path.write_bytes(source.read_bytes())


def make_fake_image(images: Images) -> str:
    """Make an image of empty files, if it is not there, and return its digest."""
    digest = "fake"
    folder = images.images_dir / digest
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("base.ext4", "vmlinuz", "initrd"):
        (folder / name).touch()
    write_manifest(folder, os="None", size_bytes=0, inputs={})
    return digest
