"""Previews: HTTP and WebSockets to what listens in a sandbox, under a host name of its own.

Who are you, may you, copy: a token in the host name, in the query, in a cookie, or a credential of
the API lets a client in; then bytes go to and fro as they come, through the agent, so that what
listens on the guest's loopback is reached as well.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import h11
from starlette.types import ASGIApp, Receive, Scope, Send

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.errors import (
    ConflictError,
    InvalidTokenError,
    NotFoundError,
    PermissionDeniedError,
    QuotaExceededError,
    RateLimitedError,
    SandyardError,
    TokenExpiredError,
    UnauthenticatedError,
)
from sandyard.server.core.ids import new_request_id
from sandyard.server.gateway import headers as h
from sandyard.server.gateway.copy import PIECE, relay
from sandyard.server.gateway.hosts import PreviewName, is_below, name_of
from sandyard.server.gateway.pages import said, status_line
from sandyard.server.service.actor import Actor
from sandyard.server.service.people.access import Access
from sandyard.server.service.people.rates import Rates
from sandyard.server.service.sandboxes.previews import QUERY_TOKEN, Previews
from sandyard.server.tasks import beside

log = logging.getLogger(__name__)

TUNNEL = "sandyard.tunnel"
"""The kind of scope of a connection that is to become another protocol's: its `stream` is raw."""
_HEAD_MAX = 64 * 1024
_ANSWER_S = 300.0
_REFRESH_S = 2
_COOKIES_MAX = 50
_STILL_S = 120.0
_STATUSES = range(200, 600)
_EVENTS_A_SECOND, _EVENTS_AT_ONCE, _EVENTS_A_TURN = 20_000, 5_000, 500
_BROKEN = (h11.RemoteProtocolError, h11.LocalProtocolError)
_NO_BODY = frozenset({204, 304})


