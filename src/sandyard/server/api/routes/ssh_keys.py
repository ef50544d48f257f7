"""/v1/ssh-keys."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from sandyard.server.api.access import Scope
from sandyard.server.api.models.base import Data, Page
from sandyard.server.api.models.ssh_keys import CreateSshKey, SshKeyOut, SuccessOut, ssh_key_out
from sandyard.server.api.routes.common import (
    Keyed,
    enveloped,
    errors,
    provided,
    whole,
)
from sandyard.server.core.ids import checked_text
from sandyard.server.service.actor import Actor
from sandyard.server.service.people.ssh_keys import SshKeys

router = APIRouter(tags=["accounts"])


CanUseSshKeys = Annotated[Actor, Depends(Scope("ssh-key:*"))]


SshKeyService = Annotated[SshKeys, provided("ssh_keys")]


@router.post("/v1/ssh-keys", status_code=201, responses=errors(404, 409))
async def add_ssh_key(
    request: Request, actor: CanUseSshKeys, service: SshKeyService, body: CreateSshKey, keyed: Keyed
) -> Data[SshKeyOut]:
    """Add a public key. Sandboxes created from now on accept it."""
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
    """Delete an SSH key. Sandboxes that accepted it through its id no longer do."""
    await service.delete(actor, checked_text(key_id, field="key_id"))
    return enveloped(request, SuccessOut())
