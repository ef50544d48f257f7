"""The activity feed as HTTP carries it."""

from pydantic import JsonValue

from sandyard.server.api.models.base import Model, PageMeta, Time
from sandyard.server.core.records import (
    Activity,
)


class EventOut(Model):
    """One thing that happened."""

    id: str
    org_id: str
    actor_user_id: str | None
    actor_type: str
    resource_type: str
    resource_id: str
    event_type: str
    severity: str
    status: str
    title: str
    summary: str
    attributes: dict[str, JsonValue]
    sandbox_id: str | None
    workspace_id: str | None
    created_at: Time
    thread_id: None = None
    agent_run_id: None = None
    tool_slug: None = None
    installable_agent_install_id: None = None
    runmesh_node_id: None = None
    code_execution_id: None = None


def event_out(line: Activity) -> EventOut:
    """Return a line of the feed as it is shown."""
    return EventOut(
        id=line.id,
        org_id=line.org_id,
        actor_user_id=line.actor_user_id,
        actor_type=line.actor_type,
        resource_type=line.resource_type,
        resource_id=line.resource_id,
        event_type=line.event_type,
        severity=line.severity,
        status=line.status,
        title=line.title,
        summary=line.summary,
        attributes=dict(line.attributes),  # type: ignore[arg-type]  # it was made of JSON values
        sandbox_id=line.sandbox_id,
        workspace_id=line.resource_id if line.resource_type == "workspace" else None,
        created_at=line.created_at,
    )


class EventsOut(Model):
    """A page of what happened."""

    events: list[EventOut]


class EventPage(Model):
    """The envelope of such a page."""

    data: EventsOut
    has_more: bool
    next_cursor: str | None
    meta: PageMeta
