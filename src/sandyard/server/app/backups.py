"""Backups of an installation, in one file under a passphrase.

    backup.json             what is in the backup, and of which installation
    database                SQLite's file, or what pg_dump wrote
    home/…                  keys, settings, and the certificates of several hosts
    definitions/…           template definitions of the operator's own
    files/…                 machines and workspaces, if they were asked for (see `backup_files`)

The database is copied consistently while a server runs; of the rest, only files change then.
"""

import asyncio
import errno
import gzip
import hashlib
import itertools
import json
import logging
import os
import platform
import re
import shutil
import sqlite3
import stat
import subprocess
import tarfile
import tempfile
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version as package_version
from pathlib import Path
from typing import IO, Any, cast
from urllib.parse import parse_qsl, unquote, urlsplit

from sandyard.server.app.backup_files import (
    PREFIX,
    Contents,
    Include,
    Kind,
    Target,
    Unpacking,
    check_moved,
    missing,
    put_back,
    put_workspaces_back,
    remove_tree,
    stopped_by,
    workspaces_here,
    write_files,
)
from sandyard.server.app.database import refuse_node
from sandyard.server.app.installation import only_server, running_server
from sandyard.server.app.sealed_files import SealedReader, SealedWriter, check_passphrase
from sandyard.server.app.settings import Settings
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.errors import (
    ConflictError,
    DamagedError,
    IncompatibleError,
    NoCapacityError,
    NotFoundError,
    UnavailableError,
    UnsupportedError,
)
from sandyard.server.drivers.sparse import copy_sparse
from sandyard.server.links.sql.address import tls_of
from sandyard.server.node.machines.saved import sync_folder
from sandyard.server.tasks import in_thread

FORMAT, _WITHOUT_FILES = 2, 1
_FILES = ("secret.key", "server.id", "ssh_host_ed25519_key", "config.toml", "cluster")
_COUNTED = ("organizations", "users", "sandboxes", "snapshots", "workspaces", "api_keys")
_PIECE = 1024 * 1024
_DUMP_LIMIT_S = 3600.0
_SUFFIX = ".sandyard-backup"
_OWN = re.compile(rf"\d{{8}}T\d{{6}}Z{re.escape(_SUFFIX)}")
_PAUSE_S, _AGAIN_S = 60.0, 3600.0
_STALE_S = 86_400.0
_SCRATCH = ".sandyard-backup-"
_PUT_OFF = timedelta(days=1)
Progress = Callable[[str], None]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class About:
    """What a backup is of. `key` is a digest of the installation's key, `rows` counts what is in
    the database, where that is SQLite; `include` tells what else is in it."""

    format: int
    version: str
    created_at: str
    host: str
    home: str
    database: str
    key: str
    rows: Mapping[str, int]
    include: tuple[str, ...] = ()


@dataclass(frozen=True)
class Difference:
    """What a restore would change: a name, what is there, and what is in the backup."""

    what: str
    here: str
    there: str


def backup(
    settings: Settings,
    file: Path,
    passphrase: str,
    *,
    include: Iterable[Include] = (),
    progress: Progress = lambda _: None,
    stop: threading.Event | None = None,
) -> About:
    """Write a backup to a new file. It gets its name once it is complete. Once `stop` is set, give
    up soon. `include` names what files of machines and workspaces are to be in it.

    Raises:
        InvalidArgumentError: the passphrase is too short.
        ConflictError: the file exists.
        NotFoundError: there is no installation here.
        UnavailableError: the database or the files cannot be copied, or the disk is full.
    """
    check_passphrase(passphrase)
    home, wanted, stop = settings.home, frozenset(map(Include, include)), stop or threading.Event()
    if wanted and settings.cluster.nats:
        raise UnsupportedError(
            "cannot include machines or workspaces: in an installation on several hosts, they are "
            "on the nodes and on the file servers"
        )
    if not (home / "secret.key").exists():
        raise NotFoundError(f"cannot back up {home}: there is no installation there")
    if file.exists():
        raise ConflictError(f"cannot write the backup: {file} exists; choose another name")
    _remove_stale(home)
    try:
        with _scratch(home) as scratch:
            database = scratch / "database"
            progress("copying the database")
            kind = _copy_database(settings, database, stop)
            about = About(
                format=FORMAT if wanted else _WITHOUT_FILES,
                version=package_version("sandyard"),
                created_at=datetime.now(UTC).isoformat(timespec="seconds"),
                host=platform.node(),
                home=str(home),
                database=kind,
                key=_digest_of(home / "secret.key"),
                rows=_rows_of(database) if kind == "sqlite" else {},
                include=tuple(sorted(wanted)),
            )
            part = file.with_name(f"{file.name}.part")
            try:
                _write(part, passphrase, about, database, settings, progress, stop)
                part.replace(file)
                sync_folder(file.absolute().parent)
            finally:
                part.unlink(missing_ok=True)
    except OSError as error:
        raise _trouble("write the backup", error, file.absolute().parent) from error
    return about


