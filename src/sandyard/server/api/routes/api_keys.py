"""/v1/api-keys."""

from typing import Annotated, Literal, cast

from fastapi import APIRouter, Depends, Query, Request

from sandyard.server.api.access import Scope
from sandyard.server.api.cursors import Cursor
from sandyard.server.api.models.api_keys import (
    ApiKeyOut,
    CreateApiKey,
    NewApiKey,
    NewApiKeyOut,
    PatchApiKey,
    api_key_values,
)
from sandyard.server.api.models.base import Data, Meta, Page
from sandyard.server.api.routes.common import (
    enveloped,
    errors,
    paged,
    provided,
)
from sandyard.server.core.ids import checked_text
from sandyard.server.core.records import ApiKey
from sandyard.server.front.cursors import decode_cursor
from sandyard.server.service.actor import Actor
from sandyard.server.service.people.api_keys import ApiKeys, status_of

router = APIRouter(tags=["accounts"])


CanRead = Annotated[Actor, Depends(Scope("org:read"))]


CanWrite = Annotated[Actor, Depends(Scope("org:write"))]


Limit = Annotated[int, Query(ge=1, le=500)]


Keys = Annotated[ApiKeys, provided("api_keys")]


@router.post("/v1/api-keys", status_code=201, responses=errors(409))
async def create_api_key(
    request: Request, actor: CanWrite, service: Keys, body: CreateApiKey
) -> NewApiKey:
    """Create an API key. The secret is in this answer only."""
    key, secret = await service.create(
        actor,
        body.name,
        scopes=body.scopes,
        expires_in=body.expires_in,
        is_test=body.is_test,
        project_id=body.project_id,
        is_for_e2b=body.format == "e2b",
    )
    return _with_secret(request, key, secret)


@router.get("/v1/api-keys", responses=errors())
async def list_api_keys(
    request: Request,
    actor: CanRead,
    service: Keys,
    limit: Limit = 500,
    cursor: Cursor = None,
) -> Page[ApiKeyOut]:
    """List API keys that are not revoked, newest first. Members see their own, admins the
    organization's."""
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
    key = await service.get(actor, checked_text(key_id, field="key_id"))
    return enveloped(request, _shown(request, key))


@router.patch("/v1/api-keys/{key_id}", responses=errors(404, 409))
async def change_api_key(
    request: Request, actor: CanWrite, service: Keys, key_id: str, body: PatchApiKey
) -> Data[ApiKeyOut]:
    """Change an API key's name, scopes, project or expiry."""
    key = await service.change(
        actor,
        checked_text(key_id, field="key_id"),
        name=body.name,
        scopes=body.scopes,
        project_id=body.project_id,
        expires_in=body.expires_in,
    )
    return enveloped(request, _shown(request, key))


@router.delete("/v1/api-keys/{key_id}", responses=errors(404))
async def revoke_api_key(
    request: Request, actor: CanWrite, service: Keys, key_id: str
) -> Data[ApiKeyOut]:
    """Revoke an API key permanently, from the next request on."""
    key = await service.revoke(actor, checked_text(key_id, field="key_id"))
    return enveloped(request, _shown(request, key))


@router.post("/v1/api-keys/{key_id}/rotate", responses=errors(404, 409))
async def rotate_api_key(
    request: Request, actor: CanWrite, service: Keys, key_id: str
) -> NewApiKey:
    """Replace an API key's secret. The old secret stops working at once."""
    key, secret = await service.rotate(actor, checked_text(key_id, field="key_id"))
    return _with_secret(request, key, secret)


def _values(request: Request, key: ApiKey) -> dict[str, object]:
    status = status_of(key, request.app.state.services.clock.now())
    return api_key_values(key, cast("Literal['active', 'expired', 'revoked']", status))


def _shown(request: Request, key: ApiKey) -> ApiKeyOut:
    return ApiKeyOut.model_validate(_values(request, key), by_name=True)


def _with_secret(request: Request, key: ApiKey, secret: str) -> NewApiKey:
    shown = NewApiKeyOut.model_validate(_values(request, key) | {"key": secret}, by_name=True)
    return NewApiKey(data=shown, meta=Meta(request_id=request.state.request_id))
