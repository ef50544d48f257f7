"""Every operation that a control plane can request from a node: its arguments and its answer.

To add one, add a class here, with its `op` and its `answer`, and its case in `node.requests`.
Limits, NATS and errors treat all of them alike. Nodes may be of an earlier version, as agents may
be: a new field needs a default, and a node refuses an operation that it does not know.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import get_args

from sandyard.server.core.contracts.node import (
    Connection,
    MachineAbout,
    MachineFact,
    MachineWish,
    NodeOperation,
    NodeReport,
    SnapshotFact,
    TemplateFact,
    VersionFact,
)
from sandyard.server.core.egress import Credentials, Policy
from sandyard.server.core.records import VersionAbout
from sandyard.server.core.shapes import Shape

_REPORT_S = 5.0
_SHORT_S = 30.0
_WITHDRAW_S = 10.0


@dataclass(frozen=True)
class EnsureRunning(NodeOperation[MachineFact]):
    """Return once the machine runs and its agent answers; at once if it does already.

    On failure nothing of a new machine is left, and a paused machine is still paused.

    Raises:
        UnavailableError: not now (no driver, template not built, no capacity); retry.
        NotFoundError: the node does not have the template, the snapshot or, for a sandbox that
            should start from its own state, any of that.
        AgentSilentError: the machine was resumed and its agent does not answer; its memory is kept.
        OvertakenError: a later request came first: a later incarnation is here, or this one has
            been running already and was paused since.
        MachineDeadError: this incarnation has been running already, and has ended.
        DamagedError: the saved state or snapshot cannot be used, now or later.
        IncompatibleError: it needs another hypervisor or processor; it is kept.
        InternalError: the machine could not be started; the message says why.
    """

    op = "ensure_running"
    answer = MachineFact

    wish: MachineWish


@dataclass(frozen=True)
class EnsurePaused(NodeOperation[int]):
    """Return once the machine is saved and uses no memory; at once if it is already. The answer is
    the size of its files in bytes. On failure the machine keeps running.

    Raises:
        NotFoundError: the node has no such machine.
        ConflictError: the machine is dead, or the request was cancelled or overtaken.
        UnavailableError: not now; the message says why.
        UnsupportedError: the driver cannot save machines.
    """

    op = "ensure_paused"
    answer = int

    sandbox_id: str
    incarnation: int
    version: int = 0


@dataclass(frozen=True)
class EnsureGone(NodeOperation[None]):
    """Cancel what is in progress, and return once nothing of the sandbox is left, up to and
    including `incarnation`. A later incarnation is not touched.

    Raises:
        ConflictError: the request was overtaken.
        UnavailableError: something could not be released; retry.
    """

    op = "ensure_gone"
    answer = None

    sandbox_id: str
    incarnation: int
    version: int = 0


@dataclass(frozen=True)
class EnsureSnapshot(NodeOperation[SnapshotFact]):
    """Return once the snapshot is complete; the machine continues as it was.

    Raises: see `EnsurePaused`.
    """

    op = "ensure_snapshot"
    answer = SnapshotFact

    snapshot_id: str
    sandbox_id: str
    incarnation: int
    version: int = 0


@dataclass(frozen=True)
class EnsureNetwork(NodeOperation[None]):
    """Return once these rules are in force in a running machine: connections that they do not let
    pass have ended, and the guest was told to trust the authority of the `credentials`. Without
    them, those of before stay in use.

    Raises:
        NotFoundError: the node has no such machine.
        ConflictError: the machine does not run, or the request was overtaken.
        UnavailableError: what enforces the rules does not start. Then nothing passes.
    """

    op = "ensure_network"
    answer = None

    sandbox_id: str
    incarnation: int
    policy: Policy
    credentials: Credentials | None = field(default=None, repr=False)
    version: int = 0


@dataclass(frozen=True)
class FindMachine(NodeOperation[MachineAbout]):
    """Return what the node has on record of a sandbox's machine.

    Raises:
        NotFoundError: it has no such machine.
        DamagedError: its record cannot be read.
    """

    op = "find_machine"
    answer = MachineAbout
    changes = False
    limit_s = _SHORT_S

    sandbox_id: str


@dataclass(frozen=True)
class FindSnapshot(NodeOperation[SnapshotFact]):
    """Return what the node knows of a snapshot.

    Raises:
        NotFoundError: the node does not have it.
        DamagedError, IncompatibleError: it cannot be read.
    """

    op = "find_snapshot"
    answer = SnapshotFact
    changes = False
    limit_s = _SHORT_S

    snapshot_id: str


@dataclass(frozen=True)
class DropSnapshot(NodeOperation[None]):
    """Remove a snapshot; machines that were started from it are not affected."""

    op = "drop_snapshot"
    answer = None
    limit_s = _SHORT_S

    snapshot_id: str


@dataclass(frozen=True)
class FindRoom(NodeOperation[bool]):
    """Check that there is capacity for so many more machines. The answer says whether one waits in
    the pool.

    Raises:
        NoCapacityError: there is none; the message says what is short.
    """

    op = "find_room"
    answer = bool
    changes = False
    limit_s = _SHORT_S

    template: str
    shape: Shape
    count: int = 1


@dataclass(frozen=True)
class ReadJournal(NodeOperation[tuple[Connection, ...]]):
    """Return lines of the sandbox's journal, oldest first: the latest `CONNECTIONS_MAX`, or as many
    that follow a time (seconds since 1970). Only sandboxes with rules have a journal.

    Raises:
        NotFoundError: the node has nothing of the sandbox.
    """

    op = "connections"
    answer = tuple[Connection, ...]
    changes = False
    limit_s = _SHORT_S

    sandbox_id: str
    since: float | None = None


@dataclass(frozen=True)
class ReadConsole(NodeOperation[bytes]):
    """Return the end of the guest's console output, also of a machine that never started.

    Raises:
        NotFoundError: the node has nothing of the sandbox.
    """

    op = "console"
    answer = bytes
    changes = False
    limit_s = _SHORT_S

    sandbox_id: str


@dataclass(frozen=True)
class Report(NodeOperation[NodeReport]):
    """Return the node's report. Dead machines are in it until they are removed."""

    op = "report"
    answer = NodeReport
    changes = False
    limit_s = _REPORT_S


