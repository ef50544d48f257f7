"""What is recorded of uses of sandboxes: when one was last used, and entries of the feed."""

import asyncio
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta

from sandyard.server.core.contracts.store import Store, Transaction, Turn
from sandyard.server.core.errors import SandyardError
from sandyard.server.core.records import Sandbox, Standing
from sandyard.server.service.actor import Actor
from sandyard.server.service.lines import line
from sandyard.server.tasks import to_the_end

log = logging.getLogger(__name__)

_FRESH = timedelta(seconds=3)
_SHORTEST = 4 * _FRESH
"""With a shorter idle timeout every use is recorded before it begins."""


@dataclass(frozen=True)
class Use:
    """A use of a sandbox: the kind of activity, its title in the feed, the verb for errors, and
    attributes for the feed (no secrets). With `is_in_feed` it is an entry of the feed; with
    `is_frequent` it is not recorded again shortly after the last time."""

    kind: str
    title: str
    doing: str
    attributes: Mapping[str, object] = field(default_factory=dict)
    is_in_feed: bool = True
    is_frequent: bool = False


@dataclass(frozen=True)
class Note:
    """One use that is to be recorded."""

    actor: Actor
    sandbox: Sandbox
    use: Use
    at: datetime

    async def write(self, tx: Transaction) -> None:
        """Record it."""
        sandbox, use = self.sandbox, self.use
        await tx.activity.touch(sandbox.id, at=self.at, kind=use.kind)
        if use.is_in_feed:
            await tx.activity.append(
                line(
                    f"sandbox.{use.kind}",
                    use.title,
                    org_id=sandbox.org_id,
                    actor=self.actor,
                    resource_id=sandbox.id,
                    at=self.at,
                    status=sandbox.status.value,
                    sandbox_id=sandbox.id,
                    attributes=use.attributes,
                )
            )


class Notes:
    """Records uses while they are in progress. What comes while others are written is written in
    one transaction."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pending: list[Note] = []
        self._turn = asyncio.Lock()

    async def write(self, note: Note) -> None:
        """Return once a use is recorded. If that is impossible, it is logged: the use has begun."""
        self._pending.append(note)
        await to_the_end(self._write())

    async def _write(self) -> None:
        async with self._turn:
            notes, self._pending = self._pending, []
            if not notes:  # another's transaction had it
                return
            try:
                async with self._store.write(Turn.SHARED) as tx:
                    for one in notes:
                        await one.write(tx)
            except SandyardError as error:
                log.warning(
                    "uses of sandboxes are not recorded (%d): %s", len(notes), error.message
                )


def last_used(sandbox: Standing | Sandbox) -> datetime:
    """Return when a sandbox was last used or started."""
    return max(
        one
        for one in (sandbox.last_activity_at, sandbox.started_at, sandbox.created_at)
        if one is not None
    )


def is_fresh(sandbox: Sandbox, use: Use, now: datetime) -> bool:
    """Tell whether a use was recorded so recently that another changes nothing."""
    last = sandbox.last_activity_at if sandbox.last_activity_kind == use.kind else None
    return last is not None and _is_patient(sandbox) and now - last < _FRESH


def may_be_noted_late(sandbox: Sandbox, now: datetime) -> bool:
    """Tell whether a use may begin before it is recorded: the sandbox will not be paused as idle
    for a while."""
    idle = timedelta(seconds=sandbox.idle_timeout_s)
    return _is_patient(sandbox) and (not idle or now - last_used(sandbox) < idle / 2)


def _is_patient(sandbox: Sandbox) -> bool:
    idle = timedelta(seconds=sandbox.idle_timeout_s)
    return not idle or idle > _SHORTEST
