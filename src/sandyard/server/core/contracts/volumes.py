"""Storage for workspaces: one file system of limited size, or directory, for each."""

from collections.abc import Collection
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class VolumeUse:
    """The used and total size of a volume, and the free space on the disk below it, in bytes."""

    used_bytes: int
    quota_bytes: int
    host_bytes: int


class Volumes(Protocol):
    """The volumes of this installation's workspaces, by the workspace's id.

    The implementation enforces a volume's size, whichever process writes into it.
    """

    def open(self, workspace_id: str, quota_bytes: int) -> AbstractAsyncContextManager[Path]:
        """Return the directory of a volume for the duration of the block; it is created if
        necessary.

        Raises:
            UnavailableError: it cannot be opened now.
        """
        ...

    async def use_of(self, workspace_id: str, quota_bytes: int) -> VolumeUse:
        """Return a volume's usage; zero if it was not created yet.

        Free space on the host does not include what is reserved for machines.

        Raises:
            UnavailableError: it cannot be read now.
        """
        ...

    async def stuck(self, workspace_ids: Collection[str]) -> list[str]:
        """Return the ids of volumes that accept no more writes because the host's disk was full,
        and that can be repaired now. Once all users have closed one, the next to open it repairs
        it."""
        ...

    async def remove(self, workspace_id: str) -> None:
        """Remove a volume and its content; does nothing if there is none.

        Raises:
            UnavailableError: it is in use, or cannot be removed.
        """
        ...

    async def rest(self) -> None:
        """Close volumes that were not opened recently."""
        ...
