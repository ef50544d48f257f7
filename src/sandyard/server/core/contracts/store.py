"""What is asked of the store: rows, a protocol for each kind, within transactions."""

from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Final, Protocol

from sandyard.server.core.money import Account, PriceList, Prices
from sandyard.server.core.records import (
    Activity,
    ActivityQuery,
    ApiKey,
    AutoTopup,
    Build,
    BuildLine,
    BuildStatus,
    Claim,
    InUse,
    JoinedNode,
    Kept,
    KeyedRequest,
    KeyHolder,
    LedgerEntry,
    Mark,
    Membership,
    NodeSeen,
    NodeStart,
    Organization,
    Project,
    Quarantined,
    RegistryCredential,
    RequestKey,
    RevokedKey,
    Ruled,
    Sandbox,
    SandboxQuery,
    Secret,
    Snapshot,
    SshKey,
    Standing,
    StoragePeriod,
    Template,
    TemplateVersion,
    Ticket,
    Upload,
    UsagePeriod,
    User,
    VersionAbout,
    VersionKey,
    Workspace,
)
from sandyard.server.core.states import Status


@dataclass(frozen=True)
class Hold:
    """A lease to acquire with a write: the server, and the duration by the database's clock."""

    owner: str
    lease: str
    lasts: timedelta


@dataclass(frozen=True)
class Effects:
    """Rows to write with a change of a sandbox, only if the change is written: an entry of the
    feed (`line`), a usage period to open, the time at which the open one ends."""

    line: Activity | None = None
    opens: UsagePeriod | None = None
    closes_at: datetime | None = None


NO_EFFECTS: Final = Effects()


class Turn(Enum):
    """The turn of a transaction that belongs to no organization: which others may run at the same
    time."""

    ALONE = "alone"
    """It runs alone: what it reads does not change before it has ended."""
    SHARED = "shared"
    """It runs concurrently with any other: what it reads may change at once, so each of its
    statements must be correct on its own. For leases, and for records of use."""


class SandboxRows(Protocol):
    """Sandboxes as stored. Every write names the version it read and fails if that has passed."""

    async def insert(
        self, sandbox: Sandbox, *, hold: Hold | None = None, effects: Effects = NO_EFFECTS
    ) -> Sandbox:
        """Add a sandbox, leased at once if `hold` is given, with its effects, and return it with
        its owner's name.

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

    async def named(self, name: str, *, limit: int) -> list[Sandbox]:
        """Return the live ones of a name in every organization, oldest first."""
        ...

    async def with_rules(self, org_id: str) -> list[Sandbox]:
        """Return an organization's sandboxes that have a node and network rules."""
        ...

    async def ruled(self) -> list[Ruled]:
        """Return all sandboxes that have a node and network rules, without decrypting any."""
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
        is_use: bool = False,
        effects: Effects = NO_EFFECTS,
    ) -> Sandbox | None:
        """Write a sandbox, and the effects of that, if its `version` is still the stored one, and
        return it as stored.

        With `lease`, the lease must be held too, and stays held; without, whoever holds one loses
        it, to `hold` if that is given. None if the row has moved on: nothing is written. Tags are
        written with `retag` only, when it was last used with `is_use` only (or by
        `ActivityRows.touch`, beside others).

        Raises:
            AlreadyExistsError: the new name is taken.
        """
        ...

    async def catch_up(self, sandbox: Sandbox, *, version: int, incarnation: int) -> bool:
        """Have a row go on from a later version and incarnation, for its node has seen them; False
        if the row has moved on."""
        ...

    async def on_node(self, node_id: str | None, statuses: frozenset[Status]) -> list[Sandbox]:
        """Return every sandbox of these statuses that was placed on a node, on none for None."""
        ...

    async def standing(
        self, node_id: str, statuses: frozenset[Status], *, known: Mapping[str, Standing]
    ) -> list[Standing]:
        """Return how every sandbox of these statuses stands that was placed on a node.

        What is `known`, by id, is not read again where the row's status and version are the same,
        unless it runs: when another was last used, which has no version, may be out of date.
        """
        ...

    async def marks(
        self, node_ids: Collection[str], statuses: frozenset[Status]
    ) -> Mapping[str, Mark]:
        """Return a mark of every node on which sandboxes of these statuses, or snapshots, are."""
        ...

    async def unplaced_until(self, end: datetime, statuses: frozenset[Status]) -> list[Sandbox]:
        """Return every sandbox of these statuses that is on no node and was to live no longer."""
        ...

    async def with_ssh_key(self, org_id: str, key_id: str) -> list[Sandbox]:
        """Return an organization's sandboxes that took a key of this id and are not gone."""
        ...

    async def mounting(self, workspace_id: str) -> list[Sandbox]:
        """Return every sandbox that has a workspace mounted and is not gone, oldest first."""
        ...

    async def mounted(self) -> frozenset[str]:
        """Return the ids of all workspaces that a running sandbox has mounted."""
        ...

    async def forget_mounts(self, workspace_id: str) -> None:
        """Note that no sandbox has a workspace mounted any more; their versions stay."""
        ...


