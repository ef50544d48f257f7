"""Adopts the machines that an earlier server recorded."""

import logging

from sandyard.server.core.contracts.node import Phase
from sandyard.server.core.errors import SandyardError
from sandyard.server.drivers.contract import End
from sandyard.server.drivers.processes import boot_id
from sandyard.server.node.machines.means import Means
from sandyard.server.node.machines.records import Record
from sandyard.server.node.machines.resident import Resident

log = logging.getLogger(__name__)

DAMAGED = "saved_state_unusable"
_LOST = End("machine_lost", "the host was restarted under the machine")
_DIED_UNSEEN = End("machine_died", "the machine ended while the server was not running")
_FLEETING = frozenset({Phase.STARTING, Phase.WAITING})


async def adopted(record: Record, means: Means) -> Resident | None:
    """Return a recorded machine: running ones continue, paused and dead ones are kept.

    Return None for one that is not kept: a machine that was being started, because the request is
    gone and is repeated if it is still wanted, and one that waited in the pool.
    """
    if record.phase in _FLEETING:
        return None
    found = Resident(record, means)
    if found.is_saved and found.phase is not Phase.DEAD:
        # If it has a process, that has not run since it was saved.
        await _end_what_is_left(found)
        await found.process.note_gone(Phase.PAUSED)
    elif found.phase is Phase.PAUSED:
        end = End(DAMAGED, "the saved state is gone")
        await found.process.note_gone(Phase.DEAD, end)
    elif found.phase is Phase.DEAD:
        # It may have been restarting, or its process may not have been released yet.
        await _end_what_is_left(found)
        end = End(record.reason_code, record.reason_message)
        await found.process.note_gone(Phase.DEAD, end)
    elif not await found.process.recover():
        if found.phase is Phase.WAKING and await found.saving.reinstate():
            await found.process.note_gone(Phase.PAUSED)
        else:
            await found.process.note_gone(Phase.DEAD, _how_it_ended(record, means))
    return found


async def _end_what_is_left(found: Resident) -> None:
    """End a process that is no longer needed. If the kernel does not let it end, say because its
    storage does not respond, it is killed, and other machines are adopted nevertheless."""
    if await found.process.recover():
        try:
            await found.end()
        except (SandyardError, OSError):
            log.exception("the process of a paused or dead machine does not end")


def _how_it_ended(record: Record, means: Means) -> End:
    if means.drivers.named(record.driver) is None:
        return End("driver_missing", f"no driver {record.driver} is here")
    booted = (record.handle or {}).get("boot", boot_id())
    return _DIED_UNSEEN if booted == boot_id() else _LOST


async def go_on(found: Resident, means: Means) -> None:
    """Resume a running machine that an interrupted save left suspended.

    One that was not woken stays as it is until it is requested again.
    """
    driver = means.drivers.named(found.record.driver)
    if driver is not None and driver.capabilities.saves and found.phase is not Phase.WAKING:
        await found.saving.unfreeze()
