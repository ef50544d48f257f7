"""The agent's view of the machine: the user's root, accounts, figures, identity.

The agent runs inside the read-only tools, so that changes to the machine's files cannot break
its interpreter. It reaches the user's root through `root_fd`, a descriptor of the root of PID 1;
`enter` moves a forked child there.
"""

import contextlib
import errno
import fcntl
import os
import stat
import struct
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sandyard.server.core.wire import Refusal
from sandyard.server.guest.patience import patient

RUN = Path("/run/sandyard")
_EXT4_IOC_RESIZE_FS = 0x40086610  # fs/ext4/ext4.h
_RNDADDENTROPY = 0x40085203  # linux/random.h
_RNDRESEEDCRNG = 0x5207
_PASSWD_MAX = 1024 * 1024
_GROWTH_LIMIT_S = 5.0
_ID_MAX = 2**32 - 1
_PAGE = 4096  # writes up to this size are atomic, even if the writer is killed
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class RefusedError(Exception):
    """The operation cannot be done; the message is for the caller, the code for programs."""

    code = Refusal.BAD_REQUEST


class AbsentError(RefusedError):
    """It does not exist."""

    code = Refusal.ABSENT


class NoProcessError(RefusedError):
    """There is no such process."""

    code = Refusal.NO_PROCESS


class NoUserError(RefusedError):
    """There is no such user."""

    code = Refusal.NO_USER


class NoFolderError(RefusedError):
    """A process cannot begin in that directory."""

    code = Refusal.NO_FOLDER


class NoWatchError(RefusedError):
    """There is no such watch, or its directory is gone."""

    code = Refusal.ABSENT


class NoStartError(RefusedError):
    """A program is not there, or cannot be executed."""

    code = Refusal.NO_START


class ConflictingError(RefusedError):
    """Its state does not allow the operation."""

    code = Refusal.CONFLICT


class ReusedKeyError(RefusedError):
    """The key of a start was used for another one."""

    code = Refusal.REUSED


class BusyError(RefusedError):
    """Not now; nothing was done."""

    code = Refusal.BUSY


@dataclass(frozen=True)
class Account:
    """An entry of the user's /etc/passwd, with its groups."""

    name: str
    uid: int
    gid: int
    home: str
    shell: str
    groups: tuple[int, ...]


def open_root() -> int:
    """Return a descriptor of the user's root directory."""
    return os.open("/proc/1/root", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)


def enter(root_fd: int) -> None:
    """Make the user's root this process's root; for forked children only."""
    os.fchdir(root_fd)
    os.chroot(".")
    os.chdir("/")


def find_account(root_fd: int, user: str) -> Account:
    """Return the account of a name or number. With `user:group` it has that group alone, as an
    image's USER says.

    Raises:
        NoUserError: there is no such account, or no such group.
        RefusedError: /etc/passwd cannot be read.
    """
    user, colon, group = user.partition(":")
    account = _account_of(root_fd, user)
    if not colon:
        return account
    gid = _group_of(root_fd, group)
    return replace(account, gid=gid, groups=(gid,))


def _account_of(root_fd: int, user: str) -> Account:
    if user in ("root", "0"):
        # Root must be reachable in a machine whose /etc/passwd is damaged.
        return Account("root", 0, 0, "/root", "/bin/bash", (0,))
    is_number = _is_id(user)
    try:
        passwd = _read_small(root_fd, "etc/passwd")
    except RefusedError:
        if not is_number:
            raise
        passwd = ""  # an image of one program may have none
    for line in passwd.splitlines():
        fields = line.split(":")
        if len(fields) == 7 and user in (fields[0], fields[2]):
            with contextlib.suppress(ValueError):
                name, uid, gid = fields[0], int(fields[2]), int(fields[3])
                groups = (gid, *_groups_of(root_fd, name))
                return Account(name, uid, gid, fields[5] or "/", fields[6] or "/bin/sh", groups)
    if is_number:
        # Any number can be a process's, as with `docker run --user`.
        return Account(user, int(user), int(user), "/", "/bin/sh", (int(user),))
    raise NoUserError(f"cannot run as {user}: there is no such user in the sandbox")