class LeaseRows(Protocol):
    """Leases on sandboxes, each held by one server."""

    async def claim(self, statuses: frozenset[Status], *, hold: Hold, limit: int) -> list[Claim]:
        """Lease up to `limit` sandboxes of these statuses that are not leased, the stalest first.

        One that is being written at that moment is skipped, and so are those that are ending on a
        lost node: there is nothing to do until it is back.
        """
        ...

    async def waits(self, statuses: frozenset[Status]) -> bool:
        """Tell whether there is a sandbox of these statuses for `claim`."""
        ...

    async def extend(self, sandbox_id: str, *, lease: str, lasts: timedelta | None) -> bool:
        """Extend a held lease to this long from now; None releases it. Return False if it is not
        held."""
        ...

    async def void(self, owner: str) -> None:
        """End all leases of a server that no longer exists."""
        ...


class NodeRows(Protocol):
    """The nodes of the installation, and when one was last heard of."""

    async def heard(self, node_ids: Collection[str], at: datetime) -> None:
        """Note that nodes answered; those that are new are added."""
        ...

    async def find(self, node_id: str) -> NodeSeen | None:
        """Return a node."""
        ...


class JoinedNodeRows(Protocol):
    """Nodes on other hosts, and their leases by the database's clock."""

    async def add(self, node: JoinedNode) -> None:
        """Add a node, which has not started yet."""
        ...

    async def all(self) -> list[JoinedNode]:
        """Return every node by name."""
        ...

    async def find(self, node_id: str) -> JoinedNode | None:
        """Return a node."""
        ...

    async def start(self, node_id: str, start: NodeStart, *, lasts: timedelta) -> int | None:
        """Note a start of a node's process, give it a lease, and return its epoch.

        None if there is no such node, or another process of it has a lease, in another place.
        """
        ...

    async def beat(
        self, beats: Collection[tuple[str, int]], *, lasts: timedelta
    ) -> frozenset[tuple[str, int]]:
        """Extend the leases of nodes, each given with its epoch. Return those whose epoch is still
        the latest."""
        ...

    async def have_compared(
        self,
        node_ids: Collection[str],
        *,
        by: str,
        over: str | None = None,
        lasts: timedelta,
        free_for: timedelta = timedelta(),
    ) -> frozenset[str]:
        """Assign nodes to one control plane for so long, and return those that it has now.

        Nodes of another control plane are skipped, unless it is `over`, from which this one takes
        them over. So are nodes that any control plane has compared within `free_for`.
        """
        ...

    async def lose(self, *, grace: timedelta) -> list[str]:
        """Mark nodes as lost whose lease ended `grace` ago, and return those newly lost."""
        ...

    async def drain(self, node_id: str, *, is_draining: bool) -> bool:
        """Set whether new sandboxes may be placed on a node; return False if there is no such
        node."""
        ...

    async def forget(self, node_id: str) -> bool:
        """Remove a node; False if there is no such node."""
        ...


