"""Runs a command in a sandbox and collects what it says."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass

from sandyard.server.core import ops
from sandyard.server.core.collect import Collector
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.errors import (
    ConflictError,
    DeadlineExceededError,
    InternalError,
    InvalidArgumentError,
    UnavailableError,
)
from sandyard.server.core.ids import checked_text
from sandyard.server.core.wire import FRAME_MAX, Channel, WireError, encode_frame
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.fields import checked_env
from sandyard.server.service.sandboxes.reach import Reach, Reached, Use
from sandyard.server.tasks import beside

OUTPUT_MAX = 16 * 1024 * 1024
_COMMAND_MAX = 128 * 1024 - 1  # the kernel's limit for one argument (MAX_ARG_STRLEN)
_PATH_MAX = 4096
_TIMEOUT_MS = range(1, 3_600_001)
_READ = 128 * 1024
_GRACE_S = 20.0
_USE = Use("exec", "Command run", "run a command in")


@dataclass(frozen=True)
class Command:
    """What to run, and how. `timeout` is in milliseconds from its start in the sandbox."""

    command: str
    timeout: int
    cwd: str
    env: Mapping[str, str]
    stdin: str | None
    user: str
    encoding: str


@dataclass(frozen=True)
class Outcome:
    """How a command ended. Output is text, or base64 where that was asked for."""

    stdout: str
    stderr: str
    exit_code: int
    duration_ms: int
    timed_out: bool
    truncated: bool
    signal: str | None


class Commands:
    """Runs commands."""

    def __init__(self, reach: Reach, clock: Clock) -> None:
        self._reach = reach
        self._clock = clock

    async def execute(self, actor: Actor, reference: str, command: Command) -> Outcome:
        """Run a command and return once it has ended, or its time is over and it was ended.

        Raises:
            InvalidArgumentError: something asked for cannot be; `facts` name the field.
            ConflictError: the sandbox ended, or was paused, while the command ran.
            UnavailableError: the agent stopped answering.
            For the rest see `Reach.open`.
        """
        _check(command)
        wish = ops.Execute(
            command=command.command,
            timeout_ms=command.timeout,
            cwd=command.cwd,
            env=command.env,
            user=command.user,
            stdin=command.stdin is not None,
        )
        async with self._reach.open(actor, reference, wish, _USE) as reached:
            return await self._finish(reached, command)

    async def _finish(self, reached: Reached[ops.Started], command: Command) -> Outcome:
        sandbox_id = reached.sandbox.id
        try:
            # The limit is kept in the guest; this one only guards against a guest that keeps none.
            async with self._clock.timeout(command.timeout / 1000 + _GRACE_S):
                if command.stdin is None:
                    return await _collect(reached.stream, command.encoding)
                async with beside(_feed(reached.stream, command.stdin.encode())):
                    return await _collect(reached.stream, command.encoding)
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"cannot tell how the command ended: the agent of {sandbox_id} does not answer"
            ) from error
        except ConflictError as error:
            raise ConflictError(
                f"cannot finish the command in {sandbox_id}: {error.message}", **error.facts
            ) from error
        except WireError as error:
            raise InternalError(f"cannot understand the agent of {sandbox_id}") from error


async def _feed(stream: ByteStream, data: bytes) -> None:
    try:
        for start in range(0, len(data), FRAME_MAX):
            await stream.write(encode_frame(Channel.STDIN, data[start : start + FRAME_MAX]))
        await stream.write(encode_frame(Channel.STDIN, b""))
    except (UnavailableError, ConflictError):
        pass  # the reading side tells what happened


async def _collect(stream: ByteStream, encoding: str) -> Outcome:
    collector = Collector(OUTPUT_MAX)
    while True:
        data = await stream.read(_READ)
        if not data:
            raise UnavailableError("the agent broke off before it said how the command ended")
        end = collector.feed(data)
        if end is not None:
            return Outcome(
                stdout=_printed(collector.stdout, encoding),
                stderr=_printed(collector.stderr, encoding),
                exit_code=end.exit_code,
                duration_ms=end.duration_ms,
                timed_out=end.timed_out,
                truncated=collector.is_truncated,
                signal=end.signal,
            )


def _printed(data: bytes, encoding: str) -> str:
    if encoding == "base64":
        return base64.b64encode(data).decode()
    return data.decode(errors="replace")


def _check(command: Command) -> None:
    """Refuse a command that no sandbox could run."""
    checked_text(command.command, field="command")
    checked_text(command.cwd, field="cwd")
    checked_text(command.user, field="user")
    if not command.command.strip():
        raise InvalidArgumentError("cannot run an empty command", field="command")
    if len(command.command.encode()) > _COMMAND_MAX:
        raise InvalidArgumentError(
            "cannot run a command of over 128 KiB: write it to a file and run that",
            field="command",
        )
    if command.timeout not in _TIMEOUT_MS:
        raise InvalidArgumentError(
            "cannot use timeout: it must be 1 to 3600000 milliseconds", field="timeout"
        )
    if not command.cwd.startswith("/") or len(command.cwd) > _PATH_MAX:
        raise InvalidArgumentError("cannot use cwd: it must start with /", field="cwd")
    if not 1 <= len(command.user) <= 64:
        raise InvalidArgumentError("cannot use user: it is a name or a number", field="user")
    if command.stdin is not None:
        try:
            command.stdin.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgumentError(
                "cannot use stdin: it is not valid Unicode", field="stdin"
            ) from error
    checked_env(command.env)
