"""The egress processes of a node: started, sent their rules, and restarted when they end.

    machines/<machine id>/egress-<slot>.sock   receives the configuration; for root only
                          egress-1.log         its journal, in two files
                          egress-2.log
                          egress.err           its own log

A process outlives the server. While there is none, the firewall's redirection leads nowhere, and
everything is refused.
"""

import asyncio
import contextlib
import ipaddress
import json
import logging
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from sandyard.server.core.codec import encode
from sandyard.server.core.egress import Credentials, Policy
from sandyard.server.core.errors import UnavailableError
from sandyard.server.drivers.contract import Place
from sandyard.server.drivers.namespaces import path_of
from sandyard.server.drivers.processes import all_of, kill_all_of
from sandyard.server.egress.config import JOURNALS, Config, Server, Start
from sandyard.server.egress.dns import Resolver
from sandyard.server.egress.journal import Line, newest_of
from sandyard.server.node.host.firewall import GATEWAY_IP, UNREACHABLE
from sandyard.server.tasks import Crew, Task, in_thread, to_the_end

log = logging.getLogger(__name__)

_LIMIT_S = 10.0
_FOLLOW_S = 3.0
_TICK_S: Final = 1.0
"""The kernel's time of a change may be some milliseconds before the time in the line written."""
_AGAIN_S, _AGAIN_MAX_S = 0.05, 5.0
_ERRORS = "egress.err"
_ERRORS_MAX = 256 * 1024
_DATAGRAMS = (*([socket.AF_INET] * 8), *([socket.AF_INET6] * 2))
_STREAMS = (*([socket.AF_INET] * 4), socket.AF_INET6)


def journal_paths(folder: Path) -> list[Path]:
    """Return the files of a sandbox's journal, in its machine's folder."""
    return [folder / f"egress-{number + 1}.log" for number in range(JOURNALS)]


def has_process(place: Place, folder: Path) -> bool:
    """Tell whether a machine's folder has the socket of a slot's process."""
    return _socket_in(folder, place).exists()


def _socket_in(folder: Path, place: Place) -> Path:
    # A machine may have another slot while its former one is still given back.
    return folder / f"egress-{place.number}.sock"


def _server(address: str, port: int) -> Server:
    """Return a resolver, its address written as the kernel writes it."""
    with contextlib.suppress(ValueError):
        address = str(ipaddress.ip_address(address))
    return Server(address, port)


def read_journal(folder: Path, *, now: float, since: float | None = None) -> list[Line]:
    """Return a sandbox's journal, oldest line first; nothing if nothing was written `since`."""
    found, written = [], list[tuple[float, Path]]()
    for path in journal_paths(folder):
        with contextlib.suppress(FileNotFoundError):
            written.append((path.stat().st_mtime, path))
    if since is not None and all(at < since - _TICK_S for at, _ in written):
        return []
    # The one that is being written comes last. If it fills up meanwhile, what follows in the other
    # is later than all that is returned, and is found by the next call.
    for _, path in sorted(written):
        with contextlib.suppress(FileNotFoundError):
            found.append(path.read_bytes())
    return newest_of(found, now=now, since=since)


def clear_journal(folder: Path) -> None:
    """Empty the journal of a machine that waited in the pool: what it reached then was no
    sandbox's."""
    for path in journal_paths(folder):
        with contextlib.suppress(FileNotFoundError):
            os.truncate(path, 0)


class _Guard:
    """The process of one slot, and its rules."""

    def __init__(self, place: Place, folder: Path, policy: Policy) -> None:
        self.place = place
        self.folder = folder
        self.policy = policy
        self.credentials: Credentials | None = None
        self.stamp: str | None = None
        self.lock = asyncio.Lock()
        self.watching: Task | None = None