def restore(
    settings: Settings,
    file: Path,
    passphrase: str,
    *,
    force: bool = False,
    progress: Progress = lambda _: None,
) -> tuple[About, Path | None]:
    """Put an installation back as it was, and return what the backup is of, and the folder to which
    the files that it replaced were moved, if there were any.

    The backup is verified whole before anything is changed, and a failure after that is undone.
    Machines, snapshots and workspaces that are there stay: they are newer than the backup.
    Without `force`, the home may be empty, or of the same installation. Sandboxes that would end
    within a day get a day: their ends may have been put off since the backup.

    Raises:
        InvalidArgumentError: the file is no backup, the passphrase is another, or this host is a
            node.
        DamagedError: it was cut or altered.
        IncompatibleError: it is of a newer version.
        ConflictError: the server runs; the home is another installation's; or the settings in the
            backup name another database.
        UnavailableError: the disk is full, or the database cannot be written.
    """
    refuse_node(settings)
    home = settings.home
    _check_not_running(home)
    try:
        home.mkdir(parents=True, exist_ok=True, mode=0o755)
        with (
            only_server(home),
            _scratch(home) as scratch,
            Unpacking(scratch, settings) as files,
        ):
            about = _unpack(file, passphrase, scratch, files, progress)
            for problem in files.problems:
                progress(problem)
            _check_same(settings, about, force=force)
            check_moved(settings, files.found)
            replaced = _put_back(settings, about, scratch, files.found, progress)
            for one in sorted(_newer_workspaces(settings)):
                progress(
                    f"the workspace {one} is newer than the backup: nothing refers to it now, and "
                    f"its files stay in {settings.workspaces_dir}"
                )
    except OSError as error:
        raise _trouble("restore the backup", error, settings.home) from error
    return about, replaced


def compare(settings: Settings, file: Path, passphrase: str) -> tuple[About, list[Difference]]:
    """Return what a backup is of, and what a restore would change. Nothing is changed.

    Raises: see `restore`.
    """
    home, found = settings.home, []
    try:
        with (
            tempfile.TemporaryDirectory(prefix="sandyard-compare-") as scratch,
            Unpacking(Path(scratch), None) as files,
        ):
            about = _unpack(file, passphrase, Path(scratch), files, lambda _: None)
            key = home / "secret.key"
            if key.exists() and _digest_of(key) != about.key:
                found.append(Difference("installation", "another one", "the backup's"))
            if about.database == "sqlite":
                database = _sqlite_path(settings)
                here = _rows_of(database) if database is not None and database.exists() else {}
                found += [
                    Difference(name, str(here.get(name, 0)), str(count))
                    for name, count in about.rows.items()
                    if here.get(name, 0) != count
                ]
            for path in sorted((Path(scratch) / "home").rglob("*")):
                name = path.relative_to(Path(scratch) / "home")
                if path.is_file() and (why := _differs(home / name, path)) is not None:
                    found.append(Difference(str(name), *why))
            found += [
                Difference(name, "absent", "there")
                for contents, _ in files.found
                for name in missing(settings, contents)
            ]
    except OSError as error:
        raise _trouble("compare the backup", error, Path(tempfile.gettempdir())) from error
    return about, found


def _newer_workspaces(settings: Settings) -> set[str]:
    """Return the workspaces with files here that the restored database does not know."""
    database = _sqlite_path(settings)
    if database is None or not database.exists():
        return set()  # it is known once the server runs
    with suppress(sqlite3.Error), closing(sqlite3.connect(database)) as opened:
        known = {str(one) for (one,) in opened.execute("SELECT id FROM workspaces")}
        return workspaces_here(settings) - known
    return set()


