"""/v1/me, /v1/organizations, /v1/projects, /v1/api-keys, /v1/ssh-keys."""

from typing import Annotated, Literal, cast

from fastapi import APIRouter, Depends, Query, Request

from sandyard.server.api.access import Scope
from sandyard.server.api.account_models import (
    ApiKeyOut,
    CreateApiKey,
    CreateOrganization,
    CreateProject,
    CreateSshKey,
    FoundedOut,
    MemberOut,
    MeOut,
    NewApiKey,
    NewApiKeyOut,
    OrganizationOut,
    PatchApiKey,
    PatchProject,
    ProjectOut,
    SshKeyOut,
    SuccessOut,
    api_key_values,
    founded_out,
    me_out,
    member_out,
    organization_out,
    project_out,
    ssh_key_out,
)
from sandyard.server.api.cursors import decode_cursor
from sandyard.server.api.models import Data, Meta, Page, RemovedOut
from sandyard.server.api.routes.common import (
    Keyed,
    check_no_null,
    enveloped,
    errors,
    paged,
    whole,
)
from sandyard.server.core.ids import check_text
from sandyard.server.core.records import ApiKey
from sandyard.server.service.access import Actor
from sandyard.server.service.api_keys import ApiKeys, status_of
from sandyard.server.service.organizations import Organizations
from sandyard.server.service.ssh_keys import SshKeys

router = APIRouter(tags=["accounts"])

Anyone = Annotated[Actor, Depends(Scope(None))]
CanRead = Annotated[Actor, Depends(Scope("org:read"))]
CanWrite = Annotated[Actor, Depends(Scope("org:write"))]
CanSeeMembers = Annotated[Actor, Depends(Scope("org:members"))]
CanUseSshKeys = Annotated[Actor, Depends(Scope("ssh-key:*"))]
Limit = Annotated[int, Query(ge=1, le=500)]


def _organizations(request: Request) -> Organizations:
    service: Organizations = request.app.state.services.organizations
    return service


def _api_keys(request: Request) -> ApiKeys:
    service: ApiKeys = request.app.state.services.api_keys
    return service


def _ssh_keys(request: Request) -> SshKeys:
    service: SshKeys = request.app.state.services.ssh_keys
    return service


Orgs = Annotated[Organizations, Depends(_organizations)]
Keys = Annotated[ApiKeys, Depends(_api_keys)]
SshKeyService = Annotated[SshKeys, Depends(_ssh_keys)]


@router.get("/v1/me", responses=errors(404))
async def get_me(request: Request, actor: Anyone, service: Orgs) -> Data[MeOut]:
    """Return the user behind the credential; any credential will do."""
    return enveloped(request, me_out(await service.me(actor)))


@router.get("/v1/organizations/current", responses=errors(404))
async def get_current_organization(
    request: Request, actor: CanRead, service: Orgs
) -> Data[OrganizationOut]:
    """Return the organization that the credential is for."""
    organization, role = await service.get(actor)
    return enveloped(request, organization_out(organization, role))


@router.get("/v1/organizations/{org_id}", responses=errors(404))
async def get_organization(
    request: Request, actor: CanRead, service: Orgs, org_id: str
) -> Data[OrganizationOut]:
    """Return an organization that the user belongs to."""
    organization, role = await service.get(actor, check_text(org_id, field="org_id"))
    return enveloped(request, organization_out(organization, role))


@router.post("/v1/organizations", status_code=201, responses=errors(404, 409))
async def create_organization(
    request: Request, actor: CanWrite, service: Orgs, body: CreateOrganization, keyed: Keyed
) -> Data[FoundedOut]:
    """Make an organization; who asks is its first admin. Organizations are never deleted."""
    founded = await service.create(actor, body.name, request=keyed)
    shown = founded_out(
        founded.organization, project_id=founded.project.id, workspace_id=founded.workspace.id
    )
    return enveloped(request, shown)


@router.get("/v1/organizations/{org_id}/members", responses=errors(404))
async def list_members(
    request: Request, actor: CanSeeMembers, service: Orgs, org_id: str
) -> Page[MemberOut]:
    """List an organization's members, the longest there first."""
    members = await service.members(actor, check_text(org_id, field="org_id"))
    return whole(request, [member_out(user, member) for user, member in members])


# --- projects -----------------------------------------------------------------------------------


@router.get("/v1/projects", responses=errors())
async def list_projects(request: Request, actor: CanRead, service: Orgs) -> Page[ProjectOut]:
    """List projects, the default one first."""
    return whole(request, [project_out(one) for one in await service.projects(actor)])


@router.post("/v1/projects", status_code=201, responses=errors(404, 409))
async def create_project(
    request: Request, actor: CanWrite, service: Orgs, body: CreateProject, keyed: Keyed
) -> Data[ProjectOut]:
    """Make a project: a group of sandboxes and keys, which grants nothing."""
    project = await service.create_project(
        actor, body.name, slug=body.slug, color=body.color, request=keyed
    )
    return enveloped(request, project_out(project))


@router.get("/v1/projects/{project_id}", responses=errors(404))
async def get_project(
    request: Request, actor: CanRead, service: Orgs, project_id: str
) -> Data[ProjectOut]:
    """Return a project."""
    project = await service.project(actor, check_text(project_id, field="project_id"))
    return enveloped(request, project_out(project))


