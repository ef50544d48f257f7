"""The agent: accepts connections from the host, and carries out one operation at a time on each.

It has one event loop in one thread. Another one does nothing but sync(2), for `Flush`.
"""

import asyncio
import contextlib
import errno
import hmac
import os
import resource
import socket
import sys
from pathlib import Path
from typing import assert_never

from sandyard.server.core import ops, wire
from sandyard.server.core.codec import CodecError
from sandyard.server.guest import processes, system
from sandyard.server.guest.context import Context
from sandyard.server.guest.ops import files
from sandyard.server.guest.ops import processes as programs
from sandyard.server.guest.ops.dial import dial, listen, take
from sandyard.server.guest.ops.execute import execute
from sandyard.server.guest.ops.flush import Flushes
from sandyard.server.guest.ops.mount import mount
from sandyard.server.guest.ops.setup import set_up, trust, wake
from sandyard.server.guest.ops.stats import stats
from sandyard.server.guest.ops.watches import Watches
from sandyard.server.guest.streams import answer, receive, refuse
from sandyard.server.guest.system import RefusedError

_HEAD_LIMIT_S = 90.0  # the host keeps a connection open for its next operation
_CONNECTIONS_MAX = 4096
_BACKLOG = 256
_PASSING = frozenset({errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.EIO})


class Agent:
    """Serves the host. Operations run concurrently."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._watches = Watches()
        self._flushes = Flushes()
        self._open = 0

    async def serve(self, listener: socket.socket) -> None:
        """Accept connections forever."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            self._context.table.open(tasks)
            self._watches.open(tasks)
            tasks.create_task(self._context.load.sample())
            tasks.create_task(self._context.history.sample())
            while True:
                connection, _ = await loop.sock_accept(listener)
                self._take(connection, tasks)
                # All that wait, because the next turn of the loop may take long.
                with contextlib.suppress(BlockingIOError):
                    for _ in range(_BACKLOG):
                        self._take(listener.accept()[0], tasks)

    def _take(self, connection: socket.socket, tasks: asyncio.TaskGroup) -> None:
        if self._open >= _CONNECTIONS_MAX:
            connection.close()
            return
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._open += 1
        tasks.create_task(self._serve_one(connection))

    async def _serve_one(self, connection: socket.socket) -> None:
        decoder = wire.Decoder()
        with connection:
            try:
                while await self._converse(connection, decoder):
                    pass
            except wire.VersionError as error:
                with contextlib.suppress(ConnectionError, TimeoutError):
                    await refuse(connection, wire.Refusal.UNSUPPORTED, f"cannot read: {error}")
            except (ConnectionError, TimeoutError, wire.WireError):
                pass  # the host disconnected, or violated the protocol: no answer is needed
            except Exception as error:  # noqa: BLE001 - one connection must not end the agent
                _log(f"operation failed: {error!r}")
            finally:
                self._open -= 1

    async def _converse(self, connection: socket.socket, decoder: wire.Decoder) -> bool:
        """Carry out one operation, and tell whether another may follow on the same connection."""
        async with asyncio.timeout(_HEAD_LIMIT_S):
            while (request := decoder.take_request()) is None:
                decoder.feed(await receive(connection))
        if not hmac.compare_digest(request.token.encode(), self._context.token.encode()):
            message = "cannot serve: the token is wrong"
            await refuse(connection, wire.Refusal.UNAUTHORIZED, message)
            return False
        try:
            operation = ops.operation_of(request.op, request.args)
            again = request.again and ops.may_be_followed(operation)
            await self._carry_out(operation, connection, decoder, again=again)
            return again
        except ops.UnknownOperationError as error:
            await refuse(connection, wire.Refusal.UNSUPPORTED, f"cannot carry this out: {error}")
        except RefusedError as error:
            await refuse(connection, error.code, str(error))
        except CodecError as error:
            await refuse(connection, wire.Refusal.BAD_REQUEST, f"cannot read: {error}")
        return False

    async def _carry_out(
        self,
        operation: ops.AnyOperation,
        connection: socket.socket,
        decoder: wire.Decoder,
        *,
        again: bool,
    ) -> None:
        match operation:
            case (
                ops.Hello() | ops.Flush() | ops.Stats()
                | ops.OpenWatch() | ops.ReadWatch() | ops.CloseWatch()
            ):  # fmt: skip
                await answer(connection, await self._answer(operation), again=again)
            case ops.SetUp() | ops.Wake() | ops.MountAll() | ops.Unmount() | ops.Trust():
                await self._prepare(operation, connection)
                await answer(connection, ops.Done(), again=again)
            case ops.Execute():
                await execute(self._context, operation, connection, decoder, again=again)
            # Before Start, of which Run is one.
            case ops.Run() | ops.Pipe() | ops.Attach() | ops.Feed():
                await programs.follow(self._context, operation, connection, decoder)
            case ops.Start() | ops.List() | ops.Signal() | ops.Input() | ops.Resize():
                done = await programs.carry_out(self._context, operation, connection)
                await answer(connection, done, again=again)
            case ops.Dial():
                await dial(self._context, operation, connection, decoder)
            case ops.Listen():
                await listen(self._context, operation, connection, decoder)
            case ops.Take():
                await take(self._context, operation, connection, decoder)
            case (
                ops.Stat() | ops.ListFolder() | ops.MakeFolder() | ops.Move() | ops.Copy()
                | ops.Remove() | ops.Read() | ops.Write() | ops.WatchFolder()
            ):  # fmt: skip
                await files.carry_out(self._context, operation, connection, decoder)
            case _:
                assert_never(operation)

    async def _answer(self, operation: ops.Hello | ops.Flush | ops.Stats | ops.KeptWatch) -> object:
        match operation:
            case ops.Hello():
                return ops.Greeting(os.getpid())
            case ops.Flush():
                await self._flushes.flush()
                return ops.Done()
            case ops.Stats():
                return await stats(self._context, operation)
            case _:
                return await self._watches.carry_out(self._context, operation)

    async def _prepare(
        self,
        operation: ops.SetUp | ops.Wake | ops.MountAll | ops.Unmount | ops.Trust,
        connection: socket.socket,
    ) -> None:
        """Prepare the machine for use.

        Raises:
            RefusedError: that failed; the host must know, because it must not use the machine then.
        """
        try:
            match operation:
                case ops.SetUp():
                    await set_up(self._context, operation, connection)
                case ops.Wake():
                    wake(self._context, operation, connection)
                case ops.Trust():
                    await trust(self._context, operation)
                case _:
                    await mount(self._context, operation)
        except (OSError, ValueError) as error:
            number = getattr(error, "errno", None)
            if isinstance(operation, ops.SetUp) and number in _PASSING:
                raise  # no answer: the host tries again, or uses another machine
            raise RefusedError(f"cannot make the sandbox ready: {error}") from error


def _log(message: str) -> None:
    sys.stderr.write(f"sandyard agent: {message[:500]}\n")
    sys.stderr.flush()


def main() -> None:
    """Run the agent until it is asked to stop."""
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text(processes.OOM_SCORE)
        os.setpriority(os.PRIO_PROCESS, 0, processes.NICENESS)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 65536), hard))
    os.umask(0o022)
    processes.prepare()
    context = Context(system.open_root())
    listener = socket.create_server(
        ("0.0.0.0", wire.AGENT_PORT), backlog=_BACKLOG, reuse_port=False
    )
    listener.setblocking(False)
    _log("ready")
    asyncio.run(Agent(context).serve(listener))
