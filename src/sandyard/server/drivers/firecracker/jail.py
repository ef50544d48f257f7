"""The jail of one Firecracker process: its folder, its pipes, and the jailer that locks it in.

    <folder>/console           a pipe: what the guest prints; bounded by the pipe's size
    <folder>/log               a pipe: what Firecracker itself says
    <folder>/api.sock          the API's socket
    <folder>/jail/firecracker/<id>/root/      all that the process can see

Pipes and socket are made or moved outside of what the process can reach, before any guest code
runs: nothing that it might put in their place later is ever opened.
"""

import asyncio
import contextlib
import fcntl
import os
import shutil
import stat
from dataclasses import dataclass
from pathlib import Path

from sandyard.server.core.errors import InternalError, UnavailableError
from sandyard.server.core.threads import to_the_end
from sandyard.server.drivers.namespaces import path_of
from sandyard.server.drivers.processes import start_time
from sandyard.server.drivers.sparse import copy_sparse

SOCKET, CONSOLE, LOG = "api.sock", "console", "log"
_LIMIT_S = 20.0
_POLL_S = 0.002
_PIPE_SIZE = 256 * 1024
_FILES_MAX = 256
_PIDS_MAX = 64


@dataclass(frozen=True)
class Jail:
    """Where a process is locked in, and the account it runs under there."""

    folder: Path
    name: str
    uid: int

    @property
    def base(self) -> Path:
        """The folder that the jailer is told to make jails in."""
        return self.folder / "jail"

    @property
    def root(self) -> Path:
        """What the process sees as `/`."""
        return self.base / "firecracker" / self.name / "root"

    def prepare(self) -> None:
        """Make the jail anew; nothing that an earlier try left is in it."""
        shutil.rmtree(self.base, ignore_errors=True)
        for name in (SOCKET, CONSOLE, LOG):
            (self.folder / name).unlink(missing_ok=True)
        self.root.mkdir(mode=0o700, parents=True)
        os.mkfifo(self.folder / CONSOLE, 0o600)
        os.mkfifo(self.root / LOG, 0o600)
        self._hand_over(self.root / LOG)

    def put(self, source: Path, name: str) -> None:
        """Let the process see a file under a name: the file itself, else a copy of it.

        Raises:
            FileNotFoundError: it is not there.
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
        """Put a file that is the process's own into the jail."""
        descriptor = os.open(self.root / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
        self._hand_over(self.root / name)

    def take(self, name: str, target: Path) -> None:
        """Take a file out that the process wrote, and sync it.

        Raises:
            InternalError: it is no plain file of the process's own.
            NoCapacityError: the host's disk is full.
        """
        source = self.root / name
        descriptor = os.open(source, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            found = os.fstat(descriptor)
            is_plain = stat.S_ISREG(found.st_mode) and found.st_nlink == 1
            if not is_plain or found.st_uid != self.uid:
                raise InternalError(f"cannot save the machine: {name} is no file of its own")
            os.fchown(descriptor, 0, 0)
            os.fchmod(descriptor, 0o400)
            # A copy: who wrote it may still hold it open.
            copy_sparse(Path(f"/proc/self/fd/{descriptor}"), target, sync=True)
        finally:
            os.close(descriptor)
            source.unlink(missing_ok=True)

    async def launch(self, jailer: str, binary: str, *, netns: str | None) -> int:
        """Start the process, which nobody owns, and return its pid once its API is there.

        Raises:
            UnavailableError: the jailer is not there.
            InternalError: it did not come up; the message says why.
        """
        console = os.open(self.folder / CONSOLE, os.O_RDWR | os.O_NONBLOCK)
        try:
            with contextlib.suppress(OSError):  # beyond what one account may have; smaller does
                fcntl.fcntl(console, fcntl.F_SETPIPE_SZ, _PIPE_SIZE)
            await to_the_end(self._run(self._command(jailer, binary, netns), console))
            return await self._until_up(console)
        finally:
            os.close(console)

    def _command(self, jailer: str, binary: str, netns: str | None) -> list[str]:
        network = [] if netns is None else ["--netns", str(path_of(netns))]
        return [
            jailer, "--id", self.name, "--exec-file", str(Path(binary).resolve()),
            "--uid", str(self.uid), "--gid", str(self.uid), "--chroot-base-dir", str(self.base),
            *network, "--new-pid-ns", "--resource-limit", f"no-file={_FILES_MAX}",
            *cgroup_arguments(), "--",
            "--api-sock", f"/{SOCKET}", "--log-path", f"/{LOG}", "--level", "Info",
        ]  # fmt: skip

    async def _run(self, command: list[str], console: int) -> None:
        try:
            process = await asyncio.create_subprocess_exec(
                *command, stdin=asyncio.subprocess.DEVNULL, stdout=console, stderr=console,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            raise UnavailableError(f"cannot run the jailer {command[0]}: {error}") from error
        try:
            async with asyncio.timeout(_LIMIT_S):
                code = await process.wait()
        except TimeoutError as error:
            with contextlib.suppress(ProcessLookupError):
                process.kill()
            await process.wait()
            raise InternalError("Firecracker's jailer does not come to an end") from error
        if code != 0:
            raise InternalError(f"Firecracker's jailer failed: {last_line(read_pipe(console))}")

    async def _until_up(self, console: int) -> int:
        """Return the pid once the API's socket is there, and move that out of reach."""
        pid = int((self.root / "firecracker.pid").read_text())
        async with asyncio.timeout(_LIMIT_S):
            while not (self.root / SOCKET).is_socket():
                if start_time(pid) is None:
                    raise InternalError(f"Firecracker ended: {last_line(read_pipe(console))}")
                await asyncio.sleep(_POLL_S)
        for name in (SOCKET, LOG):
            (self.root / name).rename(self.folder / name)
        return pid

    def remove(self) -> None:
        """Remove what the jailer made outside of the folder."""
        for group in _cgroups_of(self.name):
            with contextlib.suppress(OSError):
                group.rmdir()

    def _hand_over(self, path: Path) -> None:
        os.chown(path, self.uid, self.uid, follow_symlinks=False)


def open_pipe(path: Path) -> int | None:
    """Return a descriptor to read a pipe of a jail with; None if it is gone."""
    try:
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    except OSError:
        return None


def read_pipe(descriptor: int) -> bytes:
    """Return what lies in a pipe; it is bounded by the pipe's size."""
    said = b""
    with contextlib.suppress(BlockingIOError):
        while piece := os.read(descriptor, 65536):
            said += piece
            if len(said) >= 4 * _PIPE_SIZE:
                break
    return said


def last_line(said: bytes) -> str:
    """Return the last line of what was said."""
    lines = said.decode(errors="replace").strip().splitlines()
    return lines[-1][:500] if lines else "it said nothing"


def cgroup_arguments() -> list[str]:
    """Return the jailer's arguments that bound a process by a control group, where there is one."""
    if _has_unified():
        return ["--cgroup-version", "2", "--cgroup", f"pids.max={_PIDS_MAX}"]
    if _PIDS_V1.is_dir():
        return ["--cgroup-version", "1", "--cgroup", f"pids.max={_PIDS_MAX}"]
    return []


_CGROUPS = Path("/sys/fs/cgroup")
_PIDS_V1 = _CGROUPS / "pids"


def _has_unified() -> bool:
    try:
        return "pids" in (_CGROUPS / "cgroup.controllers").read_text().split()
    except OSError:
        return False


def _cgroups_of(name: str) -> list[Path]:
    return [_CGROUPS / "firecracker" / name, _PIDS_V1 / "firecracker" / name]
