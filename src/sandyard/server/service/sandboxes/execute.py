"""Runs a command in a sandbox and collects what it says."""

import asyncio
import base64
import json
from collections.abc import Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass

from sandyard.server.core.contracts.node import ByteStream, NodeTunnel
from sandyard.server.core.errors import (
    ConflictError,
    DeadlineExceededError,
    InternalError,
    UnavailableError,
)
from sandyard.server.core.records import Sandbox
from sandyard.server.core.wire import FRAME_MAX, Channel, Decoder, Op, WireError, encode_frame
from sandyard.server.tasks import beside

OUTPUT_MAX = 16 * 1024 * 1024
_READ = 128 * 1024
_GRACE_S = 20.0
_DURATION_MAX_MS = 10**10


@dataclass(frozen=True)
class Command:
    """What to run, and how. `timeout_ms` counts from its start in the sandbox."""

    command: str
    timeout_ms: int
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


class NotBegunError(ConflictError):
    """The machine was not there any more when the command was to start; nothing was started."""


async def execute(tunnel: NodeTunnel, sandbox: Sandbox, command: Command) -> Outcome:
    """Run a command and return once it has ended, or its time is over and it was ended.

    Raises:
        NotBegunError: the machine does not run any more.
        ConflictError: it ended, or was paused, while the command ran.
        InvalidArgumentError: the agent could not start it; the message says why.
        UnavailableError: the agent does not answer, or stopped answering.
    """
    args: dict[str, object] = {
        "command": command.command,
        "timeoutMs": command.timeout_ms,
        "cwd": command.cwd,
        "env": dict(command.env),
        "user": command.user,
        "stdin": command.stdin is not None,
    }
    try:
        # The limit is kept in the guest; this one only guards against a guest that keeps none.
        async with asyncio.timeout(command.timeout_ms / 1000 + _GRACE_S), AsyncExitStack() as held:
            opening = tunnel.open(
                sandbox.id, incarnation=sandbox.incarnation, op=Op.EXEC, args=args
            )
            try:
                opened = await held.enter_async_context(opening)
            except ConflictError as error:
                raise NotBegunError(error.message, **error.facts) from error
            if command.stdin is None:
                return await _collect(opened.stream, command.encoding)
            async with beside(_feed(opened.stream, command.stdin.encode())):
                return await _collect(opened.stream, command.encoding)
    except TimeoutError as error:
        raise DeadlineExceededError(
            f"cannot tell how the command ended: the agent of {sandbox.id} does not answer"
        ) from error
    except NotBegunError:
        raise
    except ConflictError as error:
        raise ConflictError(
            f"cannot finish the command in {sandbox.id}: {error.message}", **error.facts
        ) from error
    except WireError as error:
        raise InternalError(f"cannot understand the agent of {sandbox.id}") from error


async def _feed(stream: ByteStream, data: bytes) -> None:
    try:
        for start in range(0, len(data), FRAME_MAX):
            await stream.write(encode_frame(Channel.STDIN, data[start : start + FRAME_MAX]))
        await stream.write(encode_frame(Channel.STDIN, b""))
    except (UnavailableError, ConflictError):
        pass  # the reading side tells what happened


async def _collect(stream: ByteStream, encoding: str) -> Outcome:
    decoder = Decoder()
    output = {Channel.STDOUT: bytearray(), Channel.STDERR: bytearray()}
    truncated = False
    while True:
        frame = decoder.take_frame()
        if frame is None:
            data = await stream.read(_READ)
            if not data:
                raise UnavailableError("the agent broke off before it said how the command ended")
            decoder.feed(data)
        elif frame.channel is Channel.EXIT:
            return _outcome(frame.payload, output, encoding, truncated=truncated)
        elif frame.channel in output:
            room = OUTPUT_MAX - len(output[frame.channel])
            output[frame.channel] += frame.payload[:room]
            truncated = truncated or len(frame.payload) > room


def _outcome(
    payload: bytes, output: dict[Channel, bytearray], encoding: str, *, truncated: bool
) -> Outcome:
    try:
        end = json.loads(payload)
        signal = end["signal"]
        return Outcome(
            stdout=_printed(output[Channel.STDOUT], encoding),
            stderr=_printed(output[Channel.STDERR], encoding),
            exit_code=max(0, min(255, int(end["exitCode"]))),
            duration_ms=max(0, min(_DURATION_MAX_MS, int(end["durationMs"]))),
            timed_out=bool(end["timedOut"]),
            truncated=truncated,
            signal=None if signal is None else _clean(str(signal)[:32]),
        )
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError) as error:
        raise WireError("the end of a command is not told as agreed") from error


def _clean(text: str) -> str:
    """Return text of a guest without what JSON cannot carry."""
    return text.encode("utf-8", "replace").decode()


def _printed(data: bytearray, encoding: str) -> str:
    if encoding == "base64":
        return base64.b64encode(data).decode()
    return data.decode(errors="replace")
