"""The agent: takes connections from the host, one operation each, and carries them out.

One thread, one event loop. What may block is done in a forked child. State that must survive the
agent (token, environment) is kept in a root-only tmpfs, so that PID 1 may start it again at any
moment.
"""

import asyncio
import base64
import collections
import contextlib
import fcntl
import hmac
import json
import os
import resource
import signal
import socket
import sys
import termios
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from sandyard.server.core import wire
from sandyard.server.guest import connections, files, processes, system
from sandyard.server.guest.system import Account, RefusedError

_CHUNK = 64 * 1024
_HEAD_LIMIT_S = 90.0  # the host keeps a connection open for what it will want next
_LOGIN_LIMIT_S = 5.0
_SAMPLE_PERIOD_S = 5.0
_SAMPLES = 13  # a minute of them
_CONNECTIONS_MAX = 512
_SHELLS = ("/bin/bash", "/usr/bin/bash", "/bin/sh", "/usr/bin/sh")


@dataclass
class _State:
    """What the host told this machine, as kept over a restart of the agent."""

    token: str = field(repr=False)
    env: dict[str, str] = field(default_factory=dict, repr=False)


class Agent:
    """Serves the host. Operations run side by side; none waits for another."""

    def __init__(self, state: _State, root_fd: int) -> None:
        self._state = state
        self._root_fd = root_fd
        self._logins: dict[int, tuple[tuple[object, ...], dict[str, str]]] = {}
        self._cpu = (time.monotonic(), system.cpu_ticks())
        self._work = collections.deque([_work_done()], maxlen=_SAMPLES)
        self._open = 0

    async def serve(self, listener: socket.socket) -> None:
        """Take connections for ever."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._sample())
            while True:
                connection, _ = await loop.sock_accept(listener)
                if self._open >= _CONNECTIONS_MAX:
                    connection.close()
                    continue
                connection.setblocking(False)
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._open += 1
                tasks.create_task(self._serve_one(connection))

    async def _serve_one(self, connection: socket.socket) -> None:
        with connection:
            try:
                await self._converse(connection)
            except (OSError, TimeoutError, wire.WireError):
                pass  # the host went away, or spoke another language: nothing is owed to it
            except Exception as error:  # noqa: BLE001 - one connection must not end the agent
                _log(f"operation failed: {error!r}")
            finally:
                self._open -= 1

    async def _converse(self, connection: socket.socket) -> None:
        decoder = wire.Decoder()
        async with asyncio.timeout(_HEAD_LIMIT_S):
            while (request := decoder.take_request()) is None:
                decoder.feed(await _receive(connection))
        if not hmac.compare_digest(request.token, self._state.token):
            await _refuse(connection, "unauthorized", "cannot serve: the token is wrong")
            return
        try:
            await self._carry_out(request, connection, decoder)
        except RefusedError as error:
            await _refuse(connection, "bad_request", str(error))

    async def _carry_out(
        self, request: wire.Request, connection: socket.socket, decoder: wire.Decoder
    ) -> None:
        args = request.args
        match request.op:
            case wire.Op.HELLO:
                await _answer(connection, {"pid": os.getpid()})
            case wire.Op.SETUP:
                if "wallNs" in args:
                    self._wake(args, connection)
                await self._set_up(args)
                await _answer(connection, {})
            case wire.Op.WAKE:
                self._wake(args, connection)
                await _answer(connection, {})
            case wire.Op.EXEC:
                await self._exec(args, connection, decoder)
            case wire.Op.DIAL:
                await self._dial(args, connection, decoder)
            case wire.Op.STATS:
                await _answer(connection, await self._stats(args))
            case wire.Op.READ_FILE | wire.Op.WRITE_FILE:
                self._move_file(request, connection, decoder)

    # --- set-up ---------------------------------------------------------------------------

    def _wake(self, args: Mapping[str, object], connection: socket.socket) -> None:
        """Mend what a machine that stood still has wrong; raises if any of it cannot be."""
        system.reseed(base64.b64decode(_text(args, "entropy")))
        system.set_clock(_number(args, "wallNs"))
        if args.get("keepsConnections") is not True:
            connections.break_off(
                own_port=connection.getsockname()[1], peer_port=connection.getpeername()[1]
            )
        self._work.clear()
        self._work.append(_work_done())

    async def _set_up(self, args: Mapping[str, object]) -> None:
        hostname = _text(args, "hostname")
        socket.sethostname(hostname)
        machine_id, password_hash = args.get("machineId"), args.get("passwordHash")
        if isinstance(machine_id, str):
            system.write_boot_id()
        own_root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            system.enter(self._root_fd)
            system.write_identity(
                hostname=hostname,
                machine_id=machine_id if isinstance(machine_id, str) else None,
                authorized_keys=_text(args, "authorizedKeys"),
                password_hash=password_hash if isinstance(password_hash, str) else None,
            )
        except OSError as error:
            raise RefusedError(f"cannot write the identity of the sandbox: {error}") from error
        finally:
            system.enter(own_root)
            os.close(own_root)
        if (size := args.get("diskBytes")) is not None and isinstance(size, int):
            system.grow_disk(size, self._root_fd)
        env = dict(system.check_environment(args.get("env")))
        self._state = _State(token=_text(args, "token"), env=env)
        system.write_private("state", json.dumps(vars(self._state)))
        await self._login_environment(system.find_account(self._root_fd, "root"))

    # --- exec -----------------------------------------------------------------------------

    async def _exec(
        self, args: Mapping[str, object], connection: socket.socket, decoder: wire.Decoder
    ) -> None:
        command = _text(args, "command")
        account = system.find_account(self._root_fd, _text(args, "user"))
        env = await self._login_environment(account)
        env |= self._state.env
        env |= system.check_environment(args.get("env"))
        spec = processes.Spec(
            programs=[(shell, "-c", command) for shell in _SHELLS],
            env=env,
            cwd=_text(args, "cwd"),
            account=account,
        )
        wants_stdin = args.get("stdin") is True
        process = await processes.start(spec, root_fd=self._root_fd, wants_stdin=wants_stdin)
        started = time.monotonic()
        try:
            await _Exec(process, connection, decoder).run(
                limit_s=_number(args, "timeoutMs") / 1000, started=started
            )
        finally:
            process.release()

    async def _login_environment(self, account: Account) -> dict[str, str]:
        stamp = system.profile_stamp(self._root_fd, account)
        known = self._logins.get(account.uid)
        if known is None or known[0] != stamp:
            plain = system.plain_environment(account)
            captured = await self._capture_login(account, plain)
            known = (stamp, plain | captured)
            self._logins[account.uid] = known
        return dict(known[1])

    async def _capture_login(self, account: Account, plain: dict[str, str]) -> dict[str, str]:
        # A profile that hangs or fails must not take exec away: the plain environment serves then.
        spec = processes.Spec(
            programs=[(shell, "-l", "-c", "exec env -0") for shell in _SHELLS],
            env=plain,
            cwd="/",
            account=account,
        )
        try:
            process = await processes.start(spec, root_fd=self._root_fd, wants_stdin=False)
        except RefusedError:
            return {}
        stdout, stderr = _Reader(process.stdout), _Reader(process.stderr)
        try:
            async with asyncio.timeout(_LOGIN_LIMIT_S), asyncio.TaskGroup() as tasks:
                dump = tasks.create_task(stdout.read_all(wire.HEAD_MAX))
                tasks.create_task(stderr.read_all(wire.HEAD_MAX))
                # Not the pipes' end: a background job of the profile may hold them for ever.
                await process.wait()
                stdout.finish()
                stderr.finish()
        except TimeoutError:
            process.kill()
            await process.wait()
            return {}
        finally:
            stdout.close()
            stderr.close()
            process.kill()
            process.release()
        return system.parse_environment(dump.result())

    # --- the rest -------------------------------------------------------------------------

    async def _dial(
        self, args: Mapping[str, object], connection: socket.socket, decoder: wire.Decoder
    ) -> None:
        port = _number(args, "port")
        if not 1 <= port <= 65535 or port == wire.AGENT_PORT:
            raise RefusedError(f"cannot connect to port {port}: it is not one of the sandbox's own")
        there = await _connect_local(port)
        with there:
            await _answer(connection, {})
            await asyncio.get_running_loop().sock_sendall(there, decoder.take_raw())
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(_copy(connection, there))
                tasks.create_task(_copy(there, connection))

    async def _sample(self) -> None:
        while True:
            await asyncio.sleep(_SAMPLE_PERIOD_S)
            self._work.append(_work_done())

    def _recent_percent(self, window_s: float) -> float:
        """Return how busy users' programs kept the machine lately, 100 for one whole CPU."""
        now, work = _work_done()
        then, before = next((one for one in self._work if now - one[0] <= window_s), self._work[-1])
        elapsed = now - then
        return round(100.0 * max(0.0, work - before) / elapsed, 2) if elapsed > 0 else 0.0

    async def _stats(self, args: Mapping[str, object]) -> dict[str, object]:
        window = args.get("windowS")
        if isinstance(window, int | float):
            return {"recentCpuPercent": self._recent_percent(window)}
        then, (busy, total) = self._cpu
        if time.monotonic() - then > 2.0:
            busy, total = system.cpu_ticks()
            await asyncio.sleep(0.2)
        busy_now, total_now = system.cpu_ticks()
        self._cpu = (time.monotonic(), (busy_now, total_now))
        share = (busy_now - busy) / (total_now - total) if total_now > total else 0.0
        # 100 % is one whole CPU, so that the figure means the same whatever the shape.
        percent = round(100.0 * share * (os.cpu_count() or 1), 2)
        return {"cpuPercent": percent, **system.stats(self._root_fd)}

    def _move_file(
        self, request: wire.Request, connection: socket.socket, decoder: wire.Decoder
    ) -> None:
        path = _text(request.args, "path")
        account = system.find_account(self._root_fd, _text(request.args, "user"))
        mode = request.args.get("mode")
        if not path.startswith("/") or "\0" in path:
            raise RefusedError("cannot use this path: it must start with /")

        def work() -> None:
            processes.settle(account, self._root_fd)
            connection.setblocking(True)
            if request.op is wire.Op.READ_FILE:
                files.send_file(connection, path)
            else:
                files.receive_file(
                    connection, decoder, path, mode if isinstance(mode, int) else None
                )

        child = processes.fork(work, keep=(connection.fileno(), self._root_fd))
        asyncio.get_running_loop().call_soon(_reap, os.pidfd_open(child), child)


