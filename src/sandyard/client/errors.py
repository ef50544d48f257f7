"""What the SDK raises."""

from collections.abc import Mapping


class ApiError(Exception):
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


class TransferError(Exception):
    """A file or folder could not be copied; the message says what was in the way."""


class ConnectionFailedError(Exception):
    """The server could not be reached, or broke off."""
