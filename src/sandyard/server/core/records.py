"""What the store keeps, as frozen values. Times are aware and in UTC."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from sandyard.server.core.shapes import NOTHING, Shape, ShapeSeconds
from sandyard.server.core.states import Status


@dataclass(frozen=True)
class Organization:
    """A tenant: what it owns is invisible to every other.

    `external_id` is the identity provider's name for it. `limits` take the place of its plan's.
    """

    id: str
    name: str
    slug: str
    created_at: datetime
    plan: str = "enterprise"
    external_id: str | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    limits: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class User:
    """A person. `is_operator` says that this one runs the installation."""

    id: str
    email: str
    display_name: str
    created_at: datetime
    external_id: str | None = None
    first_name: str | None = None
    last_name: str | None = None
    picture_url: str | None = None
    is_operator: bool = False


@dataclass(frozen=True)
class Membership:
    """What a user is in an organization. `role_at` is when the role was last set."""

    org_id: str
    user_id: str
    role: str
    created_at: datetime
    role_at: datetime


@dataclass(frozen=True)
class Project:
    """A group of sandboxes within an organization; it never grants anything."""

    id: str
    org_id: str
    name: str
    slug: str
    is_default: bool
    created_at: datetime
    color: str = "#6b7280"


@dataclass(frozen=True)
class Workspace:
    """A folder that outlives sandboxes; a personal one belongs to one member.

    `size_bytes` is what was in it when that was last noted. One `removed_at` is there no more for
    anybody, and what it held is being removed.
    """

    id: str
    org_id: str
    owner_user_id: str | None
    slug: str
    name: str
    is_personal: bool
    created_at: datetime
    updated_at: datetime
    quota_bytes: int = 10 * 1024**3
    size_bytes: int = 0
    last_accessed_at: datetime | None = None
    removed_at: datetime | None = None


@dataclass(frozen=True)
class Mount:
    """A workspace that a sandbox has at a path."""

    workspace_id: str
    path: str
    read_only: bool = False


@dataclass(frozen=True)
class ApiKey:
    """A long-lived credential; only the digest of its secret is kept.

    What a key with `is_test` creates is free of charge and limited in number.
    """

    id: str
    org_id: str
    owner_user_id: str
    name: str
    prefix: str
    digest: str = field(repr=False)
    scopes: tuple[str, ...]
    created_at: datetime
    expires_at: datetime | None = None
    revoked_at: datetime | None = None
    last_used_at: datetime | None = None
    is_test: bool = False
    project_id: str | None = None
    owner_display_name: str = ""
    owner_email: str = ""


@dataclass(frozen=True)
class KeyHolder:
    """An API key with what its owner is in the key's organization, and what that is limited to."""

    key: ApiKey
    role: str
    is_operator: bool
    plan: str
    limits: Mapping[str, int]


@dataclass(frozen=True)
class SshKey:
    """A public key that opens an organization's sandboxes."""

    id: str
    org_id: str
    owner_user_id: str
    name: str
    public_key: str
    fingerprint: str
    key_type: str
    created_at: datetime
    last_used_at: datetime | None = None


@dataclass(frozen=True)
class RevokedKey:
    """A public key that is to be removed from the files of a running sandbox, which came up at
    `started_at`."""

    sandbox_id: str
    fingerprint: str
    public_key: str
    org_id: str
    node_id: str | None
    incarnation: int
    started_at: datetime


@dataclass(frozen=True)
class Ticket:
    """Short-lived access of one `kind` to one sandbox; only the digest of its secret is kept.

    It lets its bearer do what whoever issued it `by` (a key's id, or `user:` and a user's) may do;
    `detail` says what exactly it is for.
    """

    digest: str = field(repr=False)
    kind: str
    org_id: str
    sandbox_id: str
    by: str
    detail: str
    expires_at: datetime


@dataclass(frozen=True)
class Reason:
    """Why a sandbox is where it is: a code for programs, a sentence for people."""

    code: str
    message: str


