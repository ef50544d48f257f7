"""The activity feed, which is also the audit log."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime

from sandyard.server.core.contracts.store import Store
from sandyard.server.core.records import Activity, ActivityQuery, Sandbox
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.frames import Open
from sandyard.server.service.sandboxes.register import Register


class Feed:
    """Reads the feed. Members see their own actions and events of their own sandboxes."""

    def __init__(self, store: Store, register: Register, opened: Open) -> None:
        self._open = opened
        self._store = store
        self._register = register

    async def page(
        self,
        actor: Actor,
        *,
        limit: int,
        matches: Mapping[str, str],
        since: datetime | None = None,
        until: datetime | None = None,
        after: tuple[datetime, str] | None = None,
    ) -> list[Activity]:
        """Return one page of the organization's feed, newest first."""
        actor.require("activity:read")
        query = ActivityQuery(
            org_id=actor.org_id,
            limit=limit,
            seen_by=None if actor.sees_all else actor.user_id,
            matches=matches,
            since=since,
            until=until,
            after=after,
        )
        async with self._store.read() as tx:
            return await tx.activity.page(query)

    async def of_sandbox(
        self,
        actor: Actor,
        reference: str,
        *,
        limit: int,
        after: tuple[datetime, str] | None = None,
    ) -> list[Activity]:
        """Return one page of a sandbox's events, newest first.

        Raises:
            NotFoundError: there is no such sandbox.
        """
        actor.require("sandbox:read")
        sandbox = await self._register.get(actor, reference)
        query = ActivityQuery(
            org_id=actor.org_id, limit=limit, matches={"sandbox_id": sandbox.id}, after=after
        )
        async with self._store.read() as tx:
            return await tx.activity.page(query)

    @asynccontextmanager
    async def follow(self, actor: Actor, reference: str) -> AsyncIterator[AsyncIterator[Sandbox]]:
        """Follow a sandbox: yield it now, and after each change of its status, until it is deleted.
        Of several quick changes only the last may be reported.

        Raises:
            NotFoundError: there is no such sandbox.
            LimitReachedError: the organization has too many streams open.
        """
        actor.require("sandbox:read")
        sandbox = await self._register.get(actor, reference)
        with self._open.one(actor.org_id):
            yield self._register.changes(sandbox)
