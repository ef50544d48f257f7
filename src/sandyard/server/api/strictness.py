"""Requests with the header `Sandyard-Strict: 1`: unknown fields and parameters are refused.

Without it they are ignored, as the contract says, so that clients of other versions work.
"""

from typing import Annotated

from fastapi import Header
from fastapi.dependencies.models import Dependant
from starlette.requests import HTTPConnection

from sandyard.server.api.models.base import STRICT
from sandyard.server.core.errors import InvalidArgumentError

_ALWAYS = frozenset({"orgId", "org_id", "api_key"})
"""Parameters that the front reads, of every route."""
_SIGNED = frozenset({"expires", "by", "signature"})


async def strictness(
    connection: HTTPConnection,
    sandyard_strict: Annotated[
        str | None, Header(description="With 1, unknown fields and parameters are refused.")
    ] = None,
) -> None:
    """Refuse unknown query parameters, and have unknown fields of the body refused, if the request
    asks for it.

    Raises:
        InvalidArgumentError: a parameter is unknown.
    """
    is_strict = sandyard_strict == "1"
    STRICT.set(is_strict)  # read by the models of this request
    if not is_strict or not connection.query_params:
        return
    route = connection.scope["route"]
    known = _parameters(route.dependant) | _ALWAYS
    if getattr(route.endpoint, "takes_signature", False):
        known |= _SIGNED
    for name in connection.query_params:
        if name not in known:
            raise InvalidArgumentError(
                f"cannot use the parameter {name[:100]!r}: there is no such one; there are "
                f"{', '.join(sorted(known))}",
                field=name[:100],
            )


def _parameters(dependant: Dependant) -> frozenset[str]:
    own = frozenset(one.alias for one in dependant.query_params)
    return own.union(*(_parameters(one) for one in dependant.dependencies))
