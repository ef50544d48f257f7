"""The store. See core.contracts.store.Store."""

import asyncio
import functools
import json
import logging
import os
import sqlite3
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary
from zlib import crc32

from sqlalchemy import (
    Boolean,
    CursorResult,
    Dialect,
    Engine,
    Executable,
    column,
    create_engine,
    event,
    func,
    literal_column,
    select,
    table,
    text,
)
from sqlalchemy import Connection as SyncConnection
from sqlalchemy.exc import DBAPIError, IntegrityError, InterfaceError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool, QueuePool
from typing_extensions import override

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.errors import InternalError, UnavailableError
from sandyard.server.links.local import SystemClock
from sandyard.server.links.sql.account_rows import (
    KeyTable,
    OrganizationTable,
    ProjectTable,
    RevokedKeyTable,
    SshKeyTable,
    UserTable,
    WorkspaceTable,
)
from sandyard.server.links.sql.address import read_postgres_url
from sandyard.server.links.sql.batches import BUSY_S, Batches, begun, lost
from sandyard.server.links.sql.cluster_rows import (
    DutyTable,
    InviteTable,
    JoinedNodeTable,
    QuarantineTable,
    SecretTable,
)
from sandyard.server.links.sql.migrate import Schema, schema_of, upgrade
from sandyard.server.links.sql.money_rows import (
    CreditTable,
    FactTable,
    PriceTable,
    StorageTable,
    UsageTable,
)
from sandyard.server.links.sql.prepared import Prepared, Values, begin
from sandyard.server.links.sql.remote import (
    ANSWER_S,
    COMMIT,
    READ,
    WRITE,
    Transactions,
    fetch,
    run,
)
from sandyard.server.links.sql.rows import (
    ActivityTable,
    Connection,
    LeaseTable,
    NodeTable,
    RequestTable,
    SandboxTable,
    SnapshotTable,
    TicketTable,
)
from sandyard.server.links.sql.seal import Seal
from sandyard.server.links.sql.tables import HOLDS, NOW, microseconds
from sandyard.server.links.sql.template_rows import (
    BuildTable,
    CredentialTable,
    OrgSecretTable,
    TemplateTable,
    UploadTable,
    VersionTable,
)
from sandyard.server.tasks import in_thread

log = logging.getLogger(__name__)

_APPLICATION = "sandyard"
POSTGRES: dict[str, Any] = {
    "pool_size": 20,
    "max_overflow": 4,
    "pool_timeout": BUSY_S,
    "hide_parameters": True,
    # In milliseconds; a longer wait for a lock is an error.
    "connect_args": {
        "timeout": BUSY_S,
        "command_timeout": ANSWER_S,
        "server_settings": {
            "application_name": _APPLICATION,
            "lock_timeout": str(BUSY_S * 1000),
            # A server that is suspended between two statements must not block all others; for one
            # that is suspended within a statement see `_suspended`. One may wait for two locks.
            "idle_in_transaction_session_timeout": str(BUSY_S * 1000),
            "statement_timeout": str(2 * BUSY_S * 1000),
        },
    },
}
_PING_S = 2.0
_SUSPENDED_S, _LOOK_S = BUSY_S, 5.0
# Arbitrary numbers, the same in every process: they name locks. An exclusive writer holds the
# first one alone, others share it; there is one of the second kind for each organization.
_WRITERS, _ORGANIZATION = 0x53414E44, 0x53414E46
_SCHEMA_LOCK = 0x53414E45
_ALONE = f"SELECT pg_advisory_xact_lock({_WRITERS})"
_BESIDE = f"SELECT pg_advisory_xact_lock_shared({_WRITERS})"


