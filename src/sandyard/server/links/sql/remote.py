"""Transactions on PostgreSQL with few round trips.

SQLAlchemy tests a connection in a transaction of its own before each use and sends BEGIN
separately: four round trips where one statement is needed. Here the message that begins a
transaction also takes its locks and shows whether the connection is alive. If it is not, nothing
was done, and another connection is used. A single read statement runs without a transaction.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, Final, TypeVar

import asyncpg
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from sandyard.server.links.sql.batches import BUSY_S
from sandyard.server.links.sql.prepared import POSTGRES, Prepared, StatementPlan, Values
from sandyard.server.tasks import to_the_end

READ: Final = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"
WRITE: Final = "BEGIN ISOLATION LEVEL READ COMMITTED"
COMMIT: Final = "COMMIT"
_OUTAGES: Final = "outages before it was opened"
# The last is the driver's error for a connection that was ended while it was idle.
_LOST = (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, asyncpg.InternalClientError)
_GONE = (*_LOST, OSError)
_OF_THE_DRIVER = (*_LOST, asyncpg.PostgresError)
_END_S: Final = 5.0
ANSWER_S: Final = 3.0 * BUSY_S
"""How long any one answer may take: each of two locks may be waited for for `BUSY_S`."""
_T = TypeVar("_T")


class Transactions:
    """Transactions on an engine whose pool does not test connections."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        self.is_given_up = False
        self._outages = 0
        self._beginning: set[asyncio.Timeout] = set()
        self._in_progress: set[Any] = set()  # the driver's connections

    def give_up(self) -> None:
        """Fail what is in progress, and whatever begins before `resume`: the database does not
        answer. What waits for a connection, an answer or a lock fails at once."""
        self.is_given_up = True
        self._outages += 1
        for raw in self._in_progress:
            raw.terminate()
        for limit in self._beginning:
            if limit.when() is None:  # it may be ending since the last time
                limit.reschedule(asyncio.get_running_loop().time())

    def resume(self) -> None:
        """Undo `give_up`: the database answers again."""
        self.is_given_up = False

    @asynccontextmanager
    async def begun(self, words: str) -> AsyncIterator[AsyncConnection]:
        """Run the block in a transaction that begins with these statements, and commit it. An error
        inside the block rolls it back.

        Raises:
            DBAPIError: the database does not answer, or refuses; if its `statement` is COMMIT, the
                outcome is unknown.
        """
        connection, raw, _ = await self._first(partial(_begin, words=words), words)
        self._in_progress.add(raw)
        try:
            yield connection
            await to_the_end(_commit(raw))
        except BaseException:
            await to_the_end(_undo(connection, raw))
            raise
        finally:
            self._in_progress.discard(raw)
        await to_the_end(_give_back(connection))

    async def fetch(self, statement: Prepared, values: Values) -> list[dict[str, Any]]:
        """Run one read statement without a transaction, and return its rows.

        Raises:
            DBAPIError: the database does not answer, or refuses.
        """
        plan = statement.plan(POSTGRES, values)
        run = partial(_fetch, plan=plan, values=values)
        connection, _, found = await self._first(run, plan.text)
        await to_the_end(_give_back(connection))
        return found

    async def _first(
        self, run: Callable[[Any], Awaitable[_T]], words: str
    ) -> tuple[AsyncConnection, Any, _T]:
        """Return a connection, its driver's connection, and the result of a first statement on it.

        The statement is repeated on another connection if the first one turns out to be dead.

        Raises:
            TimeoutError: the database was given up.
        """
        if self.is_given_up:
            raise TimeoutError
        async with asyncio.timeout(None) as limit:
            self._beginning.add(limit)
            try:
                return await self._tried(run, words)
            finally:
                self._beginning.discard(limit)

    async def _tried(
        self, run: Callable[[Any], Awaitable[_T]], words: str
    ) -> tuple[AsyncConnection, Any, _T]:
        while True:
            try:
                connection = await self._engine.connect()
            except _OF_THE_DRIVER as error:
                raise _as_sqlalchemys(error, words) from error
            raw: Any = None
            was_used = False
            try:
                fairy = await connection.get_raw_connection()
                raw, was_used = fairy.driver_connection, _OUTAGES in fairy.info
                if fairy.info.setdefault(_OUTAGES, self._outages) != self._outages:
                    # Its other end may be a host that is gone, which would be noticed late.
                    raw.terminate()
                    raise asyncpg.InterfaceError("it was opened before an outage")
                if raw.is_in_transaction():
                    raise asyncpg.InterfaceError("it was given back in a transaction")
                answer = await run(raw)
            except _GONE as error:
                await to_the_end(_drop(connection))
                # It was opened before the database was unavailable, as were up to all others in the
                # pool. If the database does not answer, it does not answer on the others either.
                if was_used and not isinstance(error, TimeoutError):
                    continue
                raise _as_sqlalchemys(error, words) from error
            except asyncpg.PostgresError as error:
                await to_the_end(_undo(connection, raw))
                raise _as_sqlalchemys(error, words) from error
            except BaseException:
                if self.is_given_up and raw is not None:
                    raw.terminate()  # or the driver would wait for the other end to close
                await to_the_end(_drop(connection))
                raise
            return connection, raw, answer


