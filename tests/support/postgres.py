"""A PostgreSQL server of the test run's own, and a database in it for each test."""

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
_emptied: list[str] = []
_schema: list[str] = []
_MIGRATED = "migrated"
# All that a migration makes, and the versions that are noted.
_SCHEMA = """
SELECT md5(string_agg(line, ';' ORDER BY line)) FROM (
    SELECT concat_ws(' ', table_name, column_name, data_type, is_nullable, column_default)
        FROM information_schema.columns WHERE table_schema = 'public'
    UNION ALL SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'
    UNION ALL SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
    UNION ALL SELECT concat_ws(' ', conrelid::regclass, conname, pg_get_constraintdef(oid))
        FROM pg_constraint WHERE connamespace = 'public'::regnamespace
    UNION ALL SELECT proname || prosrc FROM pg_proc WHERE pronamespace = 'public'::regnamespace
    UNION ALL SELECT 'at ' || version_num FROM alembic_version
    UNION ALL SELECT 'floor ' || revision FROM schema_floor
) AS lines (line)
"""


@asynccontextmanager
async def postgres_url(*, is_new: bool = False, is_unused: bool = False) -> AsyncIterator[str]:
    """Yield the URL of a database with the schema of this version in it, or of a new one; no table
    has rows. PostgreSQL plans statements by what it knows of tables: an `is_unused` database has
    had no rows before either."""
    if "port" not in _server:
        pytest.fail("the PostgreSQL of this run was not started")
    async with _connected("postgres") as admin:
        # To make one takes longer than most tests that use it.
        if _emptied and not is_new and not is_unused:
            name = _emptied.pop()
        else:
            name = await _made(admin, is_new=is_new)
        yield _url_of(name)
        await admin.execute(
            # It is waited for: what it had begun to commit would be the next test's.
            "SELECT pg_terminate_backend(pid, 60000) FROM pg_stat_activity WHERE datname = $1",
            name,
        )
        if not is_new and not is_unused and await _is_emptied(name):
            _emptied.append(name)
        else:
            await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")


def _url_of(name: str) -> str:
    return f"postgresql://postgres@127.0.0.1:{_server['port']}/{name}"


async def _made(admin: asyncpg.Connection, *, is_new: bool) -> str:
    name, base = new_sandbox_id().replace("-", "_"), "template1"
    if not is_new:
        base = _MIGRATED
        if await admin.fetchval("SELECT 1 FROM pg_database WHERE datname = $1", base) is None:
            await admin.execute(f"CREATE DATABASE {base}")
            async with open_store(_url_of(base), key=b"k" * 32):
                pass
            async with _connected(base) as database:
                _schema[:] = [await database.fetchval(_SCHEMA)]
    await admin.execute(f"CREATE DATABASE {name} TEMPLATE {base}")
    return name


async def _is_emptied(name: str) -> bool:
    """Empty a database for the next test; return whether it has the schema of a new one."""
    async with _connected(name) as database:
        if [await database.fetchval(_SCHEMA)] != _schema:
            return False
        tables = await database.fetch("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")
        sequences = await database.fetch("SELECT sequencename FROM pg_sequences")
        kept = {"alembic_version", "schema_floor"}
        # Without triggers: those count what is deleted.
        await database.execute(
            "SET session_replication_role = replica; SET statement_timeout = '60s';"
            + "".join(f"DELETE FROM {one};" for (one,) in tables if one not in kept)
            + "".join(f"ALTER SEQUENCE {one} RESTART;" for (one,) in sequences)
        )
        return True


@asynccontextmanager
async def _connected(name: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(_url_of(name))
    try:
        yield connection
    finally:
        await connection.close()


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
    _emptied.clear()
