"""Server-sent events (HTML, section 9.2): a stream that a broken connection can go on from.

While nothing happens a comment is sent now and then, which keeps proxies from closing it; and the
credential that opened it is looked at again, so that a stream ends with it.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from fastapi import Depends
from starlette.requests import HTTPConnection

from sandyard.server.api.errors import error_out
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.errors import PermissionDeniedError, SandyardError
from sandyard.server.front.streams import HeldStream, with_beats
from sandyard.server.service.actor import Actor
from sandyard.server.service.people.credentials import Credential, Credentials

BEAT_S = 15.0
Check = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class SseEvent:
    """One event; with an `id`, a client that comes again says from where."""

    name: str
    data: object
    id: int | None = None

    def encoded(self) -> bytes:
        """Return its bytes."""
        head = "" if self.id is None else f"id: {self.id}\n"
        # ASCII: some take U+2028 for a line's end.
        data = json.dumps(self.data, separators=(",", ":"))
        return f"{head}event: {self.name}\ndata: {data}\n\n".encode()


class EventStream(HeldStream):
    """Sends events as they come, and gives back what `held` holds however it ends.

    An error is sent as the event `error`, the last one. `check` raises once the client is no longer
    authorized.
    """

    def __init__(
        self,
        events: AsyncIterator[SseEvent],
        held: AsyncExitStack,
        check: "Recheck",
    ) -> None:
        super().__init__(
            _encoded(events, check),
            held,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )


async def _encoded(events: AsyncIterator[SseEvent], check: "Recheck") -> AsyncIterator[bytes]:
    yield b": a stream of events\n\n"
    try:
        async for event in _with_beats(events, check):
            yield b": alive\n\n" if event is None else event.encoded()
    except SandyardError as error:
        yield SseEvent("error", error_out(error)).encoded()


async def _with_beats(
    events: AsyncIterator[SseEvent], check: "Recheck"
) -> AsyncIterator[SseEvent | None]:
    """Yield events, and None after BEAT_S without one; re-authorize every BEAT_S."""
    clock = check.clock
    checked_at = clock.monotonic()
    async for event in with_beats(events, clock, BEAT_S):
        if clock.monotonic() - checked_at >= BEAT_S:
            await check()
            checked_at = clock.monotonic()
        yield event


@dataclass(frozen=True)
class Recheck:
    """Re-authorizes the client of a stream."""

    credential: Credential
    actor: Actor
    scope: str
    credentials: Credentials
    clock: Clock

    async def __call__(self) -> None:
        """Return if the client may still do what it could at first.

        Raises:
            SandyardError: it may not.
        """
        now = (await self.credentials.verify(self.credential)).actor
        now.require(self.scope)
        if self.actor.sees_all and not now.sees_all:
            raise PermissionDeniedError("cannot continue: the credential may do less than before")


def rechecked(scope: str) -> Any:
    """Return the dependency on what re-authorizes the client of a stream."""

    async def provide(connection: HTTPConnection) -> Recheck:
        state, services = connection.state, connection.scope["app"].state.services
        return Recheck(state.credential, state.actor, scope, services.credentials, services.clock)

    return Depends(provide)
