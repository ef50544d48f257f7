"""The service `process.Process`."""

import shlex
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

from sandyard.server.core import ops
from sandyard.server.core.connect import Code, ConnectError, Fields, encode_data
from sandyard.server.core.errors import ConflictError
from sandyard.server.core.ops import Program, Size
from sandyard.server.core.wire import Refusal
from sandyard.server.e2b.envd.box import Box
from sandyard.server.e2b.envd.calls import (
    Call,
    Message,
    Route,
    deadline_exceeded,
    fed,
    streamed,
    unary,
    until_deadline,
)
from sandyard.server.e2b.errors import message_of
from sandyard.server.service.sandboxes.processes import (
    INPUT_MAX,
    TAG_MAX,
    Following,
    NewProcess,
    Output,
    Which,
)

_PIECE = 32 * 1024
_ALIVE: Final[Message] = {"event": {"keepalive": {}}}
_GRACE_MS = 20_000
_SIGNALS: Final[Mapping[str, int]] = {
    "SIGNAL_UNSPECIFIED": 0,
    "SIGNAL_SIGTERM": 15,
    "SIGNAL_SIGKILL": 9,
}
_FIELDS: Final = {"stdout": "stdout", "stderr": "stderr", "terminal": "pty"}


@asynccontextmanager
async def _start(call: Call) -> AsyncIterator[AsyncIterator[Message]]:
    """Start a process, and follow it. It goes on if its client disconnects."""
    message, box = call.message, call.box
    config = message.message("process")
    if config is None or not config.text("cmd"):
        raise ConnectError(Code.INVALID_ARGUMENT, "process.cmd is missing")
    terminal = _size_of(message)
    wish = NewProcess(
        command=None,
        argv=(config.text("cmd"), *config.texts("args")),
        cwd=config.text("cwd") or box.workdir,
        env={**box.env, **config.mapping("envs")},
        user=box.user,
        tag=message.text("tag") or None,
        stdin=terminal is None and message.flag("stdin", default=True),
        terminal=terminal,
        timeout=call.timeout_ms,
        is_from_home=True,
    )
    async with box.services.processes.begin(box.actor, box.id, wish) as following:
        limit_ms = None if call.timeout_ms is None else call.timeout_ms + _GRACE_MS
        yield until_deadline(_events(following), box.services.clock, limit_ms)


@asynccontextmanager
async def _connect(call: Call) -> AsyncIterator[AsyncIterator[Message]]:
    """Follow a process from now on; of one that has ended, tell its end."""
    box, which = call.box, _which(call.message)
    async with box.services.processes.follow(box.actor, box.id, which, None) as following:
        yield until_deadline(_events(following), box.services.clock, call.timeout_ms)


async def _events(following: Following) -> AsyncIterator[Message]:
    yield {"event": {"start": {"pid": following.pid}}}
    async for one in following.events():
        if isinstance(one, ops.Ended):
            if one.timed_out:
                raise deadline_exceeded()
            yield {"event": {"end": _end_of(one)}}
            return
        for data in _pieces(one):
            yield {"event": {"data": {_FIELDS[one.stream]: encode_data(data)}}}


def _pieces(output: Output) -> list[bytes]:
    data = output.data
    return [data[at : at + _PIECE] for at in range(0, len(data), _PIECE)]


def _end_of(end: ops.Ended) -> Message:
    if end.signal is None:
        status = f"exit status {end.exit_code}"
        outcome = {"exitCode": end.exit_code, "exited": True, "status": status}
        return outcome if end.exit_code == 0 else {**outcome, "error": status}
    status = f"signal: {_SAID.get(end.signal, end.signal.lower())}"
    return {"exitCode": -1, "exited": False, "status": status, "error": status}


_SAID: Final = {
    "SIGKILL": "killed", "SIGTERM": "terminated", "SIGINT": "interrupt", "SIGHUP": "hangup",
    "SIGQUIT": "quit", "SIGABRT": "aborted", "SIGSEGV": "segmentation fault",
    "SIGPIPE": "broken pipe", "SIGALRM": "alarm clock",
}  # fmt: skip
"""What clients expect to read of a signal."""


async def _list(box: Box, message: Fields) -> Message:
    """List the processes that run."""
    del message
    found = await box.services.processes.list(box.actor, box.id)
    return {"processes": [_process_of(one) for one in found.items if one.end is None]}


