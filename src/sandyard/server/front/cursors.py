"""Cursors: the position in a list, as text that is opaque to clients."""

import re
from datetime import UTC, datetime, timedelta
from typing import Final

from sandyard.server.core.errors import InvalidArgumentError

_EPOCH = datetime.fromtimestamp(0, UTC)
_UUID = "[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
PATTERN: Final = f"^[0-9]{{1,16}}\\.(sandbox-[a-z0-9]{{12}}|{_UUID})$"


def encode_cursor(created_at: datetime, last_id: str) -> str:
    """Return the cursor of the page after the one that ends with this entry."""
    return f"{(created_at - _EPOCH) // timedelta(microseconds=1)}.{last_id}"


def decode_cursor(cursor: str) -> tuple[datetime, str]:
    """Return what a cursor stands for.

    Raises:
        InvalidArgumentError: it is not one of ours.
    """
    if not re.fullmatch(PATTERN, cursor):
        raise InvalidArgumentError(
            "cannot use cursor: take it unchanged from nextCursor of the page before",
            field="cursor",
        )
    microseconds, _, last_id = cursor.partition(".")
    return _EPOCH + timedelta(microseconds=int(microseconds)), last_id