class _Exec:
    """One command under way: its streams go to the host, its end is told in the last frame."""

    def __init__(
        self,
        process: processes.Process,
        connection: socket.socket,
        decoder: wire.Decoder,
    ) -> None:
        self._process = process
        self._connection = connection
        self._decoder = decoder
        self._sending = asyncio.Lock()
        self._host_is_there = True

    async def run(self, *, limit_s: float, started: float) -> None:
        """Answer, stream until the command or its time is over, and tell how it ended."""
        await _answer(self._connection, {"pid": self._process.pid})
        stdout, stderr = _Reader(self._process.stdout), _Reader(self._process.stderr)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._pump(stdout, wire.Channel.STDOUT))
            tasks.create_task(self._pump(stderr, wire.Channel.STDERR))
            # Without a stdin the host has nothing more to say.
            feeds = self._process.stdin is not None
            feeder = tasks.create_task(self._feed()) if feeds else None
            code, timed_out = await self._wait(limit_s - (time.monotonic() - started))
            if feeder is not None:
                feeder.cancel()
            stdout.finish()
            stderr.finish()
        end = {
            "exitCode": 124 if timed_out else code if code >= 0 else 128 - code,
            "signal": None if code >= 0 else _signal_name(-code),
            "timedOut": timed_out,
            "durationMs": round((time.monotonic() - started) * 1000),
        }
        await self._send(wire.Channel.EXIT, json.dumps(end).encode())
        stdout.drain_to_nowhere()
        stderr.drain_to_nowhere()

    async def _wait(self, limit_s: float) -> tuple[int, bool]:
        try:
            async with asyncio.timeout(limit_s):
                return await self._process.wait(), False
        except TimeoutError:
            await self._process.end()
            return await self._process.wait(), True

    async def _pump(self, reader: "_Reader", channel: wire.Channel) -> None:
        while data := await reader.read(_CHUNK):
            await self._send(channel, data)

    async def _send(self, channel: wire.Channel, data: bytes) -> None:
        # A host that went away does not end the command: it has its own limit, kept here.
        if not self._host_is_there:
            return
        async with self._sending:
            try:
                await asyncio.get_running_loop().sock_sendall(
                    self._connection, wire.encode_frame(channel, data)
                )
            except OSError:
                self._host_is_there = False

    async def _feed(self) -> None:
        descriptor = self._process.stdin
        try:
            while True:
                while (frame := self._decoder.take_frame()) is None:
                    self._decoder.feed(await _receive(self._connection))
                if descriptor is None or frame.channel is not wire.Channel.STDIN:
                    continue
                if not frame.payload:
                    os.close(descriptor)
                    descriptor = self._process.stdin = None
                    continue
                await _write_all(descriptor, frame.payload)
        except (OSError, wire.WireError):
            pass  # the command closed its stdin, or the host is gone: neither ends the command
        finally:
            if descriptor is not None:
                os.close(descriptor)


