"""Downloads of files: byte ranges (RFC 9110, 14), headers, and bodies of an announced length."""

import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from urllib.parse import quote

from sandyard.server.core.errors import UnavailableError
from sandyard.server.front.streams import TAMED

_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_LATEST_S = 2**41 / 1000


def requested_range(
    header: str | None, if_range: str | None
) -> tuple[int | None, int | None] | None:
    """Return the first and last byte that a client requests; None for the whole file.

    Without a first byte, the second number is how many bytes at the end. Answers have no validators
    here, so a condition never holds (RFC 9110, 13.1.5).
    """
    found = None if if_range else _RANGE.fullmatch(header or "")
    if found is None:
        return None
    first, last = (int(one) if one else None for one in found.groups())
    is_invalid = first is not None and last is not None and last < first
    return None if is_invalid or (first is None and last is None) else (first, last)


def span_of(header: str | None, if_range: str | None, size: int) -> range | None:
    """Return the requested bytes of a file of a known size; None for the whole file.

    An empty range cannot be satisfied.
    """
    wanted = requested_range(header, if_range)
    if not size or wanted is None:
        return None
    first, last = wanted
    if first is None:
        return range(max(0, size - (last or 0)), size)
    return range(first, size if last is None else min(size, last + 1))


def file_headers(name: str, modified_s: float | None = None, *, how: str) -> dict[str, str]:
    """Return the headers of a file, which a browser shows (`inline`) or saves (`attachment`)."""
    headers = {**TAMED, "Content-Disposition": f"{how}; filename*=UTF-8''{quote(name, safe='')}"}
    if modified_s is not None:
        modified = datetime.fromtimestamp(max(0.0, min(_LATEST_S, modified_s)), UTC)
        headers["Accept-Ranges"] = "bytes"
        headers["Last-Modified"] = modified.strftime("%a, %d %b %Y %H:%M:%S GMT")
    return headers


async def exactly(pieces: AsyncIterator[bytes], count: int | None) -> AsyncIterator[bytes]:
    """Yield pieces of an announced total; if they are fewer, break the connection, so that the
    client notices."""
    sent = 0
    async for piece in pieces:
        sent += len(piece)
        yield piece
    if count is not None and sent < count:
        raise UnavailableError(f"the file became {count - sent} bytes shorter meanwhile")
