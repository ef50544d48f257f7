"""Records of the store, as frozen values. Times are aware and in UTC."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Final, Literal

from sandyard.server.core.egress import NO_RULES, Policy
from sandyard.server.core.shapes import NOTHING, Shape, ShapeSeconds
from sandyard.server.core.states import Status


@dataclass(frozen=True)
class Organization:
    """A tenant. Its resources are invisible to all others.

    `external_id` is its id at the identity provider. `limits` override its plan's.
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
    """A person. `is_operator` says that they operate the installation."""

    id: str
    email: str
    display_name: str
    created_at: datetime
    external_id: str | None = None
    first_name: str | None = None
    last_name: str | None = None
    picture_url: str | None = None
    is_operator: bool = False


Role = Literal["admin", "member"]
ActorKind = Literal["api_key", "user", "system"]


@dataclass(frozen=True)
class Membership:
    """A user's role in an organization. `role_at` is when the role was last set."""

    org_id: str
    user_id: str
    role: Role
    created_at: datetime
    role_at: datetime


@dataclass(frozen=True)
class Project:
    """A group of sandboxes within an organization. It grants no rights."""

    id: str
    org_id: str
    name: str
    slug: str
    is_default: bool
    created_at: datetime
    color: str = "#6b7280"


@dataclass(frozen=True)
class Workspace:
    """A directory that outlives sandboxes; a personal one belongs to one member.

    `size_bytes` is the last stored size. With `removed_at` it is deleted for all users, and its
    contents are being removed.
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
    """A workspace at a path of a sandbox."""

    workspace_id: str
    path: str
    read_only: bool = False


@dataclass(frozen=True)
class ApiKey:
    """A long-lived credential; only the digest of its secret is stored.

    Sandboxes of a key with `is_test` are free and limited in number.
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
    """An API key, its owner's role, and the organization's limits."""

    key: ApiKey
    role: Role
    is_operator: bool
    plan: str
    limits: Mapping[str, int]


@dataclass(frozen=True)
class SshKey:
    """A public key that an organization's sandboxes accept."""

    id: str
    org_id: str
    owner_user_id: str
    name: str
    public_key: str
    fingerprint: str
    key_type: str
    created_at: datetime
    last_used_at: datetime | None = None


QuarantineKind = Literal["machine", "snapshot"]


@dataclass(frozen=True)
class Quarantined:
    """A machine or snapshot that no row belongs to, since the database was restored from a backup.

    `id` is the sandbox's or the snapshot's, `phase` the machine's when it was last looked at. A
    snapshot has no incarnation and no version, and its size on disk. It is removed if it
    `is_unwanted`. Without a `template` nothing is known of it. `network` has a machine's rules
    without headers, or is None while they are not known.
    """

    id: str
    kind: QuarantineKind
    node_id: str
    incarnation: int
    version: int
    phase: str
    template: str
    shape: Shape
    found_at: datetime
    size_bytes: int = 0
    os: str | None = None
    is_unwanted: bool = False
    network: Policy | None = None
    mounts: tuple[Mount, ...] = ()


@dataclass(frozen=True)
class RevokedKey:
    """A public key to be removed from the files of a running sandbox, which was started at
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
    """Short-lived access of one `kind` to one sandbox; only the digest of its secret is stored.

    It grants what its issuer `by` (a key's id, or `user:` and a user's id) may do. `detail` belongs
    to the kind.
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
    """The reason for a status: a code for programs, a sentence for people."""

    code: str
    message: str


NEXT_START: Final = 2**31 - 1
"""More than any incarnation. See `Sandbox`."""


@dataclass(frozen=True)
class Sandbox:
    """What a user owns. `version` grows with every write and guards it.

    `incarnation` counts the starts of its machine; that of `from_snapshot_incarnation` comes from a
    snapshot, that of `from_disk_incarnation` boots from its own disk, as does the next one that
    succeeds if this is `NEXT_START`. `authorized_keys` are public
    keys and `ssh_key_ids` whence each comes: the id of a key of the organization, or nothing where
    it was given itself. `saved_bytes` is what its saved state takes on disk. `env` and
    `root_password_hash` are secrets: the store keeps the first encrypted, nothing echoes either.
    At `expires_at` it is deleted, or paused if it `pauses_at_end`: then it has no end while it does
    not run, and whenever it comes up another, in `lives_s` seconds. If it does not `keeps_memory`,
    it boots from its disk after such a pause. With `public_ports` its ports
    are open to everyone under the names that the E2B API gives them, and `port_host` is the Host
    header that they get there, with `${PORT}` for the port. `network` is what it may reach.
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
    keeps_memory: bool = True
    public_ports: bool = False
    port_host: str | None = None
    network: Policy = NO_RULES
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
    has_desktop: bool = False
    mounts: tuple[Mount, ...] = ()
    owner_display_name: str = ""
    owner_email: str = ""

    @property
    def keys(self) -> list[tuple[str, str]]:
        """Its public keys, each with the id of the organization's key, or "" for a literal one."""
        ids = [*self.ssh_key_ids, *("" for _ in self.authorized_keys)]
        return list(zip(self.authorized_keys, ids, strict=False))


