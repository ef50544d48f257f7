"""What the client of a preview is told: what a guest answered, or an answer of our own."""

import logging

import h11
from starlette.types import Scope, Send

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
from sandyard.server.gateway import headers as h
from sandyard.server.gateway.exchange import BrokenOffError
from sandyard.server.gateway.headers import Headers
from sandyard.server.gateway.hosts import PreviewName
from sandyard.server.gateway.pages import said, status_line

log = logging.getLogger(__name__)

TUNNEL = "sandyard.tunnel"
"""The kind of scope of a connection that is to become another protocol's: its `stream` is raw."""
_REFRESH_S = 2
_NO_BODY = frozenset({204, 304})


class RefusedError(Exception):
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


class Answering:
    """The answer to a client, by ASGI or on its raw connection; no more than one is ever begun."""

    def __init__(self, scope: Scope, send: Send, request_id: str) -> None:
        self.status = 499  # the client left before there was any
        self._scope = scope
        self._send = send
        self._request_id = request_id
        self._has_begun = self._may_have_trailers = False
        self._name: PreviewName | None = None
        self._origin = ""

    def is_for(self, name: PreviewName, scheme: str) -> None:
        """Say which preview it is of."""
        self._name = name
        self._origin = f"{scheme}://{name.full_host}"

    async def begin(
        self, response: h11.Response | h11.InformationalResponse, *, is_last: bool = False
    ) -> None:
        """Send the head of a guest's answer; one that `is_last` is the last on its connection."""
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
        if is_last:
            found.append((b"connection", b"close"))
        # Whether there are trailers is known after the body alone.
        self._may_have_trailers = any(name == b"transfer-encoding" for name, _ in response.headers)
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
            await self._send(
                {
                    "type": "http.response.start",
                    "status": status,
                    "headers": headers,
                    "trailers": self._may_have_trailers,
                }
            )

    async def go_on(self, piece: bytes) -> None:
        """Send a piece of the body."""
        if self._scope["type"] == TUNNEL:
            await self._scope["stream"].write(piece)
        else:
            await self._send({"type": "http.response.body", "body": piece, "more_body": True})

    async def end(self, trailers: Headers = ()) -> None:
        """Say that that was all but for trailers."""
        if self._scope["type"] == TUNNEL:
            return
        await self._send({"type": "http.response.body", "body": b""})
        if self._may_have_trailers:
            found = h.trailers_of([(name.lower(), value) for name, value in trailers])
            await self._send({"type": "http.response.trailers", "headers": found})

    async def refuse(self, refused: RefusedError) -> None:
        """Send an answer of our own; half of another cannot be taken back, and is broken off."""
        if self._has_begun:
            log.info("a preview was broken off: %s", refused.title)
            raise BrokenOffError
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


def refusal_of(error: SandyardError) -> RefusedError:
    """Return what a person is told of an error."""
    match error:
        case RateLimitedError():
            wait = str(error.retry_after_s)
            return RefusedError(429, "rate_limited", "Too many requests", _text(error),
                            retry_after=wait)  # fmt: skip
        case InvalidTokenError() | TokenExpiredError():
            return RefusedError(401, error.code, "This address does not let you in",
                            "Its token is unknown, was for another address, or has expired. Ask "
                            "for a new one: <code>GET /v1/sandboxes/{id}/url?port=…</code>, or "
                            "<code>sandyard sandbox url</code>.")  # fmt: skip
        case UnauthenticatedError():
            return RefusedError(401, error.code, "Who are you?",
                            "This preview is private. Use the address that <code>sandyard sandbox "
                            "url</code> or <code>GET /v1/sandboxes/{id}/url?port=…</code> gives, "
                            "or send <code>Authorization: Bearer</code> and an API key.",
                            www_authenticate="Bearer")  # fmt: skip
        case PermissionDeniedError():
            return RefusedError(403, error.code, "You may not see this", _text(error))
        case NotFoundError():
            return RefusedError(404, error.code, "There is no such sandbox",
                            "It was deleted, or never was.")  # fmt: skip
        case QuotaExceededError():
            return RefusedError(402, error.code, "The sandbox stands still", _text(error))
        case ConflictError():
            return RefusedError(409, error.code, "The sandbox does not run", _text(error))
        case _:
            title = "The sandbox cannot be reached just now"
            return RefusedError(503, error.code, title, _text(error),
                            refresh_s=_REFRESH_S, retry_after="2")  # fmt: skip


def _text(error: SandyardError) -> str:
    shown = error.message.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return f"{shown[:1].upper()}{shown[1:]}."


def closed(port: int) -> RefusedError:
    """Return what is told where nothing listens."""
    return RefusedError(
        502, "bad_gateway", f"Nothing listens on port {port} yet",
        f"The sandbox runs, but nothing in it listens on port {port}. This page looks again by "
        "itself.", refresh_s=_REFRESH_S,
    )  # fmt: skip


NO_SUCH_NAME = (
    404, "not_found", "There is no such preview",
    "The name of a preview is <code>{port}-{sandbox id}</code>, with or without a token, and the "
    "port is 1 to 65535 and not the platform's own.",
)  # fmt: skip
NOT_PASSED_ON = (
    400, "bad_request", "This cannot be passed on",
    "The request has a header that HTTP does not allow.",
)  # fmt: skip
SILENT = (
    504, "gateway_timeout", "The sandbox does not answer",
    "What listens there took the request and said nothing to it.",
)  # fmt: skip
HUNG_UP = (
    502, "bad_gateway", "The sandbox hung up",
    "What listens on this port closed the connection without an answer. Its log may say why.",
)  # fmt: skip
NO_HTTP = (
    502, "bad_gateway", "The sandbox answers, but not in HTTP",
    "What listens on this port does not speak HTTP/1.1.",
)  # fmt: skip
