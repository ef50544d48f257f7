"""Answers that take a while: they are sent as they come, and end with their client."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send
from typing_extensions import override

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.errors import ConflictError
from sandyard.server.front.exchange import GoneError, until_gone
from sandyard.server.tasks import concurrently

T = TypeVar("T")
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

    @override
    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer."""
        async with self._held:
            await super().__call__(scope, receive, send)


async def with_beats(
    events: AsyncIterator[T], clock: Clock, beat_s: float
) -> AsyncIterator[T | None]:
    """Yield events, and None after each `beat_s` seconds without one."""
    found: asyncio.Queue[tuple[T | None, Exception | None, bool]] = asyncio.Queue(1)
    async with concurrently(_hand_over(events, found)):
        while True:
            try:
                async with clock.timeout(beat_s):
                    event, error, is_last = await found.get()
            except TimeoutError:
                yield None
                continue
            if error is not None:
                raise error
            if is_last:
                return
            yield event


async def _hand_over(
    events: AsyncIterator[T], found: "asyncio.Queue[tuple[T | None, Exception | None, bool]]"
) -> None:
    # An error takes the same way: raised here, it would cancel the task that is sending.
    try:
        async for event in events:
            await found.put((event, None, False))
    except Exception as error:  # noqa: BLE001 - it is raised where events are taken
        await found.put((None, error, False))
    else:
        await found.put((None, None, True))


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
