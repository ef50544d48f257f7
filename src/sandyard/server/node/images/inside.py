"""The confined part of a template's build: each step runs as this program.

usage: python -m sandyard.server.node.images.inside VIEW run COMMAND [ARGUMENT ...]
       python -m sandyard.server.node.images.inside VIEW unpack ARCHIVE
       python -m sandyard.server.node.images.inside VIEW finish ARCHIVE [own-kernel] [trust]
       python -m sandyard.server.node.images.inside VIEW image [RELEASE]

`VIEW` is what the step sees of the host (`confine.View`). `unpack` and `finish` run with the
template's tree as their root, so links in it cannot lead out of it. `image` sees that tree at
`/tree` and the one of our tools at `/tools`, and writes into the files `/out/vmlinuz`,
`/out/initrd`, `/out/tools.erofs` and `/out/root.erofs`. RELEASE names the kernel whose modules are
used: `-` stands for the distribution's, whose image is taken too; without it the kernel has no
modules.

The environment is expected to be clean: a step can read that of this process.
"""

import os
import resource
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from sandyard.server.core.errors import InternalError
from sandyard.server.node.images.confine import View, confined, die_with_parent
from sandyard.server.node.images.initrd import add_modules, kernel_release, make_initrd

TREE, TOOLS, OUT = Path("/tree"), Path("/tools"), Path("/out")
_ROOT = Path("/")
_USER = 1000
_MEMORY_BYTES = 8 * 1024**3
_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
_TRUSTING = ("NODE_EXTRA_CA_CERTS", "PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
_STALE = ("var/lib/apt/lists/*", "var/cache/apt/*.bin", "var/log/*.log", "var/log/apt/*")


def main(arguments: Sequence[str]) -> int:
    """Run one step and return its exit status."""
    view, word, *rest = arguments
    die_with_parent()  # a builder that is killed cannot end its step
    try:
        return confined(View.from_json(view), _work(word, rest))
    except OSError as error:
        sys.stderr.write(f"cannot confine the build: {error}\n")
        return 1


def _work(word: str, rest: Sequence[str]) -> Callable[[], int]:
    """Return the function to run in the view. Files of the host that it needs are opened here."""
    if word == "run":
        return lambda: _exec(rest)
    if word == "image":
        script = (Path(__file__).parent / "guest_files/init").read_bytes()
        release = rest[0] if rest else None
        return lambda: _reported(lambda: make_image(TREE, TOOLS, OUT, release, script))
    archive = open(rest[0], "rb")  # noqa: SIM115 - the child reads it
    if word == "unpack":
        return lambda: _reported(lambda: unpack(_ROOT, archive))
    own_kernel, trust = "own-kernel" in rest, "trust" in rest
    return lambda: _reported(lambda: finish(_ROOT, archive, own_kernel=own_kernel, trust=trust))


def _exec(command: Sequence[str]) -> int:
    try:
        os.execvp(command[0], list(command))  # noqa: S606
    except OSError as error:
        sys.stderr.write(f"cannot run {command[0]}: {error.strerror}\n")
        return 127


def _reported(work: Callable[[], None]) -> int:
    # A tree can hold files of any size.
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    try:
        work()
    except (InternalError, OSError, subprocess.SubprocessError, tarfile.TarError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    except MemoryError:
        sys.stderr.write(
            "cannot make the image: busybox, the kernel or a module in the template is larger than "
            "memory allows; check what its packages and steps put there\n"
        )
        return 1
    return 0


def unpack(root: Path, archive: IO[bytes]) -> None:
    """Add the folders, files and links of a tar archive to a tree, replacing existing ones.

    Existing folders keep their owners and modes.
    """
    with tarfile.open(fileobj=archive, mode="r:") as members:
        for member in members:
            path = root / member.name
            if member.isdir():
                if not path.is_dir():
                    _remove(path)
                    path.mkdir(parents=True)
                continue
            _remove(path)
            path.parent.mkdir(parents=True, exist_ok=True)
            if member.issym():
                path.symlink_to(member.linkname)
                continue
            content = members.extractfile(member)
            assert content is not None
            with path.open("xb") as file:
                shutil.copyfileobj(content, file)
                os.fchmod(file.fileno(), member.mode)


def finish(root: Path, archive: IO[bytes], *, own_kernel: bool, trust: bool) -> None:
    """Turn a tree of packages into a machine's: add our files, and remove those left by the build.

    With an `own_kernel` the distribution's modules are removed. `trust` configures programs with
    their own certificate authorities to use the distribution's.
    """
    _remove(root / "usr/lib/sandyard")
    if own_kernel:
        _remove(root / "usr/lib/modules")
    unpack(root, archive)
    if trust:
        path = root / "etc/environment"
        known = path.read_text() if path.is_file() else ""
        _remove(path)
        path.write_text(known + "".join(f"{name}={_BUNDLE}\n" for name in _TRUSTING))
    if (root / "home/user").is_dir():
        _add_user(root)
    for pattern in _STALE:
        for path in root.glob(pattern):
            if not path.is_dir():
                path.unlink()


def _add_user(root: Path) -> None:
    """Let the ordinary user write to the working folders, and run containers."""
    os.chown(root / "workspace", _USER, _USER)
    (root / "workspace").chmod(0o2775)
    for name in ("docker", "containerd", "containers"):
        (root / "var/lib" / name).mkdir(exist_ok=True)
    folder = root / "home/user"
    for name in (".local", "share", "containers"):
        folder = folder / name
        folder.mkdir(exist_ok=True)
        os.chown(folder, _USER, _USER)
    (root / "etc/profile.d/sandyard.sh").write_text(
        'if [ -z "$XDG_RUNTIME_DIR" ] && [ -O /run/user/1000 ]; then\n'
        "    export XDG_RUNTIME_DIR=/run/user/1000\n"
        "fi\n"
    )


def make_image(tree: Path, tools: Path, out: Path, release: str | None, script: bytes) -> None:
    """Write the kernel, the initramfs and the read-only file systems of two finished trees.

    Raises:
        InternalError: a required file is missing, or cannot be read.
        CalledProcessError: a tool failed; it has printed why.
    """
    if release == "-":
        release = kernel_release(tree)
        shutil.copyfile(tree / f"boot/vmlinuz-{release}", out / "vmlinuz")
    if release is not None:
        subprocess.run(["depmod", "-b", str(tree), release], check=True)
    make_initrd(tools, tree, release, script, out / "initrd")
    add_modules(tools, tree, release)
    _remove(tree / "boot")
    (tree / "boot").mkdir()
    for folder, name in ((tools, "tools.erofs"), (tree, "root.erofs")):
        subprocess.run(["mkfs.erofs", "--quiet", str(out / name), str(folder)], check=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
