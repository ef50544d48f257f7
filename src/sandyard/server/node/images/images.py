"""Built templates on disk: images by content, and which of them each template uses.

    images/<digest>/    tools.erofs, root.erofs, vmlinuz, initrd, manifest.json: never changed
    templates/<slug>.json                           the image in use, the last error

An image is made in a folder of another name and renamed when it is complete, so whatever has a
digest for a name is whole.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sandyard.server.core.contracts.node import TemplateFact, TemplateStatus
from sandyard.server.core.errors import NotFoundError, UnavailableError
from sandyard.server.node.images.definitions import Definition

ROOTS = ("tools.erofs", "root.erofs")


@dataclass(frozen=True)
class Image:
    """A bootable image: read-only, and shared by all its machines."""

    digest: str
    folder: Path
    os: str
    size_bytes: int
    created_at: datetime
    inputs: Mapping[str, str]
    has_acpi: bool = True
    """Whether its kernel finds devices by ACPI."""

    @property
    def arguments(self) -> str:
        """The kernel arguments in addition to those of every machine."""
        return self.inputs.get("kernelArguments", "")

    @property
    def has_own_kernel(self) -> bool:
        """Whether its kernel is an operator's instead of its distribution's."""
        return bool(self.inputs.get("kernel"))

    @property
    def roots(self) -> tuple[Path, ...]:
        """The read-only disks, in their order: our tools, and the template's root file system. An
        image of an earlier version has both in one."""
        together = self.folder / "base.ext4"
        if together.exists():
            return (together,)
        return tuple(self.folder / name for name in ROOTS)

    @property
    def kernel(self) -> Path:
        """The kernel: a bzImage, or an ELF file."""
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """The initramfs."""
        return self.folder / "initrd"


class Images:
    """The images of an installation. `images_dir` may be shared between installations."""

    def __init__(
        self, *, definitions: Mapping[str, Definition], images_dir: Path, templates_dir: Path
    ) -> None:
        self.definitions = definitions
        self.images_dir = images_dir
        self._templates_dir = templates_dir
        self._read: dict[Path, tuple[tuple[int, ...], Any]] = {}

    def get(self, slug: str) -> tuple[Definition, Image]:
        """Return a template's definition and its current image.

        Raises:
            NotFoundError: no such template.
            UnavailableError: it has not been built.
        """
        definition = self.definitions.get(slug)
        if definition is None:
            known = ", ".join(sorted(self.definitions))
            raise NotFoundError(f"cannot use the template {slug}: known are {known}")
        image = self.find(str(self._state(slug).get("digest", "")))
        if image is None:
            raise UnavailableError(
                f"cannot use the template {slug}: it has not been built yet; "
                f"run `sandyard template build {slug}` on the host"
            )
        return definition, image

    def current(self, slug: str) -> Image | None:
        """Return the current image of a template, if it has been built."""
        return self.find(str(self._state(slug).get("digest", "")))

    def find(self, digest: str) -> Image | None:
        """Return the image with this digest if it exists and is complete."""
        folder = self.images_dir / digest
        try:
            manifest = self._load(folder / "manifest.json")
        except OSError:
            return None
        return Image(
            digest=digest,
            folder=folder,
            os=manifest["os"],
            size_bytes=manifest["sizeBytes"],
            created_at=datetime.fromisoformat(manifest["createdAt"]),
            inputs=manifest["inputs"],
            has_acpi=manifest.get("hasAcpi", True),
        )

    def use(self, slug: str, digest: str) -> None:
        """Make an image the current one of a template."""
        self._write(slug, {"digest": digest})

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
        state = self._state(definition.slug)
        image = self.find(str(state.get("digest", "")))
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
        )

    def _state(self, slug: str) -> dict[str, object]:
        try:
            state = self._load(self._templates_dir / f"{slug}.json")
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
        part.replace(self._templates_dir / f"{slug}.json")


def write_manifest(
    folder: Path, *, os: str, size_bytes: int, inputs: Mapping[str, str], has_acpi: bool = True
) -> None:
    """Write the manifest that makes a folder an image."""
    (folder / "manifest.json").write_text(
        json.dumps(
            {
                "os": os,
                "sizeBytes": size_bytes,
                "createdAt": datetime.now(UTC).isoformat(),
                "inputs": dict(inputs),
                "hasAcpi": has_acpi,
            },
            indent=1,
        )
    )


def _is_alive(pid: object) -> bool:
    return isinstance(pid, int) and Path(f"/proc/{pid}").exists()
