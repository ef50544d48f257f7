"""The records of a node's machines, from which the next process adopts them.

    machines/<machine id>/resident.json   this record, readable by root alone

A record is written before the first resource is acquired, and removed after the last is released. A
machine has its own id, because it may have waited in the pool before a sandbox claimed it.
"""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Self

from sandyard.server.core.codec import decode
from sandyard.server.core.contracts.node import Phase
from sandyard.server.core.egress import NO_RULES, Policy
from sandyard.server.core.ids import is_machine_id
from sandyard.server.core.shapes import Shape
from sandyard.server.node.exports.shares import Share

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """One machine of a node, and the sandbox it serves, if any.

    `version` is the latest version of the sandbox's row that a request was made with. `mounted` is
    the share that its guest has mounted; if it `mounts_anew`, that was restored from a backup, and
    what its guest knows of it is out of date. `rules` are its network's, if it has any.

    `slot` is -1 while it has no place. `body` names the folder with what outlives its process. A
    running machine beside a published state has not run on from that state yet.
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
    mounted: Mapping[str, object] | None = None
    mounts_anew: bool = False
    rules: Mapping[str, object] | None = None
    version: int = 0
    reason_code: str = ""
    reason_message: str = ""

    @property
    def share(self) -> Share | None:
        """What it has mounted, if anything."""
        return None if self.mounted is None else decode(Share, self.mounted)

    @property
    def policy(self) -> Policy:
        """What its sandbox may reach."""
        return NO_RULES if self.rules is None else decode(Policy, self.rules)

    @property
    def shape(self) -> Shape:
        """Its shape."""
        return Shape(self.vcpus, self.memory_mib, self.disk_mib)

    def with_phase(self, phase: Phase, *, code: str = "", message: str = "") -> Self:
        """Return this record in another phase."""
        return replace(self, phase=phase, reason_code=code, reason_message=message)


class Records:
    """The records under one folder."""

    def __init__(self, machines_dir: Path) -> None:
        self.machines_dir = machines_dir
        self.unreadable: tuple[str, ...] = ()
        """The records that could not be read when all were read last."""

    def folder(self, machine_id: str) -> Path:
        """Return the folder of a machine's files."""
        if not is_machine_id(machine_id):
            raise AssertionError(f"not the id of a machine: {machine_id!r}")
        return self.machines_dir / machine_id

    def make_folder(self, machine_id: str) -> Path:
        """Make the folder of a machine's files. Other accounts may traverse it, but not list it."""
        folder = self.folder(machine_id)
        self.machines_dir.mkdir(mode=0o711, parents=True, exist_ok=True)
        folder.mkdir(mode=0o711, exist_ok=True)
        return folder

    def write(self, record: Record, *, syncs: bool = True) -> None:
        """Write a record atomically.

        Its content is synced, its name is not: after a crash of the host no machine lives, and a
        saved state is found without it. Without `syncs` the content is not synced either, for
        machines that nothing depends on: an empty record counts as none.
        """
        folder = self.make_folder(record.id)
        part = folder / "resident.json.part"
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            json.dump(asdict(record), file)
            file.flush()
            if syncs:
                os.fsync(file.fileno())
        part.replace(folder / "resident.json")

    def all(self) -> list[Record]:
        """Return all readable records; unreadable ones are logged and left alone."""
        found, unreadable = [], []
        for folder in self._folders():
            try:
                found.append(_record_of(json.loads((folder / "resident.json").read_text())))
            except FileNotFoundError:
                continue
            except (OSError, ValueError, TypeError, KeyError):
                log.exception("a machine's record cannot be read; its files are kept in %s", folder)
                unreadable.append(str(folder / "resident.json"))
        self.unreadable = tuple(unreadable)
        return found

    def sweep(self) -> None:
        """Remove folders without a record, which interrupted starts leave."""
        for folder in self._folders():
            record = folder / "resident.json"
            if not record.exists() or record.stat().st_size == 0:
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


def _record_of(values: Mapping[str, Any]) -> Record:
    """Return the record that was written. Earlier versions wrote `is_awake` instead of a phase, and
    later ones may write fields that are unknown here."""
    known = {one.name for one in fields(Record)}
    record = Record(**{name: value for name, value in values.items() if name in known})
    phase = Phase(record.phase)
    if phase is Phase.RUNNING and values.get("is_awake") is False:
        phase = Phase.WAKING
    return replace(record, phase=phase)
