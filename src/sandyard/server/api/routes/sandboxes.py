"""/v1/sandboxes."""

import json
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request, Response

from sandyard.server.api.access import Scope
from sandyard.server.api.cursors import decode_cursor
from sandyard.server.api.models.base import Data, Page
from sandyard.server.api.models.sandboxes import (
    CreateSandbox,
    DeletedOut,
    PatchSandbox,
    PausedOut,
    ReasonOut,
    ResumedOut,
    SandboxOut,
    Stats,
    StatsOut,
    sandbox_out,
)
from sandyard.server.api.routes.common import Keyed, check_no_null, enveloped, errors, paged
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ids import check_json, check_text
from sandyard.server.core.records import SandboxQuery
from sandyard.server.core.states import Status
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.sandboxes import Changes, NewSandbox, Sandboxes

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"])


CanCreate = Annotated[Actor, Depends(Scope("sandbox:create"))]


CanRead = Annotated[Actor, Depends(Scope("sandbox:read"))]


CanWrite = Annotated[Actor, Depends(Scope("sandbox:write"))]


def _service(request: Request) -> Sandboxes:
    service: Sandboxes = request.app.state.services.sandboxes
    return service


Service = Annotated[Sandboxes, Depends(_service)]


Wait = Annotated[
    int, Query(ge=0, le=60, description="Hold the answer so many seconds until it runs.")
]


@router.post("", status_code=201, responses=errors(402, 409))
async def create_sandbox(
    request: Request,
    actor: CanCreate,
    service: Service,
    body: CreateSandbox,
    keyed: Keyed,
    wait: Wait = 0,
) -> Data[SandboxOut]:
    """Create a sandbox. If none waited it starts meanwhile; `wait` holds the answer till then."""
    _check_offered(body)
    check_text(body.template, field="template")
    check_json(body.metadata, field="metadata")
    resources = body.resources
    sandbox = await service.create(
        actor,
        NewSandbox(
            template=body.template,
            name=body.name,
            tags=body.tags,
            idle_timeout_s=body.idle_timeout,
            vcpus=resources.vcpus if resources else None,
            memory=resources.memory if resources else None,
            disk=resources.disk if resources else None,
            env=body.env,
            ssh_keys=body.ssh_keys,
            root_password=body.root_password,
            project_id=body.project_id,
            metadata=body.metadata,
            metadata_size=_size_of(body.metadata),
            auto_resume=body.auto_resume,
            expires_in_s=body.expires_in,
            snapshot=body.snapshot,
            names_template="template" in body.model_fields_set,
        ),
        request=keyed,
    )
    if wait:
        sandbox = await service.wait_until_up(sandbox, limit_s=wait)
    return enveloped(request, sandbox_out(sandbox, actor))


@router.get("", responses=errors())
async def list_sandboxes(
    request: Request,
    actor: CanRead,
    service: Service,
    status: Annotated[list[Status] | None, Query()] = None,
    tag: Annotated[list[str] | None, Query(description="All must match.")] = None,
    template: str | None = None,
    exclude_template: str | None = None,
    project_id: str | None = None,
    limit: Annotated[int, Query(ge=1, le=500)] = 500,
    cursor: str | None = None,
    all_: Annotated[bool, Query(alias="all")] = False,
) -> Page[SandboxOut]:
    """List sandboxes, newest first."""
    for field, text in (
        ("template", template), ("exclude_template", exclude_template), ("project_id", project_id),
        *(("tag", one) for one in tag or ()),
    ):  # fmt: skip
        check_text(text or "", field=field)
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
            after=decode_cursor(cursor) if cursor else None,
        ),
        wants_all=all_,
    )
    return paged(
        request,
        found,
        limit,
        lambda sandbox: sandbox_out(sandbox, actor),
        lambda sandbox: (sandbox.created_at, sandbox.id),
    )


@router.get("/{reference}", responses=errors(404))
async def get_sandbox(
    request: Request, actor: CanRead, service: Service, reference: str
) -> Data[SandboxOut]:
    """Return one sandbox, by id or name."""
    sandbox = await service.get(actor, check_text(reference, field="reference"))
    return enveloped(request, sandbox_out(sandbox, actor))


