"""Versions of templates that users built: root file systems by content, and images made of them.

    versions/<digest>/        root.erofs, about.json: never changed
    versions/images/<digest>/ links to the root and to the runtime it boots with, and a manifest

A version has no kernel, initramfs or tools of its own. They are the runtime, an image of the
operator's; a new one makes new images of all versions, and no version is built anew. The host never
opens a root file system: a machine packed it, and machines mount it.
"""

import errno
import json
import os
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

from sandyard.server.core.codec import CodecError, decode, encode
from sandyard.server.core.contracts.node import VersionFact, version_name
from sandyard.server.core.egress import NOTHING
from sandyard.server.core.errors import DamagedError, InvalidArgumentError, NoCapacityError
from sandyard.server.core.records import VersionAbout
from sandyard.server.drivers.sparse import link_or_copy, write_sparse
from sandyard.server.node.images.definitions import Definition, Source
from sandyard.server.node.images.image import ROOTS, Image, read_image, sum_of, write_manifest
from sandyard.server.tasks import in_thread

_MAGIC = b"\xe2\xe1\xf5\xe0"  # of EROFS, at byte 1024 (kernel documentation, "EROFS")
_MAGIC_AT = 1024
_PART = ".part-"
_ABOUT, _ROOT = "about.json", ROOTS[1]