@functools.cache
def _suspended(seconds: float) -> Prepared:
    """Return a statement that ends the sessions of servers that have sent a part of a statement,
    its text without its values, and nothing for so long.

    PostgreSQL applies none of its limits to them, and their locks would be held for as long as the
    server is suspended: they are active, not idle, and a statement's limit is not looked at while a
    message is awaited (`HOLD_CANCEL_INTERRUPTS` in its SocketBackend).
    """
    c = table(
        "pg_stat_activity",
        *map(column, ("pid", "datname", "usename", "application_name", "state", "wait_event")),
        column("state_change"),
    ).c
    return Prepared(
        select(func.pg_terminate_backend(c.pid, type_=Boolean).label("ended")).where(
            c.datname == func.current_database(),
            c.usename == literal_column("current_user"),
            c.application_name == literal_column(f"'{_APPLICATION}'"),
            c.state == literal_column("'active'"),
            c.wait_event == literal_column("'ClientRead'"),
            c.state_change < literal_column(f"clock_timestamp() - interval '{seconds} seconds'"),
        )
    )


class SqlTransaction:
    """See core.contracts.store.Transaction."""

    def __init__(self, connection: Connection, seal: Seal) -> None:
        self.sandboxes = SandboxTable(connection, seal)
        self.leases = LeaseTable(connection, self.sandboxes)
        self.nodes = NodeTable(connection)
        self.joined_nodes = JoinedNodeTable(connection)
        self.invites = InviteTable(connection)
        self.secrets = SecretTable(connection, seal)
        self.workspaces = WorkspaceTable(connection)
        self.organizations = OrganizationTable(connection)
        self.users = UserTable(connection)
        self.projects = ProjectTable(connection)
        self.keys = KeyTable(connection)
        self.ssh_keys = SshKeyTable(connection)
        self.revoked_keys = RevokedKeyTable(connection)
        self.quarantine = QuarantineTable(connection)
        self.activity = ActivityTable(connection)
        self.usage = UsageTable(connection)
        self.storage = StorageTable(connection)
        self.credits = CreditTable(connection)
        self.facts = FactTable(connection)
        self.prices = PriceTable(connection)
        self.duties = DutyTable(connection)
        self.snapshots = SnapshotTable(connection, seal)
        self.templates = TemplateTable(connection)
        self.versions = VersionTable(connection, seal)
        self.builds = BuildTable(connection, seal)
        self.uploads = UploadTable(connection)
        self.credentials = CredentialTable(connection, seal)
        self.org_secrets = OrgSecretTable(connection, seal)
        self.requests = RequestTable(connection)
        self.tickets = TicketTable(connection)


class PostgresStore(Store):
    """See core.contracts.store.Store.

    Readers see one moment (REPEATABLE READ). Writers of one organization take turns by an advisory
    lock that a transaction holds, and see what the one before them committed (READ COMMITTED: a
    snapshot would be taken before the lock is had): a read that a write depends on can never be
    overtaken. They share another, which whoever writes alone has for itself.
    """

    def __init__(self, engine: AsyncEngine, pings: AsyncEngine, seal: Seal) -> None:
        """`pings` has a connection of its own, so that no ping waits behind requests."""
        self.engine = engine
        self._transactions = Transactions(engine)
        self._pings = Transactions(pings)
        self._seal = seal
        # Who waits here for one's turn keeps no connection from others. Each lives for as long as
        # it is held or waited for.
        self._turns: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._look_at = 0.0

    @asynccontextmanager
    @override
    async def read(self) -> AsyncIterator[SqlTransaction]:
        with _translated():
            async with self._transactions.begun(READ) as connection:
                yield await self._transaction(connection)

    @asynccontextmanager
    @override
    async def glance(self) -> AsyncIterator[SqlTransaction]:
        with _translated():
            yield SqlTransaction(_Once(self._transactions.fetch, self.engine.dialect), self._seal)

    @asynccontextmanager
    @override
    async def write(self, turn: Turn | str) -> AsyncIterator[SqlTransaction]:
        words = f"{WRITE}; {_locks(turn)}"
        with _translated():
            async with self._turn(turn), self._transactions.begun(words) as connection:
                yield await self._transaction(connection)

    async def _transaction(self, connection: AsyncConnection) -> SqlTransaction:
        raw = (await connection.get_raw_connection()).driver_connection
        return SqlTransaction(_Remote(connection, raw), self._seal)

    @asynccontextmanager
    async def _turn(self, turn: Turn | str) -> AsyncIterator[None]:
        """Wait for a turn among the writers of this process.

        Raises:
            TimeoutError: other writers did not finish in time.
        """
        if turn is Turn.SHARED:
            yield
            return
        lock = self._turns.setdefault(str(turn), asyncio.Lock())
        async with asyncio.timeout(BUSY_S):
            await lock.acquire()
        try:
            yield
        finally:
            lock.release()

    @override
    async def ping(self) -> None:
        self._pings.resume()
        with self._limited():
            try:
                with _translated():
                    once = _Once(self._pings.fetch, self.engine.dialect)
                    await SqlTransaction(once, self._seal).facts.moment("ping")
            except UnavailableError as error:
                if _is_silence(error.__cause__):
                    if not self._transactions.is_given_up:
                        log.warning("the database does not answer; failing what waits for it")
                    self._transactions.give_up()
                raise
            await self._end_suspended()
        self._transactions.resume()

    @contextmanager
    def _limited(self) -> Iterator[None]:
        """Give the pings of the block up after `_PING_S`.

        The limit is two waits of half the time each: if the process or the whole host stood still,
        the first ends before the answer could be sent or read, and the second leaves time for it.
        """
        loop = asyncio.get_running_loop()

        def wait_again() -> None:
            waits.append(loop.call_later(_PING_S / 2, self._pings.give_up))

        waits = [loop.call_later(_PING_S / 2, wait_again)]
        try:
            yield
        finally:
            for wait in waits:
                wait.cancel()

    async def _end_suspended(self) -> None:
        now = asyncio.get_running_loop().time()
        if now < self._look_at:
            return
        self._look_at = now + _LOOK_S
        try:
            if ended := await self._pings.fetch(_suspended(_SUSPENDED_S), {}):
                log.warning(
                    "ended %d transactions of a server that is suspended within a statement",
                    len(ended),
                )
        except (DBAPIError, TimeoutError) as error:
            log.debug("cannot look for suspended servers: %s", error)


