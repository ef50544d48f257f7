"""Errors as HTTP answers: the only place that knows which status belongs to which code."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.routing import Match

from sandyard.server.core.errors import (
    Code,
    InternalError,
    InvalidArgumentError,
    NotFoundError,
    RateLimitedError,
    SandyardError,
)
from sandyard.server.front.status import STATUS

# Codes that clients of the contract do not know are shown as the one they do.
_SHOWN = {
    Code.UNSUPPORTED: Code.BAD_REQUEST,
    Code.DEADLINE_EXCEEDED: Code.UNAVAILABLE,
    Code.DAMAGED: Code.INVALID_STATE,
    Code.INCOMPATIBLE: Code.INVALID_STATE,
    Code.LIMIT_REACHED: Code.CONFLICT,
}
_HINTS = {
    Code.UNAUTHORIZED: "send `Authorization: Bearer <API key>`",
    Code.WORKSPACE_IN_USE: "or repeat the request with force=true (`--force` on the command line)",
    Code.INSUFFICIENT_CREDITS: "top up (POST /v1/billing/topup), or have an operator grant credits "
    "(`sandyard admin grant`)",
}
"""What to do, where that is a request of this API."""
_SNAKE = re.compile(r"_([a-z])")
_WIRE_NAMES = {"api_key": "api_key", "idempotency_key": "Idempotency-Key"}
"""Fields that are not the domain's name in camel case."""
_SECRET = re.compile(r"password|secret|token|\benv\b|stdin|data|contents|code", re.IGNORECASE)
_VALUE_MAX = 60
_RETRY_AFTER_S = "2"
_METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")


class UnknownFieldError(ValueError):
    """A body has a field with this `name`, which there is not."""

    def __init__(self, name: str, known: Sequence[str]) -> None:
        super().__init__(f"there is no such field; there are {', '.join(known)}")
        self.name = name


def wire_name(field: str) -> str:
    """Return this API's name of a field of the domain: `mounts.0.workspace_id` is
    `mounts.0.workspaceId`."""
    return _WIRE_NAMES.get(field) or _SNAKE.sub(lambda found: found[1].upper(), field)


def error_out(error: SandyardError) -> dict[str, object]:
    """Return an error as the last event of a stream reports it."""
    if isinstance(error, InternalError):
        return {"code": error.code.value, "message": "something broke on the server"}
    return _body(error, wire_name)


def answer_error(
    connection: HTTPConnection, error: SandyardError, *, name: Callable[[str], str] = wire_name
) -> JSONResponse:
    """Return the envelope of an error. `name` turns fields of the domain into this API's."""
    status = STATUS[error.code]
    body = _body(error, name)
    if isinstance(error, InternalError):
        # What broke is for the log; the client gets the id under which it is found there.
        body["message"] = "something broke on the server; its log has the details under requestId"
        body.pop("details", None)
    body["requestId"] = connection.state.request_id
    headers = {"Retry-After": _RETRY_AFTER_S} if status in (429, 503) else {}
    if isinstance(error, RateLimitedError):
        headers["Retry-After"] = str(error.retry_after_s)
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse({"error": body}, status_code=status, headers=headers)


def _body(error: SandyardError, name: Callable[[str], str]) -> dict[str, object]:
    hint = _HINTS.get(error.code)
    message = _without_nul(error.message_with(name))
    body: dict[str, object] = {
        "code": _SHOWN.get(error.code, error.code).value,
        "message": f"{message}; {hint}" if hint else message,
    }
    if error.facts:
        body["details"] = {
            wire_name(fact): name(value)
            if fact in ("field", "limit") and isinstance(value, str)
            else _without_nul(value)
            if isinstance(value, str)
            else value
            for fact, value in error.facts.items()
        }
    return body


def _without_nul(text: str) -> str:
    """Return a text, which may quote a request, without U+0000: the schema excludes it."""
    return text.replace("\0", "\N{REPLACEMENT CHARACTER}")


def install_handlers(app: FastAPI) -> None:
    """Make every error that a route raises come out in the envelope."""

    @app.exception_handler(SandyardError)
    async def intended(request: Request, error: SandyardError) -> JSONResponse:
        if isinstance(error, InternalError):
            request.app.state.log.error("a request failed", exc_info=error)
        return answer_error(request, error)

    @app.exception_handler(RequestValidationError)
    async def refused(request: Request, error: RequestValidationError) -> JSONResponse:
        # Its fields are named as the client sent them.
        return answer_error(request, _translated(error), name=str)

    @app.exception_handler(HTTPException)
    async def routed(request: Request, error: HTTPException) -> JSONResponse:
        if isinstance(error.__cause__, SandyardError):
            # FastAPI turns whatever is raised while it reads a body into this.
            return answer_error(request, error.__cause__)
        if error.status_code == 404:
            return answer_error(
                request, NotFoundError(f"cannot find {request.url.path}: see /docs for the routes")
            )
        answer = answer_error(
            request,
            InvalidArgumentError(f"cannot {request.method} {request.url.path}: {error.detail}"),
        )
        answer.status_code = error.status_code
        answer.headers.update(error.headers or {})
        if error.status_code == 405:
            answer.headers["Allow"] = ", ".join(_allowed(request))
        return answer


def _allowed(request: Request) -> list[str]:
    """Return every method that some route takes at a request's path."""
    scope = dict(request.scope)
    found = [
        method
        for method in _METHODS
        if any(
            route.matches({**scope, "method": method})[0] is Match.FULL
            for route in request.app.router.routes
        )
    ]
    return ["HEAD", *found] if "GET" in found else found


def _translated(error: RequestValidationError) -> InvalidArgumentError:
    first = error.errors()[0]
    place = [str(part) for part in first.get("loc", ())]
    # The first says where it stood; a field may be called so, too.
    place = place[1:] if place[:1] and place[0] in ("body", "query", "path") else place
    if first.get("type") == "json_invalid":
        return InvalidArgumentError("cannot read the body: it is not valid JSON", field="body")
    unknown = (first.get("ctx") or {}).get("error")
    if isinstance(unknown, UnknownFieldError):
        field = ".".join([*place, unknown.name])
        return InvalidArgumentError(f"cannot use {field}: {unknown}", field=field)
    field = ".".join(place) or "body"
    return InvalidArgumentError(
        f"cannot use {field}: {first.get('msg', 'wrong value')}{_value_of(first)}", field=field
    )


def _value_of(error: Mapping[str, Any]) -> str:
    """Return the value that was refused, for a message, if it is short and can be no secret."""
    value, place = error.get("input"), [str(part) for part in error.get("loc", ())]
    is_shown = isinstance(value, str | int | float) and not _SECRET.search(" ".join(place))
    if not is_shown or error.get("type") == "missing":
        return ""
    shown = repr(value)
    return f"; it is {shown if len(shown) <= _VALUE_MAX else f'{shown[:_VALUE_MAX]}…'}"
