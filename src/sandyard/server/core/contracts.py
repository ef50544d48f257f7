"""The seams of the house: what one room asks of another without knowing who answers.

`app` alone decides what stands behind each. Every implementation passes the same examination under
`tests/contract`.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Protocol

from sandyard.server.core.money import Account
from sandyard.server.core.records import (
    Activity,
    ActivityQuery,
    ApiKey,
    AutoTopup,
    Claim,
    InUse,
    KeyedRequest,
    KeyHolder,
    LedgerEntry,
    Membership,
    Organization,
    Project,
    RequestKey,
    Sandbox,
    SandboxQuery,
    Snapshot,
    SshKey,
    StoragePeriod,
    UsagePeriod,
    User,
    Workspace,
)
from sandyard.server.core.shapes import Shape
from sandyard.server.core.states import Status
from sandyard.server.core.wire import Op


class Clock(Protocol):
    """Where time comes from; a test's clock can jump."""

    def now(self) -> datetime:
        """Return the wall clock's time, aware and in UTC."""
        ...

    def monotonic(self) -> float:
        """Return seconds that never run backwards, for measuring waits."""
        ...

    async def sleep(self, seconds: float) -> None:
        """Return after `seconds`."""
        ...


class Subscription(Protocol):
    """Hints on one topic since the subscription was made."""

    async def wait(self, limit_s: float) -> bool:
        """Return True once a hint has come that was not waited for before, False at the limit."""
        ...


class Bus(Protocol):
    """Carries hints that something is worth a look. Losing one costs a moment, never a sandbox."""

    def hint(self, topic: str) -> None:
        """Wake whoever subscribed to `topic`; never blocks."""
        ...

    def subscribe(self, topic: str) -> AbstractContextManager[Subscription]:
        """Collect hints on `topic` until the block is left."""
        ...


# --- the node ---------------------------------------------------------------------------------


class Origin(StrEnum):
    """What a machine is to come from."""

    NEW = "new"  # its template
    SNAPSHOT = "snapshot"  # a snapshot, in place of all that the sandbox had
    OWN = "own"  # what the sandbox itself has: its saved state, else its disk


class Way(StrEnum):
    """How a machine came up."""

    POOL = "pool"  # it waited, running
    RESTORE = "restore"  # a clone of its template's golden machine
    BOOT = "boot"  # from cold
    SNAPSHOT = "snapshot"  # a clone of a snapshot
    RESUME = "resume"  # from its own saved state
    RESTART = "restart"  # booted from its own disk


@dataclass(frozen=True)
class MachineWish:
    """What a node should hold: one incarnation of a sandbox, and what it is to be made of.

    `tenant` is who wants it, so that those who wait take turns fairly.
    """

    sandbox_id: str
    incarnation: int
    template: str
    shape: Shape
    hostname: str
    tenant: str
    env: Mapping[str, str] = field(repr=False)
    authorized_keys: tuple[str, ...] = ()
    root_password_hash: str | None = field(default=None, repr=False)
    origin: Origin = Origin.NEW
    snapshot_id: str | None = None


class MachineState(StrEnum):
    """What a node knows of a machine."""

    STARTING = "starting"
    RUNNING = "running"
    SILENT = "silent"  # it lives, and its agent does not answer
    PAUSED = "paused"  # saved, whole, and using no memory
    DEAD = "dead"


@dataclass(frozen=True)
class MachineFact:
    """What a node holds for one sandbox."""

    sandbox_id: str
    incarnation: int
    state: MachineState
    ip: str | None = None
    driver: str | None = None
    os: str | None = None
    way: Way | None = None
    reason_code: str = ""
    reason_message: str = ""


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
class NodeReport:
    """All that a node holds now.

    `snapshots` are ids; `missing` says what keeps it from starting machines, a sentence each. A
    node that is short of memory asks for some sandbox to be paused before the kernel ends one.
    """

    node_id: str
    machines: tuple[MachineFact, ...]
    snapshots: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    is_short_of_memory: bool = False


