"""An installation's files beside its database: key, lock, pid."""

import fcntl
import os
import platform
import secrets
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final, TextIO

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_ssh_private_key,
)

from sandyard.server.core.errors import UnavailableError
from sandyard.server.core.ids import new_uuid
from sandyard.server.node.machines.records import Records

_TELLING_S, _LOOK_S = 2.0, 0.02
_STOP_LIMIT_S = 60.0


def forget_environment() -> None:
    """Remove the installation's settings from the environment after reading them: some are secrets,
    and child processes must not inherit them."""
    for name in [one for one in os.environ if one.startswith("SANDYARD_")]:
        del os.environ[name]


def secret_key(home: Path) -> bytes:
    """Return the installation's key, created at first use. Without it, stored secrets cannot be
    read."""
    path = home / "secret.key"
    home.mkdir(parents=True, exist_ok=True, mode=0o755)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return path.read_bytes()
    with os.fdopen(descriptor, "wb") as file:
        file.write(secrets.token_bytes(32))
        file.flush()
        os.fsync(file.fileno())
    return path.read_bytes()


NODE_FILE: Final = "node.json"
"""The file in `cluster` in which a node keeps its identity."""


def is_member(home: Path) -> bool:
    """Tell whether this host has joined an installation on several hosts as a node."""
    return (home / "cluster" / NODE_FILE).exists()


def server_id_of(home: Path) -> str:
    """Return the id of the server that uses a home, the same at every start."""
    path = home / "server.id"
    home.mkdir(parents=True, exist_ok=True, mode=0o755)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        if known := path.read_text().strip():
            return known
        descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
    with os.fdopen(descriptor, "w") as file:
        file.write(new_uuid())
    return path.read_text()


def ssh_host_key(home: Path) -> bytes:
    """Return the SSH gateway's private host key (OpenSSH format), created at first use. Clients
    that know another one refuse to connect."""
    path = home / "ssh_host_ed25519_key"
    home.mkdir(parents=True, exist_ok=True, mode=0o755)
    if not path.exists():
        made = Ed25519PrivateKey.generate().private_bytes(
            Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()
        )
        part = home / f"ssh_host_ed25519_key.{os.getpid()}.part"
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(made)
            file.flush()
            os.fsync(file.fileno())
        with suppress(FileExistsError):
            os.link(part, path)  # of two that make one at once, both take the first
        part.unlink()
    return path.read_bytes()


def ssh_public_key(private: bytes) -> str:
    """Return a host key's public half, `ssh-ed25519 AAAA…`.

    Raises:
        UnavailableError: it cannot be read.
    """
    try:
        key = load_ssh_private_key(private, password=None)
    except ValueError as error:
        raise UnavailableError(
            "cannot read ssh_host_ed25519_key in the home: put the right one back, or remove it "
            "and a new one is made, which clients will ask about"
        ) from error
    return key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH).decode()


@contextmanager
def only_server(home: Path) -> Iterator[None]:
    """Lock the home for one server, and write its pid to `server.pid`.

    Raises:
        UnavailableError: another server is running.
    """
    home.mkdir(parents=True, exist_ok=True)
    pid = home / "server.pid"
    with _private_lock(home) as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UnavailableError(
                f"cannot continue: another server uses {home}; stop it with scripts/down, or "
                "choose another SANDYARD_HOME"
            ) from error
        pid.write_text(f"{os.getpid()}\n")
        try:
            yield
        finally:
            pid.unlink(missing_ok=True)


def running_server(home: Path) -> int | None:
    """Return the pid of the server that holds a home, or None.

    Raises:
        UnavailableError: a process that is not a server holds the lock; nothing may be killed
            because of that.
    """
    if not (home / "server.lock").exists():
        return None
    until = time.monotonic() + _TELLING_S
    while True:
        with _private_lock(home) as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                pid = _written_pid(home)
                if pid is not None and _has_open(pid, home / "server.lock"):
                    return pid
                # It may be about to say so, or have just taken that back.
                if time.monotonic() > until:
                    raise UnavailableError(
                        f"cannot tell which process holds {home / 'server.lock'}: server.pid "
                        "names none that does; find it with `fuser`, and end it"
                    ) from error
            else:
                return None
        time.sleep(_LOOK_S)


def stop_server(home: Path) -> int | None:
    """Stop a home's server and return its pid, or None if there was none.

    Raises:
        UnavailableError: it does not stop.
    """
    pid = running_server(home)
    if pid is None:
        return None
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)
    until = time.monotonic() + _STOP_LIMIT_S
    while running_server(home) is not None:
        if time.monotonic() > until:
            raise UnavailableError(
                f"cannot stop the server: process {pid} is still running; kill it"
            )
        time.sleep(_LOOK_S)
    return pid


def living_machines(home: Path) -> list[str]:
    """Return the ids of the sandboxes whose machines are recorded on this host."""
    folder = home / "machines"
    found = (record.sandbox_id for record in Records(folder).all())
    return sorted(one for one in found if one)


def _private_lock(home: Path) -> TextIO:
    """Open the file that a home's server locks. Only its owner can open it, so no other user can
    block the server."""
    descriptor = os.open(home / "server.lock", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    os.fchmod(descriptor, 0o600)
    return os.fdopen(descriptor, "a")


def _written_pid(home: Path) -> int | None:
    try:
        return int((home / "server.pid").read_text())
    except (FileNotFoundError, ValueError):
        return None


def _has_open(pid: int, path: Path) -> bool:
    """Tell whether a process has a file open: the pid may have been reused."""
    wanted = path.stat()
    try:
        for one in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found = one.stat()
                if (found.st_dev, found.st_ino) == (wanted.st_dev, wanted.st_ino):
                    return True
    except OSError:
        pass
    return False


def kind_of_host() -> str:
    """Return what must match for a saved machine: the processor model."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{platform.machine()} {line.partition(':')[2].strip()}"
    return platform.machine()
