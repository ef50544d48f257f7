"""Checks the host, and names each problem with its fix."""

import json
import os
import re
import shutil
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from ipaddress import IPv4Network
from pathlib import Path
from typing import Literal

from sandyard.server.app.backups import age_of_newest
from sandyard.server.app.e2b import examine_e2b
from sandyard.server.app.installation import is_member
from sandyard.server.app.links import Finding, examine_certificates, examine_links
from sandyard.server.app.settings import Settings
from sandyard.server.app.wiring import (
    choice_of,
    drivers_of,
    identity_of,
    images_of,
    machine_folders,
)
from sandyard.server.core.contracts.node import TemplateStatus
from sandyard.server.core.errors import (
    InvalidArgumentError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.drivers.contract import Driver
from sandyard.server.node.commands import run
from sandyard.server.node.exports.library import missing_here, verdict_in
from sandyard.server.node.host.disks import available_memory_mib, free_mib, lacks_files, used_mib
from sandyard.server.node.host.firewall import forward_exceptions
from sandyard.server.node.host.identity import Identity
from sandyard.server.node.host.network import check_accounts, host_routes, host_ruleset
from sandyard.server.node.host.paths import closed_component, refusal
from sandyard.server.node.images.definitions import arguments_for
from sandyard.server.node.images.image import altered_in
from sandyard.server.node.images.images import Images
from sandyard.server.node.images.kernel import own_kernel
from sandyard.server.node.machines.saved import needs_of
from sandyard.server.tasks import in_thread

_TOOLS = {
    "ip": "iproute2",
    "nft": "nftables",
    "mke2fs": "e2fsprogs",
    "mkfs.erofs": "erofs-utils",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "prlimit": "util-linux",
    "mmdebstrap": "mmdebstrap",
    "slirp4netns": "slirp4netns",
    "zstd": "zstd",
    "depmod": "kmod",
    "ganesha.nfsd": "nfs-ganesha nfs-ganesha-vfs",
}
_DISK_WANTED_MIB = 6 * 1024
_MEMORY_WANTED_MIB = 2 * 1024
_LIMIT_S = 20.0
_SECRET = re.compile(r"://[^/@\s]+:[^/@\s]+@|^\s*\w*(secret|token|password)\w*\s*=", re.M)


async def examine(settings: Settings, *, deep: bool = False) -> AsyncIterator[Finding]:
    """Check everything, in the order in which problems would appear; with `deep`, read all files of
    templates, too."""
    if os.geteuid() != 0:
        yield Finding("bad", "not running as root", "run it with sudo")
        return
    yield Finding("ok", "running as root")
    if (finding := _config(settings)) is not None:
        yield finding
    if settings.cluster.nats and not is_member(settings.home):
        yield Finding("ok", "this is a control plane: machines are started on other hosts")
        for finding in _room(settings):
            yield finding
    else:
        async for finding in _examine_host(settings, deep=deep):
            yield finding
    async for finding in examine_links(settings):
        yield finding
    for finding in examine_certificates(settings):
        yield finding
    yield examine_backups(settings)
    if not is_member(settings.home):
        async for finding in examine_e2b(settings):
            yield finding


def _config(settings: Settings) -> Finding | None:
    """Say if others can read a secret in the configuration."""
    path = settings.home / "config.toml"
    try:
        mode, text = path.stat().st_mode, path.read_text()
    except (OSError, UnicodeDecodeError):
        return None
    if not mode & 0o044 or not _SECRET.search(text):
        return None
    return Finding(
        "bad", f"every user of this host can read the secrets in {path}", f"chmod 600 {path}"
    )


async def _examine_host(settings: Settings, *, deep: bool) -> AsyncIterator[Finding]:
    """Check what a host needs to start machines."""
    yield _tun()
    for tool, package in _TOOLS.items():
        if shutil.which(tool) is None:
            yield Finding("bad", f"{tool} is not installed", f"apt-get install -y {package}")
    if all(shutil.which(tool) for tool in ("ip", "nft")):
        yield await _namespaces()
        yield await _nft()
        async for finding in _network(settings):
            yield finding
    for feature in missing_here(verdict_in(settings.home)):
        yield Finding(
            "note", f"with this build of NFS-Ganesha, in mounted workspaces, {feature}",
            "use the nfs-ganesha package of Debian 12, Debian 13 or Ubuntu 24.04",
        )  # fmt: skip
    for finding in _room(settings):
        yield finding
    for finding in _kernels(settings):
        yield finding
    async for finding in _drivers(settings):
        yield finding
    for finding in await in_thread(_templates, settings, deep=deep):
        yield finding
    async for finding in examine_saved_machines(settings):
        yield finding


def examine_backups(settings: Settings) -> Finding:
    """Say how old the newest backup is."""
    wanted = settings.backup
    if wanted.folder is None:
        return Finding(
            "note", "no backups are made by themselves", "set backup.folder; see "
            "docs/howto/backup.md",
        )  # fmt: skip
    age_s = age_of_newest(wanted.folder, datetime.now(UTC))
    if age_s is None or age_s > 2 * wanted.every_h * 3600:
        age = "there is none yet" if age_s is None else f"{age_s / 3600:.0f} hours old"
        return Finding(
            "bad", f"the newest backup in {wanted.folder} is too old: {age}",
            "look for `cannot make a backup` in the server's log",
        )  # fmt: skip
    return Finding("ok", f"the newest backup is {age_s / 3600:.1f} hours old")


async def examine_saved_machines(settings: Settings) -> AsyncIterator[Finding]:
    """Say which versions of hypervisors the saved machines need: before an upgrade as well."""
    choice = choice_of(settings, drivers_of(settings))
    for (driver, version), count in sorted(needs_of(settings.home).items()):
        is_one = count == 1
        what = f"{count} saved machine{'' if is_one else 's'} (paused sandboxes and snapshots)"
        need = f"{'needs' if is_one else 'need'} {driver} {version}"
        if version in await choice.versions_of(driver):
            yield Finding("ok", f"{what} {need}, which is here: keep it when you upgrade")
        else:
            yield Finding(
                "bad", f"{what} {need}, which is not here",
                "install that version again, or keep it beside (node.kept_qemu_binaries); see "
                "docs/howto/upgrade.md",
            )  # fmt: skip


def _tun() -> Finding:
    try:
        os.close(os.open("/dev/net/tun", os.O_RDWR))
    except OSError as error:
        return Finding(
            "bad", f"/dev/net/tun cannot be opened: {error.strerror}",
            "modprobe tun (in a container: give it the device)",
        )  # fmt: skip
    return Finding("ok", "/dev/net/tun can be opened")


async def _namespaces() -> Finding:
    name = f"sydoctor{os.getpid()}"
    try:
        await run(["ip", "netns", "add", name], limit_s=_LIMIT_S)
        await run(["ip", "netns", "del", name], limit_s=_LIMIT_S)
    except SandyardError as error:
        return Finding(
            "bad", f"network namespaces cannot be made: {error.message}",
            "use a kernel with CONFIG_NET_NS, or a container with CAP_SYS_ADMIN",
        )  # fmt: skip
    return Finding("ok", "network namespaces can be made")


async def _nft() -> Finding:
    table = f"sydoctor{os.getpid()}"
    rules = f"table inet {table} {{}}\ndelete table inet {table}\n"
    try:
        await run(["nft", "-f", "-"], limit_s=_LIMIT_S, stdin=rules.encode())
    except SandyardError as error:
        return Finding(
            "bad", f"nftables rules cannot be loaded: {error.message}", "modprobe nf_tables"
        )
    return Finding("ok", "nftables rules can be loaded")


async def _network(settings: Settings) -> AsyncIterator[Finding]:
    try:
        identity = await identity_of(settings)
    except SandyardError as error:
        yield Finding("bad", error.message, "set SANDYARD_NODE__SUBNET")
        return
    yield _subnet(identity, await host_routes())
    yield _uids(identity)
    try:
        await check_accounts(identity)
    except UnavailableError as error:
        yield Finding("bad", error.message, "see docs/howto/two-installations.md")
    yield await _home(settings, identity)
    ruleset = json.loads(await host_ruleset())
    # Asked as if nothing of ours were there: what is found is what the server will have to pass.
    if forward_exceptions(ruleset, prefix=identity.prefix, table=""):
        yield Finding(
            "note", "another tool (Docker?) drops forwarded traffic by default",
            "nothing: the server adds exceptions for its own links when it starts",
        )  # fmt: skip
    if await _has_legacy_drop():
        yield Finding(
            "bad", "iptables-legacy drops forwarded traffic, so sandboxes reach nothing",
            f"iptables-legacy -I FORWARD -i '{identity.prefix}+' -j ACCEPT && "
            f"iptables-legacy -I FORWARD -o '{identity.prefix}+' -j ACCEPT",
        )  # fmt: skip


def _subnet(identity: Identity, routes: list[IPv4Network]) -> Finding:
    ours = [route for route in routes if route.subnet_of(identity.subnet)]
    others = [route for route in routes if route.overlaps(identity.subnet) and route not in ours]
    others = [route for route in others if route.prefixlen > 0]
    if others:
        return Finding(
            "bad", f"the subnet {identity.subnet} overlaps the host's route to {others[0]}",
            "set SANDYARD_NODE__SUBNET to a free private /20",
        )  # fmt: skip
    return Finding("ok", f"the subnet {identity.subnet} is free")


def _uids(identity: Identity) -> Finding:
    ours = f"{identity.uids.start} to {identity.uids.stop - 1}"
    for name in ("/etc/subuid", "/etc/subgid"):
        path = Path(name)
        for line in path.read_text().splitlines() if path.exists() else ():
            fields = line.split(":")
            if len(fields) == 3 and fields[1].isdigit() and fields[2].isdigit():
                first, count = int(fields[1]), int(fields[2])
                if first < identity.uids.stop and identity.uids.start < first + count:
                    return Finding(
                        "bad", f"{name} gives {fields[0]} accounts that machines run under",
                        f"move that range away from {ours}",
                    )  # fmt: skip
    return Finding("ok", f"the accounts {ours} are free")


async def _home(settings: Settings, identity: Identity) -> Finding:
    """Check that the accounts of machines can reach their files."""
    uid = identity.uid_first
    folder = await closed_component(machine_folders(settings), uid)
    if folder is not None:
        return Finding("bad", *refusal(folder, settings.home, uid))
    return Finding("ok", f"machines can reach their files in {settings.home}")


async def _has_legacy_drop() -> bool:
    if shutil.which("iptables-legacy") is None:
        return False
    try:
        rules = await run(["iptables-legacy", "-S", "FORWARD"], limit_s=_LIMIT_S)
    except SandyardError:
        return False
    return "-P FORWARD DROP" in rules


def _room(settings: Settings) -> list[Finding]:
    folder = settings.home
    while not folder.exists():
        folder = folder.parent
    findings = []
    disk, memory = free_mib(folder), available_memory_mib()
    if disk < settings.node.disk_floor_mib:
        findings.append(
            Finding("bad", f"{disk} MiB of disk are free under {folder}", "free some space")
        )
    elif disk < _DISK_WANTED_MIB:
        findings.append(
            Finding(
                "note", f"{disk} MiB of disk are free under {folder}: little", "free some space"
            )
        )
    else:
        findings.append(Finding("ok", f"{disk // 1024} GiB of disk are free under {folder}"))
    if (lack := lacks_files(folder)) is not None:
        findings.append(Finding("bad", lack, f"remove files; `df -i {folder}` shows how many"))
    goldens = settings.home / "goldens"
    if goldens.is_dir():
        folders = [one for one in goldens.iterdir() if one.is_dir()]
        taken = sum(used_mib(one) for one in folders)
        findings.append(
            Finding(
                "ok",
                f"{len(folders)} golden machines take {taken} MiB of disk (unusual shapes may take "
                f"{settings.node.odd_goldens_mib})",
            )
        )
    level: Literal["ok", "note"] = "ok" if memory >= _MEMORY_WANTED_MIB else "note"
    findings.append(Finding(level, f"{memory} MiB of memory are available"))
    return findings


def _kernels(settings: Settings) -> list[Finding]:
    """Check custom kernels: missing options, and templates that do not use them yet."""
    images = images_of(settings)
    own = [(settings.kernel, settings.kernel_modules)]
    own += [(one.kernel, one.kernel_modules) for one in images.definitions.values()]
    findings = []
    for image, modules in dict.fromkeys(own):
        if image is not None:
            findings += _kernel(image, modules)
    for slug, one in images.definitions.items():
        given = (one.kernel, one.kernel_modules)
        if one.kernel is None:
            given = (settings.kernel, settings.kernel_modules)
        current = images.current(slug)
        try:
            wanted = "" if given[0] is None else own_kernel(given[0], given[1]).digest
            arguments = arguments_for(settings.node.kernel_arguments, one)
        except InvalidArgumentError as error:
            if error.facts.get("field") == "node.kernel_arguments":
                findings.append(Finding("bad", error.message, "shorten them"))
            continue  # otherwise reported above
        if current is not None and (
            current.inputs.get("kernel", "") != wanted or current.arguments != arguments
        ):
            findings.append(
                Finding(
                    "note",
                    f"the template {slug} was built with another kernel, or other arguments for "
                    "it, than are set now",
                    f"sandyard template build {slug}",
                )
            )
    return findings


def _kernel(image: Path, modules: Path | None) -> list[Finding]:
    try:
        kernel = own_kernel(image, modules)
    except InvalidArgumentError as error:
        return [Finding("bad", error.message, "see the how-to on kernels")]
    if kernel.info.options is None:
        return [
            Finding(
                "note",
                f"the kernel {image} ({kernel.info.release}) does not say how it was configured",
                "nothing, if machines boot; else build it with CONFIG_IKCONFIG=y, and look again",
            )
        ]
    findings = [
        Finding(
            "bad" if need.is_must else "note",
            f"the kernel {image} lacks {need.shown}: {need.purpose}",
            f"build it with {need.shown.split(' or ')[0]}=y",
        )
        for is_must in (True, False)
        for need in kernel.lacks(musts=is_must)
    ]
    if not kernel.lacks(musts=True):
        text = f"the kernel {image} ({kernel.info.release}) has all that machines cannot do without"
        findings.insert(0, Finding("ok", text))
    return findings


async def _drivers(settings: Settings) -> AsyncIterator[Finding]:
    images = images_of(settings)
    image = next(
        (found for fact in images.facts() if fact.digest and (found := images.find(fact.digest))),
        None,
    )
    drivers = drivers_of(settings)
    if shutil.which(settings.node.qemu_binary) is None:
        has_other = any([await _is_installed(driver) for driver in drivers])
        yield Finding(
            "note" if has_other else "bad", f"{settings.node.qemu_binary} is not installed",
            "apt-get install -y qemu-system-x86",
        )  # fmt: skip
        if not has_other:
            return
    if image is None:
        yield Finding("note", "hypervisors are tried once a template is built")
        return
    judged = await choice_of(settings, drivers).judge(image)
    for one in judged:
        if one.verdict.is_usable:
            yield Finding("ok", f"{one.driver.name} is used: {one.verdict.reason}")
            if one.driver.name == "qemu-tcg":
                yield Finding(
                    "note", "machines are emulated: slower, and no isolation boundary by QEMU's "
                    "own policy", "use a host with working KVM for untrusted code",
                )  # fmt: skip
        else:
            yield Finding("note", f"{one.driver.name} is not used: {one.verdict.reason}")
    if not any(one.verdict.is_usable for one in judged):
        yield Finding("bad", "no hypervisor boots a machine here", "see the notes above")


async def _is_installed(driver: Driver) -> bool:
    try:
        await driver.version()
    except UnavailableError:
        return False
    return True


def _templates(settings: Settings, *, deep: bool) -> list[Finding]:
    images = images_of(settings)
    findings = contents(images) if deep else []
    for fact in images.facts():
        if fact.status is TemplateStatus.READY:
            findings.append(Finding("ok", f"the template {fact.slug} is built ({fact.os})"))
        else:
            level: Literal["note", "bad"] = "bad" if fact.slug == "base-ubuntu" else "note"
            findings.append(
                Finding(
                    level,
                    f"the template {fact.slug} is not built",
                    f"sandyard template build {fact.slug}",
                )
            )
    return findings


def contents(images: Images) -> list[Finding]:
    """Say which templates are not as they were built; reads all of their files."""
    findings = []
    for slug in images.definitions:
        image = images.current(slug)
        if image is None:
            continue
        if not image.sums:
            findings.append(
                Finding(
                    "note",
                    f"the files of the template {slug} cannot be verified: an earlier version of "
                    "Sandyard built it",
                    f"sandyard template build {slug} --again",
                )
            )
        elif altered := altered_in(image):
            findings.append(
                Finding(
                    "bad",
                    f"the template {slug} is not as it was built: {', '.join(altered)} in "
                    f"{image.folder} was altered",
                    f"sandyard template build {slug} --again",
                )
            )
        else:
            findings.append(Finding("ok", f"all files of the template {slug} are as built"))
    findings += [
        Finding(
            "bad",
            f"the version {digest} of an organization's template was altered",
            f"stop the server, remove {images.versions.folder / digest} and start it: with several "
            "hosts it is copied again, otherwise build it again",
        )
        for digest in images.versions.altered()
    ]
    return findings


async def collect(settings: Settings, *, deep: bool = False) -> list[Finding]:
    """Return all findings at once; see `examine`."""
    return [finding async for finding in examine(settings, deep=deep)]


__all__ = ["Finding", "collect", "examine"]
