"""Hypervisor processes that outlive this one: found again by pid, start time and boot id.

A pid alone may belong to another process by now. So every process is verified and then held by a
pidfd, which always refers to this one process (pidfd_open(2)) and becomes readable at its end.
"""

import asyncio
import contextlib
import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

from sandyard.server.core.errors import UnavailableError
from sandyard.server.tasks import in_thread

_KILL_LIMIT_S = 10.0
_PR_SET_THP_DISABLE = 41  # linux/prctl.h
_LIBC = ctypes.CDLL(None)


def boot_id() -> str:
    """Return the id of the host's current boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def start_time(pid: int) -> int | None:
    """Return when a process started, in clock ticks since boot; None if it has ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    # The command's name is in parentheses and may contain anything (proc(5)).
    fields = stat.rpartition(")")[2].split()
    return None if fields[0] in ("Z", "X") else int(fields[19])


def starved_s(pid: int) -> float:
    """Return how many seconds a process has waited for a busy CPU: the maximum of its threads. 0 if
    it has ended, or the kernel does not count that."""
    longest = 0
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            # Time on a processor, time waiting for one, turns; ns (sched-stats.rst).
            with contextlib.suppress(OSError, ValueError, IndexError):
                longest = max(longest, int((thread / "schedstat").read_text().split()[1]))
    return longest / 1e9


def set_nice(pid: int, nice: int) -> None:
    """Set the nice value of a process, all of its threads; does nothing if it has ended.

    A process with its own session competes with others as a group, and the group's value counts
    (sched(7), "the autogroup feature"); without that feature, each thread's does.
    """
    with contextlib.suppress(OSError):
        for thread in Path(f"/proc/{pid}/task").iterdir():
            with contextlib.suppress(ProcessLookupError):
                os.setpriority(os.PRIO_PROCESS, int(thread.name), nice)
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/autogroup").write_text(str(nice))


_in_small_pages = 0


@contextlib.contextmanager
def small_pages() -> Iterator[None]:
    """Have what is started in the block get its memory in small pages, for its life (prctl(2)).

    In large ones a hypervisor that uses a little of much takes 2 MiB for each few KiB. The setting
    is this process's own while the block lasts; where it cannot be had, nothing is different.
    """
    global _in_small_pages
    _in_small_pages += 1
    _LIBC.prctl(_PR_SET_THP_DISABLE, 1, 0, 0, 0)
    try:
        yield
    finally:
        _in_small_pages -= 1
        if not _in_small_pages:
            _LIBC.prctl(_PR_SET_THP_DISABLE, 0, 0, 0, 0)


class DetachedProcess:
    """A process held by a pidfd, until it is let go of; then every call does nothing."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd: int | None = pidfd

    @classmethod
    def find(cls, pid: int, *, started: int, boot: str) -> "DetachedProcess | None":
        """Return the process that had this pid and start time in that boot, if it still lives."""
        if boot != boot_id():
            return None
        try:
            pidfd = os.pidfd_open(pid)
        except OSError:
            return None
        # Verified after the pidfd is open: from then on the pid cannot be reused.
        if start_time(pid) != started:
            os.close(pidfd)
            return None
        return cls(pid, pidfd)

    async def wait(self) -> None:
        """Return once the process has ended."""
        if self._pidfd is None:
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        # A duplicate, because this one may be closed or waited for elsewhere meanwhile.
        watched = os.dup(self._pidfd)
        try:
            loop.add_reader(watched, ended.set)
            await ended.wait()
        finally:
            loop.remove_reader(watched)
            os.close(watched)

    def send(self, number: signal.Signals) -> None:
        """Send the process a signal; nothing if it is gone."""
        if self._pidfd is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    async def kill(self) -> None:
        """End the process with SIGKILL and return once it is gone.

        Raises:
            UnavailableError: it would not go.
        """
        if self._pidfd is None:
            return
        self.send(signal.SIGKILL)
        try:
            async with asyncio.timeout(_KILL_LIMIT_S):
                await self.wait()
        except TimeoutError as error:
            raise UnavailableError(
                f"cannot end the process {self.pid}: it does not react to SIGKILL", pid=self.pid
            ) from error

    def close(self) -> None:
        """Let go of the process without ending it."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


def uids_at_work(uids: range) -> set[int]:
    """Return those of a range of accounts under which a process runs."""
    found = set()
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                uid = _uid_of(entry, is_hidden=True)
                if uid in uids and start_time(int(entry.name)) is not None:
                    found.add(uid)
    return found


async def kill_all_of(uid: int, netns: Path, *, is_hidden: bool = False) -> None:
    """End every process that runs under an account which only one machine can have. See `all_of`.

    Raises:
        UnavailableError: one of them would not go.
    """
    for process in await all_of(uid, netns, is_hidden=is_hidden):
        with contextlib.closing(process):
            await process.kill()


async def all_of(uid: int, netns: Path, *, is_hidden: bool = False) -> list[DetachedProcess]:
    """Return the processes of an account in a network namespace: an installation in a container
    may have processes under the same account. `is_hidden` ones cannot be traced (prctl(2),
    PR_SET_DUMPABLE), and are found more slowly."""
    found = await in_thread(_processes_of, uid, netns, is_hidden=is_hidden)
    processes = [DetachedProcess.find(pid, started=at, boot=boot_id()) for pid, at in found]
    return [one for one in processes if one is not None]


def strangers(uids: range, netns_of: Callable[[int], Path]) -> list[int]:
    """Return the processes under a range of accounts that are in other network namespaces than
    `netns_of` says: those of another installation."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                pid, uid = int(entry.name), _uid_of(entry, is_hidden=True)
                if uid in uids and start_time(pid) is not None and not _is_in(pid, netns_of(uid)):
                    found.append(pid)
    return found


def _is_in(pid: int, netns: Path) -> bool:
    """Tell whether a process is in a network namespace, or that is unknown. The inode of a
    namespace is unique on a kernel (namespaces(7))."""
    try:
        its = Path(f"/proc/{pid}/ns/net").stat()
    except OSError:  # it has ended, or must not be looked into
        return True
    try:
        wanted = netns.stat()
    except OSError:
        return False
    return (its.st_dev, its.st_ino) == (wanted.st_dev, wanted.st_ino)


def _processes_of(uid: int, netns: Path, *, is_hidden: bool) -> list[tuple[int, int]]:
    """Return pid and start of each process of an account in a network namespace; on a full host
    there are many to see."""
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                pid = int(entry.name)
                is_its = _uid_of(entry, is_hidden=is_hidden) == uid and _is_in(pid, netns)
                if is_its and (started := start_time(pid)) is not None:
                    found.append((pid, started))
    return found


def _uid_of(entry: os.DirEntry[str], *, is_hidden: bool) -> int:
    """Return the account of a process. Files of hidden ones belong to root (proc(5))."""
    uid = entry.stat().st_uid
    if uid or not is_hidden:
        return uid
    status = Path(entry.path, "status").read_text(errors="replace")
    return next(int(one.split()[1]) for one in status.splitlines() if one.startswith("Uid:"))
