"""The store. See core.contracts.Store."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import event, make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine

from sandyard.server.core.errors import InternalError, UnavailableError
from sandyard.server.links.sql.migrate import upgrade
from sandyard.server.links.sql.rows import AccountTable, ActivityTable, SandboxTable, UsageTable
from sandyard.server.links.sql.seal import Seal

_BUSY_S = 10
_POSTGRES: dict[str, Any] = {
    "pool_size": 5,
    "pool_timeout": _BUSY_S,
    "pool_pre_ping": True,
    "hide_parameters": True,
}
# Any number, the same in every process: it names the lock that serializes writers.
_WRITER_LOCK = 0x53414E44


class SqlTransaction:
    """See core.contracts.Transaction."""

    def __init__(self, connection: AsyncConnection, seal: Seal) -> None:
        self.sandboxes = SandboxTable(connection, seal)
        self.accounts = AccountTable(connection)
        self.activity = ActivityTable(connection)
        self.usage = UsageTable(connection)


class SqlStore:
    """See core.contracts.Store.

    Writers are serialized: SQLite by BEGIN IMMEDIATE, PostgreSQL by an advisory lock that a
    transaction holds. A read that a write depends on can therefore never be overtaken.
    """

    def __init__(self, reader: AsyncEngine, writer: AsyncEngine, seal: Seal) -> None:
        self._reader = reader
        self._writer = writer
        self._seal = seal
        self._is_sqlite = writer.dialect.name == "sqlite"

    @asynccontextmanager
    async def read(self) -> AsyncIterator[SqlTransaction]:
        """See core.contracts.Store.read."""
        with _translated():
            async with self._reader.connect() as connection:
                yield SqlTransaction(connection, self._seal)

    @asynccontextmanager
    async def write(self) -> AsyncIterator[SqlTransaction]:
        """See core.contracts.Store.write."""
        with _translated():
            async with self._writer.begin() as connection:
                if not self._is_sqlite:
                    await connection.execute(text(f"SELECT pg_advisory_xact_lock({_WRITER_LOCK})"))
                yield SqlTransaction(connection, self._seal)

    async def ping(self) -> None:
        """See core.contracts.Store.ping."""
        with _translated():
            async with asyncio.timeout(_BUSY_S), self._reader.connect() as connection:
                await connection.execute(text("SELECT 1"))


@asynccontextmanager
async def open_store(url: str, *, key: bytes) -> AsyncIterator[SqlStore]:
    """Open the store behind a database URL, bringing its schema up to date first.

    `url` is `sqlite:///PATH` or `postgresql://…`; `key` is the installation's secret key.

    Raises:
        UnavailableError: the database does not answer.
        InternalError: the URL is of another kind, or the schema is of a newer Sandyard.
    """
    async with AsyncExitStack() as held:
        if url.startswith("sqlite:///"):
            path = Path(url.removeprefix("sqlite:///"))
            path.parent.mkdir(parents=True, exist_ok=True)
            # Made before SQLite opens it, for itself and the files beside it: hashes are inside.
            path.touch(mode=0o600)
            async_url = f"sqlite+aiosqlite:///{path}"
            reader = create_async_engine(
                async_url, pool_size=4, pool_timeout=_BUSY_S, hide_parameters=True
            )
            # One connection writes: within this process writers queue fairly instead of polling.
            writer = create_async_engine(
                async_url, pool_size=1, max_overflow=0, pool_timeout=_BUSY_S, hide_parameters=True
            )
            _set_up_sqlite(reader, begin="BEGIN")
            _set_up_sqlite(writer, begin="BEGIN IMMEDIATE")
        elif url.startswith("postgresql://"):
            postgres = make_url(url).set(drivername="postgresql+asyncpg")
            reader = create_async_engine(postgres, **_POSTGRES)
            writer = create_async_engine(postgres, **_POSTGRES)
        else:
            raise InternalError(
                "cannot open the store: its URL must be sqlite:/// or postgresql://"
            )
        held.push_async_callback(reader.dispose)
        held.push_async_callback(writer.dispose)
        with _translated():
            async with writer.begin() as connection:
                await connection.run_sync(upgrade)
        yield SqlStore(reader, writer, Seal(key))


def _set_up_sqlite(engine: AsyncEngine, *, begin: str) -> None:
    @event.listens_for(engine.sync_engine, "connect")
    def connect(connection, _record) -> None:  # type: ignore[no-untyped-def]  # a DBAPI's own
        # The driver must not begin by itself: it would begin a reading transaction, and a write
        # in it fails when another has written meanwhile (sqlite.org/lang_transaction.html).
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            f"busy_timeout={_BUSY_S * 1000}",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin_(connection) -> None:  # type: ignore[no-untyped-def]  # SQLAlchemy's own
        connection.exec_driver_sql(begin)


def _is_passing(error: DBAPIError) -> bool:
    """Tell whether a database went away, is shutting down or is out of room for a while.

    The classes are PostgreSQL's (appendix A of its manual): connection, resources, intervention.
    """
    state = str(getattr(error.orig, "sqlstate", None) or "")
    return error.connection_invalidated or state.startswith(("08", "53", "57P"))


class _translated:  # noqa: N801 - used as a statement, like contextlib.suppress
    """Turns the database's errors into ours at the edge of this room."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, IntegrityError):
            raise InternalError(f"the database refused a row: {error.orig}") from error
        if isinstance(error, DBAPIError) and _is_passing(error):
            raise UnavailableError("the database does not answer now; try again") from error
        if isinstance(
            error, OperationalError | InterfaceError | PoolTimeoutError | OSError | TimeoutError
        ):
            raise UnavailableError("the database does not answer now; try again") from error
        if isinstance(error, DBAPIError):
            raise InternalError(f"the database failed: {error.orig}") from error
