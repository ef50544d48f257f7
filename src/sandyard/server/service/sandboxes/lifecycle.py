"""The one place where a sandbox's status changes.

A change is written only if the sandbox's version is unchanged. The same transaction appends the
entry of the activity feed, and opens or closes the usage period.
"""

from collections.abc import Awaitable, Callable
from dataclasses import replace
from datetime import datetime, timedelta

from sandyard.server.core.contracts.bus import Bus
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Effects, Hold, Store, Transaction
from sandyard.server.core.errors import ConflictError
from sandyard.server.core.ids import new_uuid
from sandyard.server.core.records import (
    NEXT_START,
    Activity,
    Reason,
    Sandbox,
    Standing,
    StoragePeriod,
    UsagePeriod,
)
from sandyard.server.core.states import BILLED, Event, Status, advance
from sandyard.server.service.actor import Actor
from sandyard.server.service.lines import by_key

WORK = "sandboxes"
"""The topic of hints that some sandbox wants work done."""

_UPDATED = "Sandbox changed"
_RESUMED = "Sandbox resumed"
_PAUSE_AGAIN = timedelta(seconds=60)
_AT_REST = frozenset({Status.PAUSED, Status.ERROR})
_SEVERE = {Status.FAILED: "error", Status.ERROR: "error", Status.SUSPECTED_MISSING: "warning"}
_TITLES = {
    Status.PENDING: "Sandbox created",
    Status.CREATING: "Sandbox is being started",
    Status.RUNNING: "Sandbox is running",
    Status.PAUSING: "Sandbox is being paused",
    Status.PAUSED: "Sandbox paused",
    Status.RESUMING: "Sandbox is being resumed",
    Status.DESTROYING: "Sandbox is being deleted",
    Status.DESTROYED: "Sandbox deleted",
    Status.FAILED: "Sandbox could not be started",
    Status.ERROR: "Sandbox is in error",
    Status.SUSPECTED_MISSING: "Sandbox does not answer",
    Status.ORPHANED: "Sandbox is gone",
}


def topic_of(sandbox_id: str) -> str:
    """Return the topic of hints about changes of one sandbox."""
    return f"sandbox:{sandbox_id}"


