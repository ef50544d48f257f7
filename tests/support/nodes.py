"""Nodes for tests: one that is a few dictionaries, and a link that encodes all that is said."""

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from hashlib import sha256
from typing import Any, TypeVar, cast

from sandyard.server.core import ops, wire
from sandyard.server.core.codec import decode, encode
from sandyard.server.core.contracts.node import (
    CONNECTIONS_MAX,
    ByteStream,
    Connection,
    GoldenFact,
    MachineAbout,
    MachineFact,
    MachineRef,
    MachineWish,
    NodeControl,
    NodeOperation,
    NodeReport,
    NodeTunnel,
    Opened,
    Origin,
    Phase,
    ShelfFact,
    SnapshotFact,
    TemplateFact,
    TemplateStatus,
    VersionFact,
    Way,
    version_name,
)
from sandyard.server.core.egress import NO_RULES, Credentials, Policy, digest_of
from sandyard.server.core.errors import (
    ConflictError,
    MachineDeadError,
    NoCapacityError,
    NotFoundError,
    SandyardError,
    UnavailableError,
    error_of,
    kind_of,
)
from sandyard.server.core.node_ops import (
    DropSnapshot,
    DropStages,
    DropVersion,
    EnsureGone,
    EnsureNetwork,
    EnsurePaused,
    EnsureRunning,
    EnsureSnapshot,
    FindMachine,
    FindRoom,
    FindSnapshot,
    KeepVersion,
    ListTemplates,
    PrepareVersion,
    ReadConsole,
    ReadJournal,
    Report,
    WithdrawWorkspace,
)
from sandyard.server.core.ops import AnswerT
from sandyard.server.core.records import Mount
from sandyard.server.core.shapes import Shape
from sandyard.server.fakes.driver import ECHO_PORT
from sandyard.server.links.nats import messages
from sandyard.server.node.generation import Generation

_T = TypeVar("_T")
_UP = frozenset({Phase.RUNNING, Phase.PAUSED})
_KINDS = {"desktop-ubuntu": "desktop"}
SIZE = 4096

_PIECE = 16 * 1024


@dataclass
class Machine:
    """A machine of a fake node; what it `remembers` goes wherever it goes."""

    incarnation: int
    phase: Phase
    remembers: dict[str, str] = field(default_factory=dict)
    is_silent: bool = False
    uses: int = 0
    busy_percent: float = 0.0
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    end: ConflictError | None = None
    policy: Policy = NO_RULES
    credentials: Credentials | None = None
    mounts: tuple[Mount, ...] = ()
    template: str = "base-minimal"

    def break_off(self, message: str, status: str) -> None:
        """End what is under way in it."""
        self.end = ConflictError(message, status=status)
        self.ended.set()
        self.ended = asyncio.Event()


