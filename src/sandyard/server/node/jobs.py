"""The jobs of a node: how a machine is brought up, held still and removed, step by step."""

import logging
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from sandyard.server.core.contracts.node import MachineWish, Phase, Way
from sandyard.server.core.errors import (
    AgentSilentError,
    DamagedError,
    DeadlineExceededError,
    InternalError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.drivers.contract import Driver, End
from sandyard.server.node.holding import Holding
from sandyard.server.node.images.images import Image
from sandyard.server.node.machines.adopt import DAMAGED
from sandyard.server.node.machines.console import FailedConsoles
from sandyard.server.node.machines.guest import Was
from sandyard.server.node.machines.means import Means
from sandyard.server.node.machines.records import Record
from sandyard.server.node.machines.resident import Resident
from sandyard.server.node.machines.saved import SavedMachine
from sandyard.server.node.stock.goldens import Goldens
from sandyard.server.node.stock.pool import MachineObserver, Pool
from sandyard.server.node.stock.turns import Rank, Turns
from sandyard.server.tasks import to_the_end

log = logging.getLogger(__name__)

_RESTARTED = End(
    "restarted_from_disk",
    "the machine was booted anew from its disk; what was in its memory is gone",
)
_NOT_RESTARTED = End("restart_failed", "the machine was ended, and did not boot from its disk")
_CLAIM_LIMIT_S = 5.0
_CLAIM_TRIES = 3


class Jobs:
    """See the module. Each works on one holding, which is in no other hand meanwhile."""

    def __init__(
        self,
        *,
        means: Means,
        goldens: Goldens,
        pool: Pool,
        boots: Turns,
        restores: Turns,
        observer: MachineObserver,
        on_end: Callable[[Holding, End], None],
        forget: Callable[[Holding], None],
        consoles: FailedConsoles,
    ) -> None:
        self._consoles = consoles
        self._means = means
        self._goldens = goldens
        self._pool = pool
        self._boots = boots
        self._restores = restores
        self._observer = observer
        self._on_end = on_end
        self._forget = forget

    # --- new machines ---------------------------------------------------------------------

    async def start(
        self,
        holding: Holding,
        wish: MachineWish,
        image: Image,
        driver: Driver,
        source: SavedMachine | None,
    ) -> None:
        """Bring up a machine that was not there: from a snapshot, else the fastest way there is."""
        began = self._means.clock.monotonic()
        try:
            if wish.mounts:
                # First: what cannot be is not to cost a machine that waits.
                await self._means.exports.check()
            if source is not None:
                self._begin_anew(holding, wish, image, driver)
                way = await self._start_from(holding, wish, source, Way.SNAPSHOT)
            elif not (driver.capabilities.saves and self._means.limits.uses_goldens):
                self._begin_anew(holding, wish, image, driver)
                way = await self._boot(holding, wish)
            else:
                way = await self._start_fast(holding, wish, image, driver)
            await self._is_running(holding, way)
        finally:
            if holding.phase in (None, Phase.STARTING):
                await to_the_end(self._remove_failed(holding))
        seconds = self._means.clock.monotonic() - began
        self._observer.started(way, seconds)
        log.info(
            "a machine came up: %s, %.0f ms", way, seconds * 1000,
            extra={"sandbox_id": wish.sandbox_id},
        )  # fmt: skip

    def _begin_anew(
        self, holding: Holding, wish: MachineWish, image: Image, driver: Driver
    ) -> Resident:
        resident = Resident.new(wish, image, driver, self._means)
        holding.take(resident)
        return resident

    async def _start_fast(
        self, holding: Holding, wish: MachineWish, image: Image, driver: Driver
    ) -> Way:
        """Take a machine that waits, else clone the golden one, else boot."""
        kind = self._goldens.kind_of(image, wish.template, wish.shape)
        for _ in range(_CLAIM_TRIES):
            waiting = self._pool.claim(kind, wish.shape.disk_mib)
            if waiting is None:
                break
            if await self._take_over(holding, waiting, wish):
                self._observer.asked_pool(template=wish.template, is_hit=True)
                return Way.POOL
        self._observer.asked_pool(template=wish.template, is_hit=False)
        golden = await self._goldens.find(kind, driver)
        resident = self._begin_anew(holding, wish, image, driver)
        if golden is None:
            # This start is served from cold; the next of its kind need not be.
            self._goldens.want(kind)
            async with self._boots.take(Rank.ASKED, wish.org_id):
                # Others waited for their turn, too, and there may be one by now.
                golden = await self._goldens.find(kind, driver)
                if golden is None:
                    return await self._boot_now(holding, wish)
        try:
            return await self._start_from(holding, wish, golden, Way.RESTORE)
        except DamagedError as error:
            await self._goldens.discard(kind, error.message)
            await resident.end()
            await resident.body.remove()
        self._goldens.want(kind)
        return await self._boot(holding, wish)

    async def _take_over(self, holding: Holding, waiting: Resident, wish: MachineWish) -> bool:
        """Make a machine of the pool the wished sandbox's; False if it was of no use after all."""
        grows = wish.shape.disk_mib > waiting.shape.disk_mib
        waiting.serve(wish)
        try:
            limit_s = self._means.patience(_CLAIM_LIMIT_S)
            await waiting.set_up(wish, was=Was.UNIQUE, grows=grows, limit_s=limit_s)
        except SandyardError as error:
            log.warning("a machine of the pool was of no use: %s", error.message)
            self._means.crew.start(waiting.drop(), "a machine of the pool cannot be removed")
            return False
        except BaseException:
            await to_the_end(waiting.drop())
            raise
        holding.take(waiting)
        return True

    async def _start_from(
        self, holding: Holding, wish: MachineWish, source: SavedMachine, way: Way
    ) -> Way:
        resident = holding.resident
        async with self._restores.take(Rank.ASKED, wish.org_id):
            await resident.make_body(source)
            await resident.raise_up(token=source.about.token)
            grows = wish.shape.disk_mib > source.about.disk_mib
            was = Was.IN_USE if way is Way.SNAPSHOT else Was.NOBODYS
            await resident.set_up(wish, was=was, grows=grows)
        return way

    async def _boot(self, holding: Holding, wish: MachineWish) -> Way:
        async with self._boots.take(Rank.ASKED, wish.org_id):
            return await self._boot_now(holding, wish)

    async def _boot_now(self, holding: Holding, wish: MachineWish) -> Way:
        resident = holding.resident
        await resident.make_body(None)
        await _boot_twice(resident)
        limit_s = self._means.patience(self._means.limits.boot_s)
        await resident.set_up(wish, was=Was.NOBODYS, limit_s=limit_s)
        return Way.BOOT

    async def _is_running(self, holding: Holding, way: Way | None, end: End | None = None) -> None:
        """Note that a machine is up, and watch it."""
        resident = holding.resident
        await resident.enter(Phase.RUNNING, end)
        if way is not None:
            holding.came(way)
        resident.watch(lambda found: self._on_end(holding, found))
        resident.guest.keep_spare()

    async def _remove_failed(self, holding: Holding) -> None:
        """Remove what a start left that failed; what would not go is kept, to be tried again."""
        for resident in holding.residents:
            self._consoles.keep(holding.sandbox_id, resident.body.folder)
            try:
                await resident.end(removes=True)
            except (SandyardError, OSError) as error:
                log.exception("what a failed start left cannot be removed yet")
                resident.mark(Phase.STARTING, End("cleanup_failed", str(error)))
                return
        self._forget(holding)

    # --- machines that were here ----------------------------------------------------------

    async def take(self, holding: Holding, wish: MachineWish) -> None:
        """Have a machine that lives count as the wished one; it is woken if nobody did that yet."""
        resident, before = holding.resident, holding.resident.record
        way = None
        try:
            if not resident.is_up:
                raise UnavailableError("cannot start this: what is left of it is being given up")
            if resident.phase is Phase.WAKING:
                await resident.let_run()
                await resident.guest.wake()
                way = Way.RESUME
            # Not before it is fit to be used: until then an ask for it must find it still to do.
            resident.count_as(wish.incarnation)
            await self._is_running(holding, way)
        except BaseException:
            await to_the_end(self._fall_back(resident, before))
            raise

    async def resume(self, holding: Holding, wish: MachineWish) -> None:
        """Let a paused machine go on where it stood; on failure it is what it was."""
        began = self._means.clock.monotonic()
        resident, before = holding.resident, holding.resident.record
        try:
            await resident.end()  # in case something would not go before
            state = await resident.checked_state()
            async with self._restores.take(Rank.ASKED, wish.org_id):
                await resident.raise_up(token=state.about.token)
                await _woken(resident)
            resident.count_as(wish.incarnation)  # as above
            await self._is_running(holding, Way.RESUME)
        except DamagedError as error:
            await to_the_end(resident.end())
            resident.count_as(before.incarnation)
            resident.mark(Phase.DEAD, End(DAMAGED, error.message))
            raise
        except BaseException:
            await to_the_end(self._fall_back(resident, before))
            raise
        self._observer.started(Way.RESUME, self._means.clock.monotonic() - began)

    async def _fall_back(self, resident: Resident, before: Record) -> None:
        """After a failed resume: back to paused if that can be, else dead.

        A machine that has run on is what counts, and is saved again; else the saved state does.
        """
        resident.count_as(before.incarnation)
        if resident.is_up and not resident.is_saved:
            try:
                await resident.pause()
            except SandyardError as error:
                log.error("a machine that cannot be used cannot be saved: %s", error.message)
        with suppress(SandyardError):
            await resident.end()
        if resident.is_saved:
            resident.mark(Phase.PAUSED)
        else:
            resident.mark(Phase.DEAD, End("machine_died", "it ended while it was resumed"))

    async def restart(self, holding: Holding, wish: MachineWish) -> None:
        """Boot a machine from its own disk; what it saved, or has in memory, is given up."""
        began = self._means.clock.monotonic()
        resident, before = holding.resident, holding.resident.record
        try:
            await resident.shut_down()
            await resident.end()  # in case something would not go before
            await resident.body.forget_memory()
            async with self._boots.take(Rank.ASKED, wish.org_id):
                await _boot_twice(resident)
                limit_s = self._means.patience(self._means.limits.boot_s)
                await resident.set_up(wish, was=Was.NOBODYS, limit_s=limit_s)
            resident.count_as(wish.incarnation)  # as above
            await self._is_running(holding, Way.RESTART, _RESTARTED)
        except BaseException:
            await to_the_end(self._fall_dead(resident, before))
            raise
        self._observer.started(Way.RESTART, self._means.clock.monotonic() - began)

    async def _fall_dead(self, resident: Resident, before: Record) -> None:
        with suppress(SandyardError):
            await resident.end()
        resident.count_as(before.incarnation)
        was_dead = before.phase is Phase.DEAD
        end = End(before.reason_code, before.reason_message) if was_dead else _NOT_RESTARTED
        resident.mark(Phase.DEAD, end)

    async def roll_back(self, holding: Holding, wish: MachineWish, source: SavedMachine) -> None:
        """Put a snapshot in the place of a sandbox's machine, which is kept until that is up."""
        resident = holding.resident
        if resident.phase in (Phase.RUNNING, Phase.WAKING):
            await resident.pause()
        await resident.end()  # in case something would not go before
        before = resident.begin_other_body(wish.incarnation, source.about.disk_mib)
        try:
            # The record on disk stays the old body's until the new machine is fit to be used.
            async with self._restores.take(Rank.ASKED, wish.org_id):
                await resident.make_body(source, is_recorded=False)
                await resident.raise_up(token=source.about.token, is_recorded=False)
                grows = wish.shape.disk_mib > source.about.disk_mib
                await resident.set_up(wish, was=Was.IN_USE, grows=grows)
            await self._is_running(holding, Way.SNAPSHOT)
        except BaseException:
            await to_the_end(self._undo_roll_back(resident, before))
            raise
        await resident.body.tidy()

    async def _undo_roll_back(self, resident: Resident, before: Record) -> None:
        with suppress(SandyardError):
            await resident.end()
        resident.go_back_to(before)
        if resident.is_saved:
            resident.mark(Phase.PAUSED)
        else:
            resident.mark(Phase.DEAD, End(before.reason_code, before.reason_message))
        await resident.body.tidy()

    # --- still, and gone ------------------------------------------------------------------

    async def pause(self, holding: Holding) -> None:
        """Save a machine and end its process."""
        resident = holding.resident
        if resident.phase is Phase.PAUSED:  # it was saved, and its process would not go
            await resident.end()
        else:
            await resident.pause()

    async def snapshot(self, holding: Holding, folder: Path) -> None:
        """Save a machine, running or paused, to a new folder."""
        resident = holding.resident
        await resident.snapshot(folder)
        if resident.phase is Phase.RUNNING:
            # The guest's clock stood still with it.
            with suppress(SandyardError):
                await resident.guest.set_clock()

    async def remove(self, holding: Holding) -> None:
        """Remove a machine with all that it has."""
        for resident in holding.residents:
            await resident.end(removes=True)
        self._forget(holding)

    async def bury(self, holding: Holding) -> None:
        """Release what a machine had open that has ended by itself."""
        await holding.resident.end()


async def _woken(resident: Resident) -> None:
    """Wake a machine that goes on from its saved state."""
    try:
        await resident.guest.wake()
    except UnavailableError as error:
        # What is wrong with this host alone says nothing of the guest.
        if isinstance(error.__cause__, TimeoutError | EOFError | ConnectionError):
            raise AgentSilentError(error.text) from error
        raise


async def _boot_twice(resident: Resident) -> None:
    """Boot; one that stands still does so by chance, and a second one rarely does."""
    for attempt in (1, 2):
        try:
            await resident.raise_up()
        except DeadlineExceededError as error:
            if attempt == 2:
                raise InternalError(f"{error.message}, twice in a row") from error
            log.warning("a machine made no progress while booting; trying once more")
        else:
            return
