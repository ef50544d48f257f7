"""The life of a sandbox: which status may follow which, and on what event.

Everything about transitions stands in this file and nowhere else. `TRANSITIONS` has a row for
every status; a row maps each event that has a meaning there to the status that follows. A step
that fails goes back to the status that is still intact: a failed pause leaves a running sandbox,
a failed resume a paused one. Nothing that could still be used is parked in a status that can only
be deleted.
"""

from collections.abc import Mapping
from enum import StrEnum
from types import MappingProxyType

from sandyard.server.core.errors import ConflictError


class Status(StrEnum):
    """Where a sandbox is; the values are the HTTP contract's."""

    PENDING = "pending"
    CREATING = "creating"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    RESUMING = "resuming"
    DESTROYING = "destroying"
    DESTROYED = "destroyed"
    FAILED = "failed"
    ERROR = "error"
    SUSPECTED_MISSING = "suspected_missing"
    ORPHANED = "orphaned"


class Event(StrEnum):
    """What can happen to a sandbox."""

    PLACED = "placed"  # a node was chosen and is at work
    DISPLACED = "displaced"  # that node cannot start it; another may
    AGAIN = "again"  # its machine ended before it could be used, and another is started
    READY = "ready"  # the agent answered: the sandbox can be used
    BROKE = "broke"  # a start failed for good, or a machine died
    SILENT = "silent"  # node or agent do not answer
    PAUSE = "pause"
    SAVED = "saved"  # the whole machine is on disk
    PAUSE_FAILED = "pause_failed"
    RESUME = "resume"
    RESUME_FAILED = "resume_failed"  # the saved state is whole
    RESTART = "restart"  # it is to boot from its own disk, whatever is in its memory
    ROLL_BACK = "roll_back"  # a snapshot is to take the place of what is there
    DELETE = "delete"
    GONE = "gone"  # nothing of the machine is left
    VANISHED = "vanished"  # nothing of it is left anywhere, although nothing requested that


_S, _E = Status, Event

TRANSITIONS: Mapping[Status, Mapping[Event, Status]] = MappingProxyType(
    {
        _S.PENDING: {
            _E.PLACED: _S.CREATING,
            _E.BROKE: _S.FAILED,
            _E.DELETE: _S.DESTROYING,
        },
        _S.CREATING: {
            _E.READY: _S.RUNNING,
            _E.AGAIN: _S.CREATING,
            _E.DISPLACED: _S.PENDING,
            _E.BROKE: _S.FAILED,
            _E.DELETE: _S.DESTROYING,
        },
        _S.RUNNING: {
            _E.PAUSE: _S.PAUSING,
            _E.RESTART: _S.RESUMING,
            _E.BROKE: _S.ERROR,
            _E.SILENT: _S.SUSPECTED_MISSING,
            _E.DELETE: _S.DESTROYING,
        },
        _S.PAUSING: {
            _E.SAVED: _S.PAUSED,
            _E.PAUSE_FAILED: _S.RUNNING,
            _E.BROKE: _S.ERROR,
            _E.DELETE: _S.DESTROYING,
        },
        _S.PAUSED: {
            _E.RESUME: _S.RESUMING,
            _E.RESTART: _S.RESUMING,
            _E.ROLL_BACK: _S.RESUMING,
            _E.BROKE: _S.ERROR,
            _E.VANISHED: _S.ORPHANED,
            _E.DELETE: _S.DESTROYING,
        },
        _S.RESUMING: {
            _E.READY: _S.RUNNING,
            _E.RESUME_FAILED: _S.PAUSED,
            _E.BROKE: _S.ERROR,
            _E.DELETE: _S.DESTROYING,
        },
        _S.DESTROYING: {_E.DELETE: _S.DESTROYING, _E.GONE: _S.DESTROYED},
        _S.DESTROYED: {},
        _S.FAILED: {_E.DELETE: _S.DESTROYING},
        _S.ERROR: {
            _E.RESUME: _S.RESUMING,
            _E.RESTART: _S.RESUMING,
            _E.ROLL_BACK: _S.RESUMING,
            _E.VANISHED: _S.ORPHANED,
            _E.DELETE: _S.DESTROYING,
        },
        _S.SUSPECTED_MISSING: {
            _E.READY: _S.RUNNING,
            _E.RESTART: _S.RESUMING,
            _E.PAUSE: _S.PAUSING,  # silent for too long; its owner cannot ask for it
            _E.BROKE: _S.ERROR,
            _E.VANISHED: _S.ORPHANED,
            _E.DELETE: _S.DESTROYING,
        },
        _S.ORPHANED: {_E.DELETE: _S.DESTROYING},
    }
)

HIDDEN = frozenset({Status.DESTROYED, Status.ORPHANED})
"""Left out of lists unless asked for, and free to have their name taken again."""

ON_ITS_WAY_UP = frozenset({Status.PENDING, Status.CREATING, Status.RESUMING})
"""A caller that needs a running sandbox may wait for these."""

ENDING = frozenset({Status.PAUSING, Status.DESTROYING})
"""Work on these waits for a node that is lost; other work goes to another node."""

BILLED = frozenset({Status.RUNNING})
"""Compute is charged in these and in no others: exactly here a usage period is open."""


def advance(status: Status, event: Event) -> Status:
    """Return the status that follows `status` when `event` happens.

    Raises:
        ConflictError: `event` has no meaning in `status`. The caller lost a race or asked for
            something impossible, and the stored sandbox is untouched.
    """
    following = TRANSITIONS[status].get(event)
    if following is None:
        raise ConflictError(
            f"cannot apply {event} to a sandbox that is {status}", status=status.value
        )
    return following