class FakeNode:
    """See NodeControl and NodeTunnel in core.contracts.node: both, without a machine behind them.

    What a test sets: `is_silent` answers nothing, `refusal` is what the next start fails with,
    `room` how many machines it takes, `gate` what a start waits for; `shelves`, `goldens`,
    `missing` and the `journal` of every sandbox are only said.
    """

    def __init__(
        self, node_id: str = "fake", *, templates: tuple[str, ...] = ("base-minimal",)
    ) -> None:
        self._node_id = node_id
        self.templates_ready = templates
        self._generation = Generation()
        self.machines: dict[str, Machine] = {}
        self.snapshots: dict[str, dict[str, str]] = {}
        self.is_silent = False
        self.is_short_of_memory = False
        self.refusal: SandyardError | None = None
        self.room = 1000
        self.shelves: tuple[ShelfFact, ...] = ()
        self.goldens: tuple[GoldenFact, ...] = ()
        self.missing: tuple[str, ...] = ()
        self.gate = asyncio.Event()
        self.gate.set()
        self.asked: list[str] = []
        self.journal: list[Connection] = []
        self._gone: dict[str, int] = {}
        self._built: dict[str, str] = {}
        self._versions: dict[str, int] = {}
        self._starting: dict[str, asyncio.Lock] = {}

    @property
    def node_id(self) -> str:
        """See core.contracts.node.NodeControl.node_id."""
        return self._node_id

    async def do(self, operation: NodeOperation[AnswerT]) -> AnswerT:
        """See core.contracts.node.NodeControl.do. Each operation has a method of the name by which
        it is sent, which a test may replace."""
        self._answer(operation.op)
        if isinstance(operation, WithdrawWorkspace):
            return cast("AnswerT", None)  # nothing has any mounted
        answer: AnswerT = await getattr(self, operation.op)(operation)
        return answer

    async def ensure_running(self, asked: EnsureRunning) -> MachineFact:
        """See core.node_ops.EnsureRunning."""
        wish = asked.wish
        async with self._starting.setdefault(wish.sandbox_id, asyncio.Lock()):
            self._show(wish.sandbox_id, wish.version)
            machine = self.machines.get(wish.sandbox_id)
            if wish.incarnation <= self._gone.get(wish.sandbox_id, 0):
                raise ConflictError("cannot start this: it was made gone")
            if machine is not None and machine.incarnation > wish.incarnation:
                raise ConflictError("cannot start this: a later incarnation is here")
            if machine is not None and machine.incarnation == wish.incarnation:
                return self._again(wish, machine)
            came = self._memory_for(wish, machine)
            await self.gate.wait()
            self._answer("started")
            if (refusal := self.refusal) is not None:
                self.refusal = None
                raise refusal
            if wish.incarnation <= self._gone.get(wish.sandbox_id, 0):
                raise ConflictError("what was under way for the sandbox was broken off")
            way = {
                Origin.NEW: Way.BOOT, Origin.SNAPSHOT: Way.SNAPSHOT, Origin.OWN: Way.RESUME,
                Origin.DISK: Way.RESTART,
            }  # fmt: skip
            made = Machine(wish.incarnation, Phase.RUNNING, {**came, "hostname": wish.hostname})
            made.template = wish.template
            made.policy, made.credentials = wish.policy, wish.credentials
            made.mounts = tuple(
                Mount(one.workspace_id, one.path, one.read_only) for one in wish.mounts
            )
            if machine is not None and machine.phase is Phase.DEAD:
                made.remembers["way"] = Way.RESTART.value
            self.machines[wish.sandbox_id] = made
            return self._fact(wish.sandbox_id, made, way=way[wish.origin])

    def _again(self, wish: MachineWish, machine: Machine) -> MachineFact:
        if machine.phase is Phase.PAUSED:
            raise ConflictError("cannot start this again: it was up, and paused since")
        if machine.phase is Phase.DEAD:
            raise MachineDeadError("cannot do this: the machine is dead")
        return self._fact(wish.sandbox_id, machine)

    def _memory_for(self, wish: MachineWish, machine: Machine | None) -> dict[str, str]:
        match wish.origin:
            case Origin.OWN:
                if machine is None:
                    raise NotFoundError("cannot do this: nothing of the sandbox is left here")
                return {} if machine.phase is Phase.DEAD else machine.remembers
            case Origin.DISK:
                if machine is None:
                    raise NotFoundError("cannot do this: nothing of the sandbox is left here")
                machine.break_off("the machine of the sandbox ended meanwhile", "error")
                return {}
            case Origin.SNAPSHOT:
                if wish.snapshot_id not in self.snapshots:
                    raise NotFoundError("cannot find the snapshot on this node")
                return self.snapshots[wish.snapshot_id]
            case Origin.NEW:
                if wish.template not in self.templates_ready:
                    raise NotFoundError(f"cannot use the template {wish.template}")
                return {}

    def _show(self, sandbox_id: str, version: int) -> None:
        if 0 < version < self._versions.get(sandbox_id, 0):
            raise ConflictError("cannot do this: something later was asked for")
        self._versions[sandbox_id] = max(version, self._versions.get(sandbox_id, 0))

    def shown(self, sandbox_id: str, version: int) -> None:
        """Say of a sandbox that a wish of this version has been here."""
        self._versions[sandbox_id] = version

    async def ensure_paused(self, asked: EnsurePaused) -> int:
        """See core.node_ops.EnsurePaused."""
        sandbox_id, incarnation, version = asked.sandbox_id, asked.incarnation, asked.version
        self._show(sandbox_id, version)
        machine = self._known(sandbox_id, incarnation)
        if machine.phase is Phase.DEAD:
            raise MachineDeadError("cannot do this: the machine is dead")
        if (refusal := self.refusal) is not None:
            self.refusal = None
            raise refusal
        machine.phase = Phase.PAUSED
        machine.break_off("the sandbox was paused meanwhile", "paused")
        return SIZE

    async def ensure_gone(self, asked: EnsureGone) -> None:
        """See core.node_ops.EnsureGone."""
        sandbox_id, incarnation, version = asked.sandbox_id, asked.incarnation, asked.version
        self._show(sandbox_id, version)
        machine = self.machines.get(sandbox_id)
        if machine is not None and machine.incarnation > incarnation:
            return
        self._gone[sandbox_id] = max(incarnation, self._gone.get(sandbox_id, 0))
        if machine is not None:
            machine.break_off("the machine of the sandbox ended meanwhile", "error")
            del self.machines[sandbox_id]

    async def ensure_network(self, asked: EnsureNetwork) -> None:
        """See core.node_ops.EnsureNetwork."""
        policy, credentials = asked.policy, asked.credentials
        sandbox_id, incarnation, version = asked.sandbox_id, asked.incarnation, asked.version
        self._show(sandbox_id, version)
        machine = self._known(sandbox_id, incarnation)
        if machine.phase is not Phase.RUNNING:
            raise MachineDeadError("cannot do this: the machine does not run")
        machine.policy = policy
        if credentials is not None or not policy.ends_tls:
            machine.credentials = credentials

    async def connections(self, asked: ReadJournal) -> tuple[Connection, ...]:
        """See core.node_ops.ReadJournal."""
        sandbox_id, since = asked.sandbox_id, asked.since
        if sandbox_id not in self.machines:
            raise NotFoundError("cannot do this: nothing of the sandbox is left here")
        found = [one for one in self.journal if since is None or one.time > since]
        return tuple(found[:CONNECTIONS_MAX] if since is not None else found[-CONNECTIONS_MAX:])

    async def console(self, asked: ReadConsole) -> bytes:
        """See core.node_ops.ReadConsole."""
        sandbox_id = asked.sandbox_id
        if sandbox_id not in self.machines:
            raise NotFoundError("cannot do this: nothing of the sandbox is left here")
        return b"sandyard agent: ready\n"

    async def ensure_snapshot(self, asked: EnsureSnapshot) -> SnapshotFact:
        """See core.node_ops.EnsureSnapshot."""
        snapshot_id, sandbox_id = asked.snapshot_id, asked.sandbox_id
        incarnation, version = asked.incarnation, asked.version
        self._show(sandbox_id, version)
        machine = self._known(sandbox_id, incarnation)
        if snapshot_id not in self.snapshots:
            if machine.phase is Phase.DEAD:
                raise MachineDeadError("cannot do this: the machine is dead")
            await self.gate.wait()
            self.snapshots[snapshot_id] = dict(machine.remembers)
        return self._fact_of(snapshot_id)

    async def keep_version(self, asked: KeepVersion) -> VersionFact:
        """See core.node_ops.KeepVersion."""
        about = asked.about
        self._known(asked.sandbox_id, asked.incarnation)
        told = json.dumps(encode(about), sort_keys=True)
        name = version_name(about.slug, sha256(told.encode()).hexdigest()[:24])
        self.templates_ready = tuple(dict.fromkeys((*self.templates_ready, name)))
        self._built[name] = about.build_id
        return VersionFact(name, "0" * 64, min(SIZE, asked.size_max))

    async def prepare_version(self, asked: PrepareVersion) -> None:
        """See core.node_ops.PrepareVersion."""
        version = asked.version
        if version not in self.templates_ready:
            raise NotFoundError(f"cannot use the template {version}")
        if (refusal := self.refusal) is not None:
            self.refusal = None
            raise refusal

    async def drop_stages(self, asked: DropStages) -> None:
        """See core.node_ops.DropStages."""
        build_id, but = asked.build_id, asked.but
        self.templates_ready = tuple(
            one for one in self.templates_ready if one in but or self._built.get(one) != build_id
        )

    async def drop_version(self, asked: DropVersion) -> None:
        """See core.node_ops.DropVersion."""
        version = asked.version
        self.templates_ready = tuple(one for one in self.templates_ready if one != version)

    async def find_machine(self, asked: FindMachine) -> MachineAbout:
        """See core.node_ops.FindMachine."""
        sandbox_id = asked.sandbox_id
        machine = self.machines.get(sandbox_id)
        if machine is None:
            raise NotFoundError("cannot find the machine on this node")
        version = self._versions.get(sandbox_id, 0)
        return MachineAbout(machine.incarnation, version, machine.policy, machine.mounts)

    async def find_snapshot(self, asked: FindSnapshot) -> SnapshotFact:
        """See core.node_ops.FindSnapshot."""
        snapshot_id = asked.snapshot_id
        if snapshot_id not in self.snapshots:
            raise NotFoundError("cannot find the snapshot on this node")
        return self._fact_of(snapshot_id)

    def _fact_of(self, snapshot_id: str) -> SnapshotFact:
        return SnapshotFact(snapshot_id, SIZE, "base-minimal", "debian", Shape(1, 1024, 10_240))

    async def drop_snapshot(self, asked: DropSnapshot) -> None:
        """See core.node_ops.DropSnapshot."""
        self.snapshots.pop(asked.snapshot_id, None)

    async def find_room(self, asked: FindRoom) -> bool:
        """See core.node_ops.FindRoom."""
        if self._left() < asked.count:
            raise NoCapacityError("cannot start a machine: the host's memory is promised to others")
        return False

    def _left(self) -> int:
        return self.room - sum(one.phase is Phase.RUNNING for one in self.machines.values())

    async def report(self, asked: Report) -> NodeReport:
        """See core.node_ops.Report."""
        report = NodeReport(
            enforces_rules=True,
            ends_tls=True,
            node_id=self._node_id,
            missing=self.missing,
            machines=tuple(self._fact(name, one) for name, one in self.machines.items()),
            snapshots=tuple(self.snapshots),
            templates=tuple(one for one in self.templates_ready if "@" not in one),
            versions=tuple(one for one in self.templates_ready if "@" in one),
            is_short_of_memory=self.is_short_of_memory,
            memory_mib=self._left() * 512,
            disk_mib=self._left() * 1024,
            shelves=self.shelves,
            goldens=len(self.goldens),
            golden_kinds=self.goldens,
        )
        return self._generation.of(report)

    async def templates(self, asked: ListTemplates) -> tuple[TemplateFact, ...]:
        """See core.node_ops.ListTemplates."""
        ready, shape = TemplateStatus.READY, Shape(1, 512, 1024)
        return tuple(
            TemplateFact(slug, slug, "", _KINDS.get(slug, "headless"), ready, shape)
            for slug in self.templates_ready
            if "@" not in slug
        )

    @asynccontextmanager
    async def open(
        self, machine: MachineRef, operation: ops.Operation[Any]
    ) -> AsyncIterator[Opened[Any]]:
        """See core.contracts.node.NodeTunnel.open."""
        self._answer("open")
        found = self.machines.get(machine.sandbox_id)
        is_here = found is not None and found.incarnation == machine.incarnation
        if found is None or not is_here or machine.node_id != self._node_id:
            raise NotFoundError("cannot reach it: this node has no such machine")
        if found.phase is not Phase.RUNNING:
            raise MachineDeadError("cannot reach the sandbox: it does not run")
        if found.is_silent:
            raise UnavailableError("the agent of the sandbox does not answer")
        opened = _accepted(found, operation)
        found.uses += operation.is_use
        try:
            yield opened
        finally:
            found.uses -= operation.is_use

    def die(self, sandbox_id: str) -> None:
        """Have a machine end by itself."""
        machine = self.machines[sandbox_id]
        machine.phase = Phase.DEAD
        machine.break_off("the machine of the sandbox ended meanwhile", "error")

    def _answer(self, what: str) -> None:
        self.asked.append(what)
        if self.is_silent:
            raise UnavailableError(f"the node {self._node_id} does not answer")

    def _known(self, sandbox_id: str, incarnation: int) -> Machine:
        machine = self.machines.get(sandbox_id)
        if machine is None or machine.incarnation > incarnation:
            raise NotFoundError("cannot reach it: this node has no such machine")
        return machine

    def _fact(self, sandbox_id: str, one: Machine, *, way: Way | None = None) -> MachineFact:
        is_dead = one.phase is Phase.DEAD
        return MachineFact(
            sandbox_id,
            one.incarnation,
            one.phase,
            is_silent=one.is_silent and one.phase is Phase.RUNNING,
            is_used=one.uses > 0,
            ip="10.0.0.1",
            driver="fake",
            way=way,
            reason_code="machine_died" if is_dead else "",
            reason_message="the hypervisor's process ended" if is_dead else "",
            version=self._versions.get(sandbox_id, 0),
            template=one.template,
            shape=Shape(1, 512, 1024),
            rules=digest_of(one.policy, one.credentials.stamp if one.credentials else None),
        )