@dataclass(frozen=True)
class ListTemplates(NodeOperation[tuple[TemplateFact, ...]]):
    """Return every template the node knows, built or not."""

    op = "templates"
    answer = tuple[TemplateFact, ...]
    changes = False
    limit_s = _REPORT_S


@dataclass(frozen=True)
class WithdrawWorkspace(NodeOperation[None]):
    """Unmount a workspace in all machines of the node, and stop exporting it. Programs that use it
    get errors from then on.

    Raises:
        UnavailableError: not now; retry.
    """

    op = "withdraw"
    answer = None
    limit_s = _WITHDRAW_S

    workspace_id: str


@dataclass(frozen=True)
class KeepVersion(NodeOperation[VersionFact]):
    """Keep a file in a sandbox, a root file system, as a version of a user's template.

    Raises:
        NotFoundError: the node has no such machine, or the machine no such file.
        InvalidArgumentError: it has more than `size_max` bytes, or is no file system.
        NoCapacityError: the node has no space for it.
        ConflictError: the machine does not run.
    """

    op = "keep_version"
    answer = VersionFact

    sandbox_id: str
    incarnation: int
    path: str
    about: VersionAbout
    size_max: int


@dataclass(frozen=True)
class PrepareVersion(NodeOperation[None]):
    """Return once there is a golden machine of a version with its default shape, if the node makes
    any.

    Raises:
        NotFoundError: the node does not have the version.
        NotReadyError: its command `ready` did not end with 0 in time.
        UnavailableError: not now; retry.
        InternalError: it does not boot; the message says why.
    """

    op = "prepare_version"
    answer = None

    version: str


@dataclass(frozen=True)
class DropVersion(NodeOperation[None]):
    """Remove a version. Machines, snapshots and golden machines that exist keep what they need."""

    op = "drop_version"
    answer = None

    version: str


@dataclass(frozen=True)
class DropStages(NodeOperation[None]):
    """Remove all versions that were kept for a build, except those named."""

    op = "drop_stages"
    answer = None

    build_id: str
    but: tuple[str, ...]


MachineRequest = EnsureRunning | EnsurePaused | EnsureGone | EnsureSnapshot | EnsureNetwork
"""What changes a sandbox's machine, and is done by its owner on the node."""
Query = FindMachine | FindSnapshot | FindRoom | ReadJournal | ReadConsole | Report | ListTemplates
"""What changes nothing."""
VersionRequest = KeepVersion | PrepareVersion | DropVersion | DropStages
"""What concerns versions of users' templates."""
AnyNodeOperation = MachineRequest | Query | VersionRequest | DropSnapshot | WithdrawWorkspace
"""Every operation of nodes that there is."""

BY_OP: Mapping[str, type[AnyNodeOperation]] = {kind.op: kind for kind in get_args(AnyNodeOperation)}
