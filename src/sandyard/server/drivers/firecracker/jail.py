"""The jail of one Firecracker process: its folder, its pipes, and the jailer.

    <folder>/console           a pipe: the guest's console output, limited by the pipe's size
    <folder>/log               a pipe: Firecracker's own log
    <folder>/api.sock          the API's socket
    <folder>/jail/firecracker/<id>/root/      all that the process can see

Pipes and socket are made, or moved, out of the process's reach before any guest code runs. So
nothing that the process puts in their place later is ever opened.
"""

import asyncio
import contextlib
import fcntl
import functools
import logging
import os
import shutil
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sandyard.server.core.errors import InternalError, UnavailableError
from sandyard.server.drivers.namespaces import path_of
from sandyard.server.drivers.processes import DetachedProcess, boot_id, start_time
from sandyard.server.drivers.programs import opened_as_written_by, output_of
from sandyard.server.drivers.sparse import copy_sparse
from sandyard.server.tasks import to_the_end

log = logging.getLogger(__name__)

SOCKET, CONSOLE, LOG = "api.sock", "console", "log"
_LIMIT_S = 20.0
_POLL_S = 0.002
_PIPE_SIZE = 256 * 1024
_FILES_MAX = 256
_PIDS_MAX = 64


_YOUNG_S = 60.0
_PROGRAM, _PID = "firecracker", "firecracker.pid"
_CGROUPS = Path("/sys/fs/cgroup")
_PIDS_V1 = _CGROUPS / "pids"


def groups(name: str) -> tuple[Path, Path]:
    """Return the possible paths of a control group, for cgroups of either version."""
    return _CGROUPS / name, _PIDS_V1 / name


