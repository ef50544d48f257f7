"""One host's machines: started, watched, adopted after a restart, cleaned up.

Invariants:
  - an entry in `_entries` has a record on disk, written before it took anything;
  - an entry is STARTING while its start task runs, RUNNING while its watch task runs, else DEAD;
  - a DEAD entry holds no process and no place, only its files, until it is made gone.
"""

import asyncio
import contextlib
import logging
import os
import secrets
from base64 import b64encode
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field, replace

from sandyard.server.core.contracts import (
    Clock,
    MachineFact,
    MachineState,
    MachineWish,
    NodeReport,
    Opened,
    TemplateFact,
)
from sandyard.server.core.errors import (
    ConflictError,
    DeadlineExceededError,
    InternalError,
    NoCapacityError,
    NotFoundError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.ids import new_secret
from sandyard.server.core.shapes import Shape
from sandyard.server.core.wire import AGENT_PORT, Op
from sandyard.server.drivers.contract import Driver, End, Machine, MachineSpec, Place
from sandyard.server.drivers.processes import boot_id
from sandyard.server.node.agent import AgentLink
from sandyard.server.node.choice import Drivers
from sandyard.server.node.console import append_console
from sandyard.server.node.disks import Disks, available_memory_mib, free_mib
from sandyard.server.node.images import Image, Images
from sandyard.server.node.network import Network
from sandyard.server.node.residents import Phase, Resident, Residents

log = logging.getLogger(__name__)

_STATES = {
    Phase.STARTING: MachineState.STARTING,
    Phase.RUNNING: MachineState.RUNNING,
    Phase.DEAD: MachineState.DEAD,
}
_LOST = End("machine_lost", "the host was restarted under the machine")
_DIED_UNSEEN = End("machine_died", "the machine ended while the server was not running")


@dataclass(frozen=True)
class NodeLimits:
    """How long a node waits, and how much it starts at once."""

    boot_s: float = 120.0
    no_progress_s: float = 25.0
    boots_at_once: int = 2
    agent_s: float = 15.0
    watch_period_s: float = 2.0
    poll_s: float = 0.05
    memory_floor_mib: int = 1024
    disk_floor_mib: int = 1024


@dataclass
class _Entry:
    record: Resident
    machine: Machine | None = None
    place: Place | None = None
    link: AgentLink | None = None
    start: "asyncio.Task[None] | None" = None
    watch: "asyncio.Task[None] | None" = None
    failure: SandyardError | None = None
    stall: End | None = None
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)


