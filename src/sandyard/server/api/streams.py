"""Answers that are sent as they come, and hold something open meanwhile."""

from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack

from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

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
