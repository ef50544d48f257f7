"""Confines a process that runs or reads untrusted code in a template's build.

Packages, build steps and the resulting tree are not trusted. The process that handles them has its
own user, mount, PID, network, IPC and UTS namespaces, so that it is root only within them. It sees
only those files of the host that its `View` names. This module uses only the standard library, and
opens no files of the host once the view is in place.
"""

import ctypes
import errno
import json
import os
import select
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from tempfile import TemporaryFile

FIRST_ID = 1_899_000_000
"""The host's user and group that is root in there. Between the ranges of systemd's containers and
those of machines (`host/identity.py`)."""
IDS = 65_536
SLIRP = "slirp4netns"

_SLIRP_START_S, _SLIRP_STOP_S = 20.0, 5.0
_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER = 0x20000, 0x4000000, 0x8000000, 0x10000000
_NEWPID, _NEWNET = 0x20000000, 0x40000000
_RDONLY, _NOSUID, _NODEV, _NOEXEC, _REMOUNT = 1, 2, 4, 8, 32
_BIND, _REC, _PRIVATE, _DETACH = 4096, 16384, 1 << 18, 2
_PDEATHSIG = 1
_KEYCTL, _JOIN_SESSION_KEYRING = {"x86_64": 250, "aarch64": 219}, 1
_OPEN_TREE, _MOVE_MOUNT = 428, 429  # the same on every architecture; Linux 5.2
_HERE, _CLONE, _RECURSIVE, _EMPTY_PATH = -100, 1, 0x8000, 4
# What programs of the host need of its /etc; files that only root reads stay closed.
_ETC = (
    "alternatives", "apt", "ca-certificates", "ca-certificates.conf", "debian_version", "dpkg",
    "gai.conf", "group", "host.conf", "hosts", "ld.so.cache", "ld.so.conf", "ld.so.conf.d",
    "localtime", "lsb-release", "mke2fs.conf", "nsswitch.conf", "os-release", "passwd", "perl",
    "protocols", "services", "ssl",
)  # fmt: skip
_NODES = ("null", "zero", "full", "random", "urandom", "tty")
_LINKS = {
    "fd": "/proc/self/fd", "stdin": "fd/0", "stdout": "fd/1", "stderr": "fd/2", "ptmx": "pts/ptmx",
}  # fmt: skip
_RESOLVER = b"nameserver 10.0.2.3\n"  # slirp4netns forwards it to the host's

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Bind:
    """A file or folder of the host, and the path where it is visible."""

    source: str
    target: str
    writable: bool = False


@dataclass(frozen=True)
class View:
    """What a confined process sees of the host."""

    place: str
    """An empty folder, over which the view is assembled; nothing is left in it."""

    root: str | None = None
    """A tree that is the whole view, writable. None: the host's programs, read-only."""

    binds: tuple[Bind, ...] = ()
    """What is mounted in addition to the host's programs."""

    network: str = "none"
    """`none`; `own`, which reaches what the host reaches except the host's loopback addresses; or
    `host`."""

    def to_json(self) -> str:
        """Return it as a command-line argument."""
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str) -> "View":
        """Parse the result of `to_json`."""
        value = json.loads(text)
        return View(**{**value, "binds": tuple(Bind(**one) for one in value["binds"])})


def confined(view: View, work: Callable[[], int]) -> int:
    """Run `work` in a confined child process and return its exit status.

    Call it from a process with one thread. When the work ends, all processes that it started are
    killed. The child inherits all open descriptors.

    Raises:
        OSError: the host does not allow namespaces or mounts; the message names the step.
    """
    # For slirp4netns as well: its sandbox unmounts all it sees, and leaves mounts that are shared
    # (/run/netns) shared with the host.
    _unshare(_NEWNS)
    _mount("none", "/", "", _REC | _PRIVATE)
    with ExitStack() as held:
        ready, report_ready = _pipe(held)
        may_go, let_go = _pipe(held)
        child = os.fork()
        if child == 0:
            ready.close()
            let_go.close()
            _leave(lambda: _enter(view, work, report_ready, may_go))
        try:
            report_ready.close()
            if ready.read(1):
                for name in ("uid_map", "gid_map"):
                    _write_map(child, name)
                if view.network == "own":
                    held.enter_context(_network_of(child))
                let_go.write(b"g")
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        except BaseException:
            with suppress(ProcessLookupError, ChildProcessError):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise


def _enter(view: View, work: Callable[[], int], report_ready: FileIO, may_go: FileIO) -> int:
    """Confine this process, then run `work` as a child of the namespace's init process."""
    die_with_parent()
    os.umask(0o022)
    # Root's keys (Kerberos, encrypted disks) would otherwise be readable. ENOSYS: there are none.
    _libc.syscall(_KEYCTL.get(os.uname().machine, -1), _JOIN_SESSION_KEYRING, None)
    # As the host's root, which may enter every folder on the way to what is bound.
    _assemble(view)
    os.chdir(view.place)
    flags = _NEWUSER | _NEWNS | _NEWPID | _NEWIPC | _NEWUTS
    _unshare(flags | (0 if view.network == "host" else _NEWNET))
    report_ready.write(b"r")
    report_ready.close()
    if not may_go.read(1):
        return 1
    may_go.close()
    os.setgroups([])
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    die_with_parent()  # changing users cleared it
    first = os.fork()
    if first == 0:
        _leave(lambda: _first(work))
    return os.waitstatus_to_exitcode(os.waitpid(first, 0)[1])


def _first(work: Callable[[], int]) -> int:
    """Act as process 1: enter the view, start the work, and end all other processes when it
    ends."""
    die_with_parent()
    # The kernel locks what was mounted outside this user namespace, and moves to a copy only. Named
    # by descriptor: this root may not enter the folders on the way.
    copy = _libc.syscall(_OPEN_TREE, _HERE, b".", _CLONE | _RECURSIVE | os.O_CLOEXEC)
    _check(min(copy, 0), "open_tree")
    _check(_libc.syscall(_MOVE_MOUNT, copy, b"", _HERE, b".", _EMPTY_PATH), "move_mount")
    os.fchdir(copy)
    os.close(copy)
    # While the host's /proc is still mounted: the kernel lets a user namespace mount one only then.
    with _folder("proc") as place:
        _mount("proc", place, "proc", _NOSUID | _NODEV | _NOEXEC)
    with _folder("dev/pts") as place:
        _mount("devpts", place, "devpts", _NOSUID | _NOEXEC, "newinstance,ptmxmode=0666,mode=620")
    _check(_libc.pivot_root(b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _DETACH), "umount")
    os.chdir("/")
    worker = os.fork()
    if worker == 0:
        _leave(work)
    while True:
        pid, status = os.wait()
        if pid == worker:
            return os.waitstatus_to_exitcode(status)


def _assemble(view: View) -> None:
    """Mount a view at `view.place`, except for /proc and /dev/pts."""
    place = view.place
    if view.root is not None:
        _mount(view.root, place, "", _BIND)
        _mount("none", place, "", _REMOUNT | _BIND | _NODEV)
    else:
        _mount("tmpfs", place, "tmpfs", _NOSUID | _NODEV, "mode=0755,size=64m")
        _assemble_host(view)
    # This is still the host's root, so it must not follow a link that a tree has there.
    with _folder(f"{place}/dev") as target:
        _mount("tmpfs", target, "tmpfs", _NOSUID | _NOEXEC, "mode=0755,size=64k")
    for name in ("pts", "shm"):
        os.mkdir(f"{place}/dev/{name}")
    options = "mode=1777,size=64m"
    _mount("tmpfs", os.path.join(place, "dev", "shm"), "tmpfs", _NOSUID | _NODEV, options)
    for name in _NODES:
        _bind(Bind(f"/dev/{name}", f"/dev/{name}", writable=True), place)
    for name, leads_to in _LINKS.items():
        os.symlink(leads_to, f"{place}/dev/{name}")


