"""The edge: what happens to a request before a route sees it, and to its answer after.

It is given an id, it is asked who is asking, and only then is its body read, as far as its route
lets it. Nobody without a credential makes the server read a body, let alone parse one.
"""

import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, TypeVar

from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sandyard.server.api.bounds import JsonBounds
from sandyard.server.api.credentials import signed_use_of, ticket_of, token_of
from sandyard.server.api.errors import answer_error
from sandyard.server.core.errors import (
    InternalError,
    InvalidArgumentError,
    InvalidTokenError,
    NotFoundError,
    PayloadTooLargeError,
    RateLimitedError,
    SandyardError,
    TokenExpiredError,
    UnauthenticatedError,
    UnavailableError,
)
from sandyard.server.core.ids import new_request_id
from sandyard.server.service.actor import Actor
from sandyard.server.service.people.access import Access
from sandyard.server.service.people.rates import Allowance, Rates
from sandyard.server.service.sandboxes.signing import Signing
from sandyard.server.service.sandboxes.tickets import Admission

log = logging.getLogger(__name__)

BODY_MAX = 64 * 1024
BODIES_MAX = 256 * 1024 * 1024
"""What all large bodies together may take while their requests are served."""
_GUARDED = "/v1"
Redeem = Callable[[str], Awaitable[Admission]]
"""Uses a ticket up, and tells who is let in by it."""
RouteT = TypeVar("RouteT", bound=Callable[..., object])