class NodeControl(Protocol):
    """One host. Asks are wishes: each may be repeated, and each names the incarnation it means."""

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
            ConflictError: the wish was withdrawn meanwhile, or a later incarnation is here.
            DamagedError: the saved state or snapshot cannot be used, now or later.
            InternalError: the machine could not be started; the message says why.
        """
        ...

    async def ensure_paused(self, sandbox_id: str, *, incarnation: int) -> int:
        """Return once the machine is saved and uses no memory; at once if it is.

        What is returned are the bytes that it takes on disk.

        On failure it runs on.

        Raises:
            NotFoundError: the node holds no such machine.
            ConflictError: the machine is dead, or the wish was withdrawn.
            UnavailableError: not now; the message says what is in the way.
            UnsupportedError: the driver cannot save machines.
        """
        ...

    async def ensure_gone(self, sandbox_id: str, *, incarnation: int) -> None:
        """Return once nothing of the sandbox is left, up to and including `incarnation`.

        What is under way for it is broken off. A later incarnation is left alone.

        Raises:
            UnavailableError: something would not go away; try again.
        """
        ...

    async def ensure_snapshot(
        self, snapshot_id: str, *, sandbox_id: str, incarnation: int
    ) -> SnapshotFact:
        """Return once the snapshot is complete; the machine goes on as it was.

        Raises: see `ensure_paused`.
        """
        ...

    async def drop_snapshot(self, snapshot_id: str) -> None:
        """Return once nothing of the snapshot is left; what was made from it lives on."""
        ...

    async def check_room(self, template: str, shape: Shape) -> bool:
        """Return if one more machine has room now, and whether one waits, running, for this.

        Raises:
            NoCapacityError: it has not; the message says what is short.
        """
        ...

    async def report(self) -> NodeReport:
        """Return what the node holds, machines that died included until they are made gone."""
        ...

    async def templates(self) -> tuple[TemplateFact, ...]:
        """Return every template the node knows, built or not."""
        ...


class ByteStream(Protocol):
    """Bytes both ways, with back-pressure."""

    async def read(self, limit: int) -> bytes:
        """Return up to `limit` bytes, at least one, or none at the end of the stream.

        Raises:
            UnavailableError: the other side is gone without an end.
        """
        ...

    async def write(self, data: bytes) -> None:
        """Return once the other side has room for more.

        Raises:
            UnavailableError: the other side is gone.
        """
        ...

    async def write_eof(self) -> None:
        """Say that no more will be written; reading goes on."""
        ...


@dataclass(frozen=True)
class Opened:
    """An operation that the agent accepted: what it answered, and the stream that follows."""

    values: Mapping[str, object]
    stream: ByteStream


class NodeTunnel(Protocol):
    """The way to the agents of a node's machines."""

    def open(
        self, sandbox_id: str, *, incarnation: int, op: Op, args: Mapping[str, object]
    ) -> AbstractAsyncContextManager[Opened]:
        """Ask the agent for one operation; leaving the block closes the connection.

        Raises:
            NotFoundError: the node holds no such machine.
            ConflictError: the machine is dead, or dies before it answers.
            InvalidArgumentError: the agent refused the arguments; the message is the agent's.
            UnavailableError: the agent does not answer.
        """
        ...


# --- who people are, and how they pay ---------------------------------------------------------


@dataclass(frozen=True)
class Session:
    """What a session token says, once its signature was found good.

    `subject` and `org` are the provider's names for user and organization; `org` is None where the
    token is for no organization. `permissions` is None where it says nothing of them.
    """

    subject: str
    org: str | None
    org_name: str | None
    role: str | None
    permissions: tuple[str, ...] | None
    email: str | None
    is_email_verified: bool
    first_name: str | None
    last_name: str | None
    picture_url: str | None
    issued_at: datetime