class EgressProcesses:
    """Starts and supervises the processes."""

    def __init__(
        self,
        *,
        empty: Path,
        uid_of: Callable[[Place], int],
        permitted: Sequence[str],
        resolvers: Callable[[], Sequence[Resolver]],
        extra_ca: Path | None = None,
    ) -> None:
        """Supervise processes whose file system is mounted over `empty`, for themselves alone, and
        that resolve names by `resolvers`; `permitted` are private ranges that the operator allows.
        `extra_ca` is a file of authorities that hosts are checked by, beside the usual ones."""
        self._empty = empty
        self._uid_of = uid_of
        self._permitted = tuple(permitted)
        self._resolvers = resolvers
        self._guards: dict[int, _Guard] = {}
        self._parent = _Parent(extra_ca)
        self._crew: Crew | None = None
        self._on_change: Callable[[], None] = lambda: None

    def open(self, crew: Crew, on_change: Callable[[], None]) -> None:
        """Supervise from now on. `on_change` is called when a process has lost its credentials."""
        self._crew = crew
        self._on_change = on_change
        crew.start(
            self._follow_resolvers(), "sandboxes with rules no longer learn of new resolvers"
        )

    async def close(self) -> None:
        """End the supervision; the processes continue."""
        self._crew = None
        for guard in list(self._guards.values()):
            await _unwatch(guard)
        self._guards.clear()
        await self._parent.close()

    def guards(self, place: Place) -> bool:
        """Tell whether a slot has a process."""
        return place.number in self._guards

    def stamp(self, place: Place) -> str | None:
        """Return the stamp of the credentials that a slot's process has."""
        guard = self._guards.get(place.number)
        return None if guard is None else guard.stamp

    async def apply(
        self, place: Place, folder: Path, policy: Policy, credentials: Credentials | None
    ) -> None:
        """Return once the process of a slot judges by these rules; it is started if necessary.
        Without `credentials` it keeps those that it has.

        Raises:
            UnavailableError: it does not start, or does not answer.
        """
        guard = self._guards.get(place.number)
        if guard is None:
            guard = self._guards[place.number] = _Guard(place, folder, policy)
        guard.policy = policy
        if credentials is not None or not policy.ends_tls:
            guard.credentials = credentials
        try:
            async with guard.lock:
                await self._configure(guard)
        finally:
            # Whatever became of this: it is started until it runs.
            if guard.watching is None and self._crew is not None:
                guard.watching = self._crew.start(
                    self._watch(guard), "a sandbox's egress process is no longer supervised"
                )

    async def stop(self, place: Place, folder: Path | None = None) -> None:
        """End the process of a slot, if it has one; a server of before may have started it if
        `folder`, its machine's, has its socket."""
        guard = self._guards.get(place.number)
        if guard is not None:
            await _unwatch(guard)
            folder = guard.folder
        if folder is not None:
            await kill_all_of(self._uid_of(place), path_of(place.netns), is_hidden=True)
            _socket_in(folder, place).unlink(missing_ok=True)
        self._guards.pop(place.number, None)

    async def _configure(self, guard: _Guard) -> None:
        """Send a process its rules; one that does not take them is replaced."""
        before, stamp = guard.stamp, None
        try:
            try:
                stamp = await self._send(guard)
            except (OSError, TimeoutError, EOFError):
                stamp = await self._replace(guard)
        finally:
            guard.stamp = stamp
            if before is not None and stamp is None:
                self._on_change()

    async def _replace(self, guard: _Guard) -> str | None:
        """Start another process with the rules. Returns as `_send`."""
        await kill_all_of(self._uid_of(guard.place), path_of(guard.place.netns), is_hidden=True)
        try:
            await self._start(guard)
            return await self._send(guard)
        except (OSError, TimeoutError, EOFError, ValueError) as error:
            printed = await in_thread(_end_of, guard.folder / _ERRORS)
            raise UnavailableError(
                f"cannot start what enforces the sandbox's network rules: {printed or error}"
            ) from error

    async def _send(self, guard: _Guard) -> str | None:
        """Send a process its rules, and return the stamp of its credentials once it uses them."""
        servers = tuple(_server(*one) for one in self._resolvers())
        config = Config(guard.policy, UNREACHABLE, self._permitted, servers, guard.credentials)
        connected = await in_thread(_connected, _socket_in(guard.folder, guard.place))
        async with asyncio.timeout(_LIMIT_S):
            reader, writer = await asyncio.open_unix_connection(sock=connected)
            with contextlib.closing(writer):
                writer.write(json.dumps(encode(config)).encode() + b"\n")
                await writer.drain()
                word, _, stamp = (await reader.readline()).decode().strip().partition(" ")
                if word != "ok":
                    raise EOFError("it does not take its rules")
                return stamp or None

    async def _start(self, guard: _Guard) -> None:
        start = Start(self._uid_of(guard.place), GATEWAY_IP, len(_DATAGRAMS))
        with ExitStack() as held:
            descriptors = await in_thread(
                _descriptors, held, guard.place, guard.folder, self._empty
            )
            await self._parent.fork(start, descriptors)

    async def _watch(self, guard: _Guard) -> None:
        """Start a process again whenever it ends."""
        pause_s, now = _AGAIN_S, asyncio.get_running_loop().time
        while True:
            began = now()
            netns = path_of(guard.place.netns)
            for process in await all_of(self._uid_of(guard.place), netns, is_hidden=True):
                with contextlib.closing(process):
                    await process.wait()
            log.warning("the egress process of slot %d has ended", guard.place.number)
            # Limits the CPU time of a process that crashes repeatedly.
            pause_s = _AGAIN_S if now() - began > _AGAIN_MAX_S else min(2 * pause_s, _AGAIN_MAX_S)
            await asyncio.sleep(pause_s)
            try:
                async with guard.lock:
                    await self._configure(guard)
            except UnavailableError as error:
                log.error("%s; trying again", error.message)

    async def _follow_resolvers(self) -> None:
        known = list(self._resolvers())
        while True:
            await asyncio.sleep(_FOLLOW_S)
            found = list(self._resolvers())
            if found != known:
                known = found
                for guard in list(self._guards.values()):
                    with contextlib.suppress(UnavailableError):  # it is started again elsewhere
                        async with guard.lock:
                            if guard.watching is not None:  # it was not stopped meanwhile
                                await self._configure(guard)