class RequestObserver(Protocol):
    """Is told of every request that was answered."""

    def __call__(self, *, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request; `route` is the pattern, not the path."""
        ...


def streams_body(route: RouteT) -> RouteT:
    """Have a route take its body piece by piece as it comes, whatever it is and however large."""
    route.streams = True  # type: ignore[attr-defined]  # read from the route that was matched
    return route


def takes_body(limit: int) -> Callable[[RouteT], RouteT]:
    """Let a route take a body of so many bytes, where BODY_MAX is not enough."""

    def mark(route: RouteT) -> RouteT:
        route.body_max = limit  # type: ignore[attr-defined]  # read from the route that was matched
        return route

    return mark


class Edge:
    """See the module."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        access: Access,
        signing: Signing,
        redeem: Mapping[str, Redeem],
        rates: Rates,
        observe: RequestObserver,
        bind: Callable[[str], object],
    ) -> None:
        self._app = app
        self._access = access
        self._signing = signing
        self._redeem = redeem
        self._rates = rates
        self._observe = observe
        self._bind = bind
        self._bodies: Counter[str] = Counter()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            await self._serve_socket(scope, receive, send)
            return
        request_id = new_request_id()
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        self._bind(request_id)
        started, method = time.perf_counter(), scope["method"]
        status, has_started = 500, False

        async def send_on(message: Message) -> None:
            nonlocal status, has_started
            if message["type"] == "http.response.start":
                has_started = True
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    *_rate_headers(state.get("allowance")),
                ]
            await send(message)

        answer: Send = send_on
        try:
            await self._identify(scope)
            if scope["method"] == "HEAD":  # what GET would answer, without its body
                state["is_head"] = True
                scope, answer = {**scope, "method": "GET"}, _bodiless(send_on)
            await self._app(scope, self._bounded(scope, receive), answer)
        except SandyardError as error:
            if has_started:
                # Half an answer cannot be taken back: the connection is closed, which tells.
                log.warning("an answer was broken off: %s", error.message)
                return
            await answer_error(Request(scope), error)(scope, receive, answer)
        except Exception as error:  # a bug: the caller gets an id, the log the rest
            if has_started and isinstance(error.__cause__, SandyardError):
                # As above; Starlette has taken it for one that it should have answered.
                log.warning("an answer was broken off: %s", error.__cause__.message)
                return
            log.exception("a request failed")
            if has_started:
                raise
            broken = answer_error(Request(scope), InternalError(str(error)))
            await broken(scope, receive, answer)
        finally:
            self._let_go(state)
            route = getattr(scope.get("route"), "path", "unknown")
            self._observe(
                method=method,
                route=route,
                status=status,
                seconds=time.perf_counter() - started,
            )

    async def _serve_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one WebSocket; whoever may not have it is answered as a request would be."""
        request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        self._bind(request_id)
        started, status, is_open = time.perf_counter(), 101, False
        state = scope["state"]

        async def send_on(message: Message) -> None:
            nonlocal status, is_open
            if message["type"] == "websocket.close" and not is_open:
                # No route takes it: that is told as it is of any other address.
                absent = NotFoundError(
                    f"cannot find a WebSocket at {scope['path'][:200]}: see /docs for the routes"
                )
                await answer_error(HTTPConnection(scope), absent)(scope, receive, send_on)
                return
            is_open = is_open or message["type"] == "websocket.accept"
            if message["type"] == "websocket.http.response.start":
                is_open = True
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-request-id", request_id.encode()),
                    *_rate_headers(state.get("allowance")),
                ]
            await send(message)

        try:
            await self._identify(scope)
            await self._app(scope, receive, send_on)
        except SandyardError as error:
            await answer_error(HTTPConnection(scope), error)(scope, receive, send_on)
        finally:
            self._observe(
                method="WEBSOCKET",
                route=getattr(scope.get("route"), "path", "unknown"),
                status=status,
                seconds=time.perf_counter() - started,
            )

    async def _identify(self, scope: Scope) -> None:
        """Find out who asks for something under /v1, and count it.

        Raises:
            UnauthenticatedError, InvalidTokenError, TokenExpiredError: nobody we know.
            RateLimitedError: too many requests, or too many bad credentials.
        """
        path = scope["path"]
        if path != _GUARDED and not path.startswith(_GUARDED + "/"):
            return
        state, request = scope["state"], HTTPConnection(scope)
        address = request.client.host if request.client else "unknown"
        try:
            actor = await self._actor(request, state)
        except (InvalidTokenError, TokenExpiredError):
            state["allowance"] = self._rates.of_address(address)
            self._rates.failed(address)
            state["allowance"] = self._rates.of_address(address)
            raise
        except UnauthenticatedError:
            state["allowance"] = self._rates.of_address(address)
            raise
        try:
            state["allowance"] = self._rates.count(actor)
        except RateLimitedError:
            state["allowance"] = self._rates.refused(actor)
            raise
        state["actor"] = actor

    async def _actor(self, request: HTTPConnection, state: dict[str, Any]) -> Actor:
        if (ticket := ticket_of(request)) is not None:
            kind, secret = ticket
            state["admission"] = admission = await self._redeem[kind](secret)
            return admission.actor
        token = token_of(request)
        if token is None and (signed := signed_use_of(request)) is not None:
            return await self._signing.enter(*signed)
        org_id = request.query_params.get("orgId")
        return await self._access.authenticate(token, org_id=org_id)

    def _bounded(self, scope: Scope, receive: Receive) -> Receive:
        """Return `receive`, which refuses what a route does not take.

        The route is known by the time its body is asked for.
        """
        size, bounds, state = 0, None, scope["state"]

        async def receive_bounded() -> Message:
            nonlocal size, bounds
            if getattr(scope.get("endpoint"), "streams", False):
                return await receive()
            if size == 0 and scope["path"].startswith(_GUARDED):
                _check_kind(scope)
                bounds = JsonBounds()
            message = await receive()
            if message["type"] == "http.request":
                body = message.get("body", b"")
                size += len(body)
                limit = getattr(scope.get("endpoint"), "body_max", BODY_MAX)
                if size > limit:
                    raise PayloadTooLargeError(
                        f"cannot take a body of over {_shown(limit)} here", limit=limit
                    )
                if size > BODY_MAX:
                    self._hold(state, size)
                if bounds is not None:
                    bounds.feed(body)
            return message

        return receive_bounded

    def _hold(self, state: dict[str, Any], size: int) -> None:
        """Count a large body, until its request has been served."""
        more, whose = size - state.get("body", 0), _whose(state)
        own = self._bodies[whose] + more
        # One organization has half at most: it cannot shut out the others.
        if self._bodies.total() + more > BODIES_MAX or own > BODIES_MAX // 2:
            raise UnavailableError(
                "cannot take another large body now: too many are on their way; try again"
            )
        self._bodies[whose] = own
        state["body"] = size

    def _let_go(self, state: dict[str, Any]) -> None:
        whose = _whose(state)
        self._bodies[whose] -= state.pop("body", 0)
        if not self._bodies[whose]:
            del self._bodies[whose]


def _whose(state: dict[str, Any]) -> str:
    actor: Actor | None = state.get("actor")
    return actor.org_id if actor is not None else ""


def _rate_headers(allowance: Allowance | None) -> list[tuple[bytes, bytes]]:
    if allowance is None:  # what is open to all is not counted
        return []
    return [
        (b"x-ratelimit-limit", str(allowance.limit).encode()),
        (b"x-ratelimit-remaining", str(allowance.remaining).encode()),
        (b"x-ratelimit-reset", str(allowance.resets_at).encode()),
    ]


def _bodiless(send: Send) -> Send:
    async def send_bodiless(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return send_bodiless


def _check_kind(scope: Scope) -> None:
    """Refuse a body that says that it is something else than JSON; one that says nothing is."""
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    has_body = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
    is_json = not kind or kind == b"application/json" or kind.endswith(b"+json")
    if has_body and not is_json:
        raise InvalidArgumentError(
            f"cannot read a body of the type {kind.decode('latin-1')[:100]}: send JSON, with the "
            "header `Content-Type: application/json`",
            field="Content-Type",
        )


def _shown(limit: int) -> str:
    return f"{limit // 2**20} MiB" if limit >= 2**20 else f"{limit // 2**10} KiB"
