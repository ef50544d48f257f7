"""What becomes of a machine that an earlier process wrote down."""

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
    """Return a machine as it is found: living ones go on, saved and dead ones are kept.

    None for one that is not to be kept. What was being started is ended: who asked for it is gone,
    and whoever wants it still asks again. So is what waited in the pool.
    """
    if record.phase in _FLEETING:
        return None
    found = Resident(record, means)
    if found.is_saved and found.phase is not Phase.DEAD:
        # Saved, and if a process is left of it, it has not run since.
        await _end_what_is_left(found)
        await found.found_without_process(Phase.PAUSED)
    elif found.phase is Phase.PAUSED:
        end = End(DAMAGED, "the saved state is gone")
        await found.found_without_process(Phase.DEAD, end)
    elif found.phase is Phase.DEAD:
        # It may have been on its way up again, or not yet been buried.
        await _end_what_is_left(found)
        end = End(record.reason_code, record.reason_message)
        await found.found_without_process(Phase.DEAD, end)
    elif not await found.recover():
        await found.found_without_process(Phase.DEAD, _how_it_ended(record, means))
    return found


async def _end_what_is_left(found: Resident) -> None:
    """End a process that nobody wants any more. One that the kernel does not let go, for its
    storage stands still say, is killed all the same, and must keep nobody else from being found."""
    if await found.recover():
        try:
            await found.end()
        except (SandyardError, OSError):
            log.exception("what is left of a machine does not end")


def _how_it_ended(record: Record, means: Means) -> End:
    if means.drivers.named(record.driver) is None:
        return End("driver_missing", f"no driver {record.driver} is here")
    booted = (record.handle or {}).get("boot", boot_id())
    return _DIED_UNSEEN if booted == boot_id() else _LOST


async def go_on(found: Resident, means: Means) -> None:
    """Have a living machine that stood still for a save which was broken off go on.

    One that was not woken stands or runs as it is until whoever wants it asks again.
    """
    driver = means.drivers.named(found.record.driver)
    if driver is not None and driver.capabilities.saves and found.phase is not Phase.WAKING:
        await found.unfreeze()
