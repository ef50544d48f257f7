"""One machine of a node, and the only writer of its record, its files and what is open of it.

Rules that keep it whole, whatever is killed when:

  - the record is written before anything is taken, and removed after all is given back;
  - a record that says `running` beside a published state is of a machine that has not run on yet;
  - one that says `waking` is of a machine that ran on and must not be used before it is woken.

One resident is never in two hands: whoever calls sees to that.
"""

import asyncio
import logging
import shutil
from collections.abc import Callable
from contextlib import AsyncExitStack, suppress
from dataclasses import replace
from pathlib import Path

from sandyard.server.core.codec import encode
from sandyard.server.core.contracts.node import MachineFact, MachineWish, Phase, Way
from sandyard.server.core.errors import (
    ConflictError,
    DeadlineExceededError,
    InternalError,
    MachineDeadError,
    NoCapacityError,
    SandyardError,
    UnsupportedError,
)
from sandyard.server.core.ids import new_machine_id, new_secret
from sandyard.server.core.shapes import Shape
from sandyard.server.core.wire import AGENT_PORT
from sandyard.server.drivers.background import Entry
from sandyard.server.drivers.contract import Driver, End, Machine, Place, SavingMachine
from sandyard.server.node.agent import AgentLink
from sandyard.server.node.exports.shares import Share, new_share
from sandyard.server.node.host.admission import promise_of
from sandyard.server.node.host.ledger import Promise, nobody_counts
from sandyard.server.node.images.images import Image
from sandyard.server.node.machines import pause, start
from sandyard.server.node.machines.body import Body
from sandyard.server.node.machines.guest import WAKE_LIMIT_S, Guest, Was
from sandyard.server.node.machines.means import Means
from sandyard.server.node.machines.records import Record
from sandyard.server.node.machines.saved import SavedMachine
from sandyard.server.node.machines.watch import end_of, look, watch
from sandyard.server.tasks import Work, beside, in_thread, to_the_end

log = logging.getLogger(__name__)

_USED_S = 15.0
_MOUNT_S = 30.0
_SHUT_DOWN_S = 10.0
_GO_ON_AGAIN_S = (1.0, 5.0, 30.0, 120.0, 600.0)
_GIVE_BACK_AGAIN_S = (1.0, 5.0, 30.0, 120.0)
_GROWTH_S_A_GIB = 0.25
_POWER_OFF = "/run/sandyard/base/usr/bin/busybox poweroff"
_NOWHERE = -1
_PAUSED = ConflictError(
    "the sandbox was paused meanwhile; what was running in it goes on when it is resumed",
    status="paused",
)


