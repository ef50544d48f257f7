"""What every route shares: the documented errors, the envelope, the key of a repeated request."""

import json
from typing import Annotated, Any, TypeVar

from fastapi import Depends, Header, Request

from sandyard.server.api.models import Data, ErrorAnswer, Meta
from sandyard.server.service.repeats import Repeatable

T = TypeVar("T")


async def _repeatable(
    request: Request,
    idempotency_key: Annotated[
        str | None,
        Header(description="The same key and body again is answered with what was made (24 h)."),
    ] = None,
) -> Repeatable | None:
    if idempotency_key is None:
        return None
    route = f"{request.method} {request.url.path}"
    return Repeatable(route=route, key=idempotency_key, body=_meaning(await request.body()))


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
    403: "The credential lacks a scope.",
    404: "Absent, or another organization's.",
    409: "A name is taken, or the sandbox's status does not allow it.",
    413: "The request is too large.",
    500: "Something broke on the server.",
    503: "Not now; try again after `Retry-After` seconds.",
}


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Return the documentation of a route's error answers; those every route can give are added."""
    return {
        status: {"model": ErrorAnswer, "description": _MEANINGS[status]}
        for status in sorted({400, 401, 403, 500, 503, *statuses})
    }


def enveloped(request: Request, data: T) -> Data[T]:
    """Return data in the envelope."""
    return Data[T](data=data, meta=Meta(request_id=request.state.request_id))
