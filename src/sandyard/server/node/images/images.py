"""Built templates on disk: images by content, and which of them each template uses.

    images/<digest>/    tools.erofs, root.erofs, vmlinuz, initrd, manifest.json: never changed
    templates/<slug>.json                           the image in use, the last error
    versions/…                                      what users built: see `versions`

An image is made in a folder of another name and renamed when it is complete, so whatever has a
digest for a name is whole.
"""

import json
import logging
import shutil
from collections.abc import Callable, Mapping
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from sandyard.server.core.contracts.node import TemplateFact, TemplateStatus
from sandyard.server.core.errors import NotFoundError, UnavailableError
from sandyard.server.node.images.definitions import Definition
from sandyard.server.node.images.image import MANIFEST, Image, image_of
from sandyard.server.node.images.versions import Versions

log = logging.getLogger(__name__)

RUNTIMES = ("builder", "base-minimal", "base-ubuntu")
"""The templates, best first, whose kernel and tools the versions of users' templates boot with."""

_REPLACED_S: Final = 600.0
"""How long a copy stays after a newer one has replaced it."""


class Images:
    """The images of an installation. `images_dir` may be shared between installations."""

    def __init__(
        self,
        *,
        definitions: Mapping[str, Definition],
        images_dir: Path,
        templates_dir: Path,
        versions: Versions,
    ) -> None:
        self.definitions = definitions
        self.images_dir = images_dir
        self.versions = versions
        self._templates_dir = templates_dir
        self._read: dict[Path, tuple[tuple[int, ...], Any]] = {}
        self._images: dict[Path, tuple[Any, Image]] = {}
        self._paths: dict[str, tuple[Path, ...]] = {}
        self._states: dict[str, Path] = {}
        self._facts: dict[str, tuple[tuple[object, ...], TemplateFact]] = {}

    def get(self, slug: str) -> tuple[Definition, Image]:
        """Return a template's definition and its current image.

        Raises:
            NotFoundError: no such template.
            UnavailableError: it has not been built.
        """
        definition = self.definition(slug)
        if definition is None:
            known = ", ".join(sorted(self.definitions))
            raise NotFoundError(f"cannot use the template {slug}: known are {known}")
        image = self.current(slug)
        if image is None:
            raise UnavailableError(
                f"cannot use the template {slug}: it has not been built yet; "
                f"run `sandyard template build {slug if slug in self.definitions else RUNTIMES[0]}`"
                " on the host"
            )
        return definition, image

    def definition(self, name: str) -> Definition | None:
        """Return the definition of a template, or of a version of one that a user built."""
        return self.versions.definition(name) if "@" in name else self.definitions.get(name)

    def current(self, name: str) -> Image | None:
        """Return the current image of a template if it has been built, or of a version."""
        if "@" not in name:
            return self.find(str(self._state(name).get("digest", "")))
        runtime = self._runtime()
        try:
            return None if runtime is None else self.versions.image(name, runtime, self._load)
        except (OSError, ValueError, KeyError) as error:
            log.error("cannot make an image of the version %s: %s", name, error)
            return None

    def _runtime(self) -> Image | None:
        """Return the image whose kernel and tools versions boot with."""
        for slug in (*RUNTIMES, *self.definitions):
            image = self.current(slug)
            if image is not None and image.inputs.get("toolsRecipe", "1") != "1":
                return image
        return None

    def find(self, digest: str) -> Image | None:
        """Return the image with this digest if it exists and is complete."""
        for path in self._manifests_of(digest):
            try:
                manifest = self._load(path)
            except (OSError, ValueError):  # a crash of the host may leave it empty
                continue
            known = self._images.get(path)
            if known is None or known[0] is not manifest:
                known = self._images[path] = (manifest, image_of(path.parent, manifest))
            return known[1]
        return None

    def _manifests_of(self, digest: str) -> tuple[Path, ...]:
        known = self._paths.get(digest)
        if known is None:
            folders = (self.images_dir, self.versions.images_dir)
            known = self._paths[digest] = tuple(one / digest / MANIFEST for one in folders)
        return known

    def is_current(self, name: str, digest: str) -> bool:
        """Tell whether an image is the current one of a template or version."""
        image = self.current(name)
        return image is not None and image.digest == digest

    def drop_old(self, needed: Callable[[], set[str]], *, now: datetime) -> None:
        """Remove the images of versions that are gone or boot with another runtime by now, and old
        copies, except those `needed`."""
        runtime = self._runtime()
        self.versions.drop_images(needed, runtime.digest if runtime else "")
        self.drop_copies(needed, now=now)

    def drop_copies(self, needed: Callable[[], set[str]], *, now: datetime) -> None:
        """Remove copies of templates that newer ones replaced some time ago, except those
        `needed`."""
        # Other installations may use what is elsewhere.
        if self.images_dir.parent == self._templates_dir.parent:
            for slug in self.definitions:
                self._drop_copies(slug, needed, now)

    def _drop_copies(self, slug: str, needed: Callable[[], set[str]], now: datetime) -> None:
        state = self._state(slug)
        old = [one for one in _copies_in(state) if one != state.get("digest")]
        # A machine that was started just before the change may not have a record yet.
        if not old or now.timestamp() - self._path(slug).stat().st_mtime < _REPLACED_S:
            return
        kept = needed()
        for digest in old:
            if digest not in kept:
                shutil.rmtree(self.images_dir / digest, ignore_errors=True)
        state = self._state(slug)  # it may have changed meanwhile
        left = [one for one in _copies_in(state) if (self.images_dir / one).exists()]
        if left != _copies_in(state):
            self._write(slug, {**state, "copies": left})

    def use(self, slug: str, digest: str, *, is_copy: bool = False) -> None:
        """Make an image the current one of a template. `is_copy` means that another node built
        it."""
        copies = _copies_in(self._state(slug))
        if is_copy and digest not in copies:
            copies.append(digest)
        state = {"digest": digest, "copies": copies}
        self._write(slug, state | ({"copied": True} if is_copy else {}))

    def is_own(self, slug: str) -> bool:
        """Tell whether the current image of a template was built here."""
        state = self._state(slug)
        return not state.get("copied") and self.find(str(state.get("digest", ""))) is not None

    def note_building(self, slug: str, pid: int) -> None:
        """Note that a process is building a template; its current image stays in use."""
        self._write(slug, {**self._state(slug), "building": pid, "error": None})

    def note_failure(self, slug: str, error: str) -> None:
        """Note that a build failed; the current image stays in use."""
        self._write(slug, {**self._state(slug), "building": None, "error": error})

    def facts(self) -> tuple[TemplateFact, ...]:
        """Return all known templates with their states."""
        return tuple(self._fact(definition) for _, definition in sorted(self.definitions.items()))

    def _fact(self, definition: Definition) -> TemplateFact:
        """Return a template's state, the same object as long as nothing changes: each create looks
        at all of them."""
        state = self._state(definition.slug)
        image = self.find(str(state.get("digest", "")))
        sources = (definition, state, image)
        known = self._facts.get(definition.slug)
        if known is not None and all(
            one is two for one, two in zip(known[0], sources, strict=True)
        ):
            return known[1]
        fact = self._fact_of(*sources)
        if image is not None:  # otherwise it depends on whether the process that builds it lives
            self._facts[definition.slug] = (sources, fact)
        return fact

    def _fact_of(
        self, definition: Definition, state: Mapping[str, object], image: Image | None
    ) -> TemplateFact:
        error = state.get("error")
        if image is not None:
            status = TemplateStatus.READY
        elif _is_alive(state.get("building")):
            status = TemplateStatus.BUILDING
        else:
            status = TemplateStatus.FAILED if error else TemplateStatus.PENDING
        return TemplateFact(
            slug=definition.slug,
            name=definition.name,
            description=definition.description,
            kind=definition.kind,
            status=status,
            defaults=definition.defaults,
            os=image.os if image else None,
            digest=image.digest if image else None,
            size_bytes=image.size_bytes if image else None,
            created_at=image.created_at if image else None,
            error=str(error) if error else None,
            is_hidden=definition.is_hidden,
            user=definition.user,
            workdir=definition.workdir,
            is_copy=bool(state.get("copied")),
        )

    def _state(self, slug: str) -> dict[str, object]:
        try:
            state = self._load(self._path(slug))
        except (OSError, ValueError):
            return {}
        return state if isinstance(state, dict) else {}

    def _load(self, path: Path) -> Any:
        """Return the contents of a file. It is read again only after a change: every create needs
        it several times, and other processes build."""
        found = path.stat()
        now = (found.st_ino, found.st_mtime_ns, found.st_size)
        known = self._read.get(path)
        if known is None or known[0] != now:
            known = self._read[path] = (now, json.loads(path.read_text()))
        return known[1]

    def _write(self, slug: str, state: dict[str, object]) -> None:
        self._templates_dir.mkdir(parents=True, exist_ok=True)
        part = self._templates_dir / f"{slug}.json.part"
        part.write_text(json.dumps(state))
        part.replace(self._path(slug))

    def _path(self, slug: str) -> Path:
        known = self._states.get(slug)
        if known is None:
            known = self._states[slug] = self._templates_dir / f"{slug}.json"
        return known


def _copies_in(state: Mapping[str, object]) -> list[str]:
    """Return the digests of the copies that are here, or were. An earlier version noted none."""
    copies = state.get("copies")
    if isinstance(copies, list):
        return [str(one) for one in copies]
    return [str(state["digest"])] if state.get("copied") else []


def _is_alive(pid: object) -> bool:
    return isinstance(pid, int) and Path(f"/proc/{pid}").exists()
