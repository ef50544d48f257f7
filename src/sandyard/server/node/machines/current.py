"""The record of one machine: as it is now, and as it is on disk."""

import logging
from dataclasses import replace

from sandyard.server.core.codec import encode
from sandyard.server.core.contracts.node import MachineWish, Phase
from sandyard.server.core.egress import Policy
from sandyard.server.drivers.contract import End, Place
from sandyard.server.node.machines.body import Body
from sandyard.server.node.machines.records import Record, Records
from sandyard.server.tasks import in_thread

log = logging.getLogger(__name__)

_NOWHERE = -1


class CurrentRecord:
    """The only writer of a machine's record.

    The record on disk is written before anything is acquired, and removed after everything is
    released.
    """

    def __init__(self, record: Record, records: Records) -> None:
        self._record = record
        self._records = records

    @property
    def value(self) -> Record:
        """The record as it is now."""
        return self._record

    @property
    def phase(self) -> Phase:
        """The machine's phase."""
        return self._record.phase

    @property
    def body(self) -> Body:
        """The machine's files."""
        return Body(self._records.folder(self._record.id), self._record.body)

    # --- on disk --------------------------------------------------------------------------

    async def write(self) -> None:
        """Write the record; synced, if losing it in a crash of the host would matter."""
        syncs = self.phase not in (Phase.STARTING, Phase.WAITING)
        await in_thread(self._records.write, _on_disk(self._record), syncs=syncs)

    async def write_without_place(self) -> None:
        """Write the record of a paused machine whose process is about to end."""
        record = replace(self._record, slot=_NOWHERE, handle=None)
        await in_thread(self._records.write, record, syncs=True)

    async def enter(self, phase: Phase, end: End | None = None) -> None:
        """Change the phase, and write the record; on failure the phase is as before."""
        before = self._record
        self.set_phase(phase, end)
        try:
            await self.write()
        except OSError:  # memory says no more than the disk
            self.set_phase(before.phase, End(before.reason_code, before.reason_message))
            raise

    def mark(self, phase: Phase, end: End | None = None) -> None:
        """Change the phase, and write the record if that is possible; adoption corrects a stale
        one."""
        self.set_phase(phase, end)
        try:
            self._records.write(_on_disk(self._record))
        except OSError:
            log.exception("cannot write the record of a machine; its next change writes it again")

    async def remove(self) -> None:
        """Remove all of the machine's files, the record last."""
        await in_thread(self._records.remove, self._record.id)

    # --- in memory ------------------------------------------------------------------------

    def set_phase(self, phase: Phase, end: End | None) -> None:
        """Change the phase without writing it."""
        code, message = (end.code, end.message) if end else ("", "")
        self._record = self._record.with_phase(phase, code=code, message=message)

    def update(self, **changes: object) -> None:
        """Change fields that have no method of their own."""
        self._record = replace(self._record, **changes)  # type: ignore[arg-type]  # by name

    def count_as(self, incarnation: int) -> None:
        """Make this the machine of another incarnation of its sandbox."""
        self._record = replace(self._record, incarnation=incarnation)

    def note_version(self, version: int) -> None:
        """Note the latest version of the sandbox's row that a request was made with."""
        if version > self._record.version:
            self._record = replace(self._record, version=version)

    def use(self, policy: Policy) -> None:
        """Note what the sandbox may reach."""
        rules = None if policy.is_default else encode(policy)
        self._record = replace(self._record, rules=rules)

    def assign(self, wish: MachineWish) -> None:
        """Assign a machine of the pool to a sandbox."""
        self._record = replace(
            self._record,
            sandbox_id=wish.sandbox_id,
            incarnation=wish.incarnation,
            version=wish.version,
            phase=Phase.STARTING,
        )

    def take_place(self, place: Place, token: str) -> None:
        """Note the network slot of a process that is about to start, and its agent's token."""
        self._record = replace(self._record, slot=place.number, token=token, handle=None)

    def leave_place(self) -> None:
        """Note that the machine has neither process nor network slot."""
        self._record = replace(self._record, slot=_NOWHERE, handle=None)

    def begin_other_body(self, incarnation: int, disk_mib: int) -> Record:
        """Switch to a second body, whose start may fail. Return the previous record, for
        `go_back_to`. The record on disk is not changed until `enter`."""
        before = self._record
        name = f"body-{incarnation}"
        self._record = replace(
            before,
            incarnation=incarnation,
            mounted=None,  # the mounts of the snapshot's guest are not restored
            body=name if name != before.body else f"{name}-again",
            disk_mib=disk_mib,
        )
        return before

    def go_back_to(self, before: Record) -> None:
        """Return to the previous body and record; nothing of the second body may be open."""
        version = max(before.version, self._record.version)
        self._record = replace(before, slot=_NOWHERE, handle=None, version=version)


def _on_disk(record: Record) -> Record:
    """Return the record as it is written. `held` is not: each process decides that again, and an
    older version must be able to read the record."""
    return replace(record, phase=Phase.RUNNING) if record.phase is Phase.HELD else record
