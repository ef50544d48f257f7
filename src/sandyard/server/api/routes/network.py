"""/v1/sandboxes/{id}/network and /egress."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request

from sandyard.server.api.access import Scope, takes_query_key
from sandyard.server.api.events import EventStream, Recheck, SseEvent, rechecked
from sandyard.server.api.models.base import Data
from sandyard.server.api.models.network import (
    ConnectionOut,
    NetworkIn,
    NetworkOut,
    connection_out,
    network_out,
)
from sandyard.server.api.routes.common import enveloped, errors, provided
from sandyard.server.core.contracts.node import Connection
from sandyard.server.core.ids import checked_text
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.change import Changes, Sandboxes

router = APIRouter(prefix="/v1/sandboxes", tags=["network"])

CanRead = Annotated[Actor, Depends(Scope("sandbox:read"))]
CanWrite = Annotated[Actor, Depends(Scope("sandbox:write"))]
Service = Annotated[Sandboxes, provided("sandboxes")]
MayFollow = Annotated[Recheck, rechecked("sandbox:read")]


@router.get("/{reference}/network", responses=errors(404))
async def get_network(
    request: Request, actor: CanRead, service: Service, reference: str
) -> Data[NetworkOut]:
    """Return what a sandbox may reach."""
    sandbox = await service.get(actor, checked_text(reference, field="reference"))
    return enveloped(request, network_out(sandbox.network))


@router.put("/{reference}/network", responses=errors(404, 409, 503))
async def replace_network(
    request: Request, actor: CanWrite, service: Service, reference: str, body: NetworkIn
) -> Data[NetworkOut]:
    """Replace what a sandbox may reach. The rules are in force when this is answered: connections
    that they do not let pass have ended."""
    changes = Changes(network=body.policy())
    sandbox = await service.change(actor, checked_text(reference, field="reference"), changes)
    return enveloped(request, network_out(sandbox.network))


@router.get(
    "/{reference}/egress",
    responses={
        **errors(404, 409, 503),
        200: {
            "description": "Lines of the journal, or with `follow` events.",
            "content": {"text/event-stream": {}},
        },
    },
    response_model=Data[list[ConnectionOut]],
)
@takes_query_key
async def list_connections(
    request: Request,
    actor: CanRead,
    service: Service,
    check: MayFollow,
    reference: str,
    since: Annotated[
        float | None,
        Query(ge=0, le=2**40, description="Seconds since 1970: lines after that, oldest first."),
    ] = None,
    follow: Annotated[
        bool, Query(description="Go on with new ones, as server-sent events `connection`.")
    ] = False,
) -> Any:
    """List what a sandbox with network rules reached or was refused, oldest first: the latest 1000
    lines of at most 10,000, kept for 7 days."""
    reference = checked_text(reference, field="reference")
    if not follow or getattr(request.state, "is_head", False):
        found = await service.connections(actor, reference, since=since)
        return enveloped(request, [connection_out(one) for one in found])
    await service.get(actor, reference)
    async with AsyncExitStack() as opening:
        opening.enter_context(service.following(actor))
        held = opening.pop_all()
    pages = service.follow_connections(actor, reference)
    return EventStream(_events_of(pages), held, check)


async def _events_of(pages: AsyncIterator[list[Connection]]) -> AsyncIterator[SseEvent]:
    async for page in pages:
        for one in page:
            shown = connection_out(one).model_dump(mode="json", by_alias=True)
            yield SseEvent("connection", shown)