class Node:
    """See core.contracts.NodeControl and core.contracts.NodeTunnel. Use it inside `running`."""

    def __init__(
        self,
        *,
        node_id: str,
        images: Images,
        drivers: Drivers,
        network: Network,
        disks: Disks,
        residents: Residents,
        clock: Clock,
        limits: NodeLimits,
        on_change: Callable[[], None],
    ) -> None:
        self._node_id = node_id
        self._images = images
        self._drivers = drivers
        self._network = network
        self._disks = disks
        self._residents = residents
        self._clock = clock
        self._limits = limits
        self._on_change = on_change
        self._entries: dict[str, _Entry] = {}
        self._boots = asyncio.Semaphore(limits.boots_at_once)
        self._tasks: asyncio.TaskGroup | None = None

    @property
    def node_id(self) -> str:
        """See core.contracts.NodeControl.node_id."""
        return self._node_id

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Adopt what an earlier process left, serve, and on leaving let the machines live on."""
        async with asyncio.TaskGroup() as tasks:
            self._tasks = tasks
            await self._adopt(tasks)
            try:
                yield
            finally:
                await asyncio.shield(self._let_go())

    # --- NodeControl ----------------------------------------------------------------------

    async def ensure_running(self, wish: MachineWish) -> MachineFact:
        """See core.contracts.NodeControl.ensure_running."""
        entry = self._entries.get(wish.sandbox_id)
        if entry is not None and entry.record.incarnation > wish.incarnation:
            raise ConflictError("a later incarnation of the sandbox is here")
        stale = entry is not None and entry.record.incarnation < wish.incarnation
        if entry is not None and (stale or entry.record.phase is Phase.DEAD):
            await self.ensure_gone(wish.sandbox_id, incarnation=entry.record.incarnation)
            entry = None
        if entry is None:
            entry = await self._begin(wish)
        if entry.start is not None:
            await asyncio.wait([entry.start])
            if entry.start.cancelled():
                raise ConflictError("the start was broken off")
            if entry.failure is not None:
                raise entry.failure
        return self._fact(entry)

    async def check_room(self, shape: Shape) -> None:
        """See core.contracts.NodeControl.check_room."""
        folder = self._residents.machines_dir
        folder.mkdir(parents=True, exist_ok=True)
        if free_mib(folder) < self._limits.disk_floor_mib:
            raise NoCapacityError(
                f"cannot start a machine: the host's disk has less than "
                f"{self._limits.disk_floor_mib} MB left under {folder}; free some space"
            )
        if available_memory_mib() - shape.memory_mib // 4 < self._limits.memory_floor_mib:
            raise NoCapacityError("cannot start a machine: the host has too little memory left")

    async def ensure_gone(self, sandbox_id: str, *, incarnation: int) -> None:
        """See core.contracts.NodeControl.ensure_gone."""
        entry = self._entries.get(sandbox_id)
        if entry is None or entry.record.incarnation > incarnation:
            return
        if entry.start is not None and not entry.start.done():
            entry.start.cancel()
            await asyncio.wait([entry.start])
        async with entry.lock:
            if self._entries.get(sandbox_id) is not entry:
                return
            await self._end(entry)
            await asyncio.to_thread(self._residents.remove, sandbox_id)
            del self._entries[sandbox_id]

    async def report(self) -> NodeReport:
        """See core.contracts.NodeControl.report."""
        facts = tuple(self._fact(entry) for entry in self._entries.values())
        return NodeReport(node_id=self._node_id, machines=facts)

    async def templates(self) -> tuple[TemplateFact, ...]:
        """See core.contracts.NodeControl.templates."""
        return self._images.facts()

    async def readiness(self) -> tuple[str, ...]:
        """See core.contracts.NodeControl.readiness."""
        for fact in self._images.facts():
            if fact.digest is not None:
                image = self._images.find(fact.digest)
                if image is not None:
                    try:
                        await self._drivers.choose(image)
                    except UnavailableError as error:
                        return (error.message,)
                    return ()
        return ("no template has been built; run `sandyard template build base-ubuntu`",)

    # --- NodeTunnel -----------------------------------------------------------------------

    @asynccontextmanager
    async def open(
        self, sandbox_id: str, *, incarnation: int, op: Op, args: Mapping[str, object]
    ) -> AsyncIterator[Opened]:
        """See core.contracts.NodeTunnel.open."""
        entry = self._entries.get(sandbox_id)
        if entry is None or entry.record.incarnation != incarnation:
            raise NotFoundError(f"cannot reach {sandbox_id}: this node has no such machine")
        if entry.link is None or entry.record.phase is not Phase.RUNNING:
            raise ConflictError(
                f"cannot reach {sandbox_id}: its machine does not run", status="error"
            )
        async with entry.link.open(op, args, limit_s=self._limits.agent_s) as opened:
            yield opened

    # --- starting -------------------------------------------------------------------------

    async def _begin(self, wish: MachineWish) -> _Entry:
        if self._tasks is None:
            raise UnavailableError("cannot start a machine: the node is not running")
        _, image = self._images.get(wish.template)
        driver = await self._drivers.choose(image)
        await self.check_room(wish.shape)
        if (known := self._entries.get(wish.sandbox_id)) is not None:
            return known
        record = Resident(
            sandbox_id=wish.sandbox_id,
            incarnation=wish.incarnation,
            phase=Phase.STARTING,
            slot=-1,
            template=wish.template,
            image=image.digest,
            driver=driver.name,
            os=image.os,
            token=new_secret(),
        )
        entry = self._entries[wish.sandbox_id] = _Entry(record)
        entry.start = self._tasks.create_task(self._start(entry, wish, image, driver))
        return entry

    async def _start(self, entry: _Entry, wish: MachineWish, image: Image, driver: Driver) -> None:
        try:
            async with self._boots:
                for attempt in (1, 2):
                    try:
                        await self._start_once(entry, wish, image, driver)
                    except DeadlineExceededError as error:
                        # A boot that stands still does so by chance; a second one rarely does.
                        if attempt == 2:
                            raise InternalError(f"{error.message}, twice in a row") from error
                        log.warning("a machine made no progress while booting; trying once more")
                    else:
                        break
        except SandyardError as error:
            entry.failure = error
        except Exception as error:  # it must not take the node's other machines along
            log.exception("a start failed in a way nobody foresaw")
            entry.failure = InternalError(f"cannot start a machine: {error}")
        finally:
            if entry.record.phase is Phase.STARTING:
                await asyncio.shield(self._forget(entry))

    async def _start_once(
        self, entry: _Entry, wish: MachineWish, image: Image, driver: Driver
    ) -> None:
        async with AsyncExitStack() as held:
            folder = self._residents.make_folder(wish.sandbox_id)
            entry.place = await self._network.take()
            held.push_async_callback(self._vacate, entry)
            entry.record = replace(entry.record, slot=entry.place.number, token=new_secret())
            self._residents.write(entry.record)
            disk, run = folder / "disk.ext4", folder / "run"
            disk.unlink(missing_ok=True)
            await self._disks.make(
                disk,
                size_mib=wish.shape.disk_mib,
                token=entry.record.token,
                uid=entry.place.uid,
            )
            run.mkdir(mode=0o700, exist_ok=True)
            with contextlib.suppress(PermissionError):  # without root (fake machines) it is ours
                os.chown(run, entry.place.uid, entry.place.uid)
            spec = MachineSpec(
                name=wish.sandbox_id,
                vcpus=wish.shape.vcpus,
                memory_mib=wish.shape.memory_mib,
                kernel=image.kernel,
                initrd=image.initrd,
                base=image.base,
                disk=disk,
                folder=run,
                place=entry.place,
            )
            entry.machine = await driver.start(spec, held)
            entry.record = replace(entry.record, handle=dict(entry.machine.handle))
            self._residents.write(entry.record)
            entry.link = self._link(entry)
            await self._await_agent(entry, entry.machine, entry.link)
            await self._set_up(entry, entry.link, wish)
            entry.record = entry.record.with_phase(Phase.RUNNING)
            self._residents.write(entry.record)
            held.pop_all()
        assert self._tasks is not None
        entry.watch = self._tasks.create_task(self._watch(entry, entry.machine))

    async def _vacate(self, entry: _Entry) -> None:
        if entry.link is not None:
            entry.link.cut()
        entry.machine = entry.link = None
        if entry.place is not None:
            await self._network.give_back(entry.place)
            entry.place = None

    async def _forget(self, entry: _Entry) -> None:
        """Remove a start that failed; what would not go is kept as dead, to be tried again."""
        try:
            await self._end(entry)
            await asyncio.to_thread(self._residents.remove, entry.record.sandbox_id)
            del self._entries[entry.record.sandbox_id]
        except (SandyardError, OSError) as error:
            log.exception("what a failed start left cannot be removed yet")
            entry.record = entry.record.with_phase(
                Phase.DEAD, code="cleanup_failed", message=str(error)
            )
            with contextlib.suppress(OSError):
                self._residents.write(entry.record)

    def _link(self, entry: _Entry) -> AgentLink:
        place = entry.place
        assert place is not None
        folder = self._residents.folder(entry.record.sandbox_id) / "run"
        return AgentLink(
            lambda limit_s: self._network.dial(place, AGENT_PORT, folder=folder, limit_s=limit_s),
            entry.record.token,
        )

    async def _await_agent(self, entry: _Entry, machine: Machine, link: AgentLink) -> None:
        """Return once the agent answers.

        Raises:
            DeadlineExceededError: the guest makes no progress, or its time is over.
            InternalError: the machine ended.
        """
        assert self._tasks is not None
        folder = self._residents.folder(entry.record.sandbox_id)
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

    async def _set_up(self, entry: _Entry, link: AgentLink, wish: MachineWish) -> None:
        token = new_secret()
        await link.ask(
            Op.SETUP,
            {
                "hostname": wish.hostname,
                "machineId": secrets.token_hex(16),
                "entropy": b64encode(os.urandom(64)).decode(),
                "wallNs": int(self._clock.now().timestamp() * 1e9),
                "env": dict(wish.env),
                "token": token,
                "authorizedKeys": "".join(f"{key}\n" for key in wish.authorized_keys),
                "passwordHash": wish.root_password_hash,
            },
            limit_s=self._limits.boot_s,
        )
        link.token = token
        entry.record = replace(entry.record, token=token)

    # --- watching and ending --------------------------------------------------------------

    async def _watch(self, entry: _Entry, machine: Machine) -> None:
        try:
            await self._watch_until_end(entry, machine)
        except Exception:  # a watch that fails must not take the node's other machines along
            log.exception("a machine is no longer watched")

    async def _watch_until_end(self, entry: _Entry, machine: Machine) -> None:
        folder = self._residents.folder(entry.record.sandbox_id)
        async with asyncio.TaskGroup() as tasks:
            ending = tasks.create_task(machine.wait())
            while not ending.done():
                append_console(folder, await machine.console())
                stall = await machine.stall()
                if stall != entry.stall:
                    entry.stall = stall
                    self._on_change()
                await asyncio.wait([ending], timeout=self._limits.watch_period_s)
        append_console(folder, await machine.console())
        async with entry.lock:
            if self._entries.get(entry.record.sandbox_id) is entry and entry.machine is machine:
                entry.watch = None
                await self._note_death(entry, ending.result())

    async def _note_death(self, entry: _Entry, end: End) -> None:
        log.warning("a machine ended by itself: %s", end.message)
        entry.record = entry.record.with_phase(Phase.DEAD, code=end.code, message=end.message)
        self._on_change()
        try:
            self._residents.write(entry.record)
            await self._end(entry)
        except (SandyardError, OSError):
            log.exception("what a dead machine left cannot be removed yet")

    async def _end(self, entry: _Entry) -> None:
        """Release process and place; may be repeated after a failure."""
        if entry.link is not None:
            entry.link.cut()
            entry.link = None
        if entry.watch is not None:
            entry.watch.cancel()
            await asyncio.wait([entry.watch])
            entry.watch = None
        if entry.machine is not None:
            await entry.machine.stop()
            entry.machine = None
        if entry.place is not None:
            await self._network.give_back(entry.place)
            entry.place = None

    def _fact(self, entry: _Entry) -> MachineFact:
        record = entry.record
        stall = entry.stall if record.phase is Phase.RUNNING else None
        return MachineFact(
            sandbox_id=record.sandbox_id,
            incarnation=record.incarnation,
            state=_STATES[record.phase],
            ip=entry.place.ip if entry.place else None,
            driver=record.driver,
            os=record.os,
            reason_code=stall.code if stall else record.reason_code,
            reason_message=stall.message if stall else record.reason_message,
        )

    # --- over a restart -------------------------------------------------------------------

    async def _adopt(self, tasks: asyncio.TaskGroup) -> None:
        await asyncio.to_thread(self._residents.sweep)
        found = await asyncio.to_thread(self._residents.all)
        for record in found:
            await self._adopt_one(record)
        in_use = [entry.record.slot for entry in self._entries.values() if entry.machine]
        await self._network.open(in_use=in_use, tasks=tasks)
        for record in found:
            if record.sandbox_id not in self._entries:
                await asyncio.to_thread(self._residents.remove, record.sandbox_id)
        for entry in self._entries.values():
            if entry.machine is not None:
                entry.watch = tasks.create_task(self._watch(entry, entry.machine))
        if found:
            living = sum(1 for entry in self._entries.values() if entry.machine)
            log.info("%d of %d recorded machines live and were adopted", living, len(found))

    async def _adopt_one(self, record: Resident) -> None:
        """Take over a record: living machines go on, dead ones are kept as dead, half-made ones go.

        A machine whose start was under way is ended: who asked for it is gone, and whoever wants
        it still asks again.
        """
        driver = self._drivers.named(record.driver)
        if record.phase is Phase.STARTING:
            return
        entry = self._entries[record.sandbox_id] = _Entry(record)
        if record.phase is Phase.DEAD:
            return
        if driver is None or record.handle is None:
            entry.record = record.with_phase(
                Phase.DEAD, code="driver_missing", message=f"no driver {record.driver} is here"
            )
            return
        held = AsyncExitStack()
        entry.machine = await driver.recover(record.handle, held)
        if entry.machine is None:
            await held.aclose()
            same_boot = record.handle.get("boot", boot_id()) == boot_id()
            end = _DIED_UNSEEN if same_boot else _LOST
            entry.record = record.with_phase(Phase.DEAD, code=end.code, message=end.message)
            self._residents.write(entry.record)
            return
        held.pop_all()
        entry.place = self._network.place(record.slot)
        entry.link = self._link(entry)

    async def _let_go(self) -> None:
        for entry in list(self._entries.values()):
            if entry.start is not None and not entry.start.done():
                entry.start.cancel()
                await asyncio.wait([entry.start])
            if entry.watch is not None:
                entry.watch.cancel()
                await asyncio.wait([entry.watch])
            if entry.machine is not None:
                await entry.machine.detach()
        await self._network.close()
        self._tasks = None


async def _end_of(machine: Machine) -> End:
    """Return how a machine ended; a watch that fails is told as its end."""
    try:
        return await machine.wait()
    except Exception as error:  # noqa: BLE001 - raised here it would end the whole node
        return End("machine_died", f"the machine can no longer be watched: {error}")
