"""A bootable image: a folder with everything that its machines share."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOTS = ("tools.erofs", "root.erofs")
_TOGETHER = "base.ext4"
MANIFEST = "manifest.json"


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
    sums: Mapping[str, str] = field(default_factory=dict)
    """The SHA-256 of each file but the manifest; images of earlier versions have none."""

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
        together = self.folder / _TOGETHER
        if together.exists():
            return (together,)
        return tuple(self.folder / name for name in ROOTS)

    @property
    def files(self) -> tuple[Path, ...]:
        """All its files."""
        return (self.folder / MANIFEST, self.kernel, self.initrd, *self.roots)

    @property
    def kernel(self) -> Path:
        """The kernel: a bzImage, or an ELF file."""
        return self.folder / "vmlinuz"

    @property
    def initrd(self) -> Path:
        """The initramfs."""
        return self.folder / "initrd"


def sum_of(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def altered_in(image: Image) -> list[str]:
    """Return the names of an image's files that are not as they were built; reads all of them.
    Nothing is known of images of earlier versions."""
    files = [one for one in image.files if one.name != MANIFEST]
    return [one.name for one in files if image.sums and image.sums.get(one.name) != sum_of(one)]


def write_manifest(
    folder: Path,
    *,
    os: str,
    size_bytes: int,
    inputs: Mapping[str, str],
    has_acpi: bool = True,
    sums: Mapping[str, str] | None = None,
) -> None:
    """Write the manifest that makes a folder an image."""
    (folder / MANIFEST).write_text(
        json.dumps(
            {
                "os": os,
                "sizeBytes": size_bytes,
                "createdAt": datetime.now(UTC).isoformat(),
                "inputs": dict(inputs),
                "hasAcpi": has_acpi,
                "sums": dict(sums or {}),
            },
            indent=1,
        )
    )


IMAGE_FILES = frozenset({MANIFEST, _TOGETHER, *ROOTS, "vmlinuz", "initrd"})
"""The names of all files that images can have."""


def _load(path: Path) -> Any:
    return json.loads(path.read_text())


def read_image(folder: Path, load: Callable[[Path], Any] = _load) -> Image | None:
    """Return the image in a folder if it exists and is complete. `load` reads its manifest."""
    try:
        manifest = load(folder / MANIFEST)
    except (OSError, ValueError):  # a crash of the host may leave it empty
        return None
    return image_of(folder, manifest)


def image_of(folder: Path, manifest: Mapping[str, Any]) -> Image:
    """Return the image in a folder, which has this manifest."""
    return Image(
        digest=folder.name,
        folder=folder,
        os=manifest["os"],
        size_bytes=manifest["sizeBytes"],
        created_at=datetime.fromisoformat(manifest["createdAt"]),
        inputs=manifest["inputs"],
        has_acpi=manifest.get("hasAcpi", True),
        sums=manifest.get("sums", {}),
    )
