"""Snapshots and forks."""

from typing import Annotated

from fastapi import APIRouter, Body, Depends, Query, Request

from sandyard.server.api.access import Scope
from sandyard.server.api.cursors import Cursor
from sandyard.server.api.models.base import Data, Page, RemovedOut
from sandyard.server.api.models.sandboxes import SandboxOut, sandbox_out
from sandyard.server.api.models.snapshots import (
    CreateForks,
    CreateSnapshot,
    RollBack,
    SnapshotOut,
    snapshot_out,
)
from sandyard.server.api.routes.common import Keyed, Where, enveloped, errors, paged, provided
from sandyard.server.core.ids import checked_text
from sandyard.server.front.cursors import decode_cursor
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.snapshots import Snapshots

router = APIRouter(tags=["snapshots"])

CanCreate = Annotated[Actor, Depends(Scope("sandbox:create"))]
CanRead = Annotated[Actor, Depends(Scope("sandbox:read"))]
CanWrite = Annotated[Actor, Depends(Scope("sandbox:write"))]


Service = Annotated[Snapshots, provided("snapshots")]


@router.post(
    "/v1/sandboxes/{reference}/snapshots", status_code=201, responses=errors(402, 404, 409)
)
async def create_snapshot(
    request: Request,
    actor: CanWrite,
    service: Service,
    reference: str,
    keyed: Keyed,
    body: Annotated[CreateSnapshot | None, Body()] = None,
) -> Data[SnapshotOut]:
    """Save the memory and disk of a sandbox, which keeps running."""
    snapshot = await service.create(
        actor,
        checked_text(reference, field="reference"),
        body.name if body else None,
        request=keyed,
    )
    return enveloped(request, snapshot_out(snapshot))


@router.get("/v1/snapshots", responses=errors())
async def list_snapshots(
    request: Request,
    actor: CanRead,
    service: Service,
    limit: Annotated[int, Query(ge=1, le=500)] = 500,
    cursor: Cursor = None,
) -> Page[SnapshotOut]:
    """List snapshots, newest first."""
    found = await service.page(
        actor, limit=limit + 1, after=decode_cursor(cursor) if cursor else None
    )
    return paged(request, found, limit, snapshot_out, lambda one: (one.created_at, one.id))


@router.get("/v1/snapshots/{reference}", responses=errors(404))
async def get_snapshot(
    request: Request, actor: CanRead, service: Service, reference: str
) -> Data[SnapshotOut]:
    """Return one snapshot, by id or name."""
    snapshot = await service.get(actor, checked_text(reference, field="reference"))
    return enveloped(request, snapshot_out(snapshot))


@router.delete("/v1/snapshots/{reference}", responses=errors(404, 409))
async def delete_snapshot(
    request: Request, actor: CanWrite, service: Service, reference: str
) -> Data[RemovedOut]:
    """Delete a snapshot. Sandboxes created from it are not affected."""
    snapshot = await service.delete(actor, checked_text(reference, field="reference"))
    return enveloped(request, RemovedOut(id=snapshot.id, deleted=True))


@router.post("/v1/sandboxes/{reference}/fork", status_code=201, responses=errors(402, 404, 409))
async def fork_sandbox(
    request: Request,
    actor: CanCreate,
    service: Service,
    where: Where,
    reference: str,
    keyed: Keyed,
    body: Annotated[CreateForks | None, Body()] = None,
) -> Data[list[SandboxOut]]:
    """Create sandboxes that start from the current state of this one: files, memory and
    processes."""
    forks = await service.fork(
        actor,
        checked_text(reference, field="reference"),
        body.count if body else 1,
        name=body.name if body else None,
        request=keyed,
    )
    return enveloped(request, [sandbox_out(one, actor, where) for one in forks])


@router.post("/v1/sandboxes/{reference}/rollback", responses=errors(402, 404, 409))
async def roll_back_sandbox(
    request: Request,
    actor: CanWrite,
    service: Service,
    where: Where,
    reference: str,
    body: RollBack,
) -> Data[SandboxOut]:
    """Restore a sandbox to one of its snapshots. Its current state is lost."""
    sandbox = await service.roll_back(
        actor, checked_text(reference, field="reference"), body.snapshot_id
    )
    return enveloped(request, sandbox_out(sandbox, actor, where))
