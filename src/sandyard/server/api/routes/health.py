"""/healthz, /servez and /readyz."""

from fastapi import APIRouter, Request, Response

from sandyard.server.api.access import open_to_all
from sandyard.server.api.models.health import Health
from sandyard.server.service.readiness import Readiness

router = APIRouter(tags=["operations"])


@router.get("/healthz", response_model=Health)
@open_to_all
async def healthz() -> Health:
    """Report that the process is running."""
    return Health(status="ok")


@router.get("/servez", response_model=Health, responses={503: {"model": Health}})
@open_to_all
async def servez(request: Request, response: Response) -> Health:
    """Report whether this server can serve requests, for a load balancer. The answer comes from
    memory, at once."""
    readiness: Readiness = request.app.state.services.readiness
    trouble = readiness.cannot_serve
    if trouble is None:
        return Health(status="ok")
    response.status_code = 503
    response.headers["Retry-After"] = "2"
    return Health(status="unready", missing=[trouble])


@router.get("/readyz", response_model=Health, responses={503: {"model": Health}})
@open_to_all
async def readyz(request: Request, response: Response) -> Health:
    """Report whether sandboxes can be created, and what is missing if not."""
    readiness: Readiness = request.app.state.services.readiness
    missing = await readiness.missing()
    if missing:
        response.status_code = 503
        response.headers["Retry-After"] = "2"
    limited = await readiness.limited()
    return Health(status="unready" if missing else "ok", missing=missing, limited=limited)
