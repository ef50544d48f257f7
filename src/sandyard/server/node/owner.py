"""The owner of one sandbox on a node: its machine, and one job at a time that is done with it."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace

from sandyard.server.core.contracts.node import LIVING, MachineFact, MachineWish, Phase, Way
from sandyard.server.core.errors import (
    ConflictError,
    MachineDeadError,
    NoCapacityError,
    NotFoundError,
    OvertakenError,
    UnavailableError,
)
from sandyard.server.core.shapes import Shape
from sandyard.server.drivers.contract import End, Machine
from sandyard.server.node.host.admission import cost_mib, promise_of
from sandyard.server.node.host.ledger import Promise
from sandyard.server.node.machines.phases import ORIGINS, Ask, Step, step_of
from sandyard.server.node.machines.resident import Resident
from sandyard.server.tasks import Crew, Task, Work

log = logging.getLogger(__name__)

_TRIES = 8


@dataclass(frozen=True)
class _Job:
    """A job, and what it does: it `starts` an incarnation, `removes` the machine, or neither."""

    task: Task
    starts: int | None = None
    removes: bool = False


class Owner:
    """Owns one sandbox's machine. While a job is at work, only that touches the machine.

    A request that equals the job in progress joins it. A start of a later incarnation is refused
    while an earlier one starts; a removal cancels the job. Any other request waits until no job is
    at work, and then decides by the machine's phase. A job continues if the request that began it
    is cancelled. Without a job the machine runs and is watched, or it is
    paused or dead: then it has neither process nor network slot, only files.
    """

    def __init__(
        self,
        sandbox_id: str,
        crew: Crew,
        *,
        removed: int = 0,
        version: int = 0,
        on_idle: Callable[["Owner"], None],
        on_machine: Callable[["Owner"], None],
        on_change: Callable[[], None],
    ) -> None:
        self.sandbox_id = sandbox_id
        self.removed = removed
        """The last incarnation whose removal was requested."""
        self._crew = crew
        self._version = version
        self._on_idle = on_idle
        self._on_machine = on_machine
        self._on_change = on_change
        self._resident: Resident | None = None
        self._way: Way | None = None
        self._job: _Job | None = None
        self._reserved: Shape | None = None
        self._missed: tuple[Machine, End] | None = None  # an end that came during a job

    # --- what it is -----------------------------------------------------------------------

    @property
    def resident(self) -> Resident:
        """The machine.

        Raises:
            NotFoundError: there is none.
        """
        if self._resident is None:
            raise nothing_here(self.sandbox_id)
        return self._resident

    @property
    def phase(self) -> Phase | None:
        """The machine's phase; None if there is no machine."""
        return None if self._resident is None else self._resident.phase

    @property
    def incarnation(self) -> int:
        """The incarnation that is here or being started; 0 if there is none."""
        if self._job is not None and self._job.starts is not None:
            return self._job.starts
        return 0 if self._resident is None else self._resident.record.incarnation

    @property
    def version(self) -> int:
        """The latest version of the sandbox's row that a request was made with."""
        known = 0 if self._resident is None else self._resident.record.version
        return max(self._version, known)

    @property
    def is_busy(self) -> bool:
        """Whether a job is at work."""
        return self._job is not None

    @property
    def is_starting(self) -> bool:
        """Whether the job at work brings the machine up."""
        return self._job is not None and self._job.starts is not None

    @property
    def is_empty(self) -> bool:
        """Whether there is no machine, and none is being started."""
        return self._resident is None and self._job is None

    @property
    def is_stalled(self) -> bool:
        """Whether the machine stands still although nothing suspended it."""
        pulse = None if self._resident is None else self._resident.guest.pulse
        return pulse is not None and pulse.stall is not None and not pulse.is_held

    @property
    def promise(self) -> Promise:
        """The resources reserved for the machine that is here, or about to be."""
        if self._resident is None:
            return Promise() if self._reserved is None else promise_of(self._reserved, coming=1)
        promise = self._resident.promise
        if self._reserved is not None and self._resident.is_down:
            return promise._replace(memory_mib=cost_mib(self._reserved.memory_mib))
        return promise

    @property
    def used_mib(self) -> int:
        """The disk space that the machine's files use; reads the disk."""
        return 0 if self._resident is None else self._resident.used_mib

    def fact(self) -> MachineFact:
        """Return what the node reports of the machine."""
        if self._resident is None or self.is_starting:
            about = None if self._resident is None else self._resident.record
            return MachineFact(
                self.sandbox_id,
                self.incarnation,
                Phase.STARTING,
                driver=about.driver if about else None,
                os=about.os if about else None,
                version=self.version,
            )
        return replace(self._resident.fact(way=self._way), version=self.version)

    # --- for its jobs ---------------------------------------------------------------------

    def take(self, resident: Resident) -> None:
        """Own a machine from now on."""
        self._resident = resident
        resident.current.note_version(self._version)
        self._on_machine(self)

    def lose(self) -> None:
        """Own no machine any more: it was removed."""
        self._version = self.version
        self._resident = None
        self._on_machine(self)

    def reserve(self, shape: Shape) -> None:
        """Reserve resources for the machine that the job brings up, until the job ends."""
        self._reserved = shape

    def watch(self, way: Way | None = None) -> None:
        """Watch the machine's process and note its end; `way` is how it was started, if it was just
        now."""
        self._way = way or self._way
        self.resident.process.watch(self._note_end)

    # --- requests -------------------------------------------------------------------------

    def check_version(self, version: int) -> None:
        """Note the version of the sandbox's row that a request was made with; 0 stands for none.

        Raises:
            OvertakenError: a request with a later version was here before.
        """
        if not version:
            return
        if version < self.version:
            raise _overtaken()
        self._version = version
        if self._resident is not None:
            self._resident.current.note_version(version)

    def step(self, ask: Ask, incarnation: int) -> Step:
        """Return what is to be done about a request, while no job is at work.

        Raises:
            NotFoundError, ConflictError, NoCapacityError: nothing; the message says why.
        """
        is_newer = self._resident is not None and incarnation > self.incarnation
        step = step_of(ask, self.phase, is_newer=is_newer)
        match step:
            case Step.ABSENT:
                raise NotFoundError("cannot do this: nothing of the sandbox is left on this node")
            case Step.OVERTAKEN:
                raise _overtaken()
            case Step.DEAD:
                raise _dead()
            case Step.NOT_NOW:
                raise MachineDeadError("cannot reach the sandbox: its machine does not run")
            case Step.NO_ROOM:
                why = self.resident.saving.held_for
                raise NoCapacityError(f"cannot save the machine: {why.message if why else ''}")
            case _:
                return step

    async def bring_up(self, wish: MachineWish, work: Callable[[Step], Work]) -> MachineFact:
        """Return once the requested incarnation runs. `work` returns the job for a step.

        Raises: see core.node_ops.EnsureRunning.
        """
        for _ in range(_TRIES):
            self._check_wanted(wish)
            while self.is_busy and not self.is_starting:
                await self.idle()
                self._check_wanted(wish)
            if self._job is None:
                step = self.step(ORIGINS[wish.origin], wish.incarnation)
                if step is Step.KEEP and self.resident.is_up:
                    return self.fact()
                job = self._begin(work(step), starts=wish.incarnation)
            elif self.incarnation < wish.incarnation:
                raise ConflictError("cannot start the sandbox yet: an earlier start is in progress")
            else:
                job = self._job
            await _outcome(job)
            if self.incarnation != wish.incarnation:
                raise _overtaken()
            fact = self.fact()
            if fact.phase is Phase.DEAD:
                raise _dead()
            if fact.phase is Phase.RUNNING:
                return fact
        raise ConflictError(
            f"cannot start {self.sandbox_id}: other requests keep changing it; try again"
        )

    def _check_wanted(self, wish: MachineWish) -> None:
        """Refuse a request that was overtaken by a later one, or by a removal."""
        if self.incarnation > wish.incarnation or self.removed >= wish.incarnation:
            raise _overtaken()
        self.check_version(wish.version)

    async def at_rest(self, incarnation: int, version: int) -> None:
        """Wait until no job is in progress. The caller must call `step` and begin its job without
        waiting for anything in between.

        The machine may be of an earlier incarnation, if the requested one never started.

        Raises:
            NotFoundError: there is no machine, or only one of a later incarnation.
            OvertakenError: a later version was seen before, or the job was cancelled.
        """
        self.check_version(version)
        while self.is_busy:
            await self.idle()
        self.check_version(version)  # others may have come meanwhile
        if self._resident is None or self.incarnation > incarnation:
            raise nothing_here(self.sandbox_id)

    async def do(self, work: Work) -> None:
        """Do a job with the machine, while none is at work, and raise what it fails with."""
        await _outcome(self._begin(work))

    async def remove(self, incarnation: int, version: int, work: Callable[[], Work]) -> None:
        """Cancel what is at work and remove the machine, up to an incarnation. Concurrent calls
        join.

        Raises:
            OvertakenError: a request with a later version was here before.
            UnavailableError: something could not be released.
        """
        self.check_version(version)
        if self.incarnation > incarnation:
            return
        self.removed = max(self.removed, incarnation)
        while (job := self._job) is not None and not job.removes:
            await self.cancel()
            if self.incarnation > incarnation:  # it began when the job had ended
                return
        if self.is_empty:
            return
        await _outcome(self._job or self._begin(work(), removes=True))

    async def hold(self, why: End) -> None:
        """Suspend a running machine, unless a job is at work."""
        if self._job is None and self.phase is Phase.RUNNING:
            await self.do(self.resident.saving.hold(why))

    async def release(self) -> None:
        """Resume a machine that is held, unless a job is at work."""
        if self._job is None and self.phase is Phase.HELD:
            await self.do(self.resident.saving.release())

    # --- the job --------------------------------------------------------------------------

    def _begin(self, work: Work, *, starts: int | None = None, removes: bool = False) -> _Job:
        """Begin a job; no other may be at work.

        Raises:
            UnavailableError: the node does not run.
        """
        assert self._job is None
        task = self._crew.start(work, "a job of a machine failed", quietly=True)
        if task is None:
            raise UnavailableError("cannot do this: the node is not running")
        job = self._job = _Job(task, starts, removes)
        task.add_done_callback(lambda _: self._has_ended())
        return job

    def _has_ended(self) -> None:
        self._job = self._reserved = None
        missed, self._missed = self._missed, None
        if missed is not None and self._resident is not None:
            machine, end = missed
            if self._resident.process.machine is machine:
                self._note_end(end)
        self._on_idle(self)

    async def idle(self) -> None:
        """Wait for the job at work, if there is one.

        Raises:
            OvertakenError: it was cancelled.
        """
        if self._job is not None:
            await _ended(self._job)

    async def cancel(self) -> None:
        """Cancel the job at work, if there is one, and wait until it has cleaned up."""
        if self._job is not None:
            self._job.task.cancel()
            await asyncio.wait([self._job.task])

    def _note_end(self, end: End) -> None:
        """Note that the machine's process has ended; a job at work is not disturbed."""
        if self._job is not None:
            if self._resident is not None and self._resident.process.machine is not None:
                self._missed = (self._resident.process.machine, end)
            return
        if self.phase not in LIVING or not self._crew.is_there:
            return
        log.warning("a machine has ended: %s", end.message, extra={"sandbox_id": self.sandbox_id})
        if self.phase is Phase.WAKING:
            self._begin(self._end_unwoken(end))
            return
        self.resident.current.mark(Phase.DEAD, end)
        self._begin(self.resident.end())
        self._on_change()

    async def _end_unwoken(self, end: End) -> None:
        await self.resident.end_unwoken(end)
        self._on_change()


async def _ended(job: _Job) -> None:
    """Wait for a job.

    Raises:
        OvertakenError: it was cancelled.
    """
    await asyncio.wait([job.task])
    if job.task.cancelled():
        raise OvertakenError("a later request cancelled what was in progress for the sandbox")


async def _outcome(job: _Job) -> None:
    """Wait for a job, and raise what it failed with."""
    await _ended(job)
    if (failure := job.task.result()) is not None:
        raise failure


def nothing_here(sandbox_id: str) -> NotFoundError:
    """Return the error for a sandbox that has no machine on this node."""
    return NotFoundError(f"cannot reach {sandbox_id}: this node has no such machine")


def _overtaken() -> OvertakenError:
    return OvertakenError("cannot do this: a later request has changed the sandbox since")


def _dead() -> MachineDeadError:
    return MachineDeadError("cannot do this: the machine is dead")
