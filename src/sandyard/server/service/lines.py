"""Entries of the activity feed, which is also the audit log."""

from collections.abc import Mapping
from datetime import datetime

from sandyard.server.core.ids import new_uuid
from sandyard.server.core.records import Activity
from sandyard.server.service.actor import Actor


def by_key(actor: Actor | None) -> dict[str, object]:
    """Return the attribute that names the API key behind an action, if there is one."""
    return {"apiKeyId": actor.key_id} if actor is not None and actor.key_id else {}


def line(
    event_type: str,
    title: str,
    *,
    org_id: str,
    actor: Actor | None,
    resource_id: str,
    at: datetime,
    summary: str = "",
    status: str = "ok",
    severity: str = "info",
    sandbox_id: str | None = None,
    attributes: Mapping[str, object] | None = None,
) -> Activity:
    """Return an entry of the feed. The first part of `event_type` is its subject.

    Its attributes name the API key behind the action.
    """
    return Activity(
        id=new_uuid(),
        org_id=org_id,
        actor_user_id=actor.user_id if actor else None,
        actor_type=actor.kind if actor else "system",
        event_type=event_type,
        resource_type=event_type.partition(".")[0],
        resource_id=resource_id,
        severity=severity,
        status=status,
        title=title,
        summary=summary,
        created_at=at,
        sandbox_id=sandbox_id,
        attributes=by_key(actor) | dict(attributes or {}),
    )
