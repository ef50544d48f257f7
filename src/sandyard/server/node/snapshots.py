"""The snapshots that a node keeps: a folder for each, named by its id."""

import shutil
from contextlib import suppress
from pathlib import Path

from sandyard.server.core.contracts.node import MachineWish, SnapshotFact
from sandyard.server.core.errors import NotFoundError, SandyardError
from sandyard.server.core.ids import is_uuid
from sandyard.server.node.machines import saved as saving
from sandyard.server.node.machines.saved import SavedMachine, Seals
from sandyard.server.tasks import in_thread


class KeptSnapshots:
    """The snapshots under one folder."""

    def __init__(self, root: Path, seals: Seals) -> None:
        self._root = root
        self._seals = seals

    def ids(self) -> list[str]:
        """Return the ids of all snapshots."""
        if not self._root.is_dir():
            return []
        return [path.name for path in self._root.iterdir() if is_uuid(path.name)]

    def folder(self, snapshot_id: str) -> Path:
        """Return the folder of a snapshot, which exists once it is complete."""
        if not is_uuid(snapshot_id):
            raise AssertionError(f"not the id of a snapshot: {snapshot_id!r}")
        return self._root / snapshot_id

    def fact(self, snapshot_id: str) -> SnapshotFact:
        """Return what is reported of a snapshot.

        Raises: see `checked`.
        """
        saved = self._load(snapshot_id)
        about = saved.about
        return SnapshotFact(snapshot_id, saved.size_bytes, about.template, about.os, about.shape)

    def images(self) -> set[str]:
        """Return the digests of the images that snapshots need."""
        found = set()
        for snapshot_id in self.ids():
            with suppress(SandyardError):
                found.add(self._load(snapshot_id).about.image)
        return found

    async def checked(self, wish: MachineWish) -> SavedMachine:
        """Return the snapshot that a request names.

        Raises:
            NotFoundError: it is not on this node.
            DamagedError: it was altered, or cannot be used here.
        """
        if wish.snapshot_id is None:
            raise NotFoundError("cannot start from a snapshot: none was named")
        source = self._load(wish.snapshot_id)
        await self._seals.check(source, whole=False)
        return source

    async def remove(self, snapshot_id: str) -> None:
        """Remove a snapshot, and what an unfinished attempt left of it."""
        folder = self.folder(snapshot_id)
        await in_thread(saving.remove, folder, folder.with_name(f"{folder.name}.part"))

    def sweep(self) -> None:
        """Remove unfinished snapshots."""
        for part in self._root.glob("*.part") if self._root.is_dir() else ():
            shutil.rmtree(part, ignore_errors=True)

    def _load(self, snapshot_id: str) -> SavedMachine:
        folder = self.folder(snapshot_id)
        if not folder.is_dir():
            raise NotFoundError(f"cannot find the snapshot {snapshot_id} on this node")
        return self._seals.load(folder)
