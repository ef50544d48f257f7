"""Cursors: the position in a list, as text that is opaque to clients."""

import base64
import binascii
import json
from datetime import datetime

from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ids import is_sandbox_id, is_uuid


def encode_cursor(created_at: datetime, last_id: str) -> str:
    """Return the cursor of the page after the one that ends with this entry."""
    text = json.dumps([created_at.isoformat(), last_id], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def decode_cursor(cursor: str) -> tuple[datetime, str]:
    """Return what a cursor stands for.

    Raises:
        InvalidArgumentError: it is not one of ours.
    """
    try:
        padded = cursor + "=" * (-len(cursor) % 4)
        created_at, last_id = json.loads(base64.urlsafe_b64decode(padded.encode()))
        moment = datetime.fromisoformat(created_at)
        if not isinstance(last_id, str) or not (is_sandbox_id(last_id) or is_uuid(last_id)):
            raise ValueError("not an id")
        if moment.tzinfo is None:
            raise ValueError("not a moment")
    except (ValueError, TypeError, binascii.Error, RecursionError) as error:
        raise InvalidArgumentError(
            "cannot use cursor: take it unchanged from nextCursor of the page before",
            field="cursor",
        ) from error
    return moment, last_id
