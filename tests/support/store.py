"""Databases for tests, with the schema in them: made once a run, copied for each test."""

import asyncio
import functools
import re
import tempfile
import threading
from datetime import datetime
from pathlib import Path

import asyncpg

from sandyard.server.core.contracts.store import Transaction
from sandyard.server.core.records import InUse, SandboxQuery
from sandyard.server.core.shapes import Shape, ShapeSeconds
from sandyard.server.core.states import HIDDEN, Status
from sandyard.server.links.sql import open_store

_ACTIVE = {
    Status.PENDING, Status.CREATING, Status.RUNNING, Status.PAUSING, Status.RESUMING,
    Status.SUSPECTED_MISSING,
}  # fmt: skip


@functools.cache
def _migrated() -> bytes:
    """Return a SQLite file with the schema of this version in it and nothing else."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "store.db"

        async def make() -> None:
            async with open_store(f"sqlite:///{path}", key=b"k" * 32):
                pass

        # In a thread, for callers inside a loop.
        thread = threading.Thread(target=lambda: asyncio.run(make()))
        thread.start()
        thread.join()
        return path.read_bytes()


def place_database(path: Path) -> None:
    """Put a database with the schema at a path where there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch(mode=0o600)
        path.write_bytes(_migrated())


async def written_in(url: str) -> bytes:
    """Return all that a database holds, as whoever took it away could read it."""
    if url.startswith("sqlite"):
        path = Path(url.removeprefix("sqlite:///"))
        return b"".join(one.read_bytes() for one in path.parent.glob(f"{path.name}*"))
    connection = await asyncpg.connect(url)
    try:
        tables = await connection.fetch(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'"
        )
        said = [
            row[0]
            for table in tables
            for row in await connection.fetch(f'SELECT one::text FROM "{table[0]}" one')
        ]
    finally:
        await connection.close()
    text = "\n".join(said)
    # Bytes are written as digits.
    hidden = re.findall(r"\\\\?x((?:[0-9a-f]{2})+)", text)
    return b"\n".join([text.encode(), *(bytes.fromhex(one) for one in hidden)])


async def recounted(tx: Transaction, org_id: str, now: datetime) -> InUse:
    """Return what `UsageRows.in_use` must be, from the rows themselves, as it was at a moment."""
    every = frozenset(Status)
    boxes = await tx.sandboxes.page(SandboxQuery(org_id, limit=1_000_000, statuses=every))
    live = [one for one in boxes if one.status not in HIDDEN | {Status.DESTROYING}]
    active = [one.shape for one in live if one.status in _ACTIVE]
    paid = [one.shape for one in live if one.status in _ACTIVE and not one.is_test]
    owed, posted = [0, 0, 0], 0
    for one in await tx.usage.unsettled(org_id):
        if not one.is_free:
            until = one.ended_at or now
            seconds = int(until.timestamp()) - int(one.started_at.timestamp())
            for place, value in enumerate(_values(one.shape)):
                owed[place] += value * seconds
            posted += one.posted
    return InUse(
        active=len(active),
        vcpus=sum(one.vcpus for one in active),
        memory_mib=sum(one.memory_mib for one in active),
        disk_mib=sum(one.shape.disk_mib for one in live),
        tests=sum(one.is_test for one in live),
        paid=Shape(*(sum(_values(one)[place] for one in paid) for place in range(3))),
        owed=ShapeSeconds(*(max(0, one) for one in owed)),
        posted=posted,
    )


def _values(shape: Shape) -> tuple[int, int, int]:
    return shape.vcpus, shape.memory_mib, shape.disk_mib
