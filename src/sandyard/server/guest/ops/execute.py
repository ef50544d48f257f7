"""EXEC: runs a command line, carries its streams, tells how it ended."""

import asyncio
import json
import os
import signal
import socket
import time

from sandyard.server.core import ops, wire
from sandyard.server.core.codec import encode
from sandyard.server.guest import processes, system
from sandyard.server.guest.context import SHELLS, Context
from sandyard.server.guest.streams import CHUNK, Reader, answer, receive, write_all

_ARGUMENT_MAX = 128 * 1024 - 1  # the kernel's limit for one argument (MAX_ARG_STRLEN)
_FD = processes.SCRIPT


async def execute(
    context: Context, wish: ops.Execute, connection: socket.socket, decoder: wire.Decoder
) -> None:
    """See core.ops.Execute."""
    account = system.find_account(context.root_fd, wish.user)
    env = await context.login_environment(account)
    env |= context.env
    env |= system.checked_environment(wish.env)
    command, script = wish.command, None
    if len(command.encode()) > _ARGUMENT_MAX:
        # Read whole and closed before it is run, it means what it would as an argument.
        command, script = (
            f'eval "exec {_FD}<&-; $(/bin/cat <&{_FD} || echo exit 127)"',
            command.encode(),
        )
    spec = processes.Spec(
        programs=[(shell, "-c", command) for shell in SHELLS],
        env=env,
        cwd=wish.cwd,
        account=account,
        script=script,
    )
    process = await processes.start(spec, root_fd=context.root_fd, wants_stdin=wish.stdin)
    started = time.monotonic()
    try:
        await _Command(process, connection, decoder).run(
            limit_s=wish.timeout_ms / 1000, started=started
        )
    finally:
        process.release()


class _Command:
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
        await answer(self._connection, ops.Started(self._process.pid))
        stdout, stderr = Reader(self._process.stdout), Reader(self._process.stderr)
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
        end = ops.Ended(
            exit_code=124 if timed_out else code if code >= 0 else 128 - code,
            duration_ms=round((time.monotonic() - started) * 1000),
            timed_out=timed_out,
            signal=None if code >= 0 else _signal_name(-code),
        )
        await self._send(wire.Channel.EXIT, json.dumps(encode(end)).encode())
        stdout.drain_to_nowhere()
        stderr.drain_to_nowhere()

    async def _wait(self, limit_s: float) -> tuple[int, bool]:
        try:
            async with asyncio.timeout(limit_s):
                return await self._process.wait(), False
        except TimeoutError:
            await self._process.end()
            return await self._process.wait(), True

    async def _pump(self, reader: "Reader", channel: wire.Channel) -> None:
        while data := await reader.read(CHUNK):
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
                    self._decoder.feed(await receive(self._connection))
                if descriptor is None or frame.channel is not wire.Channel.STDIN:
                    continue
                if not frame.payload:
                    os.close(descriptor)
                    descriptor = self._process.stdin = None
                    continue
                await write_all(descriptor, frame.payload)
        except (OSError, wire.WireError):
            pass  # the command closed its stdin, or the host is gone: neither ends the command
        finally:
            if descriptor is not None:
                os.close(descriptor)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"SIG{number}"