class SqliteStore(Store):
    """See core.contracts.store.Store.

    Statements run on the loop itself: the database is a file in the page cache, and each takes less
    than handing it to a thread would. What waits for the disk, the commit, is done in a thread, and
    shared by all who write meanwhile. Writers take turns by a lock in this process and by BEGIN
    IMMEDIATE among processes.
    """

    def __init__(self, reader: Engine, writer: Engine, seal: Seal) -> None:
        self._reader = reader
        self._batches = Batches(writer)
        self._seal = seal

    @asynccontextmanager
    @override
    async def read(self) -> AsyncIterator[SqlTransaction]:
        with _translated(), self._reader.connect() as connection:
            yield SqlTransaction(_Inline(connection, writes=False), self._seal)

    @asynccontextmanager
    @override
    async def glance(self) -> AsyncIterator[SqlTransaction]:
        with _translated(), self._reader.connect() as connection:
            inline = _Inline(connection, writes=False)
            yield SqlTransaction(_Once(inline.fetch, connection.dialect), self._seal)

    @asynccontextmanager
    @override
    async def write(self, turn: Turn | str) -> AsyncIterator[SqlTransaction]:
        """Begin a transaction; SQLite has one writer at a time."""
        del turn
        with _translated():
            async with self._batches.write() as connection:
                yield SqlTransaction(_Inline(connection, writes=True), self._seal)

    @override
    async def ping(self) -> None:
        async with self.glance() as tx:
            await tx.facts.moment("ping")


class _Once(Connection):
    """Runs exactly one read statement."""

    def __init__(
        self,
        fetch: Callable[[Prepared, Values], Awaitable[list[dict[str, Any]]]],
        dialect: Dialect,
    ) -> None:
        self.dialect = dialect
        self._fetch = fetch
        self._is_done = False

    @override
    async def execute(
        self, statement: Executable, parameters: Sequence[Mapping[str, object]] | None = None
    ) -> CursorResult[Any]:
        raise InternalError("a glance takes one prepared statement; use read or write")

    @override
    async def fetch(self, statement: Prepared, values: Values) -> list[dict[str, Any]]:
        if statement.writes:
            raise InternalError("a glance only reads; use write")
        if self._is_done:
            raise InternalError("a glance takes one statement: two would see different snapshots")
        self._is_done = True
        return await self._fetch(statement, values)

    @override
    async def run(self, statement: Prepared, values: Values) -> int:
        raise InternalError("a glance only reads; use write")


