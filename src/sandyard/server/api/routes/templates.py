"""/v1/templates."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request

from sandyard.server.api.access import Scope
from sandyard.server.api.models.base import Data
from sandyard.server.api.models.templates import TemplateDefaults, TemplateOut
from sandyard.server.api.routes.common import enveloped, errors, provided
from sandyard.server.core.contracts.node import TemplateFact
from sandyard.server.core.errors import NotFoundError
from sandyard.server.core.shapes import format_size
from sandyard.server.service.actor import Actor
from sandyard.server.service.templates import Templates

router = APIRouter(prefix="/v1/templates", tags=["templates"])

CanRead = Annotated[Actor, Depends(Scope("sandbox:read"))]


Service = Annotated[Templates, provided("templates")]


@router.get("", responses=errors())
async def list_templates(
    request: Request, actor: CanRead, service: Service
) -> Data[list[TemplateOut]]:
    """List the templates of this installation, built or not."""
    return enveloped(request, [_out(fact) for fact in await service.all()])


@router.get("/{slug}", responses=errors(404))
async def get_template(
    request: Request, actor: CanRead, service: Service, slug: str
) -> Data[TemplateOut]:
    """Return one template."""
    for fact in await service.all():
        if fact.slug == slug:
            return enveloped(request, _out(fact))
    raise NotFoundError(f"cannot find the template {slug[:80]!r}")


def _out(fact: TemplateFact) -> TemplateOut:
    return TemplateOut.model_validate(
        {
            "slug": fact.slug,
            "name": fact.name,
            "description": fact.description,
            "os": fact.os,
            "kind": fact.kind,
            "status": fact.status.value,
            "sizeBytes": fact.size_bytes,
            "defaults": TemplateDefaults(
                vcpus=fact.defaults.vcpus,
                memory=format_size(fact.defaults.memory_mib),
                disk=format_size(fact.defaults.disk_mib),
            ),
            "digest": fact.digest,
            "createdAt": fact.created_at,
            "error": fact.error,
        }
    )
