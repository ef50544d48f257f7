"""The files of machines and workspaces in a backup: archives of GNU tar, in pieces.

    files/<kind>/<number>/<piece>     pieces of an archive, in order
    files/<kind>/<number>.json        after them: what is in it, or that it does not count

GNU tar preserves holes (where they are is part of a saved machine's seal), nanoseconds, hard links,
access lists and extended attributes. What was changed while it was read is left out: an archive
that met it does not count, and is made again without it.
"""

import asyncio
import io
import itertools
import json
import logging
import os
import shutil
import subprocess
import tarfile
import tempfile
import threading
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import IO, Any, Self, TypeVar

from sandyard.server.app.database import open_database
from sandyard.server.app.installation import running_server
from sandyard.server.app.settings import Settings
from sandyard.server.app.wiring import UNFINISHED, volumes_of
from sandyard.server.core.contracts.node import Phase
from sandyard.server.core.errors import ConflictError, DamagedError, UnavailableError
from sandyard.server.core.ids import is_uuid
from sandyard.server.core.records import Workspace
from sandyard.server.links.volumes import ImageVolumes
from sandyard.server.node.machines.records import Record, Records
from sandyard.server.tasks import in_thread

log = logging.getLogger(__name__)

PREFIX = "files"
_PIECE = 16 * 2**20
_TRIES = 3
_END_S = 60.0
_PASSABLE = frozenset({"machines", "versions", "images"})
"""The folders that hypervisors' accounts pass through."""
_IN_PART = 2
"""What tar ends with that has done some of its work and not all."""
_TAR = ("tar", "--format=posix", "--sparse", "--xattrs", "--xattrs-include=*", "--acls",
        "--numeric-owner")  # fmt: skip
Progress = Callable[[str], None]
_T = TypeVar("_T")


class Include(StrEnum):
    """What a backup may contain in addition to the database."""

    PAUSED = "paused"
    SNAPSHOTS = "snapshots"
    WORKSPACES = "workspaces"
    TEMPLATES = "templates"


class Kind(StrEnum):
    """Where the files of an archive belong."""

    IMAGES = "images"
    """In the directory of images."""
    MACHINES = "machines"
    """In the home: paused machines, snapshots, and versions of templates."""
    WORKSPACE = "workspace"
    """In a workspace's volume."""


@dataclass(frozen=True)
class Contents:
    """What an archive contains: `paths` are relative to where its kind belongs, `quota_bytes` is
    the size limit of a workspace. One that is not complete is followed by another, or by none."""

    kind: Kind
    name: str
    paths: tuple[str, ...]
    quota_bytes: int = 0
    is_complete: bool = True


# --- into a backup --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Target:
    """The archive of a backup that is being written."""

    tar: tarfile.TarFile
    progress: Progress
    stop: threading.Event
    numbers: Iterator[int]


def write_files(settings: Settings, include: frozenset[Include], target: Target) -> None:
    """Write what is included to a backup.

    Raises:
        UnavailableError: something cannot be read, or `stop` was set.
    """
    if Include.TEMPLATES in include:
        _write_versions(settings, target)
    if include & {Include.PAUSED, Include.SNAPSHOTS}:
        _write_machines(settings, include, target)
    if Include.WORKSPACES in include:
        asyncio.run(_write_workspaces(settings, target))


def _write_versions(settings: Settings, target: Target) -> None:
    """Write the versions of templates that users built. None is ever changed."""
    problem = ""
    for _ in range(_TRIES):
        paths = tuple(
            f"versions/{one.name}"
            for one in sorted((settings.home / "versions").glob("[!.]*"))
            if one.name != "images"
        )
        if not paths:
            return
        target.progress(f"copying {len(paths)} versions of templates")
        contents = Contents(Kind.MACHINES, "templates", paths)
        there = partial(_those_there, contents, settings.home)
        written, problem = _write_archive(settings.home, contents, target, there)
        if written.is_complete:
            return
    raise UnavailableError(f"cannot copy the versions of templates: {problem}")


def _those_there(contents: Contents, home: Path) -> Contents:
    return replace(contents, paths=tuple(one for one in contents.paths if (home / one).is_dir()))


