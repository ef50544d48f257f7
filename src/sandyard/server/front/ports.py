"""What all faces do that pass requests on to ports of sandboxes.

Who may enter, and what a refusal looks like, is each face's own.
"""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress

from starlette.types import Receive, Scope, Send

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.errors import UnavailableError
from sandyard.server.core.ids import new_request_id
from sandyard.server.front.answer import TUNNEL, ProxyAnswer
from sandyard.server.front.exchange import GoneError
from sandyard.server.front.face import EdgeServices
from sandyard.server.front.proxy import Dialing, Passage, pass_on, tunnel
from sandyard.server.tasks import concurrently

_CHECK_S = 30.0
Check = Callable[[], Awaitable[object]]


@asynccontextmanager
async def answering(
    edge: EdgeServices, scope: Scope, send: Send, *, face: str, route: str
) -> AsyncIterator[ProxyAnswer]:
    """Give a request its id and an answer, and record how it ended, also if the client leaves."""
    scope.setdefault("state", {})["request_id"] = request_id = new_request_id()
    edge.bind(request_id)
    began, answer = time.perf_counter(), ProxyAnswer(scope, send)
    try:
        with suppress(GoneError):
            yield answer
    finally:
        edge.observe(
            face=face,
            method="TUNNEL" if scope["type"] == TUNNEL else scope.get("method", "WEBSOCKET"),
            route=route,
            status=answer.status,
            seconds=time.perf_counter() - began,
        )


async def to_port(
    scope: Scope,
    receive: Receive,
    passage: Passage,
    dialing: Dialing,
    answer: ProxyAnswer,
    clock: Clock,
    *,
    check: Check,
) -> None:
    """Pass a request or tunnel on, and authorize its client again every 30 s with `check`.

    Raises: see `pass_on`; what `check` raises, except that a database may be away.
    """

    async def watch() -> None:
        while True:
            await clock.sleep(_CHECK_S)
            with suppress(UnavailableError):
                await check()

    async with concurrently(watch()):
        if scope["type"] == TUNNEL:
            await tunnel(scope, passage, dialing, answer, clock)
        else:
            await pass_on(scope, receive, passage, dialing, answer, clock)
