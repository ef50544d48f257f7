"""A PostgreSQL server of the test run's own, and a fresh database in it for each test."""

import asyncio
import glob
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import asyncpg
import pytest

from sandyard.server.core.ids import new_sandbox_id
from sandyard.server.links.sql import open_store

_server: dict[str, int] = {}
_MIGRATED = "migrated"


@asynccontextmanager
async def postgres_url(*, is_migrated: bool = False) -> AsyncIterator[str]:
    """Yield the URL of a fresh database, empty or with the schema of this version in it."""
    port = _server.get("port")
    if port is None:
        pytest.fail("the PostgreSQL of this run was not started")
    admin = await asyncpg.connect(f"postgresql://postgres@127.0.0.1:{port}/postgres")
    try:
        name = new_sandbox_id().replace("-", "_")
        base = await _migrated(admin, port) if is_migrated else "template1"
        await admin.execute(f"CREATE DATABASE {name} TEMPLATE {base}")
        yield f"postgresql://postgres@127.0.0.1:{port}/{name}"
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await admin.close()


async def _migrated(admin: asyncpg.Connection, port: int) -> str:
    """Return the name of a database with the schema in it, made once."""
    if await admin.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", _MIGRATED) is None:
        await admin.execute(f"CREATE DATABASE {_MIGRATED}")
        url = f"postgresql://postgres@127.0.0.1:{port}/{_MIGRATED}"
        async with open_store(url, key=b"k" * 32):
            pass
    return _MIGRATED


def start_server(port: int, *, is_durable: bool = False) -> Path:
    """Start a server on loopback and return its folder; one that `is_durable` waits for the disk at
    each commit."""
    found = sorted(glob.glob("/usr/lib/postgresql/*/bin/initdb"))
    if not found:
        pytest.fail("PostgreSQL is not installed; scripts/test installs it")
    programs = Path(found[-1]).parent
    folder = Path(tempfile.mkdtemp(prefix="sandyard-pg-"))
    account = pwd.getpwnam("postgres") if os.geteuid() == 0 else None
    if account is not None:
        os.chown(folder, account.pw_uid, account.pw_gid)
    data = folder / "data"

    def run(*command: str | Path) -> None:
        subprocess.run(
            [str(one) for one in command], check=True, capture_output=True, cwd=folder,
            user=account.pw_uid if account else None, group=account.pw_gid if account else None,
            timeout=60,
        )  # fmt: skip

    run(programs / "initdb", "-D", data, "-A", "trust", "-U", "postgres", "--no-sync")
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= "
    options += f"-c fsync={'on' if is_durable else 'off'}"
    run(programs / "pg_ctl", "-D", data, "-w", "-o", options, "-l", folder / "log", "start")
    _server["port"] = port
    return folder


def stop_server(folder: Path) -> None:
    """Stop the server and remove its folder."""
    pid = int((folder / "data/postmaster.pid").read_text().split()[0])
    os.kill(pid, 3)
    while Path(f"/proc/{pid}").exists():
        asyncio.run(asyncio.sleep(0.02))
    shutil.rmtree(folder)
    _server.clear()
