"""Builds a template: a root file system from a distribution, then a bootable image from it.

There are two stages, each cached by the digest of its inputs: the packages (minutes, from the
network) and the image (seconds, local). A new agent therefore needs no new download. The agent
comes with packages of its own, which a template neither brings nor sees: they are the tools.

Everything that runs or reads the packages is confined (`inside.py`, `confine.py`): it sees the
host's programs and named files, but none of the host's processes or addresses. The host never opens
the tree, and reads from it only files that it created beforehand.
"""

import fcntl
import os
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path

from sandyard.server.core.errors import InternalError, InvalidArgumentError, SandyardError
from sandyard.server.node.commands import run
from sandyard.server.node.images import inside
from sandyard.server.node.images.additions import (
    GUEST_PACKAGES,
    WHEELS,
    pack_node,
    pack_template,
    pack_tools,
    pack_wheels,
)
from sandyard.server.node.images.confine import FIRST_ID, SLIRP, Bind, View
from sandyard.server.node.images.definitions import (
    Definition,
    NodeRuntime,
    Source,
    arguments_for,
)
from sandyard.server.node.images.image import ROOTS, Image, sum_of, write_manifest
from sandyard.server.node.images.images import Images
from sandyard.server.node.images.inside import OUT, TOOLS, TREE
from sandyard.server.node.images.kernel import OwnKernel, own_kernel, refuse_lacking
from sandyard.server.node.images.workshop import workshop
from sandyard.server.tasks import in_thread

# Grows when this file starts to build something else from the same definition.
_PACKAGES_RECIPE = "7"
_TOOLS_RECIPE = "3"
_IMAGE_RECIPE = "12"
_PACKAGES_LIMIT_S = 1800.0
_STEP_LIMIT_S = 600.0
_REACH_LIMIT_S = 30.0
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CERTIFICATE = re.compile(r"-----BEGIN CERTIFICATE-----[A-Za-z0-9+/=\s]+-----END CERTIFICATE-----")
_TOOLS_PACKAGES = ("busybox-static", "erofs-utils", "openssh-sftp-server", "python3")
# What the packages of every installed system provide: folders, and the links that programs find
# their loader by. Packages of older releases have files under them.
_BEFORE_TOOLS = """
for name in proc sys dev run tmp; do mkdir -p "$1/$name"; done
for name in bin sbin lib lib64; do mkdir -p "$1/usr/$name" && ln -s "usr/$name" "$1/$name"; done
"""
_AFTER_TOOLS = 'chroot "$1" python3 -m compileall -q /usr/lib'
_PROGRAMS = ("mmdebstrap", "tar", "zstd", "mkfs.erofs", "depmod")
_LEFT_OUT = (
    "path-exclude=/usr/share/man/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/locale/*",
    "path-exclude=/usr/share/info/*",
)

Progress = Callable[[str], None]


@dataclass(frozen=True)
class BuildOptions:
    """How an installation builds its templates.

    `network` is `own` or `host` (`confine.View`); `proxies` are environment variables for apt. The
    kernel replaces the distribution's, unless the template's definition names another.
    """

    cache_dir: Path
    logs_dir: Path
    extra_ca: Path | None = None
    kernel: Path | None = None
    kernel_modules: Path | None = None
    kernel_arguments: str = ""
    network: str = "own"
    proxies: Mapping[str, str] = field(default_factory=dict)


