"""Starts processes, each in its own cgroup, so that everything it starts can be ended with it.

One thread does all of the agent's work, which makes `fork` safe (see `guest.agent`). The child does
the little that is needed between fork and exec (cgroup, session, root, user, directory) and reports
a failure through a pipe.
"""

import asyncio
import contextlib
import errno
import fcntl
import functools
import itertools
import os
import select
import signal
import struct
import termios
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from sandyard.server.guest.patience import patient
from sandyard.server.guest.plain import program_of
from sandyard.server.guest.system import Account, NoFolderError, NoStartError, RefusedError, enter

_CGROUPS = "/sys/fs/cgroup/sandyard"
_KEPT = "kept-"
_NUMBERS = itertools.count()
_LEFT_BEHIND: set[str] = set()
_NOT_HERE = (FileNotFoundError, NotADirectoryError)
_DEFAULTED = (signal.SIGPIPE, signal.SIGXFSZ, signal.SIGINT, signal.SIGCHLD)
TERM_GRACE_S = 2.0
OOM_SCORE = "-900"
SCRIPT = 9
_TIOCSPTLCK, _TIOCGPTN, _TIOCGPTPEER = 0x40045431, 0x80045430, 0x5441  # asm-generic/ioctls.h
_TTY_GROUP = 5  # in Debian's /etc/group
NICENESS = -15


@dataclass(frozen=True)
class _Home:
    """The agent's own root, cgroup and OOM score, opened once because every command needs them."""

    root: int
    cgroup: int
    oom_score: int


@dataclass(frozen=True)
class Spec:
    """What to start: the first of `programs` that exists, with its arguments; `name` is for
    messages.

    A `script` can be read from the descriptor SCRIPT. With a `terminal`, the process has one of
    that size for all its streams. With a `connection`, that is its input and output, and its
    standard error is discarded. A process that `is_kept` ends with the agent. `alias` is its
    `argv[0]`. `words` are what its shell would start; the program may then be started without the
    shell. `on_terminal` is called with the terminal and a pid before the program runs, with the
    program's pid after that, and with None if it could not be started.
    """

    name: str
    programs: Sequence[Sequence[str]]
    env: Mapping[str, str]
    cwd: str
    account: Account
    script: bytes | None = None
    terminal: tuple[int, int] | None = None
    connection: int | None = None
    on_terminal: Callable[[str, int | None], None] | None = None
    is_kept: bool = False
    alias: str | None = None
    words: list[str] | None = None

    def words_of(self, program: Sequence[str]) -> list[str]:
        """Return the argument vector for a program."""
        name = self.alias if self.alias and len(program) == 1 else program[0]
        return [name, *program[1:]]


class Process:
    """A started process and everything it starts.

    `stdin` is a descriptor to write to or None; `stdout` and `stderr` are descriptors to read from.
    All are non-blocking; the caller that takes one closes it. A process on a `terminal`, such as
    `pts/0`, has only `stdout`, which is also written to.
    """

    def __init__(
        self,
        pid: int,
        pidfd: int,
        cgroup: str,
        stdin: int | None,
        stdout: int | None,
        stderr: int | None,
        *,
        terminal: str | None = None,
    ) -> None:
        self.terminal = terminal
        self.pid = pid
        self.stdin = stdin
        self.stdout = stdout
        self.stderr = stderr
        self._pidfd = pidfd
        self._exit_code: int | None = None
        self._cgroup = cgroup

    @property
    def is_terminal(self) -> bool:
        """Whether its streams are a terminal."""
        return self.terminal is not None

    async def wait(self) -> int:
        """Return the exit code once the process ends: negative for the signal that ended it."""
        if self._exit_code is None:
            await readable(self._pidfd)
            _, status = os.waitpid(self.pid, 0)
            os.close(self._pidfd)
            self._exit_code = os.waitstatus_to_exitcode(status)
        return self._exit_code

    async def end(self) -> None:
        """End everything that was started: SIGTERM, and after a grace period SIGKILL."""
        members = self._members()
        for pid in members:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGTERM)
        if self.pid not in members:  # it has left its cgroup
            self.signal(signal.SIGTERM)
        until = time.monotonic() + TERM_GRACE_S
        while self._is_populated() and time.monotonic() < until:
            await asyncio.sleep(0.02)
        self.kill()
        self.signal(signal.SIGKILL)

    def kill(self) -> None:
        """Kill everything that was started."""
        Path(self._cgroup, "cgroup.kill").write_text("1")

    def release(self) -> None:
        """Remove the cgroup, now or when the last background job in it has ended."""
        _LEFT_BEHIND.add(self._cgroup)
        sweep()

    def signal(self, number: int) -> bool:
        """Send a signal to the process itself; return False if it has ended."""
        if self._exit_code is not None:
            return False
        try:
            signal.pidfd_send_signal(self._pidfd, number)
        except ProcessLookupError:
            return False
        return True

    def hang_up(self) -> None:
        """Send a hangup to its terminal's programs, as the kernel does when a line is cut
        (termios(3)): the session leader and the foreground process group."""
        assert self.stdout is not None
        for number in (signal.SIGHUP, signal.SIGCONT):
            self.signal(number)
            with contextlib.suppress(OSError):
                group = os.tcgetpgrp(self.stdout)
                if group > 1 and group != self.pid:
                    os.killpg(group, number)

    def signal_everything(self, number: int) -> bool:
        """Send a signal to everything that was started; return False if nothing of it runs."""
        if not self._is_populated():
            return False
        if number == signal.SIGKILL:
            self.kill()
            return True
        for pid in self._members():
            with contextlib.suppress(OSError):
                os.kill(pid, number)
        return True

    def _members(self) -> list[int]:
        with contextlib.suppress(OSError):
            return [int(word) for word in Path(self._cgroup, "cgroup.procs").read_text().split()]
        return []

    def _is_populated(self) -> bool:
        with contextlib.suppress(OSError):
            return "populated 1" in Path(self._cgroup, "cgroup.events").read_text()
        return False


