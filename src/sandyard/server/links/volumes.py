"""Volumes on this host: file systems in image files, or plain folders."""

import asyncio
import contextlib
import errno
import fcntl
import logging
import os
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from pathlib import Path

from typing_extensions import override

from sandyard.server.core.contracts.volumes import Volumes, VolumeUse
from sandyard.server.core.errors import NotFoundError, UnavailableError
from sandyard.server.tasks import in_thread

log = logging.getLogger(__name__)

_LIMIT_S = 60.0
_RELEASE_S, _CHECK_S = 10.0, 600.0
_IDLE_S = 600.0
# Only the owner by number: the default template's user, who works in /workspace.
_OWNER = 1000
_MODE = 0o2775
_JOURNAL_MIB = 16
_MENDABLE_BYTES = 64 * 2**20
_DELETED = "cannot find the workspace: it was deleted"


class ImageVolumes(Volumes):
    """Each volume is an ext4 file system in a sparse file, mounted while it is in use.

    The kernel therefore enforces the size of a volume exactly for all writers, its usage is known
    at once, and device files and setuid programs in it have no effect. See docs/decisions.
    """

    def __init__(
        self,
        folder: Path,
        *,
        floor_bytes: int = 0,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._monotonic = monotonic
        self._folder = folder.resolve()  # what is mounted is known by its path without links
        self._floor_bytes = floor_bytes
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: Counter[str] = Counter()
        self._used_at: dict[str, float] = {}
        self._gone: set[str] = set()
        self._stuck: set[str] = set()

    @contextlib.asynccontextmanager
    @override
    async def open(self, workspace_id: str, quota_bytes: int) -> AsyncIterator[Path]:
        async with self._locked(workspace_id), _typed_errors():
            if workspace_id in self._gone:
                raise NotFoundError(_DELETED)
            await in_thread(self._mount, workspace_id, quota_bytes)
            self._users[workspace_id] += 1
        try:
            yield self._place(workspace_id)
        finally:
            self._users[workspace_id] -= 1
            self._used_at[workspace_id] = self._monotonic()

    @override
    async def use_of(self, workspace_id: str, quota_bytes: int) -> VolumeUse:
        async with self._locked(workspace_id), _typed_errors():
            left = await in_thread(_left, self._folder, self._floor_bytes)
            if workspace_id in self._gone or not self._image(workspace_id).exists():
                return VolumeUse(0, quota_bytes, left)
            await in_thread(self._mount, workspace_id, quota_bytes)
            found = await in_thread(os.statvfs, self._place(workspace_id))
        used = (found.f_blocks - found.f_bfree) * found.f_frsize - self._base(workspace_id)
        return VolumeUse(max(0, used), quota_bytes, left)

    @override
    async def stuck(self, workspace_ids: Collection[str]) -> list[str]:
        async with _typed_errors():
            # Another user, a download say, would prevent the repair.
            free = [one for one in workspace_ids if self._users[one] <= 1]
            found = [one for one in free if await in_thread(_is_stuck, self._place(one))]
            if not found or await in_thread(_left, self._folder, 0) < _MENDABLE_BYTES:
                return []
        self._stuck.update(found)
        return found

    def _is_to_be_mended(self, workspace_id: str) -> bool:
        """Tell, without disk access, whether a volume is known to need a repair."""
        is_known = workspace_id in self._stuck or _shows_that_it_is_stuck(self._place(workspace_id))
        return is_known and _left(self._folder, 0) >= _MENDABLE_BYTES

    @override
    async def remove(self, workspace_id: str) -> None:
        async with self._locked(workspace_id), _typed_errors():
            if self._users[workspace_id]:
                raise UnavailableError("cannot remove the workspace now: its files are in use")
            await in_thread(self._unmount, workspace_id)
            # A request that found it before it was removed must not create it again.
            self._gone.add(workspace_id)
            self._stuck.discard(workspace_id)
            await in_thread(_remove_tree, self._place(workspace_id))
            for one in (self._image(workspace_id), self._base_file(workspace_id)):
                await in_thread(one.unlink, missing_ok=True)
        self._used_at.pop(workspace_id, None)

    @override
    async def rest(self, *, idle_s: float = _IDLE_S) -> None:
        until = self._monotonic() - idle_s
        try:
            mounted = [one.name for one in self._folder.iterdir() if one.is_mount()]
        except OSError:  # nothing was made yet
            return
        for workspace_id in mounted:
            if self._used_at.setdefault(workspace_id, self._monotonic()) > until:
                continue
            async with self._locked(workspace_id):
                # Another process on the host may have it open.
                with contextlib.suppress(UnavailableError, OSError):
                    if not self._users[workspace_id]:
                        await in_thread(self._unmount, workspace_id)

    async def close(self) -> None:
        """Unmount the volumes that are not in use; their data is kept."""
        self._used_at = dict.fromkeys(self._used_at, float("-inf"))
        await self.rest(idle_s=-1.0)

    def _locked(self, workspace_id: str) -> asyncio.Lock:
        return self._locks.setdefault(workspace_id, asyncio.Lock())

    def _image(self, workspace_id: str) -> Path:
        return self._folder / f"{workspace_id}.ext4"

    def _place(self, workspace_id: str) -> Path:
        return self._folder / workspace_id

    def _mount(self, workspace_id: str, quota_bytes: int) -> None:
        place, image = self._place(workspace_id), self._image(workspace_id)
        if place.is_mount():
            if not self._is_to_be_mended(workspace_id):
                return
            # The host's disk was full: the file system has let go of what it could not keep.
            if self._users[workspace_id]:
                raise UnavailableError(
                    "cannot write to the workspace now: the host's disk was full, and its files "
                    "are being read; try again"
                )
            self._stuck.add(workspace_id)
            _run("umount", str(place))
        if workspace_id in self._stuck:
            # While another mount namespace holds it, mounting it again would only return the same
            # read-only file system, unchecked.
            _await_released(image)
            self._stuck.discard(workspace_id)
        self._folder.mkdir(mode=0o700, exist_ok=True)
        place.mkdir(mode=0o700, exist_ok=True)
        if not image.exists():
            if any(place.iterdir()):
                raise UnavailableError(
                    "cannot open the workspace: its files lie in a plain directory; the operator "
                    'must set workspaces.volumes to "folders", or move them away'
                )
            self._make(image, quota_bytes)
        try:
            with _alone_with(image):
                if place.is_mount():  # by another process: a backup
                    return
                if not _is_attached(image):
                    # Always: a check that failed, or was broken off, is not forgotten.
                    _run("e2fsck", "-p", str(image), fine=(0, 1), limit_s=_CHECK_S)
                _run(
                    "mount", "-t", "ext4",
                    "-o", "loop,nosuid,nodev,noatime,discard,errors=remount-ro",
                    str(image), str(place),
                )  # fmt: skip
        except UnavailableError as error:
            raise UnavailableError(
                f"{error.message}; where nothing can be mounted, whoever runs the server sets "
                'workspaces.volumes to "folders"'
            ) from error
        _hand_over(place)
        with contextlib.suppress(OSError):  # e2fsck makes it when it needs it
            (place / "lost+found").rmdir()
            if not self._base_file(workspace_id).exists():
                found = os.statvfs(place)
                taken = (found.f_blocks - found.f_bfree) * found.f_frsize
                self._base_file(workspace_id).write_text(str(taken))

    def _base(self, workspace_id: str) -> int:
        """Return the space that an empty file system uses, which is not counted for its owner."""
        try:
            return int(self._base_file(workspace_id).read_text())
        except (FileNotFoundError, ValueError):  # the server ended before it was written
            return 0

    def _base_file(self, workspace_id: str) -> Path:
        return self._folder / f"{workspace_id}.base"

    def _make(self, image: Path, quota_bytes: int) -> None:
        passing = image.with_suffix(".part")
        try:
            with passing.open("wb") as file:
                file.truncate(quota_bytes + _own_bytes(quota_bytes))
            _run(
                "mke2fs", "-q", "-F", "-t", "ext4", "-m", "0", "-J", f"size={_JOURNAL_MIB}",
                "-b", "4096", "-i", str(_bytes_a_file(quota_bytes)), "-O", "^resize_inode", "-E",
                f"lazy_itable_init=1,nodiscard,root_owner={_OWNER}:{_OWNER}", str(passing),
            )  # fmt: skip
            passing.chmod(0o600)
            passing.rename(image)
        finally:
            passing.unlink(missing_ok=True)

    def _unmount(self, workspace_id: str) -> None:
        place = self._place(workspace_id)
        if place.is_mount():
            _run("umount", str(place))
        with contextlib.suppress(OSError):  # files were put into it while it was not mounted
            place.rmdir()


@contextlib.contextmanager
def _alone_with(image: Path) -> Iterator[None]:
    """Keep other processes on this host from checking and mounting a file system meanwhile."""
    descriptor = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _own_bytes(quota_bytes: int) -> int:
    """Return the space that a file system needs for itself and that is added to the volume's size:
    the journal, the inodes (256 bytes each), bitmaps, and the blocks that ext4 reserves."""
    kept_back = min(quota_bytes // 50, 16 * 2**20)
    inodes = quota_bytes * 256 // _bytes_a_file(quota_bytes)
    return (_JOURNAL_MIB + 4) * 2**20 + inodes + quota_bytes // 200 + kept_back


def _bytes_a_file(quota_bytes: int) -> int:
    """Return the bytes per inode, so that a small volume can be full of small files and a large one
    still has a million inodes."""
    if quota_bytes <= 4 * 2**30:
        return 4096
    return 8192 if quota_bytes <= 16 * 2**30 else 16_384


def _await_released(image: Path) -> None:
    """Return once a file system is not mounted in any mount namespace of the host."""
    until = time.monotonic() + _RELEASE_S
    while _is_attached(image):
        if time.monotonic() > until:
            raise UnavailableError("cannot repair the workspace's volume now: it is still in use")
        time.sleep(0.05)


def _is_attached(image: Path) -> bool:
    """Tell whether an image is attached to a loop device, as it is while mounted anywhere."""
    attached = Path("/sys/block").glob("loop*/loop/backing_file")
    return any(_read(one) == str(image) for one in attached)


def _read(file: Path) -> str:
    try:
        return file.read_text().strip()
    except OSError:  # it went meanwhile
        return ""


def _shows_that_it_is_stuck(place: Path) -> bool:
    """Tell whether a file system became read-only after a failed write; not all kernels show it
    (6.12 does not)."""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        if words[4] == str(place):
            return not {"ro", "emergency_ro"}.isdisjoint(words[-1].split(","))
    return False


def _is_stuck(place: Path) -> bool:
    """Tell whether a file system is stuck, on any kernel, by syncing it; waits for earlier
    writes."""
    try:
        root = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return False
    try:
        os.fsync(root)
    except OSError as error:
        return error.errno in (errno.EIO, errno.EROFS)
    finally:
        os.close(root)
    return False


class FolderVolumes(Volumes):
    """Each volume is a plain folder, for mounts shared by several servers and hosts that cannot
    mount images. The size of a volume is checked when data is written through the API."""

    def __init__(self, folder: Path, *, floor_bytes: int = 0) -> None:
        self._folder = folder
        self._floor_bytes = floor_bytes
        self._gone: set[str] = set()

    @contextlib.asynccontextmanager
    @override
    async def open(self, workspace_id: str, quota_bytes: int) -> AsyncIterator[Path]:
        del quota_bytes
        place = self._folder / workspace_id
        if workspace_id in self._gone:
            raise NotFoundError(_DELETED)
        async with _typed_errors():
            await in_thread(_made, place)
        yield place

    @override
    async def use_of(self, workspace_id: str, quota_bytes: int) -> VolumeUse:
        async with _typed_errors():
            used = await in_thread(_taken, self._folder / workspace_id)
            left = await in_thread(_left, self._folder, self._floor_bytes)
        return VolumeUse(used, quota_bytes, left)

    @override
    async def stuck(self, workspace_ids: Collection[str]) -> list[str]:
        """Return none: a plain folder is never stuck."""
        del workspace_ids
        return []

    @override
    async def remove(self, workspace_id: str) -> None:
        self._gone.add(workspace_id)
        async with _typed_errors():
            await in_thread(_remove_tree, self._folder / workspace_id)

    @override
    async def rest(self) -> None:
        """Do nothing: no file is held open."""

    async def close(self) -> None:
        """Does nothing: nothing is held open."""


@contextlib.asynccontextmanager
async def _typed_errors() -> AsyncIterator[None]:
    try:
        yield
    except OSError as error:
        raise UnavailableError(f"cannot reach a workspace's volume: {error}") from error


def _made(place: Path) -> None:
    place.parent.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        place.mkdir()
        _hand_over(place)


def _hand_over(place: Path) -> None:
    with contextlib.suppress(PermissionError):
        os.chown(place, _OWNER, _OWNER)
    place.chmod(_MODE)


def _left(folder: Path, floor_bytes: int) -> int:
    """Return the free space of the disk on which a folder is, or will be."""
    while not folder.exists():
        folder = folder.parent
    found = os.statvfs(folder)
    return max(0, found.f_bavail * found.f_frsize - floor_bytes)


def _taken(place: Path) -> int:
    """Return the disk usage of a folder in bytes, whatever its depth and contents."""
    if not place.exists():
        return 0
    # Of its own accord it follows no link; what goes meanwhile makes it exit with 1.
    output = _run(
        "du", "--summarize", "--one-file-system", "--block-size=1", str(place), fine=(0, 1)
    )
    return int(output.split()[0]) if output else 0  # it went meanwhile


def _remove_tree(place: Path) -> None:
    """Remove a folder if it exists, whatever its depth and contents."""
    _run("rm", "--recursive", "--force", "--one-file-system", "--", str(place))


def _run(*command: str, fine: Collection[int] = (0,), limit_s: float = _LIMIT_S) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=limit_s, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UnavailableError(f"cannot run {command[0]}: {error}") from error
    if done.returncode not in fine:
        log.error("%s failed: %s", command[0], done.stderr.strip())
        raise UnavailableError(f"cannot {command[0]} a workspace's volume: {done.stderr.strip()}")
    return done.stdout
