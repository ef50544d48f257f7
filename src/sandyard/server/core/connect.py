"""The Connect protocol with JSON, without I/O: codes, envelopes, and values as proto3 has them.

Source: the Connect protocol reference (connectrpc.com/docs/protocol) and the JSON mapping of
Protocol Buffers 3. Only what the E2B face needs: no compression, and no binary messages.
"""

import base64
import binascii
import json
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Final

ENVELOPE_MAX: Final = 4 * 1024 * 1024
"""The size limit of a message, in bytes."""
UNARY_TYPE: Final = "application/json"
STREAM_TYPE: Final = "application/connect+json"
_HEAD = struct.Struct(">BI")
_COMPRESSED, _END = 1, 2
_DEPTH_MAX = 50
_INT64 = range(-(2**63), 2**63)
_INTEGER = re.compile(r"-?[0-9]{1,19}")


class Code(StrEnum):
    """What went wrong, as the protocol names it."""

    CANCELED = "canceled"
    UNKNOWN = "unknown"
    INVALID_ARGUMENT = "invalid_argument"
    DEADLINE_EXCEEDED = "deadline_exceeded"
    NOT_FOUND = "not_found"
    ALREADY_EXISTS = "already_exists"
    PERMISSION_DENIED = "permission_denied"
    RESOURCE_EXHAUSTED = "resource_exhausted"
    FAILED_PRECONDITION = "failed_precondition"
    ABORTED = "aborted"
    OUT_OF_RANGE = "out_of_range"
    UNIMPLEMENTED = "unimplemented"
    INTERNAL = "internal"
    UNAVAILABLE = "unavailable"
    DATA_LOSS = "data_loss"
    UNAUTHENTICATED = "unauthenticated"


STATUS_OF: Final[Mapping[Code, int]] = {
    Code.CANCELED: 499,
    Code.UNKNOWN: 500,
    Code.INVALID_ARGUMENT: 400,
    Code.DEADLINE_EXCEEDED: 504,
    Code.NOT_FOUND: 404,
    Code.ALREADY_EXISTS: 409,
    Code.PERMISSION_DENIED: 403,
    Code.RESOURCE_EXHAUSTED: 429,
    Code.FAILED_PRECONDITION: 400,
    Code.ABORTED: 409,
    Code.OUT_OF_RANGE: 400,
    Code.UNIMPLEMENTED: 501,
    Code.INTERNAL: 500,
    Code.UNAVAILABLE: 503,
    Code.DATA_LOSS: 500,
    Code.UNAUTHENTICATED: 401,
}
"""The HTTP status of a unary answer with an error."""


class ConnectError(Exception):
    """A request that cannot be read."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.message = message


def error_value(code: Code, message: str) -> dict[str, str]:
    """Return an error as JSON has it."""
    return {"code": code.value, "message": message}


def encode_message(value: Mapping[str, Any]) -> bytes:
    """Return a message in an envelope."""
    return _envelope(0, _written(value))


def encode_end(error: Mapping[str, Any] | None = None) -> bytes:
    """Return the envelope that ends a stream: in good order, or with an error."""
    return _envelope(_END, _written({} if error is None else {"error": error}))


def _envelope(flags: int, payload: bytes) -> bytes:
    return _HEAD.pack(flags, len(payload)) + payload


def _written(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def read_message(payload: bytes) -> dict[str, Any]:
    """Return a message.

    Raises:
        ConnectError: it is not a JSON object.
    """
    try:
        value = json.loads(payload) if payload else {}
    except (ValueError, RecursionError) as error:
        raise ConnectError(Code.INVALID_ARGUMENT, f"the message is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConnectError(Code.INVALID_ARGUMENT, "the message is not a JSON object")
    _check_depth(value, _DEPTH_MAX)
    return value


def _check_depth(value: object, left: int) -> None:
    if left == 0:
        raise ConnectError(Code.INVALID_ARGUMENT, "the message is nested too deeply")
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            _check_depth(one, left - 1)


@dataclass(frozen=True)
class Envelope:
    """A message of a stream, or what ends it."""

    payload: bytes
    is_end: bool = False


class EnvelopeDecoder:
    """Takes a stream of envelopes apart."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> None:
        """Add bytes as they come."""
        self._buffer += data

    def take(self) -> Envelope | None:
        """Return the next envelope, or None if it is not whole yet.

        Raises:
            ConnectError: it is compressed or too long, or its flags are unknown.
        """
        if len(self._buffer) < _HEAD.size:
            return None
        flags, size = _HEAD.unpack_from(self._buffer)
        if flags & _COMPRESSED:
            raise ConnectError(Code.UNIMPLEMENTED, "compressed messages are not supported")
        if flags & ~_END:
            raise ConnectError(Code.INVALID_ARGUMENT, f"the envelope has unknown flags: {flags}")
        if size > ENVELOPE_MAX:
            raise ConnectError(
                Code.RESOURCE_EXHAUSTED, f"the message has {size} bytes; {ENVELOPE_MAX} at most"
            )
        end = _HEAD.size + size
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[_HEAD.size : end])
        del self._buffer[:end]
        return Envelope(payload, is_end=bool(flags & _END))

    def finish(self) -> None:
        """Tell that no more bytes come.

        Raises:
            ConnectError: an envelope is cut off.
        """
        if self._buffer:
            raise ConnectError(Code.INVALID_ARGUMENT, "the stream is cut off within a message")


