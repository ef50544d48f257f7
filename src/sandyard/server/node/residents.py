"""What a node wrote down about its machines, so that the next process finds them.

    machines/<sandbox id>/resident.json   this record, readable by root alone
    machines/<sandbox id>/disk.ext4       the machine's private disk
    machines/<sandbox id>/run/            sockets, owned by the machine's account
    machines/<sandbox id>/console.log     the last of what the guest printed

A record is there before the first resource is taken and goes after the last is given back.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Self

from sandyard.server.core.ids import is_sandbox_id

log = logging.getLogger(__name__)


class Phase(StrEnum):
    """How far a machine has come."""

    STARTING = "starting"
    RUNNING = "running"
    DEAD = "dead"


@dataclass(frozen=True)
class Resident:
    """One machine of a node."""

    sandbox_id: str
    incarnation: int
    phase: Phase
    slot: int
    template: str
    image: str
    driver: str
    os: str
    token: str
    handle: Mapping[str, str | int] | None = None
    reason_code: str = ""
    reason_message: str = ""

    def with_phase(self, phase: Phase, *, code: str = "", message: str = "") -> Self:
        """Return this record in another phase."""
        return replace(self, phase=phase, reason_code=code, reason_message=message)


class Residents:
    """The records under one folder."""

    def __init__(self, machines_dir: Path) -> None:
        self.machines_dir = machines_dir

    def folder(self, sandbox_id: str) -> Path:
        """Return the folder of a machine's files."""
        if not is_sandbox_id(sandbox_id):
            raise AssertionError(f"not the id of a sandbox: {sandbox_id!r}")
        return self.machines_dir / sandbox_id

    def make_folder(self, sandbox_id: str) -> Path:
        """Make the folder of a machine's files; others may pass through it, not look into it."""
        folder = self.folder(sandbox_id)
        self.machines_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        folder.mkdir(mode=0o711, exist_ok=True)
        return folder

    def write(self, resident: Resident) -> None:
        """Write a record, whole or not at all, and have it on disk before returning."""
        folder = self.make_folder(resident.sandbox_id)
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

    def remove(self, sandbox_id: str) -> None:
        """Remove a machine's files, the record last."""
        folder = self.folder(sandbox_id)
        for entry in folder.iterdir() if folder.is_dir() else ():
            if entry.is_dir():
                shutil.rmtree(entry)
            elif entry.name != "resident.json":
                entry.unlink(missing_ok=True)
        (folder / "resident.json").unlink(missing_ok=True)
        if folder.is_dir():
            folder.rmdir()