class Sessions(Protocol):
    """Reads session tokens."""

    async def read(self, token: str) -> Session:
        """Return what a token says.

        Raises:
            InvalidTokenError: it is malformed, not signed by the provider, or not for us.
            TokenExpiredError: it was good once.
            UnavailableError: the provider's keys cannot be had now.
        """
        ...


@dataclass(frozen=True)
class Checkout:
    """A page of the payment provider's on which one amount is paid."""

    url: str
    session_id: str


@dataclass(frozen=True)
class Payment:
    """An amount that was paid. `reference` is the provider's, the same however often it is told.

    One that is not `is_paid` yet is told of later, if it ever is.
    """

    org_id: str
    amount_cents: int
    reference: str
    customer_id: str | None
    is_paid: bool = True
    is_automatic: bool = False


class Payments(Protocol):
    """The payment provider."""

    async def check_out(
        self, *, org_id: str, amount_cents: int, success_url: str, cancel_url: str
    ) -> Checkout:
        """Return a page on which an organization pays an amount.

        Raises:
            InvalidArgumentError: the provider does not take what was asked.
            UnavailableError: the provider is not set up or does not answer.
        """
        ...

    async def charge(
        self, *, org_id: str, customer_id: str, amount_cents: int, key: str
    ) -> Payment:
        """Charge the card that a customer saved; asked twice with one key, once.

        Raises:
            ConflictError: the charge was refused for good.
            UnavailableError: the provider is not set up or does not answer: what became of the
                charge is not known, and is found out by asking again with the same key.
        """
        ...

    def read_event(self, payload: bytes, signature: str) -> Payment | None:
        """Return the payment that the provider tells of; None for anything else.

        Raises:
            InvalidTokenError: it is not signed by the provider, or too old.
            UnavailableError: the provider is not set up.
        """
        ...


# --- the store --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Hold:
    """A lease to take together with a write: who works on the sandbox, and until when."""

    lease: str
    until: datetime


class SandboxRows(Protocol):
    """Sandboxes as stored. Every write names the version it read and fails if that has passed."""

    async def insert(self, sandbox: Sandbox, *, hold: Hold | None = None) -> None:
        """Add a sandbox, leased at once if `hold` is given.

        Raises:
            AlreadyExistsError: the organization has a live sandbox of that name.
        """
        ...

    async def find(self, sandbox_id: str) -> Sandbox | None:
        """Return a sandbox of any status and any organization."""
        ...

    async def find_named(self, org_id: str, name: str) -> Sandbox | None:
        """Return an organization's live sandbox of that name."""
        ...

    async def page(self, query: SandboxQuery) -> list[Sandbox]:
        """Return one page, newest first, without `destroyed` and `orphaned` unless asked for."""
        ...

    async def replace(
        self,
        sandbox: Sandbox,
        *,
        lease: str | None = None,
        hold: Hold | None = None,
        retag: bool = False,
    ) -> Sandbox | None:
        """Write a sandbox if its `version` is still the stored one, and return it as stored.

        With `lease`, the lease must be held too, and stays held; without, whoever holds one loses
        it, to `hold` if that is given. None if the row has moved on: nothing is written. Tags are
        written with `retag` only; when it was last used is written by `ActivityRows.touch` only.

        Raises:
            AlreadyExistsError: the new name is taken.
        """
        ...

    async def claim(
        self, statuses: frozenset[Status], *, lease: str, now: datetime, until: datetime, limit: int
    ) -> list[Claim]:
        """Lease up to `limit` sandboxes of these statuses that nobody holds, the stalest first."""
        ...

    async def extend(self, sandbox_id: str, *, lease: str, until: datetime | None) -> bool:
        """Move the end of a lease that is held; None gives it back. False if it is not held."""
        ...

    async def on_node(self, node_id: str | None, statuses: frozenset[Status]) -> list[Sandbox]:
        """Return every sandbox of these statuses that was placed on a node, on none for None."""
        ...


