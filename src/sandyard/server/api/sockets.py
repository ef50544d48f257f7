"""WebSockets: authorized and refused like other requests, and closed when their credential becomes
invalid."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager, suppress
from typing import Protocol

from fastapi import WebSocket, WebSocketDisconnect
from starlette.websockets import WebSocketState

from sandyard.server.api import events
from sandyard.server.api.access import actor_of
from sandyard.server.api.errors import answer_error, error_out
from sandyard.server.api.events import Check
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.errors import (
    ConflictError,
    InvalidTokenError,
    PermissionDeniedError,
    SandyardError,
    TokenExpiredError,
    UnauthenticatedError,
)
from sandyard.server.service.actor import Actor
from sandyard.server.tasks import Pacer

_REASON_MAX = 123
_POLICY, _BROKEN = 1008, 1011  # RFC 6455, 7.4.1
_KNOWN_NO_MORE = (
    InvalidTokenError, TokenExpiredError, UnauthenticatedError, PermissionDeniedError,
)  # fmt: skip


_INPUT_WAITING_MAX = 1024 * 1024
_MESSAGES_A_SECOND, _BURST, _TURN = 2_000, 2_000, 50


class Sink(Protocol):
    """What takes input, as fast as it likes. See service.sandboxes.processes.Following."""

    async def write(self, data: bytes) -> None:
        """Take some."""
        ...

    async def close_input(self) -> None:
        """Take no more."""
        ...


class Inflow:
    """A bounded queue of a process's input, so that a process that does not read blocks no other
    messages. `tell` is called with the number of bytes that were written."""

    def __init__(self, sink: Sink, tell: Callable[[int], None] | None = None) -> None:
        self._sink = sink
        self._tell = tell
        self._queue: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._waiting = 0
        self._has_ended = False
        self._has_room = asyncio.Event()

    async def take(self, data: bytes) -> None:
        """Take input, once there is room for it.

        Raises:
            ConflictError: it was ended.
        """
        while self._waiting > _INPUT_WAITING_MAX:
            self._has_room.clear()
            await self._has_room.wait()
        if self._has_ended:
            raise ConflictError("cannot write to the process: its input was ended")
        if data:
            self._waiting += len(data)
            self._queue.put_nowait(data)

    def end(self) -> None:
        """Close the input after everything that is queued."""
        if not self._has_ended:
            self._has_ended = True
            self._queue.put_nowait(None)

    async def pass_on(self) -> None:
        """Write the queued input to the process; never returns."""
        while True:
            data = await self._queue.get()
            if data is None:
                await self._sink.close_input()
                continue
            await self._sink.write(data)
            self._waiting -= len(data)
            self._has_room.set()
            if self._tell is not None:
                self._tell(len(data))


async def messages_of(socket: WebSocket) -> AsyncIterator[bytes | str]:
    """Yield what a client sends, at a bounded pace.

    Raises:
        WebSocketDisconnect: the socket is closed.
    """
    pacer = Pacer(_clock_of(socket), per_second=_MESSAGES_A_SECOND, burst=_BURST, turn=_TURN)
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            raise WebSocketDisconnect(message.get("code", 1006))
        await pacer.step()
        data: bytes | None = message.get("bytes")
        yield data if data is not None else message.get("text") or ""


@asynccontextmanager
async def served(socket: WebSocket) -> AsyncIterator[Actor]:
    """Serve the actor behind a socket's credential, if it holds the scope that the route declares.

    An error in the block is sent as an HTTP answer until the socket is accepted, then as a last
    message `error`. The block ends when the client disconnects.
    """
    try:
        actor = actor_of(socket)
        actor.require(socket.scope["endpoint"].scope_name)
        yield actor
    except SandyardError as error:
        with suppress(WebSocketDisconnect, RuntimeError):
            if socket.application_state is WebSocketState.CONNECTING:
                await socket.send_denial_response(answer_error(socket, error))
            else:
                await send_json(socket, {"type": "error", **error_out(error)})
                is_nobody = isinstance(error, _KNOWN_NO_MORE)
                await socket.close(_POLICY if is_nobody else _BROKEN, reason=_reason_of(error))
    except WebSocketDisconnect:
        pass


def _reason_of(error: SandyardError) -> str:
    """Return what a close frame has room for (RFC 6455, 5.5)."""
    return error.message.encode()[:_REASON_MAX].decode(errors="ignore")


async def send_json(socket: WebSocket, message: Mapping[str, object]) -> None:
    """Send a message."""
    await socket.send_text(json.dumps(message, separators=(",", ":")))


async def watched(
    socket: WebSocket, check: Check, beat: Callable[[], Awaitable[None]] | None = None
) -> None:
    """Re-authorize a socket's client every BEAT_S seconds; never returns.

    A message `alive`, or another `beat`, lets the kernel notice a client that is gone while nothing
    else is sent.

    Raises:
        SandyardError: the client is no longer authorized.
        WebSocketDisconnect: the client is gone.
    """
    clock = _clock_of(socket)
    while True:
        await clock.sleep(events.BEAT_S)
        await check()
        await (beat() if beat is not None else send_json(socket, {"type": "alive"}))


def _clock_of(socket: WebSocket) -> Clock:
    clock: Clock = socket.app.state.services.clock
    return clock
