"""The private disk of a machine: a sparse ext4 that holds what differs from the base image."""

import os
import tempfile
from pathlib import Path
from typing import Protocol

from sandyard.server.core.errors import InternalError, NoCapacityError
from sandyard.server.node.commands import run

_TOOL_LIMIT_S = 60.0


class Disks(Protocol):
    """Makes disks."""

    async def make(self, path: Path, *, size_mib: int, token: str, uid: int) -> None:
        """Make a disk that only an account may open, with the agent's first token in it.

        Raises:
            NoCapacityError: the host's disk is full.
        """
        ...


class Ext4Disks:
    """See Disks. The file is sparse: it takes what the guest writes, not what it was promised."""

    async def make(self, path: Path, *, size_mib: int, token: str, uid: int) -> None:
        """See Disks.make."""
        with tempfile.TemporaryDirectory(prefix=".disk-", dir=path.parent) as work:
            for name in ("upper", "work", "sandyard"):
                (Path(work) / name).mkdir(mode=0o755)
            (Path(work) / "sandyard").chmod(0o700)
            secret = Path(work) / "sandyard" / "token"
            secret.touch(mode=0o600)
            secret.write_text(token)
            try:
                # A journal, so that the disk of a machine that was killed boots again.
                await run(
                    ["mke2fs", "-q", "-t", "ext4", "-m", "0", "-L", "disk", "-J", "size=16",
                     "-E", "lazy_itable_init=1,lazy_journal_init=1,root_owner=0:0",
                     "-d", work, path, f"{size_mib}M"],
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


def free_mib(folder: Path) -> int:
    """Return how much room the file system of a folder has."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize // 2**20


def available_memory_mib() -> int:
    """Return how much memory the host can still give without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) // 1024
    return 0