class Lifecycle:
    """Applies events to sandboxes."""

    def __init__(self, store: Store, bus: Bus, clock: Clock) -> None:
        self._store = store
        self._bus = bus
        self._clock = clock

    async def begin(
        self, tx: Transaction, sandbox: Sandbox, actor: Actor, *, hold: Hold | None = None
    ) -> Sandbox:
        """Store a new sandbox, leased if `hold` is given, and return it with its owner's name.

        Raises:
            AlreadyExistsError: the name is taken.
        """
        sandbox = await _without_deleted_keys(tx, sandbox)
        effects = Effects(line=_line(sandbox, "sandbox.created", actor))
        return await tx.sandboxes.insert(sandbox, hold=hold, effects=effects)

    async def apply(
        self,
        sandbox: Sandbox,
        event: Event,
        *,
        actor: Actor | None = None,
        reason: Reason | None = None,
        lease: str | None = None,
        hold: Hold | None = None,
        used: str | None = None,
        check: Callable[[Transaction], Awaitable[None]] | None = None,
        ended_at: datetime | None = None,
        **changes: object,
    ) -> Sandbox | None:
        """Apply an event and return the changed sandbox, or None if it has changed meanwhile.

        `actor` requested it, or None for the platform. With `lease` the change is written only
        while that lease is held. Without it, any lease is revoked and replaced by `hold`, if given.
        `used` counts the event as an activity of that kind. `check` runs in the transaction and may
        abort it. `ended_at` is the end of the charged period, if it was earlier than now.

        Raises:
            ConflictError: the event is not allowed in the sandbox's status.
        """
        now = self._clock.now()
        status = advance(sandbox.status, event)
        changed = replace(
            sandbox,
            status=status,
            reason=reason,
            updated_at=now,
            **changes,  # type: ignore[arg-type]  # fields by name
        )
        if used is not None:
            changed = replace(changed, last_activity_at=now, last_activity_kind=used)
        changed = with_end(changed, now)
        if event is Event.GONE:
            changed = _without_secrets(changed)
        effects = _effects(sandbox, changed, actor, ended_at)
        if sandbox.from_disk_incarnation == NEXT_START:
            changed = _after_boot(changed, event)
        if event is Event.PAUSE_FAILED and changed.pauses_at_end and is_over(changed, now):
            changed = replace(changed, expires_at=now + _PAUSE_AGAIN)
        async with self._store.write(sandbox.org_id) as tx:
            if check is not None:
                # The loser of a race is not refused for what the winner took.
                if not await is_current(tx, sandbox):
                    return None
                await check(tx)
            stored = await tx.sandboxes.replace(
                changed, lease=lease, hold=hold, is_use=used is not None, effects=effects
            )
            if stored is None:
                return None
            if effects.closes_at is not None and effects.closes_at < now:
                await tx.usage.shorten(sandbox.id, effects.closes_at)
            await _meter_saved(tx, sandbox, stored)
            if event is Event.ROLL_BACK:
                await tx.activity.append(_rolled_back(stored, actor))
        self._bus.hint(topic_of(sandbox.id))
        if lease is None and hold is None:
            self._bus.hint(WORK)  # not the worker's own step: there may be something to do
        return stored

    async def change(
        self,
        sandbox: Sandbox,
        *,
        actor: Actor,
        retag: bool,
        check: Callable[[Transaction, Sandbox], Awaitable[None]],
        **changes: object,
    ) -> Sandbox | None:
        """Change fields other than the status; return None if the sandbox has changed meanwhile.

        `check` runs in the transaction, with the changed sandbox.
        """
        now = self._clock.now()
        changed = replace(
            sandbox,
            updated_at=now,
            **changes,  # type: ignore[arg-type]  # fields by name
        )
        changed = with_end(changed, now)
        async with self._store.write(sandbox.org_id) as tx:
            if not await is_current(tx, sandbox):
                return None
            await check(tx, changed)
            stored = await tx.sandboxes.replace(changed, retag=retag)
            if stored is not None:
                await tx.activity.append(_line(stored, "sandbox.updated", actor, _UPDATED))
        self._bus.hint(WORK)  # the server that worked on it has lost its lease
        return stored

    async def note_reason(self, sandbox: Sandbox, reason: Reason | None) -> None:
        """Store why a sandbox is stopped, or that it runs again. The status does not change."""
        async with self._store.write(sandbox.org_id) as tx:
            await tx.sandboxes.replace(
                replace(sandbox, reason=reason, updated_at=self._clock.now())
            )
        self._bus.hint(topic_of(sandbox.id))


def _effects(
    before: Sandbox, after: Sandbox, actor: Actor | None, ended_at: datetime | None
) -> Effects:
    now, opens, closes_at = after.updated_at, None, None
    if after.status in BILLED and before.status not in BILLED:
        opens = UsagePeriod(
            sandbox_id=after.id,
            org_id=after.org_id,
            incarnation=after.incarnation,
            shape=after.shape,
            started_at=now,
            is_free=after.is_test,
        )
    elif before.status in BILLED and after.status not in BILLED:
        closes_at = min(now, ended_at or now)
    is_reported = after.status is not before.status
    line = _changed(before.status, after, actor) if is_reported else None
    return Effects(line, opens, closes_at)


async def _meter_saved(tx: Transaction, before: Sandbox, after: Sandbox) -> None:
    """Charge the storage of a paused sandbox from now, or no longer."""
    was, is_now = before.status is Status.PAUSED, after.status is Status.PAUSED
    now = after.updated_at
    if is_now and not was and after.saved_bytes > 0:
        await tx.storage.open(
            StoragePeriod(
                kind="sandbox",
                resource_id=after.id,
                org_id=after.org_id,
                size_bytes=after.saved_bytes,
                started_at=now,
                is_free=after.is_test,
            )
        )
    elif was and not is_now:
        await tx.storage.close("sandbox", after.id, now)


def _without_secrets(sandbox: Sandbox) -> Sandbox:
    """Return a destroyed sandbox without what only its machine needed."""
    return replace(sandbox, env={}, root_password_hash=None, network=sandbox.network.bare)


