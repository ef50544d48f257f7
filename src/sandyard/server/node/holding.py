"""What a node holds for one sandbox, and the one job at a time that is done with it."""

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import replace

from sandyard.server.core.contracts.node import MachineFact, Phase, Way
from sandyard.server.core.errors import (
    ConflictError,
    InternalError,
    OvertakenError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.shapes import Shape
from sandyard.server.drivers.contract import End, Machine
from sandyard.server.node.host.admission import cost_mib, promise_of
from sandyard.server.node.host.ledger import Promise, nobody_counts
from sandyard.server.node.machines.resident import Resident
from sandyard.server.tasks import Crew

log = logging.getLogger(__name__)

Work = Callable[[], Coroutine[object, object, None]]


class Job:
    """One job of a holding, and what became of it."""

    def __init__(self, *, removes: bool) -> None:
        self.removes = removes
        self._task: asyncio.Task[None] | None = None
        self._failure: SandyardError | None = None

    def start(self, crew: Crew, work: Work) -> bool:
        """Begin it; False if the node does not run."""
        self._task = crew.start(self._guarded(work), "a job failed")
        return self._task is not None

    @property
    def is_done(self) -> bool:
        """Whether it has come to its end."""
        return self._task is None or self._task.done()

    async def _guarded(self, work: Work) -> None:
        """Do it; how it failed is kept for those who wait, and takes nothing else along."""
        try:
            await work()
        except SandyardError as error:
            self._failure = error
        except Exception as error:  # whoever waits is told, and the node lives on
            log.exception("a job failed in a way nobody foresaw")
            self._failure = InternalError(f"cannot carry this out: {error}")

    async def join(self) -> None:
        """Wait for it.

        Raises:
            ConflictError: it was broken off.
        """
        if self._task is not None:
            await asyncio.wait([self._task])
            if self._task.cancelled():
                raise OvertakenError(
                    "a later request cancelled what was in progress for the sandbox"
                )

    async def outcome(self) -> None:
        """Wait for it, and raise what it failed with."""
        await self.join()
        if self._failure is not None:
            raise self._failure

    async def break_off(self) -> None:
        """End it before its time."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    def then(self, work: Callable[[], None]) -> None:
        """Do something once it has ended."""
        if self._task is not None:
            self._task.add_done_callback(lambda _: work())


class Holding:
    """A sandbox's machine, there or to be.

    While a job (a start, a pause, a snapshot) is at work, only it touches the machine; whoever
    wants something else waits for it or, to delete, breaks it off. Without a job the machine runs
    and is watched, or it is paused or dead: then it holds no process and no place, only its files.
    """

    def __init__(
        self,
        sandbox_id: str,
        incarnation: int,
        *,
        shape: Shape,
        resident: Resident | None = None,
    ) -> None:
        self.counted = nobody_counts
        self.sandbox_id = sandbox_id
        self._shape = shape
        self._incarnation = incarnation
        self._resident: Resident | None = None
        self._job: Job | None = None
        self._starting: Job | None = None
        self._way: Way | None = None
        self._missed: tuple[Machine, End] | None = None  # an end that came while a job was at work
        self._version = 0
        if resident is not None:
            self.take(resident)

    @property
    def incarnation(self) -> int:
        """Which incarnation is here, or coming."""
        if self.is_starting or self._resident is None:
            return self._incarnation
        return self._resident.record.incarnation

    @property
    def version(self) -> int:
        """The latest version of the sandbox's row that a wish was made of."""
        return max(self._version, *(one.record.version for one in self.residents), 0)

    def show(self, version: int) -> None:
        """Note the version of a wish; what is written down of the machine next has it, too."""
        self._version = max(self._version, version)
        for one in self.residents:
            one.show(self._version)

    @property
    def resident(self) -> Resident:
        """The machine; it is there unless it is only about to be made."""
        if self._resident is None:
            raise ConflictError("the machine of the sandbox is not there yet")
        return self._resident

    @property
    def residents(self) -> list[Resident]:
        """The machine, or none."""
        return [] if self._resident is None else [self._resident]

    @property
    def phase(self) -> Phase | None:
        """How far the machine has come, None before there is one."""
        return None if self._resident is None else self._resident.phase

    @property
    def is_busy(self) -> bool:
        """Whether a job is at work."""
        return self._job is not None and not self._job.is_done

    @property
    def is_starting(self) -> bool:
        """Whether that job brings the machine up."""
        return self.is_busy and self._job is self._starting

    @property
    def is_being_removed(self) -> bool:
        """Whether that job removes the machine."""
        return self.is_busy and self._job is not None and self._job.removes

    @property
    def job(self) -> Job:
        """The job at work, or the last one."""
        if self._job is None:
            raise ConflictError("nothing is under way for the sandbox")
        return self._job

    @property
    def way(self) -> Way | None:
        """How the machine came up last."""
        return self._way

    def take(self, resident: Resident) -> None:
        """Have this machine from now on."""
        self._resident = resident
        resident.show(self._version)
        resident.counted = lambda: self.counted()
        self.counted()

    def promised(self, now: float) -> Promise:
        """See node.host.ledger.Counted.promised: what its machine was, or will be."""
        if self._resident is None:
            return promise_of(self._shape, coming=1) if self.is_starting else Promise()
        promise = self._resident.promised(now)
        if self.is_starting and self._resident.is_down:
            return replace(promise, memory_mib=cost_mib(self._resident.shape.memory_mib))
        return promise

    def came(self, way: Way) -> None:
        """Note how the machine came up."""
        self._way = way

    def fact(self) -> MachineFact:
        """Return what the node tells of it."""
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

    # --- jobs -----------------------------------------------------------------------------

    def begin(
        self, crew: Crew, work: Work, *, starts: int | None = None, removes: bool = False
    ) -> Job:
        """Begin a job, while none is at work, and return it; one that `starts` brings up that
        incarnation.

        Raises:
            UnavailableError: the node does not run.
        """
        job = Job(removes=removes)
        if not job.start(crew, work):
            raise UnavailableError("cannot do this: the node is not running")
        self._job = job
        if starts is not None:
            self._starting, self._incarnation = job, starts
        self.counted()
        job.then(lambda: self.counted())
        return job

    async def break_off(self) -> None:
        """Break off whatever is at work."""
        while self.is_busy and self._job is not None:
            await self._job.break_off()

    def miss(self, end: End) -> None:
        """Keep an end that came while a job was at work."""
        process = self._resident.process if self._resident else None
        if process is not None:
            self._missed = (process, end)

    def take_missed(self) -> End | None:
        """Return an end that was missed, if it is of the process that is there now."""
        missed, self._missed = self._missed, None
        if missed is None or self._resident is None or not self._resident.is_of(missed[0]):
            return None
        return missed[1]
