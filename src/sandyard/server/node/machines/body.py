"""The files of one machine: the only place that knows their names.

    <folder>/body-<n>/     what outlives the machine's process: disk.ext4, memory, and saved/ while
                           the machine is paused
    <folder>/run/          sockets, owned by the machine's account
    <folder>/console.log   the end of the guest's console output

A saved state is published by one rename after all of it is synced. It is withdrawn before the
machine runs on, so a published state is never older than its disk. It is removed when the machine
is in use; until then it is reinstated if the machine fails before it has written to its disk. A
clone's state is not synced: if it is lost in a crash of the host, so is the request that needs it.
"""

import contextlib
import os
import shutil
from pathlib import Path

from sandyard.server.core.errors import DamagedError
from sandyard.server.drivers.contract import Place
from sandyard.server.drivers.sparse import link_or_copy
from sandyard.server.node.host.disks import Disks, used_mib
from sandyard.server.node.machines import saved as saving
from sandyard.server.node.machines.console import append_console
from sandyard.server.node.machines.saved import SavedMachine
from sandyard.server.tasks import in_thread


class Body:
    """The files of a machine: `folder` is the machine's, `name` the body in it."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.place = folder / name

    @property
    def disk(self) -> Path:
        """The machine's disk."""
        return self.place / "disk.ext4"

    @property
    def memory(self) -> Path:
        """The file from which its memory is loaded."""
        return self.place / "memory"

    @property
    def saved(self) -> Path:
        """Where the state of a paused machine is published."""
        return self.place / "saved"

    @property
    def saving(self) -> Path:
        """Where a state is written before it is published."""
        return self.place / "saved.part"

    @property
    def run(self) -> Path:
        """The folder of its sockets."""
        return self.folder / "run"

    @property
    def spent(self) -> Path:
        """Where a state is kept that was withdrawn."""
        return self.place / "spent"

    @property
    def is_saved(self) -> bool:
        """Whether a saved state is published."""
        return self.saved.is_dir()

    async def make(self, source: SavedMachine | None, disks: Disks, *, disk_mib: int) -> None:
        """Make the body: a clone of a saved machine, or an empty disk.

        Raises:
            NoCapacityError: the host's disk is full.
            DamagedError: the saved machine was altered.
        """
        part = self.place.with_name(self.place.name + ".part")
        await in_thread(_made_anew, part, self.place)
        inside = Body(self.folder, part.name)
        if source is None:
            await disks.make(inside.disk, size_mib=disk_mib, uid=os.geteuid())
        else:
            try:
                await in_thread(_clone, source, inside)
                await disks.copy(source.disk, inside.disk)
            except FileNotFoundError as error:
                raise DamagedError(f"cannot clone a saved machine: {error}") from error
        part.rename(self.place)

    async def remove(self) -> None:
        """Remove the body; the machine's folder remains."""
        await in_thread(shutil.rmtree, self.place, ignore_errors=True)

    def lend_to(self, place: Place) -> None:
        """Give the account of a place access, and recreate the folder of its sockets."""
        shutil.rmtree(self.run, ignore_errors=True)
        self.run.mkdir(mode=0o700)
        with contextlib.suppress(PermissionError):  # without root (fake machines) it is ours
            os.chown(self.run, place.uid, place.uid)
            # The account may use what is in the body, not change what the body consists of.
            os.chown(self.place, 0, place.uid)
            os.chown(self.disk, place.uid, place.uid)

    def take_back(self) -> None:
        """Take the files back from the machine's account, which another machine uses next."""
        for path in (self.place, self.disk):
            with contextlib.suppress(FileNotFoundError, PermissionError):
                os.chown(path, os.geteuid(), os.getegid(), follow_symlinks=False)

    async def publish(self) -> None:
        """Publish the state that was written."""
        await in_thread(saving.publish, self.saving, self.saved)

    async def drop_unpublished(self) -> None:
        """Remove a state that was being written."""
        await in_thread(shutil.rmtree, self.saving, ignore_errors=True)

    async def withdraw(self) -> None:
        """Withdraw the saved state, if there is one, because the machine is about to run on."""
        await in_thread(saving.withdraw, self.saved, self.spent)

    async def reinstate(self) -> None:
        """Publish the state that was withdrawn again; the machine must not run."""
        await in_thread(saving.publish, self.spent, self.saved)

    async def remove_spent(self) -> None:
        """Remove what was withdrawn."""
        await in_thread(shutil.rmtree, self.spent, ignore_errors=True)

    async def forget_memory(self) -> None:
        """Remove memory and saved state: the machine will boot from its disk."""
        await self.withdraw()
        await self.remove_spent()
        self.memory.unlink(missing_ok=True)

    async def tidy(self, *, keeps_spent: bool = False) -> None:
        """Remove what interrupted work left; `keeps_spent` if the machine has not been woken."""
        left = [one for one in self.folder.glob("body-*") if one != self.place]
        left += [self.saving] if keeps_spent else [self.saving, self.spent]
        for one in left:
            await in_thread(shutil.rmtree, one, ignore_errors=True)

    def append_console(self, output: bytes) -> None:
        """Append console output, of which only the end is kept."""
        append_console(self.folder, output)

    @property
    def used_mib(self) -> int:
        """The disk space that the files use, without what they share with others.

        A hypervisor may keep saved pages beside its sockets, and a hard link of the disk there.
        """
        if not self.place.is_dir():
            return 0
        found = used_mib(self.place) + saving.size_of(self.run) // 2**20
        with contextlib.suppress(FileNotFoundError):
            disk = self.disk.stat()
            found += disk.st_blocks * 512 // 2**20 if disk.st_nlink > 1 else 0
        return found

    @property
    def size_bytes(self) -> int:
        """The same in bytes, folders included."""
        return saving.size_of(self.place)


def _made_anew(folder: Path, *others: Path) -> None:
    """Make an empty folder, after removing it and `others`, which an earlier attempt may have
    left."""
    for left in (*others, folder):
        shutil.rmtree(left, ignore_errors=True)
    folder.mkdir(mode=0o710)


def _clone(source: SavedMachine, body: Body) -> None:
    """Clone a saved machine's memory and state; the disk is copied separately."""
    saving.check(source, whole=False)
    link_or_copy(source.state.memory, body.memory)
    saving.copy_state(source.state, body.saved)