def _assemble_host(view: View) -> None:
    """Add the host's programs, the files in /etc that they need, and the view's binds to a view."""
    place = view.place
    for name in ("usr", "etc", "dev", "proc", "tmp", "run", "root", "var"):
        os.mkdir(f"{place}/{name}")
    for name in ("bin", "sbin", "lib", "lib32", "lib64", "libx32"):
        if os.path.islink(f"/{name}"):
            os.symlink(os.readlink(f"/{name}"), f"{place}/{name}")
    _bind(Bind("/usr", "/usr"), place)
    for name in _ETC:
        if os.path.exists(f"/etc/{name}"):
            _bind(Bind(os.path.realpath(f"/etc/{name}"), f"/etc/{name}"), place)
    host = view.network == "host"
    resolver = Path("/etc/resolv.conf").read_bytes() if host else _RESOLVER
    Path(place, "etc/resolv.conf").write_bytes(resolver)
    os.chown(f"{place}/root", FIRST_ID, FIRST_ID)
    for one in view.binds:
        _bind(one, place)


def _bind(one: Bind, place: str) -> None:
    target = place + one.target
    os.makedirs(os.path.dirname(target), exist_ok=True)
    if os.path.isdir(one.source):
        os.makedirs(target, exist_ok=True)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY | os.O_CLOEXEC, 0o600))
    _mount(one.source, target, "", _BIND)
    if not one.target.startswith("/dev/"):
        flags = _REMOUNT | _BIND | _NODEV | (0 if one.writable else _RDONLY | _NOSUID)
        _mount("none", target, "", flags)


def _write_map(child: int, name: str) -> None:
    try:
        Path(f"/proc/{child}/{name}").write_text(f"0 {FIRST_ID} {IDS}\n")
    except OSError as error:
        raise OSError(
            error.errno,
            f"{error.strerror}: the user ids from {FIRST_ID} on cannot be used here (in a "
            "container, it has to be a privileged one)",
        ) from error


@contextmanager
def _network_of(child: int) -> Iterator[None]:
    """Connect a process's network namespace to the networks that the host can reach."""
    with ExitStack() as held:
        ready, report_ready = _pipe(held)
        ends, end = _pipe(held)
        log = held.enter_context(TemporaryFile())
        try:
            process = subprocess.Popen(
                [
                    SLIRP, "--configure", "--mtu=65520", "--disable-host-loopback",
                    "--enable-sandbox", f"--ready-fd={report_ready.fileno()}",
                    f"--exit-fd={ends.fileno()}", str(child), "tap0",
                ],
                pass_fds=(report_ready.fileno(), ends.fileno()),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )  # fmt: skip
        except FileNotFoundError as error:
            raise OSError(
                error.errno, f"{SLIRP} is not installed; `sandyard doctor` says how to get it"
            ) from error
        held.callback(_stop, process)
        report_ready.close()
        if not select.select([ready], [], [], _SLIRP_START_S)[0] or not ready.read(1):
            log.seek(0)
            raise OSError(errno.EIO, f"{SLIRP} did not start: {log.read(2000).decode().strip()}")
        yield
        end.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_SLIRP_STOP_S)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.wait()


def _pipe(held: ExitStack) -> tuple[FileIO, FileIO]:
    reads, writes = os.pipe()
    return held.enter_context(FileIO(reads, "r")), held.enter_context(FileIO(writes, "w"))


def _leave(work: Callable[[], int]) -> None:
    """End this process with the status that `work` returns, without running other Python code."""
    status = 1
    try:
        status = work()
    except OSError as error:
        sys.stderr.write(f"cannot confine the build: {error}\n")
    except BaseException:  # noqa: BLE001 - nothing above this handles it
        traceback.print_exc()
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status if 0 <= status < 256 else 128 - status)


@contextmanager
def _folder(path: str) -> Iterator[str]:
    """Yield a path to a folder that cannot be a symbolic link.

    Raises:
        OSError: it is not a folder.
    """
    flags = os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(path, flags)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def die_with_parent() -> None:
    """Let the kernel kill this process when its parent ends."""
    _check(_libc.prctl(_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl")


def _unshare(flags: int) -> None:
    _check(_libc.unshare(flags), "unshare (is user.max_user_namespaces 0?)")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    arguments = [one.encode() for one in (source, target, kind)]
    _check(
        _libc.mount(*arguments, ctypes.c_ulong(flags), data.encode()),
        f"mount {kind or source} on {target}",
    )


def _check(result: int, what: str) -> None:
    if result != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
