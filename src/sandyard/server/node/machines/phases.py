"""What may be done with a machine in which phase: every ask meets every phase here.

An ask comes with the incarnation that it means. What is here may be of an earlier one (the ask is
`newer`) or of the very same; one that was overtaken by a later incarnation is refused before. The
phases are those of a machine at which no job is at work, None where nothing of it is here.

A create that comes again after its machine was paused, or died, is late: what it asked for has been
there, and is worth keeping. A `starting` machine without a job is what a failed start left.
"""

from collections.abc import Mapping
from enum import Enum, auto
from types import MappingProxyType

from sandyard.server.core.contracts.node import Origin, Phase


class Ask(Enum):
    """What can be asked of a node about one machine."""

    CREATE = auto()
    FROM_SNAPSHOT = auto()
    RESUME = auto()
    RESTART = auto()
    PAUSE = auto()
    SAVE = auto()
    OPEN = auto()


class Step(Enum):
    """What comes of it."""

    START = auto()  # nothing is here: a new machine
    REPLACE = auto()  # what is here goes, and a new machine comes
    KEEP = auto()  # it is as it should be
    TAKE = auto()  # it lives: it is woken, if nobody did, and counts as what is wished
    RESUME = auto()
    RESTART = auto()
    ROLL_BACK = auto()
    PAUSE = auto()
    SAVE = auto()
    OPEN = auto()
    NOTHING_HERE = auto()  # refused: there is nothing to do it with
    OVERTAKEN = auto()  # refused: the machine has been up since, and is at rest again
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

_Row = Mapping[Phase | None, Step]
_COLUMNS = (None, Phase.STARTING, Phase.RUNNING, Phase.WAKING, Phase.PAUSED, Phase.DEAD)


def _row(text: str) -> _Row:
    steps = [Step[name] for name in text.split()]
    return MappingProxyType(dict(zip(_COLUMNS, steps, strict=True)))


# fmt: off
NEWER: Mapping[Ask, _Row] = MappingProxyType({
    #                         nothing      starting     running   waking    paused    dead
    Ask.CREATE:        _row("START        REPLACE      REPLACE   REPLACE   REPLACE   REPLACE"),
    Ask.FROM_SNAPSHOT: _row("START        REPLACE      ROLL_BACK ROLL_BACK ROLL_BACK ROLL_BACK"),
    Ask.RESUME:        _row("NOTHING_HERE NOTHING_HERE TAKE      TAKE      RESUME    RESTART"),
    Ask.RESTART:       _row("NOTHING_HERE NOTHING_HERE RESTART   RESTART   RESTART   RESTART"),
    Ask.PAUSE:         _row("NOTHING_HERE DEAD         PAUSE     PAUSE     KEEP      DEAD"),
    Ask.SAVE:          _row("NOTHING_HERE DEAD         SAVE      SAVE      SAVE      DEAD"),
    Ask.OPEN:          _row("NOTHING_HERE " * 6),
})
"""The ask means a later incarnation than the one that is here."""

SAME: Mapping[Ask, _Row] = MappingProxyType({
    #                         nothing      starting     running   waking    paused    dead
    Ask.CREATE:        _row("START        REPLACE      KEEP      TAKE      OVERTAKEN DEAD"),
    Ask.FROM_SNAPSHOT: _row("START        REPLACE      KEEP      TAKE      OVERTAKEN DEAD"),
    Ask.RESUME:        _row("NOTHING_HERE NOTHING_HERE KEEP      TAKE      OVERTAKEN DEAD"),
    Ask.RESTART:       _row("NOTHING_HERE NOTHING_HERE KEEP      TAKE      OVERTAKEN DEAD"),
    Ask.PAUSE:         _row("NOTHING_HERE DEAD         PAUSE     PAUSE     KEEP      DEAD"),
    Ask.SAVE:          _row("NOTHING_HERE DEAD         SAVE      SAVE      SAVE      DEAD"),
    Ask.OPEN:          _row("NOTHING_HERE NOT_NOW      OPEN      NOT_NOW   NOT_NOW   NOT_NOW"),
})
"""The ask means the incarnation that is here."""
# fmt: on


def step_of(ask: Ask, phase: Phase | None, *, is_newer: bool) -> Step:
    """Return what comes of an ask; see the module."""
    return (NEWER if is_newer else SAME)[ask][phase]
