"""Group commits for SQLite: several writes share one commit and so one wait for the disk.

Each write has its turn and a savepoint, so that a failing write does not affect the others. The
first write of a batch requests the commit, which queues behind the writes that are waiting by then;
those belong to the same batch. A write returns only after its batch was committed.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import Connection, Engine
from sqlalchemy.engine import RootTransaction
from sqlalchemy.exc import OperationalError

from sandyard.server.tasks import in_thread, outcome_of, to_the_end

BUSY_S = 10
"""How long a writer waits for the others before it gives up."""
_LOOK_AGAIN_S = 0.01


class _Batch:
    """Writes that are committed together or not at all."""

    def __init__(self, connection: Connection, transaction: RootTransaction) -> None:
        self.connection = connection
        self.transaction = transaction
        self.committed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    @property
    def is_whole(self) -> bool:
        """Whether the writes still exist: SQLite rolls the whole transaction back on some errors,
        such as a full disk (sqlite.org/lang_transaction.html, section 3.1)."""
        if self.connection.closed or self.connection.invalidated:
            return False
        return bool(self.connection.connection.dbapi_connection.in_transaction)  # type: ignore[union-attr]  # sqlite3's own

    def mark(self) -> None:
        self.connection.exec_driver_sql("SAVEPOINT write")

    def keep(self) -> None:
        self.connection.exec_driver_sql("RELEASE write")

    def undo(self) -> None:
        self.connection.exec_driver_sql("ROLLBACK TO write")
        self.keep()

    def end(self, error: BaseException | None = None) -> None:
        """Return the connection and pass the outcome on to all that wait for it."""
        try:
            if error is not None:
                # In whatever state: the next batch opens another.
                self.connection.invalidate()
            elif self.transaction.is_active:
                self.transaction.rollback()
        finally:
            self.connection.close()
            if error is None:
                self.committed.set_result(None)
            else:
                self.committed.set_exception(error)
                self.committed.exception()  # retrieved, in case nothing waits for it any more


class Batches:
    """Commits transactions in batches. `engine` has one connection, whose transactions write."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._turn = asyncio.Lock()
        self._batch: _Batch | None = None

    @asynccontextmanager
    async def write(self) -> AsyncIterator[Connection]:
        """Take a turn to write; the writes are durable when the block has been left.

        An error inside the block undoes its own writes only.

        Raises:
            TimeoutError: other writers did not finish in time.
            OperationalError: the batch could not be committed.
        """
        async with asyncio.timeout(BUSY_S):
            await self._turn.acquire()
        try:
            batch, is_first = self._batch, False
            if batch is None:
                batch, is_first = await self._begun(), True
            else:
                batch.mark()
            try:
                yield batch.connection
                if not is_first:
                    batch.keep()
            except BaseException as error:
                self._undo(batch, error, is_first=is_first)
                raise
            self._batch = batch
        finally:
            self._turn.release()
        if is_first:
            try:
                await to_the_end(self._commit(batch))
            finally:
                self._give_up(batch)  # if the commit was cancelled before it began
        await outcome_of(batch.committed)

    def _undo(self, batch: _Batch, error: BaseException, *, is_first: bool) -> None:
        if is_first:
            batch.end()
            return
        try:
            if not batch.is_whole:
                raise lost()
            batch.undo()
        except OperationalError as trouble:
            self._give_up(batch, error if isinstance(error, OperationalError) else trouble)

    def _give_up(self, batch: _Batch, error: OperationalError | None = None) -> None:
        """Fail all writes of a batch whose outcome is still open."""
        if self._batch is batch:
            self._batch = None
        if not batch.committed.done():
            batch.end(error or lost())

    async def _commit(self, batch: _Batch) -> None:
        async with self._turn:
            if self._batch is not batch:  # it was lost meanwhile, and its waiters know
                return
            self._batch = None
            try:
                if not batch.is_whole:
                    raise lost()
                await in_thread(batch.transaction.commit)
            except asyncio.CancelledError:
                # The thread completed it, so its result is known.
                batch.end(lost() if batch.is_whole else None)
                raise
            except Exception as error:  # noqa: BLE001 - passed to every writer, and raised there
                batch.end(error)
            else:
                batch.end()

    async def _begun(self) -> _Batch:
        connection = self._engine.connect()
        try:
            return _Batch(connection, await begun(connection))
        except BaseException:
            connection.close()
            raise


def lost() -> OperationalError:
    """Return the error for writes that SQLite rolled back on its own."""
    return OperationalError(None, None, Exception("the transaction was rolled back"))


async def begun(connection: Connection) -> RootTransaction:
    """Begin a write transaction; if another process is writing, wait without blocking this
    process."""
    until = asyncio.get_running_loop().time() + BUSY_S
    while True:
        try:
            return connection.begin()
        except OperationalError as error:
            if "locked" not in str(error.orig) or asyncio.get_running_loop().time() > until:
                raise
        await asyncio.sleep(_LOOK_AGAIN_S)
