"""Previews: HTTP and WebSockets to what listens in a sandbox, under a host name of its own.

Who are you, may you, copy: a token in the host name, in the query, in a cookie, or a credential of
the API lets a client in; then bytes go to and fro as they come, through the agent, so that what
listens on the guest's loopback is reached as well.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import h11
from starlette.types import ASGIApp, Receive, Scope, Send

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.errors import (
    InvalidTokenError,
    NotFoundError,
    SandyardError,
    TokenExpiredError,
    UnauthenticatedError,
    UnavailableError,
)
from sandyard.server.core.ids import new_request_id
from sandyard.server.gateway import headers as h
from sandyard.server.gateway.answers import (
    HUNG_UP,
    NO_HTTP,
    NO_METHOD,
    NO_SUCH_NAME,
    NOT_PASSED_ON,
    SEVERAL_HOSTS,
    SILENT,
    TUNNEL,
    Answering,
    RefusedError,
    closed,
    refusal_of,
)
from sandyard.server.gateway.copy import relay
from sandyard.server.gateway.exchange import (
    REQUEST_TRAILERS,
    Exchange,
    GoneError,
    HungUpError,
    send_body,
    until_gone,
)
from sandyard.server.gateway.hosts import PreviewName, is_below, name_of
from sandyard.server.gateway.pages import Message
from sandyard.server.service.actor import Actor
from sandyard.server.service.people.access import Access
from sandyard.server.service.people.rates import Rates
from sandyard.server.service.sandboxes.previews import QUERY_TOKEN, Previews
from sandyard.server.tasks import beside

_ANSWER_S = 300.0
_CONTINUE_S = 1.0  # what clients wait, too
_COOKIES_MAX = 50
_CHECK_S = 30.0
Check = Callable[[], Awaitable[object]]
_BROKEN = (h11.RemoteProtocolError, h11.LocalProtocolError)


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
    check: Check
    strips_authorization: bool


@dataclass(frozen=True)
class _Who:
    """Who was let in, and what raises once they may not be any more."""

    actor: Actor
    check: Check
    by_credential: bool
    query_token: str | None = None


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
        answering = Answering(scope, send, request_id)
        try:
            try:
                guest = await self._enter(scope)
                if scope["type"] == TUNNEL:
                    await self._tunnel(scope, guest, answering)
                else:
                    await self._pass_on(scope, receive, guest, answering)
            except SandyardError as error:
                raise refusal_of(error) from error
            except TimeoutError as error:
                raise RefusedError(*SILENT) from error
            except HungUpError as error:
                raise RefusedError(*HUNG_UP) from error
            except _BROKEN as error:
                raise RefusedError(*NO_HTTP) from error
        except RefusedError as refused:
            await answering.refuse(refused)
        except GoneError:
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
            RefusedError: it is not let in, or is to come again elsewhere.
            SandyardError: see `_who`.
        """
        headers: h.Headers = scope["headers"]
        hosts = [value for name, value in headers if name == b"host"]
        name = name_of(hosts[0].decode("latin-1"), self._domain) if len(hosts) == 1 else None
        if len(hosts) != 1:
            raise RefusedError(*SEVERAL_HOSTS)
        if name is None:
            raise RefusedError(*NO_SUCH_NAME)
        if scope.get("method") == "CONNECT" or (
            scope["type"] == TUNNEL and scope.get("method") != "GET"
        ):
            raise RefusedError(*NO_METHOD)
        address = (scope.get("client") or ("unknown", 0))[0]
        query, tokens = _without_token(scope.get("query_string", b""))
        try:
            who = await self._who(headers, name, tokens[0] if tokens else None)
        except (InvalidTokenError, TokenExpiredError):
            self._rates.failed(address)
            raise
        if who.query_token is not None and _is_navigation(scope):
            raise await self._to_cookie(scope, name, query, who.query_token)
        strips = who.by_credential or await self._is_session(headers)
        return _Guest(name, who.actor, query, who.check, strips_authorization=strips)

    async def _who(self, headers: h.Headers, name: PreviewName, token: str | None) -> "_Who":
        """Return on whose behalf a request is passed on.

        Any good credential lets it in: the token in its name or its query, a cookie, or a
        credential of the API, tried in this order.

        Raises:
            UnauthenticatedError: there is none of these, or the first one given is no good.
            NotFoundError, PermissionDeniedError, RateLimitedError: see `_by_credential`.
        """
        refusal: SandyardError | None = None
        for one in (name.token, token):
            if one is not None:
                admit = partial(self._previews.admit, one, name.sandbox_id, name.port)
                try:
                    actor = (await admit()).actor
                except (InvalidTokenError, TokenExpiredError) as error:
                    refusal = refusal or error
                else:
                    query_token = one if name.token is None else None
                    return _Who(actor, admit, by_credential=False, query_token=query_token)
        if (kept := await self._by_cookie(headers, name)) is not None:
            admit = partial(self._previews.admit, kept, name.sandbox_id, name.port)
            return _Who((await admit()).actor, admit, by_credential=False)
        try:
            return await self._by_credential(headers, name)
        except UnauthenticatedError:
            if refusal is not None:
                raise refusal from None
            raise

    async def _is_session(self, headers: h.Headers) -> bool:
        """Tell whether a client sends a session of the platform's along, which is not the guest's
        to know; tokens of other makers it may have."""
        for name, value in headers:
            text = value.decode("latin-1").strip()
            if name == b"authorization":
                kind, _, text = text.partition(" ")
                text = text.strip() if kind.lower() == "bearer" else ""
            elif name != b"x-api-key":
                continue
            if text.startswith("eyJ"):
                try:
                    await self._access.authenticate(text)
                except (InvalidTokenError, TokenExpiredError):
                    continue
                except SandyardError:
                    return True  # one that cannot be told now is not sent on
                return True
        return False

    async def _by_cookie(self, headers: h.Headers, name: PreviewName) -> str | None:
        """Return the token in a browser's cookie, if there is one that lets it in."""
        # Pages of other previews are of the same site to a browser, which sends the cookie along;
        # what they ask for says so.
        origin = h.first(headers, b"origin")
        if origin is not None and origin.lower() != f"{self._scheme}://{name.host}":
            return None
        site, mode = h.first(headers, b"sec-fetch-site"), h.first(headers, b"sec-fetch-mode")
        if site in ("same-site", "cross-site") and mode != "navigate":
            return None
        for value in h.cookies_of(headers, is_safe=self._scheme == "https")[:_COOKIES_MAX]:
            token = value.decode("latin-1")
            with suppress(InvalidTokenError, TokenExpiredError):
                await self._previews.admit(token, name.sandbox_id, name.port)
                return token
        return None

    async def _by_credential(self, headers: h.Headers, name: PreviewName) -> "_Who":
        """Return the actor of a credential of the API.

        Raises:
            UnauthenticatedError: there is none, or it is no good.
            NotFoundError, PermissionDeniedError: the sandbox is not for this actor.
            RateLimitedError: too many requests.
        """
        given = h.first(headers, b"authorization") or ""
        kind, _, token = given.partition(" ")
        found = token.strip() if kind.lower() == "bearer" else h.first(headers, b"x-api-key")
        if not found:
            raise UnauthenticatedError("")
        actor = await self._access.authenticate(found)
        self._rates.count(actor)
        await self._previews.check(actor, name.sandbox_id)

        async def check() -> None:
            now = await self._access.authenticate(found)
            await self._previews.check(now, name.sandbox_id)

        return _Who(actor, check, by_credential=True)

    async def _to_cookie(
        self, scope: Scope, name: PreviewName, query: bytes, token: str
    ) -> RefusedError:
        """Return the answer that gives a browser the cookie, and sends it on without the token."""
        admission = await self._previews.admit(token, name.sandbox_id, name.port)
        left = admission.expires_at - self._clock.now()
        is_safe = self._scheme == "https"
        prefix = "__Host-" if is_safe else ""
        cookie = (
            f"{prefix}{h.COOKIE.decode()}={token}; Path=/; HttpOnly; SameSite=Lax; "
            f"Max-Age={max(1, int(left.total_seconds()))}{'; Secure' if is_safe else ''}"
        )
        path = bytes(scope.get("raw_path") or b"/").decode("latin-1")
        rest = f"?{query.decode('latin-1')}" if query else ""
        # Whole, for a path that begins with // would lead elsewhere.
        where = f"{self._scheme}://{name.host}{path}{rest}"
        sent_on = Message(
            "You are being sent on",
            "The token is in a cookie now.",
            "Wait a moment.",
            "Wait a moment.",
        )
        return RefusedError(302, "moved", sent_on, location=where, set_cookie=cookie)

    # --- copy -------------------------------------------------------------------------------

    @asynccontextmanager
    async def _dial(self, guest: _Guest) -> AsyncIterator[ByteStream]:
        """Connect to the guest.

        Raises:
            RefusedError: nothing listens there.
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
            raise closed(guest.name.port) from error

    async def _watch(self, guest: _Guest) -> None:
        """Look again and again whether whoever was let in may still be; for ever.

        Raises:
            SandyardError: they may not.
        """
        while True:
            await self._clock.sleep(_CHECK_S)
            with suppress(UnavailableError):
                await guest.check()

    def _request(self, scope: Scope, guest: _Guest, *extra: tuple[bytes, bytes]) -> h11.Request:
        path = bytes(scope.get("raw_path") or b"/")
        name = guest.name
        hosts = {name.host, name.full_host}
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
            raise RefusedError(*NOT_PASSED_ON) from error

    async def _pass_on(
        self, scope: Scope, receive: Receive, guest: _Guest, answering: "Answering"
    ) -> None:
        """Send a request to the guest as it comes, and its answer back as it comes."""
        length, is_chunked = _body_of(scope["headers"])
        takes_trailers = h.takes_trailers(scope["headers"])
        extra = [(b"connection", b"close, TE" if takes_trailers else b"close")]
        if takes_trailers:
            extra.append((b"te", b"trailers"))
        if is_chunked:
            extra.append((b"transfer-encoding", b"chunked"))
        elif length is not None:
            extra.append((b"content-length", length))
        request = self._request(scope, guest, *extra)
        answering.is_for(guest.name, self._scheme)
        async with self._dial(guest) as there:
            exchange = Exchange(there)
            await there.write(exchange.send(request))
            has_body = is_chunked or length not in (None, b"0")
            if not has_body:
                await there.write(exchange.send(h11.EndOfMessage()))
            elif h.waits_to_go_on(scope["headers"]):
                # Whether the body is to be sent is the guest's to say: it is not asked for before.
                early = await exchange.early_response(_CONTINUE_S, self._clock)
                if early is not None:
                    # Begun first: to ask for the body before is to tell the client to send it.
                    await answering.begin(early, is_last=True)
                    async with beside(self._watch(guest)), beside(until_gone(receive)):
                        await self._copy(exchange, answering)
                    return
            sent = asyncio.Event()
            sending = send_body(
                receive,
                exchange,
                self._clock,
                has_body=has_body,
                trailers=lambda: h.trailers_of(
                    scope.get("extensions", {}).get(REQUEST_TRAILERS, ())
                ),
                sent=sent,
            )
            async with beside(self._watch(guest)), beside(sending):
                await answering.begin(await self._answer(exchange, sent))
                await self._copy(exchange, answering)

    async def _copy(self, exchange: Exchange, answering: Answering) -> None:
        """Send the rest of the guest's answer to the client."""
        async for piece in exchange.body():
            await answering.go_on(piece)
        await answering.end(exchange.trailers)

    async def _answer(
        self, exchange: Exchange, sent: asyncio.Event
    ) -> h11.Response | h11.InformationalResponse:
        """Return the head of the guest's answer. It may take its time from when it has the whole
        request: what is large, or comes slowly, takes its own.

        Raises:
            TimeoutError: it has said nothing since.
        """
        async with beside(exchange.response()) as answer:
            async with beside(sent.wait()) as whole:
                await asyncio.wait([answer, whole], return_when=asyncio.FIRST_COMPLETED)
            async with self._clock.timeout(_ANSWER_S):
                return await answer

    async def _tunnel(self, scope: Scope, guest: _Guest, answering: "Answering") -> None:
        """Ask the guest for another protocol, and carry its bytes as they are from then on."""
        upgrade = (b"connection", b"Upgrade"), (b"upgrade", b"websocket")
        request = self._request(scope, guest, *upgrade)
        answering.is_for(guest.name, self._scheme)
        async with self._dial(guest) as there, beside(self._watch(guest)):
            exchange = Exchange(there)
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
