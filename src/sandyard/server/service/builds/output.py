"""The output of commands, as the log of a build shows it."""

import re
from collections.abc import Iterable
from typing import Final

from sandyard.server.core.wire import printable

LINE_MAX: Final = 2000
_ESCAPES = re.compile(r"\x1b(\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)?|.)?")
_MASKED_MIN = 4
_MASK = "***"


class Lines:
    """Splits output into lines, without what would move a terminal's cursor. Of a long line, only
    the beginning is kept."""

    def __init__(self) -> None:
        self._rest = b""
        self._skips = False

    def feed(self, data: bytes) -> list[str]:
        """Return the lines that are whole by now."""
        *whole, rest = re.split(rb"[\r\n]+", self._rest + data)
        if whole and self._skips:
            del whole[0]
            self._skips = False
        if self._skips:
            rest = b""
        elif len(rest) > LINE_MAX * 4:
            whole.append(rest)
            rest, self._skips = b"", True
        self._rest = rest
        return [_shown(one) for one in whole if one]

    def end(self) -> list[str]:
        """Return what is left."""
        left, self._rest = self._rest, b""
        return [_shown(left)] if left else []


class Masks:
    """Replaces secrets with asterisks. Each line of a secret is masked separately. Lines of fewer
    than four characters are not masked, because they would match too much of the log."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        parts = {
            shown
            for one in secrets
            for line in (one, *one.splitlines())
            if len(shown := _shown(line.strip().encode())) >= _MASKED_MIN
        }
        longest_first = sorted(parts, key=len, reverse=True)
        self._parts = re.compile("|".join(map(re.escape, longest_first))) if parts else None

    def over(self, text: str) -> str:
        """Return the text with its secrets masked."""
        return text if self._parts is None else self._parts.sub(_MASK, text)


def _shown(data: bytes) -> str:
    return printable(_ESCAPES.sub("", data.decode(errors="replace")))
