"""Pauses and resumes sandboxes. Concurrent requests share one operation."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from sandyard.server.core.contracts.store import Transaction
from sandyard.server.core.errors import (
    Code,
    ConflictError,
    DeadlineExceededError,
    NoCapacityError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.records import NEXT_START, Claim, Sandbox
from sandyard.server.core.states import ON_ITS_WAY_UP, Event, Status
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.lifecycle import refusal
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.sandboxes.register import Deadline
from sandyard.server.service.sandboxes.worker import Worker, new_lease

_ALL = frozenset(Status)
_AT_REST = frozenset({Status.PAUSED, Status.ERROR})
"""What can be brought up again."""
_HAS_DISK = _AT_REST | {Status.RUNNING, Status.SUSPECTED_MISSING}
"""What can be booted from its disk, whatever is in its memory."""


@dataclass(frozen=True)
class Waits:
    """How long requests wait for operations, in seconds."""

    delete_s: float = 60.0
    start_s: float = 60.0
    pause_s: float = 60.0
    pooled_s: float = 2.0


class Power:
    """Pauses and starts sandboxes. The caller has authorized the actor."""

    def __init__(
        self,
        platform: Platform,
        *,
        worker: Worker,
        waits: Waits,
    ) -> None:
        self._nodes = platform.nodes
        self._register = platform.register
        self._lifecycle = platform.lifecycle
        self._worker = worker
        self._quota = platform.quota
        self._waits = waits
        self._clock = platform.clock

    def deadline(self) -> Deadline:
        """Return the deadline of a request that starts now and waits for a machine."""
        return Deadline(self._clock, self._waits.start_s)

    async def pause(
        self,
        sandbox: Sandbox,
        actor: Actor,
        *,
        wait: bool = True,
        until: Deadline | None = None,
        clears_end: bool = False,
        keeps_memory: bool = True,
    ) -> Sandbox:
        """Pause a running sandbox. Return at once if it is paused.

        Wait until `until`, or without it for as long as a pause may take. If it `clears_end`, the
        sandbox has no end until it runs again. Unless it `keeps_memory`, a resume boots it from its
        disk.

        Raises:
            ConflictError: its status does not allow it.
            UnavailableError: the pause failed, and it keeps running.
        """
        until = until or Deadline(self._clock, self._waits.pause_s)
        done = {Status.PAUSED} if wait else {Status.PAUSED, Status.PAUSING}
        attempts = self._register.attempts(sandbox, doing="pause")
        while True:
            now = await attempts.next()
            if now.status is Status.PAUSING and wait:
                now = await self._left(now, Status.PAUSING, until)
                if now.status is Status.RUNNING:
                    raise not_done(now, "pause", was=Status.RUNNING)
            if now.status in done:
                return now
            if now.status is not Status.RUNNING:
                raise refusal(now, doing="pause")
            with new_lease(self._worker, now.id) as hold:
                pausing = await self._lifecycle.apply(
                    now,
                    Event.PAUSE,
                    actor=actor,
                    hold=hold,
                    **_without_end(clears=clears_end),
                    from_disk_incarnation=0 if keeps_memory else NEXT_START,
                )
            if pausing is None:
                continue
            claim = Claim(pausing, hold.lease)
            await self._worker.run_now(claim, limit_s=until.left_s if wait else 0)
            now = await self._register.reread(now.id)
            if now.status is Status.RUNNING and now.reason:
                raise not_done(now, "pause", was=Status.RUNNING)
            if now.status in done:
                return now

    async def resume(
        self,
        sandbox: Sandbox,
        actor: Actor,
        *,
        wait: bool = True,
        lives_s: int | None = None,
        keeps_memory: bool = True,
    ) -> Sandbox:
        """Resume a paused sandbox, or boot one in error from its disk. With `lives_s` its end is so
        many seconds after its start. Unless it `keeps_memory`, one that is paused boots, too.

        Raises:
            ConflictError: its status does not allow it.
            LimitReachedError, QuotaExceededError: the organization may not run it.
            UnavailableError: the resume failed, and its status is unchanged.
        """
        return await self._resume(
            sandbox,
            actor,
            self.deadline(),
            wait=wait,
            lives_s=lives_s,
            keeps_memory=keeps_memory,
        )

    async def _resume(
        self,
        sandbox: Sandbox,
        actor: Actor,
        until: Deadline,
        *,
        wait: bool = True,
        lives_s: int | None = None,
        keeps_memory: bool = True,
    ) -> Sandbox:
        return await self.bring_up(
            sandbox,
            actor,
            Event.RESUME,
            doing="resume",
            wait=wait,
            until=until,
            lives_s=lives_s,
            keeps_memory=keeps_memory,
        )

    async def restart(self, sandbox: Sandbox, actor: Actor, *, wait: bool = True) -> Sandbox:
        """Reboot a sandbox from its disk. Memory and saved state are lost.

        Raises: see `resume`.
        """
        return await self.bring_up(sandbox, actor, Event.RESTART, doing="restart", wait=wait)

    async def bring_up(
        self,
        sandbox: Sandbox,
        actor: Actor,
        event: Event,
        *,
        doing: str,
        wait: bool = True,
        snapshot_id: str | None = None,
        until: Deadline | None = None,
        lives_s: int | None = None,
        keeps_memory: bool = True,
    ) -> Sandbox:
        """Start a sandbox's next incarnation by an event, with `snapshot_id` from a snapshot.

        See `pause` for `until`, and `resume` for `lives_s` and `keeps_memory`.

        Raises: see `resume`.
        """
        until = until or self.deadline()
        done = {Status.RUNNING} if wait else {Status.RUNNING, Status.RESUMING}
        asked_for = 0  # the incarnation that this call has brought about, if any
        was: Status | None = None
        attempts = self._register.attempts(sandbox, doing=doing)
        while True:
            now = await attempts.next()
            if now.status is Status.PAUSING:
                now = await self._left(now, Status.PAUSING, until)
            # A resume accepts any; a rollback must be this very one.
            is_it = event is Event.RESUME or now.incarnation == asked_for
            if now.status is Status.RESUMING and wait and is_it:
                now = await self._left(now, Status.RESUMING, until)
                if now.status in _AT_REST:
                    raise not_done(now, doing, was=was)
            if now.status in done and is_it:
                return now
            if now.status not in (_HAS_DISK if event is Event.RESTART else _AT_REST):
                raise refusal(now, doing=doing)
            if await self._nodes.is_still_lost(now.node_id):
                # It would start, and cost, when the node returns, with no request waiting for it.
                raise UnavailableError(
                    f"cannot {doing} {now.id}: the node that it is on does not answer; it is "
                    f"{now.status} as before, ask again when that is back"
                )
            with new_lease(self._worker, now.id) as hold:
                resuming = await self._lifecycle.apply(
                    now,
                    event,
                    actor=actor,
                    hold=hold,
                    check=None if now.status is Status.RUNNING else self._may_run(actor, now),
                    incarnation=now.incarnation + 1,
                    ip=None,
                    **_source(event, snapshot_id, now, keeps_memory=keeps_memory),
                    **_end_of(lives_s),
                )
            if resuming is None:
                continue
            asked_for, was = resuming.incarnation, now.status
            claim = Claim(resuming, hold.lease)
            await self._worker.run_now(claim, limit_s=until.left_s if wait else 0)
            now = await self._register.reread(now.id)
            if now.status in _AT_REST:
                raise not_done(now, doing, was=was)
            if now.status in done:
                return now

    async def until_up(self, sandbox: Sandbox, *, limit_s: float) -> Sandbox:
        """Return a sandbox once it is no longer starting, or as it is at the limit."""
        if sandbox.status not in ON_ITS_WAY_UP:
            return sandbox
        try:
            return await self._register.wait_for(sandbox, _ALL - ON_ITS_WAY_UP, limit_s=limit_s)
        except DeadlineExceededError:
            return await self._register.reread(sandbox.id)

    async def running(
        self, sandbox: Sandbox, actor: Actor, *, doing: str, until: Deadline
    ) -> Sandbox:
        """Return a sandbox once it is running; wait for it or resume it if necessary.

        Raises:
            ConflictError: it is not running, and must not be resumed for this.
            For the rest see `resume`.
        """
        if sandbox.status is Status.PAUSING:
            sandbox = await self._left(sandbox, Status.PAUSING, until)
        if sandbox.status in (Status.PAUSED, Status.RESUMING) and sandbox.auto_resume:
            sandbox = await self._resume(sandbox, actor, until)
        if sandbox.status in ON_ITS_WAY_UP:
            sandbox = await self.until_up(sandbox, limit_s=until.left_s)
        if sandbox.status is Status.PAUSED and not sandbox.auto_resume:
            raise ConflictError(
                f"cannot {doing} {sandbox.id}: it is paused, and its {{field}} is off; resume it "
                "first",
                field="auto_resume",
                status=sandbox.status.value,
            )
        if sandbox.status is not Status.RUNNING:
            raise refusal(sandbox, doing=doing)
        return sandbox

    def _may_run(self, actor: Actor, sandbox: Sandbox) -> Callable[[Transaction], Awaitable[None]]:
        return partial(
            self._quota.check_resume, actor=actor, shape=sandbox.shape, is_test=sandbox.is_test
        )

    async def _left(self, sandbox: Sandbox, status: Status, until: Deadline) -> Sandbox:
        """Return a sandbox once it has left a status."""
        return await self._register.wait_for(sandbox, _ALL - {status}, limit_s=until.left_s)


def _without_end(*, clears: bool) -> dict[str, Any]:
    return {"expires_at": None} if clears else {}


def _end_of(lives_s: int | None) -> dict[str, Any]:
    """Return the fields of an end that is set once a sandbox runs."""
    return {} if lives_s is None else {"lives_s": lives_s, "expires_at": None}


def _source(
    event: Event, snapshot_id: str | None, sandbox: Sandbox, *, keeps_memory: bool
) -> dict[str, Any]:
    """Return the source of a sandbox's next incarnation, if it is not its own state."""
    if not keeps_memory:
        return {"from_disk_incarnation": NEXT_START}
    if event is Event.RESTART:
        return {"from_disk_incarnation": sandbox.incarnation + 1}
    if snapshot_id is None:
        return {}
    return {
        "from_snapshot_id": snapshot_id,
        "from_snapshot_incarnation": sandbox.incarnation + 1,
    }


def not_done(sandbox: Sandbox, doing: str, *, was: Status | None) -> SandyardError:
    """Return the error for a failed operation on a sandbox, whose status was `was`, if known."""
    reason = sandbox.reason
    why = reason.message if reason else "it was asked for something else meanwhile"
    is_kept = " as before" if sandbox.status is was and doing != "restart" else ""
    message = f"cannot {doing} {sandbox.id}: {why}; it is {sandbox.status}{is_kept}"
    if reason is not None and reason.code in (Code.NO_CAPACITY, "host_disk_full"):
        return NoCapacityError(message)
    if reason is not None and reason.code == Code.INCOMPATIBLE:
        return ConflictError(message, status=sandbox.status.value)
    return UnavailableError(message)
