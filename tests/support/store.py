"""Databases for tests, with the schema in them: made once a run, copied for each test."""

import asyncio
import functools
import tempfile
import threading
from pathlib import Path

from sandyard.server.links.sql import open_store


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
