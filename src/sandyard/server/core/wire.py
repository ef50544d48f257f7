"""The protocol between the host and the agent inside a machine: bytes in, events out, no I/O.

A connection carries one operation at a time. The host sends one line of JSON (version, token,
operation, arguments), and the agent answers with one line (ok, or an error). What follows depends
on the operation (`core.ops`): raw bytes (`dial`) or frames (`exec`, `attach`):

    channel  1 byte
    length   4 bytes, big-endian, at most FRAME_MAX
    payload  length bytes

If both lines say `again`, another operation may follow: after the answer, or after the last frame
of one that has frames. Otherwise the connection ends with the operation.

Both ends use this module, so there is one protocol in one language. A reader treats the other side
as hostile: every length is limited, and anything invalid raises WireError, after which the
connection must be closed.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from typing import Final, TypeGuard

AGENT_PORT: Final = 9111
RFB_PORT: Final = 5900  # of the screen that a desktop has, on its loopback
_PORTS = range(1, 65536)
HEAD_MAX: Final = 1024 * 1024
REQUEST_MAX: Final = 16 * 1024 * 1024  # a command of 2 MiB in JSON, and what goes with it
FRAME_MAX: Final = 256 * 1024
_FRAME_HEADER: Final = 5
_AGAIN: Final[dict[str, object]] = {"again": True}


def is_guests_port(port: int) -> bool:
    """Tell whether users may reach a port of a sandbox: it is valid, and not reserved."""
    return port in _PORTS and port not in (AGENT_PORT, RFB_PORT)


class Refusal(StrEnum):
    """Why an agent refuses an operation."""

    UNAUTHORIZED = "unauthorized"  # the token is not the one it accepts
    UNSUPPORTED = "unsupported"  # it does not know the operation
    BAD_REQUEST = "bad_request"  # the machine would not do it; the message says why
    ABSENT = "absent"  # there is no such thing in the machine
    EXISTS = "exists"  # there is one already
    NOT_A_FOLDER = "not_a_folder"
    IS_A_FOLDER = "is_a_folder"
    DENIED = "denied"  # the user may not
    NO_SPACE = "no_space"
    CONFLICT = "conflict"  # not in the state that it is in
    BUSY = "busy"  # not now; nothing was done
    CHANGED = "changed"  # it is not as the caller believed
    NO_USER = "no_user"  # the machine has no such user
    NO_FOLDER = "no_cwd"  # a process cannot begin in that directory
    NO_START = "cannot_start"  # the program is not there, or cannot be executed
    NO_PROCESS = "no_process"  # there is no such process
    REUSED = "reused"  # its key was used for something else


class Channel(IntEnum):
    """What a frame contains."""

    STDIN = 0  # host to guest; an empty payload ends it
    STDOUT = 1
    STDERR = 2
    EXIT = 3  # JSON; how the operation ended, always the last frame
    TERMINAL = 4  # what a process prints on its terminal


class WireError(Exception):
    """The other side violated the protocol; close the connection."""


class VersionError(WireError):
    """The other side is too old or too new; the message says which versions it speaks."""


@dataclass(frozen=True)
class Versions:
    """The versions of a protocol that one side speaks, in each message's head.

    A message says by `v` which version suffices to read it, and by `now`, if that is later, which
    version wrote it. It is read by every side whose own version is not below the former and that
    still reads the latter: two releases need not be equal, and a machine may have been paused in
    between for a year.
    """

    now: int
    suffices: int
    oldest: int
    """The oldest version whose messages are still read."""

    @property
    def head(self) -> dict[str, object]:
        """What a message says of its version."""
        head: dict[str, object] = {"v": self.suffices}
        return head if self.now == self.suffices else head | {"now": self.now}

    def check(self, head: Mapping[str, object]) -> None:
        """Return if a message with this head can be read.

        Raises:
            VersionError: its version is not among those that are spoken here.
            WireError: it has none.
        """
        needs = head.get("v")
        wrote = head.get("now", needs)
        if not (_is_version(needs) and _is_version(wrote)):
            raise WireError("the other side does not say its version of the protocol")
        if needs > self.now:
            raise VersionError(
                f"the other side speaks version {needs} of the protocol or later, and this one "
                f"versions {self.oldest} to {self.now}: update this one"
            )
        if wrote < self.oldest:
            raise VersionError(
                f"the other side speaks version {wrote} of the protocol, and this one versions "
                f"{self.oldest} to {self.now}: update the other"
            )


def _is_version(value: object) -> TypeGuard[int]:
    return type(value) is int and 0 < value < 2**16


VERSIONS: Final = Versions(now=1, suffices=1, oldest=1)
"""Of this protocol. What only adds operations or fields, which a reader ignores, changes nothing;
what else an older side could not read raises `now` and `suffices`."""


@dataclass(frozen=True)
class Request:
    """The host's line; with `again`, it may send another on this connection."""

    op: str
    token: str = field(repr=False)
    args: dict[str, object]
    again: bool = False


@dataclass(frozen=True)
class Answer:
    """The agent's line: values, or an error's code and message; with `again`, it accepts
    another."""

    values: dict[str, object]
    error: str | None = None
    message: str = ""
    again: bool = False


@dataclass(frozen=True)
class Frame:
    """A piece of a channel's data."""

    channel: Channel
    payload: bytes


def encode_request(request: Request) -> bytes:
    """Return the bytes of a connection's first line.

    Raises:
        WireError: it would be longer than REQUEST_MAX.
    """
    head = VERSIONS.head | {"token": request.token, "op": request.op, "args": request.args}
    return _encode_line(head | _AGAIN if request.again else head, REQUEST_MAX)


