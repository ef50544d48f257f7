"""Errors as the E2B API reports them: on its control API, as HTTP of a sandbox, and as Connect."""

from typing import Final

from starlette.requests import HTTPConnection
from starlette.responses import JSONResponse, Response

from sandyard.server.core import connect
from sandyard.server.core.errors import (
    AlreadyExistsError,
    Code,
    ConflictError,
    DeadlineExceededError,
    GuestNotFoundError,
    InvalidArgumentError,
    KeyReusedError,
    LimitReachedError,
    NotFoundError,
    NotImplementedYetError,
    PayloadTooLargeError,
    PermissionDeniedError,
    QuotaExceededError,
    RateLimitedError,
    SandyardError,
    UnauthenticatedError,
    UnavailableError,
    UnsupportedError,
)
from sandyard.server.core.states import ON_ITS_WAY_UP, Status
from sandyard.server.core.wire import Refusal
from sandyard.server.front.status import STATUS

GONE: Final = "The sandbox was not found"
CLOSED: Final = "The sandbox is running but port is not open"
"""Sentences that clients know."""
_STATUS: Final = {
    **STATUS,
    Code.IDEMPOTENCY_KEY_REUSED: 422,
    Code.DAMAGED: 500,
    Code.UNSUPPORTED: 501,
}
_FIELDS: Final = {
    "template": "templateID",
    "idle_timeout": "timeout",
    "expires_in": "timeout",
    "env": "envVars",
    "idempotency_key": "Idempotency-Key",
    "snapshot": "templateID",
    "slug": "name",
    "base": "fromTemplate",
    "image": "fromImage",
    "defaults.vcpus": "cpuCount",
    "defaults.memory": "memoryMB",
    "defaults.disk": "minFreeDiskMb",
    "start": "startCmd",
    "ready": "readyCmd",
    "network.allow": "network.allowOut",
    "network.deny": "network.denyOut",
}
_RETRY_S = 1
_ENDED = frozenset(Status) - ON_ITS_WAY_UP - {Status.RUNNING, Status.SUSPECTED_MISSING}


def field_name(field: str) -> str:
    """Return the name that a field of the domain has in this API."""
    return _FIELDS.get(field, field)


# --- the control API ------------------------------------------------------------------------


def render_control(connection: HTTPConnection, error: SandyardError) -> Response:
    """Return an error of the control API."""
    status = _STATUS.get(error.code, 500)
    body: dict[str, object] = {"code": status, "message": error.message_with(field_name)}
    if isinstance(error, KeyReusedError):
        body["error_code"] = "idempotency_request_mismatch"
    elif isinstance(error.facts.get("error_code"), str):
        body["error_code"] = error.facts["error_code"]
    return JSONResponse(body, status_code=status, headers=_retry_of(error, status))


def _retry_of(error: SandyardError, status: int) -> dict[str, str]:
    """Return when a client may try again; clients repeat some statuses by themselves."""
    if isinstance(error, RateLimitedError):
        return {"Retry-After": str(error.retry_after_s)}
    if status == 503:
        return {"Retry-After": str(_RETRY_S)}
    return {"Should-Retry": "false"} if status in (502, 504) else {}


# --- sandboxes ------------------------------------------------------------------------------


def is_gone(error: SandyardError) -> bool:
    """Tell whether an error says that the sandbox is gone, or not running and not to be resumed."""
    if isinstance(error, NotFoundError):
        return not isinstance(error, GuestNotFoundError)
    return isinstance(error, ConflictError) and error.facts.get("status") in _ENDED


def gone(sandbox_id: str) -> Response:
    """Return the answer for a sandbox that is gone."""
    body = {"sandboxId": sandbox_id, "message": GONE, "code": 502}
    return JSONResponse(body, status_code=502)


def closed(sandbox_id: str, port: int) -> Response:
    """Return the answer for a port at which nothing listens."""
    body = {"sandboxId": sandbox_id, "message": CLOSED, "port": port, "code": 502}
    return JSONResponse(body, status_code=502)


def render_envd(sandbox_id: str, error: SandyardError) -> Response:
    """Return an error of a sandbox's daemon, as plain HTTP."""
    if is_gone(error):
        return gone(sandbox_id)
    status = connect.STATUS_OF[code_of(error)]
    match error:
        case ConflictError() if error.facts.get("reason") == Refusal.NO_SPACE.value:
            status = 507
        case PayloadTooLargeError():
            status = 413
        case InvalidArgumentError() if error.facts.get("reason") == _OTHER_TYPE:
            status = 415
    body = {"code": status, "message": message_of(error)}
    return JSONResponse(body, status_code=status, headers=_retry_of(error, status))


_OTHER_TYPE = "media_type"


def other_type(given: str) -> InvalidArgumentError:
    """Return the error for a body of a type that is not supported."""
    return InvalidArgumentError(
        f"cannot read a body of the type {given[:100] or '(none)'}: messages are JSON here, of the "
        "type application/json, or application/connect+json for streams",
        reason=_OTHER_TYPE,
    )


def code_of(error: SandyardError) -> connect.Code:
    """Return the code that an error has in Connect."""
    reason = error.facts.get("reason")
    match error:
        case UnauthenticatedError():
            return connect.Code.UNAUTHENTICATED
        case InvalidArgumentError():
            is_user = reason == Refusal.NO_USER.value
            return connect.Code.UNAUTHENTICATED if is_user else connect.Code.INVALID_ARGUMENT
        case PermissionDeniedError():
            return connect.Code.PERMISSION_DENIED
        case NotFoundError():
            return connect.Code.NOT_FOUND
        case AlreadyExistsError():
            return connect.Code.ALREADY_EXISTS
        case ConflictError() if reason == Refusal.NO_SPACE.value:
            return connect.Code.RESOURCE_EXHAUSTED
        case ConflictError() | QuotaExceededError():
            return connect.Code.FAILED_PRECONDITION
        case LimitReachedError() | RateLimitedError() | PayloadTooLargeError():
            return connect.Code.RESOURCE_EXHAUSTED
        case UnsupportedError() | NotImplementedYetError():
            return connect.Code.UNIMPLEMENTED
        case DeadlineExceededError():
            return connect.Code.DEADLINE_EXCEEDED
        case UnavailableError():
            return connect.Code.UNAVAILABLE
        case _:
            return connect.Code.INTERNAL


def message_of(error: SandyardError) -> str:
    """Return the sentence of an error of a sandbox."""
    return error.message_with(field_name)