def _trouble(what: str, error: OSError, folder: Path) -> UnavailableError:
    """Return the error for a failure of this computer's files, which says if a disk is full."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoCapacityError(
            f"cannot {what}: {error}: the disk of {folder} is full; free some space there, and run "
            "it again"
        )
    return UnavailableError(f"cannot {what}: {error}")


# --- scheduled backups ----------------------------------------------------------------------------


async def back_up_regularly(settings: Settings, clock: Clock) -> None:
    """Make backups as the settings say, and remove the oldest. One that fails is logged, and tried
    again later."""
    wanted = settings.backup
    if wanted.folder is None or wanted.passphrase_file is None:
        return
    while True:
        left_s = _AGAIN_S
        try:
            age_s = await in_thread(age_of_newest, wanted.folder, clock.now())
            left_s = 0.0 if age_s is None else wanted.every_h * 3600 - age_s
            if left_s <= 0:
                await _back_up_now(settings, wanted.folder, wanted.passphrase_file, clock)
                left_s = _PAUSE_S
        except Exception as error:  # noqa: BLE001 - whatever it is must not end the server
            log.error("cannot make a backup: %s; trying again in an hour", error)
            left_s = _AGAIN_S
        await clock.sleep(min(left_s, _AGAIN_S))


async def _back_up_now(
    settings: Settings, folder: Path, passphrase_file: Path, clock: Clock
) -> None:
    await in_thread(folder.mkdir, mode=0o700, parents=True, exist_ok=True)
    passphrase = (await in_thread(passphrase_file.read_text)).strip()
    file = folder / f"{clock.now():%Y%m%dT%H%M%SZ}{_SUFFIX}"
    stop = threading.Event()
    await stopped_by(
        stop,
        in_thread(
            backup,
            settings,
            file,
            passphrase,
            include=map(Include, settings.backup.include),
            progress=lambda line: log.info("backup: %s", line),
            stop=stop,
        ),
    )
    await in_thread(_remove_old, folder, settings.backup.keep)
    log.info("made the backup %s", file)


def age_of_newest(folder: Path, now: datetime) -> float | None:
    """Return the age in seconds of the newest scheduled backup, None if there is none."""
    made = [one.stat().st_mtime for one in _own(folder)]
    return max(0.0, now.timestamp() - max(made)) if made else None


def _own(folder: Path) -> list[Path]:
    """Return the scheduled backups, oldest first. Other files are not touched."""
    return sorted(one for one in folder.glob(f"*{_SUFFIX}") if _OWN.fullmatch(one.name))


def _remove_old(folder: Path, keep: int) -> None:
    for one in _own(folder)[:-keep]:
        one.unlink()
    _remove_older(folder.glob(f"*{_SUFFIX}.part"))


@contextmanager
def _scratch(home: Path) -> Iterator[Path]:
    folder = Path(tempfile.mkdtemp(prefix=_SCRATCH, dir=home))
    try:
        yield folder
    finally:
        remove_tree(folder)


def _remove_stale(home: Path) -> None:
    """Remove what interrupted backups and restores left."""
    _remove_older(home.glob(f"{_SCRATCH}*"))


def _remove_older(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(FileNotFoundError):
            if time.time() - path.lstat().st_mtime > _STALE_S:
                remove_tree(path) if path.is_dir() else path.unlink()


# --- the database ---------------------------------------------------------------------------------


def _sqlite_path(settings: Settings) -> Path | None:
    kind, _, path = settings.store_url.partition(":///")
    return Path(path) if kind.startswith("sqlite") else None


def _copy_database(settings: Settings, target: Path, stop: threading.Event) -> str:
    path = _sqlite_path(settings)
    if path is None:
        dump = ["pg_dump", "--format=custom", "--no-owner", f"--file={target}"]
        _run(dump, environment_of(settings.store_url), stop)
        return "postgresql"
    if not path.exists():
        raise NotFoundError(f"cannot back up {settings.home}: there is no database at {path}")
    try:
        with (
            closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(target)) as copy,
        ):
            source.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")
    except sqlite3.Error as error:
        raise UnavailableError(f"cannot copy the database: {error}") from error
    _check_sqlite(target)
    return "sqlite"


def _check_sqlite(path: Path) -> None:
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
            (verdict,) = database.execute("PRAGMA integrity_check").fetchone()
    except sqlite3.Error as error:
        verdict = str(error)
    if verdict != "ok":
        raise DamagedError(f"cannot use the database in the backup: {verdict}")


def _rows_of(path: Path) -> dict[str, int]:
    found = {}
    with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        for name in _COUNTED:
            try:
                query = f"SELECT count(*) FROM {name}"  # noqa: S608 - names of our own
                (found[name],) = database.execute(query).fetchone()
            except sqlite3.Error:
                continue
    return found


def environment_of(url: str) -> dict[str, str]:
    """Return the environment in which PostgreSQL's programs use a database: their arguments, which
    other users can see, name none of it."""
    parts = urlsplit(url)
    query, tls = dict(parse_qsl(parts.query)), tls_of(url)
    found = {
        "PGHOST": query.get("host") or parts.hostname,
        "PGPORT": query.get("port") or parts.port,
        "PGUSER": query.get("user") or unquote(parts.username or ""),
        "PGPASSWORD": query.get("password") or unquote(parts.password or ""),
        "PGDATABASE": query.get("database") or unquote(parts.path.lstrip("/")),
        "PGSSLMODE": tls.mode,
        "PGSSLROOTCERT": tls.root,
        "PGSSLCERT": tls.certificate,
        "PGSSLKEY": tls.key,
    }
    values = {name: str(value) for name, value in found.items() if value}
    others = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return others | values


def _run(command: list[str], environment: Mapping[str, str], stop: threading.Event) -> None:
    """Run one of PostgreSQL's programs to its end, unless `stop` is set before."""
    until = time.monotonic() + _DUMP_LIMIT_S
    try:
        with (
            tempfile.TemporaryFile() as output,
            subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            ) as process,
        ):
            while process.poll() is None:
                if stop.wait(0.1) or time.monotonic() > until:
                    process.kill()
                    why = "was stopped" if stop.is_set() else "took over an hour"
                    raise UnavailableError(f"{command[0]} {why}")
            if process.returncode:
                output.seek(0)
                text = output.read().decode(errors="replace").strip()[-1000:]
                raise UnavailableError(f"{command[0]} failed: {text}")
    except FileNotFoundError as error:
        raise UnavailableError(
            f"cannot find {command[0]}: install the package postgresql-client, of the server's "
            "version or newer"
        ) from error


