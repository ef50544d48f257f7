"""Refusals: the errors that the client of a preview gets instead of an answer of the guest."""

import html
import logging

from starlette.types import Scope

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
from sandyard.server.front.answer import ProxyAnswer
from sandyard.server.front.exchange import BrokenOffError
from sandyard.server.front.headers import first
from sandyard.server.gateway.error_page import Message, rendered

log = logging.getLogger(__name__)

_REFRESH_S = 2


class RefusalError(Exception):
    """An error: its status, its code for programs, and its text for people."""

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


async def refuse(scope: Scope, answer: ProxyAnswer, refused: RefusalError, request_id: str) -> None:
    """Send an error as the answer to a request.

    Raises:
        BrokenOffError: another answer has begun, and its connection must be reset.
    """
    if answer.has_begun:
        log.info("aborting the answer of a preview: %s", refused.message.title)
        raise BrokenOffError
    accept = first(scope["headers"], b"accept") or ""
    headers, body = rendered(
        refused.status,
        refused.code,
        refused.message,
        request_id=request_id,
        wants_page="text/html" in accept,
        refresh_s=refused.refresh_s,
        headers=refused.headers,
    )
    await answer.begin(refused.status, headers)
    if scope.get("method") != "HEAD":
        await answer.write(body)
    await answer.end()


_URL = "<code>sandyard sandbox url</code> or <code>GET /v1/sandboxes/{id}/url?port=…</code>"
_LATER = "Try again later, or tell the sender."
_LOG = "Its log, or a command in the sandbox, may say why."


def refusal_of(error: SandyardError) -> RefusalError:
    """Return the refusal for an error."""
    match error:
        case RateLimitedError():
            message = Message("Too many requests", _text(error), "Wait a moment, and try again.",
                              "A link with a token in it is not limited.")  # fmt: skip
            return RefusalError(429, "rate_limited", message, retry_after=str(error.retry_after_s))
        case InvalidTokenError() | TokenExpiredError():
            return RefusalError(401, error.code, _NO_LONGER)
        case UnauthenticatedError():
            return RefusalError(401, error.code, _PRIVATE, www_authenticate="Bearer")
        case PermissionDeniedError():
            message = Message("You may not open this preview", _text(error),
                              "Ask the sender for a link that has a token in it.",
                              "Use a key with the scope <code>sandbox:write</code>, or a link from "
                              f"{_URL}.")  # fmt: skip
            return RefusalError(403, error.code, message)
        case NotFoundError():
            return RefusalError(404, error.code, _NO_SUCH_SANDBOX)
        case QuotaExceededError():
            message = Message("The sandbox is paused", _text(error), _LATER,
                              "<code>sandyard usage</code> shows what was used.")  # fmt: skip
            return RefusalError(402, error.code, message)
        case ConflictError():
            message = Message("The sandbox does not run", _text(error), _LATER,
                              "<code>sandyard sandbox get</code> shows its status, and <code>"
                              "sandyard sandbox resume</code> resumes it.")  # fmt: skip
            return RefusalError(409, error.code, message)
        case _:
            message = Message("The sandbox cannot be reached just now",
                              f"{_text(error)} This page tries again by itself.",
                              "Wait a moment.",
                              "If it stays so, <code>sandyard doctor</code> on the server may say "
                              "why.")  # fmt: skip
            return RefusalError(503, error.code, message, refresh_s=_REFRESH_S, retry_after="2")


def _text(error: SandyardError) -> str:
    shown = html.escape(error.message, quote=False)
    return f"{shown[:1].upper()}{shown[1:]}."


def closed(port: int) -> RefusalError:
    """Return the refusal for a port that nothing listens on."""
    message = Message(
        f"Nothing listens on port {port} yet",
        "The sandbox runs, but nothing in it accepts connections on this port. This page tries "
        "again by itself.",
        "Wait a moment: a server that was just started may need some time.",
        f"Start your server, and have it listen on port {port}; <code>127.0.0.1</code> is enough.",
    )
    return RefusalError(502, "bad_gateway", message, refresh_s=_REFRESH_S)


_NO_LONGER = Message(
    "This link does not work any more",
    "Its token has expired, is unknown, or was made for another address.",
    "Ask the sender for a new link.",
    f"Get a new one with {_URL}.",
)
_PRIVATE = Message(
    "This preview is private",
    "The address alone lets nobody in.",
    "Ask the sender for a link that has a token in it.",
    f"Get a link with {_URL}, or send <code>Authorization: Bearer</code> and an API key.",
)
_NO_SUCH_SANDBOX = Message(
    "This sandbox does not exist",
    "It was deleted, or there never was one.",
    "Ask the sender whether there is a newer link.",
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
