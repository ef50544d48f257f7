"""Finds sandboxes that an actor may see, and waits for changes of their status."""

from collections.abc import AsyncIterator
from typing import TypeVar

from sandyard.server.core.contracts.bus import Bus
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import MachineRef
from sandyard.server.core.contracts.store import Store
from sandyard.server.core.errors import (
    ConflictError,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from sandyard.server.core.ids import checked_text, is_sandbox_id
from sandyard.server.core.records import Sandbox, Snapshot, Standing
from sandyard.server.core.states import Status
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.lifecycle import topic_of

_SLICE_S = 1.0
_TRIES = 8
_T = TypeVar("_T")


class Deadline:
    """The deadline of a request, for all its waits together.

    The client gives up after a while, and must get an answer before.
    """

    def __init__(self, clock: Clock, limit_s: float) -> None:
        self._clock = clock
        self._until = clock.monotonic() + limit_s

    @property
    def left_s(self) -> float:
        """Seconds left, 0 after the deadline."""
        return max(0.0, self._until - self._clock.monotonic())


class Register:
    """Reads sandboxes; never discloses another organization's."""

    def __init__(self, store: Store, bus: Bus, clock: Clock) -> None:
        self._store = store
        self._bus = bus
        self._clock = clock

    async def get(self, actor: Actor, reference: str) -> Sandbox:
        """Return a sandbox by id or name.

        Raises:
            NotFoundError: absent, destroyed, another organization's or, for a member, another
                member's.
        """
        async with self._store.glance() as tx:
            if is_sandbox_id(reference):
                sandbox = await tx.sandboxes.find(reference)
            else:
                sandbox = await tx.sandboxes.find_named(actor.org_id, reference)
        if sandbox is None or not _may_see(actor, sandbox):
            raise NotFoundError(f"cannot find the sandbox {reference[:80]!r}: check id or name")
        return sandbox

    async def reread(self, sandbox_id: str) -> Sandbox:
        """Return the current row of a sandbox."""
        async with self._store.glance() as tx:
            sandbox = await tx.sandboxes.find(sandbox_id)
        if sandbox is None:
            raise NotFoundError(f"cannot find the sandbox {sandbox_id}")
        return sandbox

    def attempts(self, sandbox: Sandbox, *, doing: str) -> "Attempts":
        """Return the attempts of an operation that is repeated if the row changes under it."""
        return Attempts(self, sandbox, doing)

    async def changes(self, sandbox: Sandbox) -> AsyncIterator[Sandbox]:
        """Yield a sandbox now, and after each change of its status, until it is deleted."""
        last = None
        with self._bus.subscribe(topic_of(sandbox.id)) as changes:
            while True:
                sandbox = await self.reread(sandbox.id)
                if (sandbox.status, sandbox.reason) != last:
                    last = (sandbox.status, sandbox.reason)
                    yield sandbox
                if sandbox.status is Status.DESTROYED:
                    return
                await changes.wait(_SLICE_S)

    async def wait_for(
        self, sandbox: Sandbox, statuses: frozenset[Status], *, limit_s: float
    ) -> Sandbox:
        """Return a sandbox once its status is one of `statuses`.

        Raises:
            DeadlineExceededError: it is not, within the limit.
        """
        until = self._clock.monotonic() + limit_s
        with self._bus.subscribe(topic_of(sandbox.id)) as changes:
            while True:
                sandbox = await self.reread(sandbox.id)
                if sandbox.status in statuses:
                    return sandbox
                left = until - self._clock.monotonic()
                if left <= 0:
                    raise DeadlineExceededError(
                        f"cannot wait longer for {sandbox.id}: it is still {sandbox.status}; "
                        "ask again in a while"
                    )
                # Polled as well, because a hint may be lost.
                await changes.wait(min(left, _SLICE_S))


class Attempts:
    """The attempts of an operation on a sandbox: each starts from the row as it is then."""

    def __init__(self, register: Register, sandbox: Sandbox, doing: str) -> None:
        self._register = register
        self._sandbox = sandbox
        self._doing = doing
        self._left = _TRIES

    async def next(self) -> Sandbox:
        """Return the row for the next attempt.

        Raises:
            NotFoundError: the sandbox was deleted meanwhile.
            UnavailableError: it changes constantly.
        """
        if self._left < _TRIES:
            self._sandbox = sandbox = await self._register.reread(self._sandbox.id)
            if sandbox.status is Status.DESTROYED:
                raise NotFoundError(f"cannot find the sandbox {sandbox.id}: it has been deleted")
        if self._left == 0:
            raise UnavailableError(
                f"cannot {self._doing} {self._sandbox.id} now: others change it all the time; "
                "ask again"
            )
        self._left -= 1
        return self._sandbox


async def get_snapshot(
    store: Store,
    actor: Actor,
    reference: str,
    *,
    field: str | None = "snapshot",
    ready: bool = True,
) -> Snapshot:
    """Return a snapshot that the actor may use, by id or name.

    Raises:
        InvalidArgumentError: it does not exist, and was named in `field`.
        NotFoundError: it does not exist, and was requested itself.
        ConflictError: it is not complete yet.
    """
    async with store.read() as tx:
        snapshot = await tx.snapshots.find(actor.org_id, checked_text(reference, field="snapshot"))
    is_seen = snapshot is not None and (actor.sees_all or snapshot.owner_user_id == actor.user_id)
    if snapshot is None or not is_seen:
        message = f"cannot find the snapshot {reference[:80]!r}: check id or name"
        if field is None:
            raise NotFoundError(message)
        raise InvalidArgumentError(message, field=field)
    if ready and not snapshot.is_ready and field is not None:
        raise ConflictError(
            f"cannot use the snapshot {snapshot.id} yet: it is being made", status="creating"
        )
    return snapshot


def _may_see(actor: Actor, sandbox: Sandbox) -> bool:
    return (
        sandbox.org_id == actor.org_id
        and sandbox.status is not Status.DESTROYED
        and (actor.sees_all or sandbox.owner_user_id == actor.user_id)
    )


def ref_of(sandbox: Sandbox | Standing) -> MachineRef:
    """Return the reference to a sandbox's machine."""
    return MachineRef(sandbox.node_id or "", sandbox.id, sandbox.incarnation)