@dataclass(frozen=True)
class VersionAbout:
    """What belongs to a version of a template that a user built, besides its files.

    `env`, `user` and `workdir` are defaults for programs. `ready` is a command that ends with 0
    once the machine can be saved as a golden one. The `build_id` makes the versions of two builds
    different, whatever is in them. `network` is what machines may reach before they are a
    sandbox's; without it, nothing.
    """

    slug: str
    os: str
    kind: str
    defaults: Shape
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    user: str = ""
    workdir: str = ""
    ready: str | None = None
    build_id: str = ""
    network: Policy | None = None


@dataclass(frozen=True)
class Template:
    """A template that belongs to an organization. `tags` name versions by their numbers, and
    `last_number` is that of the latest build, successful or not."""

    org_id: str
    slug: str
    name: str
    description: str
    created_at: datetime
    updated_at: datetime
    tags: Mapping[str, int] = field(default_factory=dict)
    last_number: int = 0


@dataclass(frozen=True)
class TemplateVersion:
    """A version of a template: immutable, and the result of one build.

    `digest` identifies its contents, `root` is the SHA-256 of its root file system, `source` what
    it was built from, as exactly as it can be named. With `removed_at` it is deleted, and its bytes
    are being removed.
    """

    org_id: str
    slug: str
    number: int
    digest: str
    root: str
    size_bytes: int
    about: VersionAbout
    source: Mapping[str, object]
    build_id: str
    created_at: datetime
    removed_at: datetime | None = None


@dataclass(frozen=True)
class RegistryCredential:
    """A name and a password for a registry of container images, kept encrypted. They are sent to
    `host` and to no other."""

    id: str
    org_id: str
    owner_user_id: str
    host: str
    username: str
    password: str = field(repr=False)
    created_at: datetime


@dataclass(frozen=True)
class Secret:
    """A value of an organization that sandboxes' requests are given outside the machine, kept
    encrypted. It is sent to `hosts`, in plain form (`core.egress.plain_host`), and to no others."""

    id: str
    org_id: str
    name: str
    hosts: tuple[str, ...]
    value: str = field(repr=False)
    created_at: datetime
    changed_at: datetime
    last_used_at: datetime | None = None


class BuildStatus(StrEnum):
    """The status of a build. One that is waiting was announced, and is yet to be described."""

    WAITING = "waiting"
    QUEUED = "queued"
    BUILDING = "building"
    READY = "ready"
    FAILED = "failed"
    CANCELLED = "cancelled"


ACTIVE_BUILDS = (BuildStatus.QUEUED, BuildStatus.BUILDING)
"""The statuses of builds that require work."""


@dataclass(frozen=True)
class Build:
    """A build of a template's version with a `number`.

    `plan` is what was requested, kept encrypted, and `by` who requested it, with their rights then.
    An upload that it needs is on the server `server_id`, which alone can work on it. `sandbox_id`
    is the sandbox that it uses now. `stages` are versions on nodes that only the build needs.
    `lines` counts the lines of its log. It begins once fewer than `at_once` builds of its
    organization are in progress, or at any time for None.
    """

    id: str
    org_id: str
    slug: str
    number: int
    owner_user_id: str
    status: BuildStatus
    created_at: datetime
    plan: Mapping[str, object] = field(repr=False)
    by: Mapping[str, object] = field(default_factory=dict, repr=False)
    server_id: str | None = None
    phase: str = ""
    error: str | None = None
    sandbox_id: str | None = None
    stages: tuple[str, ...] = ()
    is_cancelled: bool = False
    lines: int = 0
    at_once: int | None = None
    started_at: datetime | None = None
    ended_at: datetime | None = None


@dataclass(frozen=True)
class BuildLine:
    """A line of a build's log; `number` counts from 1."""

    number: int
    at: datetime
    phase: str
    text: str


@dataclass(frozen=True)
class VersionKey:
    """What identifies a version of a template."""

    org_id: str
    slug: str
    digest: str


@dataclass(frozen=True)
class Upload:
    """A file that was uploaded for a build; it is on the server `server_id`."""

    id: str
    org_id: str
    owner_user_id: str
    server_id: str
    size_bytes: int
    digest: str
    created_at: datetime


@dataclass(frozen=True)
class Ruled:
    """A sandbox with network rules, without them."""

    id: str
    org_id: str
    node_id: str
    status: Status


