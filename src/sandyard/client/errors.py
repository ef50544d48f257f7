"""Errors of the SDK. Those about files, processes and time are Python's own as well, such as
`FileNotFoundError`."""

from collections.abc import Mapping
from errno import ENOSPC


class SandyardError(Exception):
    """Base of all errors of the SDK."""


class ApiError(SandyardError):
    """The server refused the request. `code` is for programs, the message for people.

    `details` holds additional values, such as `field` or `reason`.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int,
        code: str,
        request_id: str,
        details: Mapping[str, object] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.request_id = request_id
        self.details = dict(details or {})


class BadRequestError(ApiError):
    """The request is invalid; `details["field"]` names the field."""


class UnauthorizedError(ApiError):
    """The key is missing or invalid."""


class InsufficientCreditsError(ApiError):
    """The organization's credits do not suffice."""


class ForbiddenError(ApiError):
    """The key lacks a scope or a role, or the sandbox's user lacks a file permission."""


class NotFoundError(ApiError):
    """It does not exist, or belongs to another organization."""


class ConflictError(ApiError):
    """It exists already, or its state does not allow the request."""


class ChangedError(ConflictError):
    """A file is not as `if_match` says."""


class RateLimitedError(ApiError):
    """Too many requests. The SDK has already waited and retried."""


class NotImplementedYetError(ApiError):
    """The server's version does not support this."""


class UnavailableError(ApiError):
    """The server cannot serve the request now."""


class AbsentError(NotFoundError, FileNotFoundError):
    """There is no such file or directory in the sandbox."""


class NoProcessError(NotFoundError, ProcessLookupError):
    """There is no such process in the sandbox."""


class DeniedError(ForbiddenError, PermissionError):
    """The sandbox's user lacks a file permission."""


class ExistsError(ConflictError, FileExistsError):
    """The file or directory exists already."""


class IsFolderError(BadRequestError, IsADirectoryError):
    """The path leads to a directory."""


class NotFolderError(BadRequestError, NotADirectoryError):
    """The path leads to something other than a directory."""


class NoSpaceError(ConflictError, OSError):
    """The sandbox's disk, or the workspace, is full."""

    errno = ENOSPC


class TransferError(SandyardError):
    """A file or directory could not be copied; the message says why."""


class ConnectionFailedError(SandyardError, ConnectionError):
    """The server is unreachable, or closed the connection."""


class TimedOutError(ConnectionFailedError, TimeoutError):
    """The server did not answer in time."""


class NotReadyError(SandyardError):
    """A sandbox failed to start, or not in time."""


class StillStartingError(NotReadyError, TimeoutError):
    """A sandbox did not start in time."""


class CommandFailedError(SandyardError):
    """A checked command failed; `exit_code` has its exit code."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


_BY_STATUS: dict[int, type[ApiError]] = {
    400: BadRequestError, 401: UnauthorizedError, 402: InsufficientCreditsError,
    403: ForbiddenError, 404: NotFoundError, 409: ConflictError, 412: ChangedError,
    413: BadRequestError,
    429: RateLimitedError, 501: NotImplementedYetError, 502: UnavailableError,
    503: UnavailableError, 504: UnavailableError,
}  # fmt: skip
_BY_CODE: dict[str, type[ApiError]] = {
    "bad_request": BadRequestError, "unauthorized": UnauthorizedError,
    "invalid_token": UnauthorizedError, "token_expired": UnauthorizedError,
    "insufficient_credits": InsufficientCreditsError, "forbidden": ForbiddenError,
    "not_found": NotFoundError, "conflict": ConflictError, "invalid_state": ConflictError,
    "rate_limited": RateLimitedError, "unavailable": UnavailableError,
    "no_capacity": UnavailableError,
}  # fmt: skip

_BY_REASON: dict[str, type[ApiError]] = {
    "absent": AbsentError, "no_process": NoProcessError, "denied": DeniedError,
    "exists": ExistsError, "is_a_folder": IsFolderError, "not_a_folder": NotFolderError,
    "no_space": NoSpaceError,
}  # fmt: skip


def error_of(
    message: str,
    *,
    status: int,
    code: str,
    request_id: str,
    details: Mapping[str, object] | None = None,
) -> ApiError:
    """Return the error for an answer of the server, or for the last event of a stream."""
    reason = (details or {}).get("reason")
    kind = _BY_REASON.get(str(reason)) or _BY_STATUS.get(status) or _BY_CODE.get(code) or ApiError
    return kind(message, status=status, code=code, request_id=request_id, details=details)
