"""Saved machines on disk: sealed, so that a truncated or altered one is never started.

    <folder>/device         the state of the devices, in the driver's format
    <folder>/memory         the whole memory; a state that builds on another file has `pages`
    <folder>/disk.ext4      the disk at that moment, unless it stays with its machine
    <folder>/manifest.json  what it belongs to, and each file's size and digest; signed

A folder is written under another name and renamed after all of it is synced, so whatever has its
final name is complete. The signature is made with the installation's key.
"""

import hmac
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path

from sandyard.server.core.errors import DamagedError, IncompatibleError
from sandyard.server.core.shapes import Shape
from sandyard.server.drivers.contract import Saved
from sandyard.server.drivers.sparse import copy_sparse, digest_sparse, has_holes, mac_sparse
from sandyard.server.node.host.choice import Drivers
from sandyard.server.tasks import in_thread

FORMATS = (1, 2)
"""What can be read; the last is what is written. In the first, files had a digest and no key."""
_MANIFEST = "manifest.json"


@dataclass(frozen=True)
class About:
    """What a saved machine belongs to, and what it needs to be restored.

    `token` is what its agent accepts. `host` names the kind of CPU it was saved on.
    """

    kind: str
    template: str
    image: str
    os: str
    vcpus: int
    memory_mib: int
    disk_mib: int
    driver: str
    driver_version: str
    host: str
    token: str
    created_at: str = ""

    @property
    def shape(self) -> Shape:
        """Its shape."""
        return Shape(self.vcpus, self.memory_mib, self.disk_mib)


@dataclass(frozen=True)
class SavedMachine:
    """A saved machine whose manifest has been verified."""

    folder: Path
    about: About
    files: Mapping[str, Mapping[str, int | str]]
    key: bytes = field(repr=False)

    @property
    def state(self) -> Saved:
        """What a driver restores from."""
        return Saved(self.folder, self.about.driver_version)

    @property
    def disk(self) -> Path:
        """The disk of the same moment."""
        return self.folder / "disk.ext4"

    @property
    def size_bytes(self) -> int:
        """The disk space it uses, in bytes."""
        return sum(path.stat().st_blocks * 512 for path in self.folder.iterdir())


