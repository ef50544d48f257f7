"""Writes that share a commit: each is whole, told once it is durable, and fails alone."""

import asyncio
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, event
from sqlalchemy.exc import OperationalError
from sqlalchemy.pool import QueuePool

from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.errors import UnavailableError
from sandyard.server.links.sql import open_store
from sandyard.server.links.sql.batches import Batches

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def engine_of(path: Path, begin: str) -> Engine:
    engine = create_engine(
        f"sqlite:///{path}",
        poolclass=QueuePool,
        connect_args={"check_same_thread": False},
        pool_size=1,
        max_overflow=0,
    )

    @event.listens_for(engine, "connect")
    def connect(connection: Any, _record: object) -> None:
        connection.isolation_level = None
        connection.execute("PRAGMA journal_mode=WAL")

    @event.listens_for(engine, "begin")
    def begin_(connection: Any) -> None:
        connection.exec_driver_sql(begin)

    return engine


class Bench:
    """A table of numbers, written in batches and read by a connection of another engine."""

    def __init__(self, folder: Path) -> None:
        self.writer = engine_of(folder / "db", "BEGIN IMMEDIATE")
        self._reader = engine_of(folder / "db", "BEGIN")
        self.batches = Batches(self.writer)
        self.commits = 0
        self.trouble: Exception | None = None
        with self.writer.connect() as connection, connection.begin():
            connection.exec_driver_sql("CREATE TABLE numbers (it INTEGER PRIMARY KEY)")

        @event.listens_for(self.writer, "commit")
        def count(_: object) -> None:
            self.commits += 1
            if self.trouble is not None:
                raise self.trouble

    async def write(self, *numbers: int, fails: bool = False, pause_s: float = 0.0) -> None:
        async with self.batches.write() as connection:
            for number in numbers:
                connection.exec_driver_sql("INSERT INTO numbers VALUES (?)", (number,))
            await asyncio.sleep(pause_s)
            if fails:
                raise ValueError
        assert set(numbers) <= self.read(), "told before it was durable"

    def read(self) -> set[int]:
        with self._reader.connect() as connection:
            return {row[0] for row in connection.exec_driver_sql("SELECT it FROM numbers")}

    def close(self) -> None:
        self.writer.dispose()
        self._reader.dispose()


@pytest.fixture
def bench(tmp_path: Path) -> Iterator[Bench]:
    made = Bench(tmp_path)
    yield made
    made.close()


async def test_what_is_written_at_once_shares_commits(bench: Bench) -> None:
    async with asyncio.TaskGroup() as tasks:
        for number in range(50):
            tasks.create_task(bench.write(number))
    assert bench.read() == set(range(50))
    assert bench.commits <= 3


async def test_one_that_fails_takes_no_other_along(bench: Bench) -> None:
    wanted = [(number, number % 3 == 0) for number in range(30)]
    outcomes = await asyncio.gather(
        *(bench.write(number, fails=fails) for number, fails in wanted), return_exceptions=True
    )
    assert [isinstance(one, ValueError) for one in outcomes] == [fails for _, fails in wanted]
    assert bench.read() == {number for number, fails in wanted if not fails}


@pytest.mark.parametrize("which", [0, 1, 4])
async def test_one_that_is_cancelled_takes_no_other_along(bench: Bench, which: int) -> None:
    writing = [asyncio.create_task(bench.write(n, pause_s=0.005)) for n in range(5)]
    async with asyncio.timeout(5):
        while not writing[which].done() and bench.batches._batch is None:
            await asyncio.sleep(0.001)
    writing[which].cancel()
    outcomes = await asyncio.gather(*writing, return_exceptions=True)
    others = {number for number in range(5) if number != which}
    assert all(outcomes[number] is None for number in others)
    assert others <= bench.read()
    await bench.write(100)


async def test_a_commit_that_fails_is_told_to_all_of_it_and_the_next_goes_on(bench: Bench) -> None:
    bench.trouble = OperationalError(None, None, Exception("database or disk is full"))
    outcomes = await asyncio.gather(*(bench.write(n) for n in range(10)), return_exceptions=True)
    assert all(isinstance(one, OperationalError) for one in outcomes)
    assert bench.read() == set()
    bench.trouble = None
    await bench.write(1)
    assert bench.read() == {1}


async def test_writes_that_the_database_undid_are_never_told_as_done(bench: Bench) -> None:
    async def undo() -> None:
        async with bench.batches.write() as connection:
            # What SQLite does by itself on a full disk, and the one who wrote saw nothing of.
            connection.connection.dbapi_connection.execute("ROLLBACK")  # type: ignore[union-attr]

    for before in (0, 3):
        outcomes = await asyncio.gather(
            *(bench.write(n) for n in range(before)), undo(), return_exceptions=True
        )
        assert all(isinstance(one, OperationalError) for one in outcomes), outcomes
        assert bench.read() == set()
    await bench.write(7)
    assert bench.read() == {7}


async def test_a_commit_that_is_broken_off_before_it_began_holds_up_nobody(bench: Bench) -> None:
    async def hold() -> None:
        async with bench.batches.write() as connection:
            connection.exec_driver_sql("INSERT INTO numbers VALUES (2)")
            for one in asyncio.all_tasks():  # as where the loop is shut down
                if getattr(one.get_coro(), "__qualname__", "") == "Batches._commit":
                    one.cancel()
            await asyncio.sleep(0.01)

    async with asyncio.timeout(60):
        outcomes = await asyncio.gather(bench.write(1), hold(), return_exceptions=True)
        assert isinstance(outcomes[0], asyncio.CancelledError), outcomes
        assert isinstance(outcomes[1], Exception), outcomes
        await bench.write(3)
    assert bench.read() == {3}


async def test_what_cannot_be_undone_is_committed_by_nobody(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(_: object) -> None:
        raise OperationalError(None, None, Exception("no such savepoint"))

    monkeypatch.setattr("sandyard.server.links.sql.batches._Batch.undo", broken)
    outcomes = await asyncio.gather(
        bench.write(1), bench.write(2, fails=True), return_exceptions=True
    )
    assert isinstance(outcomes[0], OperationalError)
    assert isinstance(outcomes[1], ValueError)
    assert bench.read() == set()
    await bench.write(3)
    assert bench.read() == {3}


async def test_what_is_written_after_the_database_undid_it_is_not_written(tmp_path: Path) -> None:
    async with open_store(f"sqlite:///{tmp_path}/db", key=b"k" * 32) as store:
        with pytest.raises(UnavailableError):
            async with store.write(Turn.ALONE) as tx:
                await tx.facts.note("one", NOW)
                connection: Any = tx.facts
                connection._connection._raw().execute("ROLLBACK")
                with pytest.raises(OperationalError):
                    await tx.facts.note("two", NOW)
                await tx.credits.account("nobody")  # prepared, which would begin by itself
        async with store.read() as tx:
            assert await tx.facts.moment("one") is None
            assert await tx.facts.moment("two") is None