class InviteRows(Protocol):
    """Invites for nodes, by the digest of their secrets; each can be used once."""

    async def add(self, digest: str, *, lasts: timedelta) -> None:
        """Add an invite with a lifetime."""
        ...

    async def take(self, digest: str) -> bool:
        """Consume an invite; return False if there is no valid one."""
        ...


class SecretRows(Protocol):
    """Secrets of the installation, by name."""

    async def find(self, name: str) -> Mapping[str, str] | None:
        """Return one."""
        ...

    async def add(self, name: str, values: Mapping[str, str]) -> None:
        """Add a secret; the name must be unused."""
        ...

    async def replace(self, name: str, values: Mapping[str, str]) -> None:
        """Replace a secret."""
        ...


class WorkspaceRows(Protocol):
    """Workspaces."""

    async def add(self, workspace: Workspace) -> bool:
        """Add a workspace; False if the organization has one of that slug."""
        ...

    async def personal(self, org_id: str, user_id: str) -> Workspace | None:
        """Return a member's personal workspace."""
        ...

    async def find(self, org_id: str, reference: str) -> Workspace | None:
        """Return an organization's workspace by id or slug; None for one that was removed."""
        ...

    async def of(self, org_id: str) -> list[Workspace]:
        """Return an organization's workspaces that were not removed, the newest first."""
        ...

    async def replace(self, workspace: Workspace) -> None:
        """Update a workspace."""
        ...

    async def erase(self, workspace_id: str) -> None:
        """Delete the row of a workspace."""
        ...

    async def every(self) -> list[Workspace]:
        """Return all workspaces, those that were removed and not forgotten included."""
        ...


class OrganizationRows(Protocol):
    """Organizations."""

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

    async def find_slug(self, slug: str) -> Organization | None:
        """Return the organization of a slug."""
        ...

    async def are_several(self) -> bool:
        """Tell whether there is more than one organization."""
        ...

    async def replace(self, organization: Organization) -> None:
        """Update an organization."""
        ...

    async def first(self) -> Organization | None:
        """Return the oldest organization."""
        ...

    async def every(self) -> list[Organization]:
        """Return all organizations, the oldest first."""
        ...


class UserRows(Protocol):
    """Users and their memberships."""

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
        """Return when a user's membership ended last."""
        ...

    async def member(self, org_id: str, user_id: str) -> Membership | None:
        """Return a user's membership in an organization."""
        ...

    async def without_workspace(self) -> list[tuple[User, Membership]]:
        """Return members that have no personal workspace in their organization: older versions made
        none."""
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
        """Update a project."""
        ...

    async def remove(self, project: Project, *, heir: Project) -> None:
        """Remove a project, and move its resources to `heir`."""
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
        """Update a key."""
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

    async def touch(self, key_id: str, at: datetime) -> None:
        """Note that a key was used."""
        ...

    async def remove(self, org_id: str, key_id: str) -> bool:
        """Remove a key; False if it is not there."""
        ...


class RevokedKeyRows(Protocol):
    """Revoked SSH keys that must be removed from sandboxes' files: once after each start, because
    the disk of a snapshot may contain them."""

    async def add(self, sandbox_id: str, key: SshKey) -> None:
        """Mark a key for removal from a sandbox's files, even if it was removed before."""
        ...

    async def pending(self) -> list[RevokedKey]:
        """Return the keys that were not removed since their sandbox's last start."""
        ...

    async def removed(self, key: RevokedKey) -> None:
        """Record that a key was removed since the sandbox's last start."""
        ...

    async def clear(self) -> None:
        """Remove the entries of sandboxes that no longer exist."""
        ...


