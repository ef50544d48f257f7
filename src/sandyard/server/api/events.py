"""Server-sent events (HTML, section 9.2): a stream that a broken connection can go on from.

While nothing happens a comment is sent now and then, which keeps proxies from closing it; and the
credential that opened it is looked at again, so that a stream ends with it.
"""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass
from typing import Any

from fastapi import Depends
from starlette.requests import HTTPConnection

from sandyard.server.api.errors import error_out
from sandyard.server.api.streams import HeldStream
from sandyard.server.core.errors import PermissionDeniedError, SandyardError
from sandyard.server.service.actor import Actor
from sandyard.server.service.people.credentials import Credential, Credentials
from sandyard.server.tasks import beside

BEAT_S = 15.0
Check = Callable[[], Awaitable[object]]


@dataclass(frozen=True)
class Event:
    """One event; with an `id`, a client that comes again says from where."""

    name: str
    data: object
    id: int | None = None

    def encoded(self) -> bytes:
        """Return its bytes."""
        head = "" if self.id is None else f"id: {self.id}\n"
        # ASCII: some take U+2028 for a line's end.
        said = json.dumps(self.data, separators=(",", ":"))
        return f"{head}event: {self.name}\ndata: {said}\n\n".encode()


class EventStream(HeldStream):
    """Sends events as they come, and gives back what `held` holds however it ends.

    What goes wrong in the middle is an event `error`, the last. `check` raises when whoever listens
    may not any more.
    """

    def __init__(
        self,
        events: AsyncIterator[Event],
        held: AsyncExitStack,
        check: Check,
    ) -> None:
        super().__init__(
            _encoded(events, check),
            held,
            media_type="text/event-stream",
            headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"},
        )


async def _encoded(events: AsyncIterator[Event], check: Check) -> AsyncIterator[bytes]:
    yield b": a stream of events\n\n"
    try:
        async for event in _with_beats(events, check):
            yield b": alive\n\n" if event is None else event.encoded()
    except SandyardError as error:
        yield Event("error", error_out(error)).encoded()


async def _with_beats(events: AsyncIterator[Event], check: Check) -> AsyncIterator[Event | None]:
    """Yield what comes, None where nothing came for a while, and check now and then."""
    clock = asyncio.get_running_loop().time
    checked_at = clock()
    found: asyncio.Queue[Event | BaseException | None] = asyncio.Queue(1)
    async with beside(_hand_over(events, found)):
        while True:
            event: Event | BaseException | None = _NOTHING_YET
            with suppress(TimeoutError):
                async with asyncio.timeout(BEAT_S):
                    event = await found.get()
            if event is None:
                return
            if isinstance(event, BaseException):
                raise event
            if clock() - checked_at >= BEAT_S:
                await check()
                checked_at = clock()
            yield None if event is _NOTHING_YET else event


async def _hand_over(
    events: AsyncIterator[Event], found: "asyncio.Queue[Event | BaseException | None]"
) -> None:
    # An error goes the same way: raised here it would cancel whoever is sending just then.
    try:
        async for event in events:
            await found.put(event)
    except Exception as error:  # noqa: BLE001 - it is raised where events are taken
        await found.put(error)
    else:
        await found.put(None)


_NOTHING_YET = Event("", None)


def rechecked(scope: str) -> Any:
    """Return the dependency on what raises once whoever asked may not any more what they did."""

    async def provide(connection: HTTPConnection) -> Check:
        actor: Actor = connection.state.actor
        credential: Credential = connection.state.credential
        credentials: Credentials = connection.scope["app"].state.services.credentials

        async def check() -> None:
            now = (await credentials.verify(credential)).actor
            now.require(scope)
            if actor.sees_all and not now.sees_all:
                raise PermissionDeniedError("cannot go on: the credential may do less than before")

        return check

    return Depends(provide)