class Builder:
    """Builds templates into an installation's images."""

    def __init__(self, images: Images, options: BuildOptions) -> None:
        self._images = images
        self._options = options

    async def build(self, slug: str, *, progress: Progress, again: bool = False) -> Image:
        """Bring a template up to date and return its image; if this fails, the old one stays in
        use.

        `progress` is called with one line per step; everything else goes to the build log. `again`
        builds from the network even if nothing has changed, to include a distribution's updates.

        Raises:
            NotFoundError: no such template.
            InternalError: a tool is missing, or a step failed; the message names it and the log.
        """
        definition = self._images.definitions.get(slug)
        if definition is None:
            self._images.get(slug)
            raise AssertionError("unreachable")
        _check_tools(self._options.network)
        self._options.logs_dir.mkdir(parents=True, exist_ok=True)
        log = self._options.logs_dir / f"{slug}.log"
        with log.open("w") as file:
            self._images.note_building(slug, os.getpid())
            try:
                image = await _Build(
                    definition,
                    self._images,
                    self._options,
                    _Report(file.write, progress),
                    await in_thread(self._kernel_for, definition),
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
        """Return the kernel that replaces the distribution's in a template, if any."""
        image, modules = self._options.kernel, self._options.kernel_modules
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
        options: BuildOptions,
        report: _Report,
        kernel: OwnKernel | None,
    ) -> None:
        self._definition = definition
        self._images = images
        self._options = options
        self._report = report
        self._kernel = kernel
        self._arguments = arguments_for(options.kernel_arguments, definition)
        self._certificates = _certificates(options.extra_ca)

    async def run(self, *, again: bool) -> Image:
        recipe = {
            "definition": self._definition.digest,
            "packagesRecipe": _PACKAGES_RECIPE,
            "toolsRecipe": _TOOLS_RECIPE,
            "imageRecipe": _IMAGE_RECIPE,
            "agent": _digest_of_guest(),
            "certificates": _digest({"": "".join(self._certificates)}),
            "kernel": self._kernel.digest if self._kernel else "",
            "kernelArguments": self._arguments,
        }
        current = self._images.current(self._definition.slug)
        if current is not None and not again and recipe.items() <= current.inputs.items():
            # This does not depend on which source it was built from.
            self._report.step(f"{self._definition.slug} is up to date")
            return current
        self._options.cache_dir.mkdir(parents=True, exist_ok=True)
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
            tools = self._tools_archive(source)
            with _lock(tools.with_suffix(".lock")):
                if again or not tools.exists():
                    await self._make_tools(source, tools)
            self._images.images_dir.mkdir(parents=True, exist_ok=True)
            with workshop(self._images.images_dir, ".building-") as work:
                await self._make_image(work, archive, tools, source, inputs, digest)
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
        return self._options.cache_dir / f"{_digest(packages)}.tar.zst"

    def _tools_archive(self, source: Source) -> Path:
        packages = {"toolsRecipe": _TOOLS_RECIPE, "source": _name_of(source)}
        return self._options.cache_dir / f"tools-{_digest(packages)}.tar.zst"

    async def _choose_source(self, *, again: bool) -> Source:
        """Return the source whose packages are cached, or else the first one that answers."""
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
        with workshop(self._options.cache_dir, ".asking-") as work:
            try:
                await self._confined(
                    work,
                    [
                        "mmdebstrap", "--mode=unshare", "--simulate", "--variant=essential",
                        f"--components={','.join(source.components)}",
                        "--aptopt=Acquire::http::Timeout \"5\"",
                        "--aptopt=Acquire::https::Timeout \"5\"",
                        "--aptopt=Acquire::Retries \"0\"",
                        source.suite, "-",
                    ],
                    network=self._options.network,
                    limit_s=_REACH_LIMIT_S,
                )  # fmt: skip
            except InternalError:
                self._report.step(f"{source.os} cannot be had here; taking the next source")
                return False
        return True

    async def _make_packages(self, source: Source, archive: Path) -> None:
        self._report.step(f"installing the packages of {source.os}")
        with workshop(self._options.cache_dir, ".packages-") as work:
            root = _tree(work)
            names = dict.fromkeys((*self._definition.packages, *source.packages))
            # The kernel package is unpacked, not installed: it would bring tools to build
            # initramfs images that no machine of ours needs.
            hook = f'chroot "$1" sh -ec {shlex.quote(_unpack_kernel(source.kernel))}'
            await self._confined(
                work,
                [
                    "mmdebstrap", "--mode=unshare", "--format=directory", "--variant=minbase",
                    f"--components={','.join(source.components)}",
                    f"--include={','.join(names)}",
                    *(f"--dpkgopt={rule}" for rule in _LEFT_OUT),
                    f"--customize-hook={hook}",
                    source.suite, str(TREE),
                ],
                Bind(str(root), str(TREE), writable=True),
                network=self._options.network,
                limit_s=_PACKAGES_LIMIT_S,
            )  # fmt: skip
            if self._definition.node is not None:
                await self._add_node(self._definition.node, root, work)
            for step in self._definition.steps:
                self._report.step(f"running: {step}")
                await self._in_tree(work, ["/bin/sh", "-ec", step], network=self._options.network)
            if self._definition.wheels:
                await self._add_wheels(self._definition.wheels, work)
            await self._pack(work, root, archive)

    async def _make_tools(self, source: Source, archive: Path) -> None:
        """Take the packages of the tools apart, without installing them: nothing is set up by
        them, and they are never upgraded."""
        self._report.step(f"fetching the tools of {source.os}")
        with workshop(self._options.cache_dir, ".tools-") as work:
            root = _tree(work)
            await self._confined(
                work,
                [
                    "mmdebstrap", "--mode=unshare", "--format=directory", "--variant=extract",
                    f"--components={','.join(source.components)}",
                    f"--include={','.join(_TOOLS_PACKAGES)}",
                    *(f"--dpkgopt={rule}" for rule in _LEFT_OUT),
                    f"--setup-hook={_BEFORE_TOOLS}",
                    f"--extract-hook={_AFTER_TOOLS}",
                    source.suite, str(TREE),
                ],
                Bind(str(root), str(TREE), writable=True),
                network=self._options.network,
                limit_s=_PACKAGES_LIMIT_S,
            )  # fmt: skip
            await self._pack(work, root, archive)

    async def _pack(self, work: Path, root: Path, archive: Path) -> None:
        self._report.step("packing the packages")
        part = _output(archive.with_suffix(".part"))
        await self._confined(
            work,
            ["tar", "--zstd", "-C", str(TREE), "--numeric-owner", "--xattrs", "-cf",
             "/out/archive", "."],
            Bind(str(root), str(TREE)),
            Bind(str(part), "/out/archive", writable=True),
        )  # fmt: skip
        os.chown(part, 0, 0)
        part.chmod(0o644)  # confined steps read it
        part.replace(archive)

    async def _unpack(self, work: Path, root: Path, archive: Path) -> None:
        await self._confined(
            work,
            ["tar", "--zstd", "-C", str(TREE), "--numeric-owner", "--xattrs",
             "--xattrs-include=security.capability", "-xpf", "/in/archive"],
            Bind(str(archive), "/in/archive"),
            Bind(str(root), str(TREE), writable=True),
        )  # fmt: skip

    async def _add_node(self, node: NodeRuntime, root: Path, work: Path) -> None:
        self._report.step(f"adding Node.js {node.version}")
        wanted = f"{node.package}=={node.version} --hash=sha256:{node.sha256}"
        (wheel,) = await self._download([wanted], work / "node")
        await in_thread(pack_node, work / "node.tar", wheel)
        await self._in_tree(work, [str(work / "node.tar")], word="unpack")

    async def _add_wheels(self, wanted: Sequence[str], work: Path) -> None:
        self._report.step(f"adding {len(wanted)} Python packages")
        wheels = await self._download(wanted, work / "wheels")
        await in_thread(pack_wheels, work / "wheels.tar", wheels)
        await self._in_tree(work, [str(work / "wheels.tar")], word="unpack")
        install = (
            f"/opt/venv/bin/pip install --quiet --no-deps --no-index {WHEELS}/*.whl && "
            f"rm -r {WHEELS} && chown -R --reference=/opt/venv /opt/venv"
        )
        await self._in_tree(work, ["/bin/sh", "-ec", install])

    async def _download(self, wanted: Sequence[str], folder: Path) -> list[Path]:
        """Download Python packages on the host, as pip's requirements with hashes."""
        folder.mkdir()
        listed = folder / "requirements.txt"
        listed.write_text("".join(f"{one}\n" for one in wanted))
        await run(
            [
                sys.executable, "-m", "pip", "download", "--quiet", "--no-deps",
                "--only-binary=:all:", "--require-hashes", "-r", listed, "-d", folder,
            ],
            limit_s=_STEP_LIMIT_S,
            on_line=self._report.line,
        )  # fmt: skip
        return sorted(folder.glob("*.whl"))

    async def _make_image(
        self,
        work: Path,
        archive: Path,
        tools_archive: Path,
        source: Source,
        inputs: dict[str, str],
        digest: str,
    ) -> None:
        self._report.step("making the bootable image")
        root, tools, made = _tree(work), _tree(work, "tools"), work / "made"
        made.mkdir()
        await self._unpack(work, root, archive)
        await self._unpack(work, tools, tools_archive)
        own, words = self._kernel, []
        if own is not None:
            self._report.step(f"taking the kernel {own.image} ({own.info.release})")
            words.append("own-kernel")
        if self._certificates:
            words.append("trust")
        await in_thread(self._pack_additions, work, made / "vmlinuz")
        await self._in_tree(work, [str(work / "template.tar"), *words], word="finish")
        if self._certificates:
            await self._in_tree(work, ["update-ca-certificates"])
        await self._in_tree(work, [str(work / "tools.tar")], word="unpack", tree="tools")
        await self._in_tree(
            work,
            ["/usr/bin/python3", "-m", "compileall", "-q", "/usr/lib/sandyard/agent"],
            tree="tools",
        )
        # One archive instead of thirty files: every program that starts loads its locale.
        await self._in_tree(work, ["localedef", "--add-to-archive", "/usr/lib/locale/C.utf8"])
        outputs = [_output(made / name) for name in ("vmlinuz", "initrd", *ROOTS)]
        release = ["-"] if own is None else [own.modules.name] if own.modules else []
        await self._confined(
            work,
            release,
            Bind(str(root), str(TREE), writable=True),
            Bind(str(tools), str(TOOLS), writable=True),
            *(Bind(str(one), f"{OUT}/{one.name}", writable=True) for one in outputs),
            word="image",
        )
        for one in outputs:
            os.chown(one, 0, 0)
            one.chmod(0o444)
        write_manifest(
            made,
            os=source.os,
            size_bytes=sum((made / name).stat().st_blocks * 512 for name in ROOTS),
            inputs=inputs,
            has_acpi=self._kernel is None or self._kernel.info.has_acpi,
            sums=await in_thread(lambda: {one.name: sum_of(one) for one in outputs}),
        )
        made.chmod(0o755)
        await run(["sync", "-f", made], limit_s=_STEP_LIMIT_S)
        made.rename(self._images.images_dir / digest)

    def _pack_additions(self, work: Path, kernel: Path) -> None:
        """Pack the added files, and copy an operator's kernel into place."""
        own = self._kernel
        try:
            if own is not None:
                shutil.copy(own.image, kernel)
            pack_tools(work / "tools.tar")
            pack_template(
                work / "template.tar",
                start=self._definition.start,
                files=self._definition.files,
                certificates=self._certificates,
                modules=own.modules if own else None,
            )
        except OSError as error:
            if own is None:
                raise
            raise InternalError(f"cannot copy the kernel {own.image}: {error}") from error

    async def _in_tree(
        self,
        work: Path,
        arguments: Sequence[str],
        *,
        word: str = "run",
        network: str = "none",
        tree: str = "root",
    ) -> None:
        """Run one step with the template's tree as its root, or another one."""
        view = View(str(work / "view"), root=str(work / tree), network=network)
        await self._step(view, word, arguments, _STEP_LIMIT_S, {})

    async def _confined(
        self,
        work: Path,
        arguments: Sequence[str],
        *binds: Bind,
        word: str = "run",
        network: str = "none",
        limit_s: float = _STEP_LIMIT_S,
    ) -> None:
        """Run one step that sees the host's programs and the bound files."""
        scratch = work / "tmp"
        scratch.mkdir(exist_ok=True)
        os.chown(scratch, FIRST_ID, FIRST_ID)
        tmp = Bind(str(scratch), "/tmp", writable=True)  # noqa: S108 - the view's own
        view = View(str(work / "view"), binds=(tmp, *binds), network=network)
        await self._step(view, word, arguments, limit_s, self._options.proxies)

    async def _step(
        self,
        view: View,
        word: str,
        arguments: Sequence[str],
        limit_s: float,
        environment: Mapping[str, str],
    ) -> None:
        Path(view.place).mkdir(exist_ok=True)
        await run(
            [sys.executable, "-I", "-m", inside.__name__, view.to_json(), word, *arguments],
            limit_s=limit_s,
            env={"PATH": _PATH, **environment},
            on_line=self._report.line,
            name=arguments[0] if word == "run" else f"the step {word!r}",
        )