def stats(root_fd: int) -> dict[str, Any]:
    """Return the figures of `core.ops.Figures` on memory, disk and uptime."""
    memory = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        key, _, rest = line.partition(":")
        memory[key] = int(rest.split()[0]) * 1024
    disk = os.fstatvfs(root_fd)
    return {
        "memory_used_bytes": memory["MemTotal"] - memory["MemAvailable"],
        "memory_total_bytes": memory["MemTotal"],
        "disk_used_bytes": (disk.f_blocks - disk.f_bfree) * disk.f_frsize,
        "disk_total_bytes": disk.f_blocks * disk.f_frsize,
        "uptime": float(Path("/proc/uptime").read_text().split()[0]),
    }


def cpu_ticks() -> tuple[int, int]:
    """Return the clock ticks of all CPUs since boot: busy, and in total."""
    fields = [int(word) for word in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
    total = sum(fields)
    idle = fields[3] + fields[4]
    return total - idle, total


def reseed(entropy: bytes) -> None:
    """Add the host's entropy to the kernel's random number generator and reseed it at once.

    Both calls are needed: the first only credits the pool (random(4)).
    """
    request = struct.pack("ii", len(entropy) * 8, len(entropy)) + entropy
    device = os.open("/dev/random", os.O_WRONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(device, _RNDADDENTROPY, request)
        fcntl.ioctl(device, _RNDRESEEDCRNG)
    finally:
        os.close(device)


def set_clock(wall_ns: int) -> None:
    """Set the wall clock to nanoseconds since the epoch."""
    time.clock_settime_ns(time.CLOCK_REALTIME, wall_ns)


def write_identity(
    *,
    hostname: str,
    machine_id: str | None,
    authorized_keys: str,
    password_hash: str | None,
    replaces_access: bool,
) -> None:
    """Write the machine's identity into the user's files; call it inside the user's root.

    Anything but a regular file at such a path (a link, a FIFO) is replaced and never followed. If
    the user has made that impossible (a directory is there, or it is immutable), names, keys and
    password remain unchanged: a sandbox must start whatever is on its disk. Access that belongs to
    others is removed in any case.

    Raises:
        OSError: a required file cannot be written.
    """
    hosts = f"127.0.0.1 localhost {hostname}\n::1 localhost ip6-localhost ip6-loopback\n"
    for path, text in (("/etc/hostname", hostname + "\n"), ("/etc/hosts", hosts)):
        with contextlib.suppress(OSError):
            _overwrite(path, text, 0o644)
    if machine_id is not None:
        with contextlib.suppress(OSError):
            _overwrite("/etc/machine-id", machine_id + "\n", 0o444)
    if replaces_access and password_hash is None:
        password_hash = "*"  # matches no password (shadow(5))
    ssh = Path("/root/.ssh")
    if replaces_access and os.path.lexists(ssh) and (ssh.is_symlink() or not ssh.is_dir()):
        ssh.unlink()  # the target may be created later, and give access
    if authorized_keys or (replaces_access and os.path.lexists(ssh / "authorized_keys")):
        try:
            ssh.mkdir(mode=0o700, exist_ok=True)
            replace_file(ssh / "authorized_keys", authorized_keys, 0o600)
        except OSError:
            if replaces_access:
                raise
    if password_hash is not None:
        try:
            _write_password(Path("/etc/shadow"), password_hash)
        except OSError:
            if replaces_access:
                raise


def _write_password(shadow: Path, password_hash: str) -> None:
    """Write root's password hash, whatever else is in shadow(5), or if it does not exist."""
    try:
        before = read_regular(shadow)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP, errno.EISDIR):
            raise  # there is one, with others' passwords in it
        before = ""
    lines = before.split("\n")[:-1] if before.endswith("\n") else before.split("\n")
    if not any(line.startswith("root:") for line in lines):
        lines = ["root" + ":" * 8, *(line for line in lines if line)]
    changed = [
        ":".join(["root", password_hash, *line.split(":")[2:]])
        if line.startswith("root:")
        else line
        for line in lines
    ]
    # Unchanged content needs no space, which a full disk lacks.
    if (after := "\n".join(changed) + "\n") != before:
        replace_file(shadow, after, 0o600)


def write_boot_id() -> None:
    """Change the boot id: clones of a saved machine share the kernel's."""
    # In place: a mount shows this very file where the kernel shows its own.
    with (RUN / "boot_id").open("r+") as file:
        file.write(Path("/proc/sys/kernel/random/uuid").read_text())


def grow_disk(size_bytes: int, root_fd: int) -> None:
    """Grow the writable file system to its disk, once the kernel has noticed the disk's new size.

    Raises:
        RefusedError: the kernel does not notice the new size, or does not use it.
    """
    until = time.monotonic() + patient(_GROWTH_LIMIT_S)
    while int(Path("/sys/block/vdc/size").read_text()) * 512 < size_bytes:
        if time.monotonic() > until:
            raise RefusedError("cannot grow the disk: the kernel does not see that it has grown")
        time.sleep(0.001)
    # By the user's root: the mount does not show in the tools, where the agent lives.
    mount = os.open(
        f"{RUN}/disk".lstrip("/"), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root_fd
    )
    try:
        blocks = size_bytes // os.fstatvfs(mount).f_frsize
        fcntl.ioctl(mount, _EXT4_IOC_RESIZE_FS, struct.pack("Q", blocks))
    except OSError as error:
        raise RefusedError(f"cannot grow the disk: {error.strerror}") from error
    finally:
        os.close(mount)


def write_private(name: str, text: str) -> None:
    """Write a file under /run/sandyard that only root may read.

    If a writer is killed midway, the end of a longer earlier text may remain.
    """
    _overwrite(f"{RUN}/{name}", text, 0o600)


def profile_stamp(root_fd: int, account: Account) -> tuple[object, ...]:
    """Return a value that changes with the files that make up the login environment."""
    home = account.home.lstrip("/")
    names = ["etc/environment", "etc/profile", "etc/bash.bashrc", "etc/profile.d"]
    names += [f"{home}/{name}" for name in (".bash_profile", ".bash_login", ".profile", ".bashrc")]
    with contextlib.suppress(OSError):
        folder = os.open("etc/profile.d", os.O_RDONLY | os.O_DIRECTORY, dir_fd=root_fd)
        try:
            names += [f"etc/profile.d/{name}" for name in sorted(os.listdir(folder))[:64]]
        finally:
            os.close(folder)
    stamps: list[object] = []
    for name in names:
        try:
            found = os.stat(name, dir_fd=root_fd)
        except OSError:
            stamps.append(None)
        else:
            stamps.append((found.st_mtime_ns, found.st_size, found.st_ino))
    return tuple(stamps)


def plain_environment(account: Account) -> dict[str, str]:
    """Return the initial environment of a login."""
    return {
        "HOME": account.home,
        "USER": account.name,
        "LOGNAME": account.name,
        "SHELL": account.shell,
        "PATH": DEFAULT_PATH,
        "LANG": "C.UTF-8",
    }


def system_environment(root_fd: int) -> dict[str, str]:
    """Return the variables of /etc/environment by the rules of pam_env(8); none if it is
    unreadable."""
    try:
        text = _read_small(root_fd, "etc/environment")
    except RefusedError:
        return {}
    result = {}
    for line in text.splitlines():
        name, separator, value = line.strip().removeprefix("export ").partition("=")
        if separator and name.isidentifier() and "\0" not in value:
            if value[:1] in ("'", '"'):
                value = value[1:].partition(value[0])[0]
            result[name] = value
    return result


def parse_environment(dump: bytes) -> dict[str, str]:
    """Return the output of `env -0` as a mapping, without variables of the shell itself."""
    result = {}
    for item in dump.split(b"\0"):
        name, separator, value = item.decode(errors="surrogateescape").partition("=")
        if separator and name not in ("_", "SHLVL", "PWD", "OLDPWD"):
            result[name] = value
    return result


def checked_environment(env: Mapping[str, str]) -> Mapping[str, str]:
    """Return an environment that is valid for a process.

    Raises:
        RefusedError: a name or value is invalid.
    """
    for name, value in env.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise RefusedError("cannot use env: a name or value has a character it cannot have")
    return env


def _groups_of(root_fd: int, user: str) -> list[int]:
    groups = []
    with contextlib.suppress(RefusedError):
        for line in _read_small(root_fd, "etc/group").splitlines():
            fields = line.split(":")
            if len(fields) == 4 and user in fields[3].split(",") and _is_id(fields[2]):
                groups.append(int(fields[2]))
    return groups


def _is_id(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) < 11 and int(text) < _ID_MAX


def _group_of(root_fd: int, group: str) -> int:
    if _is_id(group):
        return int(group)
    with contextlib.suppress(RefusedError):
        for line in _read_small(root_fd, "etc/group").splitlines():
            fields = line.split(":")
            if len(fields) == 4 and fields[0] == group and _is_id(fields[2]):
                return int(fields[2])
    raise NoUserError(f"cannot run with the group {group}: there is no such group in the sandbox")


def _read_small(root_fd: int, name: str) -> str:
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=root_fd)
    except OSError as error:
        raise RefusedError(f"cannot read /{name} of the sandbox: {error.strerror}") from error
    try:
        with open(descriptor, "rb") as file:
            return file.read(_PASSWD_MAX).decode(errors="replace")
    except OSError as error:  # a folder is in its place
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise RefusedError(f"cannot read /{name} of the sandbox: {error.strerror}") from error


