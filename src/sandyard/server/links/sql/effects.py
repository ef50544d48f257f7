"""What is written with a change of a sandbox: a line of the feed, a usage period.

On PostgreSQL it is one statement with the change, so there is one answer to wait for. SQLite has no
such statements, and answers at once; it gets one after the other.
"""

import functools
from typing import Final

from sqlalchemy import (
    CTE,
    ColumnElement,
    Insert,
    Table,
    Update,
    bindparam,
    case,
    exists,
    insert,
    select,
    update,
)

from sandyard.server.core.contracts.store import Effects
from sandyard.server.core.records import Activity, UsagePeriod
from sandyard.server.links.sql import tables as t
from sandyard.server.links.sql.prepared import Prepared, Values


def closing(table: Table, *which: ColumnElement[bool]) -> Update:
    """Return the statement that ends open periods at the moment `ended`."""
    c, ended = table.c, bindparam("ended", type_=t.Moment)
    # A clock that was set back must not make a period end before it began.
    latest = case((c.started_at > ended, c.started_at), else_=ended)
    return update(table).where(*which, c.ended_at.is_(None)).values(ended_at=latest)


_usage = t.usage_periods.c
_CLOSE = closing(t.usage_periods, _usage.sandbox_id == bindparam("ended_id"))
APPEND: Final = Prepared(insert(t.activity))
OPEN: Final = Prepared(insert(t.usage_periods))
CLOSE: Final = Prepared(_CLOSE.returning(_usage.id))


def of_line(line: Activity) -> Values:
    """Return the values for `APPEND`."""
    return vars(line) | {"attributes": dict(line.attributes)}


def of_period(period: UsagePeriod) -> Values:
    """Return the values for `OPEN`."""
    values = {name: value for name, value in vars(period).items() if name not in ("shape", "id")}
    return values | vars(period.shape)


def of_effects(sandbox_id: str, effects: Effects) -> list[tuple[Prepared, Values]]:
    """Return what is to be written, a statement each."""
    every = list[tuple[Prepared, Values]]()
    if effects.line is not None:
        every.append((APPEND, of_line(effects.line)))
    if effects.opens is not None:
        every.append((OPEN, of_period(effects.opens)))
    if effects.closes_at is not None:
        every.append((CLOSE, {"ended_id": sandbox_id, "ended": effects.closes_at}))
    return every


def as_one(
    change: Prepared, values: Values, effects: list[tuple[Prepared, Values]]
) -> tuple[Prepared, Values]:
    """Return a change that returns columns of what it changed, and its effects if it changed
    anything, as one statement of PostgreSQL and its values."""
    together = dict(values)
    for statement, its in effects:
        together |= {f"{_PREFIXES[statement]}{name}": value for name, value in its.items()}
    return _together(change, tuple(statement for statement, _ in effects)), together


@functools.cache
def _together(change: Prepared, effects: tuple[Prepared, ...]) -> Prepared:
    changed = change.statement.cte("changed")
    parts = [_PARTS[one](changed).cte(f"effect_{place}") for place, one in enumerate(effects)]
    return Prepared(select(*changed.c).add_cte(*parts), writes=True)


def _append(changed: CTE) -> Insert:
    return _copied(t.activity, _PREFIXES[APPEND], changed)


def _open(changed: CTE) -> Insert:
    return _copied(t.usage_periods, _PREFIXES[OPEN], changed, but="id")


def _close(changed: CTE) -> Update:
    return _CLOSE.where(exists(select(*changed.c)))


def _copied(table: Table, prefix: str, changed: CTE, *, but: str | None = None) -> Insert:
    """Insert a row of parameters for each row that was changed."""
    columns = [one for one in table.c if one.name != but]
    values = [bindparam(f"{prefix}{one.name}", type_=one.type) for one in columns]
    names = [one.name for one in columns]
    return insert(table).from_select(names, select(*values).select_from(changed))


_PARTS: Final = {APPEND: _append, OPEN: _open, CLOSE: _close}
# A sandbox has columns of the same names.
_PREFIXES: Final = {APPEND: "line_", OPEN: "period_", CLOSE: ""}
