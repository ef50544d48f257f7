"""An operator's kernel that replaces the distribution's, and the options that it must have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from sandyard.server.core.errors import InvalidArgumentError, UnavailableError
from sandyard.server.drivers.kernels import KernelInfo, kernel_info


@dataclass(frozen=True)
class Need:
    """One or more alternative options that a kernel must have (`is_must`) or should have, and their
    purpose.

    `module` is the module that can replace it, if the initramfs loads one.
    """

    options: tuple[str, ...]
    purpose: str
    module: str | None = None
    is_must: bool = True

    @property
    def shown(self) -> str:
        """The options as written in a kernel configuration."""
        return " or ".join(f"CONFIG_{one}" for one in self.options)


NEEDS: tuple[Need, ...] = (
    Need(("BLK_DEV_INITRD",), "starts from an initramfs"),
    Need(("SERIAL_8250_CONSOLE",), "the console: the probe, and the logs of a sandbox"),
    Need(("ACPI", "VIRTIO_MMIO_CMDLINE_DEVICES"), "finds its disks and its network"),
    Need(("VIRTIO_MMIO",), "disks and network", "virtio_mmio"),
    Need(("VIRTIO_BLK",), "disks", "virtio_blk"),
    Need(("VIRTIO_NET",), "the network, by which the agent is reached", "virtio_net"),
    Need(("EROFS_FS",), "the file systems of a template and of our tools", "erofs"),
    Need(("EROFS_FS_SECURITY",), "file capabilities of a template: ping", is_must=False),
    Need(("EXT4_FS",), "the file system of the disk", "ext4"),
    Need(("OVERLAY_FS",), "the root: the shared base under a sandbox's own files", "overlay"),
    Need(("TMPFS",), "/run and /dev/shm"),
    Need(("DEVTMPFS",), "/dev"),
    Need(("PROC_FS",), "/proc"),
    Need(("SYSFS",), "/sys"),
    Need(("UNIX98_PTYS",), "terminals"),
    Need(("BINFMT_ELF",), "programs"),
    Need(("BINFMT_SCRIPT",), "scripts: the first program is one"),
    Need(("MULTIUSER",), "users"),
    Need(("INET",), "the network, by which the agent is reached"),
    Need(("UNIX",), "local sockets"),
    Need(("PACKET",), "what looks at the network", is_must=False),
    Need(("FUTEX",), "threads: the agent is a Python program"),
    Need(("EPOLL",), "the agent waits by it"),
    Need(("SIGNALFD",), "programs that wait for signals", is_must=False),
    Need(("INOTIFY_USER",), "watching files", is_must=False),
    Need(("CGROUPS",), "ends all that a command started"),
    Need(("CGROUP_PIDS",), "bounds how many processes a command starts", is_must=False),
    Need(("MEMCG",), "containers with a bound on memory", is_must=False),
    Need(("INET_TCP_DIAG",), "breaks off connections after a pause", "tcp_diag", is_must=False),
    Need(
        ("INET_DIAG_DESTROY",),
        "breaks off connections after a pause; without it, programs wait for a time-out",
        is_must=False,
    ),
    Need(
        ("HW_RANDOM_VIRTIO",), "random numbers at once; restored machines are given them anyway",
        is_must=False,
    ),
    Need(("USER_NS",), "containers of ordinary users", is_must=False),
    Need(("PID_NS",), "containers", is_must=False),
    Need(("NET_NS",), "containers", is_must=False),
    Need(("FUSE_FS",), "containers of ordinary users", is_must=False),
    Need(("TUN",), "containers of ordinary users, VPNs", is_must=False),
    Need(("VETH",), "Docker", is_must=False),
    Need(("BRIDGE",), "Docker", is_must=False),
    Need(("NF_TABLES",), "Docker, firewalls", is_must=False),
    Need(("SECCOMP_FILTER",), "containers, browsers", is_must=False),
    Need(("PVH",), "QEMU boots an unpacked `vmlinux` by it; a bzImage does without", is_must=False),
)  # fmt: skip
"""What machines need of a kernel, in the order in which they come to need it."""


@dataclass(frozen=True)
class OwnKernel:
    """A kernel, the folder of its modules (`/lib/modules/<release>`) if it has any, and its
    embedded configuration. `digest` changes with any of them."""

    image: Path
    modules: Path | None
    info: KernelInfo
    digest: str

    def lacks(self, *, musts: bool) -> list[Need]:
        """Return the missing options that it must or should have; none if its configuration is
        unknown.

        An option built as a module counts if the modules are given.
        """
        options = self.info.options
        if options is None:
            return []
        return [need for need in NEEDS if need.is_must is musts and not self._has(need, options)]

    def _has(self, need: Need, options: Mapping[str, str]) -> bool:
        found = {options.get(one) for one in need.options}
        if need.module == "virtio_mmio" and options.get("ACPI") != "y":
            return "y" in found  # the parameter that lists devices does not reach a module
        is_loaded = self.modules is not None and (need.module is not None or not need.is_must)
        return "y" in found or ("m" in found and is_loaded)


def own_kernel(image: Path, modules: Path | None) -> OwnKernel:
    """Return an operator's kernel.

    Raises:
        InvalidArgumentError: it is not a kernel, or the modules belong to another one.
    """
    try:
        info = kernel_info(image)
        digest = sha256(image.read_bytes())
    except UnavailableError as error:
        raise InvalidArgumentError(
            f"cannot use the kernel {image}: {error.message}", field="node.kernel"
        ) from error
    if modules is not None:
        for path in _files(modules, info):
            found = path.stat()
            digest.update(f"{path.relative_to(modules)} {found.st_size}\n".encode())
            digest.update(path.read_bytes())
    return OwnKernel(image, modules, info, digest.hexdigest())


def _files(modules: Path, info: KernelInfo) -> Sequence[Path]:
    for name in ("modules.order", "modules.builtin"):
        if not (modules / name).is_file():
            raise InvalidArgumentError(
                f"cannot use the modules in {modules}: it has no {name}; give the directory that "
                "`make modules_install` made, as /lib/modules/6.12.0",
                field="node.kernel_modules",
            )
    if info.release not in ("unknown", modules.name):
        raise InvalidArgumentError(
            f"cannot use the modules in {modules}: the directory must be called {info.release}, as "
            "the kernel is",
            field="node.kernel_modules",
        )
    return sorted(one for one in modules.rglob("*") if one.is_file() and not one.is_symlink())


def refuse_lacking(kernel: OwnKernel) -> None:
    """Return if a kernel has all options that machines require, as far as is known.

    Raises:
        InvalidArgumentError: some are missing; the message names each of them.
    """
    if lacks := kernel.lacks(musts=True):
        named = "; ".join(f"{one.shown} ({one.purpose})" for one in lacks)
        raise InvalidArgumentError(
            f"cannot use the kernel {kernel.image}: it lacks {named}; build them in, or give the "
            "directory of its modules",
            field="node.kernel",
        )
