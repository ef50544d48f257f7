"""Suspends and saves one machine: pauses, snapshots, and holds while the disk is full."""

import asyncio
import logging
import shutil
from contextlib import suppress
from pathlib import Path

from sandyard.server.core.contracts.node import Phase
from sandyard.server.core.errors import (
    ConflictError,
    DamagedError,
    SandyardError,
    UnavailableError,
    UnsupportedError,
)
from sandyard.server.drivers.contract import End, SavingMachine
from sandyard.server.node.machines import pause, start
from sandyard.server.node.machines.current import CurrentRecord
from sandyard.server.node.machines.guest import Guest
from sandyard.server.node.machines.means import Means
from sandyard.server.node.machines.process import MachineProcess
from sandyard.server.node.machines.saved import SavedMachine, check
from sandyard.server.tasks import Work, concurrently, in_thread, to_the_end

log = logging.getLogger(__name__)

_RESUME_AGAIN_S = (1.0, 5.0, 30.0, 120.0, 600.0)
_FLUSH = " || ".join(f"/run/sandyard/{one}/usr/bin/busybox sync" for one in ("tools", "base"))
_FLUSH_LIMIT_S, _FLUSH_LIMIT_MAX_S = 5.0, 20.0
_PAUSED = ConflictError(
    "the sandbox was paused meanwhile; what was running in it continues when it is resumed",
    status="paused",
)


