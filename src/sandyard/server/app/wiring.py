"""Builds the parts of an installation, a node and the commands from settings."""

import logging
import os
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import urlsplit

from sandyard.server.app.firecracker import fetch, program
from sandyard.server.app.installation import ssh_host_key, ssh_public_key
from sandyard.server.app.settings import Settings
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.volumes import Volumes
from sandyard.server.core.errors import UnavailableError
from sandyard.server.core.money import Prices, micros_of
from sandyard.server.core.plans import Plan
from sandyard.server.core.shapes import Shape
from sandyard.server.drivers.contract import Driver
from sandyard.server.drivers.firecracker import FirecrackerDriver
from sandyard.server.drivers.firecracker.api import limiter
from sandyard.server.drivers.kvm import can_open
from sandyard.server.drivers.processes import uids_at_work
from sandyard.server.drivers.qemu import QemuDriver
from sandyard.server.links.volumes import FolderVolumes, ImageVolumes
from sandyard.server.node.host.choice import Drivers
from sandyard.server.node.host.identity import Identity, prefix_in, take_identity
from sandyard.server.node.host.mounts import mounts_of
from sandyard.server.node.host.network import host_routes
from sandyard.server.node.host.paths import check_enterable
from sandyard.server.node.images.build import Builder, BuildOptions
from sandyard.server.node.images.definitions import load_definitions
from sandyard.server.node.images.images import Images
from sandyard.server.node.images.versions import Versions
from sandyard.server.service.addresses import Addresses, SshAddress
from sandyard.server.service.builds.tools import BuildLimits
from sandyard.server.service.people.organizations import SignUp
from sandyard.server.tasks import in_thread

log = logging.getLogger(__name__)

UNFINISHED = ".restoring"
"""The end of the name of a file that is there while a workspace is restored."""
_ANY = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared, not listened on


def images_of(settings: Settings) -> Images:
    """Return the templates and images of an installation."""
    return Images(
        definitions=load_definitions(settings.templates_dir),
        images_dir=settings.images_dir,
        templates_dir=settings.home / "templates",
        versions=Versions(settings.home / "versions"),
    )


_PROXIES = [
    word
    for name in ("http_proxy", "https_proxy", "ftp_proxy", "all_proxy", "no_proxy")
    for word in (name, name.upper())
]


def builder_of(settings: Settings) -> Builder:
    """Return the builder of an installation's templates."""
    options = BuildOptions(
        cache_dir=settings.cache_dir,
        logs_dir=settings.home / "builds",
        extra_ca=settings.node.extra_ca,
        kernel=settings.kernel,
        kernel_modules=settings.kernel_modules,
        kernel_arguments=settings.node.kernel_arguments,
        network=settings.node.build_network,
        proxies={name: os.environ[name] for name in _PROXIES if name in os.environ},
    )
    return Builder(images_of(settings), options)


async def identity_of(settings: Settings) -> Identity:
    """Return the installation's identity on its host: names, accounts, subnet."""
    return take_identity(
        settings.home,
        routes=await host_routes(),
        subnet=settings.node.subnet,
        at_work=uids_at_work,
    )


async def check_home(settings: Settings) -> None:
    """Return if this process may start machines, and their accounts can reach the installation's
    files.

    Raises:
        UnavailableError: one of them is not so; the message says what to do.
    """
    if settings.node.driver == "fake":
        return
    if os.geteuid() != 0:
        raise UnavailableError("cannot start machines: root is needed; run it with sudo")
    uid = (await identity_of(settings)).uid_first
    await check_enterable(settings.home, machine_folders(settings), uid)


def machine_folders(settings: Settings) -> list[Path]:
    """Return the directories from which machines open files."""
    home = settings.home
    return [home, settings.images_dir, *(home / one for one in ("machines", "kernels", "versions"))]


def drivers_of(settings: Settings) -> list[Driver]:
    """Return the drivers that the settings allow, best first."""
    if settings.node.driver == "fake":
        from sandyard.server.fakes.driver import FakeDriver, FakeHost

        return [FakeDriver(FakeHost())]
    every = _every_driver(settings)
    return [one for one in every if settings.node.driver in ("auto", one.name)]


def _every_driver(settings: Settings) -> list[Driver]:
    own = settings.firecracker
    return [
        FirecrackerDriver(
            cache=settings.home / "cache" / "kernels",
            group=prefix_in(settings.home) or "sandyard",
            binary=program(settings, "firecracker", own.binary),
            jailer=program(settings, "jailer", own.jailer),
            disk_limiter=limiter(own.disk_mib_per_s),
            network_limiter=limiter(own.network_mib_per_s),
        ),
        *(
            QemuDriver(
                accel=accel,
                binary=settings.node.qemu_binary,
                kept_binaries=settings.node.kept_qemu_binaries,
                tb_size_mib=settings.node.tb_size_mib,
                mounts=mounts_of(settings.home),
            )
            for accel in ("kvm", "tcg")
        ),
    ]


