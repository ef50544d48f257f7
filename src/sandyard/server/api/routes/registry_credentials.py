"""/v1/registry-credentials."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from sandyard.server.api.access import Scope
from sandyard.server.api.models.base import Data, RemovedOut
from sandyard.server.api.models.registry_credentials import (
    AddRegistryCredential,
    RegistryCredentialOut,
    credential_out,
)
from sandyard.server.api.routes.common import Keyed, enveloped, errors, provided
from sandyard.server.core.ids import checked_text
from sandyard.server.service.actor import Actor
from sandyard.server.service.builds.credentials import RegistryCredentials

router = APIRouter(prefix="/v1/registry-credentials", tags=["templates"])

CanRead = Annotated[Actor, Depends(Scope("template:read"))]
CanWrite = Annotated[Actor, Depends(Scope("template:write"))]


Service = Annotated[RegistryCredentials, provided("registry_credentials")]


@router.post("", status_code=201, responses=errors(404, 409))
async def add_registry_credential(
    request: Request, actor: CanWrite, service: Service, keyed: Keyed, body: AddRegistryCredential
) -> Data[RegistryCredentialOut]:
    """Keep a name and a password for a registry, for builds that name them by id."""
    made = await service.add(
        actor, host=body.host, username=body.username, password=body.password, request=keyed
    )
    return enveloped(request, credential_out(made))


@router.get("", responses=errors())
async def list_registry_credentials(
    request: Request, actor: CanRead, service: Service
) -> Data[list[RegistryCredentialOut]]:
    """List the organization's credentials for registries, newest first."""
    return enveloped(request, [credential_out(one) for one in await service.every(actor)])


@router.delete("/{credential}", responses=errors(404))
async def delete_registry_credential(
    request: Request, actor: CanWrite, service: Service, credential: str
) -> Data[RemovedOut]:
    """Delete a credential."""
    await service.delete(actor, checked_text(credential, field="credential"))
    return enveloped(request, RemovedOut(id=credential, deleted=True))