def seal(folder: Path, about: About, *, key: bytes, belonging: Iterable[Path] = ()) -> SavedMachine:
    """Sync the files in a folder, write their manifest, and sync that.

    `belonging` are files elsewhere that the state needs. They are too large to digest each time,
    and are recognized by size and modification time.
    """
    about = About(**{**asdict(about), "created_at": datetime.now(UTC).isoformat()})
    paths = sorted(folder.iterdir())
    # Where the holes are is part of a digest, and a file system may settle that when it writes.
    with_holes = [path for path in paths if has_holes(path)]
    _sync_files(with_holes)
    # The rest concurrently: one waits for the disk, the other for the CPU.
    with ThreadPoolExecutor(1, "syncing") as beside_this:
        syncing = beside_this.submit(_sync_files, [one for one in paths if one not in with_holes])
        files: dict[str, dict[str, int | str]] = {
            path.name: {**_look(path), **_seal_of(path, key)} for path in paths
        }
        syncing.result()
    files |= {str(path): _look(path) for path in belonging}
    content = {"format": FORMATS[-1], "about": asdict(about), "files": files}
    text = json.dumps({**content, "signature": _signature(content, key)})
    descriptor = os.open(folder / _MANIFEST, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(folder)
    return SavedMachine(folder, about, files, key)


def load(folder: Path, *, key: bytes) -> SavedMachine:
    """Return the saved machine in a folder.

    Raises:
        DamagedError: there is none, or its manifest is damaged or not signed here.
        IncompatibleError: it is of a newer version of Sandyard.
    """
    try:
        content = json.loads((folder / _MANIFEST).read_text())
        signature = content.pop("signature")
        if not hmac.compare_digest(signature, _signature(content, key)):
            raise DamagedError("cannot use what was saved: its manifest was altered")
        if content["format"] not in FORMATS:
            raise IncompatibleError(
                "cannot use what was saved: a newer version of Sandyard saved it; upgrade this one"
            )
        return SavedMachine(folder, About(**content["about"]), content["files"], key)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedError(f"cannot use what was saved: it cannot be read: {error!r}") from error


def check(saved: SavedMachine, *, whole: bool) -> None:
    """Return if every file is as it was sealed.

    Size, time and inode are compared. If they differ, or with `whole`, the content is verified.

    Raises:
        DamagedError: a file is missing, truncated or altered.
    """
    for name, sealed in saved.files.items():
        path = saved.folder / name
        try:
            found = _look(path)
            is_beside = "mac" not in sealed and "sha256" not in sealed
            same = all(found[one] == sealed[one] for one in found)
            if is_beside and all(found[one] == sealed[one] for one in ("size", "time")):
                continue
            if (whole or not same) and (is_beside or not _is_as_sealed(path, sealed, saved.key)):
                raise DamagedError(f"cannot use what was saved: its file {path.name} was altered")
        except OSError as error:
            raise DamagedError(
                f"cannot use what was saved: its file {path.name} is missing"
            ) from error


def publish(part: Path, folder: Path) -> None:
    """Rename a complete folder to its final name."""
    part.rename(folder)
    sync_folder(folder.parent)


def size_of(folder: Path) -> int:
    """Return the bytes that a folder uses on disk, without what it shares with others."""
    size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                found = os.lstat(os.path.join(place, name))
            except FileNotFoundError:
                continue
            if found.st_nlink == 1:
                size += found.st_blocks * 512
    return size


def withdraw(folder: Path, to: Path) -> None:
    """Rename a folder to `to`, so that it no longer counts."""
    shutil.rmtree(to, ignore_errors=True)
    try:
        folder.rename(to)
    except FileNotFoundError:
        return
    sync_folder(folder.parent)


def remove(folder: Path, to: Path) -> None:
    """Withdraw a folder and remove it."""
    withdraw(folder, to)
    shutil.rmtree(to, ignore_errors=True)


def copy_state(source: SavedMachine | Saved, target: Path) -> None:
    """Copy a state's own files, except a whole memory, to a new folder."""
    target.mkdir(mode=0o700)
    for path in source.folder.iterdir():
        if path.name in ("device", "pages"):
            copy_sparse(path, target / path.name)


def _sync_files(paths: Iterable[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Sync the names in a folder to disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _look(path: Path) -> dict[str, int | str]:
    found = path.stat()
    return {"size": found.st_size, "time": found.st_mtime_ns, "inode": found.st_ino}


def _seal_of(path: Path, key: bytes) -> dict[str, int | str]:
    salt = os.urandom(16).hex()
    return {"salt": salt, "mac": mac_sparse(path, _key_of(salt, key))}


def _is_as_sealed(path: Path, sealed: Mapping[str, int | str], key: bytes) -> bool:
    if "sha256" in sealed:
        return digest_sparse(path) == sealed["sha256"]
    found = mac_sparse(path, _key_of(str(sealed["salt"]), key))
    return hmac.compare_digest(found, str(sealed["mac"]))


def _key_of(salt: str, key: bytes) -> bytes:
    """Return the key for one file, derived from the installation's."""
    return hmac.new(key, b"sandyard saved file\0" + salt.encode(), sha256).digest()[:16]


def _signature(content: Mapping[str, object], key: bytes) -> str:
    text = json.dumps(content, sort_keys=True).encode()
    return hmac.new(key, b"sandyard saved machine\0" + text, sha256).hexdigest()


def check_fit(about: About, *, versions: Sequence[str], host: str) -> None:
    """Return if a state can be restored with one of these versions of its driver on this host.

    Raises:
        IncompatibleError: it cannot; the message says what it needs.
    """
    if about.driver_version not in versions:
        raise IncompatibleError(
            f"cannot use what was saved: it needs {about.driver} {about.driver_version}, and here "
            f"is {', '.join(versions) or 'none'}; install that version, or keep it beside "
            "(node.kept_qemu_binaries), or restart the sandbox, which boots it from its disk"
        )
    if about.host != host:
        raise IncompatibleError(
            f"cannot use what was saved: it needs the processor it was saved on ({about.host}; "
            f"here it is {host}); a restart of the sandbox boots it from its disk"
        )


def needs_of(home: Path) -> Counter[tuple[str, str]]:
    """Return how many paused machines and snapshots need which version of which driver, as their
    manifests say; those that cannot be read are left out."""
    needs: Counter[tuple[str, str]] = Counter()
    for pattern in ("machines/*/*/saved", "snapshots/*"):
        for folder in home.glob(pattern):
            with suppress(OSError, ValueError, KeyError, TypeError):
                about = json.loads((folder / _MANIFEST).read_text())["about"]
                needs[str(about["driver"]), str(about["driver_version"])] += 1
    return needs


class Seals:
    """Seals saved machines with the installation's key, and knows which can be restored here.

    `host` names the kind of CPU.
    """

    def __init__(self, *, key: bytes, host: str, drivers: Drivers) -> None:
        self.host = host
        self._key = key
        self._drivers = drivers

    async def seal(
        self, folder: Path, about: About, *, belonging: Iterable[Path] = ()
    ) -> SavedMachine:
        """See `seal`."""
        return await in_thread(seal, folder, about, key=self._key, belonging=belonging)

    def load(self, folder: Path) -> SavedMachine:
        """See `load`."""
        return load(folder, key=self._key)

    async def check(self, saved: SavedMachine, *, whole: bool) -> None:
        """Return if a saved machine is unaltered and can be restored here.

        Raises:
            DamagedError: it is altered.
            IncompatibleError: it cannot.
        """
        versions = await self._drivers.versions_of(saved.about.driver)
        check_fit(saved.about, versions=versions, host=self.host)
        await in_thread(check, saved, whole=whole)
