"""Backups: whole or refused, restored over what is there, made by themselves."""

import asyncio
import os
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import asyncpg
import pytest
from tests.support.clock import DrivenClock
from tests.support.house import open_yard, settings_of
from tests.support.postgres import postgres_url
from tests.support.store import recounted

from sandyard.server.app import backups
from sandyard.server.app.backups import (
    age_of_newest,
    back_up_regularly,
    backup,
    compare,
    restore,
)
from sandyard.server.app.installation import only_server, secret_key, server_id_of, ssh_host_key
from sandyard.server.app.settings import Settings
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.errors import (
    ConflictError,
    DamagedError,
    InvalidArgumentError,
    NoCapacityError,
    NotFoundError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.records import SandboxQuery
from sandyard.server.core.states import Status
from sandyard.server.links.sql import open_store

WORD = "correct horse"
SANDYARD = Path(sys.executable).parent / "sandyard"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home with an installation of one row."""
    place = tmp_path / "home"
    make_home(place)
    return place


def make_home(place: Path) -> None:
    for make in (secret_key, server_id_of, ssh_host_key):
        make(place)
    (place / "cluster").mkdir()
    (place / "cluster" / "paper.pem").write_text("paper\n")
    (place / "config.toml").write_text("[http]\nport = 8099\n")
    (place / "config.toml").chmod(0o600)
    with closing(sqlite3.connect(place / "sandyard.db")) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("CREATE TABLE organizations (name)")
        database.execute("INSERT INTO organizations VALUES ('one')")
        database.commit()


def names_in(home: Path) -> list[str]:
    with closing(sqlite3.connect(home / "sandyard.db")) as database:
        return [name for (name,) in database.execute("SELECT name FROM organizations")]


def add(home: Path, name: str) -> None:
    with closing(sqlite3.connect(home / "sandyard.db")) as database:
        database.execute("INSERT INTO organizations VALUES (?)", (name,))
        database.commit()


def everything_in(home: Path) -> dict[str, bytes | None]:
    return {
        str(path.relative_to(home)): path.read_bytes() if path.is_file() else None
        for path in sorted(home.rglob("*"))
        if not path.name.endswith(("-wal", "-shm", "server.lock"))
    }


def test_a_backup_is_restored_over_what_is_there_and_into_an_empty_home(
    home: Path, tmp_path: Path
) -> None:
    settings, file = settings_of(home), tmp_path / "b"
    with closing(sqlite3.connect(home / "sandyard.db")) as busy:  # what is in the WAL is in it
        busy.execute("INSERT INTO organizations VALUES ('two')")
        busy.commit()
        about = backup(settings, file, WORD)
    assert about.rows == {"organizations": 2}
    assert file.stat().st_mode & 0o777 == 0o600
    assert b"ssh-ed25519" not in file.read_bytes()
    before = everything_in(home)
    add(home, "later")
    (home / "config.toml").write_text("[http]\nport = 1\n")
    (home / "cluster" / "later.pem").write_text("")
    _, found = compare(settings, file, WORD)
    assert {one.what: (one.here, one.there[:8]) for one in found} == {
        "organizations": ("3", "2"),
        "config.toml": ("16 bytes", "19 bytes"),
    }
    for _ in range(2):  # twice is once
        _, replaced = restore(settings, file, WORD)
        assert names_in(home) == ["one", "two"]
        after = everything_in(home)
        kept = {name: after.pop(name) for name in list(after) if name.startswith("replaced-")}
        assert after.keys() == before.keys()
        for name in before.keys() - {"sandyard.db"}:
            assert after[name] == before[name], name
        assert replaced is not None
        assert (replaced / "sandyard.db").exists()
        assert kept
    assert (home / "config.toml").stat().st_mode & 0o777 == 0o600
    empty = tmp_path / "elsewhere" / "home"
    _, replaced = restore(settings_of(empty), file, WORD)
    assert replaced is None
    assert names_in(empty) == ["one", "two"]
    assert (empty / "secret.key").read_bytes() == (home / "secret.key").read_bytes()
    assert compare(settings_of(empty), file, WORD)[1] == []


def test_a_file_that_is_cut_or_altered_anywhere_is_refused_and_nothing_changes(
    home: Path, tmp_path: Path
) -> None:
    (home / "cluster" / "large.pem").write_bytes(os.urandom(3 * 2**20))
    settings, file, harmed = settings_of(home), tmp_path / "b", tmp_path / "harmed"
    backup(settings, file, WORD)
    data, before = file.read_bytes(), everything_in(home)
    frames = [len(data) - 1, len(data) - 30, 2**21, 2**20, 2**20 + 61, 45, 41, 30, 3, 0]
    for size in frames:
        harmed.write_bytes(data[:size])
        with pytest.raises(SandyardError, match="cannot read the backup"):
            restore(settings, harmed, WORD)
    for more in (b"x", data):
        harmed.write_bytes(data + more)
        for reading in (restore, compare):
            with pytest.raises(DamagedError, match="something was appended"):
                reading(settings, harmed, WORD)
    for place in (1, 25, 44, 60, 2**20 + 100, len(data) - 5):
        harmed.write_bytes(data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :])
        with pytest.raises(SandyardError, match="cannot read the backup"):
            restore(settings, harmed, WORD)
    # Whole frames that are left out, or come in another order.
    head, frame = 24 + 16, 4 + 2**20 + 16
    pieces = [data[head + frame * one : head + frame * (one + 1)] for one in range(2)]
    rest = data[head + frame * 2 :]
    for other in (pieces[0] + rest, pieces[1] + pieces[0] + rest, rest, pieces[0] + pieces[0]):
        harmed.write_bytes(data[:head] + other)
        with pytest.raises((DamagedError, InvalidArgumentError)):
            restore(settings, harmed, WORD)
    assert everything_in(home) == before


def test_what_cannot_be_done_is_said_and_loses_nothing(home: Path, tmp_path: Path) -> None:
    settings, file = settings_of(home), tmp_path / "b"
    with pytest.raises(InvalidArgumentError, match="8 characters"):
        backup(settings, file, "short")
    with pytest.raises(NotFoundError, match="no installation"):
        backup(settings_of(tmp_path / "none"), file, WORD)
    backup(settings, file, WORD)
    with pytest.raises(ConflictError, match="exists"):
        backup(settings, file, WORD)
    with pytest.raises(InvalidArgumentError, match="passphrase is another"):
        restore(settings, file, "incorrect horse")
    with pytest.raises(NotFoundError):
        restore(settings, tmp_path / "none", WORD)
    with only_server(home):
        backup(settings, tmp_path / "running", WORD)
        with pytest.raises(ConflictError, match="the server runs"):
            restore(settings, file, WORD)
    other = tmp_path / "other"
    make_home(other)
    add(other, "other")
    with pytest.raises(ConflictError, match="another installation's"):
        restore(settings_of(other), file, WORD)
    assert names_in(other) == ["one", "other"]
    found = {one.what for one in compare(settings_of(other), file, WORD)[1]}
    assert {"installation", "secret.key", "organizations"} <= found
    restore(settings_of(other), file, WORD, force=True)
    assert names_in(other) == ["one"]


def test_a_full_disk_leaves_no_part_of_a_backup(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NoCapacityError, match=r"No space left.* is full; free some space"):
        backup(settings_of(home), tmp_path / "b", WORD)
    assert not list(tmp_path.glob("b*"))
    assert not list(home.glob(".sandyard-*"))


def test_a_restore_that_fails_on_the_way_takes_all_of_it_back(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, file = settings_of(home), tmp_path / "b"
    backup(settings, file, WORD)
    add(home, "later")
    before = everything_in(home)

    def full(source: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("sandyard.server.app.backups.copy_sparse", full)
        with pytest.raises(UnavailableError, match="No space left"):
            restore(settings, file, WORD)
    assert everything_in(home) == before
    assert names_in(home) == ["one", "later"]


def test_ends_are_put_off_and_quarantine_begins_anew(home: Path, tmp_path: Path) -> None:
    with closing(sqlite3.connect(home / "sandyard.db")) as database:
        database.execute("CREATE TABLE sandboxes (expires_at BIGINT)")
        database.execute("CREATE TABLE quarantine (sandbox_id)")
        database.executemany("INSERT INTO sandboxes VALUES (?)", [(1,), (None,), (2**60,)])
        database.execute("INSERT INTO quarantine VALUES ('x')")
        database.commit()
    backup(settings_of(home), tmp_path / "b", WORD)
    restore(settings_of(home), tmp_path / "b", WORD)
    with closing(sqlite3.connect(home / "sandyard.db")) as database:
        ends = [end for (end,) in database.execute("SELECT expires_at FROM sandboxes")]
        assert ends[0] > (time.time() + 86_000) * 1e6
        assert ends[1:] == [None, 2**60]
        assert database.execute("SELECT * FROM quarantine").fetchall() == []


def test_own_definitions_and_another_database_are_looked_after(home: Path, tmp_path: Path) -> None:
    definitions = tmp_path / "definitions"
    definitions.mkdir()
    (definitions / "mine.toml").write_text("name = 'mine'\n")
    settings = settings_of(home, templates_dir=definitions)
    backup(settings, tmp_path / "b", WORD)
    (definitions / "mine.toml").write_text("name = 'changed'\n")
    _, replaced = restore(settings, tmp_path / "b", WORD)
    assert (definitions / "mine.toml").read_text() == "name = 'mine'\n"
    assert replaced is not None
    assert (replaced / "definitions" / "mine.toml").read_text() == "name = 'changed'\n"
    (home / "config.toml").write_text('[store]\nurl = "sqlite:////elsewhere/s.db"\n')
    backup(settings, tmp_path / "c", WORD)
    with pytest.raises(ConflictError, match="name another one"):
        restore(settings, tmp_path / "c", WORD)


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("postgresql://u:p%40%2F@h:5433/d?ssl=require",
         {"PGUSER": "u", "PGPASSWORD": "p@/", "PGHOST": "h", "PGPORT": "5433", "PGDATABASE": "d",
          "PGSSLMODE": "require"}),
        ("postgresql:///d?host=/run/pg", {"PGHOST": "/run/pg", "PGDATABASE": "d"}),
        ("postgresql://u@/d?host=h&password=secret",
         {"PGUSER": "u", "PGHOST": "h", "PGPASSWORD": "secret", "PGDATABASE": "d"}),
    ],
)  # fmt: skip
def test_a_databases_place_is_in_the_environment_alone(
    url: str, expected: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGSERVICE", "another")
    found = backups.environment_of(url)
    assert {name: value for name, value in found.items() if name.startswith("PG")} == expected


@pytest.fixture
def word_file(tmp_path: Path) -> Path:
    file = tmp_path / "word"
    file.write_text(f"{WORD}\n")
    return file


async def test_backups_are_made_by_themselves_and_the_oldest_removed(
    home: Path, tmp_path: Path, word_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, clock = tmp_path / "kept", DrivenClock()
    wanted = {"folder": folder, "passphrase_file": word_file, "every_h": 1, "keep": 3}
    settings = settings_of(home, sections={"backup": wanted})
    working = asyncio.create_task(back_up_regularly(settings, clock))

    async def until(count: int) -> None:
        async with asyncio.timeout(20):
            while len(list(folder.glob("2*.sandyard-backup"))) != count:
                await asyncio.sleep(0.01)

    def age_by_an_hour() -> None:
        # The files have the host's times, not this clock's.
        for one in folder.iterdir():
            os.utime(one, (clock.now().timestamp() - 3700,) * 2)

    await until(1)
    manual = folder / "manual.sandyard-backup"
    manual.write_text("somebody's own")
    for made in range(5):
        age_by_an_hour()
        newest = max(one.name for one in folder.glob("2*.sandyard-backup"))
        async with asyncio.timeout(20):
            while max(one.name for one in folder.glob("2*.sandyard-backup")) == newest:
                await clock.advance(700)
                await asyncio.sleep(0.05)
        await until(min(3, made + 2))
    assert manual.exists()
    assert age_of_newest(folder, clock.now()) is not None
    word_file.unlink()
    age_by_an_hour()
    async with asyncio.timeout(20):
        while not any("cannot make a backup" in one for one in caplog.messages):
            await clock.advance(700)
            await asyncio.sleep(0.01)
    await until(3)
    working.cancel()
    with pytest.raises(asyncio.CancelledError):
        await working


async def test_the_command_line_backs_up_a_house_at_work(tmp_path: Path, word_file: Path) -> None:
    home, file = tmp_path / "home", tmp_path / "b"
    environment = {"SANDYARD_HOME": str(home), "XDG_CONFIG_HOME": str(home)}

    def typed(*words: str, code: int = 0) -> str:
        done = subprocess.run(
            [SANDYARD, *words, "--passphrase-file", word_file],
            env={**os.environ, **environment}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        return done.stdout + done.stderr

    async with open_yard(home) as yard:
        box = await yard.create(name="kept")
        said = await asyncio.to_thread(typed, "backup", str(file))
        assert "1 sandboxes" in said
        await yard.create(name="later")
        said = await asyncio.to_thread(typed, "restore", str(file), "--check")
        assert "sandboxes" in said
    typed("restore", str(file))
    async with open_yard(home) as yard:
        names = {one["name"] for one in (await yard.client.get("/v1/sandboxes")).json()["data"]}
        assert names <= {"kept"}
        async with yard.house.store.read() as tx:
            assert await tx.sandboxes.find(str(box["id"])) is not None
    assert "exists" in typed("backup", str(file), code=1)


@pytest.mark.postgres
async def test_a_postgresql_database_is_dumped_and_restored(tmp_path: Path) -> None:
    home, file = tmp_path / "home", tmp_path / "b"
    for make in (secret_key, server_id_of):
        make(home)
    async with postgres_url() as url:
        settings = Settings(home=home, store={"url": url})
        async with open_store(url, key=secret_key(home)) as store:
            async with store.write(Turn.ALONE) as tx:
                await tx.facts.note("beat", DrivenClock().now())
            about = await asyncio.to_thread(backup, settings, file, WORD)
            assert about.database == "postgresql"
        async with open_store(url, key=secret_key(home)) as store, store.write(Turn.ALONE) as tx:
            await tx.facts.note("later", DrivenClock().now())
        admin = await asyncpg.connect(url)
        await admin.execute("CREATE TABLE of_a_later_version (x int)")
        await asyncio.to_thread(restore, settings, file, WORD)
        async with open_store(url, key=secret_key(home)) as store, store.read() as tx:
            assert await tx.facts.moment("beat") is not None
            assert await tx.facts.moment("later") is None
            # What a later version has made is not in its way either.
            assert await tx.quarantine.all() == []
        gone = "SELECT to_regclass('public.of_a_later_version')"
        assert await admin.fetchval(gone) is None
        kept = "SELECT count(*) FROM pg_tables WHERE tablename = 'of_a_later_version'"
        assert await admin.fetchval(kept) == 1
        await admin.close()
        with pytest.raises(ConflictError, match="name another one"):
            await asyncio.to_thread(restore, settings_of(home), file, WORD)


async def test_a_backup_amid_creates_and_deletes_is_of_one_moment(tmp_path: Path) -> None:
    place, stop = tmp_path / "home", asyncio.Event()
    async with open_yard(place) as yard:

        async def work() -> None:
            while not stop.is_set():
                box = await yard.create(idleTimeout=0)
                assert (await yard.client.delete(f"/v1/sandboxes/{box['id']}")).status_code == 200

        async with asyncio.TaskGroup() as tasks:
            for _ in range(3):
                tasks.create_task(work())
            for number in range(4):
                settings, file = settings_of(place), tmp_path / f"{number}"
                await asyncio.to_thread(backup, settings, file, WORD)
            stop.set()
    for number in range(4):
        other = tmp_path / f"other-{number}"
        restore(settings_of(other), tmp_path / f"{number}", WORD)
        url = f"sqlite:///{other / 'sandyard.db'}"
        with closing(sqlite3.connect(other / "sandyard.db")) as database:
            assert database.execute("PRAGMA foreign_key_check").fetchall() == []
        async with open_store(url, key=secret_key(other)) as store, store.read() as tx:
            now = await tx.facts.now()
            for organization in await tx.organizations.every():
                found = await tx.usage.in_use(organization.id, now)
                assert found == await recounted(tx, organization.id, now)
                for box in await tx.sandboxes.page(SandboxQuery(organization.id, limit=999)):
                    periods = await tx.usage.of_sandbox(box.id)
                    is_open = any(one.ended_at is None for one in periods)
                    assert is_open == (box.status is Status.RUNNING)
