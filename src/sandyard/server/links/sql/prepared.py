"""Frequent statements, compiled once.

Building a statement takes longer than SQLite needs to run it, and looking up its compiled form
takes nearly as long. Prepared statements are passed directly to the database's driver.
"""

import json
import sqlite3
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from sqlalchemy import Dialect
from sqlalchemy.dialects.postgresql import asyncpg as of_postgres
from sqlalchemy.dialects.sqlite import pysqlite
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.types import TypeEngine

_EMPTY: Final[Mapping[str, Callable[[], object]]] = {"[]": list, "{}": dict}


def _loaded(text: str) -> Any:
    """Return the value of a JSON text; most of them are empty."""
    return made() if (made := _EMPTY.get(text)) else json.loads(text)


SQLITE: Final[Dialect] = pysqlite.dialect(paramstyle="qmark", json_deserializer=_loaded)
POSTGRES: Final[Dialect] = of_postgres.dialect()  # type: ignore[no-untyped-call]  # SQLAlchemy's
Convert = Callable[[Any], Any]
Values = Mapping[str, object]


@dataclass(frozen=True)
class StatementPlan:
    """A statement in the form that a driver takes, with conversions of its values and rows."""

    text: str
    given: tuple[tuple[str, Convert | None], ...]  # by place: name, and how the driver gets it
    fixed: Values
    columns: tuple[str, ...]
    read: tuple[tuple[str, Convert], ...]  # columns that the database keeps in another form

    def bound(self, values: Values) -> list[Any]:
        """Return the values in the positions and types that the driver takes."""
        bound: list[Any] = []
        for name, convert in self.given:
            value = values[name] if name in values else self.fixed[name]
            bound.append(value if convert is None else convert(value))
        return bound

    def row(self, found: Iterable[Any]) -> dict[str, Any]:
        """Return a row of the driver as Python values by column name."""
        row = dict(zip(self.columns, found, strict=True))
        for name, convert in self.read:
            if (value := row[name]) is not None:
                row[name] = convert(value)
        return row


class Prepared:
    """One prepared statement. It has no list parameters, because those have varying lengths."""

    def __init__(self, statement: Any, *, writes: bool | None = None) -> None:
        """A statement that selects, and has parts that write, is declared with `writes`."""
        self.statement = statement
        self.writes = bool(statement.is_dml) if writes is None else writes
        self._plans: dict[tuple[str, frozenset[str]], StatementPlan] = {}

    def fetch(self, connection: sqlite3.Connection, values: Values) -> list[dict[str, Any]]:
        """Run it on SQLite and return the rows as Python values by column name."""
        plan = self.plan(SQLITE, values)
        with _raised_as_sqlalchemys(plan.text):
            found = connection.execute(plan.text, plan.bound(values)).fetchall()
        return [plan.row(row) for row in found]

    def run(self, connection: sqlite3.Connection, values: Values) -> int:
        """Run it on SQLite and return how many rows it changed."""
        plan = self.plan(SQLITE, values)
        with _raised_as_sqlalchemys(plan.text):
            return connection.execute(plan.text, plan.bound(values)).rowcount

    def plan(self, dialect: Dialect, values: Values) -> StatementPlan:
        """Return its plan for a database, with values of these names."""
        names = frozenset(values)
        if (plan := self._plans.get((dialect.name, names))) is None:
            plan = _plan_of(self.statement, names, dialect)
            self._plans[dialect.name, names] = plan
        return plan


def _plan_of(statement: Any, names: frozenset[str], dialect: Dialect) -> StatementPlan:
    compiled = statement.compile(
        dialect=dialect,
        column_keys=sorted(names) if statement.is_insert else None,
    )
    assert isinstance(compiled, SQLCompiler)
    columns = statement.exported_columns if statement.is_dml else statement.selected_columns
    read = ((name, _reader(column.type, dialect)) for name, column in columns.items())
    return StatementPlan(
        text=str(compiled),
        given=tuple(
            (name, _binder(compiled.binds[name].type, dialect))
            for name in compiled.positiontup or ()
        ),
        fixed={name: value for name, value in compiled.params.items() if name not in names},
        columns=tuple(columns.keys()),
        read=tuple((name, convert) for name, convert in read if convert is not None),
    )


def _binder(kind: TypeEngine[Any], dialect: Dialect) -> Convert | None:
    return kind.dialect_impl(dialect).bind_processor(dialect)


def _reader(kind: TypeEngine[Any], dialect: Dialect) -> Convert | None:
    return kind.dialect_impl(dialect).result_processor(dialect, None)


def begin(connection: sqlite3.Connection) -> None:
    """Begin a read transaction on SQLite, whose snapshot is taken by its first statement."""
    with _raised_as_sqlalchemys("BEGIN"):
        connection.execute("BEGIN")


class _raised_as_sqlalchemys:  # noqa: N801 - used as a statement, like contextlib.suppress
    """Raises SQLite's errors as SQLAlchemy's, like statements that run through SQLAlchemy."""

    def __init__(self, statement: str) -> None:
        self._statement = statement

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, sqlite3.Error):
            meant: type[DBAPIError] = DBAPIError
            if isinstance(error, sqlite3.IntegrityError):
                meant = IntegrityError
            elif isinstance(error, sqlite3.InterfaceError):
                meant = InterfaceError
            elif isinstance(error, sqlite3.OperationalError):
                meant = OperationalError
            raise meant(self._statement, None, error, hide_parameters=True) from error