class QuarantineRows(Protocol):
    """Machines and snapshots without a row."""

    async def put(self, machine: Quarantined) -> None:
        """Add one, or update what is known of it. When it was found stays, and whether it is
        unwanted, unless it is of a later incarnation."""
        ...

    async def all(self) -> list[Quarantined]:
        """Return all, the longest there first."""
        ...

    async def on_node(self, node_id: str) -> list[Quarantined]:
        """Return those of a node."""
        ...

    async def condemn(self, wanted_id: str) -> bool:
        """Have one removed; return False if there is none."""
        ...

    async def remove(self, ids: Collection[str]) -> None:
        """Remove entries."""
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

    async def ended(self, org_id: str, *, most: int) -> list[UsagePeriod]:
        """Return periods that have ended and are not charged in full, oldest first."""
        ...

    async def unsettled(self, org_id: str) -> list[UsagePeriod]:
        """Return the periods of an organization of which something may be left to charge."""
        ...

    async def owing(self) -> list[str]:
        """Return the organizations with unsettled usage or storage periods."""
        ...

    async def reopen(self, org_id: str, at: datetime, *, most: int) -> int:
        """Close open periods that began before a moment, at that moment, and open new ones in their
        place; return how many."""
        ...

    async def shorten(self, sandbox_id: str, at: datetime) -> None:
        """Have a period that `reopen` divided end at a moment before that, after its last part was
        closed: nothing is owed for what came later."""
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
        """Return the total resources of an organization's live sandboxes, and its uncharged
        usage."""
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

    async def ended(self, org_id: str, *, most: int) -> list[StoragePeriod]:
        """Return periods that have ended and are not charged in full, oldest first."""
        ...

    async def unsettled(self, org_id: str) -> list[StoragePeriod]:
        """See UsageRows.unsettled."""
        ...

    async def reopen(self, org_id: str, at: datetime, *, most: int) -> int:
        """Close open periods that began before a moment, at that moment, and open new ones in their
        place; return how many."""
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
    """Accounts, and their ledgers, whose entries never change."""

    async def account(self, org_id: str) -> Account:
        """Return an organization's account."""
        ...

    async def position(self, org_id: str, now: datetime) -> tuple[InUse, Account]:
        """Return an organization's usage and account. See `UsageRows.in_use`, `account`."""
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
        """Return an organization's settings for automatic top-up."""
        ...

    async def save_auto_topup(self, wish: AutoTopup) -> None:
        """Write the settings for automatic top-up."""
        ...

    async def topped_up(self) -> list[str]:
        """Return the organizations whose balance is topped up automatically."""
        ...


class FactRows(Protocol):
    """Named timestamps of the installation, and the database's clock."""

    async def now(self) -> datetime:
        """Return the time of the clock that leases use."""
        ...

    async def moment(self, name: str) -> datetime | None:
        """Return a named timestamp."""
        ...

    async def note(self, name: str, at: datetime) -> None:
        """Store a named timestamp."""
        ...


class PriceRows(Protocol):
    """The prices of the installation over time, and those that each server has."""

    async def history(self) -> PriceList | None:
        """Return the prices over time, or None if no server has stored any."""
        ...

    async def add(self, prices: Prices, *, since: datetime) -> None:
        """Store prices that hold from a moment on, which is later than all that are stored."""
        ...

    async def note(self, server_id: str, prices: Prices, at: datetime) -> None:
        """Store the prices of a server, and that it was seen."""
        ...

    async def forget(self, *, after: datetime) -> None:
        """Remove prices that would hold only from after a moment on."""
        ...

    async def noted(self, *, since: datetime, until: datetime) -> Mapping[str, Prices]:
        """Return the prices of each server that was seen between two moments."""
        ...


