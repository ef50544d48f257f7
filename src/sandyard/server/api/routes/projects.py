"""/v1/projects."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from sandyard.server.api.access import Scope
from sandyard.server.api.models.base import Data, Page, RemovedOut
from sandyard.server.api.models.projects import CreateProject, PatchProject, ProjectOut, project_out
from sandyard.server.api.routes.common import (
    Keyed,
    enveloped,
    errors,
    provided,
    whole,
)
from sandyard.server.core.ids import checked_text
from sandyard.server.service.actor import Actor
from sandyard.server.service.people.organizations import Organizations

router = APIRouter(tags=["accounts"])


CanRead = Annotated[Actor, Depends(Scope("org:read"))]


CanWrite = Annotated[Actor, Depends(Scope("org:write"))]


Orgs = Annotated[Organizations, provided("organizations")]


@router.get("/v1/projects", responses=errors())
async def list_projects(request: Request, actor: CanRead, service: Orgs) -> Page[ProjectOut]:
    """List projects, the default one first."""
    return whole(request, [project_out(one) for one in await service.projects(actor)])


@router.post("/v1/projects", status_code=201, responses=errors(404, 409))
async def create_project(
    request: Request, actor: CanWrite, service: Orgs, body: CreateProject, keyed: Keyed
) -> Data[ProjectOut]:
    """Create a project, which groups sandboxes and keys. It grants no rights."""
    project = await service.create_project(
        actor, body.name, slug=body.slug, color=body.color, request=keyed
    )
    return enveloped(request, project_out(project))


@router.get("/v1/projects/{project_id}", responses=errors(404))
async def get_project(
    request: Request, actor: CanRead, service: Orgs, project_id: str
) -> Data[ProjectOut]:
    """Return a project."""
    project = await service.project(actor, checked_text(project_id, field="project_id"))
    return enveloped(request, project_out(project))


@router.patch("/v1/projects/{project_id}", responses=errors(404))
async def change_project(
    request: Request, actor: CanWrite, service: Orgs, project_id: str, body: PatchProject
) -> Data[ProjectOut]:
    """Change a project's name or color."""
    project = await service.change_project(
        actor, checked_text(project_id, field="project_id"), name=body.name, color=body.color
    )
    return enveloped(request, project_out(project))


@router.delete("/v1/projects/{project_id}", responses=errors(404, 409))
async def delete_project(
    request: Request, actor: CanWrite, service: Orgs, project_id: str
) -> Data[RemovedOut]:
    """Delete a project. Its sandboxes and keys move to the default project, which cannot be
    deleted."""
    project = await service.delete_project(actor, checked_text(project_id, field="project_id"))
    return enveloped(request, RemovedOut(id=project.id, deleted=True))
