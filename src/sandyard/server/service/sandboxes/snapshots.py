"""Snapshots and forks: saved states of a sandbox, to start others from or to restore.

A snapshot is independent of its sandbox, and of the sandboxes made from it. A fork uses a hidden
snapshot, which is removed once all forks have started.

While a snapshot is made, its server extends a deadline in its row. A snapshot whose deadline has
passed was never finished, and is removed.
"""

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import datetime, timedelta
from typing import TypeVar

from sandyard.server.core.contracts.store import Transaction
from sandyard.server.core.errors import (
    AlreadyExistsError,
    ConflictError,
    DeadlineExceededError,
    InvalidArgumentError,
    NotFoundError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.ids import (
    check_addressable,
    checked_name,
    checked_text,
    is_sandbox_id,
    is_uuid,
    new_sandbox_id,
    new_uuid,
)
from sandyard.server.core.node_ops import DropSnapshot, EnsureSnapshot
from sandyard.server.core.records import Activity, Claim, Sandbox, Snapshot, StoragePeriod
from sandyard.server.core.states import Event, Status
from sandyard.server.service.actor import Actor
from sandyard.server.service.lines import line
from sandyard.server.service.networks import check_use
from sandyard.server.service.nodes import believed_bytes
from sandyard.server.service.repeats import Repeatable
from sandyard.server.service.sandboxes.lifecycle import refusal
from sandyard.server.service.sandboxes.mounts import checked_mounts, still_there
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.sandboxes.power import Power
from sandyard.server.service.sandboxes.register import Deadline, get_snapshot
from sandyard.server.service.sandboxes.worker import Worker, new_lease
from sandyard.server.tasks import concurrently, to_the_end

FORKS = range(1, 101)
CACHE_PREFIX = "build-cache-"
"""What the names of snapshots begin with that builds of templates keep."""
_NAME_MAX = 63
_SAVABLE = frozenset({Status.RUNNING, Status.PAUSED})
_PASSING = frozenset({Status.PAUSING, Status.RESUMING})
_LASTING = frozenset(Status) - _PASSING
_WAIT_S = 60.0
_HOLD_S = 30.0
_LOOK_S = 0.5
_TRIES = 3
_T = TypeVar("_T")


class Snapshots:
    """The operations. Each takes the actor and never discloses another organization's snapshots."""

    def __init__(
        self,
        platform: Platform,
        *,
        worker: Worker,
        power: Power,
    ) -> None:
        self._store = platform.store
        self._register = platform.register
        self._nodes = platform.nodes
        self._placement = platform.placement
        self._lifecycle = platform.lifecycle
        self._worker = worker
        self._power = power
        self._quota = platform.quota
        self._repeats = platform.repeats
        self._clock = platform.clock

    async def create(
        self,
        actor: Actor,
        reference: str,
        name: str | None,
        *,
        request: Repeatable | None = None,
        is_for_cache: bool = False,
        takes_name: bool = False,
    ) -> Snapshot:
        """Save the current state of a running or paused sandbox, which continues, and return the
        snapshot. Only one `is_for_cache` may have a name that begins with `CACHE_PREFIX`. If it
        `takes_name`, a snapshot that has the name loses it once this one is saved.

        Raises:
            NotFoundError: there is no such sandbox.
            InvalidArgumentError: the name is invalid.
            AlreadyExistsError: the name is taken.
            ConflictError: the sandbox's status does not allow it.
            LimitReachedError: the plan's limit on snapshots is reached.
            QuotaExceededError: the credits do not suffice.
            DeadlineExceededError: a pause or resume of the sandbox takes too long.
            UnavailableError: it cannot be saved now; nothing is left of the attempt.
        """
        actor.require("sandbox:write")
        if name is not None:
            _check_name(name)
        if name is not None and name.startswith(CACHE_PREFIX) and not is_for_cache:
            raise InvalidArgumentError(
                f"cannot use this name: those that begin with {CACHE_PREFIX} are for what builds "
                "of templates keep",
                field="name",
            )
        until = Deadline(self._clock, _WAIT_S)
        async with self._repeats.turn(actor, request):
            for _ in range(_TRIES):
                made = await self._made_before(actor, request, _ready(actor), until)
                if made is not None:
                    return made
                sandbox = await self._at_rest(await self._register.get(actor, reference), until)
                at_first = None if takes_name else name
                snapshot = self._new(actor, sandbox, name=at_first, is_hidden=False)
                noted = (snapshot.id,)
                async with self._store.write(actor.org_id) as tx:
                    if await self._repeats.made_before(tx, actor, request) is not None:
                        continue  # another server handled the same request
                    await self._quota.check_snapshot(
                        tx, actor, sandbox.shape, is_test=sandbox.is_test
                    )
                    if takes_name and name is not None:
                        await _named(tx, actor, name)
                    await tx.snapshots.insert(snapshot)
                    await self._repeats.note(tx, actor, request, noted)
                async with self._noted(actor, request, noted):
                    await self._save(actor, sandbox, snapshot, until, name=name)
                return await self._found(actor, snapshot.id)
        raise _unknown_outcome()

    async def _save(
        self,
        actor: Actor,
        sandbox: Sandbox,
        snapshot: Snapshot,
        until: Deadline,
        *,
        name: str | None,
    ) -> None:
        async with (
            self._made(sandbox, snapshot, until) as size_bytes,
            self._store.write(snapshot.org_id) as tx,
        ):
            await self._quota.check_snapshot_size(tx, actor, size_bytes)
            await self._complete(tx, snapshot, size_bytes)
            if name is not None and name != snapshot.name:
                earlier = await _named(tx, actor, name)
                if earlier is not None:
                    await tx.snapshots.rename(earlier.id, None)
                await tx.snapshots.rename(snapshot.id, name)
            await tx.storage.open(self._kept(sandbox, snapshot, size_bytes))
            named = replace(snapshot, name=name)
            await tx.activity.append(self._line(actor, named, "snapshot.created"))

    async def _made_before(
        self,
        actor: Actor,
        request: Repeatable | None,
        find: Callable[[Transaction, tuple[str, ...]], Awaitable[_T | None]],
        until: Deadline,
    ) -> _T | None:
        """Return what the same request created before, using `find` on the stored ids.

        Return None if nothing was created, or if the server that began it ended. Should that server
        still run, it finds its snapshot gone and fails.
        """
        if request is None:
            return None
        while True:
            async with self._store.write(actor.org_id) as tx:
                ids = await self._repeats.made_before(tx, actor, request)
                if ids is None:
                    return None
                if (found := await find(tx, ids)) is not None:
                    return found
                # Before version 4 of the database the snapshot of forks was not noted.
                making = await tx.snapshots.find(actor.org_id, ids[0]) if is_uuid(ids[0]) else None
                if making is None or not making.is_made(self._clock.now()):
                    if making is not None:
                        await tx.snapshots.remove(making.id, at=self._clock.now())
                    await self._repeats.forget(tx, actor, request, ids)
                    return None
            if not until.left_s:
                raise _unknown_outcome()
            await self._clock.sleep(_LOOK_S)

    @asynccontextmanager
    async def _noted(
        self, actor: Actor, request: Repeatable | None, ids: tuple[str, ...]
    ) -> AsyncIterator[None]:
        """Forget a request if the block fails before it has created what was stored."""
        try:
            yield
        except BaseException:
            await to_the_end(self._forget(actor, request, ids))
            raise

    async def _forget(self, actor: Actor, request: Repeatable | None, ids: tuple[str, ...]) -> None:
        async with self._store.write(actor.org_id) as tx:
            if not await _is_ready(tx, actor.org_id, ids[0]):
                await self._repeats.forget(tx, actor, request, ids)

    async def _complete(self, tx: Transaction, snapshot: Snapshot, size_bytes: int) -> None:
        if not await tx.snapshots.complete(snapshot.id, size_bytes=size_bytes):
            raise ConflictError(
                f"cannot finish the snapshot {snapshot.id}: it was deleted meanwhile",
                status="deleted",
            )

    async def get(self, actor: Actor, reference: str) -> Snapshot:
        """Return a snapshot by id or name.

        Raises:
            NotFoundError: it does not exist, or belongs to another organization or member.
        """
        actor.require("sandbox:read")
        return await get_snapshot(self._store, actor, reference, field=None)

    async def page(
        self, actor: Actor, *, limit: int, after: tuple[datetime, str] | None
    ) -> list[Snapshot]:
        """Return one page of the snapshots that the actor may see, newest first."""
        actor.require("sandbox:read")
        async with self._store.read() as tx:
            return await tx.snapshots.page(
                actor.org_id,
                owner_user_id=None if actor.sees_all else actor.user_id,
                limit=limit,
                after=after,
            )

    async def delete(self, actor: Actor, reference: str) -> Snapshot:
        """Delete a snapshot. Sandboxes created from it are not affected.

        Raises:
            NotFoundError: see `get`.
            ConflictError: it is being made, or a sandbox is being started from it.
        """
        actor.require("sandbox:write")
        snapshot = await get_snapshot(self._store, actor, reference, field=None)
        if snapshot.is_made(self._clock.now()):
            raise ConflictError(
                f"cannot delete the snapshot {snapshot.id} yet: it is being made; ask again once "
                "it is ready",
                status="creating",
            )
        async with self._store.write(snapshot.org_id) as tx:
            if await tx.snapshots.is_awaited(snapshot.id):
                raise ConflictError(
                    f"cannot delete the snapshot {snapshot.id} yet: a sandbox is just being "
                    "started from it; ask again once that runs, or delete that",
                    status="in_use",
                )
            await tx.snapshots.remove(snapshot.id, at=self._clock.now())
            await tx.storage.close("snapshot", snapshot.id, self._clock.now())
            await tx.activity.append(self._line(actor, snapshot, "snapshot.deleted"))
        if self._nodes.has(snapshot.node_id):
            # If the node does not answer, its files are removed once it does.
            with suppress(UnavailableError):
                await self._nodes.get(snapshot.node_id).do(DropSnapshot(snapshot.id))
        return snapshot

    async def fork(
        self,
        actor: Actor,
        reference: str,
        count: int,
        *,
        name: str | None = None,
        request: Repeatable | None = None,
        expires_in: int | None = None,
    ) -> list[Sandbox]:
        """Create sandboxes from the current state of this one, each with its own identity. They
        have an end in `expires_in` seconds, or none.

        Raises:
            InvalidArgumentError: the count is not 1 to 100, or a name is invalid.
            AlreadyExistsError: a name is taken.
            NoCapacityError: the sandbox's node has no capacity for them.
            For the rest see `create`.
        """
        actor.require("sandbox:create")
        actor.require("sandbox:write")
        if count not in FORKS:
            raise InvalidArgumentError(
                "cannot make so many forks: count is 1 to 100", field="count"
            )
        names = _names(name, count)
        until = Deadline(self._clock, _WAIT_S)
        async with self._repeats.turn(actor, request):
            for _ in range(_TRIES):
                made = await self._made_before(actor, request, _forks, until)
                if made is not None:
                    return made
                source = await self._at_rest(await self._register.get(actor, reference), until)
                snapshot = self._new(actor, source, name=None, is_hidden=True)
                async with self._store.read() as tx:
                    await self._quota.check_new(tx, actor, source.shape, count=count)
                    await _check_free(tx, actor, names)
                await self._placement.choose_for(snapshot, source.shape, count=count)
                checked_mounts(actor, source.mounts)
                check_use(actor, source.network)
                forks = [self._fork_of(actor, source, snapshot, one, expires_in) for one in names]
                noted = (snapshot.id, *(one.id for one in forks))
                async with self._store.write(actor.org_id) as tx:
                    if await self._repeats.made_before(tx, actor, request) is not None:
                        continue  # another server handled the same request
                    # Checked again when the forks are made; here, before anything is saved.
                    await self._quota.check_new(tx, actor, source.shape, count=count)
                    await tx.snapshots.insert(snapshot)
                    await self._repeats.note(tx, actor, request, noted)
                async with (
                    self._noted(actor, request, noted),
                    self._made(source, snapshot, until) as size_bytes,
                ):
                    snapshot = replace(snapshot, size_bytes=size_bytes)
                    return await self._start_forks(actor, snapshot, forks)
        raise _unknown_outcome()

    async def _start_forks(
        self, actor: Actor, snapshot: Snapshot, forks: list[Sandbox]
    ) -> list[Sandbox]:
        begun = list[Sandbox]()
        with new_lease(self._worker, *(one.id for one in forks)) as hold:
            async with self._store.write(actor.org_id) as tx:
                await self._quota.check_new(tx, actor, snapshot.shape, count=len(forks))
                await self._complete(tx, snapshot, snapshot.size_bytes)
                for one in forks:
                    mounts = await still_there(tx, one.org_id, one.mounts)
                    fork = replace(one, mounts=mounts)
                    begun.append(await self._lifecycle.begin(tx, fork, actor, hold=hold))
        for fork in begun:
            await self._worker.run_now(Claim(fork, hold.lease), limit_s=0)
        return begun

    def _fork_of(
        self,
        actor: Actor,
        source: Sandbox,
        snapshot: Snapshot,
        name: str | None,
        expires_in: int | None,
    ) -> Sandbox:
        now = self._clock.now()
        return replace(
            source,
            id=new_sandbox_id(),
            name=name,
            owner_user_id=actor.user_id,
            status=Status.CREATING,
            version=1,
            incarnation=1,
            created_at=now,
            updated_at=now,
            started_at=None,
            paused_at=None,
            last_activity_at=None,
            last_activity_kind=None,
            expires_at=None if expires_in is None else now + timedelta(seconds=expires_in),
            lives_s=expires_in,
            pauses_at_end=False,
            keeps_memory=True,
            node_id=snapshot.node_id,
            ip=None,
            reason=None,
            from_snapshot_id=snapshot.id,
            from_snapshot_incarnation=1,
            from_disk_incarnation=0,
            is_test=actor.is_test,
            saved_bytes=0,
        )

    async def roll_back(self, actor: Actor, reference: str, snapshot_ref: str) -> Sandbox:
        """Restore a sandbox to one of its snapshots. Its current state is lost once it is running.

        If the snapshot cannot be started, the sandbox is paused or in error, as before.

        Raises:
            NotFoundError: there is no such sandbox.
            InvalidArgumentError: there is no such snapshot, or it has another shape.
            ConflictError: the sandbox's status does not allow it.
            DeadlineExceededError: its pause or start takes too long; the message says which.
            UnavailableError: it could not be started.
        """
        actor.require("sandbox:write")
        sandbox = await self._register.get(actor, reference)
        snapshot = await get_snapshot(self._store, actor, snapshot_ref, field="snapshot_id")
        if snapshot.sandbox_id != sandbox.id:
            raise InvalidArgumentError(
                f"cannot roll {sandbox.id} back to this snapshot: it is of {snapshot.sandbox_id}; "
                "create a sandbox from it instead",
                field="snapshot_id",
            )
        until = self._power.deadline()
        if sandbox.status is Status.RUNNING or sandbox.status is Status.PAUSING:
            # Before it is stopped for a snapshot that could not start.
            async with self._store.read() as tx:
                await self._quota.check_going_on(tx, actor, is_test=sandbox.is_test)
            try:
                sandbox = await self._power.pause(sandbox, actor, until=until)
            except DeadlineExceededError as error:
                raise DeadlineExceededError(
                    f"cannot roll {sandbox.id} back yet: it is still being paused; ask again "
                    "once it is"
                ) from error
        return await self._power.bring_up(
            sandbox,
            actor,
            Event.ROLL_BACK,
            doing="roll back",
            snapshot_id=snapshot.id,
            until=until,
        )

    # --- parts ----------------------------------------------------------------------------

    async def _at_rest(self, sandbox: Sandbox, until: Deadline) -> Sandbox:
        """Return a sandbox once it is neither pausing nor resuming."""
        if sandbox.status not in _PASSING:
            return sandbox
        return await self._register.wait_for(sandbox, _LASTING, limit_s=until.left_s)

    def _new(
        self, actor: Actor, sandbox: Sandbox, *, name: str | None, is_hidden: bool
    ) -> Snapshot:
        if sandbox.status not in _SAVABLE or sandbox.node_id is None:
            raise refusal(sandbox, doing="fork" if is_hidden else "save")
        now = self._clock.now()
        return Snapshot(
            id=new_uuid(),
            org_id=sandbox.org_id,
            owner_user_id=actor.user_id,
            sandbox_id=sandbox.id,
            node_id=sandbox.node_id,
            name=name,
            template=sandbox.template,
            os=sandbox.os,
            shape=sandbox.shape,
            is_ready=False,
            is_hidden=is_hidden,
            size_bytes=0,
            created_at=now,
            held_until=now + timedelta(seconds=_HOLD_S),
            mounts=sandbox.mounts,
            network=sandbox.network,
            is_test=sandbox.is_test,
        )

    @asynccontextmanager
    async def _made(
        self, sandbox: Sandbox, snapshot: Snapshot, until: Deadline
    ) -> AsyncIterator[int]:
        """Have the node save the sandbox, and extend the deadline until the block ends. The block
        receives the size in bytes. A failed attempt leaves nothing; if only the answer was lost, it
        counts as a success."""
        async with concurrently(self._hold_on(snapshot)):
            try:
                yield await self._size_of(sandbox, snapshot, until)
            except SandyardError:
                async with self._store.write(snapshot.org_id) as tx:
                    if not await _is_ready(tx, snapshot.org_id, snapshot.id):
                        await tx.snapshots.remove(snapshot.id, at=self._clock.now())
                raise

    async def _hold_on(self, snapshot: Snapshot) -> None:
        while True:
            await self._clock.sleep(_HOLD_S / 3)
            until = self._clock.now() + timedelta(seconds=_HOLD_S)
            with suppress(UnavailableError):  # repeated before the deadline
                async with self._store.write(snapshot.org_id) as tx:
                    await tx.snapshots.extend(snapshot.id, held_until=until)

    async def _size_of(self, sandbox: Sandbox, snapshot: Snapshot, until: Deadline) -> int:
        """Have the node save a sandbox, and return the size in bytes."""
        node = self._nodes.get(snapshot.node_id)

        attempts = self._register.attempts(sandbox, doing="save")
        while True:
            now = await attempts.next()
            if now.status not in _SAVABLE:
                now = await self._at_rest(now, until)
            if now.status not in _SAVABLE:
                raise refusal(now, doing="save")
            try:
                fact = await node.do(
                    EnsureSnapshot(
                        snapshot.id,
                        sandbox_id=now.id,
                        incarnation=now.incarnation,
                        version=now.version,
                    )
                )
            except (NotFoundError, ConflictError):
                # It may have been resumed at this moment, or changed otherwise.
                again = await self._at_rest(await self._register.reread(now.id), until)
                if again.status in _SAVABLE and again.version == now.version:
                    raise
            else:
                return believed_bytes(fact.size_bytes, now.shape)

    async def _found(self, actor: Actor, snapshot_id: str) -> Snapshot:
        return await get_snapshot(self._store, actor, snapshot_id, field=None, ready=False)

    def _kept(self, sandbox: Sandbox, snapshot: Snapshot, size_bytes: int) -> StoragePeriod:
        return StoragePeriod(
            kind="snapshot",
            resource_id=snapshot.id,
            org_id=snapshot.org_id,
            size_bytes=size_bytes,
            started_at=self._clock.now(),
            is_free=sandbox.is_test,
        )

    def _line(self, actor: Actor, snapshot: Snapshot, event_type: str) -> Activity:
        is_new = event_type == "snapshot.created"
        return line(
            event_type,
            "Snapshot made" if is_new else "Snapshot deleted",
            org_id=snapshot.org_id,
            actor=actor,
            resource_id=snapshot.id,
            at=self._clock.now(),
            summary=snapshot.name or "",
            status="ready" if is_new else "deleted",
            sandbox_id=snapshot.sandbox_id,
        )


def _ready(
    actor: Actor,
) -> Callable[[Transaction, tuple[str, ...]], Awaitable[Snapshot | None]]:
    async def find(tx: Transaction, ids: tuple[str, ...]) -> Snapshot | None:
        found = await tx.snapshots.find(actor.org_id, ids[0])
        return found if found is not None and found.is_ready else None

    return find


async def _is_ready(tx: Transaction, org_id: str, snapshot_id: str) -> bool:
    found = await tx.snapshots.find(org_id, snapshot_id)
    return found is not None and found.is_ready


async def _forks(tx: Transaction, ids: tuple[str, ...]) -> list[Sandbox] | None:
    found = [await tx.sandboxes.find(one) for one in ids if is_sandbox_id(one)]
    return [one for one in found if one is not None] or None


async def _named(tx: Transaction, actor: Actor, name: str) -> Snapshot | None:
    """Return the snapshot that has a name, which the actor may take from it.

    Raises:
        AlreadyExistsError: it is another member's.
    """
    found = await tx.snapshots.find(actor.org_id, name)
    if found is None or found.name != name:
        return None
    if not actor.sees_all and found.owner_user_id != actor.user_id:
        raise AlreadyExistsError(
            f"cannot use the name {name!r}: the snapshot of another member has it; choose another",
            field="name",
        )
    return found


def _names(name: str | None, count: int) -> list[str | None]:
    """Return the names of forks: the name itself for one, numbered for several."""
    if name is None:
        return [None] * count
    names = [name] if count == 1 else [f"{name}-{number}" for number in range(1, count + 1)]
    return [checked_name(one) for one in names]


async def _check_free(tx: Transaction, actor: Actor, names: list[str | None]) -> None:
    """Refuse names that are taken, before anything is saved."""
    for name in names:
        if name is not None and await tx.sandboxes.find_named(actor.org_id, name) is not None:
            raise AlreadyExistsError(
                f"cannot use the name {name!r}: another sandbox has it", field="name"
            )


def _unknown_outcome() -> UnavailableError:
    return UnavailableError("cannot tell yet what this request makes: ask again in a while")


def _check_name(name: str) -> None:
    checked_text(name, field="name")
    check_addressable(name)
    if not 1 <= len(name) <= _NAME_MAX or not name.isprintable() or is_uuid(name):
        raise InvalidArgumentError(
            f"cannot use this name: it needs 1 to {_NAME_MAX} printable characters and must not "
            "have the form of an id",
            field="name",
        )
