"""A node's machines, and connections to the agents in them.

All types here are serialized by `core.codec`.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field, replace
from datetime import datetime
from enum import StrEnum
from functools import cached_property
from hashlib import sha256
from itertools import accumulate
from typing import Any, ClassVar, Final, Generic, Protocol, TypeVar

from sandyard.server.core.codec import encode
from sandyard.server.core.egress import NO_RULES, Credentials, Policy
from sandyard.server.core.ops import AnswerT, Operation
from sandyard.server.core.records import Mount
from sandyard.server.core.shapes import Shape

_T = TypeVar("_T")

SHORT: Final = 16
"""So much of a digest is enough to tell versions apart."""
VIEW_MAX: Final = 56 * 1024
"""Bytes of a view as JSON in a heartbeat, which has 64 KiB with everything around it."""


class Origin(StrEnum):
    """What a machine is started from."""

    NEW = "new"  # its template
    SNAPSHOT = "snapshot"  # a snapshot, in place of all that the sandbox had
    OWN = "own"  # what the sandbox itself has: its saved state, else its disk
    DISK = "disk"  # its own disk, whatever runs or was saved


REBOOTED, POWERED_OFF = "guest_rebooted", "powered_off"
"""Why a machine is dead whose guest brought that about: `MachineFact.reason_code`."""


CONNECTIONS_MAX: Final = 1000
"""Lines of a journal in one answer."""


class Way(StrEnum):
    """How a machine was started."""

    POOL = "pool"  # it waited, running
    RESTORE = "restore"  # a clone of its template's golden machine
    BOOT = "boot"  # from cold
    SNAPSHOT = "snapshot"  # a clone of a snapshot
    RESUME = "resume"  # from its own saved state
    RESTART = "restart"  # booted from its own disk


class Phase(StrEnum):
    """The state of a machine on its node. Records and reports use the same words, except `held`."""

    STARTING = "starting"  # for the first time: nothing of it needs to be kept yet
    WAITING = "waiting"  # runs in the pool; never reported
    RUNNING = "running"
    HELD = "held"  # suspended by its node for lack of space; reported as running, with the reason
    WAKING = "waking"  # runs on from a saved state, and must be woken before it is used
    PAUSED = "paused"  # saved; uses no memory
    DEAD = "dead"  # its process is gone; its disk is kept
    UNKNOWN = "unknown"  # a word of a newer node; never in records


LIVING = frozenset({Phase.RUNNING, Phase.HELD, Phase.WAKING})
"""The phases of a sandbox's machine that has a process."""


@dataclass(frozen=True)
class MachineRef:
    """One incarnation of a sandbox's machine, and its node."""

    node_id: str
    sandbox_id: str
    incarnation: int


@dataclass(frozen=True)
class MountWish:
    """A workspace to be mounted at a path; `quota_bytes` limits its size."""

    workspace_id: str
    path: str
    read_only: bool
    quota_bytes: int


@dataclass(frozen=True)
class MachineWish:
    """The desired state of one incarnation of a sandbox's machine.

    `org_id` is for fair queueing. With `replaces_access`, the keys and password in another
    sandbox's snapshot are removed. `mounts` are mounted anew unless the machine resumes from its
    own saved state. `version` is that of the sandbox's row when the request was made; see
    `NodeControl`.
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
    policy: Policy = NO_RULES
    credentials: Credentials | None = field(default=None, repr=False)
    version: int = 0


@dataclass(frozen=True)
class MachineFact:
    """The state of one sandbox's machine on its node.

    `is_silent` means that its agent does not answer, `is_used` that an operation is in progress
    that counts as a use. `version` is the latest version of the sandbox's row that the node has
    received, and `rules` the digest of the network rules in force (`core.egress.digest_of`).
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
    template: str = ""
    shape: Shape | None = None
    rules: str = ""


@dataclass(frozen=True)
class Connection:
    """A line of a sandbox's journal: a connection or question, refused or ended, or the number of
    lines that were `skipped`. `rule` decided: an entry of `allow` or `deny`, `egress`, `private`,
    or what failed. `secrets` are the names of those that were sent along."""

    time: float
    verdict: str
    rule: str = ""
    name: str = ""
    address: str = ""
    port: int = 0
    bytes_out: int = 0
    bytes_in: int = 0
    duration_ms: int = 0
    count: int = 0
    secrets: tuple[str, ...] = ()