def replace_file(path: Path, text: str, mode: int) -> None:
    """Replace a file atomically; if the disk is full, write it in place.

    Raises:
        OSError: it cannot be written.
    """
    part = path.with_name(f".{path.name}.sandyard")
    with contextlib.suppress(FileNotFoundError):
        part.unlink()
    try:
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(text.encode(errors="surrogateescape"))
            os.fchmod(descriptor, mode)
        part.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink()
        if error.errno != errno.ENOSPC:
            raise
        _write_over(path, text.encode(errors="surrogateescape"), mode)


def _write_over(path: Path, data: bytes, mode: int) -> None:
    """Overwrite a file within its own blocks, because there are none left for another.

    Raises:
        OSError: it is not a regular file, or has too few blocks.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode) or len(data) > found.st_blocks * 512:
            raise OSError(errno.ENOSPC, "the disk is full")
        written = 0
        while written < len(data):
            written += file.write(data[written:])
        file.truncate(len(data))
        os.fchmod(descriptor, mode)


def _overwrite(path: str, text: str, mode: int) -> None:
    """Write a small file in place, which is several times faster; otherwise replace it."""
    data = text.encode()
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        replace_file(Path(path), text, mode)
        return
    try:
        found = os.fstat(descriptor)
        is_done = (
            stat.S_ISREG(found.st_mode)
            and len(data) <= _PAGE
            and os.write(descriptor, data) == len(data)
        )
        if is_done and found.st_size > len(data):
            os.ftruncate(descriptor, len(data))
    finally:
        os.close(descriptor)
    if not is_done:
        replace_file(Path(path), text, mode)


def read_regular(path: Path) -> str:
    """Return the beginning of a regular file.

    Raises:
        OSError: it cannot be read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
    try:
        with open(descriptor, "rb") as file:
            return file.read(_PASSWD_MAX).decode(errors="surrogateescape")
    except OSError:
        with contextlib.suppress(OSError):
            os.close(descriptor)
        raise
