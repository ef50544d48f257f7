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

_server: dict[str, int] = {}


@asynccontextmanager
async def postgres_url() -> AsyncIterator[str]:
    """Yield the URL of a fresh database."""
    port = _server.get("port")
    if port is None:
        pytest.fail("the PostgreSQL of this run was not started")
    name = new_sandbox_id().replace("-", "_")
    admin = await asyncpg.connect(f"postgresql://postgres@127.0.0.1:{port}/postgres")
    try:
        await admin.execute(f"CREATE DATABASE {name}")
        yield f"postgresql://postgres@127.0.0.1:{port}/{name}"
        await admin.execute(f"DROP DATABASE {name} WITH (FORCE)")
    finally:
        await admin.close()


def start_server(port: int) -> Path:
    """Start a server on loopback and return its folder."""
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
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories= -c fsync=off"
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