class OrganizationRows(Protocol):
    """Organizations, and the workspaces that come with them."""

    async def add(self, organization: Organization, project: Project) -> None:
        """Add an organization with its default project and an account with nothing in it.

        Raises:
            AlreadyExistsError: another has its slug or external id.
        """
        ...

    async def find(self, org_id: str) -> Organization | None:
        """Return an organization by id."""
        ...

    async def find_external(self, external_id: str) -> Organization | None:
        """Return the organization that the identity provider calls so."""
        ...

    async def replace(self, organization: Organization) -> None:
        """Write an organization that is there."""
        ...

    async def every(self) -> list[Organization]:
        """Return all organizations, the oldest first."""
        ...

    async def add_workspace(self, workspace: Workspace) -> None:
        """Add a workspace; nothing if the organization has one of that slug."""
        ...

    async def personal_workspace(self, org_id: str, user_id: str) -> Workspace | None:
        """Return a member's personal workspace."""
        ...


class UserRows(Protocol):
    """Users, and what they are in organizations."""

    async def add(self, user: User) -> None:
        """Add a user.

        Raises:
            AlreadyExistsError: another has the e-mail address or external id.
        """
        ...

    async def find(
        self,
        *,
        user_id: str | None = None,
        external_id: str | None = None,
        email: str | None = None,
    ) -> User | None:
        """Return a user by one of these."""
        ...

    async def replace(self, user: User) -> None:
        """Write a user that is there.

        Raises:
            AlreadyExistsError: another has the e-mail address or external id.
        """
        ...

    async def put_member(self, membership: Membership) -> None:
        """Make a user a member of an organization, or change the role of one."""
        ...

    async def remove_member(self, org_id: str, user_id: str, at: datetime) -> bool:
        """End a membership; False if there is none."""
        ...

    async def removed_at(self, org_id: str, user_id: str) -> datetime | None:
        """Return when somebody's membership was ended last."""
        ...

    async def member(self, org_id: str, user_id: str) -> Membership | None:
        """Return what a user is in an organization."""
        ...

    async def members(self, org_id: str) -> list[tuple[User, Membership]]:
        """Return an organization's members, the longest there first."""
        ...

    async def organizations_of(self, user_id: str) -> list[tuple[Organization, Membership]]:
        """Return the organizations that a user belongs to, the longest there first."""
        ...


class ProjectRows(Protocol):
    """Projects."""

    async def add(self, project: Project) -> None:
        """Add a project.

        Raises:
            AlreadyExistsError: the organization has one of that slug.
        """
        ...

    async def find(self, org_id: str, project_id: str | None) -> Project | None:
        """Return an organization's project, the default one for None."""
        ...

    async def every(self, org_id: str) -> list[Project]:
        """Return an organization's projects, the default one first, then the newest."""
        ...

    async def replace(self, project: Project) -> None:
        """Write a project that is there."""
        ...

    async def remove(self, project: Project, *, heir: Project) -> None:
        """Remove a project; what it held is the heir's."""
        ...


class KeyRows(Protocol):
    """API keys."""

    async def add(self, key: ApiKey) -> None:
        """Add a key."""
        ...

    async def find(self, org_id: str, key_id: str) -> ApiKey | None:
        """Return an organization's key, revoked and expired ones included."""
        ...

    async def holder(self, digest: str) -> KeyHolder | None:
        """Return the key of that digest whose owner is a member still."""
        ...

    async def replace(self, key: ApiKey) -> None:
        """Write a key that is there."""
        ...

    async def page(
        self,
        org_id: str,
        *,
        owner_user_id: str | None,
        limit: int,
        after: tuple[datetime, str] | None = None,
    ) -> list[ApiKey]:
        """Return one page of the keys that are not revoked, newest first."""
        ...

    async def touch(self, key_id: str, at: datetime) -> None:
        """Note that a key was used."""
        ...


