"""Tests what this host's file servers can do by using one.

`library.py` recognizes builds by their digests. This test finds out what an unknown build can do,
and whether the patches of a known build have their effect.
"""

import asyncio
import fcntl
import socket
import time
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path

from sandyard.server.core.contracts.node import MountWish
from sandyard.server.core.errors import InternalError
from sandyard.server.drivers.namespaces import in_namespace
from sandyard.server.node.commands import run
from sandyard.server.node.exports.client import NfsClient, ProtocolError, Status
from sandyard.server.node.exports.library import Feature
from sandyard.server.node.exports.server import Server
from sandyard.server.node.exports.shares import Part
from sandyard.server.node.host.firewall import GATEWAY_IP, GUEST_IP
from sandyard.server.node.host.network import Network
from sandyard.server.tasks import in_thread, to_the_end

FOLDER = "self-test"
_NAME, _PORT = "self-test", 19_999  # below the ports of machines' servers
_LIMIT_S, _ANSWER_S = 15.0, 5.0
_SIZE = "2M"
_UID = 1000
_OWNER_MAX = 20  # what Linux has room for: lock_owner_id_maxsz in fs/nfs/nfs4xdr.c
_GRANTED_S, _AGAIN_S = 3.0, 0.2


async def missing_by_test(exports: Path, network: Network) -> tuple[Feature, ...]:
    """Return the features that the host's file servers lack. Takes 0.15 s if none is missing.

    `exports` is the folder of all servers; everything created in it is removed.

    Raises:
        SandyardError, OSError: the test failed.
    """
    volume = exports / FOLDER
    try:
        async with asyncio.timeout(_LIMIT_S), AsyncExitStack() as held:
            place = await network.take()
            held.push_async_callback(lambda: to_the_end(network.give_back(place)))
            await run(
                ["ip", "-n", place.netns, "address", "add", f"{GUEST_IP}/32", "dev", "lo"],
                limit_s=_LIMIT_S,
            )
            volume.mkdir(mode=0o755, parents=True, exist_ok=True)
            held.push_async_callback(lambda: to_the_end(remove_volume(exports)))
            await _mount_volume(volume)
            part = Part(_PORT, _NAME, writable=(MountWish(_NAME, "/", False, 2**20),))
            server = Server(exports / f"{place.number}-{_PORT}", place, part)

            async def remove() -> None:
                await server.stop()
                await server.remove()

            held.push_async_callback(lambda: to_the_end(remove()))
            await server.bind(_NAME, volume)
            await server.export()
            await server.start()

            def connect() -> socket.socket:
                return socket.create_connection(
                    (GATEWAY_IP, _PORT), timeout=_ANSWER_S, source_address=(GUEST_IP, 0)
                )

            def missing() -> tuple[Feature, ...]:
                with NfsClient(in_namespace(place.netns, connect), uid=_UID) as client:
                    return tuple(_missing(client, volume))

            return await in_thread(missing)
    except (ProtocolError, TimeoutError) as error:
        raise InternalError(f"the file server does not answer as it should: {error}") from error


async def _mount_volume(volume: Path) -> None:
    # Ganesha does not export a tmpfs. The loop device keeps the image after it is unlinked.
    image = volume.with_suffix(".ext4")
    await run(["mke2fs", "-q", "-F", "-t", "ext4", image, _SIZE], limit_s=_LIMIT_S)
    try:
        options = "loop,nosuid,nodev,noexec"
        await run(["mount", "-o", options, image, volume], limit_s=_LIMIT_S)
    finally:
        image.unlink()
    volume.chmod(0o1777)


async def remove_volume(exports: Path) -> None:
    """Remove the volume of a test, including an interrupted one.

    Raises:
        SandyardError, OSError: it cannot be removed.
    """
    volume = exports / FOLDER
    if volume.is_mount():
        await run(["umount", "--lazy", volume], limit_s=_LIMIT_S)
    if volume.is_dir():
        volume.rmdir()


def _missing(client: NfsClient, volume: Path) -> "list[Feature]":
    tests: dict[Feature, Callable[[NfsClient, bytes, Path], bool]] = {
        Feature.LOCKS: _names_the_holder,
        Feature.WAITING: _grants_at_once,
        Feature.REOPENED: _opens_again,
    }
    export = client.look_up(_NAME)
    return [one for one, works in tests.items() if not works(client, export, volume)]


def _names_the_holder(client: NfsClient, export: bytes, volume: Path) -> bool:
    """A conflict with another machine's lock is reported in a form that Linux can read."""
    _, stateid, handle = client.open(export, "held", writes=True, mode=0o666)
    with (volume / "held").open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        status, owner = client.lock(handle, stateid, waits=False)
    return status is Status.DENIED and len(owner) <= _OWNER_MAX


def _grants_at_once(client: NfsClient, export: bytes, volume: Path) -> bool:
    """A waiting lock request is granted soon after the lock was released."""
    _, stateid, handle = client.open(export, "waited", writes=True, mode=0o666)
    with (volume / "waited").open("r+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        status, _ = client.lock(handle, stateid, waits=True)
        if status is not Status.DENIED:
            return False
    until = time.monotonic() + _GRANTED_S
    while time.monotonic() < until:
        if client.lock(handle, stateid, waits=True)[0] is Status.OK:
            return True
        time.sleep(_AGAIN_S)
    return False


def _opens_again(client: NfsClient, export: bytes, _: Path) -> bool:
    """A file that became read-only while it was open can be opened again for reading."""
    _status, stateid, handle = client.open(export, "again", writes=True, mode=0o644)
    client.change_mode(handle, stateid, 0o444)
    return client.open(export, "again", writes=False)[0] is Status.OK