class Observer(Protocol):
    """Is told of every request that was answered."""

    def __call__(self, *, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request."""
        ...


class Front:
    """Tells requests apart by the host that they name, each by itself: previews from the API."""

    def __init__(self, api: ASGIApp, preview: "PreviewApp", domain: str) -> None:
        self._api = api
        self._preview = preview
        self._domain = domain

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        app = self._preview if self.is_preview(scope) else self._api
        await app(scope, receive, send)

    def is_preview(self, scope: Scope) -> bool:
        """Tell whether a request is for a preview."""
        return any(
            name == b"host" and is_below(value.decode("latin-1"), self._domain)
            for name, value in scope.get("headers", ())
        )


@dataclass(frozen=True)
class _Guest:
    """Whom a request is for, and on whose behalf it is passed on."""

    name: PreviewName
    actor: Actor
    query: bytes
    strips_authorization: bool


class _RefusedError(Exception):
    """An answer of our own: its status, its code for programs, and what people are told."""

    def __init__(
        self,
        status: int,
        code: str,
        title: str,
        text: str,
        *,
        refresh_s: int | None = None,
        **headers: str,
    ) -> None:
        super().__init__(title)
        self.status = status
        self.code = code
        self.title = title
        self.text = text
        self.refresh_s = refresh_s
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


class _GoneError(Exception):
    """The client has left."""


class PreviewApp:
    """See the module."""

    def __init__(
        self,
        *,
        previews: Previews,
        access: Access,
        rates: Rates,
        domain: str,
        scheme: str,
        observe: Observer,
        bind: Callable[[str], object],
        clock: Clock,
    ) -> None:
        self._previews = previews
        self._access = access
        self._rates = rates
        self._domain = domain
        self._scheme = scheme
        self._observe = observe
        self._bind = bind
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        request_id = new_request_id()
        self._bind(request_id)
        began = time.perf_counter()
        answering = _Answering(scope, send, request_id)
        try:
            try:
                guest = await self._enter(scope)
                if scope["type"] == TUNNEL:
                    await self._tunnel(scope, guest, answering)
                else:
                    await self._pass_on(scope, receive, guest, answering)
            except SandyardError as error:
                raise _refusal_of(error) from error
            except TimeoutError as error:
                raise _RefusedError(*_SILENT) from error
            except _BROKEN as error:
                raise _RefusedError(*_NO_HTTP) from error
        except _RefusedError as refused:
            await answering.refuse(refused)
        except _GoneError:
            pass
        finally:
            self._observe(
                method="TUNNEL" if scope["type"] == TUNNEL else scope.get("method", "WEBSOCKET"),
                route="preview",
                status=answering.status,
                seconds=time.perf_counter() - began,
            )

    # --- who are you, may you ---------------------------------------------------------------

    async def _enter(self, scope: Scope) -> _Guest:
        """Return whom a request is for.

        Raises:
            _RefusedError: it is not let in, or is to come again elsewhere.
            SandyardError: see `_credential`.
        """
        headers: h.Headers = scope["headers"]
        hosts = [value for name, value in headers if name == b"host"]
        name = name_of(hosts[0].decode("latin-1"), self._domain) if len(hosts) == 1 else None
        if len(hosts) != 1:
            raise _RefusedError(400, "bad_request", "One host, please",
                           "The request names several hosts.")  # fmt: skip
        if name is None:
            raise _RefusedError(*_NO_SUCH_NAME)
        if scope.get("method") == "CONNECT" or (
            scope["type"] == TUNNEL and scope.get("method") != "GET"
        ):
            raise _RefusedError(400, "bad_request", "This cannot be passed on",
                                "The method is not one that a preview knows.")  # fmt: skip
        address = (scope.get("client") or ("unknown", 0))[0]
        query, tokens = _without_token(scope.get("query_string", b""))
        try:
            if name.token is not None:
                admission = await self._previews.admit(name.token, name.sandbox_id, name.port)
                return _Guest(
                    name,
                    admission.actor,
                    query,
                    strips_authorization=await self._is_session(headers),
                )
            if tokens:
                admission = await self._previews.admit(tokens[0], name.sandbox_id, name.port)
                if _is_navigation(scope):
                    seconds = self._seconds_left(admission.expires_at.timestamp())
                    raise self._to_cookie(scope, name, query, tokens[0], seconds)
                return _Guest(
                    name,
                    admission.actor,
                    query,
                    strips_authorization=await self._is_session(headers),
                )
            actor = await self._by_cookie(headers, name)
            if actor is not None:
                return _Guest(
                    name, actor, query, strips_authorization=await self._is_session(headers)
                )
            actor = await self._by_credential(headers, name)
            return _Guest(name, actor, query, strips_authorization=True)
        except (InvalidTokenError, TokenExpiredError):
            self._rates.failed(address)
            raise

    async def _is_session(self, headers: h.Headers) -> bool:
        """Tell whether a client sends a session of the platform's along, which is not the guest's
        to know; tokens of other makers it may have."""
        kind, _, token = (h.first(headers, b"authorization") or "").partition(" ")
        if kind.lower() != "bearer" or not token.startswith("eyJ"):
            return False
        try:
            await self._access.authenticate(token.strip())
        except SandyardError:
            return False
        return True

    async def _by_cookie(self, headers: h.Headers, name: PreviewName) -> Actor | None:
        # Pages of other previews are of the same site to a browser, which sends the cookie along;
        # what they ask for says so.
        origin = h.first(headers, b"origin")
        if origin is not None and origin.lower() != f"{self._scheme}://{name.host}":
            return None
        site, mode = h.first(headers, b"sec-fetch-site"), h.first(headers, b"sec-fetch-mode")
        if site in ("same-site", "cross-site") and mode != "navigate":
            return None
        for value in h.cookies_of(headers, is_safe=self._scheme == "https")[:_COOKIES_MAX]:
            try:
                admission = await self._previews.admit(
                    value.decode("latin-1"), name.sandbox_id, name.port
                )
            except (InvalidTokenError, TokenExpiredError):
                continue
            return admission.actor
        return None

    async def _by_credential(self, headers: h.Headers, name: PreviewName) -> Actor:
        given = h.first(headers, b"authorization") or ""
        kind, _, token = given.partition(" ")
        found = token.strip() if kind.lower() == "bearer" else h.first(headers, b"x-api-key")
        if not found:
            raise UnauthenticatedError("")
        actor = await self._access.authenticate(found)
        self._rates.count(actor)
        await self._previews.check(actor, name.sandbox_id)
        return actor

    def _to_cookie(
        self, scope: Scope, name: PreviewName, query: bytes, token: str, seconds: int
    ) -> _RefusedError:
        """Return the answer that gives a browser the cookie, and sends it on without the token."""
        is_safe = self._scheme == "https"
        prefix = "__Host-" if is_safe else ""
        cookie = (
            f"{prefix}{h.COOKIE.decode()}={token}; Path=/; HttpOnly; SameSite=Lax; "
            f"Max-Age={seconds}{'; Secure' if is_safe else ''}"
        )
        path = bytes(scope.get("raw_path") or b"/").decode("latin-1")
        rest = f"?{query.decode('latin-1')}" if query else ""
        # Whole, for a path that begins with // would lead elsewhere.
        where = f"{self._scheme}://{name.host}{path}{rest}"
        return _RefusedError(302, "moved", "Here you are", "You are being sent on.",
                        location=where, set_cookie=cookie)  # fmt: skip

    def _seconds_left(self, until: float) -> int:
        return max(1, int(until - self._clock.now().timestamp()))

    # --- copy -------------------------------------------------------------------------------

    @asynccontextmanager
    async def _dial(self, guest: _Guest) -> AsyncIterator[ByteStream]:
        """Connect to the guest.

        Raises:
            _RefusedError: nothing listens there.
        """
        opening = self._previews.dial(guest.actor, guest.name.sandbox_id, guest.name.port)
        is_open = False
        try:
            async with opening as there:
                is_open = True
                yield there
        except NotFoundError as error:
            if is_open or error.facts.get("reason") != "absent":
                raise
            raise _closed(guest.name.port) from error

    def _request(self, scope: Scope, guest: _Guest, *extra: tuple[bytes, bytes]) -> h11.Request:
        path = bytes(scope.get("raw_path") or b"/")
        name = guest.name
        hosts = [name.host]
        if name.token is not None:
            hosts.append(f"{name.port}-{name.sandbox_id}-{name.token}.{self._domain}")
        told = h.to_guest(
            scope["headers"],
            port=name.port,
            hosts=hosts,
            client=(scope.get("client") or ("unknown", 0))[0],
            scheme=self._scheme,
            strips_authorization=guest.strips_authorization,
        )
        try:
            return h11.Request(
                method=scope.get("method", "GET"),
                target=path + b"?" + guest.query if guest.query else path,
                headers=[*told, *extra],
            )
        except h11.LocalProtocolError as error:
            raise _RefusedError(*_NOT_PASSED_ON) from error

    async def _pass_on(
        self, scope: Scope, receive: Receive, guest: _Guest, answering: "_Answering"
    ) -> None:
        """Send a request to the guest as it comes, and its answer back as it comes."""
        length, is_chunked = _body_of(scope["headers"])
        extra = [(b"connection", b"close")]
        if is_chunked:
            extra.append((b"transfer-encoding", b"chunked"))
        elif length is not None:
            extra.append((b"content-length", length))
        request = self._request(scope, guest, *extra)
        answering.is_for(guest.name, self._scheme, self._domain)
        async with self._dial(guest) as there:
            exchange = _Exchange(there)
            await there.write(exchange.send(request))
            has_body = is_chunked or length not in (None, b"0")
            if not has_body:
                await there.write(exchange.send(h11.EndOfMessage()))
            async with beside(_send_body(receive, exchange, self._clock, has_body=has_body)):
                async with self._clock.timeout(_ANSWER_S):
                    response = await exchange.response()
                await answering.begin(response)
                async for piece in exchange.body():
                    await answering.go_on(piece)
                await answering.end()

    async def _tunnel(self, scope: Scope, guest: _Guest, answering: "_Answering") -> None:
        """Ask the guest for another protocol, and carry its bytes as they are from then on."""
        upgrade = (b"connection", b"Upgrade"), (b"upgrade", b"websocket")
        request = self._request(scope, guest, *upgrade)
        answering.is_for(guest.name, self._scheme, self._domain)
        async with self._dial(guest) as there:
            exchange = _Exchange(there)
            await there.write(exchange.send(request) + exchange.send(h11.EndOfMessage()))
            async with self._clock.timeout(_ANSWER_S):
                response = await exchange.response()
            await answering.begin(response)
            if response.status_code == 101:
                rest, _ = exchange.rest()
                client: ByteStream = scope["stream"]
                if rest:
                    await client.write(rest)
                await relay(client, there)
            else:
                async for piece in exchange.body():
                    await answering.go_on(piece)
            await answering.end()


class _Exchange:
    """One request and its answer, on a connection to a guest."""

    def __init__(self, there: ByteStream) -> None:
        self.there = there
        self._h11 = h11.Connection(h11.CLIENT, max_incomplete_event_size=_HEAD_MAX)
        self._events = 0
        self._began = asyncio.get_running_loop().time()

    def send(self, event: Any) -> bytes:
        """Return the bytes of a part of the request."""
        return self._h11.send(event) or b""

    def piece(self, data: bytes, *, is_last: bool) -> bytes:
        """Return the bytes of a piece of the request's body.

        Raises:
            h11.LocalProtocolError: the answer is complete, and nothing more is taken.
        """
        found = self.send(h11.Data(data)) if data else b""
        return found + self.send(h11.EndOfMessage()) if is_last else found

    def rest(self) -> tuple[bytes, bool]:
        """Return what came behind the head that changed the protocol."""
        return self._h11.trailing_data

    async def response(self) -> h11.Response | h11.InformationalResponse:
        """Return the head of the answer, or of the change to another protocol.

        Raises:
            h11.RemoteProtocolError: what the guest says is no HTTP.
        """
        while True:
            event = await self._next()
            if isinstance(event, h11.Response):
                if event.status_code not in _STATUSES:
                    raise h11.RemoteProtocolError("it answered with a status that there is not")
                return event
            if isinstance(event, h11.InformationalResponse) and event.status_code == 101:
                return event
            if isinstance(event, h11.ConnectionClosed):
                raise h11.RemoteProtocolError("it hung up without an answer")

    async def body(self) -> AsyncIterator[bytes]:
        """Yield the body of the answer as it comes."""
        while True:
            event = await self._next()
            if isinstance(event, h11.Data):
                yield bytes(event.data)
            elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
                return

    async def _next(self) -> Any:
        while (event := self._h11.next_event()) is h11.NEED_DATA:
            self._h11.receive_data(await self.there.read(PIECE))
        if event is h11.PAUSED:  # it would say so again and again
            raise h11.RemoteProtocolError("it changed the protocol unasked")
        await self._keep_pace()
        return event

    async def _keep_pace(self) -> None:
        """Let others have their turn: nobody gets more of this thread by sending tiny pieces."""
        loop = asyncio.get_running_loop()
        self._events += 1
        early = self._began + (self._events - _EVENTS_AT_ONCE) / _EVENTS_A_SECOND - loop.time()
        if early > 0 or self._events % _EVENTS_A_TURN == 0:
            await asyncio.sleep(max(0.0, early))


async def _send_body(
    receive: Receive, exchange: _Exchange, clock: Clock, *, has_body: bool
) -> None:
    """Send the body of a request as it comes, and tell when the client leaves.

    Raises:
        _GoneError: it has.
    """
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise _GoneError
        if has_body:
            is_more = bool(message.get("more_body"))
            try:
                data = exchange.piece(message.get("body") or b"", is_last=not is_more)
                # One that does not read on is not waited for for ever: meanwhile nobody would hear
                # that the client has left.
                async with clock.timeout(_STILL_S):
                    await exchange.there.write(data)
            except (h11.LocalProtocolError, SandyardError):
                is_more = False  # it wants no more of it; what it says to that still comes
            has_body = is_more


class _Answering:
    """The answer to a client, by ASGI or on its raw connection; no more than one is ever begun."""

    def __init__(self, scope: Scope, send: Send, request_id: str) -> None:
        self.status = 499  # the client left before there was any
        self._scope = scope
        self._send = send
        self._request_id = request_id
        self._has_begun = False
        self._name: PreviewName | None = None
        self._origin = ""

    def is_for(self, name: PreviewName, scheme: str, domain: str) -> None:
        """Say which preview it is of."""
        token = "" if name.token is None else f"-{name.token}"
        self._name = name
        self._origin = f"{scheme}://{name.port}-{name.sandbox_id}{token}.{domain}"

    async def begin(self, response: h11.Response | h11.InformationalResponse) -> None:
        """Send the head of a guest's answer."""
        assert self._name is not None
        found = h.to_client(
            [(bytes(name), bytes(value)) for name, value in response.headers],
            origin=self._origin,
            port=self._name.port,
            adds_policy=self._name.token is not None,
        )
        found.append((b"x-request-id", self._request_id.encode()))
        if response.status_code in _NO_BODY:
            found = [(name, value) for name, value in found if name != b"content-length"]
        await self._start(response.status_code, found)

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        self._has_begun = True
        self.status = status
        if self._scope["type"] == TUNNEL:
            how = [(b"connection", b"close")]
            if status == 101:
                how = [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
            lines = [b"%s: %s\r\n" % one for one in [*headers, *how]]
            await self._scope["stream"].write(status_line(status) + b"".join(lines) + b"\r\n")
        else:
            start = {"type": "http.response.start", "status": status, "headers": headers}
            await self._send(start)

    async def go_on(self, piece: bytes) -> None:
        """Send a piece of the body."""
        if self._scope["type"] == TUNNEL:
            await self._scope["stream"].write(piece)
        else:
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self) -> None:
        """Say that that was all."""
        if self._scope["type"] != TUNNEL:
            await self._send({"type": "http.response.body", "body": b""})

    async def refuse(self, refused: _RefusedError) -> None:
        """Send an answer of our own; half of another cannot be taken back, and is broken off."""
        if self._has_begun:
            log.info("a preview was broken off: %s", refused.title)
            return
        accept = h.first(self._scope["headers"], b"accept") or ""
        found, body = said(
            refused.status,
            refused.code,
            refused.title,
            refused.text,
            request_id=self._request_id,
            wants_page="text/html" in accept,
            refresh_s=refused.refresh_s,
            headers=refused.headers,
        )
        await self._start(refused.status, found)
        if self._scope.get("method") != "HEAD":
            await self.go_on(body)
        await self.end()


def _without_token(query: bytes) -> tuple[bytes, list[str]]:
    """Return a query without our token, as it was otherwise, and the tokens in it."""
    name = QUERY_TOKEN.encode() + b"="
    parts = query.split(b"&") if query else []
    tokens = [one[len(name) :].decode("latin-1") for one in parts if one.startswith(name)]
    return b"&".join(one for one in parts if not one.startswith(name)), tokens


def _body_of(headers: h.Headers) -> tuple[bytes | None, bool]:
    """Return how long a request's body is, and whether it comes without saying."""
    length = next((value for name, value in headers if name == b"content-length"), None)
    is_chunked = any(name == b"transfer-encoding" for name, _ in headers)
    return (None if is_chunked else length), is_chunked


def _is_navigation(scope: Scope) -> bool:
    """Tell whether somebody goes to a page with a browser, rather than a program asks for it."""
    headers = scope["headers"]
    if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
        return False
    mode = h.first(headers, b"sec-fetch-mode")
    if mode is not None:
        return mode == "navigate"
    return "text/html" in (h.first(headers, b"accept") or "")


def _refusal_of(error: SandyardError) -> _RefusedError:
    """Return what a person is told of an error."""
    match error:
        case RateLimitedError():
            wait = str(error.retry_after_s)
            return _RefusedError(429, "rate_limited", "Too many requests", _text(error),
                            retry_after=wait)  # fmt: skip
        case InvalidTokenError() | TokenExpiredError():
            return _RefusedError(401, error.code, "This address does not let you in",
                            "Its token is unknown, was for another address, or has expired. Ask "
                            "for a new one: <code>GET /v1/sandboxes/{id}/url?port=…</code>, or "
                            "<code>sandyard sandbox url</code>.")  # fmt: skip
        case UnauthenticatedError():
            return _RefusedError(401, error.code, "Who are you?",
                            "This preview is private. Use the address that <code>sandyard sandbox "
                            "url</code> or <code>GET /v1/sandboxes/{id}/url?port=…</code> gives, "
                            "or send <code>Authorization: Bearer</code> and an API key.",
                            www_authenticate="Bearer")  # fmt: skip
        case PermissionDeniedError():
            return _RefusedError(403, error.code, "You may not see this", _text(error))
        case NotFoundError():
            return _RefusedError(404, error.code, "There is no such sandbox",
                            "It was deleted, or never was.")  # fmt: skip
        case QuotaExceededError():
            return _RefusedError(402, error.code, "The sandbox stands still", _text(error))
        case ConflictError():
            return _RefusedError(409, error.code, "The sandbox does not run", _text(error))
        case _:
            title = "The sandbox cannot be reached just now"
            return _RefusedError(503, error.code, title, _text(error),
                            refresh_s=_REFRESH_S, retry_after="2")  # fmt: skip


def _text(error: SandyardError) -> str:
    shown = error.message.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f"{shown[:1].upper()}{shown[1:]}."


def _closed(port: int) -> _RefusedError:
    return _RefusedError(
        502, "bad_gateway", f"Nothing listens on port {port} yet",
        f"The sandbox runs, but nothing in it listens on port {port}. This page looks again by "
        "itself.", refresh_s=_REFRESH_S,
    )  # fmt: skip


_NO_SUCH_NAME = (
    404, "not_found", "There is no such preview",
    "The name of a preview is <code>{port}-{sandbox id}</code>, with or without a token, and the "
    "port is 1 to 65535 and not the platform's own.",
)  # fmt: skip
_NOT_PASSED_ON = (
    400, "bad_request", "This cannot be passed on",
    "The request has a header that HTTP does not allow.",
)  # fmt: skip
_SILENT = (
    504, "gateway_timeout", "The sandbox does not answer",
    "What listens there took the request and said nothing to it.",
)  # fmt: skip
_NO_HTTP = (
    502, "bad_gateway", "The sandbox answers, but not in HTTP",
    "What listens on this port does not speak HTTP/1.1.",
)  # fmt: skip
