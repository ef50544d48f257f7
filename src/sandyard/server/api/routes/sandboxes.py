"""/v1/sandboxes."""

import json
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from sandyard.server.api.access import Scope
from sandyard.server.api.cursors import Cursor
from sandyard.server.api.models.base import Data, Page
from sandyard.server.api.models.sandboxes import (
    CreateSandbox,
    DeletedOut,
    LogsOut,
    PatchSandbox,
    PausedOut,
    ResumedOut,
    SandboxOut,
    StatsOut,
    resumed_out,
    sandbox_out,
    stats_of,
)
from sandyard.server.api.routes.common import (
    Keyed,
    Where,
    enveloped,
    errors,
    paged,
    provided,
)
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ids import TAGS_MAX, checked_text
from sandyard.server.core.records import SandboxQuery
from sandyard.server.core.states import Status
from sandyard.server.front.bodies import takes_body
from sandyard.server.front.cursors import decode_cursor
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.change import Sandboxes
from sandyard.server.service.sandboxes.create import Creation
from sandyard.server.service.sandboxes.fields import check_metadata

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"])

_CREATE_MAX = 256 * 1024  # env and metadata at their largest, with what JSON makes of them


CanCreate = Annotated[Actor, Depends(Scope("sandbox:create"))]


CanRead = Annotated[Actor, Depends(Scope("sandbox:read"))]


CanWrite = Annotated[Actor, Depends(Scope("sandbox:write"))]


Creator = Annotated[Creation, provided("creation")]
Service = Annotated[Sandboxes, provided("sandboxes")]


Wait = Annotated[
    int, Query(ge=0, le=60, description="Hold the answer so many seconds until it runs.")
]


@router.post("", status_code=201, responses=errors(402, 409, 501))
@takes_body(_CREATE_MAX)
async def create_sandbox(
    request: Request,
    actor: CanCreate,
    creation: Creator,
    where: Where,
    body: CreateSandbox,
    keyed: Keyed,
    wait: Wait = 0,
) -> Data[SandboxOut]:
    """Create a sandbox. It is running at once if the pool has one, else it starts in the
    background; `wait` delays the answer until it runs."""
    sandbox = await creation.create(actor, body.wish(), request=keyed, wait_s=wait)
    return enveloped(request, sandbox_out(sandbox, actor, where))


def _wanted(text: str) -> dict[str, object]:
    """Return the metadata that a query asks for."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise InvalidArgumentError(
            'cannot use metadata: give a JSON object such as {"team":"red"}', field="metadata"
        )
    check_metadata(found)
    return found


@router.get("", responses=errors())
async def list_sandboxes(
    request: Request,
    actor: CanRead,
    service: Service,
    where: Where,
    status: Annotated[list[Status] | None, Query()] = None,
    tag: Annotated[
        list[str] | None, Query(description="All must match.", max_length=TAGS_MAX)
    ] = None,
    template: str | None = None,
    exclude_template: str | None = None,
    project_id: str | None = None,
    name_prefix: Annotated[str | None, Query(description="How the name begins.")] = None,
    node_id: Annotated[str | None, Query(description="The node it is on; for admins.")] = None,
    metadata: Annotated[
        str | None,
        Query(
            description="JSON of an object that the metadata contains, at every depth: "
            '`{"team":{"name":"red"}}`.',
            json_schema_extra={"contentMediaType": "application/json"},
        ),
    ] = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 500,
    cursor: Cursor = None,
    all_: Annotated[bool, Query(alias="all")] = False,
) -> Page[SandboxOut]:
    """List sandboxes, newest first."""
    for field, text in (
        ("template", template), ("exclude_template", exclude_template), ("project_id", project_id),
        ("name_prefix", name_prefix), ("node_id", node_id),
        *(("tag", one) for one in tag or ()),
    ):  # fmt: skip
        checked_text(text or "", field=field)
    if node_id is not None:
        actor.require_admin()
    found = await service.page(
        actor,
        SandboxQuery(
            org_id=actor.org_id,
            limit=limit + 1,
            owner_user_id=None if actor.sees_all else actor.user_id,
            statuses=frozenset(status or ()),
            tags=tuple(tag or ()),
            template=template,
            exclude_template=exclude_template,
            project_id=project_id,
            name_prefix=name_prefix,
            node_id=node_id,
            metadata=None if metadata is None else _wanted(metadata),
            after=decode_cursor(cursor) if cursor else None,
        ),
        wants_all=all_,
    )
    return paged(
        request,
        found,
        limit,
        lambda sandbox: sandbox_out(sandbox, actor, where),
        lambda sandbox: (sandbox.created_at, sandbox.id),
    )


@router.get("/{reference}", responses=errors(404))
async def get_sandbox(
    request: Request, actor: CanRead, service: Service, where: Where, reference: str
) -> Data[SandboxOut]:
    """Return one sandbox, by id or name."""
    sandbox = await service.get(actor, checked_text(reference, field="reference"))
    return enveloped(request, sandbox_out(sandbox, actor, where))


@router.patch("/{reference}", responses=errors(404, 409))
async def change_sandbox(
    request: Request,
    actor: CanWrite,
    service: Service,
    where: Where,
    reference: str,
    body: PatchSandbox,
) -> Data[SandboxOut]:
    """Change a sandbox's name, tags, idle timeout, metadata, project, automatic resume, expiry or
    network rules."""
    sandbox = await service.change(
        actor, checked_text(reference, field="reference"), body.changes()
    )
    return enveloped(request, sandbox_out(sandbox, actor, where))


@router.post("/{reference}/touch", responses=errors(404, 409))
async def touch_sandbox(
    request: Request, actor: CanWrite, service: Service, where: Where, reference: str
) -> Data[SandboxOut]:
    """Reset the idle timer of a sandbox."""
    sandbox = await service.touch(actor, checked_text(reference, field="reference"))
    return enveloped(request, sandbox_out(sandbox, actor, where))


@router.post(
    "/{reference}/pause",
    responses={**errors(404, 409), 202: {"model": Data[PausedOut], "description": "Under way."}},
)
async def pause_sandbox(
    request: Request,
    response: Response,
    actor: CanWrite,
    service: Service,
    reference: str,
    async_: Annotated[bool, Query(alias="async")] = False,
) -> Data[PausedOut]:
    """Pause a sandbox: save its memory and processes to disk, and free the host's memory."""
    sandbox = await service.pause(
        actor, checked_text(reference, field="reference"), wait=not async_
    )
    response.status_code = 202 if async_ and sandbox.status is not Status.PAUSED else 200
    shown = PausedOut(id=sandbox.id, status=sandbox.status, paused_at=sandbox.paused_at)
    return enveloped(request, shown)


