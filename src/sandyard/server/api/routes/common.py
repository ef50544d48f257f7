"""What every route shares: the documented errors, the envelope, the key of a repeated request."""

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Header, Request
from starlette.requests import HTTPConnection

from sandyard.server.api.models.base import Data, ErrorAnswer, Meta, Page, PageMeta
from sandyard.server.front.cursors import encode_cursor
from sandyard.server.service.addresses import Addresses
from sandyard.server.service.repeats import Repeatable

T = TypeVar("T")
Shown = TypeVar("Shown")


def provided(name: str) -> Any:
    """Return the dependency on one of the services, by its name."""

    async def provide(connection: HTTPConnection) -> object:
        return getattr(connection.scope["app"].state.services, name)

    return Depends(provide)


Where = Annotated[Addresses, provided("addresses")]


KeyHeader = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        description="The same key and body again is answered with what was made (24 h).",
        json_schema_extra={"minLength": 1, "maxLength": 255, "pattern": "^[!-~]+$"},
    ),
]


async def _repeatable(request: Request, idempotency_key: KeyHeader = None) -> Repeatable | None:
    if idempotency_key is None:
        return None
    return repeatable(request, idempotency_key, _meaning(await request.body()))


def repeatable(request: Request, key: str | None, body: bytes) -> Repeatable | None:
    """Return a request with its key, if it has one."""
    if key is None:
        return None
    return Repeatable(route=f"{request.method} {request.url.path}", key=key, body=body)


def _meaning(body: bytes) -> bytes:
    """Return a body so that two of the same meaning are the same."""
    try:
        return json.dumps(json.loads(body), sort_keys=True).encode()
    except ValueError:
        return body


Keyed = Annotated[Repeatable | None, Depends(_repeatable)]

_MEANINGS = {
    400: "The request is wrong; `details.field` names what.",
    401: "No credential, or not a good one.",
    402: "The organization's credits do not suffice for about an hour.",
    403: "The credential lacks a scope or a role.",
    404: "Absent, or another organization's.",
    409: "Something is taken, a limit is reached, or the status does not allow it.",
    412: "A condition of the request does not hold.",
    413: "The request is too large.",
    429: "Too many requests; try again after `Retry-After` seconds.",
    500: "Something broke on the server.",
    501: "The contract has it and this version does not, yet.",
    502: "The agent in the sandbox answered something that makes no sense.",
    503: "Not now; try again after `Retry-After` seconds.",
}


COMMON = frozenset({400, 401, 403, 404, 429, 500, 502, 503})
"""What every route can answer."""


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of a route's error answers; those every route can give are added."""
    return {
        status: {"model": ErrorAnswer, "description": _MEANINGS[status]}
        for status in sorted({*COMMON, *statuses})
    }


def paged(
    request: Request,
    found: Sequence[T],
    limit: int,
    show: Callable[[T], Shown],
    place: Callable[[T], tuple[datetime, str]],
) -> Page[Shown]:
    """Return one page out of up to `limit` things and one more, if there is more."""
    page, has_more = found[:limit], len(found) > limit
    following = encode_cursor(*place(page[-1])) if has_more else None
    return Page(
        data=[show(one) for one in page],
        has_more=has_more,
        next_cursor=following,
        meta=PageMeta(
            request_id=request.state.request_id, has_more=has_more, next_cursor=following
        ),
    )


def whole(request: Request, shown: list[T]) -> Page[T]:
    """Return a list that is always given in one page."""
    return Page(
        data=shown,
        has_more=False,
        next_cursor=None,
        meta=PageMeta(request_id=request.state.request_id, has_more=False, next_cursor=None),
    )


def enveloped(request: Request, data: T) -> Data[T]:
    """Return data in the envelope."""
    return Data[T](data=data, meta=Meta(request_id=request.state.request_id))
