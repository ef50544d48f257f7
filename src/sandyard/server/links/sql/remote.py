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

from sandyard.server.tasks import to_the_end

READ: Final = "BEGIN ISOLATION LEVEL REPEATABLE READ, READ ONLY"
WRITE: Final = "BEGIN ISOLATION LEVEL READ COMMITTED"
# The last is what the driver says of a connection that was ended while nobody used it.
_LOST = (asyncpg.PostgresConnectionError, asyncpg.InterfaceError, asyncpg.InternalClientError)
_GONE = (*_LOST, OSError)
_OF_THE_DRIVER = (*_LOST, asyncpg.PostgresError)
_END_S = 5.0


class Transactions:
    """Transactions on an engine whose pool does not ask connections whether they are there."""

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine.execution_options(isolation_level="AUTOCOMMIT")

    @asynccontextmanager
    async def begun(self, words: str) -> AsyncIterator[AsyncConnection]:
        """Run the block in a transaction that begins with these words, and commit it; the block's
        own error undoes it.

        Raises:
            DBAPIError: the database does not answer, or refuses.
        """
        connection, raw = await self._first(words)
        try:
            yield connection
            if (done := await raw.execute("COMMIT")) != "COMMIT":
                raise DBAPIError("COMMIT", None, Exception(f"it ended as {done}"))
        except BaseException as error:
            await to_the_end(_undo(connection, raw))
            if isinstance(error, _OF_THE_DRIVER):
                raise _as_sqlalchemys(error) from error
            raise
        await to_the_end(connection.close())

    async def _first(self, words: str) -> tuple[AsyncConnection, Any]:
        """Return a connection in a transaction, and what it is to the driver."""
        while True:
            connection = await self._engine.connect()
            is_fresh = True
            try:
                fairy = await connection.get_raw_connection()
                raw: Any = fairy.driver_connection
                is_fresh = "has_begun" not in fairy.info
                fairy.info["has_begun"] = True
                await raw.execute(words)
            except BaseException as error:
                await to_the_end(_drop(connection))
                # One from before the database was away; of those there are as many as the pool has.
                if isinstance(error, _GONE) and not is_fresh:
                    continue
                if isinstance(error, _OF_THE_DRIVER):
                    raise _as_sqlalchemys(error) from error
                raise
            return connection, raw


async def _undo(connection: AsyncConnection, raw: Any) -> None:
    """End a transaction without a trace, and with it the connection if it cannot be done."""
    try:
        async with asyncio.timeout(_END_S):
            await raw.execute("ROLLBACK")
    except Exception:  # noqa: BLE001 - whatever it is, the database undoes what is not committed
        await _drop(connection)
    else:
        await connection.close()


async def _drop(connection: AsyncConnection) -> None:
    await connection.invalidate()
    await connection.close()


def _as_sqlalchemys(error: BaseException) -> DBAPIError:
    return DBAPIError(
        "BEGIN", None, error, hide_parameters=True, connection_invalidated=isinstance(error, _GONE)
    )
