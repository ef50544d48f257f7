"""Snapshots and forks: a sandbox as it was at one moment, to start others from or go back to.

A snapshot stands alone: the sandbox it was made of may be deleted, and what was made from it lives
on when it is. A fork is made of a hidden snapshot, which goes once all its forks have come up.
"""

from contextlib import ExitStack
from dataclasses import replace
from datetime import datetime

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Store
from sandyard.server.core.errors import (
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.ids import check_text, is_uuid, new_sandbox_id, new_uuid
from sandyard.server.core.records import Activity, Claim, Sandbox, Snapshot, StoragePeriod
from sandyard.server.core.states import Event, Status, Wanted
from sandyard.server.service.actor import Actor
from sandyard.server.service.placement import Placement
from sandyard.server.service.repeats import Repeatable, Repeats
from sandyard.server.service.sandboxes.lifecycle import Lifecycle, check_status
from sandyard.server.service.sandboxes.quota import Admission
from sandyard.server.service.sandboxes.register import Register, find_snapshot
from sandyard.server.service.sandboxes.sandboxes import Sandboxes
from sandyard.server.service.sandboxes.uses import Uses
from sandyard.server.service.sandboxes.worker import Worker

FORKS = range(1, 101)
_NAME_MAX = 63
_SAVABLE = frozenset({Status.RUNNING, Status.PAUSED})
_PASSING = frozenset({Status.PAUSING, Status.RESUMING})
_LASTING = frozenset(Status) - _PASSING
_WAIT_S = 60.0
_TRIES = 3


class Snapshots:
    """The use cases. Every one names its actor and answers nothing of another organization's."""

    def __init__(
        self,
        *,
        store: Store,
        register: Register,
        placement: Placement,
        lifecycle: Lifecycle,
        worker: Worker,
        sandboxes: Sandboxes,
        admission: Admission,
        repeats: Repeats,
        uses: Uses,
        clock: Clock,
    ) -> None:
        self._store = store
        self._register = register
        self._placement = placement
        self._lifecycle = lifecycle
        self._worker = worker
        self._sandboxes = sandboxes
        self._admission = admission
        self._repeats = repeats
        self._uses = uses
        self._clock = clock

    async def create(
        self, actor: Actor, reference: str, name: str | None, *, request: Repeatable | None = None
    ) -> Snapshot:
        """Save a running or paused sandbox as it is now, which goes on, and return the snapshot.

        Raises:
            NotFoundError: no such sandbox.
            InvalidArgumentError: the name cannot be used.
            AlreadyExistsError: the name is taken.
            ConflictError: the sandbox's status does not allow it.
            UnavailableError: it cannot be saved now; nothing is left of the try.
        """
        actor.require("sandbox:write")
        if name is not None:
            _check_name(name)
        async with self._repeats.turn(actor, request):
            sandbox = await self._settled(await self._register.find(actor, reference))
            with ExitStack() as held:
                async with self._store.write() as tx:
                    ids = await self._repeats.made_before(tx, actor, request)
                    if ids is not None:
                        return await self._found(actor, ids[0])
                    snapshot = self._new(actor, sandbox, name=name, is_hidden=False)
                    # From before it can be seen until it is whole.
                    held.enter_context(self._uses.use(snapshot.id))
                    await tx.snapshots.insert(snapshot)
                size_bytes = await self._save(sandbox, snapshot)
                async with self._store.write() as tx:
                    if not await tx.snapshots.complete(snapshot.id, size_bytes=size_bytes):
                        raise ConflictError(
                            f"cannot finish the snapshot {snapshot.id}: it was deleted meanwhile",
                            status="deleted",
                        )
                    await tx.storage.open(self._kept(sandbox, snapshot, size_bytes))
                    await tx.activity.append(self._line(actor, snapshot, "snapshot.created"))
                    await self._repeats.note(tx, actor, request, (snapshot.id,))
            return await self._found(actor, snapshot.id)

    async def find(self, actor: Actor, reference: str) -> Snapshot:
        """Return a snapshot by id or name.

        Raises:
            NotFoundError: absent, another organization's or, for a member, another member's.
        """
        actor.require("sandbox:read")
        return await find_snapshot(self._store, actor, reference, field=None)

    async def page(
        self, actor: Actor, *, limit: int, after: tuple[datetime, str] | None
    ) -> list[Snapshot]:
        """Return one page of the snapshots that the actor sees, newest first."""
        actor.require("sandbox:read")
        async with self._store.read() as tx:
            return await tx.snapshots.page(
                actor.org_id,
                owner_user_id=None if actor.sees_all else actor.user_id,
                limit=limit,
                after=after,
            )

    async def delete(self, actor: Actor, reference: str) -> Snapshot:
        """Remove a snapshot; sandboxes that were made from it live on.

        Raises:
            NotFoundError: see `find`.
            ConflictError: it is being made.
        """
        actor.require("sandbox:write")
        snapshot = await find_snapshot(self._store, actor, reference, field=None)
        if not snapshot.is_ready and self._uses.is_used(snapshot.id):
            raise ConflictError(
                f"cannot delete the snapshot {snapshot.id} yet: it is being made; ask again once "
                "it is ready",
                status="creating",
            )
        async with self._store.write() as tx:
            await tx.snapshots.remove(snapshot.id)
            await tx.storage.close("snapshot", snapshot.id, self._clock.now())
            await tx.activity.append(self._line(actor, snapshot, "snapshot.deleted"))
        node = self._placement.find(snapshot.node_id)
        if node is not None:
            await node.drop_snapshot(snapshot.id)
        return snapshot

    async def fork(
        self, actor: Actor, reference: str, count: int, *, request: Repeatable | None = None
    ) -> list[Sandbox]:
        """Make sandboxes that begin as this one is now, each with an identity of its own.

        Raises:
            InvalidArgumentError: not 1 to 100 are asked for.
            NoCapacityError: the host has no room for so many.
            For the rest see `create`.
        """
        actor.require("sandbox:create")
        actor.require("sandbox:write")
        if count not in FORKS:
            raise InvalidArgumentError("cannot make so many forks: 1 to 100 are", field="count")
        async with self._repeats.turn(actor, request):
            source = await self._settled(await self._register.find(actor, reference))
            async with self._store.write() as tx:
                ids = await self._repeats.made_before(tx, actor, request)
                if ids is not None:
                    found = [await tx.sandboxes.find(one) for one in ids]
                    return [one for one in found if one is not None]
                # Before anything is saved; what decides is asked again when they are made.
                await self._admission.check_new(tx, actor, source.shape, count=count)
            if source.status not in _SAVABLE:
                raise check_status(source, wanted="fork")
            shape = source.shape
            await self._placement.choose(source).check_room(
                source.template,
                replace(
                    shape, memory_mib=shape.memory_mib * count, disk_mib=shape.disk_mib * count
                ),
            )
            snapshot = self._new(actor, source, name=None, is_hidden=True)
            async with self._store.write() as tx:
                await tx.snapshots.insert(snapshot)
            with self._uses.use(snapshot.id):
                size_bytes = await self._save(source, snapshot)
                return await self._start_forks(
                    actor, source, replace(snapshot, size_bytes=size_bytes), count, request
                )

    async def _start_forks(
        self,
        actor: Actor,
        source: Sandbox,
        snapshot: Snapshot,
        count: int,
        request: Repeatable | None,
    ) -> list[Sandbox]:
        hold = self._worker.hold()
        forks = []
        async with self._store.write() as tx:
            await self._admission.check_new(tx, actor, source.shape, count=count)
            await tx.snapshots.complete(snapshot.id, size_bytes=snapshot.size_bytes)
            for _ in range(count):
                fork = self._fork_of(actor, source, snapshot)
                forks.append(await self._lifecycle.begin(tx, fork, actor, hold=hold))
            await self._repeats.note(tx, actor, request, tuple(one.id for one in forks))
        for fork in forks:
            await self._worker.take_up(Claim(fork, hold.lease), limit_s=0)
        return forks

    def _fork_of(self, actor: Actor, source: Sandbox, snapshot: Snapshot) -> Sandbox:
        now = self._clock.now()
        return replace(
            source,
            id=new_sandbox_id(),
            name=None,
            owner_user_id=actor.user_id,
            status=Status.CREATING,
            wanted=Wanted.RUNNING,
            version=1,
            incarnation=1,
            created_at=now,
            updated_at=now,
            started_at=None,
            paused_at=None,
            last_activity_at=None,
            last_activity_kind=None,
            expires_at=None,
            ip=None,
            reason=None,
            from_snapshot_id=snapshot.id,
            from_snapshot_at=1,
            is_test=actor.is_test,
            saved_bytes=0,
        )

    async def roll_back(self, actor: Actor, reference: str, snapshot_ref: str) -> Sandbox:
        """Put a sandbox back to a snapshot of it; what it was until then is lost once it is up.

        If the snapshot cannot be started, the sandbox is paused or in error, as it was before.

        Raises:
            NotFoundError: no such sandbox.
            InvalidArgumentError: no such snapshot, or one of another shape.
            ConflictError: the sandbox's status does not allow it.
            UnavailableError: it could not be started.
        """
        actor.require("sandbox:write")
        sandbox = await self._register.find(actor, reference)
        snapshot = await find_snapshot(self._store, actor, snapshot_ref, field="snapshotId")
        if snapshot.sandbox_id != sandbox.id:
            raise InvalidArgumentError(
                f"cannot roll {sandbox.id} back to this snapshot: it is of {snapshot.sandbox_id}; "
                "create a sandbox from it instead",
                field="snapshotId",
            )
        if sandbox.status is Status.RUNNING or sandbox.status is Status.PAUSING:
            # Before it is taken down for what then could not come up.
            async with self._store.read() as tx:
                await self._admission.check_going_on(tx, actor, is_test=sandbox.is_test)
            sandbox = await self._sandboxes.pause(actor, sandbox.id)
        if sandbox.status not in (Status.PAUSED, Status.ERROR):
            raise check_status(sandbox, wanted="roll back")
        hold = self._worker.hold()
        resuming = await self._lifecycle.apply(
            sandbox,
            Event.ROLL_BACK,
            actor=actor,
            hold=hold,
            check=lambda tx: self._admission.check_resume(
                tx, actor, sandbox.shape, is_test=sandbox.is_test
            ),
            incarnation=sandbox.incarnation + 1,
            wanted=Wanted.RUNNING,
            from_snapshot_id=snapshot.id,
            from_snapshot_at=sandbox.incarnation + 1,
        )
        if resuming is None:
            raise ConflictError(
                f"cannot roll {sandbox.id} back: something else is done with it at this moment",
                status=sandbox.status.value,
            )
        await self._worker.take_up(Claim(resuming, hold.lease), limit_s=_WAIT_S)
        sandbox = await self._register.reread(sandbox.id)
        if sandbox.status in (Status.PAUSED, Status.ERROR):
            why = sandbox.reason.message if sandbox.reason else "it was not started"
            raise UnavailableError(
                f"cannot roll {sandbox.id} back: {why}; it is {sandbox.status} as before"
            )
        return sandbox

    # --- parts ----------------------------------------------------------------------------

    async def _settled(self, sandbox: Sandbox) -> Sandbox:
        """Return a sandbox once it is no longer on its way between running and paused."""
        if sandbox.status not in _PASSING:
            return sandbox
        return await self._register.wait_for(sandbox, _LASTING, limit_s=_WAIT_S)

    def _new(
        self, actor: Actor, sandbox: Sandbox, *, name: str | None, is_hidden: bool
    ) -> Snapshot:
        if sandbox.status not in _SAVABLE or sandbox.node_id is None:
            raise check_status(sandbox, wanted="save")
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
            created_at=self._clock.now(),
        )

    async def _save(self, sandbox: Sandbox, snapshot: Snapshot) -> int:
        """Have the node save the sandbox, and return the size; nothing is left of a failed try."""
        node = self._placement.find(snapshot.node_id)
        try:
            if node is None:
                raise UnavailableError(f"cannot reach the node of {sandbox.id}")
            for _ in range(_TRIES):
                try:
                    fact = await node.ensure_snapshot(
                        snapshot.id, sandbox_id=sandbox.id, incarnation=sandbox.incarnation
                    )
                except (NotFoundError, ConflictError) as error:
                    # Somebody resumes it at this moment? Then the node knows another incarnation.
                    again = await self._settled(await self._register.reread(sandbox.id))
                    if again.status not in _SAVABLE:
                        raise check_status(again, wanted="save") from error
                    if again.incarnation == sandbox.incarnation:
                        raise
                    sandbox = again
                else:
                    return fact.size_bytes
            raise UnavailableError(f"cannot save {sandbox.id} now: it changes all the time")
        except SandyardError:
            async with self._store.write() as tx:
                await tx.snapshots.remove(snapshot.id)
            raise

    async def _found(self, actor: Actor, snapshot_id: str) -> Snapshot:
        return await find_snapshot(self._store, actor, snapshot_id, field=None, ready=False)

    def _kept(self, sandbox: Sandbox, snapshot: Snapshot, size_bytes: int) -> StoragePeriod:
        return StoragePeriod(
            kind="snapshot",
            resource_id=snapshot.id,
            org_id=snapshot.org_id,
            size_bytes=size_bytes,
            started_at=self._clock.now(),
            is_free=sandbox.is_test,
        )

    def _line(self, actor: Actor | None, snapshot: Snapshot, event_type: str) -> Activity:
        is_new = event_type == "snapshot.created"
        return Activity(
            id=new_uuid(),
            org_id=snapshot.org_id,
            actor_user_id=actor.user_id if actor else snapshot.owner_user_id,
            actor_type=actor.kind if actor else "user",
            event_type=event_type,
            resource_type="snapshot",
            resource_id=snapshot.id,
            severity="info",
            status="ready" if is_new else "deleted",
            title="Snapshot made" if is_new else "Snapshot deleted",
            summary=snapshot.name or "",
            created_at=self._clock.now(),
            sandbox_id=snapshot.sandbox_id,
        )


def _check_name(name: str) -> None:
    check_text(name, field="name")
    if not 1 <= len(name) <= _NAME_MAX or not name.isprintable() or is_uuid(name):
        raise InvalidArgumentError(
            f"cannot use this name: it needs 1 to {_NAME_MAX} printable characters and must not "
            "have the form of an id",
            field="name",
        )
