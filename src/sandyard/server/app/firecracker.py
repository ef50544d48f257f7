"""Downloads the pinned official release of Firecracker."""

import hashlib
import io
import platform
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import httpx

from sandyard.server.app.settings import Settings
from sandyard.server.core.errors import UnavailableError
from sandyard.server.drivers.firecracker.driver import PINNED

DIGESTS = {
    "firecracker": "b99ea49b8d8b7bfa307d3845585d6a97f7642aa17a985749900370070d8ca930",
    "jailer": "86622337f91df329cca72bb21cd1324fb8b6fa47931601d65ee4b2c72ef2cae5",
}
"""SHA-256 of the two programs of the pinned release for x86_64."""
_RELEASES = "https://github.com/firecracker-microvm/firecracker/releases/download"
_SIZE_MAX = 64 * 2**20
_LIMIT = httpx.Timeout(300.0, connect=3.0)


def bin_dir(settings: Settings) -> Path:
    """Return the directory of downloaded programs."""
    return settings.home / "bin"


def program(settings: Settings, name: str, wanted: str | None) -> str:
    """Return the program to use: from the settings, from PATH, or downloaded."""
    if wanted is not None:
        return wanted
    return shutil.which(name) or str(bin_dir(settings) / name)


def fetch(settings: Settings, *, progress: Callable[[str], None], source: str = _RELEASES) -> Path:
    """Download the release, verify its programs, and return their directory.

    Raises:
        UnavailableError: it cannot be downloaded, or is not authentic; nothing is installed.
    """
    if platform.machine() != "x86_64":
        raise UnavailableError(
            f"cannot fetch Firecracker: {platform.machine()} is not supported, x86_64 is"
        )
    name = f"firecracker-v{PINNED}-x86_64"
    progress(f"fetching Firecracker {PINNED}")
    archive = _download(f"{source}/v{PINNED}/{name}.tgz")
    found = {
        one: _member(archive, f"release-v{PINNED}-x86_64/{one}-v{PINNED}-x86_64") for one in DIGESTS
    }
    for one, data in found.items():
        if hashlib.sha256(data).hexdigest() != DIGESTS[one]:
            raise UnavailableError(
                f"cannot use what was downloaded: {one} is not the official {PINNED} "
                "(its checksum differs)"
            )
    folder = bin_dir(settings)
    folder.mkdir(mode=0o755, parents=True, exist_ok=True)
    for one, data in found.items():
        part = folder / f"{one}.part"
        part.write_bytes(data)
        part.chmod(0o755)
        part.replace(folder / one)
    progress(f"Firecracker {PINNED} is in {folder}")
    return folder


def _download(url: str) -> bytes:
    data = io.BytesIO()
    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=_LIMIT) as answer:
            answer.raise_for_status()
            for piece in answer.iter_bytes():
                data.write(piece)
                if data.tell() > _SIZE_MAX:
                    raise UnavailableError(f"cannot fetch {url}: it is larger than it can be")
    except httpx.HTTPError as error:
        raise UnavailableError(
            f"cannot fetch {url}: {error}; put firecracker and jailer {PINNED} on PATH instead"
        ) from error
    return data.getvalue()


def _member(archive: bytes, name: str) -> bytes:
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as opened:
            file = opened.extractfile(name)
            if file is None:
                raise KeyError(name)
            return file.read(_SIZE_MAX)
    except (tarfile.TarError, KeyError, OSError, EOFError) as error:
        raise UnavailableError(f"cannot use what was downloaded: {error}") from error
