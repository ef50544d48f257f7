"""Operations on existing sandboxes: get, list, change, pause, resume, touch, delete."""

import math
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any

from sandyard.server.core.contracts.node import Connection
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.egress import Policy
from sandyard.server.core.errors import (
    ConflictError,
    DeadlineExceededError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from sandyard.server.core.ids import checked_name, checked_tags
from sandyard.server.core.node_ops import ReadConsole, ReadJournal
from sandyard.server.core.ops import Figures, Hello, Stats
from sandyard.server.core.records import Claim, Sandbox, SandboxQuery
from sandyard.server.core.states import ON_ITS_WAY_UP, Event, Status
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.enforcing import Enforcing
from sandyard.server.service.sandboxes.fields import (
    check_idle_timeout,
    check_metadata,
    check_project,
    project_of,
)
from sandyard.server.service.sandboxes.lifecycle import refusal
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.sandboxes.power import Power, Waits
from sandyard.server.service.sandboxes.register import ref_of
from sandyard.server.service.sandboxes.worker import Worker, new_lease

_FIGURE_MAX = 2.0**63
_SAMPLES_MAX = 240
_LOOK_S, _REMOTE_S = 2.0, 10.0
_FOLLOW_S = 1.0
_ENDING = frozenset({Status.DESTROYING, Status.DESTROYED})


@dataclass(frozen=True)
class Changes:
    """Changes to a sandbox; None leaves a field unchanged.

    `expires_in` is in seconds from now, and 0 removes the end; with `only_later` an end that is
    later stays. At its end the sandbox is deleted, or paused if it `pauses_at_end`.
    """

    name: str | None = None
    clears_name: bool = False
    tags: list[str] | None = None
    idle_timeout: int | None = None
    metadata: Mapping[str, object] | None = None
    project_id: str | None = None
    auto_resume: bool | None = None
    network: Policy | None = None
    expires_in: int | None = None
    pauses_at_end: bool | None = None
    only_later: bool = False


class Sandboxes:
    """The operations. Each takes the actor and never discloses another organization's sandboxes."""

    def __init__(
        self,
        platform: Platform,
        *,
        worker: Worker,
        power: Power,
        waits: Waits,
        enforcing: Enforcing,
    ) -> None:
        self._store = platform.store
        self._networks = platform.networks
        self._enforcing = enforcing
        self._register = platform.register
        self._nodes = platform.nodes
        self._tunnel = platform.tunnel
        self._lifecycle = platform.lifecycle
        self._worker = worker
        self._power = power
        self._clock = platform.clock
        self._waits = waits
        self._open = platform.opened

    def following(self, actor: Actor) -> AbstractContextManager[None]:
        """Count a client that follows a journal, while the block lasts. See `Open.one`."""
        return self._open.one(actor.org_id)

    async def get(self, actor: Actor, reference: str, *, scope: str = "sandbox:read") -> Sandbox:
        """Return a sandbox by id or name, for an operation that needs `scope`.

        Raises:
            NotFoundError: it does not exist, is destroyed, or belongs to another organization or,
                for a member, to another member.
        """
        actor.require(scope)
        return await self._register.get(actor, reference)

    async def page(self, actor: Actor, query: SandboxQuery, *, wants_all: bool) -> list[Sandbox]:
        """Return one page of the actor's sandboxes, or of the organization's.

        Raises:
            PermissionDeniedError: the actor may not see all of the organization's.
        """
        actor.require("sandbox:read")
        if wants_all and not actor.sees_all:
            raise PermissionDeniedError(
                "cannot list all of the organization's sandboxes: that takes the role admin or "
                "the scope admin:resources",
                required_scope="admin:resources",
            )
        async with self._store.glance() as tx:
            return await tx.sandboxes.page(query)

    async def delete(self, actor: Actor, reference: str, *, wait: bool) -> Sandbox:
        """Delete a sandbox in any status; with `wait`, wait until it is gone, and at most a minute,
        or ten seconds if it is on another host.

        A sandbox on a node that does not answer is deleted when the node returns; this does not
        wait for that.

        Raises:
            NotFoundError: see `get`.
        """
        actor.require("sandbox:write")

        found = await self._register.get(actor, reference)
        attempts, sandbox = self._register.attempts(found, doing="delete"), None
        while sandbox is None:
            try:
                now = await attempts.next()
            except NotFoundError:  # another request has just deleted it
                return await self._register.reread(found.id)
            sandbox = now if now.status in _ENDING else await self._ending(now, actor, wait=wait)
        if not wait or self._nodes.is_lost(sandbox.node_id):
            return sandbox
        return await self._until_gone(sandbox)

    async def _until_gone(self, sandbox: Sandbox) -> Sandbox:
        """Return a sandbox once it is gone, or as it is if that takes long or its node is not
        heard."""
        limit_s = self._waits.delete_s
        if self._nodes.are_remote:  # it may be out of reach without anybody knowing
            limit_s = min(limit_s, _REMOTE_S)
        for _ in range(round(limit_s / _LOOK_S)):
            try:
                return await self._register.wait_for(
                    sandbox, frozenset({Status.DESTROYED}), limit_s=_LOOK_S
                )
            except DeadlineExceededError:
                if self._nodes.is_silent(sandbox.node_id):
                    break
        return await self._register.reread(sandbox.id)

    async def _ending(self, sandbox: Sandbox, actor: Actor, *, wait: bool) -> Sandbox | None:
        """Begin to delete a sandbox; return None if it has changed meanwhile. With `wait`, wait for
        the first while, so that it is not read again before it is gone."""
        # An orphan's name may belong to another sandbox by now.
        name = None if sandbox.status is Status.ORPHANED else sandbox.name
        with new_lease(self._worker, sandbox.id) as hold:
            ending = await self._lifecycle.apply(
                sandbox, Event.DELETE, actor=actor, hold=hold, name=name
            )
        if ending is not None:
            limit_s = _LOOK_S if wait else 0
            await self._worker.run_now(Claim(ending, hold.lease), limit_s=limit_s)
        return ending

    async def pause(
        self,
        actor: Actor,
        reference: str,
        *,
        wait: bool = True,
        clears_end: bool = False,
        keeps_memory: bool = True,
    ) -> Sandbox:
        """Pause a running sandbox. Return at once if it is paused.

        Raises:
            NotFoundError: see `get`.
            For the rest see `Power.pause`.
        """
        actor.require("sandbox:write")
        sandbox = await self._register.get(actor, reference)
        return await self._power.pause(
            sandbox, actor, wait=wait, clears_end=clears_end, keeps_memory=keeps_memory
        )

    async def resume(
        self,
        actor: Actor,
        reference: str,
        *,
        wait: bool = True,
        lives_s: int | None = None,
        keeps_memory: bool = True,
    ) -> Sandbox:
        """Resume a paused sandbox, or boot one in error from its disk.

        Raises:
            NotFoundError: see `get`.
            For the rest see `Power.resume`.
        """
        actor.require("sandbox:write")
        sandbox = await self._register.get(actor, reference)
        return await self._power.resume(
            sandbox, actor, wait=wait, lives_s=lives_s, keeps_memory=keeps_memory
        )

    async def restart(self, actor: Actor, reference: str, *, wait: bool = True) -> Sandbox:
        """Reboot a sandbox from its disk, in any status. Memory is lost.

        Raises:
            NotFoundError: see `get`.
            For the rest see `Power.restart`.
        """
        actor.require("sandbox:write")
        sandbox = await self._register.get(actor, reference)
        return await self._power.restart(sandbox, actor, wait=wait)

    async def touch(self, actor: Actor, reference: str) -> Sandbox:
        """Reset the idle timer of a sandbox.

        Raises:
            NotFoundError: see `get`.
            ConflictError: it is not running.
        """
        actor.require("sandbox:write")
        sandbox = await self._register.get(actor, reference)
        if sandbox.status is not Status.RUNNING and sandbox.status not in ON_ITS_WAY_UP:
            raise refusal(sandbox, doing="touch")
        async with self._store.write(Turn.SHARED) as tx:
            await tx.activity.touch(sandbox.id, at=self._clock.now(), kind="touch")
        return await self._register.reread(sandbox.id)

    async def change(self, actor: Actor, reference: str, changes: Changes) -> Sandbox:
        """Change a sandbox's fields. Network rules are in force when this returns; nothing else
        affects its machine.

        Raises:
            InvalidArgumentError: a value is invalid; `facts` name the field.
            PermissionDeniedError: network rules name secrets, and the actor may use none.
            AlreadyExistsError: the name is taken.
            NotFoundError: see `get`.
            UnavailableError: network rules are stored, and cannot be enforced yet.
        """
        actor.require("sandbox:write")
        sandbox = await self._register.get(actor, reference)
        fields = await self._fields(actor, changes)
        if not fields and changes.expires_in is None and changes.pauses_at_end is None:
            return sandbox

        attempts, changed = self._register.attempts(sandbox, doing="change"), None
        while changed is None:
            now = await attempts.next()
            end = _end(now, changes, self._clock.now())
            if not fields and changes.only_later and _is_later(now.expires_at, end):
                return now
            changed = await self._lifecycle.change(
                now, actor=actor, retag="tags" in fields, check=check_project, **fields, **end
            )
        if "network" in fields:
            await self._enforcing.enforce(changed)
        return await self._register.reread(changed.id)

    async def _fields(self, actor: Actor, changes: Changes) -> dict[str, object]:
        """Return the new values, by field."""
        fields: dict[str, object] = {}
        if changes.clears_name:
            fields["name"] = None
        elif changes.name is not None:
            fields["name"] = checked_name(changes.name)
        if changes.tags is not None:
            fields["tags"] = checked_tags(changes.tags)
        if changes.idle_timeout is not None:
            check_idle_timeout(changes.idle_timeout)
            fields["idle_timeout_s"] = changes.idle_timeout
        if changes.metadata is not None:
            check_metadata(changes.metadata)
            fields["metadata"] = changes.metadata
        if changes.project_id is not None:
            async with self._store.glance() as tx:
                fields["project_id"] = await project_of(tx, actor, changes.project_id)
        if changes.auto_resume is not None:
            fields["auto_resume"] = changes.auto_resume
        if changes.network is not None:
            fields["network"] = await self._networks.checked(actor, changes.network)
        return fields

    async def logs(self, actor: Actor, reference: str) -> tuple[Sandbox, str]:
        """Return the end of the machine's console log.

        Raises:
            NotFoundError: see `get`.
            UnavailableError: its node does not answer.
        """
        actor.require("sandbox:read")
        sandbox = await self._register.get(actor, reference)
        if sandbox.node_id is None:
            return sandbox, ""
        try:
            console = await self._nodes.get(sandbox.node_id).do(ReadConsole(sandbox.id))
        except NotFoundError:
            console = b""
        return sandbox, console.decode(errors="replace").replace("\0", "")

    async def connections(
        self, actor: Actor, reference: str, *, since: float | None = None
    ) -> list[Connection]:
        """Return what a sandbox with network rules reached or was refused, oldest first: the latest
        lines of its journal, or the first ones after a time, in seconds since 1970.

        Raises:
            NotFoundError: see `get`.
            UnavailableError: its node does not answer.
        """
        actor.require("sandbox:read")
        sandbox = await self._register.get(actor, reference)
        if sandbox.node_id is None:
            return []
        try:
            found = await self._nodes.get(sandbox.node_id).do(ReadJournal(sandbox.id, since=since))
        except NotFoundError:
            return []
        return list(found)

    async def follow_connections(
        self, actor: Actor, reference: str
    ) -> AsyncIterator[list[Connection]]:
        """Yield the latest connections, and then new ones as they end, until the sandbox is
        deleted. See `connections`."""
        since: float | None = None
        while True:
            try:
                found = await self.connections(actor, reference, since=since)
            except NotFoundError:
                if since is None:
                    raise
                return
            if found:
                yield found
            since = found[-1].time if found else since or 0.0
            await self._clock.sleep(_FOLLOW_S)

    async def is_up(self, sandbox: Sandbox, *, asks_machine: bool) -> bool:
        """Tell whether a sandbox is running or starting, without waiting for it or resuming it.
        That its machine has ended is stored a moment later, which a machine that is asked tells at
        once."""
        if sandbox.status is not Status.RUNNING or not asks_machine:
            up = ON_ITS_WAY_UP | {Status.RUNNING, Status.SUSPECTED_MISSING}
            return sandbox.status in up
        try:
            async with self._tunnel.open(ref_of(sandbox), Hello()):
                return True
        except (ConflictError, NotFoundError):
            return False
        except UnavailableError:  # it is slow, or its host is
            return True

    async def stats(
        self, actor: Actor, reference: str, *, since_ms: int | None = None
    ) -> tuple[Sandbox, Figures]:
        """Return current resource usage, read in the guest, and with `since_ms` the samples since
        that time.

        Raises:
            NotFoundError: see `get`.
            ConflictError: the sandbox is not running.
            UnavailableError: the agent does not answer, or not correctly.
        """
        actor.require("sandbox:read")
        # Reading a sandbox is no use of it: it is neither waited for nor resumed.
        sandbox = await self._register.get(actor, reference)
        if sandbox.status is not Status.RUNNING:
            raise refusal(sandbox, doing="read the figures of")
        async with self._tunnel.open(ref_of(sandbox), Stats(since_ms=since_ms)) as opened:
            figures = opened.answer
        values = vars(figures) | {"recent_cpu_percent": 0.0, "earlier": 0}
        if not _are_figures(values):
            raise UnavailableError("cannot read the usage: the agent did not report it")
        earlier = [one for one in figures.earlier if _are_figures(vars(one))]
        return sandbox, replace(figures, earlier=earlier[-_SAMPLES_MAX:])


def _are_figures(values: Mapping[str, float | None]) -> bool:
    return all(value is not None and 0 <= value < _FIGURE_MAX for value in values.values())


def _is_later(present: datetime | None, end: Mapping[str, Any]) -> bool:
    """Tell whether the present end is later than a new one; without any it is the latest."""
    return present is None or present >= end["expires_at"]


def _end(sandbox: Sandbox, changes: Changes, now: datetime) -> dict[str, Any]:
    """Return the new end of a sandbox. See `lifecycle.with_end` for the rest."""
    if changes.expires_in is None and changes.pauses_at_end is None:
        return {}
    lives_s, expires_at = sandbox.lives_s, sandbox.expires_at
    if changes.expires_in is not None:
        lives_s = changes.expires_in or None
        expires_at = None if lives_s is None else now + timedelta(seconds=lives_s)
    pauses = sandbox.pauses_at_end if changes.pauses_at_end is None else changes.pauses_at_end
    if expires_at is not None and lives_s is None:  # of a version that did not note it
        lives_s = max(1, math.ceil((expires_at - sandbox.created_at).total_seconds()))
    if expires_at is None and lives_s is not None and not pauses:
        expires_at = now + timedelta(seconds=lives_s)  # it had none while it did not run
    return {"expires_at": expires_at, "lives_s": lives_s, "pauses_at_end": pauses}