class _Inline(Connection):
    """A connection whose statements run synchronously.

    A read begins with its first statement. A write must have begun before: without a transaction,
    each later statement would be committed separately.
    """

    def __init__(self, connection: SyncConnection, *, writes: bool) -> None:
        self._connection = connection
        self._writes = writes
        self.dialect = connection.dialect

    @override
    async def execute(
        self, statement: Executable, parameters: Sequence[Mapping[str, object]] | None = None
    ) -> CursorResult[Any]:
        if self._writes:
            self._raw()
        return self._connection.execute(statement, parameters)

    @override
    async def fetch(self, statement: Prepared, values: Values) -> list[dict[str, Any]]:
        return statement.fetch(self._raw(), values)

    @override
    async def run(self, statement: Prepared, values: Values) -> int:
        return statement.run(self._raw(), values)

    def _raw(self) -> sqlite3.Connection:
        raw = self._connection.connection.dbapi_connection
        assert isinstance(raw, sqlite3.Connection)
        if not raw.in_transaction:
            if self._writes:
                raise lost()
            begin(raw)
        return raw


class _Remote(Connection):
    """A connection to PostgreSQL, and its driver's connection."""

    def __init__(self, connection: AsyncConnection, raw: Any) -> None:
        self._connection = connection
        self._raw = raw
        self.dialect = connection.dialect

    @override
    async def execute(
        self, statement: Executable, parameters: Sequence[Mapping[str, object]] | None = None
    ) -> CursorResult[Any]:
        return await self._connection.execute(statement, parameters)

    @override
    async def fetch(self, statement: Prepared, values: Values) -> list[dict[str, Any]]:
        return await fetch(self._raw, statement, values)

    @override
    async def run(self, statement: Prepared, values: Values) -> int:
        return await run(self._raw, statement, values)


@asynccontextmanager
async def open_store(
    url: str, *, key: bytes, clock: Clock | None = None, migrates: bool = False
) -> AsyncIterator[Store]:
    """Open the store behind a database URL; make the schema if the database is empty.

    `url` is `sqlite:///PATH` or `postgresql://…`; `key` is the installation's secret key. SQLite
    uses `clock`, by default this host's; PostgreSQL uses its own. With `migrates`, a schema of an
    older version is migrated; a SQLite database is copied first, to `PATH.schema-REVISION`.

    Raises:
        UnavailableError: the database does not answer, or cannot be copied.
        InternalError: the URL is of another kind, or the schema is of a newer Sandyard, or of an
            older one and is not to be migrated.
    """
    async with AsyncExitStack() as held:
        if url.startswith("sqlite:///"):
            path = Path(url.removeprefix("sqlite:///"))
            path.parent.mkdir(parents=True, exist_ok=True)
            # Made before SQLite opens it, for itself and the files beside it: hashes are inside.
            path.touch(mode=0o600)
            # As many readers as ask: to wait for one here would be to wait for ever.
            now = clock.now if clock is not None else SystemClock().now
            reader = _sqlite(path, now, begin="BEGIN", busy_s=BUSY_S, pool_size=4, max_overflow=-1)
            held.callback(reader.dispose)
            begin = "BEGIN IMMEDIATE"
            writer = _sqlite(path, now, begin=begin, busy_s=0, pool_size=1, max_overflow=0)
            held.callback(writer.dispose)
            with _translated(), writer.connect() as connection:
                transaction = await begun(connection)
                schema = _checked(schema_of(connection), migrates=migrates)
                if schema.is_behind:
                    if schema.present is not None:
                        await in_thread(_copy_before, path, schema)
                    upgrade(connection)
                transaction.commit()
            yield SqliteStore(reader, writer, Seal(key))
        elif url.startswith("postgresql://"):
            with _translated():
                await _bring_up_to_date(url, migrates=migrates)
            engine = _postgres(url, **POSTGRES)
            held.push_async_callback(engine.dispose)
            pings = _postgres(url, **POSTGRES | {"pool_size": 1, "max_overflow": 0})
            held.push_async_callback(pings.dispose)
            yield PostgresStore(engine, pings, Seal(key))
        else:
            raise InternalError(
                "cannot open the store: its URL must be sqlite:/// or postgresql://"
            )


