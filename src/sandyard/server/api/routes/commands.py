"""Commands in sandboxes."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from sandyard.server.api.access import Scope
from sandyard.server.api.models.base import Data
from sandyard.server.api.models.commands import Exec, ExecOut, exec_out
from sandyard.server.api.routes.common import enveloped, errors, provided
from sandyard.server.core.ids import checked_text
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.execute import Command, Commands

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"])


CanWrite = Annotated[Actor, Depends(Scope("sandbox:write"))]


Service = Annotated[Commands, provided("commands")]


@router.post("/{reference}/exec", responses=errors(402, 404, 409))
async def execute(
    request: Request, actor: CanWrite, service: Service, reference: str, body: Exec
) -> Data[ExecOut]:
    """Run a command and return what it printed. A non-zero exit code is no error."""
    command = Command(**body.model_dump(by_alias=False))
    outcome = await service.execute(actor, checked_text(reference, field="reference"), command)
    return enveloped(request, exec_out(outcome))
