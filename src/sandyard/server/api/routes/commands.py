"""Commands in sandboxes."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from sandyard.server.api.access import Scope
from sandyard.server.api.models.base import Data
from sandyard.server.api.models.commands import Exec, ExecOut
from sandyard.server.api.routes.common import enveloped, errors
from sandyard.server.core.ids import check_text
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.execute import Command
from sandyard.server.service.sandboxes.sandboxes import Sandboxes

router = APIRouter(prefix="/v1/sandboxes", tags=["sandboxes"])


CanWrite = Annotated[Actor, Depends(Scope("sandbox:write"))]


def _service(request: Request) -> Sandboxes:
    service: Sandboxes = request.app.state.services.sandboxes
    return service


Service = Annotated[Sandboxes, Depends(_service)]


@router.post("/{reference}/exec", responses=errors(402, 404, 409))
async def execute(
    request: Request, actor: CanWrite, service: Service, reference: str, body: Exec
) -> Data[ExecOut]:
    """Run a command and return what it printed. A non-zero exit code is no error."""
    outcome = await service.execute(
        actor,
        check_text(reference, field="reference"),
        Command(
            command=body.command,
            timeout_ms=body.timeout,
            cwd=body.cwd,
            env=body.env,
            stdin=body.stdin,
            user=body.user,
            encoding=body.encoding,
        ),
    )
    return enveloped(
        request,
        ExecOut(
            stdout=outcome.stdout,
            stderr=outcome.stderr,
            exit_code=outcome.exit_code,
            duration_ms=outcome.duration_ms,
            execution_time=outcome.duration_ms,
            timed_out=outcome.timed_out,
            truncated=outcome.truncated,
            signal=outcome.signal,
        ),
    )
