"""One host's machines: started, watched, saved, adopted after a restart, cleaned up.

Invariants:
  - an entry in `_entries` has a record on disk, written before it took anything;
  - at most one job (a start, a pause, a snapshot) is at work on an entry; only it touches the
    entry's unit, and whoever wants something else waits for it or, to delete, breaks it off;
  - without a job, an entry is RUNNING while its watch runs, else PAUSED or DEAD; then it holds no
    process and no place, only its files, until it is made gone.
"""

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import (
    MachineFact,
    MachineState,
    MachineWish,
    NodeReport,
    Opened,
    Origin,
    SnapshotFact,
    TemplateFact,
    Way,
)
from sandyard.server.core.errors import (
    ConflictError,
    DamagedError,
    DeadlineExceededError,
    InternalError,
    NoCapacityError,
    NotFoundError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.ids import is_uuid
from sandyard.server.core.shapes import Shape
from sandyard.server.core.wire import Op
from sandyard.server.drivers.contract import Driver, End, Machine
from sandyard.server.drivers.processes import boot_id
from sandyard.server.node.host.admission import Admission, Margins, Promise, cost_mib
from sandyard.server.node.host.choice import Drivers
from sandyard.server.node.host.disks import Disks, used_mib
from sandyard.server.node.host.network import Network
from sandyard.server.node.images.images import Image, Images
from sandyard.server.node.machines import saved as saving
from sandyard.server.node.machines.launcher import Launcher, NodeLimits, Unit, Was
from sandyard.server.node.machines.records import Phase, Resident, Residents
from sandyard.server.node.machines.saved import SavedMachine
from sandyard.server.node.stock.goldens import Goldens
from sandyard.server.node.stock.pool import Observer, Pool, PoolLimits, ShelfFact
from sandyard.server.node.stock.turns import Rank, Turns
from sandyard.server.tasks import in_thread, to_the_end

log = logging.getLogger(__name__)

_LOST = End("machine_lost", "the host was restarted under the machine")
_DIED_UNSEEN = End("machine_died", "the machine ended while the server was not running")
_DAMAGED = "saved_state_unusable"
_RESTARTED = End(
    "restarted_from_disk",
    "the machine was booted anew from its disk; what was in its memory is gone",
)
_CLAIM_LIMIT_S = 5.0
_CLAIM_TRIES = 3
_USED_S = 15.0


@dataclass(eq=False)
class _Entry:
    """A sandbox's machine, and what is being done with it."""

    unit: Unit
    wish: MachineWish | None = None
    job: "asyncio.Task[None] | None" = None
    is_starting: bool = False
    failure: SandyardError | None = None
    way: Way | None = None
    missed: tuple[Machine, End] | None = None
    """An end that came while a job was at work."""

    @property
    def record(self) -> Resident:
        return self.unit.record

    @property
    def is_busy(self) -> bool:
        return self.job is not None and not self.job.done()


class Node:
    """See NodeControl and NodeTunnel in core.contracts.node. Use it inside `running`."""

    def __init__(
        self,
        *,
        node_id: str,
        home: Path,
        images: Images,
        drivers: Drivers,
        network: Network,
        disks: Disks,
        clock: Clock,
        limits: NodeLimits,
        pool_limits: PoolLimits,
        margins: Margins,
        key: bytes,
        host: str,
        observer: Observer,
        on_change: Callable[[], None],
    ) -> None:
        self._node_id = node_id
        self._images = images
        self._drivers = drivers
        self._network = network
        self._residents = Residents(home / "machines")
        self._snapshots_dir = home / "snapshots"
        self._clock = clock
        self._limits = limits
        self._key = key
        self._observer = observer
        self._on_change = on_change
        self._entries: dict[str, _Entry] = {}
        self._boots = Turns(limits.boots_at_once)
        self._restores = Turns(limits.restores_at_once)
        self._tasks: asyncio.TaskGroup | None = None
        self._missing: tuple[str, ...] = ("the node is starting",)
        self._launcher = Launcher(
            images=images,
            drivers=drivers,
            network=network,
            disks=disks,
            residents=self._residents,
            clock=clock,
            limits=limits,
            key=key,
            host=host,
            on_change=on_change,
        )
        self._admission = Admission(self._residents.machines_dir, margins, self._promises)
        self._goldens = Goldens(
            home / "goldens",
            images=images,
            drivers=drivers,
            launcher=self._launcher,
            boots=self._boots,
            clock=clock,
            settle_s=limits.settle_s,
            key=key,
            host=host,
            on_ready=lambda: self._pool.nudge(),
            has_room=self._has_room,
        )
        self._pool = Pool(
            launcher=self._launcher,
            goldens=self._goldens,
            drivers=drivers,
            images=images,
            restores=self._restores,
            clock=clock,
            limits=pool_limits,
            has_room=self._has_room,
        )

    @property
    def node_id(self) -> str:
        """See core.contracts.node.NodeControl.node_id."""
        return self._node_id

    @asynccontextmanager
    async def running(self, *, fills_pool: bool = True) -> AsyncIterator[None]:
        """Adopt what an earlier process left, serve, and on leaving let the machines live on."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            self._launcher.use(tasks)
            await self._adopt(tasks)
            keeping = []
            if fills_pool:
                keeping = [tasks.create_task(self._probe())]
            if fills_pool and self._limits.uses_goldens:
                self._goldens.use(tasks)
                keeping.append(tasks.create_task(self._keep_pool()))
            try:
                yield
            finally:
                await to_the_end(self._let_go(keeping))

    # --- NodeControl ----------------------------------------------------------------------

    async def ensure_running(self, wish: MachineWish) -> MachineFact:
        """See core.contracts.node.NodeControl.ensure_running."""
        entry = self._entries.get(wish.sandbox_id)
        while entry is not None and entry.is_busy and not entry.is_starting:
            await self._join(entry)
            entry = self._entries.get(wish.sandbox_id)
        if entry is not None and entry.record.incarnation > wish.incarnation:
            raise ConflictError("a later incarnation of the sandbox is here")
        if entry is None or not (entry.is_busy or self._is_up(entry, wish)):
            entry = await self._begin(entry, wish)
        await self._join(entry)
        if entry.failure is not None:
            raise entry.failure
        return self._fact(entry)

    async def ensure_paused(self, sandbox_id: str, *, incarnation: int) -> int:
        """See core.contracts.node.NodeControl.ensure_paused."""
        entry = self._known(sandbox_id, incarnation)
        while entry.is_busy:
            await self._join(entry)
        if entry.record.phase is Phase.PAUSED and entry.unit.machine is None:
            return await self._size_of(entry)
        if entry.record.phase not in (Phase.RUNNING, Phase.PAUSED):
            raise ConflictError(f"cannot pause {sandbox_id}: its machine is dead", status="error")
        self._check_unchanged(entry, sandbox_id)
        self._start_job(entry, lambda: self._pause(entry))
        await self._join(entry)
        if entry.failure is not None:
            raise entry.failure
        return await self._size_of(entry)

    async def _size_of(self, entry: _Entry) -> int:
        return await in_thread(saving.size_of, self._launcher.body(entry.record))

    async def ensure_gone(self, sandbox_id: str, *, incarnation: int) -> None:
        """See core.contracts.node.NodeControl.ensure_gone."""
        entry = self._entries.get(sandbox_id)
        if entry is None or entry.record.incarnation > incarnation:
            return
        while entry.is_busy:
            assert entry.job is not None
            entry.job.cancel()
            await asyncio.wait([entry.job])
        if self._entries.get(sandbox_id) is not entry:
            return
        self._start_job(entry, lambda: self._remove(entry))
        await self._join(entry)
        if entry.failure is not None:
            raise entry.failure

    async def ensure_snapshot(
        self, snapshot_id: str, *, sandbox_id: str, incarnation: int
    ) -> SnapshotFact:
        """See core.contracts.node.NodeControl.ensure_snapshot."""
        entry = self._known(sandbox_id, incarnation)
        folder = self._snapshot_folder(snapshot_id)
        while entry.is_busy:
            await self._join(entry)
        if not folder.is_dir():
            if entry.record.phase not in (Phase.RUNNING, Phase.PAUSED):
                raise ConflictError(f"cannot save {sandbox_id}: it is dead", status="error")
            self._check_unchanged(entry, sandbox_id)
            self._admission.check_disk(Shape(1, entry.record.memory_mib, 0))
            self._start_job(entry, lambda: self._snapshot(entry, folder))
            await self._join(entry)
            if entry.failure is not None:
                raise entry.failure
        return SnapshotFact(snapshot_id, self._load_snapshot(snapshot_id).size_bytes)

    async def drop_snapshot(self, snapshot_id: str) -> None:
        """See core.contracts.node.NodeControl.drop_snapshot."""
        folder = self._snapshot_folder(snapshot_id)
        await in_thread(saving.remove, folder, folder.with_name(f"{folder.name}.part"))

    async def check_room(self, template: str, shape: Shape) -> bool:
        """See core.contracts.node.NodeControl.check_room."""
        image = self._images.current(template)
        if image is not None and self._pool.has(
            self._goldens.kind_of(image, template, shape), shape.disk_mib
        ):
            # It runs already: what it was promised is counted.
            self._admission.check_disk(replace(shape, disk_mib=0))
            return True
        await self._make_room(shape)
        return False

    async def _make_room(self, shape: Shape, *, is_promised: bool = False) -> None:
        try:
            self._admission.check(shape, is_promised=is_promised)
        except NoCapacityError:
            # What waits for nobody in particular gives way to somebody who asks.
            if not await self._pool.give_way(self._admission.missing_memory_mib(shape)):
                raise
            self._admission.check(shape, is_promised=is_promised)

    async def report(self) -> NodeReport:
        """See core.contracts.node.NodeControl.report."""
        return NodeReport(
            node_id=self._node_id,
            machines=tuple(self._fact(entry) for entry in self._entries.values()),
            missing=self._missing,
            is_short_of_memory=self._admission.is_short_of_memory,
            snapshots=tuple(self._snapshot_ids()),
        )

    async def templates(self) -> tuple[TemplateFact, ...]:
        """See core.contracts.node.NodeControl.templates."""
        return self._images.facts()

    def shelves(self) -> list[ShelfFact]:
        """Return how full the pool is."""
        return self._pool.facts()

    @property
    def goldens(self) -> int:
        """How many golden machines are at hand."""
        return self._goldens.count

    # --- NodeTunnel -----------------------------------------------------------------------

    @asynccontextmanager
    async def open(
        self, sandbox_id: str, *, incarnation: int, op: Op, args: Mapping[str, object]
    ) -> AsyncIterator[Opened]:
        """See core.contracts.node.NodeTunnel.open."""
        entry = self._held(sandbox_id, incarnation)
        link = entry.unit.link
        if link is None or entry.record.phase is not Phase.RUNNING or not entry.record.is_awake:
            raise ConflictError(
                f"cannot reach {sandbox_id}: its machine does not run", status="error"
            )
        async with link.open(op, args, limit_s=self._limits.agent_s) as opened:
            try:
                yield opened
            finally:
                # For what is asked next; not earlier, for it would take time from this one.
                self._launcher.beside(self._launcher.keep_spare(entry.unit))

    # --- jobs -----------------------------------------------------------------------------

    def _held(self, sandbox_id: str, incarnation: int) -> _Entry:
        entry = self._entries.get(sandbox_id)
        if entry is None or entry.record.incarnation != incarnation:
            raise NotFoundError(f"cannot reach {sandbox_id}: this node has no such machine")
        return entry

    def _known(self, sandbox_id: str, incarnation: int) -> _Entry:
        """Return an entry; what stands still may be of an incarnation that never came up again."""
        entry = self._entries.get(sandbox_id)
        if entry is None or entry.record.incarnation > incarnation:
            raise NotFoundError(f"cannot reach {sandbox_id}: this node has no such machine")
        return entry

    def _check_unchanged(self, entry: _Entry, sandbox_id: str) -> None:
        if self._entries.get(sandbox_id) is not entry or entry.is_busy:
            raise ConflictError(f"cannot do this with {sandbox_id}: it was changed meanwhile")

    def _start_job(
        self,
        entry: _Entry,
        work: Callable[[], Coroutine[None, None, None]],
        *,
        starts: bool = False,
    ) -> None:
        if self._tasks is None:
            raise UnavailableError("cannot do this: the node is not running")
        entry.failure, entry.is_starting, entry.missed = None, starts, None
        entry.job = self._tasks.create_task(self._guarded(entry, work))
        entry.job.add_done_callback(lambda _: self._after_job(entry))

    def _after_job(self, entry: _Entry) -> None:
        missed, entry.missed = entry.missed, None
        if missed is not None and entry.unit.machine is missed[0]:
            self._note_end(entry, entry.unit, missed[1])

    async def _guarded(
        self, entry: _Entry, work: Callable[[], Coroutine[None, None, None]]
    ) -> None:
        """Do a job; how it failed is kept for those who wait, and takes nothing else along."""
        try:
            await work()
        except SandyardError as error:
            entry.failure = error
        except Exception as error:
            log.exception("a job failed in a way nobody foresaw")
            entry.failure = InternalError(f"cannot carry this out: {error}")
        finally:
            entry.is_starting = False

    async def _join(self, entry: _Entry) -> None:
        """Wait for the job at work on an entry.

        Raises:
            ConflictError: it was broken off.
        """
        if entry.job is not None:
            await asyncio.wait([entry.job])
            if entry.job.cancelled():
                raise ConflictError("what was under way for the sandbox was broken off")

    def _is_up(self, entry: _Entry, wish: MachineWish) -> bool:
        record = entry.record
        same = record.incarnation == wish.incarnation and record.is_awake
        return same and record.phase is Phase.RUNNING and entry.unit.machine is not None

    async def _begin(self, entry: _Entry | None, wish: MachineWish) -> _Entry:
        """Start the job that brings up what is wished."""
        known = entry is not None and entry.record.phase is not Phase.STARTING
        if wish.origin is Origin.OWN:
            if entry is None or not known:
                raise NotFoundError(f"cannot resume {wish.sandbox_id}: nothing of it is left here")
            return await self._begin_own(entry, wish)
        if wish.origin is Origin.SNAPSHOT and entry is not None and known:
            source = await self._checked_snapshot(wish)
            await self._make_room(wish.shape, is_promised=True)
            self._check_unchanged(entry, wish.sandbox_id)
            self._start_job(entry, lambda: self._roll_back(entry, wish, source), starts=True)
            return entry
        if entry is not None:
            await self.ensure_gone(wish.sandbox_id, incarnation=entry.record.incarnation)
        return await self._begin_new(wish)

    async def _begin_new(self, wish: MachineWish) -> _Entry:
        source = await self._checked_snapshot(wish) if wish.snapshot_id else None
        image = self._image_of(wish, source)
        driver = await self._drivers.choose(image)
        if source is not None:
            driver = self._drivers.named(source.about.driver) or driver
        if source is not None:
            await self._make_room(wish.shape)
        else:
            await self.check_room(wish.template, wish.shape)
        if (other := self._entries.get(wish.sandbox_id)) is not None:
            return other
        unit = self._launcher.new_unit(wish, image, driver)
        entry = self._entries[wish.sandbox_id] = _Entry(unit, wish)
        self._start_job(entry, lambda: self._start(entry, wish, image, driver, source), starts=True)
        return entry

    async def _begin_own(self, entry: _Entry, wish: MachineWish) -> _Entry:
        if entry.record.phase is Phase.RUNNING and entry.unit.machine is not None:
            # It was believed lost and is here: nothing is as whole as the machine itself.
            self._start_job(entry, lambda: self._accept(entry, wish), starts=True)
            return entry
        work = self._resume if entry.record.phase is Phase.PAUSED else self._restart
        await self._make_room(wish.shape, is_promised=True)
        self._check_unchanged(entry, wish.sandbox_id)
        self._start_job(entry, lambda: work(entry, wish), starts=True)
        return entry

    def _image_of(self, wish: MachineWish, source: SavedMachine | None) -> Image:
        if source is None:
            return self._images.get(wish.template)[1]
        image = self._images.find(source.about.image)
        if image is None:
            raise DamagedError("cannot start from the snapshot: its image is no longer here")
        return image

    # --- new machines ---------------------------------------------------------------------

    async def _start(
        self,
        entry: _Entry,
        wish: MachineWish,
        image: Image,
        driver: Driver,
        source: SavedMachine | None,
    ) -> None:
        began = self._clock.monotonic()
        try:
            if source is not None:
                entry.way = await self._start_from(entry, wish, source, Way.SNAPSHOT)
            elif not (driver.capabilities.saves and self._limits.uses_goldens):
                entry.way = await self._boot(entry, wish)
            else:
                entry.way = await self._start_fast(entry, wish, image, driver)
            await self._is_running(entry)
        finally:
            if entry.record.phase is Phase.STARTING:
                await to_the_end(self._forget(entry))
        seconds = self._clock.monotonic() - began
        self._observer.started(entry.way, seconds)
        log.info(
            "a machine came up: %s, %.0f ms", entry.way, seconds * 1000,
            extra={"sandbox_id": wish.sandbox_id},
        )  # fmt: skip

    async def _start_fast(
        self, entry: _Entry, wish: MachineWish, image: Image, driver: Driver
    ) -> Way:
        """Take a machine that waits, else clone the golden one, else boot."""
        shape = wish.shape
        kind = self._goldens.kind_of(image, wish.template, shape)
        for _ in range(_CLAIM_TRIES):
            unit = self._pool.claim(kind, shape.disk_mib)
            if unit is None:
                break
            if await self._take_over(entry, unit, wish):
                self._observer.asked_pool(template=wish.template, is_hit=True)
                return Way.POOL
        self._observer.asked_pool(template=wish.template, is_hit=False)
        golden = await self._goldens.find(kind, driver)
        if golden is not None:
            try:
                return await self._start_from(entry, wish, golden, Way.RESTORE)
            except DamagedError as error:
                await self._goldens.discard(kind, error.message)
                await self._launcher.end(entry.unit)
                body = self._launcher.body(entry.record)
                await in_thread(shutil.rmtree, body, ignore_errors=True)
        # This start is served from cold; the next of its kind need not be.
        self._goldens.want(kind)
        return await self._boot(entry, wish)

    async def _take_over(self, entry: _Entry, unit: Unit, wish: MachineWish) -> bool:
        """Make a machine of the pool the wished sandbox's; False if it was of no use after all."""
        grows = wish.shape.disk_mib > unit.record.disk_mib
        unit.on_end = None
        unit.record = replace(
            unit.record,
            sandbox_id=wish.sandbox_id,
            incarnation=wish.incarnation,
            phase=Phase.STARTING,
        )
        if unit.machine is not None:
            unit.machine.come_forward()
        try:
            await self._launcher.set_up(
                unit, wish, was=Was.UNIQUE, grows=grows, limit_s=_CLAIM_LIMIT_S
            )
        except SandyardError as error:
            log.warning("a machine of the pool was of no use: %s", error.message)
            self._launcher.beside(self._drop(unit))
            return False
        except BaseException:
            await to_the_end(self._drop(unit))
            raise
        entry.unit = unit
        return True

    async def _drop(self, unit: Unit) -> None:
        try:
            await self._launcher.end(unit, removes=True)
        except (SandyardError, OSError):
            log.exception("what a machine left cannot be removed yet")

    async def _start_from(
        self, entry: _Entry, wish: MachineWish, source: SavedMachine, way: Way
    ) -> Way:
        async with self._restores.take(Rank.ASKED, wish.tenant):
            await self._launcher.make_body(entry.unit, source)
            await self._launcher.raise_up(entry.unit, token=source.about.token)
            grows = wish.shape.disk_mib > source.about.disk_mib
            was = Was.IN_USE if way is Way.SNAPSHOT else Was.NOBODYS
            await self._launcher.set_up(entry.unit, wish, was=was, grows=grows)
        return way

    async def _boot(self, entry: _Entry, wish: MachineWish) -> Way:
        async with self._boots.take(Rank.ASKED, wish.tenant):
            await self._launcher.make_body(entry.unit, None)
            await self._boot_twice(entry)
            await self._launcher.set_up(
                entry.unit, wish, was=Was.NOBODYS, limit_s=self._limits.boot_s
            )
        return Way.BOOT

    async def _boot_twice(self, entry: _Entry) -> None:
        """Boot; one that stands still does so by chance, and a second one rarely does."""
        for attempt in (1, 2):
            try:
                await self._launcher.raise_up(entry.unit)
            except DeadlineExceededError as error:
                if attempt == 2:
                    raise InternalError(f"{error.message}, twice in a row") from error
                log.warning("a machine made no progress while booting; trying once more")
            else:
                return

    async def _is_running(self, entry: _Entry, *, end: End | None = None) -> None:
        """Note that a machine is up, and watch it."""
        code, message = (end.code, end.message) if end else ("", "")
        unit = entry.unit
        unit.record = replace(
            unit.record.with_phase(Phase.RUNNING, code=code, message=message), is_awake=True
        )
        await in_thread(self._launcher.write, unit)
        unit.on_end = lambda found: self._note_end(entry, unit, found)
        if unit.watch is None or unit.watch.done():
            self._launcher.start_watch(unit)
        self._launcher.beside(self._launcher.keep_spare(unit))

    async def _forget(self, entry: _Entry) -> None:
        """Remove a start that failed; what would not go is kept as dead, to be tried again."""
        try:
            await self._launcher.end(entry.unit, removes=True)
            if self._entries.get(entry.record.sandbox_id) is entry:
                del self._entries[entry.record.sandbox_id]
        except (SandyardError, OSError) as error:
            log.exception("what a failed start left cannot be removed yet")
            self._mark(entry, Phase.DEAD, End("cleanup_failed", str(error)))

    # --- machines that were here ----------------------------------------------------------

    async def _accept(self, entry: _Entry, wish: MachineWish) -> None:
        """Take a machine that lives for the wished one; if nobody woke it yet, that is done now."""
        unit, before = entry.unit, entry.record
        try:
            unit.record = replace(unit.record, incarnation=wish.incarnation)
            if not unit.record.is_awake:
                await self._launcher.let_run(unit)
                await self._launcher.wake(unit)
                entry.way = Way.RESUME
            await self._is_running(entry)
        except BaseException:
            await to_the_end(self._settle(entry, before))
            raise

    async def _resume(self, entry: _Entry, wish: MachineWish) -> None:
        began = self._clock.monotonic()
        unit, before = entry.unit, entry.record
        try:
            await self._launcher.end(unit)  # in case something would not go before
            state = self._launcher.load_saved(unit)
            await self._launcher.check_saved(state, whole=True)
            async with self._restores.take(Rank.ASKED, wish.tenant):
                unit.record = replace(unit.record, incarnation=wish.incarnation)
                await self._launcher.raise_up(unit, token=state.about.token)
                await self._launcher.wake(unit)
            entry.way = Way.RESUME
            await self._is_running(entry)
        except DamagedError as error:
            await to_the_end(self._launcher.end(unit))
            self._mark(entry, Phase.DEAD, End(_DAMAGED, error.message))
            raise
        except BaseException:
            await to_the_end(self._settle(entry, before))
            raise
        self._observer.started(Way.RESUME, self._clock.monotonic() - began)

    async def _settle(self, entry: _Entry, before: Resident) -> None:
        """After a failed resume: back to paused if that can be, else dead.

        A machine that has run on is what counts, and is saved again; else the saved state does.
        """
        unit = entry.unit
        if unit.machine is not None and not self._launcher.is_saved(unit.record):
            try:
                await self._launcher.pause(unit)
            except SandyardError as error:
                log.error("a machine that cannot be used cannot be saved: %s", error.message)
        with contextlib.suppress(SandyardError):
            await self._launcher.end(unit)
        if self._launcher.is_saved(unit.record):
            self._mark(entry, Phase.PAUSED, None)
        else:
            self._mark(entry, Phase.DEAD, End("machine_died", "it ended while it was resumed"))

    async def _restart(self, entry: _Entry, wish: MachineWish) -> None:
        """Boot a machine that is lost from its own disk; what it saved is of no use any more."""
        began = self._clock.monotonic()
        unit, before = entry.unit, entry.record
        try:
            await self._launcher.end(unit)  # in case something would not go before
            await self._launcher.forget_saved(unit)
            body = self._launcher.body(unit.record)
            (body / "memory").unlink(missing_ok=True)
            unit.record = replace(unit.record, incarnation=wish.incarnation)
            async with self._boots.take(Rank.ASKED, wish.tenant):
                await self._boot_twice(entry)
                await self._launcher.set_up(
                    unit, wish, was=Was.NOBODYS, limit_s=self._limits.boot_s
                )
            entry.way = Way.RESTART
            await self._is_running(entry, end=_RESTARTED)
        except BaseException:
            await to_the_end(self._end_as_dead(entry, before))
            raise
        self._observer.started(Way.RESTART, self._clock.monotonic() - began)

    async def _end_as_dead(self, entry: _Entry, before: Resident) -> None:
        with contextlib.suppress(SandyardError):
            await self._launcher.end(entry.unit)
        self._mark(entry, Phase.DEAD, End(before.reason_code, before.reason_message))

    async def _roll_back(self, entry: _Entry, wish: MachineWish, source: SavedMachine) -> None:
        """Put a snapshot in the place of a sandbox's machine, which is kept until that is up."""
        unit = entry.unit
        if entry.record.phase is Phase.RUNNING:
            await self._launcher.pause(unit)
        await self._launcher.end(unit)  # in case something would not go before
        before = entry.record
        body = f"body-{wish.incarnation}"
        unit.record = replace(
            unit.record,
            incarnation=wish.incarnation,
            body=body if body != before.body else f"{body}-again",
            disk_mib=source.about.disk_mib,
        )
        try:
            # The record on disk stays the old body's until the new machine is fit to be used.
            async with self._restores.take(Rank.ASKED, wish.tenant):
                await self._launcher.make_body(unit, source, is_recorded=False)
                await self._launcher.raise_up(unit, token=source.about.token, is_recorded=False)
                grows = wish.shape.disk_mib > source.about.disk_mib
                await self._launcher.set_up(unit, wish, was=Was.IN_USE, grows=grows)
            entry.way = Way.SNAPSHOT
            await self._is_running(entry)
        except BaseException:
            await to_the_end(self._undo_roll_back(entry, before))
            raise
        await self._launcher.tidy(unit.record)

    async def _undo_roll_back(self, entry: _Entry, before: Resident) -> None:
        with contextlib.suppress(SandyardError):
            await self._launcher.end(entry.unit)
        entry.unit.record = replace(before, slot=-1, handle=None)
        phase = Phase.PAUSED if self._launcher.is_saved(before) else Phase.DEAD
        end = End(before.reason_code, before.reason_message) if phase is Phase.DEAD else None
        self._mark(entry, phase, end)
        await self._launcher.tidy(before)

    async def _pause(self, entry: _Entry) -> None:
        if entry.record.phase is Phase.PAUSED:  # it was saved, and its process would not go
            await self._launcher.end(entry.unit)
        else:
            await self._launcher.pause(entry.unit)

    async def _snapshot(self, entry: _Entry, folder: Path) -> None:
        await self._launcher.snapshot(entry.unit, folder)
        if entry.record.phase is Phase.RUNNING:
            # The guest's clock stood still with it.
            with contextlib.suppress(SandyardError):
                await self._launcher.set_clock(entry.unit)

    async def _remove(self, entry: _Entry) -> None:
        await self._launcher.end(entry.unit, removes=True)
        del self._entries[entry.record.sandbox_id]

    def _mark(self, entry: _Entry, phase: Phase, end: End | None) -> None:
        unit = entry.unit
        unit.record = unit.record.with_phase(
            phase, code=end.code if end else "", message=end.message if end else ""
        )
        try:
            self._launcher.write(unit)
        except OSError:
            log.exception("a machine's record cannot be written; the next look mends it")

    def _note_end(self, entry: _Entry, unit: Unit, end: End) -> None:
        """A machine ended by itself: it is dead; a job that is at work on it comes first."""
        if entry.is_busy and unit.machine is not None:
            entry.missed = (unit.machine, end)
            return
        if entry.unit is not unit or entry.record.phase is not Phase.RUNNING:
            return
        if self._entries.get(entry.record.sandbox_id) is not entry or self._tasks is None:
            return
        log.warning("a machine ended by itself: %s", end.message)
        self._mark(entry, Phase.DEAD, end)
        self._start_job(entry, lambda: self._launcher.end(unit))
        self._on_change()

    def _fact(self, entry: _Entry) -> MachineFact:
        record, unit = entry.record, entry.unit
        is_coming = entry.is_busy and entry.is_starting
        if is_coming or (record.phase is Phase.RUNNING and not record.is_awake):
            state = MachineState.STARTING
        elif record.phase is Phase.RUNNING:
            state = MachineState.SILENT if unit.is_silent else MachineState.RUNNING
        elif record.phase is Phase.PAUSED:
            state = MachineState.PAUSED
        else:
            state = MachineState.DEAD
        stall = unit.stall if record.phase is Phase.RUNNING else None
        return MachineFact(
            sandbox_id=record.sandbox_id,
            incarnation=record.incarnation,
            state=state,
            ip=unit.place.ip if unit.place else None,
            driver=record.driver,
            os=record.os,
            way=entry.way,
            reason_code=stall.code if stall else record.reason_code,
            reason_message=stall.message if stall else record.reason_message,
        )

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
        try:
            return saving.load(folder, key=self._key)
        except ConflictError as error:
            raise DamagedError(f"cannot use the snapshot: {error.message}") from error

    async def _checked_snapshot(self, wish: MachineWish) -> SavedMachine:
        if wish.snapshot_id is None:
            raise NotFoundError("cannot start from a snapshot: none was named")
        source = self._load_snapshot(wish.snapshot_id)
        await self._launcher.check_saved(source, whole=False)
        return source

    # --- room -----------------------------------------------------------------------------

    def _promises(self) -> list[Promise]:
        promises = []
        coming = {
            entry.unit for entry in self._entries.values() if entry.is_busy and entry.is_starting
        }
        units = [entry.unit for entry in self._entries.values()]
        for unit in [*units, *self._pool.units, *self._goldens.units]:
            record = unit.record
            is_down = record.phase in (Phase.PAUSED, Phase.DEAD) and unit.machine is None
            is_still = is_down and unit not in coming
            promises.append(
                Promise(
                    memory_mib=0 if is_still else cost_mib(record.memory_mib),
                    disk_mib=record.disk_mib + record.memory_mib,
                    disk_used_mib=self._used_mib(unit),
                )
            )
        return promises

    def _used_mib(self, unit: Unit) -> int:
        """Return what a body takes on disk, as it was a moment ago: to look costs more than it is
        worth at every start."""
        now = self._clock.monotonic()
        looked_at, used = unit.used_mib
        if now - looked_at >= _USED_S:
            body = self._launcher.body(unit.record)
            used = used_mib(body) if body.is_dir() else 0
            unit.used_mib = (now, used)
        return used

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
            self._missing = await self._find_missing()
            await self._clock.sleep(self._limits.watch_period_s)

    async def _find_missing(self) -> tuple[str, ...]:
        for slug in self._images.definitions:
            image = self._images.current(slug)
            if image is not None:
                try:
                    await self._drivers.choose(image)
                except UnavailableError as error:
                    return (error.message,)
                return ()
        return ("no template has been built; run `sandyard template build base-ubuntu`",)

    async def _keep_pool(self) -> None:
        try:
            await self._goldens.sweep()
        except (SandyardError, OSError):
            log.exception("golden machines could not be swept")
        await self._pool.keep()

    # --- over a restart -------------------------------------------------------------------

    async def _adopt(self, tasks: asyncio.TaskGroup) -> None:
        await in_thread(self._residents.sweep)
        await in_thread(self._sweep_snapshots)
        found = await in_thread(self._residents.all)
        for record in found:
            await self._adopt_one(record)
        in_use = [one.record.slot for one in self._entries.values() if one.unit.machine]
        await self._network.open(in_use=in_use, tasks=tasks)
        kept = {entry.record.id for entry in self._entries.values()}
        for record in found:
            if record.id not in kept:
                await in_thread(self._residents.remove, record.id)
        for entry in self._entries.values():
            await self._launcher.tidy(entry.record)
            if entry.unit.machine is not None:
                await self._go_on(entry)
        if found:
            living = sum(1 for entry in self._entries.values() if entry.unit.machine)
            log.info("%d of %d recorded machines live and were adopted", living, len(found))

    async def _adopt_one(self, record: Resident) -> None:
        """Take over a record: living machines go on, saved and dead ones are kept as they are.

        What was being started is ended: who asked for it is gone, and whoever wants it still asks
        again. So is what waited in the pool.
        """
        if record.phase in (Phase.STARTING, Phase.WAITING):
            return
        entry = self._entries[record.sandbox_id] = _Entry(Unit(record))
        unit = entry.unit
        if self._launcher.is_saved(record) and record.phase is not Phase.DEAD:
            # Saved, and if a process is left of it, it has not run since.
            if await self._launcher.recover(unit):
                await self._launcher.end(unit)
            await in_thread(self._launcher.disown, record)
            unit.record = replace(unit.record, slot=-1, handle=None)
            self._mark(entry, Phase.PAUSED, None)
        elif record.phase is Phase.PAUSED:
            unit.record = replace(record, slot=-1, handle=None)
            self._mark(entry, Phase.DEAD, End(_DAMAGED, "the saved state is gone"))
        elif record.phase is Phase.RUNNING and not await self._launcher.recover(unit):
            handle = record.handle or {}
            end = _DIED_UNSEEN if handle.get("boot", boot_id()) == boot_id() else _LOST
            if self._drivers.named(record.driver) is None:
                end = End("driver_missing", f"no driver {record.driver} is here")
            unit.record = replace(record, slot=-1, handle=None)
            self._mark(entry, Phase.DEAD, end)

    async def _go_on(self, entry: _Entry) -> None:
        """Watch an adopted machine; one that stood still for a save that was broken off goes on."""
        unit = entry.unit
        unit.on_end = lambda found: self._note_end(entry, unit, found)
        driver = self._drivers.named(unit.record.driver)
        # One that is not awake stands or runs as it is until whoever wants it asks again.
        if driver is not None and driver.capabilities.saves and unit.record.is_awake:
            await self._launcher.unfreeze(unit)
        self._launcher.start_watch(unit)

    def _sweep_snapshots(self) -> None:
        for part in self._snapshots_dir.glob("*.part") if self._snapshots_dir.is_dir() else ():
            shutil.rmtree(part, ignore_errors=True)

    async def _let_go(self, keeping: list["asyncio.Task[None]"]) -> None:
        self._goldens.use(None)
        for task in keeping:
            task.cancel()
        await self._goldens.stop()
        if keeping:
            await asyncio.wait(keeping)
        for entry in list(self._entries.values()):
            if entry.job is not None and not entry.job.done():
                entry.job.cancel()
                await asyncio.wait([entry.job])
            await self._launcher.let_go(entry.unit)
        await self._network.close()
        self._launcher.use(None)
        self._tasks = None
