"""WebSockets: let in like requests, told what is wrong like them, closed with their credential."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, suppress

from fastapi import WebSocket, WebSocketDisconnect
from starlette.websockets import WebSocketState

from sandyard.server.api import events
from sandyard.server.api.errors import answer_error, error_out
from sandyard.server.api.events import Check
from sandyard.server.core.errors import (
    InvalidTokenError,
    PermissionDeniedError,
    SandyardError,
    TokenExpiredError,
    UnauthenticatedError,
)
from sandyard.server.service.actor import Actor

_POLICY, _BROKEN = 1008, 1011  # RFC 6455, 7.4.1
_KNOWN_NO_MORE = (
    InvalidTokenError, TokenExpiredError, UnauthenticatedError, PermissionDeniedError,
)  # fmt: skip


@asynccontextmanager
async def served(socket: WebSocket, scope: str) -> AsyncIterator[Actor]:
    """Serve whoever the edge found behind a socket's credential, if they hold a scope.

    What goes wrong in the block is told: as an answer of HTTP until the socket is accepted, from
    then on as a last message `error`. A client that goes away ends the block.
    """
    try:
        actor: Actor = socket.state.actor
        actor.require(scope)
        yield actor
    except SandyardError as error:
        with suppress(WebSocketDisconnect, RuntimeError):
            if socket.application_state is WebSocketState.CONNECTING:
                await socket.send_denial_response(answer_error(socket, error))
            else:
                await send_json(socket, {"type": "error", **error_out(error)})
                is_nobody = isinstance(error, _KNOWN_NO_MORE)
                await socket.close(_POLICY if is_nobody else _BROKEN)
    except WebSocketDisconnect:
        pass


async def send_json(socket: WebSocket, message: Mapping[str, object]) -> None:
    """Send a message."""
    await socket.send_text(json.dumps(message, separators=(",", ":")))


async def watched(socket: WebSocket, check: Check) -> None:
    """Look again and again whether whoever opened a socket may still have it, and is still there:
    a message `alive` is for the kernel to find out, also while nothing is read.

    Raises:
        SandyardError: they may not any more.
        WebSocketDisconnect: they are gone.
    """
    while True:
        await asyncio.sleep(events.BEAT_S)
        await check()
        await send_json(socket, {"type": "alive"})