async def read_schema(url: str) -> Schema:
    """Return the schema of the database behind a URL, and change nothing.

    Raises: see `open_store`.
    """
    if url.startswith("sqlite:///"):
        path = Path(url.removeprefix("sqlite:///"))
        there = f"file:{path}?mode=ro&uri=true" if path.exists() else ":memory:"
        engine = create_engine(f"sqlite:///{there}", poolclass=NullPool)
        with _translated(), engine.connect() as connection:
            return schema_of(connection)
    remote = _postgres(
        url, poolclass=NullPool, hide_parameters=True, connect_args={"timeout": BUSY_S}
    )
    with _translated():
        async with remote.connect() as connecting:
            return await connecting.run_sync(schema_of)


def _postgres(url: str, **options: Any) -> AsyncEngine:
    parsed, secured = read_postgres_url(url)
    options["connect_args"] = {**options["connect_args"], **secured}
    return create_async_engine(parsed, **options)


async def _bring_up_to_date(url: str, *, migrates: bool) -> None:
    """Make or migrate the schema of a PostgreSQL database, without a time limit."""
    arguments = {"timeout": BUSY_S, "server_settings": {"lock_timeout": str(BUSY_S * 1000)}}
    engine = _postgres(url, poolclass=NullPool, hide_parameters=True, connect_args=arguments)
    async with engine.begin() as connection:
        # One server at a time brings the schema up to date, which may take long; the others then
        # find it so.
        await connection.execute(text("SET LOCAL lock_timeout = 0"))
        await connection.execute(text(f"SELECT pg_advisory_xact_lock({_SCHEMA_LOCK})"))
        schema = _checked(await connection.run_sync(schema_of), migrates=migrates)
        if schema.is_behind:
            # Servers of an earlier version that are still writing would deadlock with it.
            await connection.execute(text(_ALONE))
            await connection.run_sync(upgrade)


def _checked(schema: Schema, *, migrates: bool) -> Schema:
    """Return the schema of a database that may be used.

    Raises:
        InternalError: it is behind, and is not to be migrated.
    """
    if schema.is_ahead:
        log.warning(
            "the database has the schema %s of a newer version; this version continues with %s",
            schema.present,
            schema.newest,
        )
    elif schema.is_behind and schema.present is not None:
        if not migrates:
            raise InternalError(
                f"cannot open the database: its schema is {schema.present}, and this version "
                f"needs {schema.newest}; run `sandyard admin migrate`"
            )
        log.warning("migrating the database from %s to %s", schema.present, schema.newest)
    return schema


def _copy_before(path: Path, schema: Schema) -> None:
    """Copy a SQLite database that is about to be migrated; older copies are removed.

    Raises:
        UnavailableError: it cannot be copied.
    """
    target = path.with_name(f"{path.name}.schema-{schema.present}")
    part = target.with_name(f"{target.name}.part")
    try:
        part.unlink(missing_ok=True)
        part.touch(mode=0o600)
        with (
            closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(part)) as copy,
        ):
            source.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(target)
    except (OSError, sqlite3.Error) as error:
        with suppress(OSError):
            part.unlink()
        raise UnavailableError(
            f"cannot copy the database to {target} before its migration: {error}; free some space"
        ) from error
    for older in path.parent.glob(f"{path.name}.schema-*"):
        if older != target:
            older.unlink(missing_ok=True)
    log.warning("the database before the migration is kept as %s", target)


def _locks(turn: Turn | str) -> str:
    """Return the statement that takes the locks for a turn. Two organizations whose ids map to the
    same number wait for each other needlessly, which is harmless."""
    if turn is Turn.ALONE:
        return _ALONE
    if turn is Turn.SHARED:
        return _BESIDE
    number = crc32(turn.encode()) - 2**31
    return f"{_BESIDE}, pg_advisory_xact_lock({_ORGANIZATION}, {number})"


