"""The other ports of sandboxes: HTTP and WebSockets to whatever listens there.

On the E2B API's domain, ports of a sandbox that was created with public ports are open to
everyone, as they are at E2B. Elsewhere, and if the sandbox was created without, a client needs the
sandbox's traffic token. The port of the code interpreter always needs it: its clients send it.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Final

import h11
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.errors import (
    GuestNotFoundError,
    RateLimitedError,
    SandyardError,
    UnauthenticatedError,
)
from sandyard.server.core.records import Sandbox
from sandyard.server.core.wire import is_guests_port
from sandyard.server.e2b.awake import awake
from sandyard.server.e2b.errors import closed, is_gone, render_envd
from sandyard.server.e2b.names import Target, target_of
from sandyard.server.front import headers as h
from sandyard.server.front.answer import ProxyAnswer
from sandyard.server.front.exchange import BrokenOffError, HungUpError
from sandyard.server.front.face import EdgeServices
from sandyard.server.front.ports import answering, to_port
from sandyard.server.front.proxy import Passage, UnsendableError
from sandyard.server.front.sessions import has_session
from sandyard.server.service.actor import Actor
from sandyard.server.service.services import Services

log = logging.getLogger(__name__)

INTERPRETER_PORT: Final = 49999
_INTERPRETER_START_S: Final = 30.0
"""How long after its start a sandbox's closed interpreter port is dialed again."""
_CLOSED_S: Final = 1.0
"""How long any closed port is dialed again."""
_RESUMED_S: Final = 15.0
"""How long after a resume."""
_DIAL_PERIOD_S: Final = 0.2
_TOKEN = b"e2b-traffic-access-token"
_OURS = frozenset(
    {_TOKEN, b"x-access-token", b"e2b-sandbox-id", b"e2b-sandbox-port", b"e2b-template-id"}
)


class _ClosedError(Exception):
    """Nothing listens at the port."""


_REFUSED = (
    SandyardError,
    _ClosedError,
    HungUpError,
    UnsendableError,
    TimeoutError,
    h11.RemoteProtocolError,
    h11.LocalProtocolError,
)


