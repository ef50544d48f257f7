"""DIAL, LISTEN, TAKE: connections from the host into the machine, and out of it."""

import asyncio
import contextlib
import json
import os
import signal
import socket
import stat
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager

from sandyard.server.core import ops, wire
from sandyard.server.core.codec import encode
from sandyard.server.guest import processes, system
from sandyard.server.guest.context import Context
from sandyard.server.guest.streams import answer, copy
from sandyard.server.guest.system import AbsentError, ConflictingError, RefusedError

_CONNECT_S = 30.0
_UNTAKEN_MAX = 64
_UNTAKEN_S = 60.0
_HOST_MAX = 255
_LOOPBACK = (("127.0.0.1", socket.AF_INET), ("::1", socket.AF_INET6))
_HERE = frozenset({"", "localhost", "127.0.0.1", "::1"})
_EVERYWHERE = frozenset({"*", "0.0.0.0", "::"})


async def dial(
    context: Context, wish: ops.Dial, connection: socket.socket, decoder: wire.Decoder
) -> None:
    """See core.ops.Dial."""
    if wish.path is not None:
        there = await _connect_path(context, wish.path)
    elif not 1 <= wish.port <= 65535 or wish.port == wire.AGENT_PORT:
        raise RefusedError(
            f"cannot connect to port {wish.port}: it is not one of the sandbox's own"
        )
    elif wish.host is None or wish.host.lower() in _HERE:
        there = await _connect_here(wish.port)
    else:
        there = await _connect(context, wish.host, wish.port)
    await _join(there, connection, decoder)


async def take(
    context: Context, wish: ops.Take, connection: socket.socket, decoder: wire.Decoder
) -> None:
    """See core.ops.Take."""
    await _join(context.callers.take(wish.number), connection, decoder)


async def _join(there: socket.socket, connection: socket.socket, decoder: wire.Decoder) -> None:
    """Send the answer, and copy bytes in both directions until both have ended."""
    with there:
        await answer(connection, ops.Done())
        await asyncio.get_running_loop().sock_sendall(there, decoder.take_raw())
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(copy(connection, there))
            tasks.create_task(copy(there, connection))