@router.patch("/{reference}", responses=errors(404, 409))
async def change_sandbox(
    request: Request, actor: CanWrite, service: Service, reference: str, body: PatchSandbox
) -> Data[SandboxOut]:
    """Change name, tags, idle time-out, metadata, project or auto-resume of a sandbox."""
    check_no_null(body, but=frozenset({"name"}))
    check_json(body.metadata, field="metadata")
    sandbox = await service.change(
        actor,
        check_text(reference, field="reference"),
        Changes(
            renames="name" in body.model_fields_set,
            name=body.name,
            tags=body.tags,
            idle_timeout_s=body.idle_timeout,
            metadata=body.metadata,
            metadata_size=_size_of(body.metadata),
            project_id=body.project_id,
            auto_resume=body.auto_resume,
        ),
    )
    return enveloped(request, sandbox_out(sandbox, actor))


@router.post("/{reference}/touch", responses=errors(404, 409))
async def touch_sandbox(
    request: Request, actor: CanWrite, service: Service, reference: str
) -> Data[SandboxOut]:
    """Count as a use of a sandbox, which is then not idle."""
    sandbox = await service.touch(actor, check_text(reference, field="reference"))
    return enveloped(request, sandbox_out(sandbox, actor))


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
    """Save a running sandbox to disk, processes and all, and give its memory back."""
    sandbox = await service.pause(actor, check_text(reference, field="reference"), wait=not async_)
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
    """Let a paused sandbox go on where it stood; one in error is booted from its disk."""
    sandbox = await service.resume(actor, check_text(reference, field="reference"), wait=not async_)
    response.status_code = 202 if async_ and sandbox.status is not Status.RUNNING else 200
    reason = sandbox.reason
    return enveloped(
        request,
        ResumedOut(
            id=sandbox.id,
            status=sandbox.status,
            resumed_at=sandbox.started_at if sandbox.status is Status.RUNNING else None,
            status_reason=ReasonOut(code=reason.code, message=reason.message) if reason else None,
        ),
    )


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
    """Delete a sandbox, whatever its status, and wait until it is gone unless `async`."""
    check_text(reference, field="reference")
    sandbox = await service.delete(actor, reference, wait=not async_)
    response.status_code = 202 if async_ else 200
    return enveloped(request, DeletedOut(id=sandbox.id, deleted=not async_))


@router.get("/{reference}/stats", responses=errors(404, 409))
async def stats(
    request: Request, actor: CanRead, service: Service, reference: str
) -> Data[StatsOut]:
    """Return CPU, memory, disk and uptime, read in the guest now."""
    sandbox, figures = await service.stats(actor, check_text(reference, field="reference"))
    shown = Stats(
        cpu_percent=float(figures["cpuPercent"]),
        memory_used_bytes=int(figures["memoryUsedBytes"]),
        memory_total_bytes=int(figures["memoryTotalBytes"]),
        disk_used_bytes=int(figures["diskUsedBytes"]),
        disk_total_bytes=int(figures["diskTotalBytes"]),
        uptime=float(figures["uptime"]),
    )
    return enveloped(request, StatsOut(sandbox_id=sandbox.id, stats=shown))


def _size_of(metadata: object) -> int:
    return len(json.dumps(metadata, ensure_ascii=False).encode("utf-8", "replace"))


def _check_offered(body: CreateSandbox) -> None:
    """Refuse what would otherwise be left out in silence, and so be believed to be in force."""
    if body.mounts:
        raise InvalidArgumentError(
            f"cannot mount {body.mounts[0].workspace_id[:80]!r}: the organization has no such "
            "workspace",
            field="mounts",
        )
    network = body.network or {}
    if network.get("egress", "allow") != "allow" or network.get("allow") or network.get("deny"):
        raise InvalidArgumentError(
            "cannot restrict the network of one sandbox: this version offers the default alone "
            "(internet allowed; host, other sandboxes and private ranges denied)",
            field="network",
        )
