"""/v1/secrets."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from sandyard.server.api.access import Scope
from sandyard.server.api.models.base import Data, RemovedOut
from sandyard.server.api.models.secrets import AddSecret, ReplaceSecret, SecretOut, secret_out
from sandyard.server.api.routes.common import Keyed, enveloped, errors, provided
from sandyard.server.core.ids import checked_text
from sandyard.server.service.actor import Actor
from sandyard.server.service.network.secrets import Secrets

router = APIRouter(prefix="/v1/secrets", tags=["network"])

CanRead = Annotated[Actor, Depends(Scope("secret:read"))]
CanWrite = Annotated[Actor, Depends(Scope("secret:write"))]
Service = Annotated[Secrets, provided("secrets")]


@router.post("", status_code=201, responses=errors(404, 409))
async def add_secret(
    request: Request, actor: CanWrite, service: Service, keyed: Keyed, body: AddSecret
) -> Data[SecretOut]:
    """Keep a secret, for network rules that name it."""
    made = await service.add(
        actor, name=body.name, value=body.value, hosts=body.hosts, request=keyed
    )
    return enveloped(request, secret_out(made))


@router.get("", responses=errors())
async def list_secrets(request: Request, actor: CanRead, service: Service) -> Data[list[SecretOut]]:
    """List the organization's secrets by name, without their values."""
    return enveloped(request, [secret_out(one) for one in await service.every(actor)])


@router.put("/{name}", responses=errors(404))
async def replace_secret(
    request: Request, actor: CanWrite, service: Service, name: str, body: ReplaceSecret
) -> Data[SecretOut]:
    """Replace a secret's value or hosts. Sandboxes' requests are given the new value when this is
    answered, except where a host is busy or away: there they are as soon as possible."""
    made = await service.replace(
        actor, checked_text(name, field="name"), value=body.value, hosts=body.hosts
    )
    return enveloped(request, secret_out(made))


@router.delete("/{name}", responses=errors(404))
async def delete_secret(
    request: Request, actor: CanWrite, service: Service, name: str
) -> Data[RemovedOut]:
    """Delete a secret. Requests that need it are refused from then on."""
    gone = await service.delete(actor, checked_text(name, field="name"))
    return enveloped(request, RemovedOut(id=gone.id, deleted=True))