def _write_machines(settings: Settings, include: frozenset[Include], target: Target) -> None:
    home = settings.home
    machines = Records(home / "machines").all() if Include.PAUSED in include else []
    paused = _paused_of(machines)
    kept = {one.sandbox_id for one in paused}
    for sandbox_id in sorted(one.sandbox_id for one in machines if one.sandbox_id):
        if sandbox_id not in kept:
            target.progress(f"leaving out {sandbox_id}: it is not paused")
    images = {f"machines/{one.id}": one.image for one in paused}
    if Include.SNAPSHOTS in include:
        images |= {f"snapshots/{name}": image for name, image in _snapshots_in(home)}
    # With the images, what tells which templates use them: the home needs no build then.
    used = frozenset(images.values())
    images |= dict(_templates_with(home, used))
    # Those of users' templates are with the versions.
    own = {one: f"versions/images/{one}" for one in used}
    images |= {path: one for one, path in own.items() if (home / path).is_dir()}
    looks = {path: _looks(home / path) for path in images}
    # What was resumed or removed since it was listed is none of it any more.
    still = {one.id for one in _paused_of(Records(home / "machines").all())} if paused else set()
    before = {
        path: look
        for path, look in looks.items()
        if look is not None and (not path.startswith("machines/") or Path(path).name in still)
    }
    # Before the machines: an image goes only when nothing needs it any more.
    needed = sorted({image for image in images.values() if (settings.images_dir / image).is_dir()})
    if needed:
        target.progress(f"copying {len(needed)} images of templates")
        images_of_them = Contents(Kind.IMAGES, "images", tuple(needed))
        written, problem = _write_archive(
            settings.images_dir, images_of_them, target, lambda: images_of_them
        )
        if not written.is_complete:
            raise UnavailableError(f"cannot copy the images: {problem}")
    for _ in range(_TRIES):
        if not before:
            return
        machines_of = [path for path in before if path.startswith(("machines/", "snapshots/"))]
        target.progress(f"copying {len(machines_of)} paused machines and snapshots")
        contents = Contents(Kind.MACHINES, "machines", tuple(sorted(before)))
        unchanged = partial(_unchanged, contents, home, before)
        written, problem = _write_archive(home, contents, target, unchanged)
        for path in sorted(set(before) - set(written.paths)):
            target.progress(f"leaving out {path}: it was used meanwhile")
        if written.is_complete:
            return
        if written.paths == contents.paths:
            raise UnavailableError(f"cannot copy the machines: {problem}")
        before = {path: before[path] for path in written.paths}
    raise UnavailableError("cannot copy the machines: they are in use; try again")


def _paused_of(machines: Iterable[Record]) -> list[Record]:
    return [one for one in machines if one.phase is Phase.PAUSED]


def _snapshots_in(home: Path) -> Iterator[tuple[str, str]]:
    """Yield the id and the image of each snapshot whose manifest can be read."""
    for folder in sorted((home / "snapshots").glob("*")):
        if is_uuid(folder.name):
            try:
                about = json.loads((folder / "manifest.json").read_text())["about"]
                yield folder.name, str(about["image"])
            except (OSError, ValueError, KeyError, TypeError):
                continue