def encode_answer(answer: Answer) -> bytes:
    """Return the bytes of an answer's line.

    Raises:
        WireError: it would be longer than HEAD_MAX.
    """
    if answer.error is not None:
        return _encode_line(
            VERSIONS.head | {"ok": False, "error": answer.error, "message": answer.message},
            HEAD_MAX,
        )
    head = VERSIONS.head | {"ok": True, "values": answer.values}
    return _encode_line(head | _AGAIN if answer.again else head, HEAD_MAX)


def encode_frame(channel: Channel, payload: bytes) -> bytes:
    """Return the bytes of one frame.

    Raises:
        WireError: the payload is longer than FRAME_MAX.
    """
    if len(payload) > FRAME_MAX:
        raise WireError(f"a frame of {len(payload)} bytes is over the limit of {FRAME_MAX}")
    return bytes((channel,)) + len(payload).to_bytes(4, "big") + payload


class Decoder:
    """Decodes one direction of a connection: a first line, then frames or raw bytes.

    Feed it what arrives, and take what is complete. It holds at most one line or frame and what was
    fed since, so a reader that takes before it feeds again uses bounded memory.
    """

    def __init__(self) -> None:
        self._buffer = bytearray()
        self._searched = 0

    def feed(self, data: bytes) -> None:
        """Add received bytes."""
        self._buffer += data

    def take_request(self) -> Request | None:
        """Return the request line, or None if it is not complete yet.

        Raises:
            VersionError: of a version that is not spoken here.
            WireError: too long, or not JSON.
        """
        head = self._take_line(REQUEST_MAX)
        if head is None:
            return None
        args = head.get("args")
        if not isinstance(args, dict):
            raise WireError("the arguments are not an object")
        again = head.get("again") is True
        return Request(op=_text(head, "op"), token=_text(head, "token"), args=args, again=again)

    def take_answer(self) -> Answer | None:
        """Return the answer line, or None if it is not complete yet.

        Raises:
            VersionError: of a version that is not spoken here.
            WireError: too long, or not JSON.
        """
        head = self._take_line(HEAD_MAX)
        if head is None:
            return None
        if head.get("ok") is True:
            values = head.get("values")
            if not isinstance(values, dict):
                raise WireError("the values are not an object")
            return Answer(values=values, again=head.get("again") is True)
        code, message = (printable(_text(head, key)[:1000]) for key in ("error", "message"))
        return Answer(values={}, error=code[:100], message=message)

    def take_frame(self) -> Frame | None:
        """Return the next frame, or None if it is not complete yet.

        Raises:
            WireError: the length is over FRAME_MAX, or the channel is unknown.
        """
        if len(self._buffer) < _FRAME_HEADER:
            return None
        length = int.from_bytes(self._buffer[1:_FRAME_HEADER], "big")
        if length > FRAME_MAX:
            raise WireError(f"a frame of {length} bytes is over the limit of {FRAME_MAX}")
        try:
            channel = Channel(self._buffer[0])
        except ValueError as error:
            raise WireError("the channel is unknown") from error
        end = _FRAME_HEADER + length
        if len(self._buffer) < end:
            return None
        payload = bytes(self._buffer[_FRAME_HEADER:end])
        del self._buffer[:end]
        return Frame(channel, payload)

    def take_raw(self) -> bytes:
        """Return all bytes not taken yet, for operations with raw bytes."""
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    def _take_line(self, limit: int) -> dict[str, object] | None:
        end = self._buffer.find(b"\n", self._searched)
        if end < 0:
            self._searched = len(self._buffer)
            if len(self._buffer) > limit:
                raise WireError("the first line is too long")
            return None
        if end > limit:
            raise WireError("the first line is too long")
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        self._searched = 0
        try:
            head = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise WireError("the first line is not JSON") from error
        if not isinstance(head, dict):
            raise WireError("the first line is not an object")
        VERSIONS.check(head)
        return head


class LastFrame:
    """Finds the end of the frames in a stream that is passed on, in pieces of any size."""

    def __init__(self) -> None:
        self._head = bytearray()
        self._left = 0
        self._is_last = self._is_past = False

    def feed(self, data: bytes) -> None:
        """Examine bytes that are passed on."""
        view = memoryview(data)
        while view:
            if self.is_whole:
                self._is_past = True  # data after the last frame
                return
            if self._left == 0:
                missing = _FRAME_HEADER - len(self._head)
                self._head += view[:missing]
                view = view[missing:]
                if len(self._head) == _FRAME_HEADER:
                    self._is_last = self._head[0] == Channel.EXIT
                    self._left = int.from_bytes(self._head[1:], "big")
                    self._head.clear()
            else:
                passed = min(self._left, len(view))
                self._left -= passed
                view = view[passed:]

    @property
    def is_whole(self) -> bool:
        """Whether the last frame has passed completely, and nothing after it."""
        return self._is_last and self._left == 0 and not self._head and not self._is_past


def printable(text: str) -> str:
    """Return a guest's text without characters that control a terminal or that a database rejects:
    control characters, and lone surrogates, which JSON escapes can contain and UTF-8 cannot."""
    return "".join(one if one.isprintable() else "\ufffd" for one in text)


def _encode_line(head: dict[str, object], limit: int) -> bytes:
    line = json.dumps(head, separators=(",", ":")).encode()
    if len(line) > limit:
        raise WireError(f"a first line of {len(line)} bytes is over the limit of {limit}")
    return line + b"\n"


def _text(head: dict[str, object], key: str) -> str:
    value = head.get(key)
    if not isinstance(value, str):
        raise WireError(f"{key} is not text")
    return value