class DutyRows(Protocol):
    """What one server at a time does for all of them, by the database's clock."""

    async def take(self, name: str, holder: str, *, lasts: timedelta) -> bool:
        """Take or extend a duty; return False if another server has it."""
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

    async def extend(self, snapshot_id: str, *, held_until: datetime) -> bool:
        """Extend the deadline of a snapshot in progress; return False if it was removed."""
        ...

    async def complete(self, snapshot_id: str, *, size_bytes: int) -> bool:
        """Mark a snapshot as complete; return False if it was removed."""
        ...

    async def rename(self, snapshot_id: str, name: str | None) -> None:
        """Change a snapshot's name.

        Raises:
            AlreadyExistsError: another one of the organization has it.
        """
        ...

    async def remove(self, snapshot_id: str, *, at: datetime) -> bool:
        """Remove a snapshot, and remember that it was; False if it does not exist."""
        ...

    async def removed(self, node_id: str) -> Mapping[str, datetime]:
        """Return which of a node's snapshots were removed, and when.

        Only these may be deleted there: a snapshot that is not in the database at all may be
        newer than the backup that the database was restored from.
        """
        ...

    async def kept(self, org_id: str) -> Kept:
        """Return what an organization keeps."""
        ...

    async def forget(self, snapshot_ids: Collection[str]) -> None:
        """Forget that these were removed: nothing of them is left."""
        ...

    async def on_node(self, node_id: str) -> list[Snapshot]:
        """Return every snapshot that a node keeps or is making."""
        ...

    async def is_awaited(self, snapshot_id: str) -> bool:
        """Tell whether a sandbox that is starting comes from this snapshot."""
        ...


class TemplateRows(Protocol):
    """The templates of organizations."""

    async def put(self, template: Template) -> None:
        """Add a template, or replace the one with its slug."""
        ...

    async def find(self, org_id: str, slug: str) -> Template | None:
        """Return an organization's template."""
        ...

    async def of(self, org_id: str) -> list[Template]:
        """Return an organization's templates by slug."""
        ...

    async def remove(self, org_id: str, slug: str, *, at: datetime) -> bool:
        """Remove a template and mark all its versions as removed; False if there is none."""
        ...


class VersionRows(Protocol):
    """The versions of templates. Removed ones are only in `removed`."""

    async def add(self, version: TemplateVersion) -> None:
        """Add a version."""
        ...

    async def of(self, org_id: str, slug: str) -> list[TemplateVersion]:
        """Return the versions of a template, newest first."""
        ...

    async def kept(self, org_id: str) -> Kept:
        """Return how many versions an organization has, and their total size."""
        ...

    async def remove(self, version: TemplateVersion, *, at: datetime) -> bool:
        """Mark a version as removed; False if it is already."""
        ...

    async def every(self) -> list[VersionKey]:
        """Return all versions of all organizations, oldest first."""
        ...

    async def removed(self) -> list[TemplateVersion]:
        """Return the removed versions whose bytes may still be on nodes."""
        ...

    async def is_kept(self, version: TemplateVersion | VersionKey) -> bool:
        """Tell whether a version that is not removed has the same slug and digest."""
        ...

    async def is_used(self, version: TemplateVersion) -> bool:
        """Tell whether a sandbox or a snapshot needs a version."""
        ...

    async def about(self, org_id: str, slug: str, digest: str) -> VersionAbout | None:
        """Return what belongs to a version, removed or not."""
        ...

    async def forget(self, version: TemplateVersion) -> None:
        """Forget a removed version: nothing of it is left."""
        ...


