"""Migrates a database's schema. Migrations only go forward.

Servers of two neighbouring versions may use a database at once, so a migration only adds: tables,
columns that are nullable or have a default, indexes. An older server ignores them. One that removes
or changes what an older server uses raises the floor: its module has `floor`, the oldest revision
that a server must know from then on, and it comes one release after the last server that used what
it removes.
"""

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, delete, insert, inspect, select

from sandyard.server.core.errors import InternalError
from sandyard.server.links.sql.tables import schema_floor


@dataclass(frozen=True)
class Schema:
    """A database's schema, beside that of this version. `present` is None if it is empty."""

    present: str | None
    newest: str
    missing: tuple[str, ...]
    """The migrations that it lacks, oldest first."""
    floor: str | None
    """The oldest revision that a server must know; None before there was a floor."""
    floor_after: str | None
    """The same, once it has been migrated."""

    @property
    def is_behind(self) -> bool:
        """Whether it lacks migrations of this version."""
        return bool(self.missing)

    @property
    def shuts_out_older(self) -> bool:
        """Whether its migration shuts out servers that know only what it has now."""
        after, present = self.floor_after, self.present
        return after is not None and present is not None and self.is_behind and after > present

    @property
    def is_ahead(self) -> bool:
        """Whether a newer version has migrated it, and this one may still use it."""
        return not self.missing and self.present != self.newest


def schema_of(connection: Connection) -> Schema:
    """Return the schema of a database.

    Raises:
        InternalError: a newer Sandyard has changed it in a way that this version cannot use.
    """
    floors = _floors()
    every = list(floors)
    present = MigrationContext.configure(connection).get_current_revision()
    floor = _floor(connection)
    if present is not None and present not in every:
        if floor not in every:
            raise InternalError(
                f"cannot open the database: its schema is {present}, and this version knows "
                f"{every[-1]}; install the newer Sandyard that migrated it, or restore a backup"
            )
        return Schema(present, every[-1], (), floor, floor)
    missing = every[every.index(present) + 1 :] if present is not None else every
    raised = (floor, *(floors[one] for one in missing))
    after = max((one for one in raised if one is not None), default=None)
    return Schema(present, every[-1], tuple(missing), floor, after)


def upgrade(connection: Connection) -> None:
    """Run the missing migrations in the transaction of this connection.

    Raises: see `schema_of`.
    """
    schema = schema_of(connection)
    if schema.is_behind:
        config = _config()
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        connection.execute(delete(schema_floor))
        connection.execute(insert(schema_floor).values(revision=schema.floor_after))


def _floor(connection: Connection) -> str | None:
    if not inspect(connection).has_table(schema_floor.name):
        return None
    found: str | None = connection.execute(select(schema_floor.c.revision)).scalar()
    return found


@cache
def _floors() -> dict[str, str | None]:
    """Return the floor that each revision sets, if any, oldest revision first."""
    scripts = ScriptDirectory.from_config(_config())
    found = [(one.revision, getattr(one.module, "floor", None)) for one in scripts.walk_revisions()]
    return dict(reversed(found))


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    return config