def _accepted(machine: Machine, operation: ops.Operation[Any]) -> Opened[Any]:
    stream = MemoryStream(machine)
    match operation:
        case ops.Hello():
            return Opened(ops.Greeting(1), stream)
        case ops.Stats() if operation.window_s is not None:
            return Opened(ops.Figures(recent_cpu_percent=machine.busy_percent), stream)
        case ops.Stats():
            return Opened(ops.Figures(0.5, 1, 2, 3, 4, 1.0), stream)
        case ops.Dial() if operation.port != ECHO_PORT:
            raise NotFoundError("cannot connect: nothing listens there", reason="absent")
        case ops.Dial():
            stream.echoes = True
            return Opened(ops.Done(), stream)
        case ops.Execute():
            _execute(machine, operation.command, stream)
            return Opened(ops.Started(1), stream)
        case _:
            return Opened(ops.Done(), stream)


def _execute(machine: Machine, command: str, stream: "MemoryStream") -> None:
    word, _, rest = command.partition(" ")
    if word == "hang":
        return
    if word == "remember":
        machine.remembers["word"] = rest
    said = machine.remembers.get("word", "") if word == "recall" else command
    for start in range(0, len(said.encode()), _PIECE):
        piece = said.encode()[start : start + _PIECE]
        stream.feed(wire.encode_frame(wire.Channel.STDOUT, piece))
    end = json.dumps(encode(ops.Ended(0, 1))).encode()
    stream.feed(wire.encode_frame(wire.Channel.EXIT, end))