@dataclass(frozen=True)
class Sandbox:
    """What a user owns. `version` grows with every write and guards it.

    `incarnation` counts the starts of its machine; that of `from_snapshot_incarnation` comes from a
    snapshot, that of `from_disk_incarnation` boots from its own disk. `authorized_keys` are public
    keys and `ssh_key_ids` whence each comes: the id of a key of the organization, or nothing where
    it was given itself. `saved_bytes` is what its saved state takes on disk. `env` and
    `root_password_hash` are secrets: the store keeps the first encrypted, nothing echoes either.
    At `expires_at` it is deleted, or paused if it `pauses_at_end`: then it has no end while it does
    not run, and whenever it comes up another, in `lives_s` seconds.
    """

    id: str
    org_id: str
    owner_user_id: str
    project_id: str
    name: str | None
    status: Status
    version: int
    incarnation: int
    template: str
    shape: Shape
    idle_timeout_s: int
    created_at: datetime
    updated_at: datetime
    tags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    authorized_keys: tuple[str, ...] = ()
    ssh_key_ids: tuple[str, ...] = ()
    root_password_hash: str | None = field(default=None, repr=False)
    metadata: Mapping[str, object] = field(default_factory=dict)
    auto_resume: bool = True
    expires_at: datetime | None = None
    lives_s: int | None = None
    pauses_at_end: bool = False
    node_id: str | None = None
    driver: str | None = None
    ip: str | None = None
    os: str | None = None
    reason: Reason | None = None
    started_at: datetime | None = None
    paused_at: datetime | None = None
    last_activity_at: datetime | None = None
    last_activity_kind: str | None = None
    from_snapshot_id: str | None = None
    from_snapshot_incarnation: int = 0
    from_disk_incarnation: int = 0
    is_test: bool = False
    saved_bytes: int = 0
    mounts: tuple[Mount, ...] = ()
    owner_display_name: str = ""
    owner_email: str = ""

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Its public keys, each with the id of the organization's key, or "" for a literal one."""
        ids = [*self.ssh_key_ids, *("" for _ in self.authorized_keys)]
        return list(zip(self.authorized_keys, ids, strict=False))


@dataclass(frozen=True)
class Standing:
    """What of a sandbox is compared with its machine, again and again; see `Sandbox`."""

    id: str
    org_id: str
    node_id: str | None
    status: Status
    version: int
    incarnation: int
    reason: Reason | None
    idle_timeout_s: int
    expires_at: datetime | None
    pauses_at_end: bool
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    last_activity_at: datetime | None


@dataclass(frozen=True)
class Mark:
    """What is another once anything is written of what a node has: how many sandboxes, the sum of
    their versions, when the last was written; how many snapshots, and how many of those are not
    ready, or hidden."""

    sandboxes: int = 0
    versions: int = 0
    updated_at: datetime | None = None
    snapshots: int = 0
    unready: int = 0


@dataclass(frozen=True)
class Snapshot:
    """A sandbox as it was at one moment, kept to start others from. `size_bytes` is on disk.

    One that is not ready is being made for as long as `held_until` lies ahead. Its `mounts` are
    what the sandbox had mounted.
    """

    id: str
    org_id: str
    owner_user_id: str
    sandbox_id: str
    node_id: str
    name: str | None
    template: str
    os: str | None
    shape: Shape
    is_ready: bool
    is_hidden: bool
    size_bytes: int
    created_at: datetime
    held_until: datetime | None = None
    mounts: tuple[Mount, ...] = ()
    is_test: bool = False

    def is_made(self, now: datetime) -> bool:
        """Tell whether somebody is at work on it."""
        return not self.is_ready and self.held_until is not None and self.held_until > now


@dataclass(frozen=True)
class Kept:
    """The snapshots that an organization keeps, those of forks aside: how many, how large, and how
    many of them are of test keys' sandboxes. One that is being made counts, with no size yet."""

    count: int = 0
    size_bytes: int = 0
    tests: int = 0


@dataclass(frozen=True)
class NodeSeen:
    """A node as the store knows it: when it was heard of first, and last."""

    id: str
    first_seen_at: datetime
    seen_at: datetime


@dataclass(frozen=True)
class NodeStart:
    """One start of a node's process: `boot` is that start's own id, `place` names the host and home
    that it runs in, `host` and `port` are where its tunnel is."""

    boot: str
    place: str
    version: str
    host: str
    port: int


@dataclass(frozen=True)
class JoinedNode:
    """A node on another host. `epoch` counts the starts of its process; it `has_lease` while it may
    be asked for something, and was given up at the end of that, `lost_at`, if it did not come back.
    While it `is_compared`, the control plane that it is `compared_by` compares it.
    """

    id: str
    name: str
    joined_at: datetime
    is_draining: bool = False
    epoch: int = 0
    version: str = ""
    host: str = ""
    port: int = 0
    lease_until: datetime | None = None
    lost_at: datetime | None = None
    compared_by: str = ""
    has_lease: bool = False
    is_compared: bool = False


