"""The private disk of a machine: a sparse ext4 image with the differences from the base image."""

import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

from typing_extensions import override

from sandyard.server.core.errors import InternalError, NoCapacityError
from sandyard.server.drivers.sparse import copy_sparse
from sandyard.server.node.commands import run
from sandyard.server.tasks import in_thread

_TOOL_LIMIT_S = 60.0
_LARGE_MIB = 4096


class Disks(Protocol):
    """Creates disks."""

    async def make(self, path: Path, *, size_mib: int, uid: int) -> None:
        """Create an empty disk that only one account may open.

        Raises:
            NoCapacityError: the host's disk is full.
        """
        ...

    async def copy(self, source: Path, path: Path) -> None:
        """Copy a disk that is not being written to.

        Raises:
            NoCapacityError: the host's disk is full.
        """
        ...


class Ext4Disks(Disks):
    """See Disks. The file is sparse: it takes what the guest writes, not what it was promised."""

    @override
    async def make(self, path: Path, *, size_mib: int, uid: int) -> None:
        # To grow a disk takes a transaction of a size that the journal must hold: with 16 MiB no
        # disk of 10 GB grew by one. It is sparse, and takes what is written.
        journal = 64 if size_mib >= _LARGE_MIB else 32
        try:
            # A journal, so that the disk of a machine that was killed boots again.
            await run(
                ["mke2fs", "-q", "-t", "ext4", "-m", "0", "-L", "disk", "-J", f"size={journal}",
                 "-E", "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0",
                 path, f"{size_mib}M"],
                limit_s=_TOOL_LIMIT_S,
            )  # fmt: skip
        except InternalError as error:
            path.unlink(missing_ok=True)
            if "No space left" in error.message:
                raise NoCapacityError(
                    "cannot make a disk: the host's disk is full; free some space"
                ) from error
            raise
        path.chmod(0o600)
        os.chown(path, uid, uid)

    @override
    async def copy(self, source: Path, path: Path) -> None:
        await in_thread(copy_sparse, source, path)


def free_mib(folder: Path) -> int:
    """Return the free space of the file system of a folder."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize // 2**20


def free_files(folder: Path) -> int | None:
    """Return how many more files the file system of a folder takes; None if it has no limit."""
    found = os.statvfs(folder)
    return found.f_favail if found.f_files else None


FILES_FLOOR: Final = 1000
"""Files that must be free: a machine takes some ten, and its sandbox's logs and state some more."""


def lacks_files(folder: Path) -> str | None:
    """Return a sentence if the file system of a folder takes hardly any more files."""
    left = free_files(folder)
    if left is None or left >= FILES_FLOOR:
        return None
    return f"the host's disk takes only {left} more files under {folder}: its inodes are used up"


def available_memory_mib() -> int:
    """Return how much memory the host can provide without swapping."""
    return _memory_mib("MemAvailable:")


def total_memory_mib() -> int:
    """Return the host's total memory."""
    return _memory_mib("MemTotal:")


def used_mib(folder: Path) -> int:
    """Return the disk usage of the files in a folder, without blocks shared by hard links."""
    blocks = 0
    with suppress(FileNotFoundError):  # a file that disappears meanwhile uses nothing
        for path in folder.iterdir():
            with suppress(FileNotFoundError):
                found = path.stat()
                is_own = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
                blocks += found.st_blocks if is_own else 0
    return blocks * 512 // 2**20


def _memory_mib(name: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) // 1024
    return 0