def sweep() -> None:
    """Remove the empty cgroups of finished processes."""
    for cgroup in list(_LEFT_BEHIND):
        try:
            os.rmdir(cgroup)
        except FileNotFoundError:
            _LEFT_BEHIND.discard(cgroup)
        except OSError:
            continue
        else:
            _LEFT_BEHIND.discard(cgroup)


def prepare() -> None:
    """Make the directory of cgroups, and take over what an earlier agent left in it."""
    folder = Path(_CGROUPS)
    folder.mkdir(exist_ok=True)
    for path in folder.glob(f"{_KEPT}*"):
        # Its output has no reader any more, and its end would go unnoticed.
        with contextlib.suppress(OSError):
            (path / "cgroup.kill").write_text("1")
    _LEFT_BEHIND.update(str(path) for path in folder.iterdir() if path.is_dir())
    sweep()


_CHANGE = "change to the folder"
_FOLDER_LIMIT_S = 10.0
_MOMENT_S = 1.0
_ERRNO_MAX = 255
_LOCAL = frozenset(
    b"bpf binfmt_misc btrfs cgroup cgroup2 configfs debugfs devpts devtmpfs efivarfs erofs "
    b"ext2 ext3 ext4 fusectl hugetlbfs iso9660 mqueue nsfs overlay proc pstore ramfs rootfs "
    b"securityfs squashfs sysfs tmpfs tracefs vfat xfs".split()
)


@functools.cache
def _home() -> _Home:
    return _Home(
        root=os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC),
        cgroup=os.open(Path(_CGROUPS).parent / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC),
        oom_score=os.open("/proc/self/oom_score_adj", os.O_WRONLY | os.O_CLOEXEC),
    )


# From here to `fork` the code is plainer than it might be: under emulation every call that can be
# avoided makes every command faster.


async def start(spec: Spec, *, root_fd: int, wants_stdin: bool) -> Process:
    """Start a process in the user's root.

    Raises:
        RefusedError: it could not be started; the message says why.
    """
    try:
        return await _start(spec, root_fd=root_fd, wants_stdin=wants_stdin)
    except OSError as error:  # the machine has no process, descriptor or memory left
        raise RefusedError(_cannot("start", spec.name, error)) from error


