"""The pool: running, warmed-up clones that wait for a create.

A shelf holds the clones of one kind. Its size follows recent demand, between a minimum (for default
shapes) and a maximum. The first commands in a restored machine are slow, because none of its code
is translated or cached yet; members of the pool have already run some, including their template's
warm-up commands.
"""

import asyncio
import logging
import os
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Protocol

from sandyard.server.core.contracts.node import Phase, ShelfFact, Way
from sandyard.server.core.errors import DamagedError, SandyardError, UnavailableError
from sandyard.server.core.shapes import Shape
from sandyard.server.drivers.background import Background, Entry
from sandyard.server.drivers.contract import End
from sandyard.server.node.host.disks import available_memory_mib
from sandyard.server.node.host.ledger import Ledger
from sandyard.server.node.machines.guest import WAKE_LIMIT_S, Was
from sandyard.server.node.machines.means import Means
from sandyard.server.node.machines.resident import Resident
from sandyard.server.node.stock.goldens import WARMUP_LIMIT_S, Goldens, Kind, a_wish
from sandyard.server.node.stock.turns import Rank, Turns
from sandyard.server.tasks import Crew, concurrently, to_the_end

log = logging.getLogger(__name__)

# What most first commands do, without a trace: start programs, write, read and list files.
# With a shell and without one, because the agent starts simple commands directly.
_EXERCISES = ("f=$(mktemp) && echo $f > $f && cat $f $f | wc -l && ls -l / && rm $f", "true")
_EXERCISE_ROUNDS = 2
_LIMIT_S = 30.0
# A machine made ahead gets the CPU time that others leave. The time it waits does not
# count against its limits, up to this many times those: on a busy host, fillers that timed out for
# lack of a processor were restarted without end, and the pool stayed empty.
_PATIENCE = 10
_STOPPED = 2  # creates may keep a filler stopped for half of the time (`Background`)
_PAUSE_MAX_S = 300.0
_ODD_MAX = 64
"""Shelves of kinds other than the usual ones: any number can be requested."""
_PERIOD_S = 2.0
_ROUNDS_AT_ONCE = 2


@dataclass(frozen=True)
class PoolLimits:
    """The limits of a shelf's size; the minimum applies to templates' default shapes.

    Without one it depends on the host: see `floor_of`.
    """

    floor: int | None
    ceiling: int
    demand_window_s: float
    versions: int = 1
    """The most for one version of an organization's template."""
    fresh_s: float = 20.0
    quiet_s: float = 0.5
    unquiet_s: float = 3.0
    free_memory: Callable[[], int] = available_memory_mib