async def fetch(raw: Any, statement: Prepared, values: Values) -> list[dict[str, Any]]:
    """Run a statement in a transaction, and return its rows.

    Raises:
        DBAPIError: the database does not answer, or refuses.
    """
    plan = statement.plan(POSTGRES, values)
    try:
        return await _fetch(raw, plan, values)
    except _OF_THE_DRIVER as error:
        raise _as_sqlalchemys(error, plan.text) from error


async def run(raw: Any, statement: Prepared, values: Values) -> int:
    """Run a statement in a transaction, and return how many rows it changed; see `fetch`."""
    plan = statement.plan(POSTGRES, values)
    try:
        done = await raw.execute(plan.text, *plan.bound(values))
    except _OF_THE_DRIVER as error:
        raise _as_sqlalchemys(error, plan.text) from error
    return int(done.rpartition(" ")[2])  # "UPDATE 1", "INSERT 0 1"


async def _fetch(raw: Any, plan: StatementPlan, values: Values) -> list[dict[str, Any]]:
    return [plan.row(row) for row in await raw.fetch(plan.text, *plan.bound(values))]


async def _begin(raw: Any, words: str) -> None:
    await raw.execute(words)


async def _commit(raw: Any) -> None:
    """Commit. This must not be cancelled, or the outcome would be unknown."""
    try:
        if raw.is_closed() or not raw.is_in_transaction():
            raise asyncpg.InterfaceError("there is no transaction any more")
        done = await raw.execute(COMMIT, timeout=BUSY_S)
    except (*_OF_THE_DRIVER, OSError) as error:
        raise _as_sqlalchemys(error, COMMIT) from error
    if done != COMMIT:
        trouble = asyncpg.InterfaceError(f"the transaction ended as {done}")
        raise DBAPIError("", None, trouble, hide_parameters=True)


async def _undo(connection: AsyncConnection, raw: Any) -> None:
    """Roll a transaction back; if that fails, drop the connection."""
    try:
        if raw.is_in_transaction():
            await raw.execute("ROLLBACK", timeout=_END_S)
    except Exception:  # noqa: BLE001 - whatever it is, the database undoes what is not committed
        await _drop(connection)
    else:
        await _give_back(connection)


async def _give_back(connection: AsyncConnection) -> None:
    try:
        async with asyncio.timeout(_END_S):
            await connection.close()
    except TimeoutError:  # one beyond the pool's size is closed, and the other end says nothing
        await _drop(connection)


async def _drop(connection: AsyncConnection) -> None:
    await connection.invalidate()
    await connection.close()


def _as_sqlalchemys(error: BaseException, statement: str) -> DBAPIError:
    # What other servers made of the schema in the meantime is known from here on.
    is_passing = isinstance(error, (*_GONE, asyncpg.InvalidCachedStatementError))
    is_refused = isinstance(error, asyncpg.IntegrityConstraintViolationError)
    return (IntegrityError if is_refused else DBAPIError)(
        statement,
        None,
        error,
        hide_parameters=True,
        connection_invalidated=is_passing,
    )
