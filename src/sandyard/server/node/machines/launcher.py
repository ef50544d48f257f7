"""Brings machines up, holds them still, and takes them down: the hands of a node.

A unit is one machine with everything that is its own. Its body (disk, memory file and, while it
stands still, the saved state) outlives its process. Two rules keep a body whole, whatever is killed
when:

  - a saved state is published by one rename, after all of it is synced, and stays valid until it is
    withdrawn, which happens before the machine runs on: a published state is never behind its disk;
  - a record that says `running` beside a published state is of a machine that has not run on yet;
  - one that is not `is_awake` is of a machine that ran on and must not be used before it is woken.
"""

import asyncio
import contextlib
import errno
import logging
import os
import secrets
import shutil
from base64 import b64encode
from collections.abc import Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import MachineWish, Way
from sandyard.server.core.errors import (
    ConflictError,
    DamagedError,
    DeadlineExceededError,
    InternalError,
    NoCapacityError,
    SandyardError,
    UnavailableError,
    UnsupportedError,
)
from sandyard.server.core.ids import new_machine_id, new_secret
from sandyard.server.core.wire import AGENT_PORT, Op
from sandyard.server.drivers.contract import (
    Driver,
    End,
    Machine,
    MachineSpec,
    Place,
    Saved,
    SavingDriver,
    SavingMachine,
)
from sandyard.server.drivers.sparse import copy_sparse
from sandyard.server.node.agent import AgentLink
from sandyard.server.node.host.choice import Drivers
from sandyard.server.node.host.disks import Disks
from sandyard.server.node.host.network import Network
from sandyard.server.node.images.images import Image, Images
from sandyard.server.node.machines import saved as saving
from sandyard.server.node.machines.console import append_console
from sandyard.server.node.machines.records import Phase, Resident, Residents
from sandyard.server.node.machines.saved import About, SavedMachine
from sandyard.server.tasks import in_thread, to_the_end

log = logging.getLogger(__name__)

_DISK, _MEMORY, _SAVED, _SPENT, _RUN = "disk.ext4", "memory", "saved", "spent", "run"
_WAKE_LIMIT_S = 15.0
_CLOCK_ERROR_S = 0.04
_CLOCK_TRIES = 3
_SPARE_LIMIT_S = 5.0
PAUSED = ConflictError(
    "the sandbox was paused meanwhile; what was running in it goes on when it is resumed",
    status="paused",
)
_ENDED = ConflictError("the machine of the sandbox ended meanwhile", status="error")


@dataclass(frozen=True)
class NodeLimits:
    """How long a node waits, and how much it starts at once."""

    boot_s: float = 120.0
    no_progress_s: float = 25.0
    boots_at_once: int = 2
    restores_at_once: int = 4
    agent_s: float = 15.0
    watch_period_s: float = 2.0
    heartbeat_s: float = 5.0
    poll_s: float = 0.05
    uses_goldens: bool = True
    settle_s: float = 4.0


class Was(Enum):
    """What a machine was before it is set up, which says how much there is to mend."""

    NOBODYS = "nobodys"  # just booted, or restored from a golden machine
    UNIQUE = "unique"  # set up before, for nobody, and running ever since
    IN_USE = "in_use"  # a sandbox, with connections of its own


@dataclass(eq=False)
class Unit:
    """One machine, and what of it is open in this process."""

    record: Resident
    machine: Machine | None = None
    place: Place | None = None
    link: AgentLink | None = None
    watch: "asyncio.Task[None] | None" = None
    stall: End | None = None
    is_silent: bool = False
    is_still: bool = False
    answered_at: float = 0.0
    used_mib: tuple[float, int] = (-1e9, 0)  # when it was looked at, and what it was
    on_end: Callable[[End], object] | None = field(default=None, repr=False)


