"""What an interpreter prints while it runs a piece of code: text, and reports between NUL bytes.

The code can print anything, so a report is known by a random mark, and nothing in it is trusted.
"""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from sandyard.server.core.errors import AgentError
from sandyard.server.core.wire import printable

REPORT_MAX = 24 * 1024 * 1024
_CONTAINERS_MAX = 500_000
_VALUES_MAX = 3_000_000
"""What is small as JSON may be large in memory: 24 MiB of `[],` would take half a gigabyte."""
_TAIL = 500
_TEXT_FORMS = (
    "text", "html", "markdown", "svg", "png", "jpeg", "pdf", "latex", "javascript",
)  # fmt: skip
STREAMS = ("stdout", "stderr")


@dataclass(frozen=True)
class Text:
    """What the code printed."""

    stream: str
    data: bytes = field(repr=False)


@dataclass(frozen=True)
class Result:
    """A value in all its forms: text, and base64 of pictures. The main one is the value of the last
    expression."""

    forms: Mapping[str, object] = field(repr=False)
    is_main: bool
    is_truncated: bool


@dataclass(frozen=True)
class CodeError:
    """What the code raised."""

    name: str
    value: str
    traceback: str


@dataclass(frozen=True)
class Finished:
    """The end of the piece of code."""

    error: CodeError | None


Report = Text | Result | Finished


class Reports:
    """Reads the reports about one piece of code, which has a `mark`."""

    def __init__(self, mark: str) -> None:
        self._head = b"\0" + mark.encode()
        self._left = {stream: bytearray() for stream in STREAMS}
        self._begun: set[str] = set()
        self._ended: set[str] = set()
        self._end = Finished(None)
        self._last = bytearray()

    @property
    def has_begun(self) -> bool:
        """Whether the piece of code has begun."""
        return bool(self._begun)

    @property
    def last_words(self) -> str:
        """The end of what it printed on its standard error."""
        return printable(self._last.decode(errors="replace").strip())

    def feed(self, stream: str, data: bytes) -> Iterator[Report]:
        """Take output, and yield what it means.

        Raises:
            AgentError: a report is too long.
        """
        left = self._left[stream]
        left += data
        while stream not in self._ended:
            at = left.find(self._head)
            if at < 0:
                yield from self._text(stream, self._certain(left))
                return
            yield from self._text(stream, at)
            end = left.find(b"\0", len(self._head))
            if end < 0:
                if len(left) > REPORT_MAX:
                    raise AgentError("cannot read a result: it has no end")
                return
            message = bytes(left[len(self._head) : end])
            found = list(self._report(stream, message[:1], message[1:]))
            del left[: end + 1]
            yield from found

    def _certain(self, left: bytearray) -> int:
        """Return how many bytes are not the beginning of a report."""
        at = left.rfind(b"\0", max(0, len(left) - len(self._head)))
        return at if at >= 0 and self._head.startswith(left[at:]) else len(left)

    def _text(self, stream: str, size: int) -> Iterator[Text]:
        left = self._left[stream]
        data = bytes(left[:size])
        del left[:size]
        if data and stream in self._begun:
            if stream == "stderr":
                self._last = (self._last + data)[-_TAIL:]
            yield Text(stream, data)

    def _report(self, stream: str, kind: bytes, body: bytes) -> Iterator[Report]:
        match kind:
            case b"B":
                self._begun.add(stream)
            case b"R":
                yield _result(body)
            case b"E":
                self._ended.add(stream)
                if stream == "stdout":
                    self._end = Finished(_error(body))
                if len(self._ended) == len(STREAMS):
                    yield self._end
            case _:
                pass


def _result(body: bytes) -> Result:
    try:
        if body.count(b"[") + body.count(b"{") > _CONTAINERS_MAX or body.count(b",") > _VALUES_MAX:
            return Result({"text": ""}, is_main=False, is_truncated=True)
        report = json.loads(body)
        forms = {name: report[name] for name in _TEXT_FORMS if isinstance(report.get(name), str)}
        if "json" in report:
            forms["json"] = report["json"]
        return Result(forms, report.get("isMain") is True, report.get("truncated") is True)
    except (ValueError, TypeError, AttributeError, RecursionError):
        # Another process of the sandbox printed into the middle of it.
        return Result({"text": ""}, is_main=False, is_truncated=True)


def _error(body: bytes) -> CodeError | None:
    try:
        report = json.loads(body)["error"]
        if report is None:
            return None
        return CodeError(str(report["name"])[:200], str(report["value"]), str(report["traceback"]))
    except (ValueError, TypeError, KeyError, RecursionError):
        return CodeError("UnknownError", "the interpreter's report of an error was damaged", "")
