"""Transactions on PostgreSQL in as few words as it takes.

SQLAlchemy asks a connection whether it is still there, in a transaction of its own, before each
that is wanted, and begins that by a word of its own: four answers to wait for where one statement
is to be run. Here the word that begins a transaction also takes the locks that it needs, and shows
whether the connection is still there. If not, nothing was done, and another one is taken.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import asyncpg
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from sandyard.server.links.sql.batches import BUSY_S
from sandyard.server.tasks import to_the_end

READ: Final = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"
WRITE: Final = "BEGIN ISOLATION LEVEL READ COMMITTED"
COMMIT: Final = "COMMIT"
_USED: Final = "was used"
# The last is what the driver says of a connection that was ended while nobody used it.
_LOST = (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, asyncpg.InternalClientError)
_GONE = (*_LOST, OSError)
_OF_THE_DRIVER = (*_LOST, asyncpg.PostgresError)
_BEGIN_S: Final = 3.0 * BUSY_S  # each of two locks may be waited for so long
_END_S: Final = 5.0


async def note_used(connection: AsyncConnection) -> None:
    """Note that a connection is none of those just made, and may be gone when it is next taken."""
    (await connection.get_raw_connection()).info[_USED] = True


class Transactions:
    """Transactions on an engine whose pool does not ask connections whether they are there."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")

    @asynccontextmanager
    async def begun(self, words: str) -> AsyncIterator[AsyncConnection]:
        """Run the block in a transaction that begins with these words, and commit it; the block's
        own error undoes it.

        Raises:
            DBAPIError: the database does not answer, or refuses; if its `statement` is COMMIT,
                nobody knows whether the transaction counts.
        """
        connection, raw = await self._first(words)
        try:
            yield connection
            await to_the_end(_commit(raw))
        except BaseException:
            await to_the_end(_undo(connection, raw))
            raise
        await to_the_end(_give_back(connection))

    async def _first(self, words: str) -> tuple[AsyncConnection, Any]:
        """Return a connection in a transaction, and what it is to the driver."""
        while True:
            try:
                connection = await self._engine.connect()
            except _OF_THE_DRIVER as error:
                raise _as_sqlalchemys(error, words) from error
            raw: Any = None
            was_used = False
            try:
                fairy = await connection.get_raw_connection()
                raw, was_used = fairy.driver_connection, _USED in fairy.info
                fairy.info[_USED] = True
                if raw.is_in_transaction():
                    raise asyncpg.InterfaceError("it was given back in a transaction")
                await raw.execute(words, timeout=_BEGIN_S)
            except _GONE as error:
                await to_the_end(_drop(connection))
                # One from before the database was away; of those there are as many as the pool
                # has. A database that says nothing says nothing to the others either.
                if was_used and not isinstance(error, TimeoutError):
                    continue
                raise _as_sqlalchemys(error, words) from error
            except asyncpg.PostgresError as error:
                await to_the_end(_undo(connection, raw))
                raise _as_sqlalchemys(error, words) from error
            except BaseException:
                await to_the_end(_drop(connection))
                raise
            return connection, raw


async def _commit(raw: Any) -> None:
    """Commit; not to be broken off, or nobody would know what came of it."""
    try:
        if not raw.is_in_transaction():
            raise asyncpg.InterfaceError("there is no transaction any more")
        done = await raw.execute(COMMIT, timeout=BUSY_S)
    except (*_OF_THE_DRIVER, OSError) as error:
        raise _as_sqlalchemys(error, COMMIT) from error
    if done != COMMIT:
        trouble = asyncpg.InterfaceError(f"the transaction ended as {done}")
        raise DBAPIError("", None, trouble, hide_parameters=True)


async def _undo(connection: AsyncConnection, raw: Any) -> None:
    """End a transaction without a trace, and with it the connection if it cannot be done."""
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
    return DBAPIError(
        statement,
        None,
        error,
        hide_parameters=True,
        connection_invalidated=isinstance(error, _GONE),
    )