# --- the file -------------------------------------------------------------------------------------


def _write(
    part: Path,
    passphrase: str,
    about: About,
    database: Path,
    settings: Settings,
    progress: Progress,
    stop: threading.Event,
) -> None:
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        sealed = SealedWriter(file, passphrase)
        with (
            gzip.GzipFile(fileobj=cast("IO[bytes]", sealed), mode="wb", compresslevel=1) as packed,
            # With what links lead to: on another host they may lead nowhere.
            tarfile.open(fileobj=packed, mode="w|", dereference=True) as tar,
        ):
            text = database.with_name("backup.json")
            text.write_text(json.dumps(asdict(about)))
            tar.add(text, "backup.json")
            tar.add(database, "database")
            for name in _FILES:
                if (settings.home / name).exists():
                    progress(f"copying {name}")
                    tar.add(settings.home / name, f"home/{name}", filter=_plain)
            definitions = settings.node.templates_dir
            if definitions is not None and definitions.is_dir():
                progress(f"copying {definitions}")
                tar.add(definitions, "definitions", filter=_plain)
            target = Target(tar, progress, stop, itertools.count())
            write_files(settings, frozenset(map(Include, about.include)), target)
        sealed.close()
        file.flush()
        os.fsync(file.fileno())


def _plain(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Leave out what is neither a file nor a directory."""
    return member if member.isfile() or member.isdir() else None


@contextmanager
def _opened(file: Path, passphrase: str) -> Iterator[tuple[SealedReader, tarfile.TarFile]]:
    try:
        with file.open("rb") as source:
            sealed = SealedReader(source, passphrase)
            with (
                gzip.GzipFile(fileobj=cast("IO[bytes]", sealed), mode="rb") as packed,
                tarfile.open(fileobj=packed, mode="r|") as tar,
            ):
                yield sealed, tar
    except FileNotFoundError as error:
        raise NotFoundError(f"cannot find the backup {file}") from error
    except (tarfile.TarError, EOFError, gzip.BadGzipFile) as error:
        raise DamagedError(f"cannot read the backup: {error}") from error


def _unpack(
    file: Path, passphrase: str, scratch: Path, files: Unpacking, progress: Progress
) -> About:
    """Unpack a backup to an empty folder, and verify all of it."""
    progress(f"reading {file}")
    about: About | None = None
    with _opened(file, passphrase) as (sealed, tar):
        for member in tar:
            if about is None:
                about = _about_in(tar, member)
            elif member.name.startswith(f"{PREFIX}/"):
                content = tar.extractfile(member)
                assert content is not None
                files.take(member.name, content)
            else:
                _unpack_one(tar, member, scratch)
        sealed.read_to_end()
    if about is None:
        raise DamagedError("cannot read the backup: it is empty")
    if about.database == "sqlite":
        _check_sqlite(scratch / "database")
    return about


def _about_in(tar: tarfile.TarFile, member: tarfile.TarInfo) -> About:
    content = tar.extractfile(member) if member.name == "backup.json" else None
    if content is None:
        raise DamagedError("cannot read the backup: it does not say what it is")
    values: dict[str, Any] = json.load(content)
    if values["format"] > FORMAT:
        raise IncompatibleError(
            f"cannot read the backup: Sandyard {values.get('version')} wrote it; use that version"
        )
    known = {name: values[name] for name in About.__dataclass_fields__ if name in values}
    return About(**{**known, "include": tuple(known.get("include", ()))})


def _unpack_one(tar: tarfile.TarFile, member: tarfile.TarInfo, scratch: Path) -> None:
    target = scratch / member.name
    if not target.resolve().is_relative_to(scratch.resolve()) or ".." in target.parts:
        raise DamagedError(f"cannot read the backup: it has a file {member.name!r}")
    target.parent.mkdir(parents=True, exist_ok=True)
    if member.isdir():
        target.mkdir(exist_ok=True)
    elif member.isfile():
        source = tar.extractfile(member)
        assert source is not None
        with target.open("xb") as file:
            shutil.copyfileobj(source, file)
            file.flush()
            os.fsync(file.fileno())
    else:
        raise DamagedError(f"cannot read the backup: {member.name!r} is no file")
    os.chown(target, member.uid, member.gid)
    target.chmod(stat.S_IMODE(member.mode))


# --- what is put back -----------------------------------------------------------------------------


class _Exchange:
    """Renames files into place and what they replace aside; `undo` takes all of it back."""

    def __init__(self, home: Path) -> None:
        self._done: list[tuple[Path, Path]] = []
        name = f"replaced-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        numbers = (f"{name}-{number}" for number in range(2, 1000))
        free = (home / one for one in (name, *numbers))
        self.replaced = next(one for one in free if not one.exists())

    def set_aside(self, path: Path) -> None:
        if os.path.lexists(path):
            self.replaced.mkdir(mode=0o700, exist_ok=True)
            self._rename(path, self.replaced / path.name)

    def put(self, source: Path, target: Path) -> None:
        self.set_aside(target)
        self._rename(source, target)

    def undo(self) -> None:
        for source, target in reversed(self._done):
            target.rename(source)
        if self.replaced.is_dir():
            self.replaced.rmdir()

    def _rename(self, source: Path, target: Path) -> None:
        source.rename(target)
        self._done.append((source, target))


def _put_back(
    settings: Settings,
    about: About,
    scratch: Path,
    files: list[tuple[Contents, Path]],
    progress: Progress,
) -> Path | None:
    home, database = settings.home, _sqlite_path(settings)
    _check_database(settings, about, scratch)
    exchange = _Exchange(home)
    try:
        for path in sorted((scratch / "home").iterdir()):
            progress(f"putting {path.name} back")
            exchange.put(path, home / path.name)
        if (scratch / "definitions").is_dir():
            _put_definitions(settings, scratch / "definitions", exchange)
        put_back(settings, files, put=exchange.put, progress=progress)
        if any(contents.kind is Kind.WORKSPACE for contents, _ in files):
            asyncio.run(put_workspaces_back(settings, files, progress))
        progress("putting the database back")
        if database is None:
            _restore_postgres(settings.store_url, scratch, exchange.replaced.name)
        else:
            database.parent.mkdir(parents=True, exist_ok=True)
            part = database.with_name(f"{database.name}.part")
            part.unlink(missing_ok=True)
            copy_sparse(scratch / "database", part)
            _adjust_sqlite(part)
            # What belongs to the old database must not be taken for the new one's.
            for suffix in ("-wal", "-shm"):
                exchange.set_aside(database.with_name(database.name + suffix))
            exchange.put(part, database)
            sync_folder(database.parent)
        sync_folder(home)
    except BaseException:
        exchange.undo()
        raise
    return exchange.replaced if exchange.replaced.is_dir() else None


def _put_definitions(settings: Settings, source: Path, exchange: _Exchange) -> None:
    target = settings.node.templates_dir or settings.home / "definitions"
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.parent.stat().st_dev != source.stat().st_dev:
        raise ConflictError(
            f"cannot restore the template definitions: {target} is on another file system than "
            f"{settings.home}; set node.templates_dir to a directory in the home meanwhile"
        )
    exchange.put(source, target)


def _check_database(settings: Settings, about: About, scratch: Path) -> None:
    """Refuse a backup of another database than that which will be used after the restore."""
    kind = "postgresql" if _sqlite_path(settings) is None else "sqlite"
    config, url = scratch / "home" / "config.toml", None
    if config.exists():
        url = tomllib.loads(config.read_text()).get("store", {}).get("url")
    if about.database != kind or (url is not None and url != settings.store_url):
        raise ConflictError(
            f"cannot restore: the backup is of a {about.database} database, at the place that its "
            "config.toml says; the settings here name another one. Set SANDYARD_STORE__URL to "
            "where the database is to be, and to the same in the restored config.toml"
        )


_ADJUST = {
    "sandboxes": "UPDATE sandboxes SET expires_at = {soon} WHERE expires_at < {soon}",
    "quarantine": "DELETE FROM quarantine",
}
"""Changes to a restored database, by table: expiry times may have been extended since the backup,
and the time of machines in quarantine begins again."""


def _adjustments() -> dict[str, str]:
    soon = int((datetime.now(UTC) + _PUT_OFF).timestamp() * 1_000_000)
    return {table: one.format(soon=soon) for table, one in _ADJUST.items()}


def _adjust_sqlite(path: Path) -> None:
    try:
        with closing(sqlite3.connect(path)) as database:
            found = database.execute("SELECT name FROM sqlite_master WHERE type = 'table'")
            tables = {name for (name,) in found}
            for table, statement in _adjustments().items():
                if table in tables:  # an earlier version may not have it
                    database.execute(statement)
            database.commit()
    except sqlite3.Error as error:
        raise UnavailableError(f"cannot restore the database: {error}") from error
    path.chmod(0o600)
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _restore_postgres(url: str, scratch: Path, name: str) -> None:
    """Replace the schema `public` in one transaction; the old one gets another name."""
    environment, stop, script = environment_of(url), threading.Event(), scratch / "restore.sql"
    dump = ["pg_restore", "--no-owner", f"--file={scratch / 'dump.sql'}", str(scratch / "database")]
    _run(dump, environment, stop)
    aside = name.replace("-", "_").lower()
    adjusting = "".join(
        f"DO $do$ BEGIN {one}; EXCEPTION WHEN undefined_table THEN NULL; END $do$;\n"
        for one in _adjustments().values()
    )
    with script.open("w") as file:
        file.write(f"ALTER SCHEMA public RENAME TO {aside};\nCREATE SCHEMA public;\n")
        file.write(f"\\i '{scratch / 'dump.sql'}'\n")
        file.write(f"SET search_path = public;\n{adjusting}")
    _run(
        ["psql", "--no-psqlrc", "--quiet", "--single-transaction", "--set=ON_ERROR_STOP=1",
         f"--file={script}"],
        environment, stop,
    )  # fmt: skip


def _check_same(settings: Settings, about: About, *, force: bool) -> None:
    key = settings.home / "secret.key"
    if not force and key.exists() and _digest_of(key) != about.key:
        raise ConflictError(
            f"cannot restore: {settings.home} is another installation's, and its machines and "
            "sealed secrets would be lost; use an empty home (SANDYARD_HOME), or --force"
        )


def _check_not_running(home: Path) -> None:
    if home.is_dir() and (pid := running_server(home)) is not None:
        raise ConflictError(
            f"cannot restore: the server runs (process {pid}); stop it with scripts/down"
        )


def _digest_of(key: Path) -> str:
    return hashlib.sha256(b"sandyard: key of a backup\0" + key.read_bytes()).hexdigest()


def _differs(here: Path, there: Path) -> tuple[str, str] | None:
    if not here.is_file():
        return "absent", f"{there.stat().st_size} bytes"
    with here.open("rb") as one, there.open("rb") as two:
        digests = [hashlib.file_digest(file, "sha256").digest() for file in (one, two)]
    if digests[0] == digests[1]:
        return None
    return f"{here.stat().st_size} bytes", f"{there.stat().st_size} bytes, another content"