def _templates_with(home: Path, images: frozenset[str]) -> Iterator[tuple[str, str]]:
    """Yield the state of each template that uses one of these images."""
    for path in sorted((home / "templates").glob("*.json")):
        try:
            image = str(json.loads(path.read_text())["digest"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if image in images:
            yield f"templates/{path.name}", image


def _unchanged(contents: Contents, home: Path, before: Mapping[str, object]) -> Contents:
    same = (path for path in contents.paths if _looks(home / path) == before[path])
    return replace(contents, paths=tuple(same))


def _looks(folder: Path) -> dict[str, tuple[int, int, int]] | None:
    """Return what shows whether a file, or one in a folder, was changed; None if it is going."""
    found = {}
    try:
        for path in (folder, *sorted(folder.rglob("*"))):
            look = path.lstat()
            found[str(path)] = (look.st_size, look.st_mtime_ns, look.st_ino)
    except OSError:
        return None
    return found


async def _write_workspaces(settings: Settings, target: Target) -> None:
    volumes = volumes_of(settings)
    async with open_database(settings) as store, store.read() as tx:
        workspaces = [one for one in await tx.workspaces.every() if one.removed_at is None]
    existing = [one for one in workspaces if _is_here(settings, one.id)]
    target.progress(f"copying {len(existing)} workspaces")
    try:
        for one in existing:
            for _ in range(_TRIES):
                if not _is_here(settings, one.id):
                    break  # it was deleted, and must not be made again
                async with volumes.open(one.id, one.quota_bytes) as place:
                    if await _written(one, place, target):
                        break
            else:
                target.progress(f"leaving out the workspace {one.id}: it is closed each time")
    finally:
        # A running server closes those that it does not use itself, and only it knows which.
        if running_server(settings.home) is None:
            await volumes.close()


async def _written(workspace: Workspace, place: Path, target: Target) -> bool:
    """Write a workspace to a backup; return False if it was just being closed."""
    return await stopped_by(target.stop, in_thread(_write_workspace, workspace, place, target))


async def stopped_by(stop: threading.Event, work: Coroutine[Any, Any, _T]) -> _T:
    """Return the result of work in a thread. If cancelled, set what has it stop soon, and wait for
    its end."""
    doing = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([doing])
        doing.exception()  # what it failed with does not matter any more
        raise


def _is_here(settings: Settings, workspace_id: str) -> bool:
    """Tell whether a workspace has files here. Where it is an image, an empty directory of its name
    is only where that was mounted."""
    place = settings.workspaces_dir / workspace_id
    if place.with_name(f"{workspace_id}.ext4").exists():
        return True
    if isinstance(volumes_of(settings), ImageVolumes):
        return place.is_dir() and any(place.iterdir())
    return place.exists()


def check_moved(settings: Settings, found: Iterable[tuple[Contents, Path]]) -> None:
    """Return if no workspace to be restored is still mounted from an image that was moved away:
    what is mounted would be taken for it, and machines would go on writing to the moved one.

    Raises:
        ConflictError: one is; the message says what to do.
    """
    for contents, _ in found:
        place = settings.workspaces_dir / contents.name
        if contents.kind is not Kind.WORKSPACE or not place.is_mount():
            continue
        if place.with_name(f"{contents.name}.ext4").exists():
            continue
        users = sorted(
            one.sandbox_id
            for one in Records(settings.home / "machines").all()
            if one.phase not in (Phase.PAUSED, Phase.DEAD)
            and one.share is not None
            and any(mount.workspace_id == contents.name for mount in one.share.mounts)
        )
        pause = f"start the server, pause {', '.join(users)}, stop it, " if users else ""
        raise ConflictError(
            f"cannot restore the workspace {contents.name}: its image was moved away while it is "
            f"mounted at {place}; {pause}run `umount {place}`, and restore again"
        )


def workspaces_here(settings: Settings) -> set[str]:
    """Return the ids of the workspaces that have files here."""
    folder = settings.workspaces_dir
    names = {one.stem for one in folder.iterdir()} if folder.is_dir() else set()
    return {one for one in names if is_uuid(one) and _is_here(settings, one)}


def _write_workspace(workspace: Workspace, place: Path, target: Target) -> bool:
    contents = Contents(Kind.WORKSPACE, workspace.id, (".",), workspace.quota_bytes)
    # Held open, so that the volume stays mounted until all of it is read.
    descriptor = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
    try:
        is_image = place.with_name(f"{place.name}.ext4").exists()
        if is_image and os.fstat(descriptor).st_dev == place.parent.stat().st_dev:
            return False  # the server has unmounted it meanwhile
        root, problem = Path(f"/proc/{os.getpid()}/fd/{descriptor}"), ""
        for _ in range(_TRIES):
            written, problem = _write_archive(root, contents, target, lambda: contents)
            if written.is_complete:
                return True
    finally:
        os.close(descriptor)
    # A tenant's files must not keep all others from being backed up.
    log.error("leaving the workspace %s out of the backup: %s", workspace.id, problem)
    target.progress(f"leaving out the workspace {workspace.id}: {problem}")
    return True


def _write_archive(
    root: Path, contents: Contents, target: Target, after: Callable[[], Contents]
) -> tuple[Contents, str]:
    """Write files to a backup. Return what is in it, as `after` tells once all is read, and the
    problem, if it is not complete."""
    number = next(target.numbers)
    name = f"{PREFIX}/{contents.kind}/{number}"
    command = [*_TAR, "--create", "--hole-detection=seek", "--pax-option=delete=atime,delete=ctime",
               f"--directory={root}", "--", *contents.paths]  # fmt: skip
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr
        ) as process,
    ):
        assert process.stdout is not None
        try:
            for piece in itertools.count():
                data = process.stdout.read(_PIECE)
                if not data:
                    break
                if target.stop.is_set():
                    raise UnavailableError("the backup was stopped")
                _add(target.tar, f"{name}/{piece:08}", data)
            code = process.wait(_END_S)
        except BaseException:
            process.kill()
            raise
        written, problem = after(), ""
        # 1: a file was changed or removed while it was read; 2: one could not be read at all.
        if code not in (0, 1):
            problem = _text_in(stderr) or f"tar ended with {code}"
            written = replace(written, is_complete=False)
    _add(target.tar, f"{name}.json", json.dumps(asdict(written)).encode())
    return written, problem


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(data), 0o600
    tar.addfile(member, io.BytesIO(data))


