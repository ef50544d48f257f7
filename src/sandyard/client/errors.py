"""What the SDK raises."""

from collections.abc import Mapping


class SandyardError(Exception):
    """Base of all errors of the SDK."""


class ApiError(SandyardError):
    """The server refused; `code` is for programs, the message for people.

    `details` are the small values that go with some errors, such as `field` or `reason`.
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
    """Something asked for cannot be; `details["field"]` names what."""


class UnauthorizedError(ApiError):
    """There is no key, or it is not a good one."""


class InsufficientCreditsError(ApiError):
    """The organization cannot pay for it."""


class ForbiddenError(ApiError):
    """The key lacks a scope or a role; of a file, the user of the sandbox may not."""


class NotFoundError(ApiError):
    """There is no such thing, or it is another organization's."""


class ConflictError(ApiError):
    """Something is taken, exists already, or is not in the state for that."""


class RateLimitedError(ApiError):
    """Too many requests; the SDK has waited and tried again before it says so."""


class NotImplementedYetError(ApiError):
    """The server's version does not have that."""


class UnavailableError(ApiError):
    """The server cannot serve it now."""


class TransferError(SandyardError):
    """A file or folder could not be copied; the message says what was in the way."""


class ConnectionFailedError(SandyardError):
    """The server could not be reached, or broke off."""


class NotReadyError(SandyardError):
    """A sandbox did not come up, or not in time."""


class CommandFailedError(SandyardError):
    """A command that was to be checked did not end well; `exit_code` tells how."""

    def __init__(self, message: str, *, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


_BY_STATUS: dict[int, type[ApiError]] = {
    400: BadRequestError, 401: UnauthorizedError, 402: InsufficientCreditsError,
    403: ForbiddenError, 404: NotFoundError, 409: ConflictError, 413: BadRequestError,
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


def error_of(
    message: str,
    *,
    status: int,
    code: str,
    request_id: str,
    details: Mapping[str, object] | None = None,
) -> ApiError:
    """Return the error that a server's answer, or the last event of a stream, means."""
    kind = _BY_STATUS.get(status) or _BY_CODE.get(code) or ApiError
    return kind(message, status=status, code=code, request_id=request_id, details=details)