class PortApp:
    """The application for all ports but the daemon's."""

    def __init__(self, services: Services, edge: EdgeServices, domain: str | None) -> None:
        self._services = services
        self._edge = edge
        self._domain = domain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or tunnel."""
        target = target_of(scope, self._domain)
        assert target is not None
        async with answering(self._edge, scope, send, face="e2b-ports", route="port") as answer:
            try:
                await self._serve(scope, receive, target, answer)
            except _REFUSED as error:
                if answer.has_begun:
                    log.info("aborting the answer of a port: %s", error)
                    raise BrokenOffError from error
                await _refuse(scope, answer, _refusal(target, error))

    async def _serve(
        self, scope: Scope, receive: Receive, target: Target, answer: ProxyAnswer
    ) -> None:
        services = self._services
        actor, sandbox = await self._enter(scope, target)
        sandbox = await awake(services, actor, sandbox)
        if not is_guests_port(target.port):
            raise _ClosedError
        strips = await has_session(scope["headers"], self._edge.credentials)
        passage = _passage(scope, sandbox, target, strips_authorization=strips)
        await to_port(
            scope,
            receive,
            passage,
            self._dial(actor, target),
            answer,
            services.clock,
            check=partial(self._enter, scope, target),
        )

    async def _enter(self, scope: Scope, target: Target) -> tuple[Actor, Sandbox]:
        """Return the owner of a sandbox, and the sandbox, if a client may use its port.

        Raises:
            NotFoundError: there is no such sandbox.
            InvalidTokenError: its owner has left the organization.
            UnauthenticatedError, RateLimitedError: see `_check`.
        """
        actor = await self._services.tokens.owner(target.sandbox_id)
        sandbox = await self._services.sandboxes.get(
            actor, target.sandbox_id, scope="sandbox:write"
        )
        self._check(scope, sandbox, target)
        return actor, sandbox

    def _check(self, scope: Scope, sandbox: Sandbox, target: Target) -> None:
        """Return if a client may use a port.

        Raises:
            UnauthenticatedError: the client needs the sandbox's traffic token.
            RateLimitedError: it tried too many.
        """
        token = h.first(scope["headers"], _TOKEN)
        if token and self._services.tokens.is_traffic(sandbox.id, token):
            return
        is_public = sandbox.public_ports and target.host is not None
        if is_public and target.port != INTERPRETER_PORT:
            return
        if token:
            client: tuple[str, int] = scope.get("client") or ("unknown", 0)
            self._edge.rates.failed(client[0])
        raise UnauthenticatedError(
            "cannot open this port without the header e2b-traffic-access-token: send the "
            "sandbox's trafficAccessToken"
        )

    @asynccontextmanager
    async def _dial(self, actor: Actor, target: Target) -> AsyncIterator[ByteStream]:
        clock, is_open = self._services.clock, False
        until: float | None = None
        while True:
            try:
                dialing = self._services.previews.dial(actor, target.sandbox_id, target.port)
                async with dialing as there:
                    is_open = True
                    yield there
                    return
            except GuestNotFoundError as error:
                if is_open:
                    raise
                if until is None:
                    until = clock.monotonic() + await self._patience_s(actor, target)
                if clock.monotonic() >= until:
                    raise _ClosedError from error
            await clock.sleep(_DIAL_PERIOD_S)

    async def _patience_s(self, actor: Actor, target: Target) -> float:
        """Return how long a closed port is dialed again: briefly, as at E2B; longer after a resume,
        because what was about to listen at the pause continues; and the code interpreter's for as
        long as it may start, because its clients expect it in every sandbox."""
        # As it is now: dialing may have resumed it.
        sandbox = await self._services.sandboxes.get(
            actor, target.sandbox_id, scope="sandbox:write"
        )
        if sandbox.started_at is None:
            return _CLOSED_S
        ran_s = (self._services.clock.now() - sandbox.started_at).total_seconds()
        after_s = _RESUMED_S if sandbox.incarnation > 1 else 0.0
        starts_s = _INTERPRETER_START_S if target.port == INTERPRETER_PORT else after_s
        return max(_CLOSED_S, starts_s - ran_s)


def _refusal(target: Target, error: Exception) -> Response:
    if isinstance(error, RateLimitedError) or (isinstance(error, SandyardError) and is_gone(error)):
        return render_envd(target.sandbox_id, error)
    if isinstance(error, UnauthenticatedError):
        body = {"sandboxId": target.sandbox_id, "message": error.message, "code": 403}
        return JSONResponse(body, status_code=403)
    if isinstance(error, SandyardError):
        return render_envd(target.sandbox_id, error)
    return closed(target.sandbox_id, target.port)


async def _refuse(scope: Scope, answer: ProxyAnswer, refusal: Response) -> None:
    headers = [*refusal.raw_headers, (b"x-request-id", scope["state"]["request_id"].encode())]
    await answer.begin(refusal.status_code, headers)
    if scope.get("method") != "HEAD":
        await answer.write(bytes(refusal.body))
    await answer.end()


def _passage(
    scope: Scope, sandbox: Sandbox, target: Target, *, strips_authorization: bool
) -> Passage:
    """Return how a request is passed on: with the client's Host, as it is at E2B."""
    path, query = bytes(scope.get("raw_path") or b"/"), bytes(scope.get("query_string") or b"")
    client: tuple[str, int] = scope.get("client") or ("unknown", 0)
    scheme = "https" if scope.get("scheme") in ("https", "wss") else "http"
    given = h.to_guest(
        scope["headers"],
        port=target.port,
        hosts=(),
        client=client[0],
        scheme=scheme,
        query_token="",
        strips_authorization=strips_authorization,
    )
    host = (sandbox.port_host or "").replace("${PORT}", str(target.port)).encode()
    host = host or (h.first(scope["headers"], b"host") or "").encode("latin-1")
    # Written as most servers write them: programs look for them so, whatever HTTP says.
    headers = [
        (name.title(), host if name == b"host" else value)
        for name, value in given
        # Cookies of the platform's own name are not the guest's.
        if name not in _OURS and not (name == b"cookie" and target.host is None)
    ]

    if target.port == INTERPRETER_PORT:  # it gives them to code, by the names that E2B gives them
        template = sandbox.template.partition("@")[0]
        headers += [
            (b"E2b-Sandbox-Id", sandbox.id.encode()),
            (b"E2b-Template-Id", template.encode()),
        ]

    def rewrite(answered: h.Headers) -> list[tuple[bytes, bytes]]:
        origin = f"{scheme}://{target.host}" if target.host else ""
        found = h.to_client(answered, origin=origin, port=target.port, adds_policy=False)
        if target.host is None:
            # The name is the platform's own: nothing of a guest's may stay there.
            found = [one for one in found if one[0] not in (b"cache-control", b"set-cookie")]
            found.append((b"cache-control", b"no-store"))
        return [*found, (b"x-request-id", scope["state"]["request_id"].encode())]

    return Passage(path + b"?" + query if query else path, headers, rewrite)