async def _start(spec: Spec, *, root_fd: int, wants_stdin: bool) -> Process:
    kind = _KEPT if spec.is_kept else ""
    cgroup = f"{_CGROUPS}/{kind}{os.getpid()}-{next(_NUMBERS)}"
    os.mkdir(cgroup)
    if spec.terminal is not None:
        return await _start_on_terminal(spec, cgroup, root_fd, spec.terminal)
    if spec.connection is not None:
        return await _start_on_connection(spec, cgroup, root_fd, spec.connection)
    lent: list[int] = []
    kept: list[int] = []
    stdin = None
    try:
        if wants_stdin:
            child_stdin, stdin = os.pipe()
            kept.append(stdin)
        else:
            child_stdin = os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
        lent.append(child_stdin)
        stdout, child_stdout = os.pipe()
        kept.append(stdout)
        lent.append(child_stdout)
        stderr, child_stderr = os.pipe()
        kept.append(stderr)
        lent.append(child_stderr)
        for descriptor in kept:
            os.set_blocking(descriptor, False)
        streams = {0: child_stdin, 1: child_stdout, 2: child_stderr}
        if spec.script is not None:
            streams[SCRIPT] = os.memfd_create("script")
            lent.append(streams[SCRIPT])
            os.pwrite(streams[SCRIPT], spec.script, 0)
        if spec.account.uid == 0 and not may_wait_for_files():
            pid = _spawn_as_root(spec, cgroup, root_fd, streams)
        else:
            pid = await _fork(spec, cgroup, root_fd, streams)
        return Process(pid, os.pidfd_open(pid), cgroup, stdin, stdout, stderr)
    except BaseException:
        for descriptor in kept:
            os.close(descriptor)
        _LEFT_BEHIND.add(cgroup)
        raise
    finally:
        for descriptor in lent:
            os.close(descriptor)


async def _start_on_terminal(
    spec: Spec, cgroup: str, root_fd: int, size: tuple[int, int]
) -> Process:
    """Start a process that leads a session on its own terminal."""
    master = slave = script = None
    try:
        try:
            master, slave = _open_terminal(root_fd, spec.account)
            set_size(master, *size)
            (number,) = struct.unpack("i", fcntl.ioctl(master, _TIOCGPTN, bytes(4)))
        except OSError as error:
            raise RefusedError(
                f"cannot open a terminal in the sandbox: {error.strerror}"
            ) from error
        terminal = f"pts/{number}"
        if "SSH_CONNECTION" in spec.env:
            spec = replace(spec, env={**spec.env, "SSH_TTY": f"/dev/{terminal}"})
        streams = dict.fromkeys((0, 1, 2), slave)
        if spec.script is not None:
            streams[SCRIPT] = script = os.memfd_create("script")
            os.pwrite(script, spec.script, 0)
        on_terminal = spec.on_terminal or _nobody
        on_terminal(terminal, os.getpid())
        try:
            # Not by vfork: only a child of its own can make the terminal its session's.
            pid = await _fork(spec, cgroup, root_fd, streams)
        except BaseException:
            on_terminal(terminal, None)
            raise
        on_terminal(terminal, pid)
        return Process(pid, os.pidfd_open(pid), cgroup, None, master, None, terminal=terminal)
    except BaseException:
        if master is not None:
            os.close(master)
        _LEFT_BEHIND.add(cgroup)
        raise
    finally:
        for descriptor in (slave, script):
            if descriptor is not None:
                os.close(descriptor)


async def _start_on_connection(spec: Spec, cgroup: str, root_fd: int, connection: int) -> Process:
    """Start a process whose input and output are a connection."""
    try:
        nowhere = os.open("/dev/null", os.O_WRONLY | os.O_CLOEXEC)
        try:
            pid = await _fork(spec, cgroup, root_fd, {0: connection, 1: connection, 2: nowhere})
        finally:
            os.close(nowhere)
        return Process(pid, os.pidfd_open(pid), cgroup, None, None, None)
    except BaseException:
        _LEFT_BEHIND.add(cgroup)
        raise


def _nobody(*_: object) -> None:
    """Ignore a call."""


def _open_terminal(root_fd: int, account: Account) -> tuple[int, int]:
    """Return both ends of a new terminal from the user's own /dev (pts(4))."""
    flags = os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC
    master = os.open("dev/ptmx", flags | os.O_NONBLOCK, dir_fd=root_fd)
    try:
        fcntl.ioctl(master, _TIOCSPTLCK, struct.pack("i", 0))
        slave = fcntl.ioctl(master, _TIOCGPTPEER, flags)
    except BaseException:
        os.close(master)
        raise
    os.fchown(slave, account.uid, _TTY_GROUP)
    return master, slave


def set_size(terminal: int, columns: int, rows: int) -> None:
    """Set the size of a terminal, in characters.

    Raises:
        RefusedError: the size is invalid.
    """
    if not (1 <= columns <= 65535 and 1 <= rows <= 65535):
        raise RefusedError("cannot use a terminal of that size: it has 1 to 65535 columns and rows")
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))