class _Parent:
    """The process that forks the others; it is started when it is first needed."""

    def __init__(self, extra_ca: Path | None) -> None:
        self._more = [] if extra_ca is None else [str(extra_ca)]
        self._lock = asyncio.Lock()
        self._process: asyncio.subprocess.Process | None = None
        self._link: socket.socket | None = None

    async def fork(self, start: Start, descriptors: Sequence[int]) -> None:
        """Have a process forked, with copies of descriptors.

        Raises:
            OSError, ValueError: it could not be.
        """
        async with self._lock:
            if self._process is None or self._process.returncode is not None:
                await self._end()
                await self._begin()
            assert self._link is not None
            try:
                answer = await in_thread(_asked, self._link, start, descriptors)
            except OSError:
                await self._end()
                raise
        if "pid" not in answer:
            raise OSError(answer.get("error", "it was not forked"))

    async def _begin(self) -> None:
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with its:
            ours.settimeout(_LIMIT_S)
            self._link = ours
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-I", "-m", "sandyard.server.egress", *self._more,
                stdin=its.fileno(), stdout=asyncio.subprocess.DEVNULL, cwd="/",
                env={"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"}, start_new_session=True,
            )  # fmt: skip

    async def _end(self) -> None:
        link, self._link = self._link, None
        if link is not None:
            link.close()
        process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LIMIT_S):
                    await process.wait()
                return
            process.kill()
            await process.wait()

    async def close(self) -> None:
        """End it; what it forked continues."""
        async with self._lock:
            await to_the_end(self._end())


async def _unwatch(guard: _Guard) -> None:
    watching, guard.watching = guard.watching, None
    if watching is not None:
        watching.cancel()
        await asyncio.wait([watching])


# For a thread: files, and a process that may be busy.


def _asked(link: socket.socket, start: Start, descriptors: Sequence[int]) -> dict[str, str]:
    socket.send_fds(link, [json.dumps(encode(start)).encode()], list(descriptors))
    answer: dict[str, str] = json.loads(link.recv(4096))
    return answer


def _descriptors(held: ExitStack, place: Place, folder: Path, empty: Path) -> list[int]:
    """Return what a process is given; see `egress.config.Start`."""

    def opened(path: Path, flags: int, mode: int = 0o600) -> int:
        descriptor = os.open(path, flags | os.O_CLOEXEC, mode)
        held.callback(os.close, descriptor)
        return descriptor

    empty.mkdir(mode=0o755, parents=True, exist_ok=True)
    errors = folder / _ERRORS
    if errors.exists() and errors.stat().st_size > _ERRORS_MAX:
        errors.unlink()
    control = held.enter_context(_listening(_socket_in(folder, place)))
    sockets = [
        held.enter_context(socket.socket(family, kind))
        for families, kind in ((_DATAGRAMS, socket.SOCK_DGRAM), (_STREAMS, socket.SOCK_STREAM))
        for family in families
    ]
    append = os.O_RDWR | os.O_CREAT | os.O_APPEND
    return [
        opened(path_of(place.netns), os.O_RDONLY),
        opened(empty, os.O_RDONLY | os.O_DIRECTORY),
        control.fileno(),
        opened(errors, append),
        *(opened(one, append) for one in journal_paths(folder)),
        *(one.fileno() for one in sockets),
    ]


def _listening(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(path) as name:
            control.bind(name)
        path.chmod(0o600)
        control.listen(4)
    except BaseException:
        control.close()
        raise
    return control


def _connected(path: Path) -> socket.socket:
    control = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _short(path) as name:
            control.connect(name)
    except BaseException:
        control.close()
        raise
    return control


@contextlib.contextmanager
def _short(path: Path) -> Iterator[str]:
    """Lend a name of a socket that is short enough for the kernel (unix(7))."""
    descriptor = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}/{path.name}"
    finally:
        os.close(descriptor)


def _end_of(path: Path) -> str:
    with contextlib.suppress(OSError, IndexError):
        return path.read_text(errors="replace").splitlines()[-1][:500]
    return ""
