"""What the store keeps, as frozen values. Times are aware and in UTC."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime

from sandyard.server.core.shapes import Shape
from sandyard.server.core.states import Status, Wanted


@dataclass(frozen=True)
class Organization:
    """A tenant: what it owns is invisible to every other."""

    id: str
    name: str
    slug: str
    created_at: datetime


@dataclass(frozen=True)
class User:
    """A person, or the operator of an installation."""

    id: str
    email: str
    display_name: str
    created_at: datetime


@dataclass(frozen=True)
class Project:
    """A group of sandboxes within an organization; it never grants anything."""

    id: str
    org_id: str
    name: str
    slug: str
    is_default: bool
    created_at: datetime


@dataclass(frozen=True)
class ApiKey:
    """A long-lived credential; only the digest of its secret is kept."""

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


@dataclass(frozen=True)
class KeyHolder:
    """An API key with what its owner is in the key's organization."""

    key: ApiKey
    role: str


@dataclass(frozen=True)
class Reason:
    """Why a sandbox is where it is: a code for programs, a sentence for people."""

    code: str
    message: str


@dataclass(frozen=True)
class Sandbox:
    """What a user owns. `version` grows with every write and guards it.

    `incarnation` counts the starts of its machine; the one numbered `from_snapshot_at` comes from a
    snapshot. `env` and `root_password_hash` are secrets: the
    store keeps the first encrypted, nothing echoes either.
    """

    id: str
    org_id: str
    owner_user_id: str
    project_id: str
    name: str | None
    status: Status
    wanted: Wanted
    version: int
    incarnation: int
    template: str
    shape: Shape
    idle_timeout_s: int
    created_at: datetime
    updated_at: datetime
    tags: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)
    ssh_keys: tuple[str, ...] = ()
    root_password_hash: str | None = field(default=None, repr=False)
    metadata: Mapping[str, object] = field(default_factory=dict)
    auto_resume: bool = True
    expires_at: datetime | None = None
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
    from_snapshot_at: int = 0
    owner_display_name: str = ""
    owner_email: str = ""


@dataclass(frozen=True)
class Snapshot:
    """A sandbox as it was at one moment, kept to start others from. `size_bytes` is on disk."""

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
    after: tuple[datetime, str] | None = None


@dataclass(frozen=True)
class Claim:
    """A sandbox that one worker holds until its lease runs out."""

    sandbox: Sandbox
    lease: str


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
    """A stretch of time in which a sandbox is charged for; open while `ended_at` is None."""

    sandbox_id: str
    org_id: str
    incarnation: int
    shape: Shape
    started_at: datetime
    ended_at: datetime | None = None
