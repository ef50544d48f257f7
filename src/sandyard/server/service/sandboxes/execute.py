"""Runs a command in a sandbox and collects its output."""

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from sandyard.server.core import ops
from sandyard.server.core.collect import Collector
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.errors import (
    AgentError,
    ConflictError,
    DeadlineExceededError,
    InvalidArgumentError,
    UnavailableError,
)
from sandyard.server.core.ids import checked_text
from sandyard.server.core.limits import Allotment
from sandyard.server.core.wire import FRAME_MAX, Channel, WireError, encode_frame
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.fields import checked_env, cwd_of, user_of
from sandyard.server.service.sandboxes.reach import GuestStream, Reach, Reached, make_folder
from sandyard.server.service.sandboxes.uses import Use
from sandyard.server.tasks import concurrently

OUTPUT_MAX = 16 * 1024 * 1024
COMMAND_MAX = 2 * 1024 * 1024
"""A file of 1 MiB in base64, and what writes it."""
STDIN_MAX = 16 * 1024 * 1024
_TIMEOUT_MS = range(1, 3_600_001)
_READ = 32 * 1024
_GRACE_S = 20.0
_USE = Use("exec", "Command run", "run a command in")
_ROOM_BYTES = 256 * 1024 * 1024
_OWN_BYTES = 64 * 1024
_ROOM_WAIT_S = 10.0
_FRAMES_A_TURN = 500


@dataclass(frozen=True)
class Command:
    """A command. `timeout` is in milliseconds from its start in the sandbox; None for `cwd` and
    `user` means the template's."""

    command: str
    timeout: int
    cwd: str | None
    env: Mapping[str, str]
    stdin: bytes | None
    user: str | None
    makes_cwd: bool = False


@dataclass(frozen=True)
class CommandOutcome:
    """The result of a command. Call `release` once its output has been sent."""

    stdout: bytes = field(repr=False)
    stderr: bytes = field(repr=False)
    exit_code: int
    duration_ms: int
    timed_out: bool
    truncated: bool
    signal: str | None
    release: Callable[[], None]