def _sqlite(
    path: Path, now: Callable[[], datetime], *, begin: str, busy_s: int, **pool: int
) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}",
        poolclass=QueuePool,
        hide_parameters=True,
        connect_args={"check_same_thread": False},
        **pool,
    )

    @event.listens_for(engine, "connect")
    def connect(connection, _record) -> None:  # type: ignore[no-untyped-def]  # a DBAPI's own
        # The driver must not begin implicitly: it would begin a reading transaction, and a write
        # in it fails when another has written meanwhile (sqlite.org/lang_transaction.html).
        connection.isolation_level = None
        connection.create_function(NOW, 0, lambda: microseconds(now()))
        connection.create_function(HOLDS, 2, _holds, deterministic=True)
        cursor = connection.cursor()
        for pragma in (
            f"busy_timeout={BUSY_S * 1000}",
            "journal_mode=WAL",
            "synchronous=FULL",
            "foreign_keys=ON",
            f"busy_timeout={busy_s * 1000}",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin_(connection) -> None:  # type: ignore[no-untyped-def]  # SQLAlchemy's own
        # A prepared statement begins implicitly, and reads as of the same moment.
        if not connection.connection.dbapi_connection.in_transaction:
            connection.exec_driver_sql(begin)

    return engine


def _holds(whole: str, part: str) -> bool:
    """See tables.holds."""
    return _contains(json.loads(whole), json.loads(part))


def _contains(whole: object, part: object) -> bool:
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(
            name in whole and _contains(whole[name], value) for name, value in part.items()
        )
    if isinstance(part, list):
        return isinstance(whole, list) and all(
            any(_contains(found, one) for found in whole) for one in part
        )
    # 1 and True are equal in Python, and not in JSON.
    return isinstance(whole, bool) == isinstance(part, bool) and whole == part


def _distrust(error: object) -> ssl.SSLCertVerificationError | None:
    """Return why the database's certificate was refused, if it was."""
    cause = error.orig if isinstance(error, DBAPIError) else error
    return cause if isinstance(cause, ssl.SSLCertVerificationError) else None


def _is_silence(error: BaseException | None) -> bool:
    """Tell whether a database did not answer at all: one that refuses may serve others."""
    if isinstance(error, DBAPIError):
        return error.connection_invalidated and _distrust(error) is None
    return isinstance(error, OSError | TimeoutError) and _distrust(error) is None


def _is_passing(error: DBAPIError) -> bool:
    """Tell whether an error is temporary: the database is unreachable, shutting down, out of
    resources or busy.

    The error classes are PostgreSQL's (appendix A of its manual): connection, resources, operator
    intervention, statement timeout, lock timeout, deadlock.
    """
    state = str(getattr(error.orig, "sqlstate", None) or "")
    passing = ("08", "53", "57P", "57014", "55P03", "40P01")
    return error.connection_invalidated or state.startswith(passing)


class _translated:  # noqa: N801 - used as a statement, like contextlib.suppress
    """Translates the database's errors into ours."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, IntegrityError):
            raise InternalError(f"the database refused a row: {error.orig}") from error
        if (refusal := _distrust(error)) is not None:
            raise UnavailableError(
                f"cannot trust the database's certificate: {refusal.verify_message}; check sslmode "
                "and sslrootcert in store.url"
            ) from error
        if isinstance(error, DBAPIError) and error.statement == COMMIT:
            raise UnavailableError(
                "the connection to the database was lost during a write, and its outcome is "
                "unknown; check it before you repeat the request"
            ) from error
        if isinstance(error, DBAPIError) and _is_passing(error):
            if not error.connection_invalidated:
                log.warning("the database refused a statement for now: %s", error.orig)
            raise UnavailableError("the database does not answer now; try again") from error
        if isinstance(
            error, OperationalError | InterfaceError | PoolTimeoutError | OSError | TimeoutError
        ):
            if "disk is full" in str(error):
                raise UnavailableError(
                    "cannot save this: the host's disk is full; delete sandboxes or snapshots, "
                    "or free some space on the host"
                ) from error
            raise UnavailableError("the database does not answer now; try again") from error
        if isinstance(error, DBAPIError):
            raise InternalError(f"the database failed: {error.orig}") from error
