"""Answers that take a while: they are sent as they come, and end with their client."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from sandyard.server.core.errors import ConflictError
from sandyard.server.front.exchange import GoneError, until_gone
from sandyard.server.tasks import concurrently

TAMED = {
    "Content-Security-Policy": "sandbox; default-src 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
"""Headers with which what a guest wrote is never a page of this server's."""


class HeldStream(StreamingResponse):
    """Sends pieces as they come, and gives back what `held` holds however it ends."""

    def __init__(
        self,
        pieces: AsyncIterator[bytes],
        held: AsyncExitStack,
        *,
        media_type: str,
        headers: Mapping[str, str],
        status_code: int = 200,
    ) -> None:
        self._held = held
        super().__init__(
            pieces, media_type=media_type, headers=dict(headers), status_code=status_code
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        async with self._held:
            await super().__call__(scope, receive, send)


@asynccontextmanager
async def while_connected(request: Request) -> AsyncIterator[None]:
    """Cancel the block if the client disconnects. The body must have been read.

    Raises:
        ConflictError: the client has disconnected.
    """
    try:
        async with concurrently(until_gone(request.receive)):
            yield
    except GoneError as error:
        raise ConflictError("the client disconnected before the request was done") from error