class Resident:
    """See the module."""

    def __init__(self, record: Record, means: Means) -> None:
        self.counted = nobody_counts
        self.__record = record
        self.__machine: Machine | None = None
        self._means = means
        self._place: Place | None = None
        self._watching: asyncio.Task[None] | None = None
        self._on_end: Callable[[End], None] | None = None
        self.guest = Guest(means)
        self._used_mib = (-_USED_S, 0)  # when it was looked at, and what it was

    @classmethod
    def new(cls, wish: MachineWish, image: Image, driver: Driver, means: Means) -> "Resident":
        """Return a machine to be; nothing of it is on the host yet."""
        return cls(
            Record(
                id=new_machine_id(),
                sandbox_id=wish.sandbox_id,
                incarnation=wish.incarnation,
                version=wish.version,
                phase=Phase.STARTING,
                slot=_NOWHERE,
                template=wish.template,
                image=image.digest,
                driver=driver.name,
                os=image.os,
                vcpus=wish.shape.vcpus,
                memory_mib=wish.shape.memory_mib,
                disk_mib=wish.shape.disk_mib,
                token=new_secret(),
            ),
            means,
        )

    @property
    def _record(self) -> Record:
        return self.__record

    @_record.setter
    def _record(self, record: Record) -> None:
        self.__record = record
        self.counted()

    @property
    def _machine(self) -> Machine | None:
        return self.__machine

    @_machine.setter
    def _machine(self, machine: Machine | None) -> None:
        self.__machine = machine
        self.counted()

    # --- what it is -----------------------------------------------------------------------

    @property
    def record(self) -> Record:
        """What is written down of it."""
        return self._record

    @property
    def phase(self) -> Phase:
        """How far it has come."""
        return self._record.phase

    @property
    def shape(self) -> Shape:
        """What it was promised."""
        return self._record.shape

    @property
    def body(self) -> Body:
        """Its files."""
        return Body(self._means.records.folder(self._record.id), self._record.body)

    @property
    def is_up(self) -> bool:
        """Whether it has a process."""
        return self._machine is not None

    @property
    def is_saved(self) -> bool:
        """Whether its saved state is published."""
        return self.body.is_saved

    def has_answered(self, *, since: float) -> bool:
        """Tell whether it is well, and its agent has answered since then."""
        pulse = self.guest.pulse
        is_well = self.is_up and not pulse.is_silent and pulse.why_still is None
        return is_well and pulse.answered_at >= since

    def promised(self, now: float) -> Promise:
        """See node.host.ledger.Counted.promised; one that stands still has no memory."""
        promise = promise_of(self.shape, used_mib=self._used(now))
        return replace(promise, memory_mib=0) if self.is_down else promise

    @property
    def is_down(self) -> bool:
        """Whether it stands still, and nothing runs."""
        return self.phase in (Phase.PAUSED, Phase.DEAD) and not self.is_up

    def _used(self, now: float) -> int:
        """Return what its body takes on disk, as it was a moment ago: to look costs more than it
        is worth whenever something changes."""
        looked_at, used = self._used_mib
        if now - looked_at >= _USED_S:
            used = self.body.used_mib
            self._used_mib = (now, used)
        return used

    def fact(self, *, way: Way | None) -> MachineFact:
        """Return what its node tells of it."""
        record, runs = self._record, self.phase is Phase.RUNNING
        # A start that failed, and whose remains would not go, is nothing that is coming up.
        phase = Phase.DEAD if self.phase is Phase.STARTING else self.phase
        stall = self.guest.pulse.why_still if runs else None
        return MachineFact(
            sandbox_id=record.sandbox_id,
            incarnation=record.incarnation,
            phase=phase,
            is_silent=runs and self.guest.pulse.is_silent,
            is_used=self.guest.is_used,
            ip=self._place.ip if self._place else None,
            driver=record.driver,
            os=record.os,
            way=way,
            reason_code=stall.code if stall else record.reason_code,
            reason_message=stall.message if stall else record.reason_message,
        )

    # --- its record -----------------------------------------------------------------------

    async def enter(self, phase: Phase, end: End | None = None) -> None:
        """Go over to another phase, and have that written down."""
        self._set_phase(phase, end)
        await self._note(self._record)

    async def _note(self, record: Record) -> None:
        """Have a record on disk, where it outlives the host's end too if it would be missed."""
        is_missed = record.phase not in (Phase.STARTING, Phase.WAITING)
        await in_thread(self._means.records.write, record, syncs=is_missed)

    def mark(self, phase: Phase, end: End | None = None) -> None:
        """Go over to another phase; if that cannot be written down, the next look mends it."""
        self._set_phase(phase, end)
        try:
            self._means.records.write(self._record)
        except OSError:
            log.exception("a machine's record cannot be written; the next look mends it")

    def _set_phase(self, phase: Phase, end: End | None) -> None:
        code, message = (end.code, end.message) if end else ("", "")
        self._record = self._record.with_phase(phase, code=code, message=message)

    def count_as(self, incarnation: int) -> None:
        """Be the machine of this incarnation of its sandbox from now on."""
        self._record = replace(self._record, incarnation=incarnation)

    def show(self, version: int) -> None:
        """Note the latest version of the sandbox's row that a wish was made of."""
        if version > self.__record.version:
            self.__record = replace(self.__record, version=version)

    def serve(self, wish: MachineWish) -> None:
        """Be the wished sandbox's from now on, having waited for whoever comes."""
        self._on_end = None
        self._record = replace(
            self._record,
            sandbox_id=wish.sandbox_id,
            incarnation=wish.incarnation,
            version=wish.version,
            phase=Phase.STARTING,
        )
        if self._machine is not None:
            self._machine.come_forward()

    def begin_other_body(self, incarnation: int, disk_mib: int) -> Record:
        """Have another body beside its own, for a machine that may come to nothing; the record that
        `go_back_to` takes is returned, and stays on disk until `enter`."""
        before = self._record
        name = f"body-{incarnation}"
        self._record = replace(
            before,
            incarnation=incarnation,
            mounted=None,  # what the snapshot's guest has mounted is not gone on with
            body=name if name != before.body else f"{name}-again",
            disk_mib=disk_mib,
        )
        return before

    def go_back_to(self, before: Record) -> None:
        """Have the body and the record of before again; nothing may be open of the other."""
        version = max(before.version, self._record.version)
        self._record = replace(before, slot=_NOWHERE, handle=None, version=version)

    # --- up -------------------------------------------------------------------------------

    async def make_body(self, source: SavedMachine | None, *, is_recorded: bool = True) -> None:
        """Make its body: a clone of a saved machine, else an empty disk.

        The record is written first; without `is_recorded` the one on disk stays as it is.

        Raises:
            NoCapacityError: the host's disk is full.
            DamagedError: the saved machine is not as it was.
        """
        if is_recorded:
            await self._note(self._record)
        await self.body.make(source, self._means.disks, disk_mib=self._record.disk_mib)

    async def raise_up(
        self,
        *,
        token: str | None = None,
        background: Entry | None = None,
        is_recorded: bool = True,
    ) -> None:
        """Bring its body to life and return once its agent answers; nobody watches it yet.

        From its saved state if it has one: then `token` is what the agent in there accepts, and the
        agent still has to be woken or set up. A state that was used is withdrawn; until then a
        failure leaves it whole, and from then on the machine lives, even if this is cancelled.
        Without `is_recorded` the record on disk stays as it is: to be found is then another's.

        Raises:
            DamagedError: the saved state does not fit.
            DeadlineExceededError: the guest made no progress.
            InternalError, UnavailableError: it could not be started.
        """
        kit = start.kit_of(self._record, self._means)
        is_saved = self.is_saved
        async with AsyncExitStack() as held:
            place = self._place = await self._means.network.take()
            held.push_async_callback(self._vacate)
            self._record = replace(
                self._record, slot=place.number, token=token or new_secret(), handle=None
            )
            spec = await start.spec_of(self._record, self.body, kit, place, background=background)
            if is_saved and (share := self._record.share) is not None:
                # It goes on with what it has mounted: before it does, its server must be there.
                await self._means.exports.grant(place, share)
            if is_saved:
                still = await start.restored(kit, spec, self.body, held)
                await to_the_end(self._run_on(still, held, is_recorded=is_recorded))
                return
            machine = self._machine = await kit.driver.start(spec, held)
            self._record = replace(self._record, handle=dict(machine.handle))
            await self._note(self._record)
            link = self._new_link(place)
            self.guest.meet(link, has_answered=False)
            await start.await_agent(machine, link, self.body, self._means)
            self.guest.note_answer()
            held.pop_all()

    async def _run_on(
        self, machine: SavingMachine, held: AsyncExitStack, *, is_recorded: bool
    ) -> None:
        """Note that the machine is what counts from now on, not its saved state, and let it run."""
        assert self._place is not None
        self._record = replace(self._record, handle=dict(machine.handle))
        if self.phase is not Phase.STARTING:
            self._set_phase(Phase.WAKING, None)
        if is_recorded:
            await self._note(self._record)
        await self.body.withdraw()
        await machine.resume()
        self._machine = machine
        self.guest.meet(self._new_link(self._place), has_answered=True)
        held.pop_all()
        self._beside(self.body.remove_spent(), "what a resume left cannot be removed")

    async def _vacate(self) -> None:
        self.guest.leave()
        self._machine = None
        await self._leave_place()
        self._record = replace(self._record, slot=_NOWHERE, handle=None)

    async def _leave_place(self) -> None:
        """Give its place back; its process has ended."""
        # Taken first: nobody who comes while this waits may give it back once more.
        place, self._place = self._place, None
        if place is None:
            return
        try:
            await in_thread(self.body.take_back)
            await self._give_back(place)
        except BaseException:
            self._place = place
            raise

    async def _give_back(self, place: Place) -> None:
        await self._means.exports.revoke(place)
        await self._means.network.give_back(place)

    async def _give_back_in_time(self, place: Place) -> None:
        """Give a place back that is nobody's by now, however often that takes: a busy host may not
        get to it within its limits."""
        for pause_s in _GIVE_BACK_AGAIN_S:
            try:
                await self._give_back(place)
            except (SandyardError, OSError) as error:
                log.warning("a slot cannot be taken apart yet: %s", error)
                await self._means.clock.sleep(pause_s)
            else:
                return
        await self._give_back(place)

    def _new_link(self, place: Place) -> AgentLink:
        network, folder = self._means.network, self.body.run
        return AgentLink(
            lambda limit_s: network.dial(place, AGENT_PORT, folder=folder, limit_s=limit_s),
            self._record.token,
            self._means.clock,
        )

    async def break_when_it_ends(self) -> None:
        """Raise once its process has ended; for what would wait for its agent until a limit.

        Raises:
            InternalError: it ended.
        """
        if self._machine is not None:
            end = await end_of(self._machine)
            raise InternalError(f"the machine ended: {end.message}")

    async def break_when_it_is_stuck(self, limit_s: float) -> None:
        """Raise once its process has ended, or has had a processor for `limit_s`
        (`start.use_up`).

        Raises:
            DeadlineExceededError: its time is over.
            InternalError: it ended.
        """
        if self._machine is not None:
            async with beside(self.break_when_it_ends()):
                await start.use_up(self._machine, limit_s, self._means)
            raise DeadlineExceededError(f"the machine made no progress for {limit_s:g} s")

    async def set_up(
        self, wish: MachineWish, *, was: Was, grows: bool = False, limit_s: float | None = None
    ) -> None:
        """Make it the wished sandbox, with its disk grown first if need be, and what it wishes to
        have mounted; see `Guest.set_up` and `Exports.grant`."""
        if limit_s is None:
            limit_s = self._means.patience(WAKE_LIMIT_S)
        if grows:
            await self._saving_machine().grow_disk(wish.shape.disk_mib)
            # The guest's kernel writes tables for all that is new, which takes its time.
            limit_s += self._means.patience(_GROWTH_S_A_GIB) * wish.shape.disk_mib / 1024
        if not wish.mounts or self._place is None:
            await self._set_up_guest(wish, None, was=was, grows=grows, limit_s=limit_s)
            return
        share = new_share(wish.org_id, wish.mounts)
        # What it may mount is made ready meanwhile; until then it reaches no server.
        async with beside(self._means.exports.grant(self._place, share)) as granting:
            await self._set_up_guest(wish, share, was=was, grows=grows, limit_s=limit_s)
            await granting
            await self.guest.mount(share, limit_s=self._means.patience(_MOUNT_S))

    async def _set_up_guest(
        self, wish: MachineWish, share: Share | None, *, was: Was, grows: bool, limit_s: float
    ) -> None:
        token = await self.guest.set_up(wish, was=was, grows=grows, limit_s=limit_s)
        mounted = None if share is None else encode(share)
        shape = wish.shape
        self._record = replace(self._record, token=token, disk_mib=shape.disk_mib, mounted=mounted)

    # --- still ----------------------------------------------------------------------------

    async def pause(self) -> None:
        """Save it while it runs, and end its process; on failure it runs on.

        Raises:
            UnsupportedError: its driver cannot.
            NoCapacityError: the host's disk is full.
            UnavailableError, InternalError: it cannot be saved now.
        """
        machine = self._saving_machine()
        self._check_room()
        self.guest.pulse.hold(is_held=True)
        try:
            try:
                await machine.pause()
                await pause.write_own(machine, self._record, self.body, self._means)
            except BaseException as error:
                await to_the_end(self._go_on(machine))
                if isinstance(error, OSError):
                    raise pause.translated(error) from error
                raise
            await to_the_end(self._finish_pause())
        finally:
            self.guest.pulse.hold(is_held=False)

    def _check_room(self) -> None:
        if (why := self.guest.pulse.held_for) is not None:
            raise NoCapacityError(f"cannot save the machine: {why.message}")

    async def _go_on(self, machine: SavingMachine) -> None:
        """Let a machine run on whose saving failed; what was published is withdrawn first."""
        await self.body.drop_unpublished()
        await self.body.withdraw()
        await self.body.remove_spent()
        with suppress(SandyardError):
            await self._let_run_on(machine)

    async def _let_run_on(self, machine: SavingMachine) -> None:
        """Let it go on after it was held to be saved, unless there is another reason for that. If
        it does not, that is tried again beside: nobody could use it, or save it, as it is."""
        if self.guest.pulse.held_for is None:
            try:
                await machine.resume()
            except SandyardError:
                log.exception("a machine that was held to be saved does not go on; trying again")
                self._beside(self._go_on_in_time(machine), "a machine does not go on")
                raise

    async def _go_on_in_time(self, machine: SavingMachine) -> None:
        for pause_s in _GO_ON_AGAIN_S:
            await self._means.clock.sleep(pause_s)
            if self._machine is not machine or self.phase is not Phase.RUNNING:
                return
            with suppress(SandyardError):
                is_paused = await machine.is_paused()
                pulse = self.guest.pulse
                if pulse.is_held or pulse.held_for is not None or self._machine is not machine:
                    continue  # whoever holds it lets it go on, or has saved it
                if is_paused and self.phase is Phase.RUNNING:
                    await machine.resume()
                    self._beside(self.guest.set_clock(), "a clock cannot be set")
                return

    async def _finish_pause(self) -> None:
        self.guest.break_off(_PAUSED)
        self._set_phase(Phase.PAUSED, None)
        kept = replace(self._record, slot=_NOWHERE, handle=None)
        # Side by side, for either may come first: what is published counts, whatever else is found.
        async with beside(self._note(kept)) as noting:
            if self._machine is not None:
                await self._machine.stop()
                self._machine = None
            await asyncio.wait([noting])
        await in_thread(self.body.take_back)
        # Its memory is free; nobody waits for the slot to be taken apart.
        place, self._place = self._place, None
        if place is not None:
            self._beside(self._give_back_in_time(place), "a slot cannot be taken apart")
        await self.end()

    async def snapshot(self, folder: Path, *, kind: str = "snapshot") -> SavedMachine:
        """Save it, running or paused, to a new folder, and let it go on as it was.

        The guest is held still while its memory and disk are copied; the rest is done beside it.

        Raises: see `pause`.
        """
        kit = start.kit_of(self._record, self._means)
        part = await pause.begin_copy(folder)
        try:
            if self.phase is Phase.PAUSED:
                await pause.write_copy(None, part, self._record, self.body, self._means)
            else:
                await self._copy_while_held(part)
            return await pause.finish_copy(
                part, folder, self._record, self.body, self._means, kit, kind=kind
            )
        except BaseException as error:
            await in_thread(shutil.rmtree, part, ignore_errors=True)
            if isinstance(error, OSError):
                raise pause.translated(error) from error
            raise

    async def _copy_while_held(self, part: Path) -> None:
        machine = self._saving_machine()
        self._check_room()
        self.guest.pulse.hold(is_held=True)
        try:
            await machine.pause()
            await pause.write_copy(machine, part, self._record, self.body, self._means)
        finally:
            self.guest.pulse.hold(is_held=False)
            await to_the_end(self._let_run_on(machine))

    async def checked_state(self) -> SavedMachine:
        """Return its published state, read as a whole.

        Raises:
            DamagedError: it is not as it was, or cannot be started here.
        """
        state = self._means.seals.load(self.body.saved)
        await self._means.seals.check(state, whole=True)
        return state

    async def hold_still(self, why: End) -> None:
        """Hold it still where it stands, and say why, until `let_go_on`; if it can be held, and is
        not while it is saved."""
        if self.guest.pulse.is_held:
            return
        # First: whoever saves it meanwhile must not let it go on.
        self.guest.pulse.held_for = why
        try:
            await self._saving_machine().pause()
        except SandyardError:
            self.guest.pulse.held_for = None

    async def let_go_on(self) -> None:
        """Let it go on after `hold_still`, with its clock set; not while it is being saved."""
        if self.guest.pulse.is_held:
            return
        with suppress(SandyardError):
            await self._saving_machine().resume()
            self.guest.pulse.held_for = None
            self.guest.pulse.note_stall(None)  # of before; the next look tells
            self._beside(self.guest.set_clock(), "a clock cannot be set")

    def _saving_machine(self) -> SavingMachine:
        driver = self._means.drivers.named(self._record.driver)
        if driver is None or not driver.capabilities.saves:
            raise UnsupportedError(f"cannot save a machine of {self._record.driver}")
        if self._machine is None:
            raise MachineDeadError("cannot save a machine that does not run")
        machine: SavingMachine = self._machine  # type: ignore[assignment]  # as its driver says
        return machine

    # --- watched, and down ----------------------------------------------------------------

    def watch(self, on_end: Callable[[End], None]) -> None:
        """Watch over it until it ends; who is told of that is changed if it is watched already."""
        self._on_end = on_end
        if self._machine is not None and (self._watching is None or self._watching.done()):
            self._watching = self._means.crew.start(
                self._watch(self._machine), "a machine is no longer watched"
            )

    async def _watch(self, machine: Machine) -> None:
        end = await watch(
            machine,
            self.body,
            self.guest.pulse,
            self._means,
            lambda: self.guest.link,
            self._stay_ready,
        )
        if self._machine is machine and self._on_end is not None:
            self._watching = None
            self._on_end(end)

    def _stay_ready(self) -> None:
        # What asked its agent took the connection that was ready for whoever comes.
        if self.phase is Phase.WAITING:
            self.guest.keep_spare()

    def is_of(self, machine: Machine | None) -> bool:
        """Tell whether this is the process that it has now."""
        return machine is not None and self._machine is machine

    @property
    def process(self) -> Machine | None:
        """Its process, to be told from another that it may have later."""
        return self._machine

    async def end(self, *, removes: bool = False) -> None:
        """Release process and place; with `removes`, all that is on disk too. May be repeated.

        Raises:
            UnavailableError: something would not go.
        """
        self.guest.leave()
        await self._stop_watching()
        if self._machine is not None:
            await self._machine.stop()
            self._machine = None
        await self._leave_place()
        self.guest.pulse.forget()
        self._record = replace(self._record, slot=_NOWHERE, handle=None)
        if removes:
            await in_thread(self._means.records.remove, self._record.id)

    def has_mounted(self, workspace_id: str) -> bool:
        """Tell whether its guest has a workspace mounted."""
        share = self._record.share
        return share is not None and any(one.workspace_id == workspace_id for one in share.mounts)

    async def unmount(self, workspace_id: str) -> None:
        """Have its guest use a workspace no more, as far as that answers."""
        share = self._record.share
        if share is None:
            return
        left = tuple(one for one in share.mounts if one.workspace_id != workspace_id)
        for one in share.mounts:
            if one.workspace_id == workspace_id and self.is_up:
                with suppress(SandyardError):
                    await self.guest.unmount(one.path)
                    # What lies below it went along.
                    below = tuple(two for two in left if two.path.startswith(f"{one.path}/"))
                    if below:
                        again = replace(share, mounts=below)
                        await self.guest.mount(again, limit_s=self._means.patience(_MOUNT_S))
        self._record = replace(self._record, mounted=encode(replace(share, mounts=left)))
        await self._note(self._record)

    async def shut_down(self) -> None:
        """Have the guest end in its own order if it runs and its agent answers; it may go on."""
        machine, phase = self._machine, self.phase
        if machine is None or phase is not Phase.RUNNING or self.guest.pulse.is_silent:
            return
        limit = self._means.clock.timeout(self._means.patience(_SHUT_DOWN_S))
        with suppress(SandyardError, TimeoutError):
            # The agent is among the first to end, and tells of nothing then.
            async with limit, beside(end_of(machine)) as ending, beside(self._power_off()):
                while not ending.done():
                    if await look(machine, self.body, self.guest.pulse, self._means) is not None:
                        return
                    with suppress(TimeoutError):
                        async with self._means.clock.timeout(self._means.limits.poll_s):
                            await asyncio.wait([ending])

    async def _power_off(self) -> None:
        with suppress(SandyardError):
            await self.guest.run(_POWER_OFF, limit_s=self._means.patience(_SHUT_DOWN_S))

    async def drop(self) -> None:
        """End and remove it as far as that can be; what would not go is for a later look."""
        try:
            await self.end(removes=True)
        except (SandyardError, OSError):
            log.exception("what a machine left cannot be removed yet")

    async def _stop_watching(self) -> None:
        watching, self._watching = self._watching, None
        if watching is not None and watching is not asyncio.current_task():
            watching.cancel()
            await asyncio.wait([watching])

    async def let_go(self) -> None:
        """Let go of its process, which lives on."""
        await self._stop_watching()
        self.guest.let_go()
        if self._machine is not None:
            await self._machine.detach()

    # --- adopted --------------------------------------------------------------------------

    async def recover(self) -> bool:
        """Find the process that its record tells of; False if it has died."""
        record = self._record
        driver = self._means.drivers.named(record.driver)
        if driver is None or record.handle is None:
            return False
        held = AsyncExitStack()
        machine = await driver.recover(record.handle, held)
        if machine is None:
            await held.aclose()
            return False
        held.pop_all()
        self._machine = machine
        self._place = self._means.network.place(record.slot)
        self.guest.meet(self._new_link(self._place), has_answered=False)
        return True

    async def found_without_process(self, phase: Phase, end: End | None = None) -> None:
        """Note that nothing is left of its process, and have its files back."""
        await in_thread(self.body.take_back)
        self._record = replace(self._record, slot=_NOWHERE, handle=None)
        self.mark(phase, end)

    async def let_run(self) -> None:
        """Let it go on if it stands still, as one does that was recovered while it was restored."""
        machine = self._saving_machine()
        if await machine.is_paused():
            await machine.resume()

    async def unfreeze(self) -> None:
        """Let it go on if an earlier process held it still, and set its clock."""
        with suppress(UnsupportedError):
            machine = self._saving_machine()
            try:
                if await machine.is_paused():
                    log.warning("a machine that was held still goes on")
                    await machine.resume()
                    self._beside(self.guest.set_clock(), "a clock cannot be set")
            except SandyardError:
                log.exception("a machine that is held still does not go on; trying again")
                self._beside(self._go_on_in_time(machine), "a machine does not go on")

    def _beside(self, work: Work, what: str) -> None:
        self._means.crew.start(work, what, quietly=True)