class Versions:
    """The versions under one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """Where they are, each in a folder that is named by its digest."""
        self._known: dict[str, Definition] = {}
        self._making = threading.Lock()

    @property
    def images_dir(self) -> Path:
        """The folder of the images that were made of versions."""
        return self.folder / "images"

    def names(self, build_id: str | None = None) -> list[str]:
        """Return the names of all versions (`contracts.node.version_name`), or of those of one
        build."""
        found = []
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if path == self.images_dir or path.name.startswith("."):
                continue
            definition = self._definition(path.name)
            if definition is not None and build_id in (None, definition.build_id):
                found.append(definition.slug)
        return sorted(found)

    def definition(self, name: str) -> Definition | None:
        """Return what is known of a version, by its name."""
        _, _, digest = name.partition("@")
        found = self._definition(digest) if digest.isalnum() else None
        return found if found is not None and found.slug == name else None

    def _definition(self, digest: str) -> Definition | None:
        known = self._known.get(digest)
        if known is not None:
            return known
        try:
            manifest = json.loads((self.folder / digest / _ABOUT).read_text())
            about = decode(VersionAbout, manifest["about"])
        except (OSError, ValueError, KeyError, CodecError):
            return None
        definition = self._known[digest] = _definition_of(about, digest)
        return definition

    def image(self, name: str, runtime: Image, load: Callable[[Path], Any]) -> Image | None:
        """Return the image of a version with a runtime, which is made if necessary. `load` reads
        manifests."""
        definition = self.definition(name)
        if definition is None:
            return None
        digest = sha256(f"{definition.digest} {runtime.digest}".encode()).hexdigest()[:24]
        found = read_image(self.images_dir / digest, load)
        if found is None:
            with self._making:
                self._make_image(definition, runtime, digest)
            found = read_image(self.images_dir / digest, load)
        return found

    def _make_image(self, definition: Definition, runtime: Image, digest: str) -> None:
        version = self.folder / definition.digest
        self.images_dir.mkdir(mode=0o711, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=_PART, dir=self.images_dir))
        try:
            made.chmod(0o711)
            for source in (runtime.kernel, runtime.initrd, runtime.roots[0]):
                link_or_copy(source, made / source.name)
            link_or_copy(version / _ROOT, made / _ROOT)
            size = (version / _ROOT).stat().st_blocks * 512
            write_manifest(
                made,
                os=definition.sources[0].os,
                size_bytes=size,
                inputs={**runtime.inputs, "version": definition.digest, "runtime": runtime.digest},
                has_acpi=runtime.has_acpi,
            )
            _sync(made / "manifest.json", made)
            made.rename(self.images_dir / digest)
        except OSError as error:
            shutil.rmtree(made, ignore_errors=True)
            # Another request may have made it meanwhile.
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                raise

    async def keep(
        self, about: VersionAbout, pieces: AsyncIterator[bytes], *, size_max: int
    ) -> VersionFact:
        """Keep a root file system as it comes, and return the version.

        Raises:
            InvalidArgumentError: it is larger than `size_max`, or no EROFS.
            NoCapacityError: the host's disk is full.
        """
        return await self._keep(about.slug, encode(about), pieces, size_max=size_max, name=None)

    async def _keep(
        self,
        slug: str,
        about: object,
        pieces: AsyncIterator[bytes],
        *,
        size_max: int,
        name: str | None,
    ) -> VersionFact:
        """Keep a root file system. `about` is a `VersionAbout` as JSON has it; with a `name`, what
        results must have that."""
        self.folder.mkdir(mode=0o711, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=_PART, dir=self.folder))
        try:
            root = part / _ROOT
            content, size, head = sha256(), 0, b""
            with root.open("xb") as file:
                async for piece in pieces:
                    size += len(piece)
                    if size > size_max:
                        raise InvalidArgumentError(
                            "cannot keep the template: its files take more than "
                            f"{size_max >> 20} MiB; remove some, or ask an operator for a higher "
                            "limit"
                        )
                    head = (head + piece)[: _MAGIC_AT + 4] if len(head) < _MAGIC_AT + 4 else head
                    content.update(piece)
                    await in_thread(write_sparse, file.fileno(), piece)
                if head[_MAGIC_AT:] != _MAGIC:
                    raise InvalidArgumentError(
                        "cannot keep the template: what was packed is no file system"
                    )
                os.truncate(file.fileno(), size)
                await in_thread(os.fsync, file.fileno())
            manifest = {"about": about, "root": content.hexdigest()}
            digest = _name_of(manifest)
            if name not in (None, version_name(slug, digest)):
                raise DamagedError(f"cannot keep a copy of {name}: its contents differ")
            about_file = part / _ABOUT
            about_file.touch(mode=0o600)  # an environment may have secrets
            about_file.write_text(json.dumps(manifest, indent=1))
            root.chmod(0o444)
            part.chmod(0o711)
            await in_thread(_sync, about_file, part)
            if not (self.folder / digest).exists():
                part.rename(self.folder / digest)
                await in_thread(_sync, self.folder)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise NoCapacityError(
                    "cannot keep the template: the host's disk is full"
                ) from error
            raise
        finally:
            await in_thread(shutil.rmtree, part, ignore_errors=True)
        return VersionFact(version_name(slug, digest), content.hexdigest(), size)

    def files(self, name: str) -> tuple[Path, Path] | None:
        """Return the settings of a version and its root file system, if it is here."""
        definition = self.definition(name)
        if definition is None:
            return None
        folder = self.folder / definition.digest
        return folder / _ABOUT, folder / _ROOT

    def altered(self) -> list[str]:
        """Return the names of the versions here whose files are not what their digests say; reads
        all of them."""
        found = []
        for folder in sorted(self.folder.iterdir()) if self.folder.is_dir() else ():
            try:
                manifest = json.loads((folder / _ABOUT).read_text())
                is_whole = (
                    _name_of(manifest) == folder.name and sum_of(folder / _ROOT) == manifest["root"]
                )
            except (OSError, ValueError, KeyError, TypeError):
                is_whole = not (folder / _ABOUT).exists()  # unfinished; it is removed at a start
            if not is_whole:
                found.append(folder.name)
        return found

    async def keep_copy(
        self, name: str, about: bytes, pieces: AsyncIterator[bytes], *, size_bytes: int
    ) -> None:
        """Keep a version that another node has: the contents of its `files`.

        Raises:
            DamagedError: it is not what its name says.
            NoCapacityError: the host's disk is full.
        """
        try:
            # As it was written: a node of the next version may write more, and the digest in the
            # name is of all of it.
            described = json.loads(about)["about"]
            slug = decode(VersionAbout, described).slug
        except (ValueError, KeyError, TypeError, CodecError) as error:
            raise DamagedError(f"cannot keep a copy of {name}: {error}") from error
        await self._keep(slug, described, pieces, size_max=size_bytes, name=name)

    def drop(self, name: str) -> None:
        """Remove a version. Images that were made of it remain until `drop_images`."""
        definition = self.definition(name)
        if definition is not None:
            self._known.pop(definition.digest, None)
            shutil.rmtree(self.folder / definition.digest, ignore_errors=True)

    def drop_images(self, needed: Callable[[], set[str]], runtime: str) -> None:
        """Remove images whose version is gone or that have another runtime, except those
        `needed`."""
        with self._making:
            kept = needed()
            for path in list(self.images_dir.glob("[!.]*")):
                if path.name in kept:
                    continue
                found = read_image(path)
                version = "" if found is None else found.inputs.get("version", "")
                is_current = found is not None and found.inputs.get("runtime") == runtime
                if not is_current or self._definition(version) is None:
                    shutil.rmtree(path, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what killed processes left; call it before anything is kept."""
        for folder in (self.folder, self.images_dir):
            for path in list(folder.glob(f"{_PART}*")):
                shutil.rmtree(path, ignore_errors=True)


def _definition_of(about: VersionAbout, digest: str) -> Definition:
    return Definition(
        slug=version_name(about.slug, digest),
        name=about.slug,
        description="",
        kind=about.kind,
        defaults=about.defaults,
        sources=(Source("", "", about.os, (), "", ()),),
        packages=(),
        node=None,
        steps=(),
        start=None,
        warmup=(),
        digest=digest,
        env=about.env,
        build_id=about.build_id,
        user=about.user,
        workdir=about.workdir,
        ready=about.ready,
        policy=NOTHING if about.network is None else about.network,
    )


def _sync(*paths: Path) -> None:
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _name_of(manifest: object) -> str:
    """Return the digest by which a version is known: of its settings and its root's digest."""
    return sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()[:24]
