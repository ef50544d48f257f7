"""Where the files of workspaces lie: one bounded file system, or folder, each."""

from collections.abc import Collection
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class VolumeUse:
    """How much is in a volume, how much it may hold, and how much the disk below it still takes,
    in bytes."""

    used_bytes: int
    quota_bytes: int
    host_bytes: int


class Volumes(Protocol):
    """The volumes of this installation's workspaces, by the workspace's id.

    The implementation enforces a volume's size, whichever process writes into it.
    """

    def open(self, workspace_id: str, quota_bytes: int) -> AbstractAsyncContextManager[Path]:
        """Return the folder of a volume for as long as the block lasts; it is made if it is not
        there.

        Raises:
            UnavailableError: it cannot be had now.
        """
        ...

    async def use_of(self, workspace_id: str, quota_bytes: int) -> VolumeUse:
        """Return how much is in a volume; nothing, if it was not made yet.

        What is left of the host's disk does not count what is kept free there for its machines.

        Raises:
            UnavailableError: it cannot be told now.
        """
        ...

    async def stuck(self, workspace_ids: Collection[str]) -> list[str]:
        """Return those whose volume takes no more writes, and would again if all let go of it.

        So it is when the disk below was full, and is not any more. Whoever opens one first after
        all who had it open have closed it has it mended.
        """
        ...

    async def remove(self, workspace_id: str) -> None:
        """Remove a volume with all that is in it; nothing if there is none.

        Raises:
            UnavailableError: it is in use, or would not go.
        """
        ...

    async def rest(self) -> None:
        """Let go of volumes that nobody has opened for a while."""
        ...