async def _connect_here(port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    for host, family in _LOOPBACK:
        try:
            there = socket.socket(family, socket.SOCK_STREAM)
        except OSError:
            continue  # not every machine has IPv6
        there.setblocking(False)
        try:
            await loop.sock_connect(there, (host, port))
        except OSError:
            there.close()
        else:
            there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return there
    raise AbsentError(f"cannot connect to port {port}: nothing listens there")


async def _connect_path(context: Context, path: str) -> socket.socket:
    there = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    there.setblocking(False)

    def connect() -> None:
        # The path exists only in the user's root.
        system.enter(context.root_fd)
        there.connect(path)

    try:
        if processes.may_wait_for_files():
            # A file system on the path may block, so a child does it.
            await processes.by_child(connect, keeps=(context.root_fd, there.fileno()))
        else:
            _as_user(connect)
    except BaseException as error:
        there.close()
        if not isinstance(error, OSError | ValueError):
            raise
        why = getattr(error, "strerror", None) or "it is no path of a socket"
        raise AbsentError(f"cannot connect to {path[:200]}: {why}") from error
    return there


def _as_user(work: Callable[[], None]) -> None:
    """Enter the user's root in the agent itself, for work that does not block."""
    own_root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        work()
    finally:
        system.enter(own_root)
        os.close(own_root)


async def _connect(context: Context, host: str, port: int) -> socket.socket:
    """Return a connection to another host. A child looks its name up and connects in the user's
    root, because a lookup may block."""
    if not host or len(host) > _HOST_MAX or "\0" in host:
        raise RefusedError("cannot connect: that is no name or address of a host")
    ours, theirs = socket.socketpair()
    account = system.find_account(context.root_fd, "root")
    with ours:
        with theirs:
            pid = processes.fork(
                lambda: _find_and_connect(account, context.root_fd, host, port, theirs),
                keeps=(context.root_fd, theirs.fileno()),
            )
        pidfd = os.pidfd_open(pid)
        try:
            ours.setblocking(False)
            async with asyncio.timeout(_CONNECT_S):
                await processes.readable(ours.fileno())
            problem, descriptors, _, _ = socket.recv_fds(ours, 1000, 1)
        except TimeoutError:
            raise AbsentError(f"cannot connect to {host} port {port}: it does not answer") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(pidfd)
    if not descriptors:
        why = problem.decode(errors="replace") or "it failed"
        raise AbsentError(f"cannot connect to {host} port {port}: {why}")
    there = socket.socket(fileno=descriptors[0])
    there.setblocking(False)
    is_here = there.getsockname()[0] == there.getpeername()[0]
    if is_here and there.getpeername()[1] == wire.AGENT_PORT:
        there.close()
        raise RefusedError(f"cannot connect to port {port}: it is not one of the sandbox's own")
    return there


def _find_and_connect(
    account: system.Account, root_fd: int, host: str, port: int, result: socket.socket
) -> None:
    processes.step_down(account, root_fd)
    try:
        with socket.create_connection((host, port), timeout=_CONNECT_S) as found:
            found.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            socket.send_fds(result, [b"."], [found.fileno()])
    except OSError as error:
        result.send((error.strerror or str(error) or "it failed").encode()[:500])


# --- the other way round ------------------------------------------------------------------------


async def listen(
    context: Context, wish: ops.Listen, connection: socket.socket, decoder: wire.Decoder
) -> None:
    """See core.ops.Listen."""
    del decoder
    async with AsyncExitStack() as held:
        if wish.path is not None:
            listeners, where = await _listen_at(context, wish.path, wish.user, held)
        else:
            listeners, where = held.enter_context(_listening(context, wish))
        await answer(connection, where)
        async with asyncio.TaskGroup() as tasks:
            accepting = [tasks.create_task(_accept(context, one, connection)) for one in listeners]
            await processes.readable(connection.fileno())  # it sent nothing: it has disconnected
            for task in accepting:
                task.cancel()


async def _accept(context: Context, listener: socket.socket, connection: socket.socket) -> None:
    loop, waiting = asyncio.get_running_loop(), set[int]()
    try:
        while True:
            caller, address = await loop.sock_accept(listener)
            waiting = {one for one in waiting if context.callers.is_waiting(one)}
            if len(waiting) >= _UNTAKEN_MAX:
                caller.close()
                continue
            caller.setblocking(False)
            number = context.callers.add(caller)
            waiting.add(number)
            loop.call_later(_UNTAKEN_S, context.callers.drop, number)
            host, port = ("", 0) if isinstance(address, str | bytes) else address[:2]
            payload = json.dumps(encode(ops.Caller(number, host, port))).encode()
            await loop.sock_sendall(connection, wire.encode_frame(wire.Channel.STDOUT, payload))
    finally:
        for number in waiting:
            context.callers.drop(number)


@contextmanager
def _listening(
    context: Context, wish: ops.Listen
) -> Iterator[tuple[list[socket.socket], ops.Listening]]:
    """Listen during the block."""
    with contextlib.ExitStack() as held:
        if wish.host is None:
            yield _listen_apart(context, wish.user, held)
            return
        if not 0 <= wish.port <= 65535 or wish.port == wire.AGENT_PORT:
            raise RefusedError(f"cannot listen on port {wish.port}: it is not to be had")
        host = wish.host.lower()
        addresses: list[tuple[str, int]] = []
        if host in _EVERYWHERE:
            addresses = [("0.0.0.0", socket.AF_INET), ("::", socket.AF_INET6)]
        elif host in _HERE:
            addresses = list(_LOOPBACK)
        else:
            addresses = [(host, socket.AF_INET6 if ":" in host else socket.AF_INET)]
        port, listeners = wish.port, list[socket.socket]()
        for address, family in addresses:
            try:
                one = held.enter_context(_listener(address, family, port))
            except OSError as error:
                if listeners:  # one of the two is enough: not every machine has IPv6
                    continue
                raise ConflictingError(
                    f"cannot listen on {address} port {port}: {error.strerror or error}"
                ) from error
            port = one.getsockname()[1]
            listeners.append(one)
        yield listeners, ops.Listening(port=port)


def _listener(address: str, family: int, port: int) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setblocking(False)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind((address, port))
        listener.listen(64)
    except BaseException:
        listener.close()
        raise
    return listener


def _listen_apart(
    context: Context, user: str, held: contextlib.ExitStack
) -> tuple[list[socket.socket], ops.Listening]:
    """Listen on a socket in a directory of the user's own under /tmp, as ssh(1) does for its
    agent."""
    account = system.find_account(context.root_fd, user)
    name = f"ssh-{os.urandom(6).hex()}"
    try:
        tmp = os.open("tmp", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=context.root_fd)
        held.callback(os.close, tmp)
        os.mkdir(name, 0o700, dir_fd=tmp)
        held.callback(_rmdir, name, tmp)
        folder = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW,
                         dir_fd=tmp)  # fmt: skip
        held.callback(os.close, folder)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        held.callback(listener.close)
        listener.setblocking(False)
        listener.bind(f"/proc/self/fd/{folder}/agent")
        held.callback(_unlink, "agent", folder)
        listener.listen(64)
        os.chown("agent", account.uid, account.gid, dir_fd=folder, follow_symlinks=False)
        os.fchown(folder, account.uid, account.gid)
    except OSError as error:
        raise ConflictingError(
            f"cannot make a socket in the sandbox: {error.strerror or error}"
        ) from error
    return [listener], ops.Listening(path=f"/tmp/{name}/agent")


async def _listen_at(
    context: Context, path: str, user: str, held: AsyncExitStack
) -> tuple[list[socket.socket], ops.Listening]:
    """Listen on a socket at a path of the user's root, with the user's rights."""
    account = system.find_account(context.root_fd, user)
    listener = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    listener.setblocking(False)

    def bind() -> None:
        processes.step_down(account, context.root_fd)
        with contextlib.suppress(OSError):
            os.chdir(account.home)
        os.umask(0o177)
        with contextlib.suppress(OSError):
            _remove_unused(path)
        listener.bind(path)
        listener.listen(64)

    def remove() -> None:
        processes.step_down(account, context.root_fd)
        with contextlib.suppress(OSError):
            os.chdir(account.home)
        _remove_unused(path)

    keeps = (context.root_fd, listener.fileno())
    try:
        await processes.by_child(bind, keeps=keeps)
    except OSError as error:
        why = error.strerror or "it is no path of a socket"
        raise ConflictingError(f"cannot listen on {path[:200]}: {why}") from error

    async def clean_up() -> None:
        listener.close()
        with contextlib.suppress(OSError):
            await processes.by_child(remove, keeps=keeps[:1])

    held.push_async_callback(clean_up)
    return [listener], ops.Listening(path=path)


def _remove_unused(path: str) -> None:
    """Remove a socket that has no listener.

    Raises:
        OSError: it is not a socket, or cannot be removed.
    """
    if not stat.S_ISSOCK(os.lstat(path).st_mode):
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.settimeout(1.0)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)


def _unlink(name: str, folder: int) -> None:
    with contextlib.suppress(OSError):
        os.unlink(name, dir_fd=folder)


def _rmdir(name: str, folder: int) -> None:
    with contextlib.suppress(OSError):
        os.rmdir(name, dir_fd=folder)
