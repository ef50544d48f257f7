"""The process of one machine: its start and end, its network slot, and the task that watches it."""

import asyncio
import logging
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack, suppress

from sandyard.server.core.contracts.node import Phase
from sandyard.server.core.egress import Credentials, Policy, digest_of
from sandyard.server.core.errors import (
    DeadlineExceededError,
    InternalError,
    MachineDeadError,
    SandyardError,
    UnsupportedError,
)
from sandyard.server.core.ids import new_secret
from sandyard.server.core.wire import AGENT_PORT
from sandyard.server.drivers.background import Entry
from sandyard.server.drivers.contract import End, Machine, Place, SavingMachine
from sandyard.server.node.agent import AgentLink
from sandyard.server.node.machines import start
from sandyard.server.node.machines.current import CurrentRecord
from sandyard.server.node.machines.guest import Guest
from sandyard.server.node.machines.means import Means
from sandyard.server.node.machines.saved import About
from sandyard.server.node.machines.watch import end_of, look, watch
from sandyard.server.tasks import Task, concurrently, in_thread, to_the_end

log = logging.getLogger(__name__)

_SHUT_DOWN_S = 10.0
_ENDED_S = 1.0
_UNKNOWN = "unknown"
_GIVE_BACK_AGAIN_S = (1.0, 5.0, 30.0, 120.0)
# The second place is of machines whose image is of an earlier version.
_POWER_OFF = " || ".join(
    f"/run/sandyard/{place}/usr/bin/busybox poweroff" for place in ("tools", "base")
)