def _spawn_as_root(spec: Spec, cgroup: str, root_fd: int, streams: Mapping[int, int]) -> int:
    """Start a process with vfork, which under emulation takes a fraction of fork's time.

    Few things can be set for a vforked child, so the agent temporarily moves itself into the
    child's cgroup, root, directory and priority. It does not wait in between, and nothing else of
    it can observe that: a thread that is in sync(2) looks at none of these.
    """
    home = _home()
    actions = [(os.POSIX_SPAWN_DUP2, source, number) for number, source in streams.items()]
    there = os.open(f"{cgroup}/cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(there, b"0")
        os.write(home.oom_score, b"0")
        os.setpriority(os.PRIO_PROCESS, 0, 0)
        enter(root_fd)
        try:
            os.chdir(spec.cwd)
        except OSError as error:
            raise NoFolderError(_cannot(_CHANGE, spec.cwd, error)) from error
        spawn = functools.partial(
            os.posix_spawn, file_actions=actions, setsid=True, setsigdef=_DEFAULTED
        )
        if spec.words is not None and (plain := program_of(spec.words, spec.env)) is not None:
            with contextlib.suppress(OSError, ValueError):  # the shell reports the error
                return spawn(plain[0], spec.words, plain[1])
        denied: OSError | None = None
        for program in spec.programs:
            try:
                return spawn(program[0], spec.words_of(program), spec.env)
            except _NOT_HERE:
                continue
            except PermissionError as error:
                denied = denied or error  # there may be another: execvp(3)
            except (OSError, ValueError) as error:
                raise NoStartError(_cannot("start", program[0], error)) from error
        if denied is not None:
            raise NoStartError(_cannot("start", spec.name, denied)) from denied
        raise NoStartError(f"cannot start {spec.name}: it is not in the sandbox")
    finally:
        _go_home(home)
        os.close(there)


def _go_home(home: _Home) -> None:
    """Move the agent back. If that fails, exit: PID 1 starts another in the right place."""
    try:
        enter(home.root)
        os.setpriority(os.PRIO_PROCESS, 0, NICENESS)
        os.write(home.oom_score, OOM_SCORE.encode())
        os.write(home.cgroup, b"0")
    except OSError:
        os._exit(70)


async def _fork(spec: Spec, cgroup: str, root_fd: int, streams: Mapping[int, int]) -> int:
    """Start a process with fork; errors before its start come through a pipe.

    The child may block on its directory or its program; the agent does not block with it.
    """
    trouble, child_trouble = os.pipe()
    with contextlib.closing(os.fdopen(trouble, "rb", buffering=0)):
        try:
            pid = fork(lambda: _become(spec, cgroup, root_fd, streams, child_trouble))
        finally:
            os.close(child_trouble)
        try:
            async with asyncio.timeout(patient(_FOLDER_LIMIT_S)):
                problem = await _read_all(trouble)
        except BaseException as error:
            await _end_child(pid)
            if isinstance(error, TimeoutError):
                message = (
                    f"cannot change to the directory {spec.cwd}: its file server does not answer"
                )
                raise NoFolderError(message) from error
            raise
    if problem:
        os.waitpid(pid, 0)
        message = problem.decode(errors="replace")
        is_folder = message.startswith(f"cannot {_CHANGE} ")
        raise NoFolderError(message) if is_folder else NoStartError(message)
    return pid


async def by_child(work: Callable[[], None], *, keeps: Sequence[int]) -> None:
    """Let a child do what may block in the kernel; see `fork` for what it `keeps`.

    Raises:
        OSError: the child's error.
    """

    def body() -> None:
        try:
            work()
        except OSError as error:
            os._exit(min(error.errno or errno.EINVAL, _ERRNO_MAX))
        except ValueError:
            os._exit(errno.EINVAL)

    pid = fork(body, keeps=keeps)
    pidfd = os.pidfd_open(pid)
    try:
        async with asyncio.timeout(patient(_FOLDER_LIMIT_S)):
            await readable(pidfd)
    except BaseException as error:
        await _end_child(pid)
        if isinstance(error, TimeoutError):
            raise OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from error
        raise
    finally:
        os.close(pidfd)
    number = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if number:
        number = number if number > 0 else errno.EINTR
        raise OSError(number, os.strerror(number))


async def _end_child(pid: int) -> None:
    """Kill a child; if the kernel does not let it end soon, do not wait for it."""
    os.kill(pid, signal.SIGKILL)
    pidfd = os.pidfd_open(pid)
    try:
        async with asyncio.timeout(patient(_MOMENT_S)):
            await readable(pidfd)
        os.waitpid(pid, 0)
    except TimeoutError:
        pass
    finally:
        os.close(pidfd)


class _Mounts:
    """The mounts where users' programs are, read again when they have changed."""

    def __init__(self) -> None:
        self._file = open("/proc/1/mountinfo", "rb", buffering=0)  # noqa: SIM115 - held for ever
        self._changes = select.poll()
        self._changes.register(self._file, select.POLLPRI | select.POLLERR)
        self._waits = self._look()

    def may_wait(self) -> bool:
        """See `may_wait_for_files`."""
        if self._changes.poll(0):
            self._waits = self._look()
        return self._waits

    def _look(self) -> bool:
        self._file.seek(0)
        content = b""
        while more := self._file.read(1 << 16):
            content += more
        return not all(_is_local(line) for line in content.splitlines())


def _is_local(mount: bytes) -> bool:
    """Tell whether a mount, given by its line of mountinfo (proc_pid_mountinfo(5)), is local."""
    kind = mount.partition(b" - ")[2].split(b" ", 1)[0]
    # Looking into another's automount point waits until it is mounted.
    if kind == b"autofs":
        return mount.split(b" ", 5)[4].endswith(b"/proc/sys/fs/binfmt_misc")
    return kind in _LOCAL


@functools.cache
def _mounts() -> _Mounts:
    return _Mounts()


def may_wait_for_files() -> bool:
    """Tell whether anything is mounted whose server may not answer."""
    return _mounts().may_wait()


def fork(child: Callable[[], None], *, keeps: Sequence[int] | None = None) -> int:
    """Run `child` in a forked process that ends with it, and return the process's id.

    For a child that may take long, `keeps` names the descriptors it needs. Any other that it kept
    open would not reach its end for its reader before the child ends.
    """
    pid = os.fork()
    if pid:
        return pid
    try:
        if keeps is not None:
            low = 3
            for one in sorted({*keeps, os.sysconf("SC_OPEN_MAX")}):
                os.closerange(low, one)
                low = one + 1
        child()
        os._exit(0)
    except BaseException:  # noqa: BLE001 - nothing may unwind into the parent's stack
        os._exit(71)


def step_down(account: Account, root_fd: int) -> None:
    """Give up the agent's privileges in a forked child, and enter the user's root and account."""
    Path("/proc/self/oom_score_adj").write_text("0")
    os.setpriority(os.PRIO_PROCESS, 0, 0)
    enter(root_fd)
    if account.uid:
        os.setgroups(list(account.groups))
        os.setgid(account.gid)
        os.setuid(account.uid)


def _become(
    spec: Spec, cgroup: str, root_fd: int, streams: Mapping[int, int], trouble: int
) -> NoReturn:
    what, which = "start", spec.name
    try:
        Path(cgroup, "cgroup.procs").write_text("0")
        os.setsid()
        for number, descriptor in streams.items():
            os.dup2(descriptor, number)
            os.set_inheritable(number, True)
        if spec.terminal is not None:
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        for one in _DEFAULTED:
            signal.signal(one, signal.SIG_DFL)
        step_down(spec.account, root_fd)
        what, which = _CHANGE, spec.cwd
        os.chdir(spec.cwd)
        what, which = "start", spec.name
        denied: OSError | None = None
        for program in spec.programs:
            try:
                os.execve(program[0], spec.words_of(program), dict(spec.env))
            except _NOT_HERE:
                continue
            except PermissionError as error:
                denied = denied or error
        raise denied or FileNotFoundError(2, "it is not in the sandbox")
    except OSError as error:
        os.write(trouble, _cannot(what, which, error).encode(errors="replace")[:1000])
    except BaseException as error:  # noqa: BLE001 - the parent must hear of it, whatever it is
        os.write(trouble, f"cannot {what} {which}: {error!r}".encode(errors="replace")[:1000])
    os._exit(127)


def _cannot(what: str, which: str, error: OSError | ValueError) -> str:
    return f"cannot {what} {which}: {getattr(error, 'strerror', None) or error}"


async def readable(descriptor: int) -> None:
    """Return once a descriptor is readable, or the process of a pidfd has ended."""
    loop = asyncio.get_running_loop()
    ready = loop.create_future()
    loop.add_reader(descriptor, _resolve, ready)
    try:
        await ready
    finally:
        loop.remove_reader(descriptor)


async def _read_all(descriptor: int) -> bytes:
    os.set_blocking(descriptor, False)
    content = b""
    while True:
        await readable(descriptor)
        data = os.read(descriptor, 4096)
        if not data:
            return content
        content += data


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)
