"""The step that is taken for each kind of request in each phase of a machine.

A request is for the incarnation that is here, or for a newer one; requests for an older one are
refused before. The phase is that of a machine without a job in progress, or None if there is no
machine.

A create that is repeated after its machine was paused or has ended is late: the machine has been
used and must be kept. A `starting` machine without a job is what a failed start left.
"""

from collections.abc import Mapping
from enum import Enum, auto
from types import MappingProxyType

from sandyard.server.core.contracts.node import Origin, Phase


class Ask(Enum):
    """A kind of request about one machine."""

    CREATE = auto()
    FROM_SNAPSHOT = auto()
    RESUME = auto()
    RESTART = auto()
    PAUSE = auto()
    SAVE = auto()
    OPEN = auto()


class Step(Enum):
    """What is done about it."""

    START = auto()  # nothing is here: start a new machine
    REPLACE = auto()  # remove what is here, and start a new machine
    KEEP = auto()  # it is as it should be
    TAKE = auto()  # it lives: wake it if necessary, and make it the requested incarnation
    RESUME = auto()
    RESTART = auto()
    ROLL_BACK = auto()
    PAUSE = auto()
    SAVE = auto()
    OPEN = auto()
    ABSENT = auto()  # refused: there is no machine
    OVERTAKEN = auto()  # refused: the machine has been up since, and is at rest again
    NO_ROOM = auto()  # refused: it is held because there is no room to save it
    DEAD = auto()  # refused: the machine is dead
    NOT_NOW = auto()  # refused: it is not in a phase for this


ORIGINS: Mapping[Origin, Ask] = MappingProxyType(
    {
        Origin.NEW: Ask.CREATE,
        Origin.SNAPSHOT: Ask.FROM_SNAPSHOT,
        Origin.OWN: Ask.RESUME,
        Origin.DISK: Ask.RESTART,
    }
)

_Table = Mapping[Ask, Mapping[Phase | None, Step]]


def _table(text: str) -> _Table:
    """Return a table from text: phases in the first line, then a line for each kind of request."""
    head, *lines = text.strip().splitlines()
    phases = [None if one == "nothing" else Phase(one) for one in head.split()]
    rows = {}
    for line in lines:
        ask, *steps = line.split()
        row = dict(zip(phases, (Step[one] for one in steps), strict=True))
        rows[Ask[ask]] = MappingProxyType(row)
    return MappingProxyType(rows)


NEWER = _table("""
               nothing    starting   running    held       waking     paused     dead
CREATE         START      REPLACE    REPLACE    REPLACE    REPLACE    REPLACE    REPLACE
FROM_SNAPSHOT  START      REPLACE    ROLL_BACK  NO_ROOM    ROLL_BACK  ROLL_BACK  ROLL_BACK
RESUME         ABSENT     ABSENT     TAKE       TAKE       TAKE       RESUME     RESTART
RESTART        ABSENT     ABSENT     RESTART    RESTART    RESTART    RESTART    RESTART
PAUSE          ABSENT     DEAD       PAUSE      NO_ROOM    PAUSE      KEEP       DEAD
SAVE           ABSENT     DEAD       SAVE       NO_ROOM    SAVE       SAVE       DEAD
OPEN           ABSENT     ABSENT     ABSENT     ABSENT     ABSENT     ABSENT     ABSENT
""")
"""The request means a later incarnation than the one that is here."""

SAME = _table("""
               nothing    starting   running    held       waking     paused     dead
CREATE         START      REPLACE    KEEP       KEEP       TAKE       OVERTAKEN  DEAD
FROM_SNAPSHOT  START      REPLACE    KEEP       KEEP       TAKE       OVERTAKEN  DEAD
RESUME         ABSENT     ABSENT     KEEP       KEEP       TAKE       OVERTAKEN  DEAD
RESTART        ABSENT     ABSENT     KEEP       KEEP       TAKE       OVERTAKEN  DEAD
PAUSE          ABSENT     DEAD       PAUSE      NO_ROOM    PAUSE      KEEP       DEAD
SAVE           ABSENT     DEAD       SAVE       NO_ROOM    SAVE       SAVE       DEAD
OPEN           ABSENT     NOT_NOW    OPEN       OPEN       NOT_NOW    NOT_NOW    NOT_NOW
""")
"""The request means the incarnation that is here."""


def step_of(ask: Ask, phase: Phase | None, *, is_newer: bool) -> Step:
    """Return what is done about a request; see the tables."""
    return (NEWER if is_newer else SAME)[ask][phase]
