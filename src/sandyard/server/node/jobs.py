"""The jobs of a node: how a machine is brought up, saved and removed, step by step."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sandyard.server.core.contracts.node import LIVING, MachineWish, Phase, Way
from sandyard.server.core.errors import (
    AgentSilentError,
    DamagedError,
    DeadlineExceededError,
    IncompatibleError,
    InternalError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.shapes import Shape
from sandyard.server.drivers.contract import Driver, End
from sandyard.server.node.capacity import Capacity
from sandyard.server.node.host.egress import clear_journal
from sandyard.server.node.images.image import Image
from sandyard.server.node.machines.adopt import DAMAGED
from sandyard.server.node.machines.console import FailedConsoles
from sandyard.server.node.machines.guest import Was
from sandyard.server.node.machines.means import Means
from sandyard.server.node.machines.phases import Step
from sandyard.server.node.machines.records import Record
from sandyard.server.node.machines.resident import Resident
from sandyard.server.node.machines.saved import SavedMachine
from sandyard.server.node.owner import Owner
from sandyard.server.node.snapshots import KeptSnapshots
from sandyard.server.node.stock.goldens import Goldens
from sandyard.server.node.stock.pool import MachineObserver, Pool
from sandyard.server.node.stock.turns import Rank, Turns
from sandyard.server.tasks import Work, in_thread, to_the_end

log = logging.getLogger(__name__)

_RESTARTED = End(
    "restarted_from_disk",
    "the machine was booted from its disk; what was in its memory is lost",
)
_NOT_RESTARTED = End("restart_failed", "the machine was ended, and did not boot from its disk")
_CLAIM_LIMIT_S = 5.0
_CLAIM_TRIES = 3


class Jobs:
    """The jobs. Each works on the machine of one owner, which begins no other meanwhile."""

    def __init__(
        self,
        *,
        means: Means,
        goldens: Goldens,
        pool: Pool,
        capacity: Capacity,
        snapshots: KeptSnapshots,
        boots: Turns,
        restores: Turns,
        observer: MachineObserver,
        consoles: FailedConsoles,
    ) -> None:
        self._means = means
        self._goldens = goldens
        self._pool = pool
        self._capacity = capacity
        self._snapshots = snapshots
        self._boots = boots
        self._restores = restores
        self._observer = observer
        self._consoles = consoles

    def bring_up(self, owner: Owner, wish: MachineWish, step: Step) -> Work:
        """Return the job that brings up the requested machine; see `phases` for the steps.

        It raises what core.node_ops.EnsureRunning names.
        """
        match step:
            case Step.START | Step.REPLACE:
                return self._start(owner, wish)
            case Step.TAKE | Step.KEEP:
                # It was believed lost, and is here: nothing is as intact as the machine itself.
                return self._take(owner, wish)
            case Step.RESUME:
                return self._resume(owner, wish)
            case Step.RESTART:
                return self._restart(owner, wish)
            case Step.ROLL_BACK:
                return self._roll_back(owner, wish)
            case _:
                raise AssertionError(f"{step} brings up no machine")

    async def _reserve_again(self, owner: Owner, wish: MachineWish) -> None:
        """Reserve memory for a machine that is here; if it lives, it has that already."""
        if owner.phase not in LIVING:
            with _shortage_is_temporary():
                await self._capacity.make_room(wish.shape, is_promised=True)
        owner.reserve(wish.shape)

    # --- new machines ---------------------------------------------------------------------

    async def _start(self, owner: Owner, wish: MachineWish) -> None:
        """Start a new machine: from a snapshot, or the fastest way there is. A machine that is here
        is removed first."""
        if owner.phase is not None:
            await self.remove(owner)
        with _shortage_is_temporary():
            source, image, driver = await self._prepared(wish)
        owner.reserve(wish.shape)
        began = self._means.clock.monotonic()
        try:
            if wish.mounts:
                # First, so that a mount that cannot work takes no machine from the pool.
                await self._means.exports.check()
            if source is not None:
                self._new(owner, wish, image, driver)
                way = await self._start_from(owner, wish, source, Way.SNAPSHOT)
            elif not (driver.capabilities.saves and self._means.limits.uses_goldens):
                self._new(owner, wish, image, driver)
                way = await self._boot(owner, wish)
            elif await self._claim(owner, wish, image):
                way = Way.POOL
            else:
                way = await self._clone(owner, wish, image, driver)
            await self._is_running(owner, way)
        finally:
            if owner.phase in (None, Phase.STARTING):
                await to_the_end(self._remove_failed(owner))
        seconds = self._means.clock.monotonic() - began
        self._observer.started(way, seconds)
        log.info(
            "a machine started: %s, %.0f ms", way, seconds * 1000,
            extra={"sandbox_id": wish.sandbox_id},
        )  # fmt: skip

    async def _prepared(self, wish: MachineWish) -> tuple[SavedMachine | None, Image, Driver]:
        """Return what a new machine is started from, once there is capacity for it."""
        source = await self._snapshots.checked(wish) if wish.snapshot_id else None
        image = self._image_of(wish, source)
        driver = await self._means.drivers.choose(image)
        if source is None:
            await self._capacity.find_room(wish.template, wish.shape)
        else:
            driver = self._means.drivers.named(source.about.driver) or driver
            await self._capacity.make_room(wish.shape)
        return source, image, driver

    def _image_of(self, wish: MachineWish, source: SavedMachine | None) -> Image:
        if source is None:
            return self._means.images.get(wish.template)[1]
        image = self._means.images.find(source.about.image)
        if image is None:
            raise DamagedError("cannot start from the snapshot: its image is no longer here")
        return image

    def _new(self, owner: Owner, wish: MachineWish, image: Image, driver: Driver) -> Resident:
        resident = Resident.new(wish, image, driver, self._means)
        owner.take(resident)
        return resident

    async def _claim(self, owner: Owner, wish: MachineWish, image: Image) -> bool:
        """Turn a machine of the pool into the requested sandbox, if one waits that is usable."""
        kind = self._goldens.kind_of(image, wish.template, wish.shape)
        for _ in range(_CLAIM_TRIES):
            waiting = self._pool.claim(kind, wish.shape.disk_mib)
            if waiting is None:
                break
            grows = wish.shape.disk_mib > waiting.shape.disk_mib
            had_rules = not waiting.record.policy.is_default
            waiting.assign(wish)
            try:
                limit_s = self._means.patience(_CLAIM_LIMIT_S)
                await waiting.set_up(wish, was=Was.UNIQUE, grows=grows, limit_s=limit_s)
            except SandyardError as error:
                log.warning("a machine of the pool is unusable: %s", error.message)
                self._means.crew.start(waiting.drop(), "cannot remove a machine of the pool")
            except BaseException:
                await to_the_end(waiting.drop())
                raise
            else:
                if had_rules:
                    await in_thread(clear_journal, waiting.body.folder)
                owner.take(waiting)
                self._observer.asked_pool(template=wish.template, is_hit=True)
                return True
        self._observer.asked_pool(template=wish.template, is_hit=False)
        return False

    async def _clone(self, owner: Owner, wish: MachineWish, image: Image, driver: Driver) -> Way:
        """Clone the golden machine, or boot if there is none."""
        kind = self._goldens.kind_of(image, wish.template, wish.shape)
        golden = await self._goldens.find(kind, driver)
        resident = self._new(owner, wish, image, driver)
        if golden is None:
            # This one boots; the next of its kind need not.
            self._goldens.want(kind)
            async with self._boots.take(Rank.ASKED, wish.org_id):
                # There may be a golden machine after the wait for a turn.
                golden = await self._goldens.find(kind, driver)
                if golden is None:
                    return await self._boot_now(owner, wish)
        try:
            return await self._start_from(owner, wish, golden, Way.RESTORE)
        except DamagedError as error:
            await self._goldens.discard(kind, error.message)
            await resident.end()
            await resident.body.remove()
        self._goldens.want(kind)
        return await self._boot(owner, wish)

    async def _start_from(
        self, owner: Owner, wish: MachineWish, source: SavedMachine, way: Way
    ) -> Way:
        resident = owner.resident
        async with self._restores.take(Rank.ASKED, wish.org_id):
            await resident.make_body(source)
            await resident.process.bring_up(source=source.about)
            grows = wish.shape.disk_mib > source.about.disk_mib
            was = Was.IN_USE if way is Way.SNAPSHOT else Was.NOBODYS
            await resident.set_up(wish, was=was, grows=grows)
        return way

    async def _boot(self, owner: Owner, wish: MachineWish) -> Way:
        async with self._boots.take(Rank.ASKED, wish.org_id):
            return await self._boot_now(owner, wish)

    async def _boot_now(self, owner: Owner, wish: MachineWish) -> Way:
        await owner.resident.make_body(None)
        await self._booted(owner.resident, wish)
        return Way.BOOT

    async def _booted(self, resident: Resident, wish: MachineWish) -> None:
        """Boot a machine from its disk and set it up. A boot that makes no progress is repeated
        once: it stalls by chance, and rarely twice."""
        for attempt in (1, 2):
            try:
                await resident.process.bring_up()
            except DeadlineExceededError as error:
                if attempt == 2:
                    raise InternalError(f"{error.message}, twice in a row") from error
                log.warning("a machine made no progress while booting; trying once more")
            else:
                break
        limit_s = self._means.patience(self._means.limits.boot_s)
        await resident.set_up(wish, was=Was.NOBODYS, limit_s=limit_s)

    async def _is_running(self, owner: Owner, way: Way, end: End | None = None) -> None:
        """Record that a machine runs, and watch it."""
        await owner.resident.current.enter(Phase.RUNNING, end)
        owner.watch(way)
        owner.resident.guest.keep_spare()

    async def _remove_failed(self, owner: Owner) -> None:
        """Remove what a failed start left; what cannot be removed is kept for another attempt."""
        if owner.phase is not None:
            resident = owner.resident
            self._consoles.keep(owner.sandbox_id, resident.body.folder)
            try:
                await resident.end(removes=True)
            except (SandyardError, OSError) as error:
                log.exception("cannot remove what a failed start left yet")
                resident.current.mark(Phase.STARTING, End("cleanup_failed", str(error)))
                return
        owner.lose()

    # --- machines that were here ----------------------------------------------------------

    async def _take(self, owner: Owner, wish: MachineWish) -> None:
        """Make a living machine the requested incarnation; wake it if that has not been done."""
        resident, before = owner.resident, owner.resident.record
        is_awake = before.phase is not Phase.WAKING
        try:
            if not resident.is_up:
                raise UnavailableError(
                    "cannot start the sandbox: its machine is being removed; try again"
                )
            if resident.phase is Phase.HELD:
                resident.current.count_as(wish.incarnation)
                await resident.current.write()
                return
            if wish.policy != resident.record.policy or wish.credentials is not None:
                await resident.enforce(wish.policy, wish.credentials)
            way = None
            if resident.phase is Phase.WAKING:
                await resident.saving.let_run()
                await _woken(resident)
                is_awake, way = True, Way.RESUME
                await resident.unmount_others(wish)
                await resident.mount_anew()
            await resident.trust_if_possible()
            # Not earlier: until it is usable, a repeated request must find the work undone.
            resident.current.count_as(wish.incarnation)
            await resident.current.enter(Phase.RUNNING)
            resident.process.remove_spent_later()
            owner.watch(way)
            resident.guest.keep_spare()
        except BaseException:
            await to_the_end(self._fall_back(owner, before, is_awake=is_awake))
            raise

    async def _resume(self, owner: Owner, wish: MachineWish) -> None:
        """Resume a paused machine; on failure it stays paused, if possible.

        The state that it is resumed from is removed only once the machine is in use.
        """
        await self._reserve_again(owner, wish)
        began = self._means.clock.monotonic()
        resident, before = owner.resident, owner.resident.record
        is_awake = False
        resident.use(wish)
        try:
            await resident.end()  # in case something could not be released before
            state = await resident.saving.checked_state()
            async with self._restores.take(Rank.ASKED, wish.org_id):
                mounts = {one.workspace_id for one in wish.mounts}
                await resident.process.bring_up(source=state.about, mounts=mounts)
                await _woken(resident)
                is_awake = True
                await resident.unmount_others(wish)
            await resident.trust_if_possible()
            await resident.mount_anew()
            resident.current.count_as(wish.incarnation)  # as above
            await self._is_running(owner, Way.RESUME)
            resident.process.remove_spent_later()
        except IncompatibleError:
            await to_the_end(self._fall_back(owner, before, is_awake=False))
            raise
        except DamagedError as error:
            await to_the_end(resident.end())
            resident.current.count_as(before.incarnation)
            resident.current.mark(Phase.DEAD, End(DAMAGED, error.message))
            raise
        except BaseException:
            await to_the_end(self._fall_back(owner, before, is_awake=is_awake))
            raise
        self._observer.started(Way.RESUME, self._means.clock.monotonic() - began)

    async def _fall_back(self, owner: Owner, before: Record, *, is_awake: bool) -> None:
        """After a failed resume, return a machine to paused without losing its memory.

        One that has not run still has its saved state. One that runs and is not awake, so that no
        client has used it, returns to that state unless it has written to its disk. Otherwise its
        current state is saved. If that is impossible now, say because its process is stopped, it
        keeps running: a later request resumes or saves it. It is dead only if its process has
        ended after it wrote to its disk.
        """
        resident = owner.resident
        resident.current.count_as(before.incarnation)
        if resident.is_up and not resident.is_saved:
            try:
                if is_awake or not await resident.saving.go_back():
                    await resident.saving.pause()
            except SandyardError as error:
                log.error("cannot save a machine that failed to resume: %s", error.message)
                if not await resident.process.has_ended():
                    if before.phase in (Phase.PAUSED, Phase.WAKING):
                        resident.current.set_phase(Phase.WAKING, None)
                    owner.watch()
                    return
        with suppress(SandyardError):
            await resident.end()
        if resident.is_saved or await resident.saving.reinstate():
            resident.current.mark(Phase.PAUSED)
        else:
            resident.current.mark(Phase.DEAD, End("machine_died", "it ended while it was resumed"))

    async def _restart(self, owner: Owner, wish: MachineWish) -> None:
        """Boot a machine from its own disk; its memory and saved state are lost."""
        await self._reserve_again(owner, wish)
        began = self._means.clock.monotonic()
        resident, before = owner.resident, owner.resident.record
        resident.use(wish)
        try:
            await resident.process.shut_down()
            await resident.end()  # in case something could not be released before
            await resident.body.forget_memory()
            async with self._boots.take(Rank.ASKED, wish.org_id):
                await self._booted(resident, wish)
            resident.current.count_as(wish.incarnation)  # as above
            await self._is_running(owner, Way.RESTART, _RESTARTED)
        except BaseException:
            await to_the_end(self._fall_dead(resident, before))
            raise
        self._observer.started(Way.RESTART, self._means.clock.monotonic() - began)

    async def _fall_dead(self, resident: Resident, before: Record) -> None:
        with suppress(SandyardError):
            await resident.end()
        resident.current.count_as(before.incarnation)
        was_dead = before.phase is Phase.DEAD
        end = End(before.reason_code, before.reason_message) if was_dead else _NOT_RESTARTED
        resident.current.mark(Phase.DEAD, end)

    async def _roll_back(self, owner: Owner, wish: MachineWish) -> None:
        """Replace a sandbox's machine by a snapshot; the old one is kept until the new one runs."""
        source = await self._snapshots.checked(wish)
        await self._reserve_again(owner, wish)
        resident = owner.resident
        resident.use(wish)
        if resident.phase in (Phase.RUNNING, Phase.WAKING):
            await resident.saving.pause()
        await resident.end()  # in case something could not be released before
        before = resident.current.begin_other_body(wish.incarnation, source.about.disk_mib)
        try:
            # The record on disk names the old body until the new machine is usable.
            async with self._restores.take(Rank.ASKED, wish.org_id):
                await resident.make_body(source, is_recorded=False)
                await resident.process.bring_up(source=source.about, is_recorded=False)
                grows = wish.shape.disk_mib > source.about.disk_mib
                await resident.set_up(wish, was=Was.IN_USE, grows=grows)
            await self._is_running(owner, Way.SNAPSHOT)
        except BaseException:
            await to_the_end(self._undo_roll_back(resident, before))
            raise
        await resident.body.tidy()

    async def _undo_roll_back(self, resident: Resident, before: Record) -> None:
        with suppress(SandyardError):
            await resident.end()
        resident.current.go_back_to(before)
        if resident.is_saved:
            resident.current.mark(Phase.PAUSED)
        else:
            resident.current.mark(Phase.DEAD, End(before.reason_code, before.reason_message))
        await resident.body.tidy()

    # --- saved, and removed ---------------------------------------------------------------

    async def snapshot(self, owner: Owner, folder: Path) -> None:
        """Save a machine, running or paused, to a new folder.

        Raises: see core.node_ops.EnsureSnapshot.
        """
        resident = owner.resident
        self._capacity.check_disk(Shape(1, resident.shape.memory_mib, 0))
        await resident.saving.snapshot(folder)
        if resident.phase is Phase.RUNNING:
            # The guest's clock stood still while it was saved.
            with suppress(SandyardError):
                await resident.guest.set_clock()

    async def remove(self, owner: Owner) -> None:
        """Remove a machine and all of its files.

        Raises:
            UnavailableError: something could not be released.
        """
        await owner.resident.end(removes=True)
        owner.lose()


@contextmanager
def _shortage_is_temporary() -> Iterator[None]:
    """Turn errors of the host into ones that are retried: nothing has been started yet."""
    try:
        yield
    except OSError as error:
        raise UnavailableError(f"cannot start the sandbox now: {error}") from error


async def _woken(resident: Resident) -> None:
    """Wake a machine that was restored from its own saved state."""
    try:
        await resident.guest.wake()
    except UnavailableError as error:
        # A shortage on this host says nothing about the guest.
        if isinstance(error.__cause__, TimeoutError | EOFError | ConnectionError):
            raise AgentSilentError(
                f"{error.text}; its memory is kept: try again, or restart it to boot it from its "
                "disk"
            ) from error
        raise
