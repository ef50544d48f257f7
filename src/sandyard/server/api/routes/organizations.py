"""/v1/me and /v1/organizations."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from sandyard.server.api.access import Scope
from sandyard.server.api.models.base import Data, Page
from sandyard.server.api.models.organizations import (
    CreateOrganization,
    FoundedOut,
    MemberOut,
    MeOut,
    OrganizationOut,
    founded_out,
    me_out,
    member_out,
    organization_out,
)
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


Anyone = Annotated[Actor, Depends(Scope(None))]


CanRead = Annotated[Actor, Depends(Scope("org:read"))]


CanWrite = Annotated[Actor, Depends(Scope("org:write"))]


CanSeeMembers = Annotated[Actor, Depends(Scope("org:members"))]


Orgs = Annotated[Organizations, provided("organizations")]


@router.get("/v1/me", responses=errors(404))
async def get_me(request: Request, actor: Anyone, service: Orgs) -> Data[MeOut]:
    """Return the user behind the credential. Needs no scope."""
    return enveloped(request, me_out(await service.me(actor)))


@router.get("/v1/organizations/current", responses=errors(404))
async def get_current_organization(
    request: Request, actor: CanRead, service: Orgs
) -> Data[OrganizationOut]:
    """Return the organization that the credential belongs to."""
    organization, role = await service.get(actor)
    return enveloped(request, organization_out(organization, role))


@router.get("/v1/organizations/{org_id}", responses=errors(404))
async def get_organization(
    request: Request, actor: CanRead, service: Orgs, org_id: str
) -> Data[OrganizationOut]:
    """Return an organization that the user belongs to."""
    organization, role = await service.get(actor, checked_text(org_id, field="org_id"))
    return enveloped(request, organization_out(organization, role))


@router.post("/v1/organizations", status_code=201, responses=errors(404, 409))
async def create_organization(
    request: Request, actor: CanWrite, service: Orgs, body: CreateOrganization, keyed: Keyed
) -> Data[FoundedOut]:
    """Create an organization, with the caller as its first admin. Organizations cannot be
    deleted."""
    founded = await service.create(actor, body.name, request=keyed)
    shown = founded_out(
        founded.organization, project_id=founded.project.id, workspace_id=founded.workspace.id
    )
    return enveloped(request, shown)


@router.get("/v1/organizations/{org_id}/members", responses=errors(404))
async def list_members(
    request: Request, actor: CanSeeMembers, service: Orgs, org_id: str
) -> Page[MemberOut]:
    """List an organization's members, longest-standing first."""
    members = await service.members(actor, checked_text(org_id, field="org_id"))
    return whole(request, [member_out(user, member) for user, member in members])
