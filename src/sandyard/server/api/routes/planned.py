"""Routes of planned features: they answer that the feature is not implemented yet."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from sandyard.server.api.access import Scope
from sandyard.server.core.errors import NotImplementedYetError
from sandyard.server.service.actor import Actor

router = APIRouter(include_in_schema=False)

Anyone = Annotated[Actor, Depends(Scope(None))]

_PLANNED = {
    "webhooks": [
        ("GET POST", "/v1/webhooks"),
        ("GET PATCH DELETE", "/v1/webhooks/{id}"),
        ("POST", "/v1/webhooks/{id}/rotate"),
        ("GET", "/v1/webhooks/{id}/deliveries"),
        ("POST", "/v1/webhooks/{id}/deliveries/{delivery}/redeliver"),
    ],
}


async def planned(request: Request, actor: Anyone) -> None:
    """Say that a route is not built yet."""
    del actor
    raise NotImplementedYetError(
        f"cannot {request.method} {request.url.path}: this version does not have it yet; what it "
        "has is in /docs"
    )


for _paths in _PLANNED.values():
    for _methods, _path in _paths:
        router.add_api_route(_path, planned, methods=_methods.split())
