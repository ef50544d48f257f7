"""Makes the initramfs (busybox, the necessary modules, and one script), and adds modules that a
machine may need later to the image."""

import gzip
import lzma
import os
import stat
import subprocess
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from sandyard.server.core.errors import InternalError
from sandyard.server.drivers.initrd import cpio_entry

# tcp_diag: to break off connections that a machine which stood still believes to have.
_MODULES = ("virtio_mmio", "virtio_blk", "virtio_net", "erofs", "ext4", "overlay", "tcp_diag")
_OPTIONAL = frozenset({"tcp_diag", "nfsv4"})
_FOR_MOUNTS = ("nfsv4",)
_FOLDERS = ("bin", "dev", "proc", "sys", "tools", "base", "disk", "root", "modules")
_APPLETS = (
    "sh", "mount", "umount", "mkdir", "insmod", "grep", "cp", "rm", "ln", "chmod", "ip", "hostname",
    "usleep", "sleep", "reboot", "switch_root", "cat", "mknod", "chown",
)  # fmt: skip


def make_initrd(tools: Path, root: Path, release: str | None, script: bytes, target: Path) -> None:
    """Write the initramfs, with the busybox of the tools, for the kernel `release` whose modules
    are in a root file system.

    None means a kernel without modules. The initramfs is not compressed, because every boot would
    have to decompress it.

    Raises:
        InternalError: busybox or a required module is missing.
    """
    busybox = tools / "usr/bin/busybox"
    if not busybox.exists():
        raise InternalError("cannot make the initramfs: the tools lack busybox-static")
    archive = bytearray()
    for name in _FOLDERS:
        archive += cpio_entry(name, stat.S_IFDIR | 0o755, b"")
    archive += cpio_entry("dev/console", stat.S_IFCHR | 0o600, b"", device=(5, 1))
    archive += cpio_entry("bin/busybox", stat.S_IFREG | 0o755, busybox.read_bytes())
    for name in _APPLETS:
        archive += cpio_entry(f"bin/{name}", stat.S_IFLNK | 0o777, b"busybox")
    archive += cpio_entry("init", stat.S_IFREG | 0o755, script)
    order = []
    for path in _in_load_order(root / "usr/lib/modules" / release, _MODULES) if release else ():
        name = path.name.split(".ko")[0] + ".ko"
        order.append(name)
        archive += cpio_entry(f"modules/{name}", stat.S_IFREG | 0o644, _module_bytes(path))
    archive += cpio_entry(
        "modules/order", stat.S_IFREG | 0o644, "".join(f"{name}\n" for name in order).encode()
    )
    archive += cpio_entry("TRAILER!!!", 0, b"")
    target.write_bytes(archive)


def add_modules(tools: Path, root: Path, release: str | None) -> None:
    """Add the modules for mounting workspaces, which are in a root file system, to the tools:
    uncompressed, and where `load-modules` finds them. None means a kernel without modules.

    Raises:
        InternalError: one of them cannot be read.
    """
    folder = tools / "usr/lib/sandyard/modules"
    folder.mkdir(parents=True)
    order = []
    for path in _in_load_order(root / "usr/lib/modules" / release, _FOR_MOUNTS) if release else ():
        order.append(path.name.split(".ko")[0] + ".ko")
        (folder / order[-1]).write_bytes(_module_bytes(path))
    (folder / "order").write_text("".join(f"{name}\n" for name in order))


def _in_load_order(folder: Path, names: Sequence[str]) -> Iterator[Path]:
    needs: dict[str, list[str]] = {}
    by_name: dict[str, str] = {}
    for line in (folder / "modules.dep").read_text().splitlines():
        path, _, rest = line.partition(":")
        needs[path] = rest.split()
        by_name[Path(path).name.split(".ko")[0].replace("-", "_")] = path
    builtin = {
        Path(line).name.removesuffix(".ko").replace("-", "_")
        for line in (folder / "modules.builtin").read_text().splitlines()
    }
    done: set[str] = set()
    for name in names:
        if name in builtin:
            continue
        if name not in by_name and name in _OPTIONAL:
            continue
        if name not in by_name:
            raise InternalError(f"cannot make the initramfs: the kernel has no module {name}")
        # modules.dep lists what a module needs with the deepest last.
        for path in [*reversed(needs[by_name[name]]), by_name[name]]:
            if path not in done:
                done.add(path)
                yield folder / path


def _module_bytes(path: Path) -> bytes:
    try:
        if path.suffix == ".xz":
            return lzma.decompress(path.read_bytes())
        if path.suffix == ".gz":
            return gzip.decompress(path.read_bytes())
        if path.suffix == ".zst":
            done = subprocess.run(["zstd", "-dc", str(path)], capture_output=True, check=True)
            return done.stdout
        return path.read_bytes()
    except (OSError, EOFError, lzma.LZMAError, zlib.error, subprocess.SubprocessError) as error:
        raise InternalError(
            f"cannot make the image: the module {path.name} cannot be read: {error}"
        ) from error


def kernel_release(root: Path) -> str:
    """Return the release of the only kernel whose modules are in a root file system.

    Raises:
        InternalError: there is none, or more than one.
    """
    found = (
        sorted(os.listdir(root / "usr/lib/modules")) if (root / "usr/lib/modules").is_dir() else []
    )
    if len(found) != 1:
        raise InternalError(f"cannot choose a kernel: the template has {found or 'none'}")
    return found[0]
