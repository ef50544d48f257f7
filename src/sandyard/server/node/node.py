"""One host's machines: a front that holds them, one job at a time each, and tells of them.

What may be done when stands in `machines.phases`, what is done in `jobs`; a machine's own files and
process are `machines.resident`'s.
"""

import asyncio
import logging
import shutil
from collections import OrderedDict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

from sandyard.server.core.contracts.node import (
    MachineFact,
    MachineRef,
    MachineWish,
    NodeReport,
    Opened,
    Phase,
    SnapshotFact,
    TemplateFact,
    TemplateStatus,
)
from sandyard.server.core.errors import (
    ConflictError,
    DamagedError,
    MachineDeadError,
    NoCapacityError,
    NotFoundError,
    OvertakenError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.ids import is_uuid
from sandyard.server.core.ops import AnswerT, Operation
from sandyard.server.core.shapes import Shape
from sandyard.server.drivers.contract import End
from sandyard.server.node.generation import Generation
from sandyard.server.node.holding import Holding, Job, Work
from sandyard.server.node.host.admission import Admission, Margins
from sandyard.server.node.host.ledger import Ledger
from sandyard.server.node.images.images import Image
from sandyard.server.node.jobs import Jobs
from sandyard.server.node.machines import saved as saving
from sandyard.server.node.machines.adopt import adopted, go_on
from sandyard.server.node.machines.console import FailedConsoles, read_console
from sandyard.server.node.machines.means import Means
from sandyard.server.node.machines.phases import ORIGINS, Ask, Step, step_of
from sandyard.server.node.machines.resident import Resident
from sandyard.server.node.machines.saved import SavedMachine
from sandyard.server.node.pressure import Pressure
from sandyard.server.node.stock.goldens import Goldens
from sandyard.server.node.stock.pool import MachineObserver, Pool, PoolLimits
from sandyard.server.node.stock.turns import Turns
from sandyard.server.tasks import in_thread, to_the_end

log = logging.getLogger(__name__)

_GONE_MAX = 4096
_TRIES = 8
_LIVING = frozenset({Phase.RUNNING, Phase.WAKING})
_LITTLE_DISK_MIB = 512
_STARTS = frozenset({Step.START, Step.REPLACE})


class Node:
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
        self._snapshots_dir = home / "snapshots"
        self._consoles = FailedConsoles(home / "consoles")
        self._holdings: dict[str, Holding] = {}
        # Which incarnation was made gone last, and the version of the row that asked for it: a wish
        # that comes after its own withdrawal is late.
        self._gone: OrderedDict[str, tuple[int, int]] = OrderedDict()
        self._missing: tuple[str, ...] = ("the node is starting",)
        boots = Turns(means.limits.boots_at_once)
        restores = Turns(means.limits.restores_at_once)
        self._ledger = Ledger(means.clock)
        self._admission = Admission(means.records.machines_dir, margins, self._ledger.totals)
        self._pressure = Pressure(
            home,
            little_mib=min(margins.disk_floor_mib, _LITTLE_DISK_MIB),
            running=self._running,
            clock=means.clock,
            on_change=means.on_change,
        )
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
        self._jobs = Jobs(
            means=means,
            goldens=self._goldens,
            pool=self._pool,
            boots=boots,
            restores=restores,
            observer=observer,
            on_end=self._note_end,
            forget=self._forget,
            consoles=self._consoles,
        )

    @property
    def node_id(self) -> str:
        """See core.contracts.node.NodeControl.node_id."""
        return self._node_id

    @asynccontextmanager
    async def running(self, *, fills_pool: bool = True) -> AsyncIterator[None]:
        """Adopt what an earlier process left, serve, and on leaving let the machines live on."""
        crew = self._means.crew
        async with crew:
            await self._adopt()
            crew.start(self._pressure.watch(), "nobody looks after the host's disk")
            try:
                async with AsyncExitStack() as keeping:
                    if fills_pool:
                        crew.start(self._probe(), "nobody finds out whether machines can start")
                    if fills_pool and self._means.limits.uses_goldens:
                        await keeping.enter_async_context(self._goldens.making())
                        await keeping.enter_async_context(self._pool.filling())
                    yield
            finally:
                await to_the_end(self._let_go())

    # --- NodeControl ----------------------------------------------------------------------

    async def ensure_running(self, wish: MachineWish) -> MachineFact:
        """See core.contracts.node.NodeControl.ensure_running."""
        self._show(wish.sandbox_id, wish.version)
        for _ in range(_TRIES):
            job = await self._job_for(wish)
            if job is not None:
                await job.outcome()
            fact = self._fact_of(wish)
            if fact is not None:
                return fact
        raise ConflictError(f"cannot start {wish.sandbox_id}: it changes all the time")

    def _fact_of(self, wish: MachineWish) -> MachineFact | None:
        """Return what is told of a machine that has been brought up; None if it is not up now."""
        holding = self._holdings.get(wish.sandbox_id)
        if holding is None or holding.incarnation != wish.incarnation:
            raise _overtaken()
        fact = holding.fact()
        if fact.phase is Phase.DEAD:
            raise _dead()
        return fact if fact.phase is Phase.RUNNING else None

    async def _job_for(self, wish: MachineWish) -> Job | None:
        """Return the job that brings up what is wished, begun now if need be; None if it is up."""
        while True:
            holding = self._holdings.get(wish.sandbox_id)
            if holding is None or not holding.is_busy or holding.is_starting:
                break
            await holding.job.join()
        self._check_wanted(wish)
        if holding is None or not holding.is_busy:
            return await self._begin(holding, wish)
        if holding.incarnation < wish.incarnation:
            raise ConflictError("cannot start this yet: an earlier incarnation is being started")
        return holding.job

    def _check_wanted(self, wish: MachineWish) -> None:
        """Refuse what was overtaken, by a later incarnation or by its own end."""
        holding = self._holdings.get(wish.sandbox_id)
        is_overtaken = holding is not None and holding.incarnation > wish.incarnation
        gone, _ = self._gone.get(wish.sandbox_id, (0, 0))
        if is_overtaken or gone >= wish.incarnation:
            raise _overtaken()
        # It may have waited here for what was under way.
        self._show(wish.sandbox_id, wish.version)

    def _show(self, sandbox_id: str, version: int) -> None:
        """Refuse what was asked before something that has been asked since.

        Raises:
            ConflictError: a wish of a later version of the sandbox's row has been here.
        """
        if not version:
            return
        holding = self._holdings.get(sandbox_id)
        _, known = self._gone.get(sandbox_id, (0, 0))
        if version < known or (holding is not None and version < holding.version):
            raise _overtaken()
        if holding is not None:
            holding.show(version)

    async def ensure_paused(self, sandbox_id: str, *, incarnation: int, version: int = 0) -> int:
        """See core.contracts.node.NodeControl.ensure_paused."""
        self._show(sandbox_id, version)
        holding = await self._at_rest(sandbox_id, incarnation)
        self._show(sandbox_id, version)  # it may have waited for what was under way
        step = self._step(Ask.PAUSE, holding, incarnation)
        if step is Step.PAUSE or holding.resident.is_up:
            await self._began(holding, lambda: self._jobs.pause(holding)).outcome()
        return await in_thread(lambda: holding.resident.body.size_bytes)

    async def ensure_gone(self, sandbox_id: str, *, incarnation: int, version: int = 0) -> None:
        """See core.contracts.node.NodeControl.ensure_gone."""
        self._show(sandbox_id, version)
        holding = self._holdings.get(sandbox_id)
        if holding is not None and holding.incarnation > incarnation:
            return
        self._note_gone(sandbox_id, incarnation, version)
        self._consoles.forget(sandbox_id)
        if holding is None:
            return
        while holding.is_busy and not holding.is_being_removed:
            await holding.break_off()
        if self._holdings.get(sandbox_id) is holding:
            await self._remove(holding)

    async def ensure_snapshot(
        self, snapshot_id: str, *, sandbox_id: str, incarnation: int, version: int = 0
    ) -> SnapshotFact:
        """See core.contracts.node.NodeControl.ensure_snapshot."""
        folder = self._snapshot_folder(snapshot_id)
        self._show(sandbox_id, version)
        holding = await self._at_rest(sandbox_id, incarnation)
        self._show(sandbox_id, version)
        if not folder.is_dir():
            self._step(Ask.SAVE, holding, incarnation)
            self._admission.check_disk(Shape(1, holding.resident.shape.memory_mib, 0))
            await self._began(holding, lambda: self._jobs.snapshot(holding, folder)).outcome()
        return SnapshotFact(snapshot_id, self._load_snapshot(snapshot_id).size_bytes)

    async def drop_snapshot(self, snapshot_id: str) -> None:
        """See core.contracts.node.NodeControl.drop_snapshot."""
        folder = self._snapshot_folder(snapshot_id)
        await in_thread(saving.remove, folder, folder.with_name(f"{folder.name}.part"))

    async def find_room(self, template: str, shape: Shape, *, count: int = 1) -> bool:
        """See core.contracts.node.NodeControl.find_room."""
        image = self._means.images.current(template)
        # Each that is about to start may take one of those that wait.
        coming = self._ledger.totals().coming
        if count == 1 and image is not None:
            kind = self._goldens.kind_of(image, template, shape)
            if self._pool.has(kind, shape.disk_mib, besides=coming):
                # It runs already: what it was promised is counted.
                self._admission.check_growth(shape.disk_mib - kind.disk_mib)
                return True
        await self._make_room(shape, count=count)
        return False

    async def console(self, sandbox_id: str) -> bytes:
        """See core.contracts.node.NodeControl.console."""
        holding, said = self._holdings.get(sandbox_id), None
        if holding is not None and holding.residents:
            said = await in_thread(read_console, holding.resident.body.folder)
        if not said:
            # Nothing yet, but an earlier try may have told why it came to nothing.
            said = await in_thread(self._consoles.find, sandbox_id) or said
        if said is None:
            raise _nothing_here(sandbox_id)
        return said

    async def report(self) -> NodeReport:
        """See core.contracts.node.NodeControl.report."""
        room = self._admission.room()
        report = NodeReport(
            node_id=self._node_id,
            machines=tuple(one.fact() for one in self._holdings.values()),
            snapshots=tuple(self._snapshot_ids()),
            templates=tuple(
                one.slug for one in self._means.images.facts() if one.status is TemplateStatus.READY
            ),
            missing=(*self._missing, *self._pressure.missing),
            is_short_of_memory=self._admission.is_short_of_memory,
            memory_mib=room.memory_mib,
            disk_mib=room.disk_mib,
            shelves=tuple(self._pool.facts()),
            goldens=self._goldens.count,
            golden_kinds=tuple(self._goldens.facts()),
            limited=self._means.exports.limited(),
        )
        return self._generation.of(report)

    # --- NodeExports ----------------------------------------------------------------------

    async def withdraw(self, workspace_id: str) -> None:
        """See core.contracts.node.NodeExports.withdraw."""
        async with asyncio.TaskGroup() as tasks:
            for holding in list(self._holdings.values()):
                tasks.create_task(self._unmount(holding, workspace_id))
        await self._means.exports.withdraw(workspace_id)

    async def _unmount(self, holding: Holding, workspace_id: str) -> None:
        while holding.is_busy:
            with suppress(ConflictError):  # it was broken off
                await holding.job.join()
        is_here = self._holdings.get(holding.sandbox_id) is holding and holding.residents
        if is_here and holding.resident.has_mounted(workspace_id):
            work = lambda: holding.resident.unmount(workspace_id)  # noqa: E731
            try:
                await self._began(holding, work).outcome()
            except (SandyardError, OSError) as error:
                # What the server does not serve any more, it does not serve to this one either.
                log.warning("a machine keeps what it had mounted: %s", error)

    async def templates(self) -> tuple[TemplateFact, ...]:
        """See core.contracts.node.NodeControl.templates."""
        return self._means.images.facts()

    # --- NodeTunnel -----------------------------------------------------------------------

    @asynccontextmanager
    async def open(
        self, machine: MachineRef, operation: Operation[AnswerT]
    ) -> AsyncIterator[Opened[AnswerT]]:
        """See core.contracts.node.NodeTunnel.open."""
        holding = self._holdings.get(machine.sandbox_id)
        if machine.node_id != self._node_id or holding is None or holding.phase is None:
            raise _nothing_here(machine.sandbox_id)
        if holding.incarnation > machine.incarnation:
            raise _nothing_here(machine.sandbox_id)
        if holding.is_starting:
            raise ConflictError(f"cannot reach {machine.sandbox_id}: it is being started")
        self._step(Ask.OPEN, holding, machine.incarnation)
        async with holding.resident.guest.open(operation) as opened:
            yield opened

    # --- asks meet phases -----------------------------------------------------------------

    def _step(self, ask: Ask, holding: Holding | None, incarnation: int) -> Step:
        """Return what comes of an ask.

        Raises:
            NotFoundError, ConflictError: nothing does; the message says why.
        """
        phase = None if holding is None else holding.phase
        is_newer = holding is not None and incarnation > holding.incarnation
        step = step_of(ask, phase, is_newer=is_newer)
        match step:
            case Step.NOTHING_HERE:
                raise NotFoundError("cannot do this: nothing of the sandbox is left on this node")
            case Step.OVERTAKEN:
                raise _overtaken()
            case Step.DEAD:
                raise _dead()
            case Step.NOT_NOW:
                raise MachineDeadError("cannot reach the sandbox: its machine does not run")
            case _:
                return step

    async def _at_rest(self, sandbox_id: str, incarnation: int) -> Holding:
        """Return what is held once no job is at work on it; it may be of an incarnation before
        this, which never came up."""
        while True:
            holding = self._holdings.get(sandbox_id)
            if holding is None or holding.incarnation > incarnation:
                raise _nothing_here(sandbox_id)
            if holding.is_busy:
                await holding.job.join()
                continue
            if holding.phase is None:
                raise _nothing_here(sandbox_id)
            return holding

    def _began(self, holding: Holding, work: Work, *, starts: int | None = None) -> Job:
        """Begin a job, and have an end of the machine that comes meanwhile noticed after it."""
        job = holding.begin(self._means.crew, work, starts=starts)
        job.then(lambda: self._note_missed(holding))
        return job

    async def _begin(self, holding: Holding | None, wish: MachineWish) -> Job | None:
        """Begin the job that brings up what is wished, or find that there is none to begin."""
        step = self._step(ORIGINS[wish.origin], holding, wish.incarnation)
        if step is Step.KEEP and holding is not None and holding.resident.is_up:
            return None
        if step is Step.REPLACE and holding is not None:
            await self._remove(holding)
            return await self._begin_new(wish)
        if holding is None or step in _STARTS:
            return await self._begin_new(wish)
        if step in (Step.TAKE, Step.KEEP):
            # It was believed lost and is here: nothing is as whole as the machine itself.
            return self._began(
                holding, lambda: self._jobs.take(holding, wish), starts=wish.incarnation
            )
        source = await self._checked_snapshot(wish) if step is Step.ROLL_BACK else None
        if holding.phase not in _LIVING:  # what lives has its room
            await self._make_room(wish.shape, is_promised=True)
        # The same wish, or another, may have come through meanwhile: what holds now decides.
        self._check_wanted(wish)
        if self._holdings.get(wish.sandbox_id) is not holding or holding.is_busy:
            return await self._job_for(wish)
        if self._step(ORIGINS[wish.origin], holding, wish.incarnation) is not step:
            return await self._job_for(wish)
        if source is not None:
            work = lambda: self._jobs.roll_back(holding, wish, source)  # noqa: E731
        elif step is Step.RESUME:
            work = lambda: self._jobs.resume(holding, wish)  # noqa: E731
        else:
            work = lambda: self._jobs.restart(holding, wish)  # noqa: E731
        return self._began(holding, work, starts=wish.incarnation)

    async def _begin_new(self, wish: MachineWish) -> Job | None:
        source = await self._checked_snapshot(wish) if wish.snapshot_id else None
        image = self._image_of(wish, source)
        driver = await self._means.drivers.choose(image)
        if source is None:
            await self.find_room(wish.template, wish.shape)
        else:
            driver = self._means.drivers.named(source.about.driver) or driver
            await self._make_room(wish.shape)
        self._check_wanted(wish)
        other = self._holdings.get(wish.sandbox_id)
        if other is not None and (other.is_busy or other.phase is not None):
            return await self._job_for(wish)
        if other is not None:
            self._forget(other)
        holding = Holding(wish.sandbox_id, wish.incarnation, shape=wish.shape)
        holding.show(max(wish.version, 0 if other is None else other.version))
        self._holdings[wish.sandbox_id] = holding
        self._ledger.enter(holding)
        try:
            return self._began(
                holding,
                lambda: self._jobs.start(holding, wish, image, driver, source),
                starts=wish.incarnation,
            )
        except UnavailableError:
            self._forget(holding)
            raise

    def _image_of(self, wish: MachineWish, source: SavedMachine | None) -> Image:
        if source is None:
            return self._means.images.get(wish.template)[1]
        image = self._means.images.find(source.about.image)
        if image is None:
            raise DamagedError("cannot start from the snapshot: its image is no longer here")
        return image

    async def _remove(self, holding: Holding) -> None:
        if not holding.is_being_removed:
            holding.begin(self._means.crew, lambda: self._jobs.remove(holding), removes=True)
        await holding.job.outcome()

    def _forget(self, holding: Holding) -> None:
        if self._holdings.get(holding.sandbox_id) is holding:
            del self._holdings[holding.sandbox_id]
            self._ledger.leave(holding)
            self._note_gone(holding.sandbox_id, 0, holding.version)

    def _note_gone(self, sandbox_id: str, incarnation: int, version: int) -> None:
        before, known = self._gone.pop(sandbox_id, (0, 0))
        self._gone[sandbox_id] = (max(incarnation, before), max(version, known))
        while len(self._gone) > _GONE_MAX:
            self._gone.popitem(last=False)

    # --- machines that end by themselves ----------------------------------------------------

    def _note_missed(self, holding: Holding) -> None:
        end = holding.take_missed()
        if end is not None:
            self._note_end(holding, end)

    def _note_end(self, holding: Holding, end: End) -> None:
        """A machine ended by itself: it is dead; a job that is at work on it comes first."""
        if holding.is_busy:
            holding.miss(end)
            return
        is_here = self._holdings.get(holding.sandbox_id) is holding
        if not is_here or holding.phase not in _LIVING or not self._means.crew.is_there:
            return
        log.warning("a machine ended by itself: %s", end.message)
        holding.resident.mark(Phase.DEAD, end)
        holding.begin(self._means.crew, lambda: self._jobs.bury(holding))
        self._means.on_change()

    # --- snapshots ------------------------------------------------------------------------

    def _snapshot_folder(self, snapshot_id: str) -> Path:
        if not is_uuid(snapshot_id):
            raise AssertionError(f"not the id of a snapshot: {snapshot_id!r}")
        return self._snapshots_dir / snapshot_id

    def _snapshot_ids(self) -> list[str]:
        if not self._snapshots_dir.is_dir():
            return []
        return [path.name for path in self._snapshots_dir.iterdir() if is_uuid(path.name)]

    def _load_snapshot(self, snapshot_id: str) -> SavedMachine:
        folder = self._snapshot_folder(snapshot_id)
        if not folder.is_dir():
            raise NotFoundError(f"cannot find the snapshot {snapshot_id} on this node")
        return self._means.seals.load(folder)

    async def _checked_snapshot(self, wish: MachineWish) -> SavedMachine:
        if wish.snapshot_id is None:
            raise NotFoundError("cannot start from a snapshot: none was named")
        source = self._load_snapshot(wish.snapshot_id)
        await self._means.seals.check(source, whole=False)
        return source

    # --- room -----------------------------------------------------------------------------

    async def _make_room(self, shape: Shape, *, count: int = 1, is_promised: bool = False) -> None:
        try:
            self._admission.check(shape, count=count, is_promised=is_promised)
        except NoCapacityError:
            # What waits for nobody in particular gives way to somebody who asks.
            missing = self._admission.missing_memory_mib(shape, count=count)
            if not await self._pool.give_way(missing):
                raise
            self._admission.check(shape, count=count, is_promised=is_promised)

    def _running(self) -> list[Resident]:
        return [
            one.resident
            for one in self._holdings.values()
            if one.phase is Phase.RUNNING and not one.is_busy and one.resident.is_up
        ]

    def _has_room(self, shape: Shape) -> bool:
        try:
            self._admission.check(shape)
        except NoCapacityError:
            return False
        return True

    # --- what goes on beside --------------------------------------------------------------

    async def _probe(self) -> None:
        """Find out, and go on finding out until it is so, whether machines can be started."""
        while True:
            try:
                self._missing = await self._find_missing()
            except SandyardError as error:
                self._missing = (error.message,)
            except Exception as error:  # found out again at the next look
                log.exception("cannot find out whether machines can be started")
                self._missing = (f"cannot find out whether machines can be started: {error}",)
            await self._means.clock.sleep(self._means.limits.watch_period_s)

    async def _find_missing(self) -> tuple[str, ...]:
        for slug in self._means.images.definitions:
            image = self._means.images.current(slug)
            if image is not None:
                await self._means.drivers.choose(image)
                return ()
        return ("no template has been built; run `sandyard template build base-ubuntu`",)

    # --- over a restart -------------------------------------------------------------------

    async def _adopt(self) -> None:
        records = self._means.records
        await in_thread(records.sweep)
        await in_thread(self._sweep_snapshots)
        found = await in_thread(records.all)
        for record in found:
            resident = await adopted(record, self._means)
            if resident is not None:
                held = Holding(
                    record.sandbox_id, record.incarnation, shape=record.shape, resident=resident
                )
                if (other := self._holdings.get(record.sandbox_id)) is not None:
                    self._forget(other)
                self._holdings[record.sandbox_id] = held
                self._ledger.enter(held)
        # What would not end may have a process still, and is none of them.
        living = [
            one
            for one in self._holdings.values()
            if one.resident.is_up and one.resident.phase not in (Phase.PAUSED, Phase.DEAD)
        ]
        in_use = [one.resident.record.slot for one in living]
        await self._means.network.open(in_use=in_use, crew=self._means.crew)
        kept = {one.resident.record.id for one in self._holdings.values()}
        for record in found:
            if record.id not in kept:
                await in_thread(records.remove, record.id)
        await self._means.exports.open(
            [
                (self._means.network.place(one.resident.record.slot), share)
                for one in living
                if (share := one.resident.record.share) is not None
            ],
            self._means.crew,
        )
        for one in self._holdings.values():
            await one.resident.body.tidy()
        for one in living:
            await go_on(one.resident, self._means)
            self._watch(one)
        if found:
            log.info("%d of %d recorded machines live and were adopted", len(living), len(found))

    def _watch(self, holding: Holding) -> None:
        holding.resident.watch(lambda end: self._note_end(holding, end))

    def _sweep_snapshots(self) -> None:
        for part in self._snapshots_dir.glob("*.part") if self._snapshots_dir.is_dir() else ():
            shutil.rmtree(part, ignore_errors=True)

    async def _let_go(self) -> None:
        for holding in list(self._holdings.values()):
            await holding.break_off()
            for resident in holding.residents:
                await resident.let_go()
        await self._means.exports.close()
        await self._means.network.close()


def _nothing_here(sandbox_id: str) -> NotFoundError:
    return NotFoundError(f"cannot reach {sandbox_id}: this node has no such machine")


def _overtaken() -> OvertakenError:
    return OvertakenError("cannot start this: the sandbox has gone on since it was asked for")


def _dead() -> MachineDeadError:
    return MachineDeadError("cannot do this: the machine is dead")