def floor_of(shape: Shape, *, free_mib: int, cores: int, shelves: int) -> int:
    """Return how many machines of a shape a host with these free resources keeps waiting.

    They may use half of the free memory, assuming that each uses a quarter of its reservation, and
    there are at most five per CPU, because each is kept alive and replaced when taken. This is
    divided among the `shelves`. One is kept in any case if there is capacity for it.
    """
    by_memory = free_mib // 2 // max(1, shape.memory_mib // 4)
    return max(1, min(by_memory, 5 * cores) // max(1, shelves))


def pause_after(failures: int, demand_window_s: float) -> float:
    """Return how many seconds a shelf is left alone after this many consecutive failures."""
    return float(min(_PAUSE_MAX_S, demand_window_s / 4 * 2 ** min(failures - 1, 20)))


class MachineObserver(Protocol):
    """Is notified of events in the pool and the node, for metrics."""

    def started(self, way: Way, seconds: float) -> None:
        """Count a started machine."""
        ...

    def asked_pool(self, *, template: str, is_hit: bool) -> None:
        """Count a start for which the pool was asked."""
        ...


@dataclass
class _Shelf:
    kind: Kind
    floor: int = 0
    members: list[Resident] = field(default_factory=list)
    coming: int = 0
    asked_at: deque[float] = field(default_factory=lambda: deque(maxlen=1000))
    short_since: float | None = None
    is_usual: bool = False
    failed_at: float | None = None
    failures: int = 0


class Pool:
    """See the module."""

    def __init__(
        self,
        *,
        means: Means,
        goldens: Goldens,
        restores: Turns,
        limits: PoolLimits,
        has_room: Callable[[Shape], bool],
        ledger: Ledger,
    ) -> None:
        self._means = means
        self._goldens = goldens
        self._restores = restores
        self._limits = limits
        self._has_room = has_room
        self._shelves: dict[Kind, _Shelf] = {}
        self._wake = asyncio.Event()
        self._ledger = ledger
        self._background = Background()

    def nudge(self) -> None:
        """Check the shelves now."""
        self._wake.set()

    def facts(self) -> list[ShelfFact]:
        """Return the fill level of each shelf."""
        return [
            ShelfFact(
                one.kind.template, one.kind.vcpus, one.kind.memory_mib, one.kind.disk_mib,
                len(one.members), self._target(one), one.failures,
            )
            for one in self._shelves.values()
        ]  # fmt: skip

    # --- for those who create ---------------------------------------------------------------

    def claim(self, kind: Kind, disk_mib: int) -> Resident | None:
        """Take a machine of a kind whose disk is not larger than requested, if one is waiting.

        Only machines that answered recently are returned.
        """
        shelf = self._shelves.get(kind) or self._new_shelf(kind)
        self.nudge()
        if shelf is None:
            return None
        shelf.asked_at.append(self._means.clock.monotonic())
        found = next(self._fit(shelf, disk_mib), None)
        if found is not None:
            # Not on a miss: that create may have to wait for a restore of a filler's.
            self._background.hold()
            shelf.members.remove(found)
            self._ledger.leave(found)
        return found

    def _new_shelf(self, kind: Kind) -> _Shelf | None:
        """Add a shelf for a kind that was requested, in place of the one that was requested least
        lately; return None if all are in use."""
        odd = [one for one in self._shelves.values() if not one.is_usual]
        if len(odd) >= _ODD_MAX:
            idle = [one for one in odd if not one.members and not one.coming]
            if not idle:
                return None
            del self._shelves[min(idle, key=lambda one: max(one.asked_at, default=0.0)).kind]
        shelf = self._shelves[kind] = _Shelf(kind)
        return shelf

    def has(self, kind: Kind, disk_mib: int, *, besides: int = 0) -> bool:
        """Tell whether a claim would find a machine after this many other claims."""
        shelf = self._shelves.get(kind)
        return shelf is not None and sum(1 for _ in self._fit(shelf, disk_mib)) > besides

    def _fit(self, shelf: _Shelf, disk_mib: int) -> Iterator[Resident]:
        since = self._means.clock.monotonic() - self._limits.fresh_s
        for one in shelf.members:
            if one.shape.disk_mib <= disk_mib and one.has_answered(since=since):
                yield one

    async def give_way(self, memory_mib: int, disk_mib: int) -> bool:
        """End waiting machines until this much reserved memory and disk is free; return False, and
        end none, if all of them would not be enough."""
        shelves = list(self._shelves.values())
        waiting = [one for shelf in shelves for one in shelf.members]
        if (
            sum(one.shape.memory_mib for one in waiting) < memory_mib
            or sum(map(self._ledger.disk_left_mib, waiting)) < disk_mib
        ):
            return False
        freed_mib = freed_disk_mib = 0
        for shelf in shelves:
            while shelf.members and (freed_mib < memory_mib or freed_disk_mib < disk_mib):
                one = shelf.members.pop()
                shelf.failed_at = self._means.clock.monotonic()
                freed_mib += one.shape.memory_mib
                freed_disk_mib += self._ledger.disk_left_mib(one)
                await to_the_end(self._discard(one))
        return freed_mib >= memory_mib and freed_disk_mib >= disk_mib

    # --- the keeper -------------------------------------------------------------------------

    @asynccontextmanager
    async def filling(self) -> AsyncIterator[None]:
        """Keep the shelves filled during the block; its end empties them."""
        try:
            async with Crew() as crew:
                crew.start(self._keep(crew), "the pool is no longer filled")
                yield
        finally:
            self._background.resume()
            await to_the_end(self._empty())

    async def _keep(self, crew: Crew) -> None:
        while True:
            self._wake.clear()
            try:
                await self._look(crew)
            except SandyardError as error:
                log.warning("cannot fill the pool: %s; retrying", error.message)
            except Exception:  # one failure must not end the pool
                log.exception("cannot fill the pool; retrying")
            try:
                async with self._means.clock.timeout(self._period_s()):
                    await self._wake.wait()
            except TimeoutError:
                pass

    def _period_s(self) -> float:
        is_short = any(shelf.short_since is not None for shelf in self._shelves.values())
        return self._limits.quiet_s if is_short else _PERIOD_S

    async def _look(self, crew: Crew) -> None:
        await self._goldens.forget_old()
        usual: list[_Shelf] = []
        for slug, definition in self._means.images.definitions.items():
            image = self._means.images.current(slug)
            if image is None or definition.is_hidden:
                continue
            kind = self._goldens.kind_of(image, slug, definition.defaults)
            usual.append(self._shelves.setdefault(kind, _Shelf(kind)))
        for shelf in usual:
            shelf.is_usual = True
            shelf.floor = self._floor(shelf, len(usual))
        for kind, shelf in list(self._shelves.items()):
            if not self._means.images.is_current(kind.template, kind.image):
                # Machines in the making notice that their shelf is gone.
                del self._shelves[kind]
                while shelf.members:
                    await to_the_end(self._discard(shelf.members.pop()))
                continue
            await self._tend(shelf, crew)
            if shelf not in usual and self._is_forgotten(shelf):
                del self._shelves[kind]

    def _is_forgotten(self, shelf: _Shelf) -> bool:
        """Tell whether a shelf is empty and its kind has not been requested lately."""
        return not (shelf.members or shelf.coming or shelf.asked_at or self._target(shelf))

    def _floor(self, shelf: _Shelf, shelves: int) -> int:
        wanted = self._limits.floor
        if wanted is None:
            shape, cores = shelf.kind.shape, len(os.sched_getaffinity(0))
            free_mib = self._limits.free_memory()
            wanted = floor_of(shape, free_mib=free_mib, cores=cores, shelves=shelves)
            if shelf.floor and abs(wanted - shelf.floor) <= 1:
                # Waiting machines use memory themselves, so a difference of one is ignored.
                wanted = shelf.floor
        return min(wanted, self._limits.ceiling)

    async def _tend(self, shelf: _Shelf, crew: Crew) -> None:
        target = self._target(shelf)
        if target > 0 and not self._goldens.is_known(shelf.kind):
            # Looks for one that an earlier process made; makes one if there is none.
            self._goldens.want(shelf.kind)
            return
        while len(shelf.members) > max(target, shelf.floor):
            await to_the_end(self._discard(shelf.members.pop(0)))
        now = self._means.clock.monotonic()
        pause_s = pause_after(max(1, shelf.failures), self._limits.demand_window_s)
        if shelf.failed_at is not None and now - shelf.failed_at < pause_s:
            return
        if self._is_put_off(shelf, now, is_short=len(shelf.members) + shelf.coming < target):
            return
        room = min(target - len(shelf.members), _ROUNDS_AT_ONCE) - shelf.coming
        for _ in range(room):
            shelf.coming += 1
            crew.start(self._add(shelf), "cannot add a machine to the pool")

    def _is_put_off(self, shelf: _Shelf, now: float, *, is_short: bool) -> bool:
        """Tell whether filling a shelf can wait for a limited time: while creates follow each other
        and machines are left, it would only compete with them for CPU time."""
        if not is_short:
            shelf.short_since = None
            return False
        if shelf.short_since is None:
            shelf.short_since = now
        is_quiet = not shelf.asked_at or now - shelf.asked_at[-1] >= self._limits.quiet_s
        return (
            bool(shelf.members)
            and not is_quiet
            and now - shelf.short_since < self._limits.unquiet_s
        )

    def _target(self, shelf: _Shelf) -> int:
        since = self._means.clock.monotonic() - self._limits.demand_window_s
        while shelf.asked_at and shelf.asked_at[0] < since:
            shelf.asked_at.popleft()
        wanted = max(shelf.floor, shelf.floor + len(shelf.asked_at))
        limits = self._limits
        most = limits.versions if "@" in shelf.kind.template else limits.ceiling
        return min(wanted, limits.ceiling, most)

    async def _add(self, shelf: _Shelf) -> None:
        try:
            with self._background.entry() as entry:
                async with AsyncExitStack() as unfinished:
                    await self._background.calm()
                    async with self._restores.take(Rank.AHEAD):
                        one = await self._made(shelf, entry, unfinished)
                    if one is not None:
                        await self._exercise(shelf, one)
                        await self._finish(shelf, one)
                        unfinished.pop_all()
        except Exception as error:  # whatever the error, it is not retried at once
            shelf.failed_at = self._means.clock.monotonic()
            # The next is made from another golden machine.
            shelf.failures += not isinstance(error, DamagedError)
            raise
        finally:
            shelf.coming -= 1
            self.nudge()

    async def _made(
        self, shelf: _Shelf, entry: Entry, unfinished: AsyncExitStack
    ) -> Resident | None:
        """Return a running machine, which is discarded with the stack; None if none can be made
        now."""
        if not self._has_room(shelf.kind.shape):
            shelf.failed_at = self._means.clock.monotonic()
            return None
        kind = shelf.kind
        image = self._means.images.find(kind.image)
        definition = self._means.images.definition(kind.template)
        if image is None or definition is None:
            return None
        driver = await self._means.drivers.choose(image)
        golden = await self._goldens.find(kind, driver)
        if golden is None:
            return None
        wish = a_wish(kind, definition.policy)
        one = Resident.new(wish, image, driver, self._means)
        self._ledger.enter(one)
        unfinished.push_async_callback(lambda: to_the_end(self._discard(one)))
        try:
            await one.make_body(golden)
            await one.process.bring_up(source=golden.about, background=entry)
        except DamagedError as error:
            await self._goldens.discard(kind, error.message)
            raise
        return one

    async def _exercise(self, shelf: _Shelf, one: Resident) -> None:
        """Run commands in a machine that will be among the first to be requested."""
        wish = a_wish(shelf.kind, one.record.policy)
        # Twice: the second is what a claim does.
        for was in (Was.NOBODYS, Was.UNIQUE):
            limit_s = _STOPPED * self._means.patience(WAKE_LIMIT_S)
            async with concurrently(one.process.raise_when_it_is_stuck(limit_s)):
                await one.set_up(wish, was=was, limit_s=limit_s * _PATIENCE)
        for _ in range(_EXERCISE_ROUNDS):
            limit_s = _STOPPED * self._means.patience(_LIMIT_S)
            for command in _EXERCISES:
                async with concurrently(one.process.raise_when_it_is_stuck(limit_s)):
                    await one.guest.run(command, limit_s=limit_s * _PATIENCE)
            async with concurrently(one.process.raise_when_it_is_stuck(limit_s)):
                await one.guest.rehearse_mount()

    async def _finish(self, shelf: _Shelf, one: Resident) -> None:
        """Put a machine on the shelf, warmed up and with its clock set."""
        for command in self._warmup(shelf):
            try:
                await one.guest.run(command, limit_s=self._means.patience(WARMUP_LIMIT_S))
            except UnavailableError as error:  # it is usable all the same, if it answers below
                log.warning(
                    "the warm-up command %r failed: %s; continuing without it",
                    command,
                    error.message,
                )
        await one.guest.settle_clock()
        await one.current.enter(Phase.WAITING)
        if self._shelves.get(shelf.kind) is not shelf:  # the template has another image by now
            await to_the_end(self._discard(one))
            return
        one.process.watch(lambda end: self._on_end(shelf, one, end))
        one.guest.keep_spare()
        shelf.members.append(one)
        shelf.failures = 0

    def _warmup(self, shelf: _Shelf) -> Iterator[str]:
        """Yield the warm-up commands of a template. While creates find the shelf half empty there
        are none, because another machine is worth more than a warm one."""
        definition = self._means.images.definition(shelf.kind.template)
        for command in () if definition is None else definition.warmup:
            lately = self._means.clock.monotonic() - self._limits.unquiet_s
            is_asked_for = bool(shelf.asked_at) and shelf.asked_at[-1] > lately
            if is_asked_for and 2 * len(shelf.members) < self._target(shelf):
                return
            yield command

    def _on_end(self, shelf: _Shelf, one: Resident, end: End) -> None:
        log.warning("a machine of the pool has ended: %s", end.message)
        if one in shelf.members:
            shelf.members.remove(one)
            self._means.crew.start(self._discard(one), "cannot remove a machine of the pool")
            self.nudge()

    async def _discard(self, one: Resident) -> None:
        self._ledger.leave(one)
        await one.drop()

    async def _empty(self) -> None:
        for shelf in self._shelves.values():
            while shelf.members:
                await to_the_end(self._discard(shelf.members.pop()))