@dataclass(frozen=True)
class Standing:
    """The part of a sandbox that is compared with its machine. See `Sandbox`."""

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
    keeps_memory: bool
    network: Policy
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    last_activity_at: datetime | None


@dataclass(frozen=True)
class Mark:
    """A value that changes whenever anything about a node's rows is written: the number of
    sandboxes, the sum of their versions, the last write; the number of snapshots, and of those not
    ready or hidden."""

    sandboxes: int = 0
    versions: int = 0
    updated_at: datetime | None = None
    snapshots: int = 0
    unready: int = 0


@dataclass(frozen=True)
class Snapshot:
    """A saved state of a sandbox, to start others from. `size_bytes` is on disk.

    One that is not ready is being made until `held_until`. Its `mounts` and `network` are the
    sandbox's.
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
    network: Policy = NO_RULES
    is_test: bool = False

    def is_made(self, now: datetime) -> bool:
        """Tell whether it is being made."""
        return not self.is_ready and self.held_until is not None and self.held_until > now


@dataclass(frozen=True)
class Kept:
    """An organization's snapshots without those of forks: how many, their size, and how many belong
    to test keys. One that is being made counts without a size."""

    count: int = 0
    size_bytes: int = 0
    tests: int = 0


@dataclass(frozen=True)
class NodeSeen:
    """When the store first and last heard of a node."""

    id: str
    first_seen_at: datetime
    seen_at: datetime


@dataclass(frozen=True)
class NodeStart:
    """A start of a node's process: `boot` is its id, `place` its host and home, `host` and `port`
    its tunnel."""

    boot: str
    place: str
    version: str
    host: str
    port: int


@dataclass(frozen=True)
class JoinedNode:
    """A node on another host. `epoch` counts the starts of its process. It is available while it
    `has_lease`, and was given up at `lost_at` if it did not return. While it `is_compared`, the
    control plane `compared_by` compares it. `read_at` is the database's time when this was read."""

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
    read_at: datetime | None = None


@dataclass(frozen=True)
class RequestKey:
    """The origin and kind of a request, and its idempotency key."""

    org_id: str
    user_id: str
    route: str
    key: str


@dataclass(frozen=True)
class KeyedRequest:
    """The digest of a request, and the ids it created."""

    digest: str
    resource_ids: tuple[str, ...]


@dataclass(frozen=True)
class SandboxQuery:
    """A query for an organization's sandboxes, newest first, a page at a time.

    `after` is the creation time and id of the previous page's last one. `metadata` must be
    contained in a sandbox's: every name with its value, at every depth. `created_from` is the
    earliest time of creation. With `oldest_first` the order is reversed.
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
    name_prefix: str | None = None
    node_id: str | None = None
    metadata: Mapping[str, object] | None = None
    created_from: datetime | None = None
    oldest_first: bool = False
    after: tuple[datetime, str] | None = None


@dataclass(frozen=True)
class Claim:
    """A sandbox leased to a worker."""

    sandbox: Sandbox
    lease: str


@dataclass(frozen=True)
class ActivityQuery:
    """A query for an organization's feed, newest first, a page at a time.

    `seen_by` is a member, who sees their own actions and their sandboxes' events.
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
    """An entry of the activity feed, which is also the audit log. It never changes."""

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
    """A period for which a sandbox is charged; open while `ended_at` is None.

    `posted` are the micros charged so far. A period that `is_free` is never charged.
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
    """A period for which bytes are stored: a saved state, a snapshot, a workspace.

    `kind` and `resource_id` name the resource; each has at most one open period. For the rest see
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
    """An entry of an organization's ledger. It never changes. `amount_cents` is negative for
    usage."""

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
    """An organization's settings of automatic top-up."""

    org_id: str
    is_enabled: bool = False
    threshold_cents: int = 1000
    amount_cents: int = 2000
    customer_id: str | None = None
    last_at: datetime | None = None
    pending: "PendingTopup | None" = None


@dataclass(frozen=True)
class PendingTopup:
    """A requested charge with unknown outcome. Repeated under `key`, the provider executes it
    once."""

    key: str
    cents: int
    since: datetime


@dataclass(frozen=True)
class InUse:
    """The resources of an organization's live sandboxes, and usage not charged yet.

    Those that are `active` are running, starting or stopping; `disk_mib` is of all live ones,
    `tests` the number of test keys' ones. `paid` is the total shape of active ones that are not
    free. `owed` is the usage of open periods, and `posted` the micros charged for it.
    """

    active: int = 0
    vcpus: int = 0
    memory_mib: int = 0
    disk_mib: int = 0
    tests: int = 0
    paid: Shape = NOTHING
    owed: ShapeSeconds = field(default_factory=ShapeSeconds)
    posted: int = 0