class Launcher:
    """See the module. One unit is never in two hands: whoever calls sees to that."""

    def __init__(
        self,
        *,
        images: Images,
        drivers: Drivers,
        network: Network,
        disks: Disks,
        residents: Residents,
        clock: Clock,
        limits: NodeLimits,
        key: bytes,
        host: str,
        on_change: Callable[[], None],
    ) -> None:
        self._images = images
        self._drivers = drivers
        self._network = network
        self._disks = disks
        self._residents = residents
        self._clock = clock
        self._limits = limits
        self._key = key
        self._host = host
        self._on_change = on_change
        self._tasks: asyncio.TaskGroup | None = None
        self._versions: dict[str, str] = {}

    def use(self, tasks: asyncio.TaskGroup | None) -> None:
        """Let what goes on beside the calls live in a task group, or in none any more."""
        self._tasks = tasks

    def beside(self, work: Coroutine[None, None, None]) -> None:
        """Do something beside that nobody waits for; how it fails is logged, and harms nothing."""
        if self._tasks is None:
            work.close()
        else:
            self._tasks.create_task(_quietly(work))

    def write(self, unit: Unit) -> None:
        """Write a unit's record."""
        self._residents.write(unit.record)

    # --- bodies ---------------------------------------------------------------------------

    def new_unit(self, wish: MachineWish, image: Image, driver: Driver) -> Unit:
        """Return a unit for a new machine; nothing of it is on the host yet."""
        return Unit(
            Resident(
                id=new_machine_id(),
                sandbox_id=wish.sandbox_id,
                incarnation=wish.incarnation,
                phase=Phase.STARTING,
                slot=-1,
                template=wish.template,
                image=image.digest,
                driver=driver.name,
                os=image.os,
                vcpus=wish.shape.vcpus,
                memory_mib=wish.shape.memory_mib,
                disk_mib=wish.shape.disk_mib,
                token=new_secret(),
            )
        )

    def body(self, record: Resident) -> Path:
        """Return the folder of a machine's body."""
        return self._residents.folder(record.id) / record.body

    def saved_folder(self, record: Resident) -> Path:
        """Return where the saved state of a machine that stands still is published."""
        return self.body(record) / _SAVED

    def is_saved(self, record: Resident) -> bool:
        """Tell whether a machine's saved state is published."""
        return self.saved_folder(record).is_dir()

    async def make_body(
        self, unit: Unit, source: SavedMachine | None, *, is_recorded: bool = True
    ) -> None:
        """Make the body of a unit: a clone of a saved machine, else an empty disk.

        The record is written first; without `is_recorded` the one on disk stays as it is.

        Raises:
            NoCapacityError: the host's disk is full.
            DamagedError: the saved machine is not as it was.
        """
        if is_recorded:
            await in_thread(self._residents.write, unit.record)
        body = self.body(unit.record)
        part = body.with_name(body.name + ".part")
        for left in (body, part):
            await in_thread(shutil.rmtree, left, ignore_errors=True)
        part.mkdir(mode=0o710)
        if source is None:
            await self._disks.make(part / _DISK, size_mib=unit.record.disk_mib, uid=os.geteuid())
        else:
            try:
                await in_thread(saving.check, source, whole=False)
                await in_thread(_link, source.state.memory, part / _MEMORY)
                await in_thread(saving.copy_state, source.state, part / _SAVED)
                await self._disks.copy(source.disk, part / _DISK)
            except (ConflictError, FileNotFoundError) as error:
                raise DamagedError(f"cannot clone a saved machine: {error}") from error
        # A clone's state needs no syncing: were it lost, so would be who wants it.
        part.rename(body)

    # --- up -------------------------------------------------------------------------------

    async def raise_up(
        self,
        unit: Unit,
        *,
        token: str | None = None,
        is_ahead: bool = False,
        is_recorded: bool = True,
    ) -> Way:
        """Bring a unit's body to life and return once its agent answers; it is held up by nobody.

        From its saved state if it has one: then `token` is what the agent in there accepts, and the
        agent still has to be woken or set up. A state that was used is withdrawn; until then a
        failure leaves it whole, and from then on the machine lives, even if this is cancelled.
        Without `is_recorded` the record on disk stays as it is: to be found is then another's.

        Raises:
            DamagedError: the saved state does not fit.
            DeadlineExceededError: the guest made no progress.
            InternalError, UnavailableError: it could not be started.
        """
        record = unit.record
        image = self._images.find(record.image)
        driver = self._drivers.named(record.driver)
        if image is None or driver is None:
            raise UnavailableError(
                f"cannot start the machine: its {'image' if driver else 'driver'} is not here"
            )
        saved = self.saved_folder(record)
        is_saved = saved.is_dir()
        async with AsyncExitStack() as held:
            place = unit.place = await self._network.take()
            held.push_async_callback(self._vacate, unit)
            unit.record = replace(
                record, slot=place.number, token=token or new_secret(), handle=None
            )
            spec = await self._spec(unit, image, place, is_ahead=is_ahead)
            if is_saved:
                assert driver.capabilities.saves
                saver: SavingDriver = driver  # type: ignore[assignment]  # as it says of itself
                try:
                    machine = await saver.restore(spec, Saved(saved), held)
                except ConflictError as error:
                    raise DamagedError(error.message) from error
                await to_the_end(self._run_on(unit, machine, held, is_recorded=is_recorded))
            else:
                unit.machine = await driver.start(spec, held)
                unit.record = replace(unit.record, handle=dict(unit.machine.handle))
                await in_thread(self._residents.write, unit.record)
                unit.link = self._link(unit)
                await self._await_agent(unit, unit.machine, unit.link)
                unit.answered_at = self._clock.monotonic()
                held.pop_all()
        return Way.RESTORE if is_saved else Way.BOOT

    async def _spec(self, unit: Unit, image: Image, place: Place, *, is_ahead: bool) -> MachineSpec:
        record = unit.record
        folder, body = self._residents.folder(record.id), self.body(record)
        run = folder / _RUN
        await in_thread(shutil.rmtree, run, ignore_errors=True)
        run.mkdir(mode=0o700)
        with contextlib.suppress(PermissionError):  # without root (fake machines) it is ours
            os.chown(run, place.uid, place.uid)
            # The account may use what is in the body, not change what the body consists of.
            os.chown(body, 0, place.uid)
            os.chown(body / _DISK, place.uid, place.uid)
        return MachineSpec(
            name=record.id,
            vcpus=record.vcpus,
            memory_mib=record.memory_mib,
            kernel=image.kernel,
            initrd=image.initrd,
            base=image.base,
            disk=body / _DISK,
            memory=body / _MEMORY,
            folder=run,
            place=place,
            token=record.token,
            is_ahead=is_ahead,
        )

    async def _run_on(
        self, unit: Unit, machine: SavingMachine, held: AsyncExitStack, *, is_recorded: bool
    ) -> None:
        """Note that the machine is what counts from now on, not its saved state, and let it run."""
        was_new = unit.record.phase in (Phase.STARTING, Phase.WAITING)
        unit.record = replace(unit.record, handle=dict(machine.handle), is_awake=False)
        if not was_new:
            unit.record = unit.record.with_phase(Phase.RUNNING)
        if is_recorded:
            await in_thread(self._residents.write, unit.record)
        await self.forget_saved(unit)
        await machine.resume()
        unit.machine = machine
        unit.link = self._link(unit)
        unit.answered_at = self._clock.monotonic()
        held.pop_all()
        self.beside(self._remove_spent(unit.record))

    async def forget_saved(self, unit: Unit) -> None:
        """Withdraw a unit's saved state, if it has one, because the machine is about to run on."""
        saved = self.saved_folder(unit.record)
        await in_thread(saving.withdraw, saved, saved.with_name(_SPENT))

    async def _remove_spent(self, record: Resident) -> None:
        await in_thread(shutil.rmtree, self.body(record) / _SPENT, ignore_errors=True)

    async def _vacate(self, unit: Unit) -> None:
        if unit.link is not None:
            unit.link.cut(_ENDED)
        unit.machine = unit.link = None
        await self._leave_place(unit)
        unit.record = replace(unit.record, slot=-1, handle=None)

    async def _leave_place(self, unit: Unit) -> None:
        """Give a unit's place back, whose process has ended."""
        # Taken first: nobody who comes while this waits may give it back once more.
        place, unit.place = unit.place, None
        if place is None:
            return
        try:
            await in_thread(self.disown, unit.record)
            await self._network.give_back(place)
        except BaseException:
            unit.place = place
            raise

    def disown(self, record: Resident) -> None:
        """Take a body from the account that its machine ran under: the next to have it is
        another's."""
        body = self.body(record)
        for path in (body, body / _DISK):
            with contextlib.suppress(FileNotFoundError, PermissionError):
                os.chown(path, os.geteuid(), os.getegid(), follow_symlinks=False)

    async def tidy(self, record: Resident) -> None:
        """Remove what work that was broken off left beside a machine's body and its state."""
        body = self.body(record)
        left = [one for one in self._residents.folder(record.id).glob("body-*") if one != body]
        for one in (*left, body / _SPENT, body / "saved.part"):
            await in_thread(shutil.rmtree, one, ignore_errors=True)

    def _link(self, unit: Unit) -> AgentLink:
        place = unit.place
        assert place is not None
        folder = self._residents.folder(unit.record.id) / _RUN
        return AgentLink(
            lambda limit_s: self._network.dial(place, AGENT_PORT, folder=folder, limit_s=limit_s),
            unit.record.token,
            self._clock,
        )

    async def keep_spare(self, unit: Unit) -> None:
        """Have a connection to a unit's agent ready for what is asked next."""
        if unit.link is not None and not unit.is_still:
            await unit.link.open_spare(_SPARE_LIMIT_S)

    async def _await_agent(self, unit: Unit, machine: Machine, link: AgentLink) -> None:
        """Return once the agent answers.

        Raises:
            DeadlineExceededError: the guest makes no progress, or its time is over.
            InternalError: the machine ended.
        """
        assert self._tasks is not None
        folder = self._residents.folder(unit.record.id)
        started = progressed = self._clock.monotonic()
        ending = self._tasks.create_task(_end_of(machine))
        try:
            while True:
                with contextlib.suppress(UnavailableError):
                    await link.ask(Op.HELLO, limit_s=10.0, dial_s=0.2)
                    return
                said = await machine.console()
                append_console(folder, said)
                now = self._clock.monotonic()
                progressed = now if said else progressed
                if ending.done():
                    message = ending.result().message
                    raise InternalError(f"the machine ended while it started: {message}")
                if now - progressed > self._limits.no_progress_s:
                    raise DeadlineExceededError(
                        f"the machine made no progress for {self._limits.no_progress_s:g} s"
                    )
                if now - started > self._limits.boot_s:
                    raise DeadlineExceededError(
                        f"the agent did not answer within {self._limits.boot_s:g} s"
                    )
                await self._clock.sleep(self._limits.poll_s)
        finally:
            ending.cancel()

    # --- the agent ------------------------------------------------------------------------

    async def wake(self, unit: Unit, *, limit_s: float = _WAKE_LIMIT_S) -> None:
        """Mend clock, randomness and connections of a machine that stood still.

        Raises:
            UnavailableError, InternalError, InvalidArgumentError: it cannot be, and the machine
                must not be used.
        """
        asked_at = self._clock.monotonic()
        await self._link_of(unit).ask(Op.WAKE, self._waking(), limit_s=limit_s)
        await self._correct_clock(unit, asked_at)

    async def set_clock(self, unit: Unit) -> None:
        """Set the clock of a machine that was held still and lost no connection by that."""
        args = {**self._waking(), "keepsConnections": True}
        await self._link_of(unit).ask(Op.WAKE, args, limit_s=_WAKE_LIMIT_S)

    async def set_up(
        self,
        unit: Unit,
        wish: MachineWish,
        *,
        was: Was,
        grows: bool = False,
        limit_s: float = _WAKE_LIMIT_S,
    ) -> None:
        """Make a machine the wished sandbox, unlike every other; see `wake` for what is raised."""
        link = self._link_of(unit)
        asked_at = self._clock.monotonic()
        token = new_secret()
        size: dict[str, object] = {}
        if grows:
            machine: SavingMachine = unit.machine  # type: ignore[assignment]  # it was cloned
            await machine.grow_disk(wish.shape.disk_mib)
            size = {"diskBytes": wish.shape.disk_mib * 2**20}
        await link.ask(
            Op.SETUP,
            {
                **(self._waking() if was is not Was.UNIQUE else {}),
                **({"machineId": secrets.token_hex(16)} if was is not Was.UNIQUE else {}),
                "keepsConnections": was is not Was.IN_USE,
                **size,
                "hostname": wish.hostname,
                "env": dict(wish.env),
                "token": token,
                "authorizedKeys": "".join(f"{key}\n" for key in wish.authorized_keys),
                "passwordHash": wish.root_password_hash,
            },
            limit_s=limit_s,
        )
        link.token = token
        unit.record = replace(unit.record, token=token, disk_mib=wish.shape.disk_mib)
        if was is Was.UNIQUE:
            unit.answered_at = self._clock.monotonic()
        else:
            await self._correct_clock(unit, asked_at)

    async def _correct_clock(self, unit: Unit, asked_at: float) -> None:
        """Set a guest's clock once more if the message that did was long under way.

        The first message to a machine that has just been restored may take a tenth of a second to
        arrive, and the clock is late by that.
        """
        for _ in range(_CLOCK_TRIES):
            now = self._clock.monotonic()
            unit.answered_at = now
            if now - asked_at < _CLOCK_ERROR_S:
                return
            asked_at = now
            await self.set_clock(unit)

    def _waking(self) -> dict[str, object]:
        return {
            "entropy": b64encode(os.urandom(64)).decode(),
            "wallNs": int(self._clock.now().timestamp() * 1e9),
        }

    def _link_of(self, unit: Unit) -> AgentLink:
        if unit.link is None:
            raise _ENDED
        return unit.link

    # --- still ----------------------------------------------------------------------------

    async def pause(self, unit: Unit) -> None:
        """Save a running machine and end its process; on failure it runs on.

        Raises:
            UnsupportedError: its driver cannot.
            NoCapacityError: the host's disk is full.
            UnavailableError, InternalError: it cannot be saved now.
        """
        machine = self._saving_machine(unit)
        body = self.body(unit.record)
        part = body / "saved.part"
        await in_thread(shutil.rmtree, part, ignore_errors=True)
        unit.is_still = True
        try:
            await machine.pause()
            state = await machine.save(part)
            about = await self.about(unit, kind="paused")
            beside = (body / _DISK, body / _MEMORY)
            await in_thread(saving.seal, state.folder, about, key=self._key, beside=beside)
            await in_thread(saving.publish, part, body / _SAVED)
        except BaseException as error:
            await to_the_end(self._go_on(unit, machine, part))
            if isinstance(error, OSError):
                raise _translated(error) from error
            raise
        finally:
            unit.is_still = False
        await to_the_end(self._settle_paused(unit))

    async def _go_on(self, unit: Unit, machine: SavingMachine, part: Path) -> None:
        """Let a machine run on whose saving failed; what was published is withdrawn first."""
        await in_thread(shutil.rmtree, part, ignore_errors=True)
        await self.forget_saved(unit)
        await self._remove_spent(unit.record)
        try:
            await machine.resume()
        except SandyardError:
            log.exception("a machine that could not be saved does not go on")

    async def _settle_paused(self, unit: Unit) -> None:
        if unit.link is not None:
            unit.link.cut(PAUSED)
        unit.record = unit.record.with_phase(Phase.PAUSED)
        await in_thread(self._residents.write, replace(unit.record, slot=-1, handle=None))
        if unit.machine is not None:
            await unit.machine.stop()
            unit.machine = None
        await in_thread(self.disown, unit.record)
        # Its memory is free; nobody waits for the slot to be taken apart.
        place, unit.place = unit.place, None
        if place is not None:
            self.beside(self._give_back(place))
        await self.end(unit)

    async def _give_back(self, place: Place) -> None:
        try:
            await self._network.give_back(place)
        except (SandyardError, OSError):
            log.exception("a network slot cannot be taken apart; the next start does it")

    async def snapshot(self, unit: Unit, folder: Path, *, kind: str = "snapshot") -> SavedMachine:
        """Save a machine, running or paused, to a new folder, and let it go on as it was.

        The guest is held still while its memory and disk are copied; the rest is done beside it.

        Raises: see `pause`.
        """
        part = folder.with_name(folder.name + ".part")
        await in_thread(shutil.rmtree, part, ignore_errors=True)
        part.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            await self._copy_out(unit, part)
            driver: SavingDriver = self._drivers.named(unit.record.driver)  # type: ignore[assignment]
            await driver.make_whole(Saved(part), self.body(unit.record) / _MEMORY)
            about = await self.about(unit, kind=kind)
            made = await in_thread(saving.seal, part, about, key=self._key)
            await in_thread(saving.publish, part, folder)
        except BaseException as error:
            await in_thread(shutil.rmtree, part, ignore_errors=True)
            if isinstance(error, OSError):
                raise _translated(error) from error
            raise
        return replace(made, folder=folder)

    async def _copy_out(self, unit: Unit, part: Path) -> None:
        disk = self.body(unit.record) / _DISK
        if unit.record.phase is Phase.PAUSED:
            state = self.load_saved(unit)
            # What is sealed anew must be what was sealed before.
            await self.check_saved(state, whole=True)
            await in_thread(saving.copy_state, state, part)
            await self._disks.copy(disk, part / _DISK, sync=True)
            return
        machine = self._saving_machine(unit)
        unit.is_still = True
        try:
            await machine.pause()
            await machine.save(part)
            await self._disks.copy(disk, part / _DISK, sync=True)
        finally:
            unit.is_still = False
            await to_the_end(machine.resume())

    def load_saved(self, unit: Unit) -> SavedMachine:
        """Return the published state of a machine that stands still.

        Raises:
            DamagedError: it is not whole, or does not fit.
        """
        try:
            return saving.load(self.saved_folder(unit.record), key=self._key)
        except ConflictError as error:
            raise DamagedError(f"cannot use the saved state: {error.message}") from error

    async def check_saved(self, state: SavedMachine, *, whole: bool) -> None:
        """Return if a saved machine is as it was and fits this host.

        Raises:
            DamagedError: it is not, or does not.
        """
        driver = self._drivers.named(state.about.driver)
        try:
            if driver is None:
                raise ConflictError(f"the driver {state.about.driver} is not here")
            saving.refuse_other(
                state.about,
                driver=driver.name,
                version=await self.version(driver),
                host=self._host,
            )
            await in_thread(saving.check, state, whole=whole)
        except ConflictError as error:
            raise DamagedError(f"cannot use what was saved: {error.message}") from error

    async def about(self, unit: Unit, *, kind: str) -> About:
        """Return what a saved state of this unit is of."""
        record = unit.record
        driver = self._drivers.named(record.driver)
        return About(
            kind=kind,
            template=record.template,
            image=record.image,
            os=record.os,
            vcpus=record.vcpus,
            memory_mib=record.memory_mib,
            disk_mib=record.disk_mib,
            driver=record.driver,
            driver_version=await self.version(driver) if driver else "",
            host=self._host,
            token=record.token,
        )

    async def version(self, driver: Driver) -> str:
        """Return a driver's version, as found when it was first asked for."""
        if driver.name not in self._versions:
            self._versions[driver.name] = await driver.version()
        return self._versions[driver.name]

    def _saving_machine(self, unit: Unit) -> SavingMachine:
        driver = self._drivers.named(unit.record.driver)
        if driver is None or not driver.capabilities.saves:
            raise UnsupportedError(f"cannot save a machine of {unit.record.driver}")
        if unit.machine is None:
            raise ConflictError("cannot save a machine that does not run", status="error")
        return unit.machine  # type: ignore[return-value]  # as its driver says

    # --- watched, and down ----------------------------------------------------------------

    def start_watch(self, unit: Unit) -> None:
        """Watch over a running machine until it ends: its console, its stalls, its agent."""
        assert self._tasks is not None
        assert unit.machine is not None
        unit.watch = self._tasks.create_task(self._watch(unit, unit.machine))

    async def _watch(self, unit: Unit, machine: Machine) -> None:
        try:
            end = await self._watch_until_end(unit, machine)
        except Exception:  # a watch that fails must not take the node's other machines along
            log.exception("a machine is no longer watched")
            return
        if unit.machine is machine and unit.on_end is not None:
            unit.watch = None
            unit.on_end(end)

    async def _watch_until_end(self, unit: Unit, machine: Machine) -> End:
        folder = self._residents.folder(unit.record.id)
        async with asyncio.TaskGroup() as tasks:
            ending = tasks.create_task(machine.wait())
            beating = tasks.create_task(self._beat(unit))
            while not ending.done():
                append_console(folder, await machine.console())
                stall = await machine.stall()
                if stall != unit.stall:
                    unit.stall = stall
                    self._on_change()
                await asyncio.wait([ending], timeout=self._limits.watch_period_s)
            beating.cancel()
        append_console(folder, await machine.console())
        return ending.result()

    async def _beat(self, unit: Unit) -> None:
        """Ask the agent now and then whether it is there; two silences in a row are told."""
        missed = 0
        while True:
            await self._clock.sleep(self._limits.heartbeat_s)
            missed = 0 if await self._answers(unit) else missed + 1
            if unit.is_silent != (missed >= 2):
                unit.is_silent = missed >= 2
                self._on_change()

    async def _answers(self, unit: Unit) -> bool:
        """Tell whether the agent answers, or need not because the machine is held still."""
        if unit.stall is None and not unit.is_still and unit.link is not None:
            try:
                await unit.link.ask(Op.HELLO, limit_s=self._limits.heartbeat_s)
            except (UnavailableError, InternalError):
                return _stands_still(unit)
            except ConflictError:  # it has ended, which its watch will tell
                return True
            unit.answered_at = self._clock.monotonic()
        return True

    async def end(self, unit: Unit, *, removes: bool = False) -> None:
        """Release process and place; with `removes`, all that is on disk too. May be repeated.

        Raises:
            UnavailableError: something would not go.
        """
        if unit.link is not None:
            unit.link.cut(_ENDED)
            unit.link = None
        if unit.watch is not None and unit.watch is not asyncio.current_task():
            unit.watch.cancel()
            await asyncio.wait([unit.watch])
        unit.watch = None
        if unit.machine is not None:
            await unit.machine.stop()
            unit.machine = None
        await self._leave_place(unit)
        unit.is_silent, unit.stall = False, None
        unit.record = replace(unit.record, slot=-1, handle=None)
        if removes:
            await in_thread(self._residents.remove, unit.record.id)

    async def let_go(self, unit: Unit) -> None:
        """Let go of a running machine, which lives on."""
        if unit.watch is not None:
            unit.watch.cancel()
            await asyncio.wait([unit.watch])
        if unit.link is not None:
            unit.link.close()
        if unit.machine is not None:
            await unit.machine.detach()

    async def recover(self, unit: Unit) -> bool:
        """Find the machine behind a unit's record; False if it has died."""
        record = unit.record
        driver = self._drivers.named(record.driver)
        if driver is None or record.handle is None:
            return False
        held = AsyncExitStack()
        machine = await driver.recover(record.handle, held)
        if machine is None:
            await held.aclose()
            return False
        held.pop_all()
        unit.machine = machine
        unit.place = self._network.place(record.slot)
        unit.link = self._link(unit)
        return True

    async def let_run(self, unit: Unit) -> None:
        """Let an adopted machine go on if it stands still."""
        machine = self._saving_machine(unit)
        if await machine.is_paused():
            await machine.resume()

    async def unfreeze(self, unit: Unit) -> None:
        """Let an adopted machine go on that an earlier process held still, and set its clock."""
        machine: SavingMachine = unit.machine  # type: ignore[assignment]  # as its driver says
        try:
            if await machine.is_paused():
                log.warning("a machine that was held still goes on")
                await machine.resume()
                self.beside(self._set_clock_quietly(unit))
        except SandyardError:
            log.exception("a machine that is held still does not go on")

    async def _set_clock_quietly(self, unit: Unit) -> None:
        with contextlib.suppress(SandyardError):
            await self.set_clock(unit)


async def _quietly(work: Coroutine[None, None, None]) -> None:
    # Raised here it would end the whole node. A machine that is deleted meanwhile is no trouble.
    try:
        await work
    except SandyardError as error:
        log.debug("what was done beside came to nothing: %s", error.message)
    except Exception:
        log.exception("what was done beside failed")


def _link(source: Path, target: Path) -> None:
    """Make a file known by another name; across file systems, copy it."""
    try:
        target.hardlink_to(source)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        copy_sparse(source, target)
        target.chmod(0o444)


def _stands_still(unit: Unit) -> bool:
    return unit.is_still or unit.stall is not None


async def _end_of(machine: Machine) -> End:
    """Return how a machine ended; a watch that fails is told as its end."""
    try:
        return await machine.wait()
    except Exception as error:  # noqa: BLE001 - raised here it would end the whole node
        return End("machine_died", f"the machine can no longer be watched: {error}")


def _translated(error: OSError) -> SandyardError:
    if error.errno in (28, 122):
        return NoCapacityError("cannot save the machine: the host's disk is full; free some space")
    return InternalError(f"cannot save the machine: {error}")