# --- out of a backup ------------------------------------------------------------------------------


class Unpacking:
    """Unpacks the archives of a backup as they come, each beside where its files belong.

    Without `settings`, only what is in them is read.
    """

    def __init__(self, scratch: Path, settings: Settings | None) -> None:
        self.found: list[tuple[Contents, Path]] = []
        """What is complete, and where its files are."""
        self.problems: list[str] = []
        """What could not be unpacked: a tenant's files must not keep all others from returning."""
        self._scratch = scratch
        self._settings = settings
        self._images: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: IO[bytes] | None = None
        self._place: Path | None = None
        self._is_lost = False

    def take(self, name: str, content: IO[bytes]) -> None:
        """Take the next member of the backup.

        Raises:
            DamagedError: it is not one of an archive.
            UnavailableError: it cannot be unpacked.
        """
        parts = Path(name).parts
        if len(parts) == 4 and parts[1] in set(Kind):
            if self._settings is not None:
                self._feed(Kind(parts[1]), parts[2], content)
        elif len(parts) == 3 and parts[2].endswith(".json"):
            self._finish(content)
        else:
            raise DamagedError(f"cannot read the backup: it has a file {name!r}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Remove what was not put back."""
        self._end()
        if self._images is not None:
            remove_tree(self._images)

    def _feed(self, kind: Kind, number: str, content: IO[bytes]) -> None:
        if self._process is None:
            self._place = self._beside(kind) / number
            self._place.mkdir(parents=True)
            self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed at the end
            self._process = subprocess.Popen(
                [*_TAR, "--extract", "--preserve-permissions", "--same-owner",
                 f"--directory={self._place}"],
                stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._stderr,
            )  # fmt: skip
        assert self._process.stdin is not None
        try:
            shutil.copyfileobj(content, self._process.stdin, _PIECE)
        except BrokenPipeError:
            self._is_lost = True  # its end tells why

    def _beside(self, kind: Kind) -> Path:
        """Return a directory on the file system where the files of a kind belong, so that they can
        be renamed; those of workspaces are copied into their volumes."""
        assert self._settings is not None
        if kind is not Kind.IMAGES:
            return self._scratch / PREFIX / kind
        if self._images is None:
            folder = self._settings.images_dir
            folder.mkdir(parents=True, exist_ok=True, mode=0o755)
            self._images = Path(tempfile.mkdtemp(prefix=".restoring-", dir=folder))
        return self._images

    def _finish(self, content: IO[bytes]) -> None:
        values = json.load(content)
        contents = Contents(
            **{**values, "kind": Kind(values["kind"]), "paths": tuple(values["paths"])}
        )
        place, self._place = self._place, None
        code, problem = self._end()
        is_in_part = code == _IN_PART and contents.kind is Kind.WORKSPACE
        if problem and contents.is_complete and not is_in_part:
            raise UnavailableError(f"cannot unpack the backup: {problem}")
        if problem and contents.is_complete:  # names that tar can write and not read, say
            self.problems.append(f"a part of the workspace {contents.name} is lost: {problem}")
        if contents.is_complete:
            self.found.append((contents, place or self._scratch))
        elif place is not None:
            remove_tree(place)

    def _end(self) -> tuple[int, str]:
        """End the program that unpacks; return how it ended, and what went wrong, if anything
        did."""
        process, stderr = self._process, self._stderr
        self._process = self._stderr = None
        if process is None or stderr is None:
            return 0, ""
        with stderr:
            assert process.stdin is not None
            try:
                process.stdin.close()
            except BrokenPipeError:
                self._is_lost = True
            try:
                code = process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                code = process.wait(_END_S)
            is_lost, self._is_lost = self._is_lost, False
            problem = _text_in(stderr) or f"tar ended with {code}"
            return code, problem if code or is_lost else ""


def missing(settings: Settings, contents: Contents) -> list[str]:
    """Return what is in an archive and not here."""
    if contents.kind is Kind.WORKSPACE:
        name = contents.name
        return [] if _is_here(settings, name) else [f"workspaces/{name}"]
    prefix = "images/" if contents.kind is Kind.IMAGES else ""
    root = settings.images_dir if contents.kind is Kind.IMAGES else settings.home
    return [f"{prefix}{one}" for one in contents.paths if not os.path.lexists(root / one)]


def put_back(
    settings: Settings,
    found: Iterable[tuple[Contents, Path]],
    *,
    put: Callable[[Path, Path], None],
    progress: Progress,
) -> None:
    """Put images, machines and snapshots back that are not there; `put` renames one. What is there
    is newer than the backup, and stays."""
    for contents, place in found:
        if contents.kind is Kind.WORKSPACE:
            continue
        root = settings.images_dir if contents.kind is Kind.IMAGES else settings.home
        taken = _sandboxes_in(settings.home)
        for name in contents.paths:
            source, target = place / name, root / name
            if os.path.lexists(target) or _sandbox_of(source) in taken:
                progress(f"leaving {name}: it is there")
                continue
            for folder in (target.parent.parent, target.parent):
                if not folder.is_dir():
                    folder.mkdir(mode=0o711 if folder.name in _PASSABLE else 0o700)
            progress(f"putting {name} back")
            put(source, target)


def _sandboxes_in(home: Path) -> set[str]:
    return {one.sandbox_id for one in Records(home / "machines").all() if one.sandbox_id}


def _sandbox_of(folder: Path) -> str | None:
    """Return the sandbox of a machine's folder; None if it is none."""
    try:
        record: dict[str, object] = json.loads((folder / "resident.json").read_text())
    except (OSError, ValueError):
        return None
    return str(record.get("sandbox_id", ""))


async def put_workspaces_back(
    settings: Settings, found: Iterable[tuple[Contents, Path]], progress: Progress
) -> None:
    """Put workspaces back that have no volume here. What is there stays.

    Raises:
        UnavailableError: a volume cannot be made.
    """
    volumes = volumes_of(settings)
    try:
        for contents, place in found:
            if contents.kind is not Kind.WORKSPACE:
                continue
            if (settings.workspaces_dir / f"{contents.name}{UNFINISHED}").exists():
                await volumes_of(settings).remove(contents.name)  # a restore was killed
            if _is_here(settings, contents.name):
                progress(f"leaving the workspace {contents.name}: it is there")
                continue
            progress(f"putting the workspace {contents.name} back")
            begun = settings.workspaces_dir / f"{contents.name}{UNFINISHED}"
            begun.parent.mkdir(mode=0o700, exist_ok=True)
            begun.touch()
            try:
                async with volumes.open(contents.name, contents.quota_bytes) as target:
                    if problem := await in_thread(_copy_tree, place, target):
                        progress(f"a part of the workspace {contents.name} is lost: {problem}")
                _mount_anew(settings.home, contents.name)
            except BaseException:
                await volumes.remove(contents.name)
                raise
            finally:
                begun.unlink()
    finally:
        await volumes.close()


def _mount_anew(home: Path, workspace_id: str) -> None:
    """Have paused machines mount a restored workspace again when they are resumed."""
    records = Records(home / "machines")
    for one in records.all():
        mounts = one.share.mounts if one.share is not None else ()
        if any(mount.workspace_id == workspace_id for mount in mounts):
            records.write(replace(one, mounts_anew=True))


def _copy_tree(source: Path, target: Path) -> str:
    """Copy what is in a directory, and return what could not be copied, if anything."""
    done = subprocess.run(
        ["cp", "--archive", "--sparse=always", "--no-target-directory", "--", source, target],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False,
    )  # fmt: skip
    return done.stderr.decode(errors="replace").strip()[-1000:] if done.returncode else ""


def remove_tree(folder: Path) -> None:
    """Remove a directory, however deep a tenant has made it: Python's own way is recursive."""
    subprocess.run(["rm", "-rf", "--one-file-system", "--", folder], check=False)


def _text_in(stderr: IO[bytes]) -> str:
    stderr.seek(0)
    return stderr.read().decode(errors="replace").strip()[-1000:]