@router.post(
    "/{reference}/resume",
    responses={
        **errors(402, 404, 409),
        202: {"model": Data[ResumedOut], "description": "Under way."},
    },
)
async def resume_sandbox(
    request: Request,
    response: Response,
    actor: CanWrite,
    service: Service,
    reference: str,
    async_: Annotated[bool, Query(alias="async")] = False,
) -> Data[ResumedOut]:
    """Resume a paused sandbox. One in error is booted from its disk."""
    sandbox = await service.resume(
        actor, checked_text(reference, field="reference"), wait=not async_
    )
    response.status_code = 202 if async_ and sandbox.status is not Status.RUNNING else 200
    return enveloped(request, resumed_out(sandbox))


@router.post(
    "/{reference}/restart",
    responses={
        **errors(402, 404, 409),
        202: {"model": Data[ResumedOut], "description": "Under way."},
    },
)
async def restart_sandbox(
    request: Request,
    response: Response,
    actor: CanWrite,
    service: Service,
    reference: str,
    async_: Annotated[bool, Query(alias="async")] = False,
) -> Data[ResumedOut]:
    """Reboot a sandbox from its disk, even if it is unresponsive. Memory is lost."""
    sandbox = await service.restart(
        actor, checked_text(reference, field="reference"), wait=not async_
    )
    response.status_code = 202 if async_ and sandbox.status is not Status.RUNNING else 200
    return enveloped(request, resumed_out(sandbox))


@router.delete(
    "/{reference}",
    responses={**errors(404), 202: {"model": Data[DeletedOut], "description": "Under way."}},
)
async def delete_sandbox(
    request: Request,
    response: Response,
    actor: CanWrite,
    service: Service,
    reference: str,
    async_: Annotated[bool, Query(alias="async")] = False,
) -> Data[DeletedOut]:
    """Delete a sandbox in any status, and wait until it is gone unless `async` is set."""
    checked_text(reference, field="reference")
    sandbox = await service.delete(actor, reference, wait=not async_)
    is_gone = not async_ and sandbox.status is Status.DESTROYED
    response.status_code = 200 if is_gone else 202
    return enveloped(request, DeletedOut(id=sandbox.id, deleted=is_gone))


@router.get("/{reference}/logs", responses=errors(404))
async def logs(request: Request, actor: CanRead, service: Service, reference: str) -> Data[LogsOut]:
    """Return the end of the machine's console log."""
    sandbox, console = await service.logs(actor, checked_text(reference, field="reference"))
    return enveloped(request, LogsOut(sandbox_id=sandbox.id, console=console))


@router.get("/{reference}/stats", responses=errors(404, 409))
async def stats(
    request: Request, actor: CanRead, service: Service, reference: str
) -> Data[StatsOut]:
    """Return current CPU, memory and disk usage and uptime, read in the guest."""
    sandbox, figures = await service.stats(actor, checked_text(reference, field="reference"))
    return enveloped(request, StatsOut(sandbox_id=sandbox.id, stats=stats_of(figures)))