class BuildRows(Protocol):
    """Builds, and their logs."""

    async def add(self, build: Build) -> None:
        """Add a build."""
        ...

    async def find(self, org_id: str, build_id: str) -> Build | None:
        """Return an organization's build, without its plan."""
        ...

    async def page(self, org_id: str, slug: str, *, limit: int) -> list[Build]:
        """Return the latest builds of a template, newest first and without their plans."""
        ...

    async def count(self, org_id: str, *statuses: BuildStatus) -> int:
        """Return how many builds of an organization have one of these statuses."""
        ...

    async def waiting(self, org_id: str, build_id: str) -> Build | None:
        """Return an announced build that waits for its steps, with its plan so far."""
        ...

    async def describe(self, build: Build) -> bool:
        """Write the whole plan of an announced build, and queue it; False if it is not waiting."""
        ...

    async def claim(self, server_id: str, *, lease: str, lasts: timedelta) -> Build | None:
        """Take the lease of the oldest build without a valid lease that this server can work on
        and that may begin (see `Build.at_once`); None if there is none.

        Servers that claim at the same moment may together exceed `at_once` by one each.
        """
        ...

    async def place(self, build: Build) -> int:
        """Return the place of a queued build among those of its organization, from 1."""
        ...

    async def save(self, build: Build, *, lease: str, lasts: timedelta | None) -> Build | None:
        """Write a build and keep its lease, or give that up for None. `is_cancelled` and the plan
        are not written; the plan of a build that has ended is removed.

        Return the build as it is now; None, with nothing written, if the lease was lost.
        """
        ...

    async def cancel(self, org_id: str, build_id: str, *, at: datetime) -> bool:
        """Request that a build is cancelled, and end it if no server has started it; False if it
        has ended, or is not there."""
        ...

    async def give_up(self, *, before: datetime, at: datetime, error: str) -> list[Build]:
        """End the builds from before a time that only one server can work on, and that it does not
        work on. Return them."""
        ...

    async def expire(self, *, before: datetime, at: datetime, error: str) -> None:
        """End the announced builds from before a time that still wait for their steps."""
        ...

    async def prune(self, org_id: str, slug: str, *, keep: int, keep_logs: int) -> None:
        """Remove the ended builds of a template but for the newest `keep` and those of versions,
        and the logs of all but the newest `keep_logs`."""
        ...

    async def append(self, build_id: str, lines: Sequence[BuildLine]) -> None:
        """Add lines to a log."""
        ...

    async def read(self, build_id: str, *, after: int, limit: int) -> list[BuildLine]:
        """Return the lines of a log after a number."""
        ...


class CredentialRows(Protocol):
    """Credentials for registries of container images."""

    async def add(self, credential: RegistryCredential) -> None:
        """Add a credential."""
        ...

    async def find(self, org_id: str, credential_id: str) -> RegistryCredential | None:
        """Return an organization's credential."""
        ...

    async def of(self, org_id: str) -> list[RegistryCredential]:
        """Return an organization's credentials, newest first."""
        ...

    async def remove(self, org_id: str, credential_id: str) -> bool:
        """Remove a credential; False if there is none."""
        ...


class OrgSecretRows(Protocol):
    """Secrets of organizations; each name is there once in one."""

    async def add(self, secret: Secret) -> None:
        """Add a secret.

        Raises:
            AlreadyExistsError: there is one of that name.
        """
        ...

    async def find(self, org_id: str, name: str) -> Secret | None:
        """Return an organization's secret."""
        ...

    async def of(self, org_id: str) -> list[Secret]:
        """Return an organization's secrets, by name."""
        ...

    async def replace(self, secret: Secret) -> bool:
        """Replace the hosts and the value of a secret; False if there is none."""
        ...

    async def remove(self, org_id: str, name: str) -> bool:
        """Remove a secret; False if there is none."""
        ...

    async def used(self, org_id: str, name: str, *, at: datetime) -> None:
        """Note when a secret was used; an earlier time changes nothing."""
        ...


class UploadRows(Protocol):
    """Files that were uploaded for builds."""

    async def add(self, upload: Upload) -> None:
        """Add an upload."""
        ...

    async def find(self, org_id: str, upload_id: str) -> Upload | None:
        """Return an organization's upload."""
        ...

    async def kept(self, org_id: str) -> Kept:
        """Return how many uploads an organization has, and their total size."""
        ...

    async def old(self, server_id: str, *, before: datetime) -> list[Upload]:
        """Return the uploads on a server from before a time."""
        ...

    async def remove(self, upload_id: str, *, since: datetime | None = None) -> bool:
        """Remove an upload, with `since` only if it is from that time; False if there is none."""
        ...


