"""What the client of a preview is told: what a guest answered, or an answer of our own."""

import html
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
from sandyard.server.gateway.pages import Message, said, status_line

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
        message: Message,
        *,
        refresh_s: int | None = None,
        **headers: str,
    ) -> None:
        super().__init__(message.title)
        self.status = status
        self.code = code
        self.message = message
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
            log.info("a preview was broken off: %s", refused.message.title)
            raise BrokenOffError
        accept = h.first(self._scope["headers"], b"accept") or ""
        found, body = said(
            refused.status,
            refused.code,
            refused.message,
            request_id=self._request_id,
            wants_page="text/html" in accept,
            refresh_s=refused.refresh_s,
            headers=refused.headers,
        )
        await self._start(refused.status, found)
        if self._scope.get("method") != "HEAD":
            await self.go_on(body)
        await self.end()


_URL = "<code>sandyard sandbox url</code> or <code>GET /v1/sandboxes/{id}/url?port=…</code>"
_LATER = "Try again later, or tell whoever sent it to you."
_LOG = "Its log, or a command in the sandbox, may say why."


def refusal_of(error: SandyardError) -> RefusedError:
    """Return what a person is told of an error."""
    match error:
        case RateLimitedError():
            message = Message("Too many requests", _text(error), "Wait a moment, and try again.",
                              "A link with a token in it is not limited.")  # fmt: skip
            return RefusedError(429, "rate_limited", message, retry_after=str(error.retry_after_s))
        case InvalidTokenError() | TokenExpiredError():
            return RefusedError(401, error.code, _NO_LONGER)
        case UnauthenticatedError():
            return RefusedError(401, error.code, _PRIVATE, www_authenticate="Bearer")
        case PermissionDeniedError():
            message = Message("You may not open this preview", _text(error),
                              "Ask whoever sent it to you for a link that has a token in it.",
                              "Use a key with the scope <code>sandbox:write</code>, or a link from "
                              f"{_URL}.")  # fmt: skip
            return RefusedError(403, error.code, message)
        case NotFoundError():
            return RefusedError(404, error.code, _NO_SUCH_SANDBOX)
        case QuotaExceededError():
            message = Message("The sandbox is paused", _text(error), _LATER,
                              "<code>sandyard usage</code> shows what was used.")  # fmt: skip
            return RefusedError(402, error.code, message)
        case ConflictError():
            message = Message("The sandbox does not run", _text(error), _LATER,
                              "<code>sandyard sandbox get</code> shows its status, and <code>"
                              "sandyard sandbox resume</code> resumes it.")  # fmt: skip
            return RefusedError(409, error.code, message)
        case _:
            message = Message("The sandbox cannot be reached just now",
                              f"{_text(error)} This page tries again by itself.",
                              "Wait a moment.",
                              "If it stays so, <code>sandyard doctor</code> on the server may say "
                              "why.")  # fmt: skip
            return RefusedError(503, error.code, message, refresh_s=_REFRESH_S, retry_after="2")


def _text(error: SandyardError) -> str:
    shown = html.escape(error.message, quote=False)
    return f"{shown[:1].upper()}{shown[1:]}."


def closed(port: int) -> RefusedError:
    """Return what is told where nothing listens."""
    message = Message(
        f"Nothing listens on port {port} yet",
        "The sandbox runs, but nothing in it accepts connections on this port. This page tries "
        "again by itself.",
        "Wait a moment: a server that was just started may need some time.",
        f"Start your server, and have it listen on port {port}; <code>127.0.0.1</code> is enough.",
    )
    return RefusedError(502, "bad_gateway", message, refresh_s=_REFRESH_S)


_NO_LONGER = Message(
    "This link does not work any more",
    "Its token has expired, is unknown, or was made for another address.",
    "Ask whoever sent it to you for a new one.",
    f"Get a new one with {_URL}.",
)
_PRIVATE = Message(
    "This preview is private",
    "The address alone lets nobody in.",
    "Ask whoever sent it to you for a link that has a token in it.",
    f"Get a link with {_URL}, or send <code>Authorization: Bearer</code> and an API key.",
)
_NO_SUCH_SANDBOX = Message(
    "This sandbox does not exist",
    "It was deleted, or there never was one.",
    "Ask whoever sent it to you whether there is a newer one.",
    "<code>sandyard sandbox list</code> shows the ones that you have.",
)
NO_SUCH_NAME = 404, "not_found", Message(
    "There is no preview at this address",
    "The host name of a preview is <code>{port}-{sandbox id}</code>, with or without a token, and "
    "the port is 1 to 65535 and not the platform's own.",
    "Check that you have the whole link.",
    f"Get the whole address with {_URL}.",
)  # fmt: skip
NOT_PASSED_ON = 400, "bad_request", Message(
    "This request cannot be passed on",
    "It has a header that HTTP does not allow.",
    "Try another browser.",
    "Look at what your client sends.",
)  # fmt: skip
SEVERAL_HOSTS = 400, "bad_request", Message(
    "This request cannot be passed on",
    "It names several hosts.",
    "Try another browser.",
    "Have your client send one Host header.",
)  # fmt: skip
NO_METHOD = 400, "bad_request", Message(
    "This request cannot be passed on",
    "Its method is not one that a preview knows.",
    "Try another browser.",
    "Send another than CONNECT, and GET for a WebSocket.",
)  # fmt: skip
SILENT = 504, "gateway_timeout", Message(
    "The sandbox does not answer",
    "What listens on this port took the request, and has not answered it.",
    _LATER,
    _LOG,
)  # fmt: skip
HUNG_UP = 502, "bad_gateway", Message(
    "The sandbox hung up",
    "What listens on this port closed the connection without an answer.",
    _LATER,
    _LOG,
)  # fmt: skip
NO_HTTP = 502, "bad_gateway", Message(
    "The sandbox answers, but not in HTTP",
    "What listens on this port does not speak HTTP/1.1.",
    "Check that you have the whole link: another port may be meant.",
    "Serve HTTP/1.1 without TLS there; for other protocols there is "
    "<code>sandyard sandbox ssh -L</code>.",
)  # fmt: skip