def _process_of(program: Program) -> Message:
    try:
        words = shlex.split(program.command)
    except ValueError:  # cut off within quotes
        words = [program.command]
    command, *arguments = words or [""]
    config = {"cmd": command, "args": arguments, "envs": {}, "cwd": program.cwd}
    found: dict[str, object] = {"config": config, "pid": program.pid}
    return found if program.tag is None else {**found, "tag": program.tag}


async def _update(box: Box, message: Fields) -> Message:
    """Change the size of a terminal."""
    which, size = _which(message), _size_of(message)
    if size is not None:
        async with _there(box, which):
            await box.services.processes.resize(box.actor, box.id, which, size)
    return {}


async def _send_input(box: Box, message: Fields) -> Message:
    """Write to the input of a process."""
    await _write(box, _which(message), _input_of(message))
    return {}


async def _stream_input(box: Box, messages: AsyncIterator[Fields]) -> Message:
    """Write a stream to the input of a process; its first message says of which."""
    which: Which | None = None
    async for message in messages:
        start, data = message.message("start"), message.message("data")
        if start is not None:
            which = _which(start)
        elif data is not None:
            if which is None:
                raise ConnectError(Code.INVALID_ARGUMENT, "the stream does not begin with start")
            await _write(box, which, _input_of(data))
    return {}


async def _close_stdin(box: Box, message: Fields) -> Message:
    """Close the input of a process."""
    which = _which(message)
    async with _there(box, which):
        await box.services.processes.write(box.actor, box.id, which, b"", closes=True)
    return {}


async def _send_signal(box: Box, message: Fields) -> Message:
    """Send a signal: to a process, or to kill it, to everything that it started."""
    name = message.choice("signal", _SIGNALS, "SIGNAL_UNSPECIFIED")
    if name == "SIGNAL_UNSPECIFIED":
        raise ConnectError(Code.INVALID_ARGUMENT, "signal is missing")
    which = _which(message)
    async with _there(box, which, is_certain=True):
        await box.services.processes.signal(
            box.actor,
            box.id,
            which,
            name.removeprefix("SIGNAL_"),
            everything=name == "SIGNAL_SIGKILL",
        )
    return {}


@asynccontextmanager
async def _there(box: Box, which: Which, *, is_certain: bool = False) -> AsyncIterator[None]:
    """Use a process during the block. One that has ended is not found, as at E2B.

    If it `is_certain`, a conflict with the process can mean nothing else; otherwise the process
    may lack an input or a terminal.
    """
    try:
        yield
    except ConflictError as error:
        if error.facts.get("reason") != Refusal.CONFLICT.value:
            raise
        if not is_certain:
            found = await box.services.processes.get(box.actor, box.id, which)
            if found.end is None:
                raise
        raise ConnectError(Code.NOT_FOUND, message_of(error)) from error


async def _write(box: Box, which: Which, data: bytes) -> None:
    """Write all of it, for as long as the process reads."""
    while True:
        piece = data[:INPUT_MAX]
        async with _there(box, which):
            count, _ = await box.services.processes.write(
                box.actor, box.id, which, piece, closes=False
            )
        data = data[count:]
        if not data:
            return
        if count == 0:
            raise ConnectError(Code.RESOURCE_EXHAUSTED, "the process does not read its input")


def _input_of(message: Fields) -> bytes:
    given = message.message("input")
    if given is None:
        raise ConnectError(Code.INVALID_ARGUMENT, "input is missing")
    return given.data("pty") if "pty" in given else given.data("stdin")


def _which(message: Fields) -> Which:
    selector = message.message("process")
    if selector is None or not ("pid" in selector or "tag" in selector):
        raise ConnectError(Code.INVALID_ARGUMENT, "process names no pid and no tag")
    if "pid" in selector:
        return Which(pid=selector.integer("pid"))
    return Which(tag=selector.text("tag")[: TAG_MAX + 1])


def _size_of(message: Fields) -> Size | None:
    pty = message.message("pty")
    size = None if pty is None else pty.message("size")
    if size is None:
        return None if pty is None else Size(80, 24)
    return Size(size.integer("cols"), size.integer("rows"))


METHODS: Final[Mapping[str, Route]] = {
    "Start": streamed(_start, alive=_ALIVE),
    "Connect": streamed(_connect, alive=_ALIVE),
    "List": unary(_list),
    "Update": unary(_update),
    "SendInput": unary(_send_input),
    "StreamInput": fed(_stream_input),
    "CloseStdin": unary(_close_stdin),
    "SendSignal": unary(_send_signal),
}
