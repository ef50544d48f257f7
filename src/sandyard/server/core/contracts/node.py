"""What is asked of a node: its machines, and the way to the agents in them.

All that is said here can cross a wire: `core.codec` writes and reads every wish, fact and report.
"""

from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Generic, Protocol

from sandyard.server.core.ops import AnswerT, Operation
from sandyard.server.core.shapes import Shape


class Origin(StrEnum):
    """What a machine is to come from."""

    NEW = "new"  # its template
    SNAPSHOT = "snapshot"  # a snapshot, in place of all that the sandbox had
    OWN = "own"  # what the sandbox itself has: its saved state, else its disk
    DISK = "disk"  # its own disk, whatever runs or was saved


REBOOTED, POWERED_OFF = "guest_rebooted", "powered_off"
"""Why a machine is dead whose guest brought that about: `MachineFact.reason_code`."""


class Way(StrEnum):
    """How a machine came up."""

    POOL = "pool"  # it waited, running
    RESTORE = "restore"  # a clone of its template's golden machine
    BOOT = "boot"  # from cold
    SNAPSHOT = "snapshot"  # a clone of a snapshot
    RESUME = "resume"  # from its own saved state
    RESTART = "restart"  # booted from its own disk


class Phase(StrEnum):
    """The state of a machine; the same words are used in its record, on its node and in reports."""

    STARTING = "starting"  # for the first time: nothing of it needs to be kept yet
    WAITING = "waiting"  # runs in the pool; never reported
    RUNNING = "running"
    HELD = "held"  # suspended by its node for lack of space; reported as running, with the reason
    WAKING = "waking"  # runs on from a saved state, and must be woken before it is used
    PAUSED = "paused"  # saved; uses no memory
    DEAD = "dead"  # its process is gone; its disk is kept


LIVING = frozenset({Phase.RUNNING, Phase.HELD, Phase.WAKING})
"""The phases of a sandbox's machine that has a process."""


@dataclass(frozen=True)
class MachineRef:
    """One incarnation of a sandbox's machine, and the node that holds it."""

    node_id: str
    sandbox_id: str
    incarnation: int


@dataclass(frozen=True)
class MountWish:
    """A workspace that a machine is to have at a path; `quota_bytes` is what that may hold."""

    workspace_id: str
    path: str
    read_only: bool
    quota_bytes: int


@dataclass(frozen=True)
class MachineWish:
    """What a node should hold: one incarnation of a sandbox, and what it is to be made of.

    `org_id` is who wants it, so that those who wait take turns fairly. One from another sandbox's
    snapshot `replaces_access`: keys and password that are in there open it no more. `mounts` are
    made anew whenever a machine does not go on from where it stood itself. `version` is that of the
    sandbox's row when the wish was made; see `NodeControl`.
    """

    sandbox_id: str
    incarnation: int
    template: str
    shape: Shape
    hostname: str
    org_id: str
    env: Mapping[str, str] = field(repr=False)
    authorized_keys: tuple[str, ...] = ()
    root_password_hash: str | None = field(default=None, repr=False)
    origin: Origin = Origin.NEW
    snapshot_id: str | None = None
    replaces_access: bool = False
    mounts: tuple[MountWish, ...] = ()
    version: int = 0


@dataclass(frozen=True)
class MachineFact:
    """What a node holds for one sandbox.

    One `is_silent` whose agent does not answer, one `is_used` in which an operation is under way
    that counts as a use. `version` is the latest of the sandbox's row that the node was shown.
    """

    sandbox_id: str
    incarnation: int
    phase: Phase
    is_silent: bool = False
    is_used: bool = False
    ip: str | None = None
    driver: str | None = None
    os: str | None = None
    way: Way | None = None
    reason_code: str = ""
    reason_message: str = ""
    version: int = 0


@dataclass(frozen=True)
class SnapshotFact:
    """A snapshot as a node keeps it."""

    snapshot_id: str
    size_bytes: int


class TemplateStatus(StrEnum):
    """Whether a template can be used on a node."""

    PENDING = "pending"
    BUILDING = "building"
    READY = "ready"
    FAILED = "failed"


@dataclass(frozen=True)
class TemplateFact:
    """A template as a node has it; `error` tells of the last build, even if an old image serves."""

    slug: str
    name: str
    description: str
    kind: str
    status: TemplateStatus
    defaults: Shape
    os: str | None = None
    digest: str | None = None
    size_bytes: int | None = None
    created_at: datetime | None = None
    error: str | None = None


@dataclass(frozen=True)
class ShelfFact:
    """How many machines of one kind wait, how many should, and how often in a row one more could
    not be made."""

    template: str
    vcpus: int
    memory_mib: int
    disk_mib: int
    size: int
    target: int
    failures: int = 0


@dataclass(frozen=True)
class GoldenFact:
    """Of what a node has a golden machine, which new ones are clones of."""

    template: str
    vcpus: int
    memory_mib: int


@dataclass(frozen=True)
class NodeView:
    """What of a node is told each second, to choose among many by; see `NodeReport`."""

    templates: tuple[str, ...] = ()
    memory_mib: int = 0
    disk_mib: int = 0
    shelves: tuple[ShelfFact, ...] = ()
    generation: int = 0
    goldens: tuple[GoldenFact, ...] = ()


