"""Limits on a JSON body, checked while it arrives, before it is parsed.

Parsed, `[[],[],…]` takes thirty times its own size. So brackets and separators are counted in the
bytes, and a body is refused at the first byte beyond a limit.
"""

import re

from sandyard.server.core.errors import InvalidArgumentError

DEPTH_MAX = 200
VALUES_MAX = 20_000
# Possessive: a body must not decide how much there is to go back over.
_IN_STRING = re.compile(rb'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)


class JsonBounds:
    """Checks a body piece by piece."""

    def __init__(self) -> None:
        self._depth = 0
        self._values, self._strings = 1, 0
        self._is_in_string = False
        self._left = b""

    def feed(self, piece: bytes) -> None:
        """Check the next piece.

        Raises:
            InvalidArgumentError: it is not UTF-8, is nested over DEPTH_MAX deep, or has over
                VALUES_MAX values.
        """
        if b"\0" in piece:
            # Also so that what is counted here is what is parsed: JSON in UTF-16 has such bytes.
            raise InvalidArgumentError(
                "cannot read the body: it is not JSON in UTF-8", field="body"
            )
        data, self._left = self._left + piece, b""
        at = 0
        while at < len(data):
            at = self._string(data, at) if self._is_in_string else self._structure(data, at)

    def _string(self, data: bytes, at: int) -> int:
        found = _IN_STRING.match(data, at)
        end = found.end() if found else at
        if end < len(data):
            if data[end] == ord('"'):
                self._is_in_string = False
                return end + 1
            self._left = data[end:]  # a backslash; what it escapes comes with the next piece
        return len(data)

    def _structure(self, data: bytes, at: int) -> int:
        end = data.find(b'"', at)
        part = data[at:] if end < 0 else data[at:end]
        opened = part.count(b"[") + part.count(b"{")
        self._values += opened + part.count(b",")
        if self._values > VALUES_MAX:
            raise InvalidArgumentError(
                f"cannot take the body: it has over {VALUES_MAX} values", field="body"
            )
        if self._depth + opened > DEPTH_MAX:
            for one in part:
                self._depth += (one in b"[{") - (one in b"]}")
                if self._depth > DEPTH_MAX:
                    raise InvalidArgumentError(
                        f"cannot take the body: it is nested over {DEPTH_MAX} deep", field="body"
                    )
        else:
            self._depth += opened - part.count(b"]") - part.count(b"}")
        if end < 0:
            return len(data)
        self._strings += 1
        if self._strings > 2 * self._values:  # a value has at most a name and itself
            raise InvalidArgumentError("cannot read the body: it is not JSON", field="body")
        self._is_in_string = True
        return end + 1