@dataclass(frozen=True)
class SnapshotFact:
    """A snapshot on a node. Nodes of earlier versions tell only its size."""

    snapshot_id: str
    size_bytes: int
    template: str = ""
    os: str | None = None
    shape: Shape | None = None


class TemplateStatus(StrEnum):
    """Whether a template can be used on a node."""

    PENDING = "pending"
    BUILDING = "building"
    READY = "ready"
    FAILED = "failed"
    UNKNOWN = "unknown"  # a word of a newer node


@dataclass(frozen=True)
class TemplateFact:
    """A template on a node; `error` is that of the last build, even if an older image is used.
    `is_copy` means that another node built its image. `user` and `workdir` are defaults for
    programs, if it has any."""

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
    is_hidden: bool = False
    is_copy: bool = False
    user: str = ""
    workdir: str = ""


@dataclass(frozen=True)
class VersionFact:
    """A version of a template on a node: its name (`version_name`), the SHA-256 of its root file
    system, and the size of that."""

    name: str
    root: str
    size_bytes: int


def version_name(slug: str, digest: str) -> str:
    """Return the name of a version on nodes, in the place of a shipped template's slug."""
    return f"{slug}@{digest}"


@dataclass(frozen=True)
class ShelfFact:
    """A shelf of the pool: machines waiting, target size, and consecutive failures to add one."""

    template: str
    vcpus: int
    memory_mib: int
    disk_mib: int
    size: int
    target: int
    failures: int = 0


@dataclass(frozen=True)
class GoldenFact:
    """The template and shape of a golden machine on a node."""

    template: str
    vcpus: int
    memory_mib: int


@dataclass(frozen=True)
class MachineAbout:
    """What a node has on record of a sandbox's machine: its network rules, without headers, and the
    workspaces that it has mounted."""

    incarnation: int
    version: int
    policy: Policy = NO_RULES
    mounts: tuple[Mount, ...] = ()