@dataclass(frozen=True)
class Jail:
    """The jail of a process, the account it runs under, and the parent of its control group."""

    folder: Path
    name: str
    uid: int
    group: str

    @property
    def base(self) -> Path:
        """The folder in which the jailer makes jails."""
        return self.folder / "jail"

    @property
    def root(self) -> Path:
        """The process's root directory."""
        return self.base / _PROGRAM / self.name / "root"

    def prepare(self) -> None:
        """Create the jail; what an earlier attempt left is removed."""
        shutil.rmtree(self.base, ignore_errors=True)
        for name in (SOCKET, CONSOLE, LOG):
            (self.folder / name).unlink(missing_ok=True)
        self.root.mkdir(mode=0o700, parents=True)
        os.mkfifo(self.folder / CONSOLE, 0o600)
        os.mkfifo(self.root / LOG, 0o600)
        self._hand_over(self.root / LOG)

    def put(self, source: Path, name: str) -> None:
        """Put a file into the jail: a hard link, or a copy.

        Raises:
            FileNotFoundError: it does not exist.
        """
        target = self.root / name
        try:
            target.hardlink_to(source)
        except FileNotFoundError:
            raise
        except OSError:  # on another file system
            copy_sparse(source, target)
            self._hand_over(target)

    def write(self, name: str, data: bytes) -> None:
        """Write a file of the process's own into the jail."""
        descriptor = os.open(self.root / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        self._hand_over(self.root / name)

    def take(self, name: str, target: Path) -> None:
        """Move a file that the process wrote out of the jail.

        Raises:
            InternalError: it is not a regular file of the process's own.
            NoCapacityError: the host's disk is full.
        """
        source = self.root / name
        try:
            with opened_as_written_by(self.uid, source) as descriptor:
                os.fchown(descriptor, 0, 0)
                os.fchmod(descriptor, 0o400)
                # A copy, because the writer may still have it open.
                copy_sparse(Path(f"/proc/self/fd/{descriptor}"), target)
        finally:
            source.unlink(missing_ok=True)

    def copy_out(self, name: str, target: Path) -> None:
        """Copy a file that the process wrote and will write to again.

        Raises: see `take`.
        """
        with opened_as_written_by(self.uid, self.root / name) as descriptor:
            copy_sparse(Path(f"/proc/self/fd/{descriptor}"), target)

    async def launch(self, jailer: str, binary: str, *, netns: str | None) -> int:
        """Start the detached process, and return its pid once its API listens.

        Raises:
            UnavailableError: the jailer is missing.
            InternalError: it did not start; the message says why.
        """
        console = os.open(self.folder / CONSOLE, os.O_RDWR | os.O_NONBLOCK)
        try:
            with contextlib.suppress(OSError):  # beyond what one account may have; smaller does
                fcntl.fcntl(console, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
            await to_the_end(self._run(jailer, binary, netns, console))
            return await self._until_up(console)
        except BaseException as error:
            await to_the_end(self._end())
            if isinstance(error, TimeoutError):
                raise InternalError("Firecracker does not come up in time") from error
            raise
        finally:
            os.close(console)

    async def _end(self) -> None:
        """End what the jailer may have started, even if it still runs as root."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.root / _PID).read_text())
            started = start_time(pid)
            if started is not None:
                process = DetachedProcess.find(pid, started=started, boot=boot_id())
                if process is not None:
                    with contextlib.closing(process):
                        await process.kill()

    async def _run(self, jailer: str, binary: str, netns: str | None, console: int) -> None:
        groups = cgroup_arguments(self.group)
        try:
            await self._run_in(groups, jailer, binary, netns, console)
        except InternalError as error:
            if not groups or "cgroup" not in error.message.lower():
                raise
            # In a container they are often visible but not writable.
            _warn_of_groups(error.message)
            self._remove_groups()
            (self.root / _PROGRAM).unlink(missing_ok=True)
            await self._run_in([], jailer, binary, netns, console)

    async def _run_in(
        self, groups: list[str], jailer: str, binary: str, netns: str | None, console: int
    ) -> None:
        network = [] if netns is None else ["--netns", str(path_of(netns))]
        command = [
            jailer, "--id", self.name, "--exec-file", str(Path(binary).resolve()),
            "--uid", str(self.uid), "--gid", str(self.uid), "--chroot-base-dir", str(self.base),
            *network, "--new-pid-ns", "--resource-limit", f"no-file={_FILES_MAX}", *groups, "--",
            "--api-sock", f"/{SOCKET}", "--log-path", f"/{LOG}", "--level", "Info",
        ]  # fmt: skip
        try:
            await output_of(command, limit_s=_LIMIT_S, to=console)
        except ChildProcessError as error:
            output = last_line(read_pipe(console))
            raise InternalError(f"Firecracker's jailer failed: {output}") from error
        except TimeoutError as error:
            raise InternalError("Firecracker's jailer does not come to an end") from error
        except OSError as error:
            raise UnavailableError(f"cannot run the jailer {jailer}: {error}") from error

    async def _until_up(self, console: int) -> int:
        """Return the pid once the API listens, with its socket moved out of the process's reach."""
        pid = int((self.root / _PID).read_text())

        async def until(condition: Callable[[], bool]) -> None:
            while not condition():
                if start_time(pid) is None:
                    raise InternalError(f"Firecracker ended: {last_line(read_pipe(console))}")
                await asyncio.sleep(_POLL_S)

        async with asyncio.timeout(_LIMIT_S):
            await until((self.root / SOCKET).is_socket)
            for name in (SOCKET, LOG):
                (self.root / name).rename(self.folder / name)
            # A socket exists a moment before it is listened on.
            await until(lambda: _listens(self.folder / SOCKET))
        return pid

    def remove(self) -> None:
        """Remove everything that the jailer made; no process may be left in it."""
        self._remove_groups()
        shutil.rmtree(self.base, ignore_errors=True)

    def _remove_groups(self) -> None:
        for parent in groups(self.group):
            with contextlib.suppress(OSError):
                (parent / self.name).rmdir()

    def _hand_over(self, path: Path) -> None:
        os.chown(path, self.uid, self.uid, follow_symlinks=False)


def _listens(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as probe:
        probe.setblocking(False)
        with contextlib.suppress(OSError):
            probe.connect(str(path))
            return True
    return False


def open_pipe(path: Path) -> int | None:
    """Return a descriptor to read a pipe of a jail; None if it does not exist."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None


def read_pipe(descriptor: int) -> bytes:
    """Return the content of a pipe; its size is limited."""
    output = b""
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(descriptor, 65536):
            output += piece
            if len(output) >= 4 * _PIPE_SIZE:
                break
    return output


def last_line(output: bytes) -> str:
    """Return the last line of a text, without a panic's advice to programmers."""
    lines = output.decode(errors="replace").strip().splitlines()
    messages = [one for one in lines if not one.startswith("note: run with `RUST_BACKTRACE")]
    return messages[-1][:500] if messages else "it said nothing"


def cgroup_arguments(group: str) -> list[str]:
    """Return the jailer's arguments for a control group that limits a process, if the host has
    cgroups.

    It is made in a group that all machines of an installation share.
    """
    version = "2" if _has_unified() else "1" if _PIDS_V1.is_dir() else None
    if version is None:
        return []
    own = ["--parent-cgroup", group, "--cgroup", f"pids.max={_PIDS_MAX}"]
    return ["--cgroup-version", version, *own]


def remove_groups(group: str) -> None:
    """Remove the control group of an installation that has no machines left."""
    for parent in groups(group):
        with contextlib.suppress(OSError):
            for inside in parent.iterdir():
                with contextlib.suppress(OSError):
                    inside.rmdir()
        with contextlib.suppress(OSError):
            parent.rmdir()


def sweep_groups(group: str) -> None:
    """Remove the control groups of machines that ended unobserved.

    A recent one may belong to a machine that is starting; one in use cannot be removed.
    """
    now = time.time()  # noqa: TID251 - a file's age is by the host's clock, whatever a test's says
    for parent in groups(group):
        with contextlib.suppress(OSError):
            for inside in parent.iterdir():
                with contextlib.suppress(OSError):
                    if now - inside.stat().st_mtime > _YOUNG_S:
                        inside.rmdir()


@functools.lru_cache(maxsize=8)
def _warn_of_groups(why: str) -> None:
    log.warning("cannot make control groups: %s; hypervisors run without their limits", why)


def _has_unified() -> bool:
    try:
        return "pids" in (_CGROUPS / "cgroup.controllers").read_text().split()
    except OSError:
        return False
