"""One host's machines: the entry for requests, which gives each to the owner of its sandbox.

`machines.phases` says what is done in which phase, `jobs` how, and `owner` in which order.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from sandyard.server.core.codec import CodecError, decode
from sandyard.server.core.contracts.node import (
    CONNECTIONS_MAX,
    Connection,
    MachineAbout,
    MachineFact,
    MachineRef,
    MachineWish,
    NodeReport,
    Opened,
    Phase,
    SnapshotFact,
    TemplateFact,
    TemplateStatus,
    VersionFact,
)
from sandyard.server.core.copies import ReadCopy, WriteCopy
from sandyard.server.core.egress import Credentials, Policy
from sandyard.server.core.errors import ConflictError, DamagedError, NoCapacityError, SandyardError
from sandyard.server.core.ops import AnswerT, Operation, Read
from sandyard.server.core.records import Mount, VersionAbout
from sandyard.server.core.shapes import Shape
from sandyard.server.egress.journal import time_of
from sandyard.server.node.agent import content_of
from sandyard.server.node.capacity import Capacity
from sandyard.server.node.generation import Generation
from sandyard.server.node.host.admission import Admission, Margins
from sandyard.server.node.host.egress import read_journal
from sandyard.server.node.host.ledger import Ledger
from sandyard.server.node.images.copies import opened_copy
from sandyard.server.node.jobs import Jobs
from sandyard.server.node.machines.adopt import adopted, go_on
from sandyard.server.node.machines.console import FailedConsoles, read_console
from sandyard.server.node.machines.means import Means
from sandyard.server.node.machines.phases import Ask, Step
from sandyard.server.node.owner import Owner, nothing_here
from sandyard.server.node.pressure import Pressure
from sandyard.server.node.readiness import MachineCheck
from sandyard.server.node.snapshots import KeptSnapshots
from sandyard.server.node.stock.goldens import Goldens
from sandyard.server.node.stock.pool import MachineObserver, Pool, PoolLimits
from sandyard.server.node.stock.turns import Turns
from sandyard.server.tasks import in_thread, to_the_end

log = logging.getLogger(__name__)

_REMOVED_MAX = 4096
_LITTLE_DISK_MIB = 512
_COPY_MARGIN_MIB = 2048


class Node:
    """See NodeControl, NodeExports and NodeTunnel in core.contracts.node. Use it inside
    `running`."""

    def __init__(
        self,
        *,
        node_id: str,
        home: Path,
        means: Means,
        pool_limits: PoolLimits,
        margins: Margins,
        observer: MachineObserver,
    ) -> None:
        self._node_id = node_id
        self._means = means
        self._snapshots = KeptSnapshots(home / "snapshots", means.seals)
        self._consoles = FailedConsoles(home / "consoles")
        self._owners: dict[str, Owner] = {}
        self._users: dict[Owner, int] = {}
        # Of sandboxes that have no owner any more: the incarnation that was removed last, and the
        # latest version. A request that comes after its own removal is refused.
        self._removed: OrderedDict[str, tuple[int, int]] = OrderedDict()
        boots = Turns(means.limits.boots_at_once)
        restores = Turns(means.limits.restores_at_once)
        self._ledger = Ledger(means.clock, disk_most_mib=margins.disk_most_mib)
        self._admission = Admission(means.records.machines_dir, margins, self._ledger.totals)
        self._pressure = Pressure(
            home,
            little_mib=min(margins.disk_floor_mib, _LITTLE_DISK_MIB),
            running=self._running,
            clock=means.clock,
            on_change=means.on_change,
        )
        self._check = MachineCheck(means)
        self._generation = Generation()
        self._goldens = Goldens(
            home / "goldens",
            means=means,
            boots=boots,
            on_ready=lambda: self._pool.nudge(),
            has_room=self._has_room,
            ledger=self._ledger,
        )
        self._pool = Pool(
            means=means,
            goldens=self._goldens,
            restores=restores,
            limits=pool_limits,
            has_room=self._has_room,
            ledger=self._ledger,
        )
        self._capacity = Capacity(
            self._admission, self._ledger, means.images, self._goldens, self._pool
        )
        self._jobs = Jobs(
            means=means,
            goldens=self._goldens,
            pool=self._pool,
            capacity=self._capacity,
            snapshots=self._snapshots,
            boots=boots,
            restores=restores,
            observer=observer,
            consoles=self._consoles,
        )

    @property
    def node_id(self) -> str:
        """See core.contracts.node.NodeControl.node_id."""
        return self._node_id

    @asynccontextmanager
    async def running(self, *, fills_pool: bool = True) -> AsyncIterator[None]:
        """Adopt the machines of an earlier process and serve; they keep running after the block."""
        crew = self._means.crew
        async with crew:
            await self._adopt()
            crew.start(self._pressure.watch(), "the host's disk is no longer monitored")
            try:
                async with AsyncExitStack() as keeping:
                    if fills_pool:
                        crew.start(self._check.run(), "readiness is no longer checked")
                    if fills_pool and self._means.limits.uses_goldens:
                        await keeping.enter_async_context(self._goldens.making())
                        await keeping.enter_async_context(self._pool.filling())
                    yield
            finally:
                await to_the_end(self._detach())

    # --- NodeControl ----------------------------------------------------------------------

    async def ensure_running(self, wish: MachineWish) -> MachineFact:
        """See core.contracts.node.NodeControl.ensure_running."""
        with self._owner(wish.sandbox_id) as owner:
            return await owner.bring_up(wish, partial(self._jobs.bring_up, owner, wish))

    async def ensure_paused(self, sandbox_id: str, *, incarnation: int, version: int = 0) -> int:
        """See core.contracts.node.NodeControl.ensure_paused."""
        with self._owner(sandbox_id) as owner:
            await owner.at_rest(incarnation, version)
            if owner.step(Ask.PAUSE, incarnation) is Step.PAUSE:
                await owner.do(owner.resident.saving.pause())
            elif owner.resident.is_up:  # it is paused, and its process did not end then
                await owner.do(owner.resident.end())
            return await in_thread(lambda: owner.resident.body.size_bytes)

    async def ensure_gone(self, sandbox_id: str, *, incarnation: int, version: int = 0) -> None:
        """See core.contracts.node.NodeControl.ensure_gone."""
        with self._owner(sandbox_id) as owner:
            await owner.remove(incarnation, version, partial(self._jobs.remove, owner))
        if owner.is_empty:
            self._consoles.forget(sandbox_id)

    async def ensure_snapshot(
        self, snapshot_id: str, *, sandbox_id: str, incarnation: int, version: int = 0
    ) -> SnapshotFact:
        """See core.contracts.node.NodeControl.ensure_snapshot."""
        folder = self._snapshots.folder(snapshot_id)
        with self._owner(sandbox_id) as owner:
            await owner.at_rest(incarnation, version)
            if not folder.is_dir():
                owner.step(Ask.SAVE, incarnation)
                await owner.do(self._jobs.snapshot(owner, folder))
        return self._snapshots.fact(snapshot_id)

    async def ensure_network(
        self,
        sandbox_id: str,
        *,
        incarnation: int,
        policy: Policy,
        credentials: Credentials | None = None,
        version: int = 0,
    ) -> None:
        """See core.contracts.node.NodeControl.ensure_network."""
        with self._owner(sandbox_id) as owner:
            await owner.at_rest(incarnation, version)
            owner.step(Ask.OPEN, incarnation)
            await owner.do(owner.resident.restrict(policy, credentials))
        self._means.on_change()

    async def connections(
        self, sandbox_id: str, *, since: float | None = None
    ) -> tuple[Connection, ...]:
        """See core.contracts.node.NodeControl.connections."""
        owner = self._owners.get(sandbox_id)
        if owner is None or owner.phase is None:
            raise nothing_here(sandbox_id)
        folder = self._means.records.folder(owner.resident.record.id)
        lines = await in_thread(
            read_journal, folder, now=self._means.clock.now().timestamp(), since=since
        )
        if since is None:
            lines = lines[-CONNECTIONS_MAX:]
        found = (decode(Connection, one) for one in lines if since is None or time_of(one) > since)
        return tuple(islice(found, CONNECTIONS_MAX))

    async def find_machine(self, sandbox_id: str) -> MachineAbout:
        """See core.contracts.node.NodeControl.find_machine."""
        owner = self._owners.get(sandbox_id)
        if owner is None or owner.phase is None:
            raise nothing_here(sandbox_id)
        record = owner.resident.record
        try:
            policy, share = record.policy, record.share
        except CodecError as error:
            raise DamagedError(f"cannot read the record of {sandbox_id}: {error}") from error
        mounts = () if share is None else share.mounts
        return MachineAbout(
            record.incarnation,
            owner.version,
            policy,
            tuple(Mount(one.workspace_id, one.path, one.read_only) for one in mounts),
        )

    async def find_snapshot(self, snapshot_id: str) -> SnapshotFact:
        """See core.contracts.node.NodeControl.find_snapshot."""
        return await in_thread(self._snapshots.fact, snapshot_id)

    async def drop_snapshot(self, snapshot_id: str) -> None:
        """See core.contracts.node.NodeControl.drop_snapshot."""
        await self._snapshots.remove(snapshot_id)

    async def find_room(self, template: str, shape: Shape, *, count: int = 1) -> bool:
        """See core.contracts.node.NodeControl.find_room."""
        return await self._capacity.find_room(template, shape, count=count)

    async def console(self, sandbox_id: str) -> bytes:
        """See core.contracts.node.NodeControl.console."""
        owner, said = self._owners.get(sandbox_id), None
        if owner is not None and owner.phase is not None:
            said = await in_thread(read_console, owner.resident.body.folder)
        if not said:
            # Nothing yet; an earlier start that failed may have left something.
            said = await in_thread(self._consoles.find, sandbox_id) or said
        if said is None:
            raise nothing_here(sandbox_id)
        return said

    async def report(self) -> NodeReport:
        """See core.contracts.node.NodeControl.report."""
        room = self._capacity.room()
        images = self._means.images.facts()
        report = NodeReport(
            node_id=self._node_id,
            machines=tuple(
                one.fact()
                for one in self._owners.values()
                if one.is_starting or one.phase is not None
            ),
            snapshots=tuple(self._snapshots.ids()),
            templates=tuple(one.slug for one in images if one.status is TemplateStatus.READY),
            versions=tuple(self._means.images.versions.names()),
            missing=(*self._check.missing, *self._pressure.missing),
            is_short_of_memory=self._capacity.is_short_of_memory,
            memory_mib=room.memory_mib,
            disk_mib=room.disk_mib,
            shelves=tuple(self._pool.facts()),
            goldens=self._goldens.count,
            golden_kinds=tuple(self._goldens.facts()),
            limited=self._means.exports.limited(),
            unreadable=self._means.records.unreadable,
            enforces_rules=True,
            ends_tls=True,
        )
        return self._generation.of(report)

    async def templates(self) -> tuple[TemplateFact, ...]:
        """See core.contracts.node.NodeControl.templates."""
        return self._means.images.facts()

    # --- NodeVersions ---------------------------------------------------------------------

    async def keep_version(
        self, sandbox_id: str, *, incarnation: int, path: str, about: VersionAbout, size_max: int
    ) -> VersionFact:
        """See core.contracts.node.NodeVersions.keep_version."""
        self._capacity.check_disk(Shape(1, 0, size_max >> 20))
        machine = MachineRef(self._node_id, sandbox_id, incarnation)
        async with self.open(machine, Read(path.encode())) as opened:
            pieces = content_of(opened.stream, self._means.clock)
            fact = await self._means.images.versions.keep(about, pieces, size_max=size_max)
        self._means.on_change()
        return fact

    async def prepare_version(self, version: str) -> None:
        """See core.contracts.node.NodeVersions.prepare_version."""
        definition, image = self._means.images.get(version)
        await self._goldens.make(self._goldens.kind_of(image, version, definition.defaults))

    async def drop_version(self, version: str) -> None:
        """See core.contracts.node.NodeVersions.drop_version."""
        await in_thread(self._means.images.versions.drop, version)
        await self._goldens.forget_old()
        await in_thread(self._drop_images)
        self._means.on_change()

    async def drop_stages(self, build_id: str, *, but: tuple[str, ...]) -> None:
        """See core.contracts.node.NodeVersions.drop_stages."""
        versions = self._means.images.versions
        for name in await in_thread(versions.names, build_id):
            if name not in but:
                await self.drop_version(name)

    def _drop_images(self) -> None:
        """Remove the images of versions, and copies, that nothing here needs any more."""
        self._means.images.drop_old(self._needed_images, now=self._means.clock.now())

    def _drop_copies(self) -> None:
        self._means.images.drop_copies(self._needed_images, now=self._means.clock.now())

    def _needed_images(self) -> set[str]:
        return self._snapshots.images() | {one.image for one in self._means.records.all()}

    # --- NodeExports ----------------------------------------------------------------------

    async def withdraw(self, workspace_id: str) -> None:
        """See core.contracts.node.NodeExports.withdraw."""
        async with asyncio.TaskGroup() as tasks:
            for sandbox_id in list(self._owners):
                tasks.create_task(self._unmount(sandbox_id, workspace_id))
        await self._means.exports.withdraw(workspace_id)

    async def _unmount(self, sandbox_id: str, workspace_id: str) -> None:
        with self._owner(sandbox_id) as owner:
            while owner.is_busy:
                with suppress(ConflictError):  # it was cancelled
                    await owner.idle()
            if owner.phase is None or not owner.resident.has_mounted(workspace_id):
                return
            try:
                await owner.do(owner.resident.unmount(workspace_id))
            except (SandyardError, OSError) as error:
                # The file server no longer serves it, to this machine neither.
                log.warning("cannot unmount a workspace in a machine: %s", error)

    # --- NodeTunnel -----------------------------------------------------------------------

    @asynccontextmanager
    async def open(
        self, machine: MachineRef, operation: Operation[AnswerT]
    ) -> AsyncIterator[Opened[AnswerT]]:
        """See core.contracts.node.NodeTunnel.open."""
        if isinstance(operation, ReadCopy | WriteCopy):
            async with self._opened_copy(operation) as copy:
                yield copy
            return
        owner = self._owners.get(machine.sandbox_id)
        is_here = owner is not None and owner.phase is not None
        if machine.node_id != self._node_id or owner is None or not is_here:
            raise nothing_here(machine.sandbox_id)
        if owner.incarnation > machine.incarnation:
            raise nothing_here(machine.sandbox_id)
        if owner.is_starting:
            raise ConflictError(f"cannot reach {machine.sandbox_id}: it is being started")
        owner.step(Ask.OPEN, machine.incarnation)
        async with owner.resident.guest.open(operation) as opened:
            yield opened

    @asynccontextmanager
    async def _opened_copy(self, operation: ReadCopy | WriteCopy) -> AsyncIterator[Opened[Any]]:
        if isinstance(operation, WriteCopy):
            # Machines come first: a copy leaves room for more of them.
            size_mib = (operation.copy.size_bytes >> 20) + _COPY_MARGIN_MIB
            self._capacity.check_disk(Shape(1, 0, size_mib))
        async with opened_copy(self._means.images, operation) as opened:
            yield opened
        if isinstance(operation, WriteCopy):
            await in_thread(self._drop_copies)
        self._means.on_change()

    # --- owners ---------------------------------------------------------------------------

    @contextmanager
    def _owner(self, sandbox_id: str) -> Iterator[Owner]:
        """Lend the owner of a sandbox to a request. It exists for as long as it has a machine, a
        job or a request."""
        owner = self._owners.get(sandbox_id)
        if owner is None:
            owner = self._new_owner(sandbox_id)
        self._users[owner] = self._users.get(owner, 0) + 1
        try:
            yield owner
        finally:
            self._users[owner] -= 1
            self._drop_if_unused(owner)

    def _new_owner(self, sandbox_id: str) -> Owner:
        removed, version = self._removed.pop(sandbox_id, (0, 0))
        owner = self._owners[sandbox_id] = Owner(
            sandbox_id,
            self._means.crew,
            removed=removed,
            version=version,
            on_idle=self._drop_if_unused,
            on_machine=self._ledger.enter,
            on_change=self._means.on_change,
        )
        self._ledger.enter(owner)
        return owner

    def _drop_if_unused(self, owner: Owner) -> None:
        if self._users.get(owner) == 0:
            del self._users[owner]
        if owner in self._users or not owner.is_empty:
            return
        if self._owners.pop(owner.sandbox_id, None) is not None:
            self._ledger.leave(owner)
            if owner.removed or owner.version:
                self._removed[owner.sandbox_id] = (owner.removed, owner.version)
            while len(self._removed) > _REMOVED_MAX:
                self._removed.popitem(last=False)

    def _running(self) -> list[Owner]:
        """Return the owners of machines that run, or are held, while no job is at work."""
        return [
            one
            for one in self._owners.values()
            if one.phase in (Phase.RUNNING, Phase.HELD) and not one.is_busy and one.resident.is_up
        ]

    def _has_room(self, shape: Shape) -> bool:
        try:
            self._admission.check(shape)
        except NoCapacityError:
            return False
        return True

    # --- over a restart of the server -----------------------------------------------------

    async def _adopt(self) -> None:
        means = self._means
        await in_thread(means.records.sweep)
        await in_thread(self._snapshots.sweep)
        await in_thread(self._means.images.versions.sweep)
        await in_thread(self._drop_images)
        found = await in_thread(means.records.all)
        for record in found:
            resident = await adopted(record, means)
            if resident is not None:
                with self._owner(record.sandbox_id) as owner:
                    owner.take(resident)
        owners = list(self._owners.values())
        # A paused or dead machine may have a process that did not end; it is not used.
        living = [
            one
            for one in owners
            if one.resident.is_up and one.phase not in (Phase.PAUSED, Phase.DEAD)
        ]
        in_use = [one.resident.record.slot for one in living]
        await means.network.open(in_use=in_use, crew=means.crew, on_change=means.on_change)
        kept = {one.resident.record.id for one in owners}
        for record in found:
            if record.id not in kept:
                await in_thread(means.records.remove, record.id)
        await means.exports.open(
            [
                (means.network.place(one.resident.record.slot), share)
                for one in living
                if (share := one.resident.record.share) is not None
            ],
            means.crew,
        )
        for one in living:
            try:
                await one.resident.process.restrict()
            except SandyardError as error:  # nothing passes, and the reconciler tries again
                log.error("cannot enforce a sandbox's network rules: %s", error.message)
        for one in owners:
            await one.resident.body.tidy(keeps_spent=one.phase is Phase.WAKING)
        for one in living:
            await go_on(one.resident, means)
            one.watch()
        if found:
            log.info("adopted %d running machines of %d recorded", len(living), len(found))

    async def _detach(self) -> None:
        for owner in list(self._owners.values()):
            while owner.is_busy:
                await owner.cancel()
            if owner.phase is not None:
                await owner.resident.process.detach()
        await self._means.exports.close()
        await self._means.network.close()