async def set_up_firecracker(
    settings: Settings, *, force: bool, progress: Callable[[str], None]
) -> str:
    """Install Firecracker if it can be used here and is missing; return what was done.

    Raises:
        UnavailableError: it cannot be downloaded.
    """
    driver = _every_driver(settings)[0]
    try:
        return f"Firecracker {await driver.version()} is installed"
    except UnavailableError as error:
        log.debug("cannot use Firecracker: %s", error.message)
    if not force and not can_open():
        return "Firecracker is not fetched: this host has no KVM, and QEMU emulates"
    await in_thread(fetch, settings, progress=progress)
    return f"Firecracker {await driver.version()} is installed"


def choice_of(
    settings: Settings,
    drivers: Sequence[Driver],
    *,
    monotonic: Callable[[], float] = time.monotonic,
) -> Drivers:
    """Return the selection among drivers, with the installation's cached verdicts."""
    return Drivers(
        drivers,
        cache=settings.home / "cache" / "verdicts.json",
        known=_every_driver(settings),
        probe_s=settings.node.probe_s,
        slowest=settings.node.slowest,
        monotonic=monotonic,
    )


def addresses_of(settings: Settings) -> Addresses:
    """Return the public addresses of the gateways."""
    http, ssh, preview = settings.http, settings.ssh, settings.preview
    host = f"[{http.host}]" if ":" in http.host else http.host
    base_url = http.public_url or f"http://{host}:{http.port}"
    public_host = urlsplit(http.public_url).hostname if http.public_url else None
    listens = ssh.host or http.host
    return Addresses(
        base_url=base_url,
        preview_domain=preview.domain or f"preview.localhost:{preview.port or http.port}",
        preview_scheme=preview.scheme,
        ssh=SshAddress(
            host=ssh.public_host
            or public_host
            or (listens if listens not in _ANY else "localhost"),
            port=ssh.public_port or ssh.port,
            host_key=ssh_public_key(ssh_host_key(settings.home)),
        )
        if ssh.enabled
        else None,
        public_ip=http.public_ip,
        desktops=frozenset(
            slug
            for slug, one in load_definitions(settings.templates_dir).items()
            if one.kind == "desktop"
        ),
    )


def volumes_of(
    settings: Settings, *, monotonic: Callable[[], float] = time.monotonic
) -> ImageVolumes | FolderVolumes:
    """Return the storage of workspaces."""
    own, folder = settings.workspaces, settings.workspaces_dir
    can_mount = os.geteuid() == 0 and settings.node.driver != "fake"
    wants_images = own.volumes == "images" or (own.volumes == "auto" and can_mount)
    floor_bytes = settings.node.disk_floor_mib * 2**20
    if wants_images:
        return ImageVolumes(folder, floor_bytes=floor_bytes, monotonic=monotonic)
    return FolderVolumes(folder, floor_bytes=floor_bytes)


@asynccontextmanager
async def open_volumes(settings: Settings, clock: Clock) -> AsyncIterator[Volumes]:
    """Open the storage of workspaces; unmount unused ones when the block ends."""
    for begun in settings.workspaces_dir.glob(f"*{UNFINISHED}"):
        log.warning(
            "a restore of the workspace %s was killed, so some of its files are missing; to have "
            "them, move it away and restore again",
            begun.name.removesuffix(UNFINISHED),
        )
        begun.unlink()  # from now on it is used, and must not be replaced
    volumes = volumes_of(settings, monotonic=clock.monotonic)
    try:
        yield volumes
    finally:
        await volumes.close()


def sign_up_of(settings: Settings) -> SignUp:
    """Return what new organizations start with."""
    return SignUp(
        grant_cents=settings.billing.sign_up_cents,
        plan=settings.accounts.default_plan,
        organizations_max=settings.accounts.organizations_per_user,
    )


def plans_of(settings: Settings) -> Mapping[str, Plan]:
    """Return the plans by name."""
    return {name: Plan(**one.model_dump()) for name, one in settings.plans.items()}


def build_limits_of(settings: Settings) -> BuildLimits:
    """Return the limits of builds of templates."""
    own = settings.builds
    return BuildLimits(
        at_once=own.at_once,
        limit_s=own.limit_s,
        log_bytes=own.log_kib * 1024,
        size_max=own.size_mib * 2**20,
        cache_bytes=own.cache_mib * 2**20,
        builder=Shape(own.vcpus, own.memory_mib, own.disk_mib),
    )


def prices_of(settings: Settings) -> Prices:
    """Return the prices."""
    cents = settings.billing.prices
    return Prices(
        vcpu_hour=micros_of(cents.vcpu_hour),
        memory_gib_hour=micros_of(cents.memory_gib_hour),
        disk_gib_month=micros_of(cents.disk_gib_month),
        storage_gib_month=micros_of(cents.storage_gib_month),
    )
