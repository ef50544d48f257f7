"""Ranges of bytes that a client asks for (RFC 9110, 14)."""

import re

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")


def span_of(header: str | None, size: int) -> range | None:
    """Return which bytes of so many a header asks for; None if it asks for all of them.

    An empty range is one that nothing can satisfy.
    """
    found = _RANGE.fullmatch(header or "")
    if not size or found is None or found.group(1) == found.group(2) == "":
        return None
    first, last = found.groups()
    if not first:  # the last so many
        return range(max(0, size - int(last)), size)
    if last and int(last) < int(first):
        return None  # no range at all
    return range(int(first), min(size, int(last) + 1) if last else size)
