"""/v1/activity: what happened, which is the audit log as well."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Request, Response

from sandyard.server.api.access import Scope, takes_query_key
from sandyard.server.api.cursors import Cursor
from sandyard.server.api.events import EventStream, Recheck, SseEvent, rechecked
from sandyard.server.api.models.activity import EventPage, EventsOut, event_out
from sandyard.server.api.models.base import PageMeta
from sandyard.server.api.models.sandboxes import sandbox_out
from sandyard.server.api.routes.common import Where, errors, provided
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ids import checked_text
from sandyard.server.core.records import Activity, Sandbox
from sandyard.server.front.cursors import decode_cursor, encode_cursor
from sandyard.server.service.actor import Actor
from sandyard.server.service.addresses import Addresses
from sandyard.server.service.feed import Feed

router = APIRouter(tags=["activity"])

CanReadFeed = Annotated[Actor, Depends(Scope("activity:read"))]
CanReadSandbox = Annotated[Actor, Depends(Scope("sandbox:read"))]
MayFollow = Annotated[Recheck, rechecked("sandbox:read")]
Limit = Annotated[int, Query(ge=1, le=500)]


Service = Annotated[Feed, provided("feed")]


@router.get("/v1/activity", responses=errors())
async def list_activity(
    request: Request,
    actor: CanReadFeed,
    service: Service,
    resource_type: str | None = None,
    resource_id: str | None = None,
    event_type: str | None = None,
    severity: str | None = None,
    status: str | None = None,
    actor_user_id: str | None = None,
    sandbox_id: str | None = None,
    workspace_id: str | None = None,
    since: Annotated[
        str | None,
        Query(
            description="From this time on (ISO 8601).", json_schema_extra={"format": "date-time"}
        ),
    ] = None,
    until: Annotated[
        str | None,
        Query(
            description="Before this time (ISO 8601).",
            json_schema_extra={"format": "date-time"},
        ),
    ] = None,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> EventPage:
    """List the activity feed, newest first. Members see their own entries, admins the
    organization's."""
    matches = {
        name: checked_text(value, field=name)
        for name, value in (
            ("resource_type", resource_type),
            ("resource_id", resource_id),
            ("event_type", event_type),
            ("severity", severity),
            ("status", status),
            ("actor_user_id", actor_user_id),
            ("sandbox_id", sandbox_id),
        )
        if value is not None
    }
    if workspace_id is not None:
        wanted = {
            "resource_type": "workspace",
            "resource_id": checked_text(workspace_id, field="workspace_id"),
        }
        if any(matches.get(name, value) != value for name, value in wanted.items()):
            return _page(request, [], limit)
        matches |= wanted
    found = await service.page(
        actor,
        limit=limit + 1,
        matches=matches,
        since=_moment(since, "since"),
        until=_moment(until, "until"),
        after=decode_cursor(cursor) if cursor else None,
    )
    return _page(request, found, limit)


@router.get("/v1/sandboxes/{reference}/activity", responses=errors(404))
async def list_sandbox_activity(
    request: Request,
    actor: CanReadSandbox,
    service: Service,
    reference: str,
    limit: Limit = 100,
    cursor: Cursor = None,
) -> EventPage:
    """List the activity of one sandbox, newest first."""
    found = await service.of_sandbox(
        actor,
        checked_text(reference, field="reference"),
        limit=limit + 1,
        after=decode_cursor(cursor) if cursor else None,
    )
    return _page(request, found, limit)


@router.get(
    "/v1/sandboxes/{reference}/events",
    responses={
        **errors(404, 409),
        200: {"description": "Events.", "content": {"text/event-stream": {}}},
    },
    response_model=None,
)
@takes_query_key
async def follow_sandbox(
    request: Request,
    actor: CanReadSandbox,
    service: Service,
    where: Where,
    check: MayFollow,
    reference: str,
) -> Any:
    """Follow a sandbox by server-sent events. An event `status` carries the sandbox at the start
    and after each change of status, until it is destroyed."""
    reference = checked_text(reference, field="reference")
    async with AsyncExitStack() as opening:
        following = service.follow(actor, reference)
        changes = await opening.enter_async_context(following)
        if getattr(request.state, "is_head", False):
            return Response(media_type="text/event-stream")
        held = opening.pop_all()
    return EventStream(_events_of(changes, actor, where), held, check)


async def _events_of(
    changes: AsyncIterator[Sandbox], actor: Actor, where: Addresses
) -> AsyncIterator[SseEvent]:
    async for sandbox in changes:
        shown = sandbox_out(sandbox, actor, where).model_dump(mode="json", by_alias=True)
        yield SseEvent("status", shown)


def _page(request: Request, found: list[Activity], limit: int) -> EventPage:
    page, has_more = found[:limit], len(found) > limit
    following = encode_cursor(page[-1].created_at, page[-1].id) if has_more else None
    return EventPage(
        data=EventsOut(events=[event_out(one) for one in page]),
        has_more=has_more,
        next_cursor=following,
        meta=PageMeta(
            request_id=request.state.request_id, has_more=has_more, next_cursor=following
        ),
    )


_FIRST, _LAST = datetime(1970, 1, 1, tzinfo=UTC), datetime(9998, 1, 1, tzinfo=UTC)


def _moment(text: str | None, field: str) -> datetime | None:
    if text is None:
        return None
    try:
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError("no time zone")
    except ValueError as error:
        raise InvalidArgumentError(
            f"cannot use {field}: it is a time such as 2026-05-06T10:00:00Z", field=field
        ) from error
    # Times that the stores can compare; there is no activity beyond them.
    return max(_FIRST, min(_LAST, moment))
