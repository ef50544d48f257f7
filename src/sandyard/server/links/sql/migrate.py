"""Migrates a database's schema. Migrations only go forward."""

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection

from sandyard.server.core.errors import InternalError


def is_behind(connection: Connection) -> bool:
    """Tell whether a database lacks migrations of this version.

    Raises:
        InternalError: a newer Sandyard has written this database.
    """
    scripts = ScriptDirectory.from_config(_config(connection))
    present = MigrationContext.configure(connection).get_current_revision()
    if present == scripts.get_current_head():
        return False
    if present is not None and present not in {one.revision for one in scripts.walk_revisions()}:
        raise InternalError(
            f"cannot open the store: its schema is {present}, which this version does not know; "
            "install the newer Sandyard that wrote it"
        )
    return True


def upgrade(connection: Connection) -> None:
    """Run the missing migrations in the transaction of this connection.

    Raises:
        InternalError: a newer Sandyard has written this database.
    """
    if is_behind(connection):
        command.upgrade(_config(connection), "head")


def _config(connection: Connection) -> Config:
    config = Config()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config