@dataclass(frozen=True)
class NodeReport:
    """All that a node holds now, and what it could take.

    `snapshots` are ids, `templates` the slugs of those it can start from, `memory_mib` and
    `disk_mib` what it has to promise still. `missing` says what keeps it from starting machines, a
    sentence each, and `limited` what sandboxes on it have to do without. A node that is short of
    memory asks for some sandbox to be paused before the kernel ends one. `generation` is another
    for each report that says something else than the one before, but for what the node could take.
    """

    node_id: str
    machines: tuple[MachineFact, ...]
    snapshots: tuple[str, ...] = ()
    templates: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    is_short_of_memory: bool = False
    memory_mib: int = 0
    disk_mib: int = 0
    shelves: tuple[ShelfFact, ...] = ()
    goldens: int = 0
    golden_kinds: tuple[GoldenFact, ...] = ()
    generation: int = 0
    limited: tuple[str, ...] = ()

    def view(self) -> NodeView:
        """Return what of it is told each second."""
        return NodeView(
            self.templates,
            self.memory_mib,
            self.disk_mib,
            self.shelves,
            self.generation,
            self.golden_kinds,
        )


class NodeControl(Protocol):
    """One host. Asks are wishes: each may come twice, late, or after one that was sent later.

    Each names the incarnation it means, and the version of the sandbox's row that it was made of: a
    node refuses what is older than what it has been shown of a sandbox. 0 is for what no row asks,
    and for ends, which are final: their incarnation says how far they reach. A wish that has been
    overtaken changes nothing.
    """

    @property
    def node_id(self) -> str:
        """The node's stable id."""
        ...

    async def ensure_running(self, wish: MachineWish) -> MachineFact:
        """Return once the machine runs and its agent answers; at once if it already does.

        On failure nothing of a new machine is left; one that was saved is still saved.

        Raises:
            UnavailableError: not now (no driver, template not built, no room); try again.
            NotFoundError: the node does not know the template, the snapshot, or, where the sandbox
                is to come from what it has, anything of it.
            AgentSilentError: the machine runs again and its agent does not answer; only its disk
                can still be used.
            OvertakenError: a later request came first: a later incarnation is here, or this one
                has been running already and was paused since.
            MachineDeadError: this incarnation has been running already, and ended.
            DamagedError: the saved state or snapshot cannot be used, now or later.
            InternalError: the machine could not be started; the message says why.
        """
        ...

    async def ensure_paused(self, sandbox_id: str, *, incarnation: int, version: int = 0) -> int:
        """Return once the machine is saved and uses no memory; at once if it is.

        What is returned are the bytes that it takes on disk.

        On failure it runs on.

        Raises:
            NotFoundError: the node holds no such machine.
            ConflictError: the machine is dead, or the wish was withdrawn or overtaken.
            UnavailableError: not now; the message says what is in the way.
            UnsupportedError: the driver cannot save machines.
        """
        ...

    async def ensure_gone(self, sandbox_id: str, *, incarnation: int, version: int = 0) -> None:
        """Return once nothing of the sandbox is left, up to and including `incarnation`.

        What is under way for it is broken off. A later incarnation is left alone.

        Raises:
            ConflictError: the wish was overtaken.
            UnavailableError: something would not go away; try again.
        """
        ...

    async def ensure_snapshot(
        self, snapshot_id: str, *, sandbox_id: str, incarnation: int, version: int = 0
    ) -> SnapshotFact:
        """Return once the snapshot is complete; the machine continues as it was.

        Raises: see `ensure_paused`.
        """
        ...

    async def drop_snapshot(self, snapshot_id: str) -> None:
        """Return once nothing of the snapshot is left; what was made from it lives on."""
        ...

    async def find_room(self, template: str, shape: Shape, *, count: int = 1) -> bool:
        """Return if so many more machines have room now, and whether one waits, running, for this.

        Raises:
            NoCapacityError: they have not; the message says what is short.
        """
        ...

    async def console(self, sandbox_id: str) -> bytes:
        """Return the last of what the guest printed, also one that never came up.

        Raises:
            NotFoundError: the node has nothing of the sandbox.
        """
        ...

    async def report(self) -> NodeReport:
        """Return what the node holds, machines that died included until they are made gone.

        Raises:
            UnavailableError: the node does not answer.
        """
        ...

    async def templates(self) -> tuple[TemplateFact, ...]:
        """Return every template the node knows, built or not."""
        ...


class NodeExports(Protocol):
    """What a node lets its machines mount."""

    async def withdraw(self, workspace_id: str) -> None:
        """Return once no machine of the node has the workspace mounted, or can mount it.

        Programs that use it there get errors from then on. Nothing happens if none has it.

        Raises:
            UnavailableError: not now; try again.
        """
        ...


class ByteStream(Protocol):
    """Bytes both ways, with back-pressure."""

    async def read(self, limit: int) -> bytes:
        """Return up to `limit` bytes, at least one, or none at the end of the stream.

        Raises:
            UnavailableError: the other side is gone without an end.
            ConflictError: the machine ended, or was paused.
        """
        ...

    async def write(self, data: bytes) -> None:
        """Return once the other side has room for more.

        Raises: see `read`.
        """
        ...

    async def write_eof(self) -> None:
        """End the writing direction; reading continues."""
        ...


@dataclass(frozen=True)
class Opened(Generic[AnswerT]):
    """An operation that the agent accepted: what it answered, and the stream that follows."""

    answer: AnswerT
    stream: ByteStream


class NodeTunnel(Protocol):
    """The way to the agents of nodes' machines."""

    def open(
        self, machine: MachineRef, operation: Operation[AnswerT]
    ) -> AbstractAsyncContextManager[Opened[AnswerT]]:
        """Ask the agent for one operation; leaving the block closes the connection.

        Raises:
            NotFoundError: the node holds no such machine.
            ConflictError: the machine does not run, or dies before it answers.
            InvalidArgumentError: the agent refused the arguments; the message is the agent's.
            UnsupportedError: the agent is older than the operation.
            UnavailableError: node or agent do not answer.
        """
        ...