class Fields:
    """The fields of a message. Names are accepted in camelCase and snake_case, and unknown ones are
    ignored, as proto3 demands; null is absent."""

    def __init__(self, value: Mapping[str, Any], *, where: str = "") -> None:
        self._value = value
        self._where = where

    def __contains__(self, name: str) -> bool:
        return self._find(name) is not None

    def text(self, name: str, default: str = "") -> str:
        """Return a string.

        Raises:
            ConnectError: it is none. So with the others.
        """
        found = self._find(name)
        if found is None:
            return default
        if not isinstance(found, str) or not _is_unicode(found):
            raise self._wrong(name, "a string")
        return found

    def flag(self, name: str, *, default: bool = False) -> bool:
        """Return a boolean."""
        found = self._find(name)
        if found is None:
            return default
        if not isinstance(found, bool):
            raise self._wrong(name, "true or false")
        return found

    def integer(self, name: str, default: int = 0) -> int:
        """Return an integer: a number, or a string with one."""
        found = self._find(name)
        if found is None:
            return default
        if isinstance(found, str) and _INTEGER.fullmatch(found):
            found = int(found)
        if isinstance(found, float) and found.is_integer():
            found = int(found)
        if isinstance(found, bool) or not isinstance(found, int) or found not in _INT64:
            raise self._wrong(name, "an integer")
        return found

    def data(self, name: str) -> bytes:
        """Return bytes: a string in either alphabet of base64, with or without padding."""
        found = self.text(name)
        try:
            plain = found.translate(str.maketrans("-_", "+/")).rstrip("=")
            return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
        except (binascii.Error, ValueError) as error:
            raise self._wrong(name, "base64") from error

    def choice(self, name: str, numbers: Mapping[str, int], default: str) -> str:
        """Return the name of an enum's value, which may come as its number."""
        found = self._find(name)
        if found is None:
            return default
        if isinstance(found, int) and not isinstance(found, bool):
            found = {number: one for one, number in numbers.items()}.get(found)
        if not isinstance(found, str) or found not in numbers:
            raise self._wrong(name, f"one of {', '.join(numbers)}")
        return found

    def texts(self, name: str) -> tuple[str, ...]:
        """Return a list of strings."""
        found = self._find(name)
        if found is None:
            return ()
        if not isinstance(found, list) or not _are_texts(found):
            raise self._wrong(name, "a list of strings")
        return tuple(found)

    def mapping(self, name: str) -> dict[str, str]:
        """Return a map of strings."""
        found = self._find(name)
        if found is None:
            return {}
        if not isinstance(found, dict) or not _are_texts([*found, *found.values()]):
            raise self._wrong(name, "an object of strings")
        return dict(found)

    def message(self, name: str) -> "Fields | None":
        """Return a nested message; None if it is absent."""
        found = self._find(name)
        if found is None:
            return None
        if not isinstance(found, dict):
            raise self._wrong(name, "an object")
        return Fields(found, where=f"{self._where}{name}.")

    def _find(self, name: str) -> Any:
        found = self._value.get(name)
        return self._value.get(_snake(name)) if found is None else found

    def _wrong(self, name: str, what: str) -> ConnectError:
        return ConnectError(Code.INVALID_ARGUMENT, f"{self._where}{name} must be {what}")


def _are_texts(values: list[Any]) -> bool:
    return all(isinstance(one, str) and _is_unicode(one) for one in values)


def _is_unicode(text: str) -> bool:
    """Tell whether a string can be written as UTF-8: escapes in JSON may name lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _snake(name: str) -> str:
    return re.sub(r"[A-Z]", lambda found: f"_{found[0].lower()}", name)


def encode_data(data: bytes) -> str:
    """Return bytes as JSON has them."""
    return base64.b64encode(data).decode()


def encode_time(at: datetime) -> str:
    """Return a time as JSON has it: RFC 3339, in UTC."""
    return at.astimezone(UTC).isoformat().replace("+00:00", "Z")
