"""What a node wrote down about its machines, so that the next process finds them.

    machines/<machine id>/resident.json   this record, readable by root alone
    machines/<machine id>/body-<n>/       disk.ext4, memory, and, while it stands still, saved/
    machines/<machine id>/run/            sockets, owned by the machine's account
    machines/<machine id>/console.log     the last of what the guest printed

A record is there before the first resource is taken and goes after the last is given back. A
machine has an id of its own: it may have waited before a sandbox took it.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Self

from sandyard.server.core.ids import is_machine_id

log = logging.getLogger(__name__)


class Phase(StrEnum):
    """How far a machine has come."""

    STARTING = "starting"  # for the first time: nothing of it is worth keeping yet
    WAITING = "waiting"  # runs, for whoever wants one like it
    RUNNING = "running"
    PAUSED = "paused"
    DEAD = "dead"


@dataclass(frozen=True)
class Resident:
    """One machine of a node, and the sandbox it serves, if it serves one.

    `slot` is -1 while it has no place. `body` is the folder with what outlives its process. One
    that is not `is_awake` was restored, and what makes it fit to be used has not been done.
    """

    id: str
    sandbox_id: str
    incarnation: int
    phase: Phase
    slot: int
    template: str
    image: str
    driver: str
    os: str
    vcpus: int
    memory_mib: int
    disk_mib: int
    token: str = field(repr=False)
    body: str = "body-1"
    handle: Mapping[str, str | int] | None = None
    is_awake: bool = True
    reason_code: str = ""
    reason_message: str = ""

    def with_phase(self, phase: Phase, *, code: str = "", message: str = "") -> Self:
        """Return this record in another phase."""
        return replace(self, phase=phase, reason_code=code, reason_message=message)


class Residents:
    """The records under one folder."""

    def __init__(self, machines_dir: Path) -> None:
        self.machines_dir = machines_dir

    def folder(self, machine_id: str) -> Path:
        """Return the folder of a machine's files."""
        if not is_machine_id(machine_id):
            raise AssertionError(f"not the id of a machine: {machine_id!r}")
        return self.machines_dir / machine_id

    def make_folder(self, machine_id: str) -> Path:
        """Make the folder of a machine's files; others may pass through it, not look into it."""
        folder = self.folder(machine_id)
        self.machines_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        folder.mkdir(mode=0o711, exist_ok=True)
        return folder

    def write(self, resident: Resident) -> None:
        """Write a record, whole or not at all.

        What is in it is synced, its name is not: after the host's own end no machine lives, and a
        state that was saved is found without it.
        """
        folder = self.make_folder(resident.id)
        part = folder / "resident.json.part"
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(resident), file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(folder / "resident.json")

    def all(self) -> list[Resident]:
        """Return every record that can be read; what cannot be is left alone and logged."""
        found = []
        for folder in self._folders():
            try:
                record = json.loads((folder / "resident.json").read_text())
                found.append(Resident(**{**record, "phase": Phase(record["phase"])}))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError, KeyError):
                log.exception("a machine's record cannot be read; its files are kept in %s", folder)
        return found

    def sweep(self) -> None:
        """Remove folders without a record: a start that was broken off left them."""
        for folder in self._folders():
            if not (folder / "resident.json").exists():
                shutil.rmtree(folder, ignore_errors=True)

    def _folders(self) -> list[Path]:
        return list(self.machines_dir.iterdir()) if self.machines_dir.is_dir() else []

    def remove(self, machine_id: str) -> None:
        """Remove a machine's files, the record last."""
        folder = self.folder(machine_id)
        for entry in folder.iterdir() if folder.is_dir() else ():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "resident.json":
                entry.unlink(missing_ok=True)
        (folder / "resident.json").unlink(missing_ok=True)
        if folder.is_dir():
            folder.rmdir()