class Saving:
    """Suspends, saves and resumes the machine of a process that stays or ends."""

    def __init__(
        self, current: CurrentRecord, process: MachineProcess, guest: Guest, means: Means
    ) -> None:
        self._current = current
        self._process = process
        self._guest = guest
        self._means = means
        self.held_for: End | None = None
        """Why the machine is held, while it is."""

    async def pause(self) -> None:
        """Save the machine and end its process; if that fails, it keeps running.

        Raises:
            UnsupportedError: its driver cannot.
            NoCapacityError: the host's disk is full.
            UnavailableError, InternalError: it cannot be saved now.
        """
        machine = self._process.saving_machine()
        await self._flush()
        self._guest.pulse.is_held = True
        try:
            try:
                await machine.pause()
                current = self._current
                await pause.write_own(machine, current.value, current.body, self._means)
            except BaseException as error:
                await to_the_end(self._undo(machine))
                if isinstance(error, OSError):
                    raise pause.translated(error) from error
                raise
            await to_the_end(self._finish_pause())
        finally:
            self._guest.pulse.is_held = False

    async def _flush(self) -> None:
        """Have the guest write its files to its disk, within a limit.

        A sandbox may boot from this disk later: on request, or because its saved memory cannot be
        used. Files that only its page cache has are lost then.
        """
        is_well = self._current.phase is Phase.RUNNING and not self._guest.pulse.is_silent
        if self.held_for is not None or not is_well:
            return
        limit_s = min(self._means.patience(_FLUSH_LIMIT_S), _FLUSH_LIMIT_MAX_S)
        try:
            try:
                await self._guest.flush(limit_s=limit_s)
            except UnsupportedError:  # an agent of an earlier version
                if (code := await self._guest.run(_FLUSH, limit_s=limit_s)) != 0:
                    raise UnavailableError(f"sync ended with {code}") from None
        except (SandyardError, TimeoutError) as error:
            log.warning(
                "cannot flush a guest's files before its pause; pausing it anyway: %s", error
            )

    async def _undo(self, machine: SavingMachine) -> None:
        """Resume a machine that could not be saved. A state that was published is withdrawn
        first."""
        body = self._current.body
        await body.drop_unpublished()
        if body.is_saved:
            await body.withdraw()
            await body.remove_spent()
        with suppress(SandyardError):
            await self._resume(machine)

    async def go_back(self) -> bool:
        """End a machine that was resumed, and return to the state that it was resumed from, if its
        disk has not changed since. Otherwise return False and leave it suspended.

        Raises:
            UnsupportedError: its driver cannot.
            UnavailableError: it cannot be suspended now.
        """
        machine = self._process.saving_machine()
        self._guest.pulse.is_held = True
        try:
            await machine.pause()  # what it writes from now on would be lost
            if not await self._can_go_back():
                return False
        finally:
            self._guest.pulse.is_held = False
        await self._process.end()
        return await self.reinstate()

    async def reinstate(self) -> bool:
        """Reinstate the state that a machine without a process was resumed from, if its disk has
        not changed since; return whether it counts again."""
        if not await self._can_go_back():
            return False
        await self._current.body.reinstate()
        return True

    async def _can_go_back(self) -> bool:
        """Tell whether the state that was withdrawn still fits the machine's disk."""
        spent, seals = self._current.body.spent, self._means.seals
        try:
            # Whole files were verified before the resume.
            await in_thread(check, seals.load(spent), whole=False)
        except DamagedError:
            return False
        return True

    async def _resume(self, machine: SavingMachine) -> None:
        """Resume a machine after it was saved, or after that failed. If it cannot be resumed, it
        can be neither used nor saved, so that is retried in the background."""
        try:
            await machine.resume()
        except SandyardError:
            log.exception("cannot resume a machine that was saved; retrying")
            self._in_background(self._resume_in_time(machine), "a machine remains suspended")
            raise

    async def _resume_in_time(self, machine: SavingMachine) -> None:
        for pause_s in _RESUME_AGAIN_S:
            await self._means.clock.sleep(pause_s)
            if self._is_another(machine):
                return
            with suppress(SandyardError):
                is_paused = await machine.is_paused()
                if self._guest.pulse.is_held or self._is_another(machine):
                    continue  # it is being saved, and is resumed after that
                if is_paused:
                    await machine.resume()
                    self.set_clock_later()
                return

    def _is_another(self, machine: SavingMachine) -> bool:
        return self._process.machine is not machine or self._current.phase is not Phase.RUNNING

    async def _finish_pause(self) -> None:
        self._guest.break_off(_PAUSED)
        self._current.set_phase(Phase.PAUSED, None)
        await self._current.body.remove_spent()
        # Concurrently, and in any order: a published state counts, whatever else is found.
        async with concurrently(self._current.write_without_place()) as writing:
            await self._process.stop_saved()
            await asyncio.wait([writing])
        await self._process.leave_place_later()

    async def snapshot(self, folder: Path, *, kind: str = "snapshot") -> SavedMachine:
        """Save the machine, running or paused, to a new folder; it continues as before.

        The guest is suspended while its memory and disk are copied, and runs during the rest.

        Raises: see `pause`.
        """
        current = self._current
        kit = start.kit_of(current.value, self._means)
        part = await pause.begin_copy(folder)
        try:
            if current.phase is Phase.PAUSED:
                version = await pause.write_copy(
                    None, part, current.value, current.body, self._means
                )
            else:
                version = await self._copy_while_held(part)
            return await pause.finish_copy(
                part,
                folder,
                current.value,
                current.body,
                self._means,
                kit,
                kind=kind,
                version=version,
            )
        except BaseException as error:
            await in_thread(shutil.rmtree, part, ignore_errors=True)
            if isinstance(error, OSError):
                raise pause.translated(error) from error
            raise

    async def _copy_while_held(self, part: Path) -> str:
        machine = self._process.saving_machine()
        self._guest.pulse.is_held = True
        try:
            await machine.pause()
            current = self._current
            return await pause.write_copy(machine, part, current.value, current.body, self._means)
        finally:
            self._guest.pulse.is_held = False
            await to_the_end(self._resume(machine))

    async def checked_state(self) -> SavedMachine:
        """Return the published state, after verifying all of it.

        Raises:
            DamagedError: it was altered, or cannot be restored here.
        """
        state = self._means.seals.load(self._current.body.saved)
        await self._means.seals.check(state, whole=True)
        return state

    # --- suspended without being saved ----------------------------------------------------

    async def hold(self, why: End) -> None:
        """Suspend a running machine until `release`, if its driver can."""
        self._guest.pulse.is_held = True
        try:
            await self._process.saving_machine().pause()
        except BaseException as error:
            self._guest.pulse.is_held = False
            if not isinstance(error, SandyardError):
                raise
        else:
            self._current.update(phase=Phase.HELD)
            self.held_for = why

    async def release(self) -> None:
        """Resume a machine after `hold`, and set its clock; if it cannot be resumed, it stays
        held."""
        with suppress(SandyardError):
            await self._process.saving_machine().resume()
            self._current.update(phase=Phase.RUNNING)
            self._guest.pulse.is_held = False
            self.held_for = None
            self._guest.pulse.note_stall(None)  # outdated; the next look finds out
            self.set_clock_later()

    async def let_run(self) -> None:
        """Resume a machine that a recovered restore left suspended."""
        machine = self._process.saving_machine()
        if await machine.is_paused():
            await machine.resume()

    async def unfreeze(self) -> None:
        """Resume a machine that an earlier server left suspended, and set its clock."""
        with suppress(UnsupportedError):
            machine = self._process.saving_machine()
            try:
                if await machine.is_paused():
                    log.warning("resuming a machine that was left suspended")
                    await machine.resume()
                    self.set_clock_later()
            except SandyardError:
                log.exception("cannot resume a machine that was left suspended; retrying")
                self._in_background(self._resume_in_time(machine), "a machine remains suspended")

    def set_clock_later(self) -> None:
        """Set the guest's clock in the background."""
        self._in_background(self._guest.set_clock(), "cannot set the clock of a guest")

    def _in_background(self, work: Work, what: str) -> None:
        self._means.crew.start(work, what, quietly=True)
