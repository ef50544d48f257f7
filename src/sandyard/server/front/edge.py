"""The edge of a face: what happens to a request before a route sees it, and to its answer after.

A request gets an id, its credential is verified, and only then is its body read, up to the limit of
its route. A client without a credential never makes the server read or parse a body.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from starlette.requests import HTTPConnection, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sandyard.server.core.errors import (
    InternalError,
    InvalidTokenError,
    NotFoundError,
    RateLimitedError,
    SandyardError,
    TokenExpiredError,
    UnauthenticatedError,
)
from sandyard.server.core.ids import new_request_id
from sandyard.server.front.bodies import BoundedBody
from sandyard.server.front.exchange import BrokenOffError
from sandyard.server.front.face import EdgeServices, Face
from sandyard.server.service.people.access import no_credential
from sandyard.server.service.people.rates import Allowance

log = logging.getLogger(__name__)

_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Edge:
    """Wraps the application of a face."""

    def __init__(self, app: ASGIApp, *, face: Face, services: EdgeServices) -> None:
        self._app = app
        self._face = face
        self._services = services

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or WebSocket."""
        if scope["type"] == "websocket":
            await self._serve_socket(scope, receive, send)
        else:
            await self._serve_request(scope, receive, send)

    async def _serve_request(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._observed(scope, scope["method"]) as answer:
            to_client: Send = _Stamped(send, scope["state"], answer).send
            if scope["method"] == "HEAD":  # what GET would answer, without its body
                scope["state"]["is_head"] = True
                scope = answer.scope = {**scope, "method": "GET"}
                to_client = _bodiless(to_client)
            checks_json = self._face.json_only and self._face.guards(scope["path"])
            body = BoundedBody(scope, receive, self._services.bodies, checks_json=checks_json)
            try:
                if scope["method"] in _METHODS:  # others no route takes
                    await self._identify(scope)
                await self._app(scope, body.receive, to_client)
            except SandyardError as error:
                if answer.has_started:
                    self._break_off(error)
                    return
                await self._face.render(Request(scope), error)(scope, receive, to_client)
            except Exception as error:  # a bug: the client gets an id, the log the rest
                if answer.has_started and isinstance(error.__cause__, SandyardError):
                    # As above; Starlette reports it as an error that it should have answered.
                    self._break_off(error.__cause__)
                    return
                log.exception("unexpected error while handling a request")
                if answer.has_started:
                    raise
                broken = self._face.render(Request(scope), InternalError(str(error)))
                await broken(scope, receive, to_client)
            finally:
                body.release()

    async def _serve_socket(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one WebSocket. A refusal is sent as the answer to the HTTP request."""
        with self._observed(scope, "WEBSOCKET") as answer:
            answer.status = 101
            to_client = _Stamped(send, scope["state"], answer).send
            is_open = False

            async def send_on(message: Message) -> None:
                nonlocal is_open
                if message["type"] == "websocket.close" and not is_open:
                    # No route matches. The client gets the same answer as for any other path.
                    is_open = True
                    absent = NotFoundError(
                        f"cannot find a WebSocket at {scope['path'][:200]}: see /docs for the "
                        "routes"
                    )
                    refusal = self._face.render(HTTPConnection(scope), absent)
                    await refusal(scope, receive, to_client)
                    return
                is_open = is_open or message["type"] in (
                    "websocket.accept", "websocket.http.response.start",
                )  # fmt: skip
                await to_client(message)

            try:
                await self._identify(scope)
                await self._app(scope, receive, send_on)
            except SandyardError as error:
                await self._face.render(HTTPConnection(scope), error)(scope, receive, send_on)

    def _break_off(self, error: SandyardError) -> None:
        """End an answer that cannot go on. Its status is sent already: the end of the connection
        tells the client.

        Raises:
            BrokenOffError: the connection must be reset.
        """
        log.warning("an error came after the response had begun; aborting it: %s", error.message)
        if self._face.resets:
            raise BrokenOffError(resets=True) from error

    async def _identify(self, scope: Scope) -> None:
        """Verify the credential of a request for a guarded path, and count the request.

        Raises:
            UnauthenticatedError, InvalidTokenError, TokenExpiredError: no valid credential.
            RateLimitedError: too many requests, or too many invalid credentials.
        """
        if not self._face.guards(scope["path"]):
            return
        state, connection = scope["state"], HTTPConnection(scope)
        rates = self._services.rates
        address = connection.client.host if connection.client else "unknown"
        try:
            credential = next(
                (found for read in self._face.credentials if (found := read(connection))), None
            )
            if credential is None:
                raise no_credential()
            admission = await self._services.credentials.verify(credential)
        except (InvalidTokenError, TokenExpiredError):
            state["allowance"] = rates.of_address(address)
            rates.failed(address)
            state["allowance"] = rates.of_address(address)
            raise
        except UnauthenticatedError:
            state["allowance"] = rates.of_address(address)
            raise
        try:
            state["allowance"] = rates.count(admission.actor)
        except RateLimitedError:
            state["allowance"] = rates.refused(admission.actor)
            raise
        state["actor"], state["admission"] = admission.actor, admission
        state["credential"] = credential

    @contextmanager
    def _observed(self, scope: Scope, method: str) -> Iterator["_Answer"]:
        """Give a request its id, and report its status and duration at the end of the block."""
        request_id = new_request_id()
        scope.setdefault("state", {})["request_id"] = request_id
        self._services.bind(request_id)
        started, answer = time.perf_counter(), _Answer(scope)
        try:
            yield answer
        finally:
            self._services.observe(
                face=self._face.name,
                method=method,
                route=getattr(answer.scope.get("route"), "path", "unknown"),
                status=answer.status,
                seconds=time.perf_counter() - started,
            )


@dataclass
class _Answer:
    scope: Scope
    status: int = 500
    has_started: bool = False


class _Stamped:
    """Adds the request's id and the rate limit to an answer, and notes its status."""

    def __init__(self, send: Send, state: dict[str, Any], answer: _Answer) -> None:
        self._send = send
        self._state = state
        self._answer = answer

    async def send(self, message: Message) -> None:
        """Send a message, as ASGI's `send`."""
        if message["type"] in ("http.response.start", "websocket.http.response.start"):
            self._answer.has_started = True
            self._answer.status = message["status"]
            message["headers"] = [
                *message.get("headers", ()),
                (b"x-request-id", self._state["request_id"].encode()),
                *_rate_headers(self._state.get("allowance")),
            ]
        await self._send(message)


def _rate_headers(allowance: Allowance | None) -> list[tuple[bytes, bytes]]:
    if allowance is None:  # public paths are not counted
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