class OutputMemory:
    """The memory for output on its way to clients.

    A command with much output waits for memory, and its program with it; after a while its output
    is truncated. One organization gets half at most, so it cannot starve the others.
    """

    def __init__(self, clock: Clock, size: int = _ROOM_BYTES) -> None:
        self._clock = clock
        self._shares = Allotment(each=size // 2, total=size)
        self._size = size
        self._freed = asyncio.Event()

    @property
    def free(self) -> int:
        """How many bytes are left for all."""
        return self._size - self._shares.held

    async def take(self, size: int, org_id: str) -> bool:
        """Take memory for an organization and return True; return False after waiting in vain."""
        try:
            async with self._clock.timeout(_ROOM_WAIT_S):
                while not self._shares.take(org_id, size):
                    self._freed.clear()
                    await self._freed.wait()
        except TimeoutError:
            return False
        return True

    def give_back(self, size: int, org_id: str) -> None:
        """Give back what was taken."""
        self._shares.give_back(org_id, size)
        self._freed.set()


class _Share:
    """The memory of one command's output. A small amount is always available."""

    def __init__(self, room: OutputMemory, org_id: str) -> None:
        self._room = room
        self._org_id = org_id
        self._own = _OWN_BYTES
        self._taken = 0

    async def take(self, size: int) -> bool:
        own = min(size, self._own)
        self._own -= own
        if size > own:
            if not await self._room.take(size - own, self._org_id):
                return False
            self._taken += size - own
        return True

    def release(self) -> None:
        self._room.give_back(self._taken, self._org_id)
        self._taken = 0


class Commands:
    """Runs commands."""

    def __init__(self, reach: Reach, clock: Clock, room: OutputMemory | None = None) -> None:
        self._reach = reach
        self._clock = clock
        self.room = room or OutputMemory(clock)

    async def execute(self, actor: Actor, reference: str, command: Command) -> CommandOutcome:
        """Run a command and return when it has ended. At its time limit it is killed.

        Raises:
            InvalidArgumentError: a value is invalid; `facts` name the field.
            ConflictError: the sandbox was paused or ended during the command.
            UnavailableError: the agent stopped answering.
            For the rest see `Reach.open`.
        """
        _check(command)
        cwd = cwd_of(command.cwd)
        wish = ops.Execute(
            command=command.command,
            timeout_ms=command.timeout,
            cwd=cwd,
            env=command.env,
            user=user_of(command.user),
            stdin=command.stdin is not None,
        )
        # Not the command itself: people put secrets into commands, and the feed is kept forever.
        attributes: dict[str, object] = {"timeoutMs": command.timeout}
        attributes |= {"user": command.user} if command.user else {}
        attributes |= {"cwd": cwd} if cwd else {}
        use = replace(_USE, attributes=attributes)
        share = _Share(self.room, actor.org_id)
        try:
            if command.makes_cwd and cwd:
                await make_folder(self._reach, actor, reference, cwd, command.user or "root", use)
            async with self._reach.open(actor, reference, wish, use) as reached:
                return await self._finish(reached, command, share)
        except BaseException:
            share.release()
            raise

    async def _finish(
        self, reached: Reached[ops.Started], command: Command, share: _Share
    ) -> CommandOutcome:
        sandbox_id = reached.sandbox.id
        try:
            # The guest enforces the limit; this one only guards against a guest that does not.
            async with self._clock.timeout(command.timeout / 1000 + _GRACE_S):
                if command.stdin is None:
                    return await self._collect(reached.stream, share)
                async with concurrently(_feed(reached.stream, command.stdin)):
                    return await self._collect(reached.stream, share)
        except TimeoutError as error:
            raise DeadlineExceededError(
                f"cannot tell how the command ended: the agent of {sandbox_id} does not answer"
            ) from error
        except ConflictError as error:
            raise ConflictError(
                f"cannot finish the command in {sandbox_id}: {error.message}", **error.facts
            ) from error
        except WireError as error:
            raise AgentError from error

    async def _collect(self, stream: GuestStream, share: _Share) -> CommandOutcome:
        collector = Collector(OUTPUT_MAX)
        kept = 0
        while True:
            if not collector.is_behind:
                data = await stream.read(_READ)
                if not data:
                    raise UnavailableError(
                        "the agent closed the connection before it reported how the command ended"
                    )
            before = collector.frames
            end = collector.feed(b"" if collector.is_behind else data, most=_FRAMES_A_TURN)
            if end is not None:
                return CommandOutcome(
                    stdout=collector.stdout,
                    stderr=collector.stderr,
                    exit_code=end.exit_code,
                    duration_ms=end.duration_ms,
                    timed_out=end.timed_out,
                    truncated=collector.is_truncated,
                    signal=end.signal,
                    release=share.release,
                )
            if not await share.take(collector.size - kept):
                collector.keep_no_more()
            kept = collector.size
            await stream.spend(collector.frames - before)


async def _feed(stream: ByteStream, data: bytes) -> None:
    try:
        for start in range(0, len(data), FRAME_MAX):
            await stream.write(encode_frame(Channel.STDIN, data[start : start + FRAME_MAX]))
        await stream.write(encode_frame(Channel.STDIN, b""))
    except (UnavailableError, ConflictError):
        pass  # the reader gets the error


def _check(command: Command) -> None:
    """Refuse a command that no sandbox could run."""
    checked_text(command.command, field="command")
    user_of(command.user)
    if not command.command.strip():
        raise InvalidArgumentError("cannot run an empty command", field="command")
    if len(command.command.encode()) > COMMAND_MAX:
        raise InvalidArgumentError(
            "cannot run a command of over 2 MiB: pass data as stdin",
            field="command",
            reason="too_large",
        )
    if command.timeout not in _TIMEOUT_MS:
        raise InvalidArgumentError(
            "cannot use timeout: it must be 1 to 3600000 milliseconds", field="timeout"
        )
    if command.stdin is not None and len(command.stdin) > STDIN_MAX:
        raise InvalidArgumentError(
            "cannot take over 16 MiB of stdin", field="stdin", reason="too_large"
        )
    checked_env(command.env)