@dataclass(frozen=True)
class NodeView:
    """The part of a node's report that is sent every second, for placement; see `NodeReport`.

    `versions` are the beginnings of digests. If they are not all, `mark` identifies all of them.
    """

    templates: tuple[str, ...] = ()
    memory_mib: int = 0
    disk_mib: int = 0
    shelves: tuple[ShelfFact, ...] = ()
    generation: int = 0
    goldens: tuple[GoldenFact, ...] = ()
    versions: frozenset[str] = frozenset()
    mark: str = ""
    is_unable: bool = False
    """Something that its report names prevents it from starting machines."""

    def has(self, template: str) -> bool:
        """Tell whether the node can start machines of a template, or of a version."""
        _, _, digest = template.partition("@")
        return digest[:SHORT] in self.versions if digest else template in self.templates

    def is_unsure_of(self, template: str) -> bool:
        """Tell whether only the whole report says if the node has a version."""
        return bool(self.mark) and "@" in template and not self.has(template)

    @cached_property
    def versions_mark(self) -> str:
        """What identifies these versions."""
        return sha256("\n".join(sorted(self.versions)).encode()).hexdigest()[:SHORT]

    def within(self, size_max: int) -> "NodeView":
        """Return the part that has at most so many bytes as JSON: a longer heartbeat would not be
        taken, and the node would lose its lease."""
        waiting = sorted(
            (one for one in self.shelves if one.size), key=lambda one: one.size, reverse=True
        )
        templates = _fitting(self.templates, size_max // 2)
        shelves = _fitting(waiting, size_max // 4)
        goldens = _fitting(self.goldens, size_max // 8)
        part = replace(
            self,
            templates=templates,
            shelves=shelves,
            goldens=goldens,
            versions=frozenset(),
            mark=self.versions_mark,
        )
        versions = frozenset(_fitting(sorted(self.versions), size_max - _size_of(part)))
        is_whole = len(versions) == len(self.versions)
        return replace(part, versions=versions, mark="" if is_whole else part.mark)


def _fitting(items: Sequence[_T], size_max: int) -> tuple[_T, ...]:
    """Return the first items that have at most so many bytes as JSON."""
    if _size_of(items) <= size_max:
        return tuple(items)
    sizes = accumulate(_size_of(one) + len(", ") for one in items)
    return tuple(one for one, size in zip(items, sizes, strict=True) if size <= size_max)


def _size_of(value: object) -> int:
    return len(json.dumps(encode(value)))


@dataclass(frozen=True)
class NodeReport:
    """Everything a node holds, and its free capacity.

    `snapshots` are ids, `templates` the slugs of those that are ready, `memory_mib` and `disk_mib`
    what can still be reserved. `missing` says what prevents it from starting machines, and
    `limited` which features its sandboxes lack, a sentence each. `unreadable` are the paths of
    records of machines that cannot be read; the machines are kept. A node that is short of memory
    requests that a sandbox is paused before the kernel kills one. `generation` changes whenever the
    report does, except for free capacity. `versions` are the names of those that users built. A
    node that does not enforce rules (`enforces_rules`), or does not end TLS (`ends_tls`), is of an
    earlier version.
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
    unreadable: tuple[str, ...] = ()
    versions: tuple[str, ...] = ()
    enforces_rules: bool = False
    ends_tls: bool = False

    def view(self) -> NodeView:
        """Return the part that is sent every second."""
        return NodeView(
            self.templates,
            self.memory_mib,
            self.disk_mib,
            self.shelves,
            self.generation,
            self.golden_kinds,
            frozenset(one.partition("@")[2][:SHORT] for one in self.versions),
            is_unable=bool(self.missing),
        )


class NodeOperation(Generic[AnswerT]):
    """Base of the operations of nodes; `core.node_ops` has all of them.

    An operation that `changes` something is refused by a node that has lost its lease. One with
    `limit_s` has to be answered within these seconds; others are waited for as long as the node
    still reports.
    """

    op: ClassVar[str]
    answer: ClassVar[Any]
    changes: ClassVar[bool] = True
    limit_s: ClassVar[float | None] = None


class NodeControl(Protocol):
    """One host. Requests state what should be, and may arrive twice, late or out of order.

    Those about a sandbox name the incarnation they mean, and the version of the sandbox's row that
    they were made from. A node refuses a version older than the latest it has received. Version 0
    stands for a request without a row, and for a removal, which is final up to its incarnation. A
    refused request changes nothing.
    """

    @property
    def node_id(self) -> str:
        """The node's stable id."""
        ...

    async def do(self, operation: NodeOperation[AnswerT]) -> AnswerT:
        """Carry out an operation and return its answer.

        Raises:
            UnavailableError: the node does not answer.
            OtherVersionError: the node is older than the operation.
            SandyardError: as the operation says.
        """
        ...


class ByteStream(Protocol):
    """A bidirectional byte stream with back-pressure."""

    async def read(self, limit: int) -> bytes:
        """Return up to `limit` bytes, at least one, or none at the end of the stream.

        Raises:
            UnavailableError: the connection broke.
            ConflictError: the machine ended, or was paused.
        """
        ...

    async def write(self, data: bytes) -> None:
        """Return once there is room for more.

        Raises: see `read`.
        """
        ...

    async def write_eof(self) -> None:
        """End the writing direction; reading continues."""
        ...


@dataclass(frozen=True)
class Opened(Generic[AnswerT]):
    """An operation that the agent accepted: its answer, and the stream that follows."""

    answer: AnswerT
    stream: ByteStream


class NodeTunnel(Protocol):
    """Connections to the agents of nodes' machines."""

    def open(
        self, machine: MachineRef, operation: Operation[AnswerT]
    ) -> AbstractAsyncContextManager[Opened[AnswerT]]:
        """Request one operation from the agent; the connection is closed after the block.

        Raises:
            NotFoundError: the node has no such machine.
            ConflictError: the machine does not run, or ends before it answers.
            InvalidArgumentError: the agent refused the arguments; the message is the agent's.
            UnsupportedError: the agent is older than the operation.
            UnavailableError: node or agent do not answer.
        """
        ...