class SshKeyRows(Protocol):
    """Public keys that open an organization's sandboxes."""

    async def add(self, key: SshKey) -> None:
        """Add a key.

        Raises:
            AlreadyExistsError: the organization has it.
        """
        ...

    async def find(self, org_id: str, key_id: str) -> SshKey | None:
        """Return an organization's key by id."""
        ...

    async def every(self, org_id: str) -> list[SshKey]:
        """Return an organization's keys, newest first."""
        ...

    async def remove(self, org_id: str, key_id: str) -> bool:
        """Remove a key; False if it is not there."""
        ...


class ActivityRows(Protocol):
    """The activity feed; rows are added and read, never changed."""

    async def append(self, activity: Activity) -> None:
        """Add one line."""
        ...

    async def touch(self, sandbox_id: str, *, at: datetime, kind: str) -> None:
        """Note when and how a sandbox was last used; its version stays."""
        ...

    async def page(self, query: ActivityQuery) -> list[Activity]:
        """Return one page, newest first."""
        ...


class UsageRows(Protocol):
    """Usage periods; at most one is open for a sandbox, which the database enforces."""

    async def open(self, period: UsagePeriod) -> None:
        """Open a period.

        Raises:
            InternalError: one is open already.
        """
        ...

    async def close(self, sandbox_id: str, at: datetime) -> bool:
        """Close the open period, if there is one; never before its own start."""
        ...

    async def of_sandbox(self, sandbox_id: str) -> list[UsagePeriod]:
        """Return a sandbox's periods, oldest first."""
        ...

    async def unsettled(self, org_id: str) -> list[UsagePeriod]:
        """Return the periods of an organization of which something may be left to charge."""
        ...

    async def owing(self) -> list[str]:
        """Return the organizations that have such periods, of either kind."""
        ...

    async def charge(self, periods: Sequence[UsagePeriod]) -> None:
        """Write what was charged of periods, and whether they are settled."""
        ...

    async def within(
        self, org_id: str, *, since: datetime, owner_user_id: str | None
    ) -> list[UsagePeriod]:
        """Return periods that reach beyond a moment, of an organization or one member in it."""
        ...

    async def in_use(self, org_id: str, now: datetime) -> InUse:
        """Return what an organization's live sandboxes take together, and what is not charged."""
        ...


class StorageRows(Protocol):
    """Periods in which bytes are kept; at most one is open for each thing that keeps some."""

    async def open(self, period: StoragePeriod) -> None:
        """Open a period.

        Raises:
            InternalError: one is open already.
        """
        ...

    async def close(self, kind: str, resource_id: str, at: datetime) -> bool:
        """Close the open period, if there is one; never before its own start."""
        ...

    async def unsettled(self, org_id: str) -> list[StoragePeriod]:
        """See UsageRows.unsettled."""
        ...

    async def charge(self, periods: Sequence[StoragePeriod]) -> None:
        """See UsageRows.charge."""
        ...

    async def within(self, org_id: str, *, since: datetime) -> list[StoragePeriod]:
        """Return an organization's periods that reach beyond a moment."""
        ...

    async def of(self, kind: str, resource_id: str) -> list[StoragePeriod]:
        """Return the periods of one thing, oldest first."""
        ...


class CreditRows(Protocol):
    """What organizations have, and the ledger of how it came to that; lines are never changed."""

    async def account(self, org_id: str) -> Account:
        """Return an organization's account."""
        ...

    async def save(self, account: Account) -> None:
        """Write an account."""
        ...

    async def post(self, entry: LedgerEntry) -> None:
        """Add one line.

        Raises:
            AlreadyExistsError: one of its type and reference is there.
        """
        ...

    async def find(self, org_id: str, type_: str, reference_id: str) -> LedgerEntry | None:
        """Return the line of that type and reference."""
        ...

    async def history(
        self, org_id: str, *, limit: int, after_id: str | None = None
    ) -> list[LedgerEntry]:
        """Return an organization's lines, newest first, those before a line if one is named."""
        ...

    async def auto_topup(self, org_id: str) -> AutoTopup:
        """Return how an organization wants its balance filled up."""
        ...

    async def save_auto_topup(self, wish: AutoTopup) -> None:
        """Write that."""
        ...

    async def topped_up(self) -> list[str]:
        """Return the organizations whose balance can be filled up by itself."""
        ...


