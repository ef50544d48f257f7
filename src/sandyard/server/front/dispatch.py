"""Dispatch: which face serves a request, by its host and path, asked for each request."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sandyard.server.core.ids import new_request_id

Matcher = Callable[[Scope], bool]


@dataclass(frozen=True)
class FaceEntry:
    """A face in the table. With `takes_tunnels` it gets requests for another protocol as raw
    connections (see `engine.Tunnel`)."""

    matches: Matcher
    app: ASGIApp
    takes_tunnels: bool = False


class Dispatch:
    """Passes each request to the first entry that matches it; a host without one gets 421."""

    def __init__(self, entries: Sequence[FaceEntry]) -> None:
        self._entries = entries

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request, WebSocket or tunnel."""
        entry = self._entry(scope)
        await (_misdirected if entry is None else entry.app)(scope, receive, send)

    def is_tunnel(self, scope: Scope) -> bool:
        """Tell whether a request for another protocol is passed on as a raw connection."""
        entry = self._entry(scope)
        return entry is not None and entry.takes_tunnels

    def _entry(self, scope: Scope) -> FaceEntry | None:
        return next((one for one in self._entries if one.matches(scope)), None)


async def _misdirected(scope: Scope, receive: Receive, send: Send) -> None:
    """Refuse a request for a host that no face owns (RFC 9110, 15.5.20)."""
    request_id = new_request_id()
    error = {
        "code": "misdirected_request",
        "message": "cannot serve this host name: no API of this server has it; check the URL, or "
        "add the name to http.hosts",
        "requestId": request_id,
    }
    answer = Response(
        json.dumps({"error": error}),
        status_code=421,
        headers={"X-Request-Id": request_id},
        media_type="application/json",
    )
    await answer(scope, receive, send)
