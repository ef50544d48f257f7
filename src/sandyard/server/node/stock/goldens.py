"""Golden machines: one of each template, vcpus and memory, booted, warmed up and saved.

    goldens/<key>/    a saved machine; the key is made of all that must be the same to start from it

Every sandbox of that shape is a clone of it. One that does not fit this host, or is not as it was
saved, is never used; it is removed and replaced.
"""

import asyncio
import contextlib
import logging
import shutil
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

from sandyard.server.core.contracts.node import GoldenFact, MachineWish
from sandyard.server.core.egress import NOTHING, Policy
from sandyard.server.core.errors import (
    DamagedError,
    InvalidArgumentError,
    NotFoundError,
    NotReadyError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.ids import new_secret
from sandyard.server.core.shapes import Shape
from sandyard.server.drivers.contract import Driver
from sandyard.server.node.host.ledger import Ledger
from sandyard.server.node.images.definitions import Definition
from sandyard.server.node.images.image import Image
from sandyard.server.node.machines import saved as saving
from sandyard.server.node.machines.guest import Was
from sandyard.server.node.machines.means import Means
from sandyard.server.node.machines.resident import Resident
from sandyard.server.node.machines.saved import SavedMachine
from sandyard.server.node.stock.turns import Rank, Turns
from sandyard.server.tasks import Task, in_thread, to_the_end

log = logging.getLogger(__name__)

_SMALLEST_DISK_MIB = 1024
WARMUP_LIMIT_S = 60.0
"""How long one command of a template's warm-up may take."""
READY_LIMIT_S = 120.0
"""How long a template's command `ready` may take to succeed."""
_READY_PERIOD_S = 0.5
_WARMUP_ROUNDS = 2
_RETRY_S = 120.0
_NOBODY = "golden"
# An image of an earlier version has its own tools in the second place.
_LOAD_NFS = (
    "grep -qw nfs4 /proc/filesystems || for place in tools base; do cd /run/sandyard/$place && "
    "[ -x usr/lib/sandyard/load-modules ] && "
    "exec usr/bin/busybox chroot . /usr/lib/sandyard/load-modules; done"
)
_HOSTNAME = "sandbox-000000000000"  # as long as a sandbox's own: its files need not grow


@dataclass(frozen=True)
class Kind:
    """The parameters of a golden machine."""

    template: str
    image: str
    vcpus: int
    memory_mib: int
    disk_mib: int

    @property
    def shape(self) -> Shape:
        """Its shape."""
        return Shape(self.vcpus, self.memory_mib, self.disk_mib)


class Goldens:
    """The golden machines of a node."""

    def __init__(
        self,
        folder: Path,
        *,
        means: Means,
        boots: Turns,
        on_ready: Callable[[], None],
        has_room: Callable[[Shape], bool],
        ledger: Ledger,
    ) -> None:
        self._folder = folder
        self._means = means
        self._boots = boots
        self._on_ready = on_ready
        self._has_room = has_room
        self._known: dict[Kind, SavedMachine] = {}
        self._failed_at: dict[Kind, float] = {}
        self._making: dict[Kind, Task] = {}
        self._errors: dict[Kind, SandyardError] = {}
        self._looked: dict[Kind, asyncio.Lock] = {}
        self._used_at: dict[Kind, float] = {}
        self._is_open = False
        self._ledger = ledger

    @asynccontextmanager
    async def making(self) -> AsyncIterator[None]:
        """Allow golden machines to be made during the block; its end cancels those in progress."""
        self._means.crew.start(self._sweep(), "golden machines could not be swept")
        self._is_open = True
        try:
            yield
        finally:
            self._is_open = False
            await to_the_end(self._stop())

    def kind_of(self, image: Image, template: str, shape: Shape) -> Kind:
        """Return the kind of golden machine for a shape.

        Growing a clone's disk to the requested size takes a tenth of a second. To avoid this in the
        usual case, a golden machine has the template's default disk; another one, with the smallest
        disk, serves requests for less.
        """
        definition = self._means.images.definition(template)
        if definition is None:
            raise NotFoundError(f"cannot use the template {template}: it is not here any more")
        usual = definition.defaults.disk_mib
        disk_mib = usual if shape.disk_mib >= usual else _SMALLEST_DISK_MIB
        return Kind(template, image.digest, shape.vcpus, shape.memory_mib, disk_mib)

    def is_known(self, kind: Kind) -> bool:
        """Tell whether there is a golden machine that has already been verified."""
        return kind in self._known

    async def find(self, kind: Kind, driver: Driver) -> SavedMachine | None:
        """Return the golden machine of a kind if it exists and is intact."""
        # One at a time: the first verification reads all of it.
        async with self._looked.setdefault(kind, asyncio.Lock()):
            known = self._known.get(kind)
            if known is not None and known.about.driver_version != await driver.version():
                del self._known[kind]  # the hypervisor was upgraded
            if kind not in self._known:
                await self._look_for(kind, driver)
            if kind in self._known:
                self._used_at[kind] = self._means.clock.monotonic()
            return self._known.get(kind)

    async def _drop_beyond_bound(self) -> None:
        """Remove the least recently used golden machines, except those of templates' default
        kinds."""
        others = [one for one in self._known if not self._is_usual(one.template, one.shape)]
        others.sort(key=lambda kind: self._used_at.get(kind, 0.0), reverse=True)
        folders = [self._known[kind].folder for kind in others]
        for number in await in_thread(self._beyond_bound, folders):
            golden = self._known.pop(others[number])
            # Clones have their own link to its memory, and are not affected.
            await in_thread(shutil.rmtree, golden.folder, ignore_errors=True)

    def _beyond_bound(self, folders: list[Path]) -> list[int]:
        """Return which of these, given in order of their value, exceed the limit."""
        left, beyond = self._means.limits.odd_goldens_mib * 2**20, []
        for number, folder in enumerate(folders):
            left -= saving.size_of(folder)
            if left < 0:
                beyond.append(number)
        return beyond

    def _is_usual(self, template: str, shape: Shape) -> bool:
        # Of versions that users build there may be any number.
        definition = self._means.images.definitions.get(template)
        return definition is not None and definition.defaults == shape

    async def _look_for(self, kind: Kind, driver: Driver) -> None:
        folder = self._folder / await self._name(kind, driver)
        if not folder.is_dir():
            return
        try:
            golden = self._means.seals.load(folder)
            await self._means.seals.check(golden, whole=True)
        except DamagedError as error:
            log.warning("a golden machine on disk cannot be used: %s; removing it", error.message)
            await in_thread(shutil.rmtree, folder, ignore_errors=True)
        else:
            self._known[kind] = golden

    async def discard(self, kind: Kind, why: str) -> None:
        """Remove an unusable golden machine; another one is made when it is needed."""
        golden = self._known.pop(kind, None)
        if golden is not None:
            log.error("a golden machine in use is damaged: %s; removing it", why)
            await in_thread(shutil.rmtree, golden.folder, ignore_errors=True)

    def want(self, kind: Kind) -> None:
        """Make a golden machine in the background, unless there is one or an attempt has just
        failed."""
        failed_at = self._failed_at.get(kind)
        if not self._is_open or kind in self._known or kind in self._making:
            return
        if failed_at is not None and self._means.clock.monotonic() - failed_at < _RETRY_S:
            return
        work = self._means.crew.start(
            self._make_in_background(kind), "a golden machine could not be made"
        )
        if work is not None:
            self._making[kind] = work
            work.add_done_callback(lambda _: self._made(kind))

    async def make(self, kind: Kind) -> None:
        """Return once there is a golden machine of a kind, or at once if none can be used here.

        Raises:
            NotReadyError: see `_until_ready`.
            InternalError, UnavailableError: it could not be made; the message says why.
        """
        if not self._is_open:
            return
        self._failed_at.pop(kind, None)
        self._errors.pop(kind, None)
        self.want(kind)
        if (making := self._making.get(kind)) is not None:
            await asyncio.wait([making])
        if kind in self._known:
            return
        error = self._errors.get(kind)
        if error is not None:
            raise error
        image = self._means.images.find(kind.image)
        if image is None or (await self._means.drivers.choose(image)).capabilities.saves:
            raise UnavailableError("cannot save a golden machine now: the host has no room for it")

    def _made(self, kind: Kind) -> None:
        del self._making[kind]
        self._on_ready()

    async def _sweep(self) -> None:
        """Remove unfinished and unusable golden machines of earlier processes."""
        others: list[Path] = []
        for folder in list(self._folder.iterdir()) if self._folder.is_dir() else ():
            keep = False
            with contextlib.suppress(DamagedError):
                golden = self._means.seals.load(folder)
                versions = await self._means.drivers.versions_of(golden.about.driver)
                keep = (
                    not folder.name.endswith(".part")
                    and self._means.images.is_current(golden.about.template, golden.about.image)
                    and golden.about.driver_version in versions[:1]
                )
                if keep and not self._is_usual(golden.about.template, golden.about.shape):
                    others.append(folder)
            if not keep:
                log.info("removing an outdated golden machine")
                await in_thread(shutil.rmtree, folder, ignore_errors=True)

        others.sort(key=lambda folder: folder.stat().st_mtime, reverse=True)
        for number in await in_thread(self._beyond_bound, others):
            await in_thread(shutil.rmtree, others[number], ignore_errors=True)

    async def forget_old(self) -> None:
        """Remove golden machines whose template has a newer image."""
        for kind in await in_thread(self._old, list(self._known)):
            golden = self._known.pop(kind, None)
            if golden is not None:
                # Renamed first: its kind may be current again before all of it is removed. Clones
                # have their own link to its memory, and are not affected.
                away = golden.folder.with_name(f"{golden.folder.name}.{new_secret()}.part")
                with contextlib.suppress(OSError):
                    golden.folder.rename(away)
                await in_thread(shutil.rmtree, away, ignore_errors=True)

    def _old(self, kinds: list[Kind]) -> list[Kind]:
        is_current = self._means.images.is_current
        return [one for one in kinds if not is_current(one.template, one.image)]

    async def _stop(self) -> None:
        for task in list(self._making.values()):
            task.cancel()
            await asyncio.wait([task])

    @property
    def count(self) -> int:
        """The number of golden machines."""
        return len(self._known)

    def facts(self) -> list[GoldenFact]:
        """Return the kinds of all golden machines that have been verified."""
        kinds = {
            (one.template, one.vcpus, one.memory_mib)
            for one in self._known
            if "@" not in one.template  # unlimited in number, and reported every second
        }
        return [GoldenFact(*one) for one in sorted(kinds)]

    async def _make_in_background(self, kind: Kind) -> None:
        try:
            image = self._means.images.find(kind.image)
            definition = self._means.images.definition(kind.template)
            if image is None or definition is None:
                return
            driver = await self._means.drivers.choose(image)
            if not driver.capabilities.saves or await self.find(kind, driver) is not None:
                return
            if not self._has_room(kind.shape):
                return
            # Most starts that wait for a boot need none once this one is made.
            rank = Rank.ASKED if self._boots.is_wanted else Rank.GOLDEN
            async with self._boots.take(rank, _NOBODY):
                self._known[kind] = await self._make(kind, image, driver, definition)
            self._used_at[kind] = self._means.clock.monotonic()
            await self._drop_beyond_bound()
            log.info(
                "a golden machine is ready: %s, %d vcpus, %d MB",
                kind.template, kind.vcpus, kind.memory_mib,
            )  # fmt: skip
        except SandyardError as error:
            self._errors[kind] = error
            raise
        except OSError as error:
            self._errors[kind] = UnavailableError(f"cannot save a golden machine now: {error}")
            raise
        finally:
            if kind not in self._known:  # whatever the error, it is not retried at once
                self._failed_at[kind] = self._means.clock.monotonic()

    async def _make(
        self, kind: Kind, image: Image, driver: Driver, definition: Definition
    ) -> SavedMachine:
        wish = a_wish(kind, definition.policy)
        resident = Resident.new(wish, image, driver, self._means)
        self._ledger.enter(resident)
        try:
            await resident.make_body(None)
            await resident.process.bring_up()
            limit_s = self._means.patience(WARMUP_LIMIT_S)
            await resident.set_up(wish, was=Was.NOBODYS, limit_s=limit_s)
            # It takes an emulated CPU two seconds, which clones save.
            await _warm_up(resident, _LOAD_NFS, limit_s=limit_s)
            if definition.ready is not None:
                await self._until_ready(resident, definition, definition.ready)
            for command in definition.warmup * _WARMUP_ROUNDS:
                await _warm_up(resident, command, limit_s=limit_s)
            # What its kernel still has to do after that (journal, old connections, memory to free)
            # every clone would do again, just when a request waits for it.
            await _warm_up(resident, "sync", limit_s=limit_s)
            resident.guest.close_spare()
            await self._means.clock.sleep(self._means.limits.golden_rest_s)
            folder = self._folder / await self._name(kind, driver)
            await in_thread(shutil.rmtree, folder, ignore_errors=True)
            return await resident.saving.snapshot(folder, kind="golden")
        finally:
            self._ledger.leave(resident)
            await to_the_end(resident.end(removes=True))

    async def _until_ready(self, resident: Resident, definition: Definition, command: str) -> None:
        """Return once a command of a template ends with 0. It runs as the template's `start` does.

        Raises:
            NotReadyError: it has not, within the time for that.
        """
        limit_s, last = self._means.patience(READY_LIMIT_S), "it did not run"
        how = {
            "user": definition.user or "root",
            "cwd": definition.workdir or "/",
            "env": definition.env,
        }
        try:
            async with self._means.clock.timeout(limit_s):
                while True:
                    try:
                        code = await resident.guest.run(command, limit_s=limit_s, **how)
                    except InvalidArgumentError as error:  # its directory is still to be made
                        last = error.message
                    else:
                        if code == 0:
                            return
                        last = f"it ended with {code}"
                    await self._means.clock.sleep(_READY_PERIOD_S)
        except (TimeoutError, UnavailableError) as error:
            closed = "; its network is closed: give the build `network` to open it"
            raise NotReadyError(
                f"the command `ready` did not end with 0 within {limit_s:g} s; last time, {last}"
                f"{closed if definition.policy == NOTHING else ''}"
            ) from error

    async def _name(self, kind: Kind, driver: Driver) -> str:
        version = await driver.version()
        parts = (
            *vars(kind).values(),
            driver.name,
            version,
            self._means.seals.host,
            saving.FORMATS[0],
        )
        return sha256("\0".join(map(str, parts)).encode()).hexdigest()[:24]


async def _warm_up(resident: Resident, command: str, *, limit_s: float) -> None:
    code = await resident.guest.run(command, limit_s=limit_s)
    if code != 0:
        log.warning("the warm-up command %r ended with code %d", command, code)


def a_wish(kind: Kind, policy: Policy) -> MachineWish:
    """Return the request for a machine of a kind, without a sandbox, that may reach what a policy
    lets it."""
    return MachineWish(
        sandbox_id="",
        incarnation=0,
        template=kind.template,
        shape=kind.shape,
        hostname=_HOSTNAME,
        org_id=_NOBODY,
        env={},
        policy=policy,
    )
