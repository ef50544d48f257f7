"""What the SDK raises."""


class ApiError(Exception):
    """The server refused; `code` is for programs, the message for people."""

    def __init__(self, message: str, *, status: int, code: str, request_id: str) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.code = code
        self.request_id = request_id


class ConnectionFailedError(Exception):
    """The server could not be reached, or broke off."""