class RequestRows(Protocol):
    """Stored results of requests with an idempotency key."""

    async def find(self, key: RequestKey) -> KeyedRequest | None:
        """Return the stored result for a key."""
        ...

    async def add(self, key: RequestKey, request: KeyedRequest, *, at: datetime) -> None:
        """Store the result for a key."""
        ...

    async def remove(self, key: RequestKey, *, before: datetime | None = None) -> None:
        """Forget one; with `before`, only if it was added before that time."""
        ...

    async def forget(self, *, before: datetime) -> None:
        """Remove those from before a time."""
        ...


class TicketRows(Protocol):
    """Tickets, by the digest of their secrets."""

    async def put(self, ticket: Ticket) -> None:
        """Add a ticket; one of the same digest is the same ticket."""
        ...

    async def find(self, digest: str) -> Ticket | None:
        """Return a ticket without consuming it."""
        ...

    async def take(self, digest: str, kind: str) -> Ticket | None:
        """Consume a ticket of a kind and return it; of concurrent calls, one gets it."""
        ...

    async def forget(self, *, before: datetime) -> None:
        """Remove tickets that expired before a time."""
        ...


class Transaction(Protocol):
    """All rows, as of one moment; writes become visible together or not at all."""

    @property
    def sandboxes(self) -> SandboxRows:
        """Sandboxes."""
        ...

    @property
    def leases(self) -> LeaseRows:
        """Who works on which sandbox."""
        ...

    @property
    def prices(self) -> PriceRows:
        """Prices over time."""
        ...

    @property
    def duties(self) -> DutyRows:
        """Who has which duty."""
        ...

    @property
    def joined_nodes(self) -> JoinedNodeRows:
        """Nodes on other hosts."""
        ...

    @property
    def invites(self) -> InviteRows:
        """Invites for nodes."""
        ...

    @property
    def secrets(self) -> SecretRows:
        """Secrets of the installation itself."""
        ...

    @property
    def nodes(self) -> NodeRows:
        """Nodes."""
        ...

    @property
    def workspaces(self) -> WorkspaceRows:
        """Workspaces."""
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
    def quarantine(self) -> QuarantineRows:
        """Machines without a sandbox's row."""
        ...

    @property
    def revoked_keys(self) -> RevokedKeyRows:
        """SSH keys to be removed from the files of sandboxes."""
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
    def templates(self) -> TemplateRows:
        """The templates of organizations."""
        ...

    @property
    def versions(self) -> VersionRows:
        """The versions of templates."""
        ...

    @property
    def builds(self) -> BuildRows:
        """Builds of templates."""
        ...

    @property
    def credentials(self) -> CredentialRows:
        """Credentials for registries."""
        ...

    @property
    def org_secrets(self) -> OrgSecretRows:
        """Secrets of organizations."""
        ...

    @property
    def uploads(self) -> UploadRows:
        """Uploads for builds."""
        ...

    @property
    def tickets(self) -> TicketRows:
        """The tickets."""
        ...

    @property
    def requests(self) -> RequestRows:
        """Requests that carried an idempotency key."""
        ...


class Store(Protocol):
    """The database. A transaction is short, and waits for nothing else.

    Every method raises UnavailableError if the database does not answer or remains locked.
    """

    def read(self) -> AbstractAsyncContextManager[Transaction]:
        """Open a read-only transaction: everything as of one moment."""
        ...

    def glance(self) -> AbstractAsyncContextManager[Transaction]:
        """Open a read of exactly one statement, which takes the fewest round trips.

        A second statement, or a write, raises InternalError.
        """
        ...

    def write(self, turn: Turn | str) -> AbstractAsyncContextManager[Transaction]:
        """Open a transaction that commits at the end of the block, and rolls back on an error.

        `turn` is the id of the organization whose rows are used, or a `Turn`. Transactions of one
        organization are serialized; those of different organizations may run concurrently. A
        transaction sees everything that was committed before its turn.
        """
        ...

    async def ping(self) -> None:
        """Return if the database answers, within two seconds.

        If a database on another host does not, all that waits for it fails, and so does whatever
        comes, until it answers a ping.

        Raises:
            UnavailableError: it does not answer.
        """
        ...
