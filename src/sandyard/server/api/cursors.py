"""The parameter `cursor` of lists."""

from typing import Annotated

from fastapi import Query

from sandyard.server.front.cursors import PATTERN

Cursor = Annotated[
    str | None,
    Query(
        description="`nextCursor` of the page before.",
        json_schema_extra={"pattern": f"{PATTERN}|^$"},
    ),
]