class FactRows(Protocol):
    """Moments that the installation remembers by name."""

    async def moment(self, name: str) -> datetime | None:
        """Return a moment."""
        ...

    async def note(self, name: str, at: datetime) -> None:
        """Remember a moment."""
        ...


class SnapshotRows(Protocol):
    """Snapshots. Those of forks are hidden and go once the forks are made."""

    async def insert(self, snapshot: Snapshot) -> None:
        """Add a snapshot.

        Raises:
            AlreadyExistsError: the organization has one of that name.
        """
        ...

    async def find(self, org_id: str, reference: str) -> Snapshot | None:
        """Return an organization's snapshot by id or name; hidden ones by id only."""
        ...

    async def page(
        self,
        org_id: str,
        *,
        owner_user_id: str | None,
        limit: int,
        after: tuple[datetime, str] | None,
    ) -> list[Snapshot]:
        """Return one page of those that are not hidden, newest first."""
        ...

    async def complete(self, snapshot_id: str, *, size_bytes: int) -> bool:
        """Note that a snapshot is whole; False if it was removed meanwhile."""
        ...

    async def remove(self, snapshot_id: str) -> bool:
        """Remove a snapshot; False if it is not there."""
        ...

    async def on_node(self, node_id: str) -> list[Snapshot]:
        """Return every snapshot that a node keeps or is making."""
        ...

    async def is_awaited(self, snapshot_id: str) -> bool:
        """Tell whether a sandbox that is on its way up is to come from it."""
        ...


class RequestRows(Protocol):
    """Requests that carried a key, so that a repeated one does nothing twice."""

    async def find(self, key: RequestKey) -> KeyedRequest | None:
        """Return what the request of that key was answered with."""
        ...

    async def add(self, key: RequestKey, request: KeyedRequest, *, at: datetime) -> None:
        """Keep what a request is answered with."""
        ...

    async def forget(self, *, before: datetime) -> None:
        """Remove those from before a time."""
        ...


class Transaction(Protocol):
    """All rows, as of one moment; what is written becomes visible together or not at all."""

    @property
    def sandboxes(self) -> SandboxRows:
        """Sandboxes."""
        ...

    @property
    def organizations(self) -> OrganizationRows:
        """Organizations."""
        ...

    @property
    def users(self) -> UserRows:
        """Users and memberships."""
        ...

    @property
    def projects(self) -> ProjectRows:
        """Projects."""
        ...

    @property
    def keys(self) -> KeyRows:
        """API keys."""
        ...

    @property
    def ssh_keys(self) -> SshKeyRows:
        """Public keys of SSH."""
        ...

    @property
    def storage(self) -> StorageRows:
        """Periods in which bytes are kept."""
        ...

    @property
    def credits(self) -> CreditRows:
        """Accounts and the ledger."""
        ...

    @property
    def facts(self) -> FactRows:
        """Moments by name."""
        ...

    @property
    def activity(self) -> ActivityRows:
        """The activity feed."""
        ...

    @property
    def usage(self) -> UsageRows:
        """Usage periods."""
        ...

    @property
    def snapshots(self) -> SnapshotRows:
        """Snapshots."""
        ...

    @property
    def requests(self) -> RequestRows:
        """Requests that carried an idempotency key."""
        ...


class Store(Protocol):
    """The truth. A transaction is short and never spans a call to anything else.

    Every method raises UnavailableError when the database does not answer or stays locked.
    """

    def read(self) -> AbstractAsyncContextManager[Transaction]:
        """Open a transaction that only reads."""
        ...

    def write(self) -> AbstractAsyncContextManager[Transaction]:
        """Open a transaction that commits when the block is left, and rolls back on an error.

        Two of them never interleave their reads and writes.
        """
        ...

    async def ping(self) -> None:
        """Return if the database answers."""
        ...