class MemoryStream:
    """See core.contracts.node.ByteStream."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._ended = machine.ended
        self._data = bytearray()
        self._more = asyncio.Event()
        self._is_over = False
        self.echoes = False

    def feed(self, data: bytes) -> None:
        """Have bytes to be read."""
        self._data += data
        self._more.set()

    async def read(self, limit: int) -> bytes:
        """See core.contracts.node.ByteStream.read."""
        while not self._data and not self._is_over:
            self._more.clear()
            async with asyncio.TaskGroup() as tasks:
                waits = [tasks.create_task(one.wait()) for one in (self._more, self._ended)]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for one in waits:
                    one.cancel()
            if self._ended.is_set():
                assert self._machine.end is not None
                raise self._machine.end
        data = bytes(self._data[:limit])
        del self._data[:limit]
        return data

    async def write(self, data: bytes) -> None:
        """See core.contracts.node.ByteStream.write."""
        if self._ended.is_set():
            assert self._machine.end is not None
            raise self._machine.end
        if self.echoes:
            self.feed(data)

    async def write_eof(self) -> None:
        """See core.contracts.node.ByteStream.write_eof."""
        self._is_over = True
        self._more.set()


# --- a link -------------------------------------------------------------------------------------


def over_the_wire(kind: Any, value: object) -> Any:
    """Return what the other end of a wire has of a value."""
    return decode(kind, json.loads(json.dumps(encode(value))))


def told(error: SandyardError) -> SandyardError:
    """Return what the other end of a wire has of an error."""
    said = json.dumps([kind_of(error), error.code.value, error.text, error.facts])
    return error_of(*json.loads(said))


class EncodedNode:
    """A node at the other end of a wire: nothing passes but bytes."""

    def __init__(self, control: NodeControl, tunnel: NodeTunnel) -> None:
        self._control = control
        self._tunnel = tunnel

    @property
    def node_id(self) -> str:
        """See core.contracts.node.NodeControl.node_id."""
        return self._control.node_id

    async def do(self, operation: NodeOperation[AnswerT]) -> AnswerT:
        """See core.contracts.node.NodeControl.do."""
        request = json.loads(json.dumps(messages.request_of(operation)))
        try:
            answer = await self._control.do(messages.operation_of(request))
        except SandyardError as error:
            raise told(error) from None
        return messages.answer_of(operation, json.loads(json.dumps(encode(answer))))

    @asynccontextmanager
    async def open(
        self, machine: MachineRef, operation: ops.Operation[Any]
    ) -> AsyncIterator[Opened[Any]]:
        """See core.contracts.node.NodeTunnel.open."""
        there = over_the_wire(MachineRef, machine)
        request = ops.request_of(operation, "")
        line = json.loads(json.dumps({"op": request.op, "args": request.args}))
        wanted: ops.Operation[Any] = ops.operation_of(line["op"], line["args"])
        opening = self._tunnel.open(there, wanted)
        try:
            opened = await opening.__aenter__()
        except SandyardError as error:
            raise told(error) from None
        try:
            answer = over_the_wire(operation.answer, opened.answer)
            yield Opened(answer, _EncodedStream(opened.stream))
        finally:
            await opening.__aexit__(None, None, None)


class _EncodedStream:
    def __init__(self, inner: ByteStream) -> None:
        self._inner = inner

    async def read(self, limit: int) -> bytes:
        try:
            return await self._inner.read(limit)
        except SandyardError as error:
            raise told(error) from None

    async def write(self, data: bytes) -> None:
        try:
            await self._inner.write(data)
        except SandyardError as error:
            raise told(error) from None

    async def write_eof(self) -> None:
        await self._inner.write_eof()


class TunnelTo:
    """See core.contracts.node.NodeTunnel: to whichever of several nodes is meant."""

    def __init__(self, tunnels: Mapping[str, NodeTunnel]) -> None:
        self._tunnels = tunnels

    @asynccontextmanager
    async def open(
        self, machine: MachineRef, operation: ops.Operation[Any]
    ) -> AsyncIterator[Opened[Any]]:
        """See core.contracts.node.NodeTunnel.open."""
        async with self._tunnels[machine.node_id].open(machine, operation) as opened:
            yield opened


def a_wish(sandbox_id: str, incarnation: int = 1, **changes: Any) -> MachineWish:
    """Return a wish for a small machine."""
    plain = MachineWish(
        sandbox_id, incarnation, "base-minimal", Shape(1, 512, 1024), "box", "org", {"A": "b"}
    )
    return replace(plain, **changes)