class MachineProcess:
    """The process of a machine, if there is one.

    In phase `running` with a published state, the restored machine has not run yet. In phase
    `waking` it has run, and must be woken before it is used; the state that it was resumed from is
    withdrawn, and kept until then.
    """

    def __init__(self, current: CurrentRecord, guest: Guest, means: Means) -> None:
        self._current = current
        self._guest = guest
        self._means = means
        self._place: Place | None = None
        self._watching: Task | None = None
        self._on_end: Callable[[End], None] | None = None
        self.machine: Machine | None = None
        """The driver's machine, which may be replaced by another one later."""
        self._enforced: Policy | None = None
        self.credentials: Credentials | None = None
        """What the control plane last sent for the rules; never in a file."""

    @property
    def place(self) -> Place | None:
        """Its network slot and account, while it has them."""
        return self._place

    def saving_machine(self) -> SavingMachine:
        """Return the machine, which can be saved.

        Raises:
            UnsupportedError: its driver cannot save machines.
            MachineDeadError: it does not run.
        """
        name = self._current.value.driver
        driver = self._means.drivers.named(name)
        if driver is None or not driver.capabilities.saves:
            raise UnsupportedError(f"cannot save a machine of {name}")
        if self.machine is None:
            raise MachineDeadError("cannot save a machine that does not run")
        machine: SavingMachine = self.machine  # type: ignore[assignment]  # as its driver says
        return machine

    # --- up -------------------------------------------------------------------------------

    async def bring_up(
        self,
        *,
        source: About | None = None,
        background: Entry | None = None,
        is_recorded: bool = True,
        mounts: Collection[str] | None = None,
    ) -> None:
        """Start the machine and return once its agent answers; it is not watched yet.

        If there is a saved state, the machine is restored from it: `source` describes it, and the
        caller must wake or set up the guest. The state is withdrawn when the
        machine runs. A failure before that keeps the state; after that the machine runs, even if
        the call is cancelled. If `is_recorded` is false, the record on disk is not changed. With
        `mounts` its guest reaches these workspaces alone.

        Raises:
            IncompatibleError: the hypervisor refuses the saved state.
            DeadlineExceededError: the guest made no progress.
            InternalError, UnavailableError: it could not be started.
        """
        current, means = self._current, self._means
        kit = start.kit_of(current.value, means)
        is_saved = current.body.is_saved
        async with AsyncExitStack() as held:
            place = self._place = await means.network.take()
            held.push_async_callback(self._vacate)
            current.take_place(place, source.token if source else new_secret())
            await self.restrict()
            spec = await start.spec_of(
                current.value, current.body, kit, place, background=background
            )
            if is_saved and (share := current.value.share) is not None:
                # It continues with its mounts: their server must be there before it runs.
                await means.exports.grant(place, share if mounts is None else share.only(mounts))
            if is_saved:
                version = source.driver_version if source else await kit.driver.version()
                still = await start.restored(kit, spec, current.body, version, held)
                await to_the_end(self._run_on(still, held, is_recorded=is_recorded))
                return
            machine = self.machine = await kit.driver.start(spec, held)
            current.update(handle=dict(machine.handle))
            await current.write()
            link = self._new_link(place)
            self._guest.meet(link, has_answered=False)
            await start.await_agent(machine, link, current.body, means)
            self._guest.note_answer()
            held.pop_all()

    async def _run_on(
        self, machine: SavingMachine, held: AsyncExitStack, *, is_recorded: bool
    ) -> None:
        """Let a restored machine run; from now on it counts, not its saved state."""
        assert self._place is not None
        current = self._current
        current.update(handle=dict(machine.handle))
        if current.phase is not Phase.STARTING:
            current.set_phase(Phase.WAKING, None)
        if is_recorded:
            await current.write()
        body = current.body
        await body.withdraw()
        await machine.resume()
        self.machine = machine
        self._guest.meet(self._new_link(self._place), has_answered=True)
        held.pop_all()
        if current.phase is Phase.STARTING:
            self.remove_spent_later()

    def remove_spent_later(self) -> None:
        """Remove the state that the machine was restored from, in the background."""
        self._means.crew.start(
            self._current.body.remove_spent(),
            "cannot remove the saved state of a resumed machine",
            quietly=True,
        )

    async def has_ended(self) -> bool:
        """Tell whether the process has ended, or there is none."""
        if self.machine is None:
            return True
        async with concurrently(end_of(self.machine)) as ending:
            with suppress(TimeoutError):
                async with self._means.clock.timeout(_ENDED_S):
                    await asyncio.wait([ending])
            return ending.done()

    def _new_link(self, place: Place) -> AgentLink:
        network, folder = self._means.network, self._current.body.run
        return AgentLink(
            lambda limit_s: network.dial(place, AGENT_PORT, folder=folder, limit_s=limit_s),
            self._current.value.token,
            self._means.clock,
        )

    @property
    def rules(self) -> str:
        """The digest of the network rules that are enforced; see `core.egress.digest_of`."""
        if self._enforced is None or self._place is None:
            return _UNKNOWN
        return digest_of(self._enforced, self._means.network.stamp(self._place))

    async def restrict(self) -> None:
        """Enforce the network rules in the record.

        Raises:
            UnavailableError, InternalError: see `Network.restrict`.
        """
        if self._place is not None:
            self._enforced = None
            policy, record = self._current.value.policy, self._current.value
            folder = await in_thread(self._means.records.make_folder, record.id)
            await self._means.network.restrict(
                self._place, policy, folder=folder, credentials=self.credentials
            )
            self._enforced = policy

    async def raise_when_it_ends(self) -> None:
        """Wait for the process to end, and raise.

        Raises:
            InternalError: it ended.
        """
        if self.machine is not None:
            end = await end_of(self.machine)
            raise InternalError(f"the machine ended: {end.message}")

    async def raise_when_it_is_stuck(self, limit_s: float) -> None:
        """Raise once the process has ended, or has had a processor for `limit_s`
        (`start.use_up`).

        Raises:
            DeadlineExceededError: the limit is over.
            InternalError: it ended.
        """
        if self.machine is not None:
            async with concurrently(self.raise_when_it_ends()):
                await start.use_up(self.machine, limit_s, self._means)
            raise DeadlineExceededError(f"the machine made no progress for {limit_s:g} s")

    # --- watched --------------------------------------------------------------------------

    def watch(self, on_end: Callable[[End], None]) -> None:
        """Watch the process until it ends, and call `on_end` then. If it is watched already, only
        the callback is replaced."""
        self._on_end = on_end
        if self.machine is not None and (self._watching is None or self._watching.done()):
            self._watching = self._means.crew.start(
                self._watch(self.machine), "a machine is no longer watched"
            )

    def assign(self) -> None:
        """Run at ordinary priority for a sandbox from now on, without notifying its pool of its
        end."""
        self._on_end = None
        if self.machine is not None:
            self.machine.come_forward()

    async def _watch(self, machine: Machine) -> None:
        end = await watch(
            machine,
            self._current.body,
            self._guest.pulse,
            self._means,
            lambda: self._guest.link,
            self._stay_ready,
        )
        if self.machine is machine and self._on_end is not None:
            self._watching = None
            self._on_end(end)

    def _stay_ready(self) -> None:
        # The heartbeat used the spare connection, which is for the request that claims it.
        if self._current.phase is Phase.WAITING:
            self._guest.keep_spare()

    async def _stop_watching(self) -> None:
        watching, self._watching = self._watching, None
        if watching is not None and watching is not asyncio.current_task():
            watching.cancel()
            await asyncio.wait([watching])

    # --- down -----------------------------------------------------------------------------

    async def end(self) -> None:
        """End the process and release its slot. May be repeated.

        Raises:
            UnavailableError: something could not be released.
        """
        self._guest.leave()
        await self._stop_watching()
        if self.machine is not None:
            await self.machine.stop()
            self.machine = None
        await self._leave_place()
        self._guest.pulse.forget()
        self._current.leave_place()

    async def stop_saved(self) -> None:
        """End the process of a machine that was just saved, and take its files back."""
        if self.machine is not None:
            await self.machine.stop()
            self.machine = None
        await in_thread(self._current.body.take_back)

    async def leave_place_later(self) -> None:
        """Release everything but the slot now, and the slot in the background, because that takes
        long."""
        place, self._place = self._place, None
        if place is not None:
            self._means.crew.start(
                self._give_back_in_time(place), "cannot release a network slot", quietly=True
            )
        await self.end()

    async def _vacate(self) -> None:
        self._guest.leave()
        self.machine = None
        await self._leave_place()
        self._current.leave_place()

    async def _leave_place(self) -> None:
        """Release the slot; the process has ended."""
        # Taken first, so that a concurrent call does not release it a second time.
        place, self._place = self._place, None
        if place is None:
            return
        try:
            await in_thread(self._current.body.take_back)
            await self._give_back(place)
        except BaseException:
            self._place = place
            raise

    async def _give_back(self, place: Place) -> None:
        await self._means.exports.revoke(place)
        await self._means.network.give_back(place)

    async def _give_back_in_time(self, place: Place) -> None:
        """Release a slot, with retries: a busy host may exceed the limits of a single try."""
        for pause_s in _GIVE_BACK_AGAIN_S:
            try:
                await self._give_back(place)
            except (SandyardError, OSError) as error:
                log.warning("cannot release a network slot yet: %s; retrying", error)
                await self._means.clock.sleep(pause_s)
            else:
                return
        await self._give_back(place)

    async def shut_down(self) -> None:
        """Have the guest shut down, if it runs and its agent answers. It may still run after."""
        machine = self.machine
        is_silent = self._guest.pulse.is_silent
        if machine is None or self._current.phase is not Phase.RUNNING or is_silent:
            return
        limit = self._means.clock.timeout(self._means.patience(_SHUT_DOWN_S))
        with suppress(SandyardError, TimeoutError):
            # The agent is among the first to end, and does not answer then.
            async with (
                limit,
                concurrently(end_of(machine)) as ending,
                concurrently(self._power_off()),
            ):
                while not ending.done():
                    body, pulse = self._current.body, self._guest.pulse
                    if await look(machine, body, pulse, self._means) is not None:
                        return
                    with suppress(TimeoutError):
                        async with self._means.clock.timeout(self._means.limits.poll_s):
                            await asyncio.wait([ending])

    async def _power_off(self) -> None:
        with suppress(SandyardError):
            await self._guest.run(_POWER_OFF, limit_s=self._means.patience(_SHUT_DOWN_S))

    # --- over a restart of the server -----------------------------------------------------

    async def detach(self) -> None:
        """Release what this server holds of the process, which continues."""
        await self._stop_watching()
        self._guest.close_spare()
        if self.machine is not None:
            await self.machine.detach()

    async def recover(self) -> bool:
        """Find the process that the record names; return False if it has ended."""
        record = self._current.value
        driver = self._means.drivers.named(record.driver)
        if driver is None or record.handle is None:
            return False
        held = AsyncExitStack()
        machine = await driver.recover(record.handle, held)
        if machine is None:
            await held.aclose()
            return False
        held.pop_all()
        self.machine = machine
        self._place = self._means.network.place(record.slot)
        self._guest.meet(self._new_link(self._place), has_answered=False)
        return True

    async def note_gone(self, phase: Phase, end: End | None = None) -> None:
        """Note that the process is gone, and take the files back from its account."""
        await in_thread(self._current.body.take_back)
        self._current.leave_place()
        self._current.mark(phase, end)
