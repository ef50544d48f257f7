"""One host's machines: what a node is made of, its start and its end.

Requests are carried out by `requests`, each by the owner of its sandbox.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, cast

from typing_extensions import override

from sandyard.server.core.contracts.node import (
    MachineRef,
    NodeControl,
    NodeOperation,
    NodeTunnel,
    Opened,
    Phase,
)
from sandyard.server.core.copies import ReadCopy, WriteCopy
from sandyard.server.core.errors import NoCapacityError, SandyardError
from sandyard.server.core.node_ops import AnyNodeOperation
from sandyard.server.core.ops import AnswerT, Operation
from sandyard.server.core.shapes import Shape
from sandyard.server.node.capacity import Capacity
from sandyard.server.node.host.admission import Admission, Margins
from sandyard.server.node.host.ledger import Ledger
from sandyard.server.node.images.copies import opened_copy
from sandyard.server.node.jobs import Jobs
from sandyard.server.node.library import Library
from sandyard.server.node.machines.adopt import adopted, go_on
from sandyard.server.node.machines.console import FailedConsoles
from sandyard.server.node.machines.means import Means
from sandyard.server.node.owner import nothing_here
from sandyard.server.node.owners import Owners
from sandyard.server.node.pressure import Pressure
from sandyard.server.node.readiness import MachineCheck
from sandyard.server.node.reports import Reports
from sandyard.server.node.requests import Requests
from sandyard.server.node.snapshots import KeptSnapshots
from sandyard.server.node.stock.goldens import Goldens
from sandyard.server.node.stock.pool import MachineObserver, Pool, PoolLimits
from sandyard.server.node.stock.turns import Turns
from sandyard.server.tasks import in_thread, to_the_end

log = logging.getLogger(__name__)

_LITTLE_DISK_MIB = 512
_COPY_MARGIN_MIB = 2048


class Node(NodeControl, NodeTunnel):
    """See NodeControl and NodeTunnel in core.contracts.node. Use it inside `running`."""

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
        consoles = FailedConsoles(home / "consoles")
        boots = Turns(means.limits.boots_at_once)
        restores = Turns(means.limits.restores_at_once)
        self._ledger = Ledger(means.clock, disk_most_mib=margins.disk_most_mib)
        self._owners = Owners(means.crew, self._ledger, means.on_change)
        self._admission = Admission(means.records.machines_dir, margins, self._ledger.totals)
        self._pressure = Pressure(
            home,
            little_mib=min(margins.disk_floor_mib, _LITTLE_DISK_MIB),
            running=self._owners.running,
            clock=means.clock,
            on_change=means.on_change,
        )
        self._check = MachineCheck(means)
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
        self._library = Library(means, self._owners, self._snapshots, self._capacity, self._goldens)
        jobs = Jobs(
            means=means,
            goldens=self._goldens,
            pool=self._pool,
            capacity=self._capacity,
            snapshots=self._snapshots,
            boots=boots,
            restores=restores,
            observer=observer,
            consoles=consoles,
        )
        reports = Reports(
            node_id,
            means,
            self._owners,
            self._snapshots,
            capacity=self._capacity,
            goldens=self._goldens,
            pool=self._pool,
            check=self._check,
            pressure=self._pressure,
        )
        self._requests = Requests(
            means,
            self._owners,
            jobs,
            snapshots=self._snapshots,
            consoles=consoles,
            capacity=self._capacity,
            library=self._library,
            reports=reports,
        )

    @property
    @override
    def node_id(self) -> str:
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

    @override
    async def do(self, operation: NodeOperation[AnswerT]) -> AnswerT:
        answer = await self._requests.do(cast("AnyNodeOperation", operation))
        return cast("AnswerT", answer)

    @asynccontextmanager
    @override
    async def open(
        self, machine: MachineRef, operation: Operation[AnswerT]
    ) -> AsyncIterator[Opened[AnswerT]]:
        if isinstance(operation, ReadCopy | WriteCopy):
            async with self._opened_copy(operation) as copy:
                yield copy
            return
        if machine.node_id != self._node_id:
            raise nothing_here(machine.sandbox_id)
        owner = self._owners.reached(machine.sandbox_id, machine.incarnation)
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
            await in_thread(self._library.drop_copies)
        self._means.on_change()

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
        await in_thread(self._library.drop_images)
        found = await in_thread(means.records.all)
        for record in found:
            resident = await adopted(record, means)
            if resident is not None:
                with self._owners.lent(record.sandbox_id) as owner:
                    owner.take(resident)
        owners = self._owners.all()
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
        for owner in self._owners.all():
            while owner.is_busy:
                await owner.cancel()
            if owner.phase is not None:
                await owner.resident.process.detach()
        await self._means.exports.close()
        await self._means.network.close()
