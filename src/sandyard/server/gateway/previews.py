"""Previews: HTTP and WebSockets to a port of a sandbox, under its own host name.

A token in the host name, in the query or in a cookie, or a credential of the API, lets a client in.
`front.proxy` does the rest, through the agent, so servers on the guest's loopback are reached too.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial

import h11
from starlette.types import Receive, Scope, Send

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.errors import (
    GuestNotFoundError,
    InvalidTokenError,
    SandyardError,
    TokenExpiredError,
    UnauthenticatedError,
)
from sandyard.server.front import headers as h
from sandyard.server.front.answer import TUNNEL, ProxyAnswer
from sandyard.server.front.exchange import HungUpError
from sandyard.server.front.face import EdgeServices
from sandyard.server.front.hosts import PortName, name_of
from sandyard.server.front.ports import Check, answering, to_port
from sandyard.server.front.proxy import Passage, UnsendableError
from sandyard.server.front.sessions import has_session
from sandyard.server.gateway.error_page import Message
from sandyard.server.gateway.refusals import (
    HUNG_UP,
    NO_HTTP,
    NO_METHOD,
    NO_SUCH_NAME,
    NOT_PASSED_ON,
    SEVERAL_HOSTS,
    SILENT,
    RefusalError,
    closed,
    refusal_of,
    refuse,
)
from sandyard.server.service.actor import Actor, Admission
from sandyard.server.service.people.credentials import PreviewToken, Token
from sandyard.server.service.sandboxes.previews import QUERY_TOKEN
from sandyard.server.service.services import Services

_COOKIES_MAX = 50
_BROKEN = (h11.RemoteProtocolError, h11.LocalProtocolError)


@dataclass(frozen=True)
class _Guest:
    """Whom a request is for, and on whose behalf it is passed on."""

    name: PortName
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
    """The application for all hosts below the domain of previews."""

    def __init__(self, services: Services, edge: EdgeServices, *, clock: Clock) -> None:
        self._previews = services.previews
        self._domain = services.addresses.preview_domain
        self._scheme = services.addresses.preview_scheme
        self._edge = edge
        self._clock = clock

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request or tunnel."""
        async with answering(self._edge, scope, send, face="previews", route="preview") as answer:
            try:
                await self._serve(scope, receive, answer)
            except RefusalError as refused:
                await refuse(scope, answer, refused, scope["state"]["request_id"])

    async def _serve(self, scope: Scope, receive: Receive, answer: ProxyAnswer) -> None:
        try:
            guest = await self._enter(scope)
            passage, dialing = self._passage(scope, guest), self._dial(guest)
            await to_port(scope, receive, passage, dialing, answer, self._clock, check=guest.check)
        except SandyardError as error:
            raise refusal_of(error) from error
        except TimeoutError as error:
            raise RefusalError(*SILENT) from error
        except HungUpError as error:
            raise RefusalError(*HUNG_UP) from error
        except UnsendableError as error:
            raise RefusalError(*NOT_PASSED_ON) from error
        except _BROKEN as error:
            raise RefusalError(*NO_HTTP) from error

    # --- who may enter -----------------------------------------------------------------------

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
            raise RefusalError(*SEVERAL_HOSTS)
        if name is None:
            raise RefusalError(*NO_SUCH_NAME)
        if scope.get("method") == "CONNECT" or (
            scope["type"] == TUNNEL and scope.get("method") != "GET"
        ):
            raise RefusalError(*NO_METHOD)
        query, tokens = _without_token(scope.get("query_string", b""))
        try:
            who = await self._who(headers, name, tokens[0] if tokens else None)
        except (InvalidTokenError, TokenExpiredError):
            self._edge.rates.failed(_client_of(scope))
            raise
        if who.query_token is not None and _is_navigation(scope):
            raise await self._to_cookie(scope, name, query, who.query_token)
        strips = who.by_credential or await has_session(headers, self._edge.credentials)
        return _Guest(name, who.actor, query, who.check, strips_authorization=strips)

    async def _who(self, headers: h.Headers, name: PortName, token: str | None) -> "_Who":
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
                admit = self._admitting(one, name)
                try:
                    actor = (await admit()).actor
                except (InvalidTokenError, TokenExpiredError) as error:
                    refusal = refusal or error
                else:
                    query_token = one if name.token is None else None
                    return _Who(actor, admit, by_credential=False, query_token=query_token)
        if (kept := await self._by_cookie(headers, name)) is not None:
            admit = self._admitting(kept, name)
            return _Who((await admit()).actor, admit, by_credential=False)
        try:
            return await self._by_credential(headers, name)
        except UnauthenticatedError:
            if refusal is not None:
                raise refusal from None
            raise

    def _admitting(self, token: str, name: PortName) -> Callable[[], Awaitable[Admission]]:
        """Return what verifies a token of a preview."""
        credential = PreviewToken(token, name.sandbox_id, name.port)
        return partial(self._edge.credentials.verify, credential)

    async def _by_cookie(self, headers: h.Headers, name: PortName) -> str | None:
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
                await self._admitting(token, name)()
                return token
        return None

    async def _by_credential(self, headers: h.Headers, name: PortName) -> "_Who":
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
        credential = Token(found)
        actor = (await self._edge.credentials.verify(credential)).actor
        self._edge.rates.count(actor)
        await self._previews.check(actor, name.sandbox_id)

        async def check() -> None:
            now = await self._edge.credentials.verify(credential)
            await self._previews.check(now.actor, name.sandbox_id)

        return _Who(actor, check, by_credential=True)

    async def _to_cookie(
        self, scope: Scope, name: PortName, query: bytes, token: str
    ) -> RefusalError:
        """Return the answer that gives a browser the cookie, and sends it on without the token."""
        admission = await self._admitting(token, name)()
        assert admission.expires_at is not None
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
        return RefusalError(302, "moved", sent_on, location=where, set_cookie=cookie)

    # --- passing on -------------------------------------------------------------------------

    @asynccontextmanager
    async def _dial(self, guest: _Guest) -> AsyncIterator[ByteStream]:
        """Connect to the guest.

        Raises:
            RefusedError: nothing listens on the port.
        """
        opening = self._previews.dial(guest.actor, guest.name.sandbox_id, guest.name.port)
        is_open = False
        try:
            async with opening as there:
                is_open = True
                yield there
        except GuestNotFoundError as error:
            if is_open:
                raise
            raise closed(guest.name.port) from error

    def _passage(self, scope: Scope, guest: _Guest) -> Passage:
        name, path = guest.name, bytes(scope.get("raw_path") or b"/")
        headers = h.to_guest(
            scope["headers"],
            port=name.port,
            hosts={name.host, name.full_host},
            client=_client_of(scope),
            scheme=self._scheme,
            query_token=QUERY_TOKEN,
            strips_authorization=guest.strips_authorization,
        )

        def rewrite(given: h.Headers) -> list[tuple[bytes, bytes]]:
            origin = f"{self._scheme}://{name.full_host}"
            adds_policy = name.token is not None
            found = h.to_client(given, origin=origin, port=name.port, adds_policy=adds_policy)
            return [*found, (b"x-request-id", scope["state"]["request_id"].encode())]

        return Passage(path + b"?" + guest.query if guest.query else path, headers, rewrite)


def _client_of(scope: Scope) -> str:
    client: tuple[str, int] = scope.get("client") or ("unknown", 0)
    return client[0]


def _without_token(query: bytes) -> tuple[bytes, list[str]]:
    """Return a query without our token, as it was otherwise, and the tokens in it."""
    name = QUERY_TOKEN.encode() + b"="
    parts = query.split(b"&") if query else []
    tokens = [one[len(name) :].decode("latin-1") for one in parts if one.startswith(name)]
    return b"&".join(one for one in parts if not one.startswith(name)), tokens


def _is_navigation(scope: Scope) -> bool:
    """Tell whether a browser navigates to a page, rather than a program requesting it."""
    headers = scope["headers"]
    if scope["type"] != "http" or scope["method"] not in ("GET", "HEAD"):
        return False
    mode = h.first(headers, b"sec-fetch-mode")
    if mode is not None:
        return mode == "navigate"
    return "text/html" in (h.first(headers, b"accept") or "")