def with_end(sandbox: Sandbox, now: datetime) -> Sandbox:
    """Return a sandbox with the end for its status. One that is paused at its end has none while it
    is not running, and whatever has none gets a new one at its start."""
    if sandbox.lives_s is None:
        return sandbox
    if sandbox.pauses_at_end and sandbox.status in _AT_REST:
        return replace(sandbox, expires_at=None)
    # One that failed to start has an end, too.
    has_begun = sandbox.status in (Status.RUNNING, Status.FAILED)
    if has_begun and sandbox.expires_at is None:
        return replace(sandbox, expires_at=now + timedelta(seconds=sandbox.lives_s))
    return sandbox


def is_over(sandbox: Sandbox | Standing, now: datetime) -> bool:
    """Tell whether a sandbox has reached its end."""
    return sandbox.expires_at is not None and sandbox.expires_at <= now


def refusal(sandbox: Sandbox, *, doing: str) -> ConflictError:
    """Return the error for a sandbox whose status does not allow the request."""
    why = f": {sandbox.reason.message}" if sandbox.reason is not None else ""
    return ConflictError(
        f"cannot {doing} {sandbox.id}: it is {sandbox.status}{why}", status=sandbox.status.value
    )


async def is_current(tx: Transaction, sandbox: Sandbox) -> bool:
    """Tell whether a sandbox is unchanged since it was read."""
    stored = await tx.sandboxes.find(sandbox.id)
    return stored is not None and stored.version == sandbox.version


async def _without_deleted_keys(tx: Transaction, sandbox: Sandbox) -> Sandbox:
    """Return a new sandbox without keys that were deleted since they were looked up."""
    if not any(sandbox.ssh_key_ids):
        return sandbox
    present = {key.id for key in await tx.ssh_keys.every(sandbox.org_id)}
    kept = [(line, key_id) for line, key_id in sandbox.keys if not key_id or key_id in present]
    return replace(
        sandbox,
        authorized_keys=tuple(line for line, _ in kept),
        ssh_key_ids=tuple(key_id for _, key_id in kept),
    )


def _changed(before: Status, sandbox: Sandbox, actor: Actor | None) -> Activity:
    if (before, sandbox.status) == (Status.RESUMING, Status.RUNNING):
        return _line(sandbox, "sandbox.resumed", actor, _RESUMED)
    return _line(sandbox, f"sandbox.{sandbox.status}", actor)


def _rolled_back(sandbox: Sandbox, actor: Actor | None) -> Activity:
    line = _line(sandbox, "sandbox.rolled_back", actor, "Sandbox rolled back to a snapshot")
    snapshot = {"snapshotId": sandbox.from_snapshot_id or ""}
    return replace(line, attributes={**line.attributes, **snapshot})


def _line(
    sandbox: Sandbox, event_type: str, actor: Actor | None, title: str | None = None
) -> Activity:
    reason = sandbox.reason
    return Activity(
        id=new_uuid(),
        org_id=sandbox.org_id,
        actor_user_id=actor.user_id if actor else None,
        actor_type=actor.kind if actor else "system",
        event_type=event_type,
        resource_type="sandbox",
        resource_id=sandbox.id,
        severity=_SEVERE.get(sandbox.status, "info"),
        status=sandbox.status.value,
        title=title or _TITLES[sandbox.status],
        summary=reason.message if reason else "",
        created_at=sandbox.updated_at,
        sandbox_id=sandbox.id,
        attributes=by_key(actor)
        | {"incarnation": sandbox.incarnation}
        | ({"reasonCode": reason.code} if reason else {}),
    )


def _after_boot(sandbox: Sandbox, event: Event) -> Sandbox:
    """Return a sandbox whose next start is to boot from its disk, after an event.

    A start that succeeds completes this, and a pause that fails cancels it.
    """
    if event is Event.READY:
        return replace(sandbox, from_disk_incarnation=sandbox.incarnation)
    if event is Event.PAUSE_FAILED:
        return replace(sandbox, from_disk_incarnation=0)
    return sandbox