class _Reader:
    """Reads a pipe; after `finish` it takes what is in the pipe by then and calls that the end."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._waiter: asyncio.Future[None] | None = None
        self._left: int | None = None

    async def read(self, limit: int) -> bytes:
        """Return up to `limit` bytes, or none at the end."""
        while self._left != 0:
            try:
                data = os.read(self._descriptor, limit if self._left is None else self._left)
            except BlockingIOError:
                await self._readable()
                continue
            if self._left is not None:
                self._left -= len(data)
            return data
        return b""

    async def read_all(self, limit: int) -> bytes:
        """Return everything up to the end, cut at `limit`."""
        result = bytearray()
        while data := await self.read(_CHUNK):
            result += data[: limit - len(result)]
        return bytes(result)

    def finish(self) -> None:
        """Read no further than what is there: whoever still holds the pipe is a background job."""
        size = fcntl.ioctl(self._descriptor, termios.FIONREAD, b"\0\0\0\0")
        self._left = int.from_bytes(size, sys.byteorder)
        if self._waiter is not None:
            _resolve(self._waiter)

    def drain_to_nowhere(self) -> None:
        """Keep the pipe open for a background job, which must not die of its own output."""
        loop = asyncio.get_running_loop()

        def is_at_end() -> bool:
            try:
                return not os.read(self._descriptor, _CHUNK)
            except BlockingIOError:
                return False
            except OSError:
                return True

        def drain() -> None:
            if is_at_end():
                loop.remove_reader(self._descriptor)
                self.close()

        if is_at_end():  # as it is unless there is a background job
            self.close()
        else:
            loop.add_reader(self._descriptor, drain)

    def close(self) -> None:
        """Close the pipe."""
        os.close(self._descriptor)

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        self._waiter = waiter = loop.create_future()
        loop.add_reader(self._descriptor, _resolve, waiter)
        try:
            await waiter
        finally:
            loop.remove_reader(self._descriptor)


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)


async def _connect_local(port: int) -> socket.socket:
    loop = asyncio.get_running_loop()
    for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        there = socket.socket(family, socket.SOCK_STREAM)
        there.setblocking(False)
        try:
            await loop.sock_connect(there, (host, port))
        except OSError:
            there.close()
        else:
            there.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return there
    raise RefusedError(f"cannot connect to port {port}: nothing listens there")


async def _copy(source: socket.socket, sink: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    how = socket.SHUT_WR
    try:
        while data := await loop.sock_recv(source, _CHUNK):
            await loop.sock_sendall(sink, data)
    except OSError:
        # Broken, not ended: nothing will come back either, so the other direction ends, too.
        how = socket.SHUT_RDWR
        with contextlib.suppress(OSError):
            source.shutdown(how)
    with contextlib.suppress(OSError):
        sink.shutdown(how)


async def _receive(connection: socket.socket) -> bytes:
    data = await asyncio.get_running_loop().sock_recv(connection, _CHUNK)
    if not data:
        raise ConnectionResetError
    return data


async def _write_all(descriptor: int, data: bytes) -> None:
    loop = asyncio.get_running_loop()
    view = memoryview(data)
    while view:
        try:
            view = view[os.write(descriptor, view) :]
        except BlockingIOError:
            ready = asyncio.Event()
            loop.add_writer(descriptor, ready.set)
            try:
                await ready.wait()
            finally:
                loop.remove_writer(descriptor)


def _reap(pidfd: int, pid: int) -> None:
    loop = asyncio.get_running_loop()

    def ended() -> None:
        loop.remove_reader(pidfd)
        os.close(pidfd)
        os.waitpid(pid, 0)

    loop.add_reader(pidfd, ended)


async def _answer(connection: socket.socket, values: dict[str, object]) -> None:
    await asyncio.get_running_loop().sock_sendall(
        connection, wire.encode_answer(wire.Answer(values))
    )


async def _refuse(connection: socket.socket, code: str, message: str) -> None:
    await asyncio.get_running_loop().sock_sendall(
        connection, wire.encode_answer(wire.Answer({}, error=code, message=message))
    )


def _text(args: Mapping[str, object], key: str) -> str:
    value = args.get(key)
    if not isinstance(value, str):
        raise RefusedError(f"cannot carry this out: {key} must be text")
    return value


def _number(args: Mapping[str, object], key: str) -> int:
    value = args.get(key)
    if not isinstance(value, int):
        raise RefusedError(f"cannot carry this out: {key} must be a whole number")
    return value


def _work_done() -> tuple[float, float]:
    """Return the time, and the CPU seconds spent since boot by all but this agent."""
    busy, _ = system.cpu_ticks()
    return time.monotonic(), busy / os.sysconf("SC_CLK_TCK") - time.process_time()


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"


def _log(message: str) -> None:
    sys.stderr.write(f"sandyard agent: {message[:500]}\n")
    sys.stderr.flush()


def main() -> None:
    """Run the agent until it is told to stop."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(processes.OOM_SCORE)
        os.setpriority(os.PRIO_PROCESS, 0, processes.NICENESS)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    os.umask(0o022)
    processes.prepare()
    state = _State(token=(system.RUN / "token").read_text().strip())
    with contextlib.suppress(FileNotFoundError):
        values, _ = json.JSONDecoder().raw_decode((system.RUN / "state").read_text())
        state = _State(**values)
    listener = socket.create_server(("0.0.0.0", wire.AGENT_PORT), backlog=256, reuse_port=False)
    listener.setblocking(False)
    _log("ready")
    asyncio.run(Agent(state, system.open_root()).serve(listener))