def _check_tools(network: str) -> None:
    for one in (*_PROGRAMS, *((SLIRP,) if network == "own" else ())):
        if shutil.which(one, path=_PATH) is None:
            raise InternalError(
                f"cannot build templates: {one} is not installed; `sandyard doctor` says how to "
                "get it"
            )


def _tree(work: Path, name: str = "root") -> Path:
    """Create the folder for a tree, which belongs to the confined root."""
    root = work / name
    root.mkdir(mode=0o755)
    os.chown(root, FIRST_ID, FIRST_ID)
    return root


def _output(path: Path) -> Path:
    """Create a file that a confined step may write to but not replace."""
    path.touch(mode=0o600)
    os.chown(path, FIRST_ID, FIRST_ID)
    return path


def _unpack_kernel(package: str) -> str:
    """Return a script that installs the kernel which a package depends on, in apt's root."""
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
        InvalidArgumentError: it cannot be read, or contains none.
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


def _name_of(source: Source) -> str:
    return f"{source.family} {source.suite}"


def _digest(inputs: dict[str, str]) -> str:
    text = "\n".join(f"{key}={value}" for key, value in sorted(inputs.items()))
    return sha256(text.encode()).hexdigest()[:24]


def _digest_of_guest() -> str:
    package = Path(__file__).parents[3]
    digest = sha256()
    folders: Sequence[Path] = [package / name for name in GUEST_PACKAGES]
    folders = [*folders, Path(__file__).parent / "guest_files"]
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "__pycache__" not in path.parts:
                digest.update(path.relative_to(folder).as_posix().encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:24]


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Let only one process at a time build what this file is named after."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