@dataclass(frozen=True)
class RequestKey:
    """Whose request it was, of which kind, and the key that came with it."""

    org_id: str
    user_id: str
    route: str
    key: str


@dataclass(frozen=True)
class KeyedRequest:
    """A digest of what was asked, and the ids of what was made."""

    digest: str
    resource_ids: tuple[str, ...]


@dataclass(frozen=True)
class SandboxQuery:
    """Which sandboxes of an organization to list, newest first, a page at a time.

    `after` is the creation time and id of the last one of the page before.
    """

    org_id: str
    limit: int
    owner_user_id: str | None = None
    statuses: frozenset[Status] = frozenset()
    tags: tuple[str, ...] = ()
    template: str | None = None
    exclude_template: str | None = None
    project_id: str | None = None
    is_test: bool | None = None
    after: tuple[datetime, str] | None = None


@dataclass(frozen=True)
class Claim:
    """A sandbox that one worker holds until its lease runs out."""

    sandbox: Sandbox
    lease: str


@dataclass(frozen=True)
class ActivityQuery:
    """Which lines of an organization's feed to return, newest first, a page at a time.

    `seen_by` is a member who sees what they did themselves and what became of their sandboxes.
    """

    org_id: str
    limit: int
    seen_by: str | None = None
    matches: Mapping[str, str] = field(default_factory=dict)
    since: datetime | None = None
    until: datetime | None = None
    after: tuple[datetime, str] | None = None


@dataclass(frozen=True)
class Activity:
    """One line of the activity feed, which is the audit log as well; it is never changed."""

    id: str
    org_id: str
    actor_user_id: str | None
    actor_type: str
    event_type: str
    resource_type: str
    resource_id: str
    severity: str
    status: str
    title: str
    summary: str
    created_at: datetime
    sandbox_id: str | None = None
    attributes: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class UsagePeriod:
    """A stretch of time in which a sandbox is charged for; open while `ended_at` is None.

    `posted` are the micros that were charged of it so far; what `is_free` is never charged.
    """

    sandbox_id: str
    org_id: str
    incarnation: int
    shape: Shape
    started_at: datetime
    ended_at: datetime | None = None
    is_free: bool = False
    posted: int = 0
    is_settled: bool = False
    id: int = 0


@dataclass(frozen=True)
class StoragePeriod:
    """A stretch of time in which bytes are kept: a saved state, a snapshot, a workspace.

    `kind` and `resource_id` say of what; at most one is open for each. For the rest see
    UsagePeriod.
    """

    kind: str
    resource_id: str
    org_id: str
    size_bytes: int
    started_at: datetime
    ended_at: datetime | None = None
    is_free: bool = False
    posted: int = 0
    is_settled: bool = False
    id: int = 0


@dataclass(frozen=True)
class LedgerEntry:
    """One line of an organization's ledger; never changed. `amount_cents` is below 0 for usage."""

    id: str
    org_id: str
    type: str
    amount_cents: int
    resource: str | None
    description: str
    reference_id: str | None
    balance_after_cents: int
    created_at: datetime


@dataclass(frozen=True)
class AutoTopup:
    """When an organization wants its balance filled up by itself."""

    org_id: str
    is_enabled: bool = False
    threshold_cents: int = 1000
    amount_cents: int = 2000
    customer_id: str | None = None
    last_at: datetime | None = None
    pending: "PendingTopup | None" = None


@dataclass(frozen=True)
class PendingTopup:
    """A charge that was asked for and of which the outcome is not known; asked again under `key`,
    the provider does it once.
    """

    key: str
    cents: int
    since: datetime


@dataclass(frozen=True)
class InUse:
    """What an organization's live sandboxes take together, and what of it is not charged yet.

    Those that are `active` run, or are on the way up or down; `disk_mib` is of all that live,
    `tests` counts those of test keys. `paid` is the shape of all active ones that are not free,
    added up. `owed` is what the time that is being charged was used for, and `posted` the micros
    that were charged of it.
    """

    active: int = 0
    vcpus: int = 0
    memory_mib: int = 0
    disk_mib: int = 0
    tests: int = 0
    paid: Shape = NOTHING
    owed: ShapeSeconds = field(default_factory=ShapeSeconds)
    posted: int = 0