@router.patch("/v1/projects/{project_id}", responses=errors(404))
async def change_project(
    request: Request, actor: CanWrite, service: Orgs, project_id: str, body: PatchProject
) -> Data[ProjectOut]:
    """Change a project's name or color."""
    check_no_null(body)
    project = await service.change_project(
        actor, check_text(project_id, field="project_id"), name=body.name, color=body.color
    )
    return enveloped(request, project_out(project))


@router.delete("/v1/projects/{project_id}", responses=errors(404, 409))
async def delete_project(
    request: Request, actor: CanWrite, service: Orgs, project_id: str
) -> Data[RemovedOut]:
    """Delete a project; what was in it goes to the default one, which cannot be deleted."""
    project = await service.delete_project(actor, check_text(project_id, field="project_id"))
    return enveloped(request, RemovedOut(id=project.id, deleted=True))


# --- API keys -----------------------------------------------------------------------------------


@router.post("/v1/api-keys", status_code=201, responses=errors(409))
async def create_api_key(
    request: Request, actor: CanWrite, service: Keys, body: CreateApiKey
) -> NewApiKey:
    """Make an API key. Its secret is in this answer and nowhere else."""
    key, secret = await service.create(
        actor,
        body.name,
        scopes=body.scopes,
        expires_in=body.expires_in,
        is_test=body.is_test,
        project_id=body.project_id,
    )
    return _with_secret(request, key, secret)


@router.get("/v1/api-keys", responses=errors())
async def list_api_keys(
    request: Request,
    actor: CanRead,
    service: Keys,
    limit: Limit = 500,
    cursor: str | None = None,
) -> Page[ApiKeyOut]:
    """List API keys that are not revoked, newest first: one's own, an admin the organization's."""
    after = decode_cursor(cursor) if cursor else None
    found = await service.page(actor, limit=limit + 1, after=after)
    return paged(
        request,
        found,
        limit,
        lambda key: _shown(request, key),
        lambda key: (key.created_at, key.id),
    )


@router.get("/v1/api-keys/{key_id}", responses=errors(404))
async def get_api_key(
    request: Request, actor: CanRead, service: Keys, key_id: str
) -> Data[ApiKeyOut]:
    """Return an API key without its secret."""
    key = await service.get(actor, check_text(key_id, field="key_id"))
    return enveloped(request, _shown(request, key))


@router.patch("/v1/api-keys/{key_id}", responses=errors(404, 409))
async def change_api_key(
    request: Request, actor: CanWrite, service: Keys, key_id: str, body: PatchApiKey
) -> Data[ApiKeyOut]:
    """Change an API key's name, scopes or project (null takes it out of its project)."""
    check_no_null(body, but=frozenset({"project_id"}))
    key = await service.change(
        actor,
        check_text(key_id, field="key_id"),
        name=body.name,
        scopes=body.scopes,
        project_id=body.project_id,
        moves="project_id" in body.model_fields_set,
    )
    return enveloped(request, _shown(request, key))


@router.delete("/v1/api-keys/{key_id}", responses=errors(404))
async def revoke_api_key(
    request: Request, actor: CanWrite, service: Keys, key_id: str
) -> Data[ApiKeyOut]:
    """Revoke an API key, from the next request on and for ever."""
    key = await service.revoke(actor, check_text(key_id, field="key_id"))
    return enveloped(request, _shown(request, key))


@router.post("/v1/api-keys/{key_id}/rotate", responses=errors(404, 409))
async def rotate_api_key(
    request: Request, actor: CanWrite, service: Keys, key_id: str
) -> NewApiKey:
    """Give an API key a new secret; the old one is no good from now on."""
    key, secret = await service.rotate(actor, check_text(key_id, field="key_id"))
    return _with_secret(request, key, secret)


def _values(request: Request, key: ApiKey) -> dict[str, object]:
    status = status_of(key, request.app.state.services.now())
    return api_key_values(key, cast("Literal['active', 'expired', 'revoked']", status))


def _shown(request: Request, key: ApiKey) -> ApiKeyOut:
    return ApiKeyOut.model_validate(_values(request, key), by_name=True)


def _with_secret(request: Request, key: ApiKey, secret: str) -> NewApiKey:
    shown = NewApiKeyOut.model_validate(_values(request, key) | {"key": secret}, by_name=True)
    return NewApiKey(data=shown, meta=Meta(request_id=request.state.request_id))


# --- SSH keys -----------------------------------------------------------------------------------


@router.post("/v1/ssh-keys", status_code=201, responses=errors(404, 409))
async def add_ssh_key(
    request: Request, actor: CanUseSshKeys, service: SshKeyService, body: CreateSshKey, keyed: Keyed
) -> Data[SshKeyOut]:
    """Add a public key; it opens sandboxes that are made from now on."""
    key = await service.add(actor, body.name, body.public_key, request=keyed)
    return enveloped(request, ssh_key_out(key))


@router.get("/v1/ssh-keys", responses=errors())
async def list_ssh_keys(
    request: Request, actor: CanUseSshKeys, service: SshKeyService
) -> Page[SshKeyOut]:
    """List the organization's SSH keys, newest first."""
    return whole(request, [ssh_key_out(one) for one in await service.every(actor)])


@router.delete("/v1/ssh-keys/{key_id}", responses=errors(404))
async def delete_ssh_key(
    request: Request, actor: CanUseSshKeys, service: SshKeyService, key_id: str
) -> Data[SuccessOut]:
    """Delete an SSH key; sandboxes that have it keep it."""
    await service.delete(actor, check_text(key_id, field="key_id"))
    return enveloped(request, SuccessOut())
