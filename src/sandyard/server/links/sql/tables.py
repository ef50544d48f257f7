"""The tables. Migrations create them; a test compares the two."""

from collections.abc import Iterable
from datetime import UTC, datetime, timedelta

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    CheckConstraint,
    Column,
    ColumnElement,
    Dialect,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    false,
    literal_column,
    text,
    true,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.expression import FunctionElement
from sqlalchemy.types import TypeDecorator
from typing_extensions import override

from sandyard.server.core.states import HIDDEN, Status

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def microseconds(moment: datetime) -> int:
    """Return a time as microseconds since the epoch."""
    return (moment - _EPOCH) // timedelta(microseconds=1)


class Moment(TypeDecorator[datetime]):
    """A time stored as microseconds since the epoch: exact, and sorted identically on both
    databases."""

    impl = BigInteger
    cache_ok = True

    @override
    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> int | None:
        """Return the stored form."""
        return None if value is None else microseconds(value)

    @override
    def process_result_value(self, value: int | None, dialect: Dialect) -> datetime | None:
        """Return the time in UTC from its stored form."""
        return None if value is None else _EPOCH + timedelta(microseconds=value)


NOW = "sandyard_now"
"""The SQLite function, defined when a connection is opened, that returns the time."""


class now(FunctionElement[int]):  # noqa: N801 - a function of SQL's
    """The current time of the database's clock, in microseconds since the epoch."""

    type = BigInteger()
    inherit_cache = True


@compiles(now)
def _now(element: now, compiler: SQLCompiler, **kwargs: object) -> str:
    return f"{NOW}()"


@compiles(now, "postgresql")
def _now_of_postgres(element: now, compiler: SQLCompiler, **kwargs: object) -> str:
    # Not now(): that is when the transaction began, which may have waited for its turn.
    return "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS BIGINT)"


HOLDS = "sandyard_holds"
"""The SQLite function, defined when a connection is opened, that `holds` is there."""


class holds(FunctionElement[bool]):  # noqa: N801 - a function of SQL's
    """Whether JSON contains other JSON, at every depth: every name of an object with its value, and
    every element of a list."""

    type = Boolean()
    inherit_cache = True


@compiles(holds)
def _holds(element: holds, compiler: SQLCompiler, **kwargs: object) -> str:
    return f"{HOLDS}({compiler.process(element.clauses)})"


@compiles(holds, "postgresql")
def _holds_of_postgres(element: holds, compiler: SQLCompiler, **kwargs: object) -> str:
    whole, part = (compiler.process(one) for one in element.clauses)
    return f"CAST({whole} AS JSONB) @> CAST({part} AS JSONB)"


metadata = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_name)s",
        "uq": "uq_%(table_name)s_%(column_0_name)s",
        "ck": "ck_%(table_name)s_%(constraint_name)s",
        "fk": "fk_%(table_name)s_%(column_0_name)s",
        "pk": "pk_%(table_name)s",
    }
)

STATUSES = ", ".join(f"'{status.value}'" for status in Status)
LIVE = "status NOT IN ({})".format(", ".join(f"'{status.value}'" for status in sorted(HIDDEN)))

organizations = Table(
    "organizations",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("name", Text, nullable=False),
    Column("slug", Text, nullable=False, unique=True),
    Column("created_at", Moment, nullable=False),
    Column("plan", Text, nullable=False, server_default="enterprise"),
    Column("external_id", Text),
    Column("settings", JSON, nullable=False, server_default="{}"),
    Column("limits", JSON, nullable=False, server_default="{}"),
    Index("uq_organizations_external_id", "external_id", unique=True),
)

users = Table(
    "users",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("email", Text, nullable=False, unique=True),
    Column("display_name", Text, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("external_id", Text),
    Column("first_name", Text),
    Column("last_name", Text),
    Column("picture_url", Text),
    Column("is_operator", Boolean, nullable=False, server_default=false()),
    Index("uq_users_external_id", "external_id", unique=True),
)

memberships = Table(
    "memberships",
    metadata,
    Column("org_id", ForeignKey("organizations.id"), primary_key=True),
    Column("user_id", ForeignKey("users.id"), primary_key=True, index=True),
    Column("role", String(16), nullable=False),
    Column("created_at", Moment, nullable=False, server_default="0"),
    Column("role_at", Moment, nullable=False, server_default="0"),
    CheckConstraint("role IN ('admin', 'member')", name="role"),
)

# When a membership ended: older tokens do not restore it.
former_members = Table(
    "former_members",
    metadata,
    Column("org_id", ForeignKey("organizations.id"), primary_key=True),
    Column("user_id", ForeignKey("users.id"), primary_key=True),
    Column("removed_at", Moment, nullable=False),
)

projects = Table(
    "projects",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False, index=True),
    Column("name", Text, nullable=False),
    Column("slug", Text, nullable=False),
    Column("is_default", Boolean, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("color", Text, nullable=False, server_default="#6b7280"),
    Index("uq_projects_slug", "org_id", "slug", unique=True),
)

workspaces = Table(
    "workspaces",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("owner_user_id", ForeignKey("users.id")),
    Column("slug", Text, nullable=False),
    Column("name", Text, nullable=False),
    Column("is_personal", Boolean, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("updated_at", Moment, nullable=False, server_default="0"),
    Column("quota_bytes", BigInteger, nullable=False, server_default=str(10 * 1024**3)),
    Column("size_bytes", BigInteger, nullable=False, server_default="0"),
    Column("last_accessed_at", Moment),
    Column("removed_at", Moment),
    Index("uq_workspaces_slug", "org_id", "slug", unique=True),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False, index=True),
    Column("owner_user_id", ForeignKey("users.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("prefix", Text, nullable=False),
    Column("digest", String(64), nullable=False, unique=True),
    Column("scopes", JSON, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("expires_at", Moment),
    Column("revoked_at", Moment),
    Column("last_used_at", Moment),
    Column("is_test", Boolean, nullable=False, server_default=false()),
    Column("project_id", String(36), index=True),
)

ssh_keys = Table(
    "ssh_keys",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("owner_user_id", ForeignKey("users.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("public_key", Text, nullable=False),
    Column("fingerprint", Text, nullable=False),
    Column("key_type", Text, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("last_used_at", Moment),
    Index("uq_ssh_keys_fingerprint", "org_id", "fingerprint", unique=True),
)

# Keys to be removed from the files of sandboxes: where `removed_of` is not when the sandbox started
# last, its disk may have one again, from a snapshot.
revoked_keys = Table(
    "revoked_keys",
    metadata,
    Column("sandbox_id", String(36), primary_key=True),
    Column("fingerprint", String(64), primary_key=True),
    Column("public_key", Text, nullable=False),
    Column("removed_of", Moment),
)

# One row: the oldest schema that a server must know to use this database.
schema_floor = Table("schema_floor", metadata, Column("revision", String(32), primary_key=True))

# Machines and snapshots that no row belongs to.
quarantine = Table(
    "quarantine",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("kind", String(16), nullable=False),
    Column("node_id", Text, nullable=False),
    Column("incarnation", Integer, nullable=False),
    Column("version", Integer, nullable=False),
    Column("phase", String(16), nullable=False),
    Column("template", Text, nullable=False),
    Column("vcpus", Integer, nullable=False),
    Column("memory_mib", Integer, nullable=False),
    Column("disk_mib", Integer, nullable=False),
    Column("found_at", Moment, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("os", Text),
    Column("is_unwanted", Boolean, nullable=False),
    Column("network", JSON(none_as_null=True)),
    Column("mounts", JSON, nullable=False, server_default="[]"),
    Index("ix_quarantine_node_id", "node_id"),
)

sandboxes = Table(
    "sandboxes",
    metadata,
    Column("id", String(20), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("owner_user_id", ForeignKey("users.id"), nullable=False, index=True),
    Column("project_id", ForeignKey("projects.id"), nullable=False, index=True),
    Column("name", Text),
    Column("status", String(20), nullable=False),
    Column("version", Integer, nullable=False),
    Column("incarnation", Integer, nullable=False),
    Column("template", Text, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("vcpus", Integer, nullable=False),
    Column("memory_mib", Integer, nullable=False),
    Column("disk_mib", Integer, nullable=False),
    Column("idle_timeout_s", Integer, nullable=False),
    Column("env_sealed", Text, nullable=False),
    Column("authorized_keys", JSON, nullable=False),
    Column("ssh_key_ids", JSON, nullable=False, server_default="[]"),
    Column("root_password_hash", Text),
    Column("metadata", JSON, nullable=False),
    Column("auto_resume", Boolean, nullable=False),
    Column("expires_at", Moment),
    Column("lives_s", Integer),
    Column("pauses_at_end", Boolean, nullable=False, server_default=false()),
    Column("keeps_memory", Boolean, nullable=False, server_default=true()),
    Column("public_ports", Boolean, nullable=False, server_default=false()),
    Column("port_host", Text),
    Column("network", JSON(none_as_null=True)),
    Column("node_id", Text),
    Column("driver", Text),
    Column("ip", Text),
    Column("os", Text),
    Column("reason_code", Text),
    Column("reason_message", Text),
    Column("created_at", Moment, nullable=False),
    Column("updated_at", Moment, nullable=False),
    Column("started_at", Moment),
    Column("paused_at", Moment),
    Column("last_activity_at", Moment),
    Column("last_activity_kind", Text),
    Column("lease_owner", Text),
    Column("lease_token", Text),
    Column("lease_until", Moment),
    Column("from_snapshot_id", String(36)),
    Column("from_snapshot_incarnation", Integer, nullable=False, server_default="0"),
    Column("from_disk_incarnation", Integer, nullable=False, server_default="0"),
    Column("is_test", Boolean, nullable=False, server_default=false()),
    Column("saved_bytes", BigInteger, nullable=False, server_default="0"),
    Column("has_desktop", Boolean, nullable=False, server_default=false()),
    Column("mounts", JSON, nullable=False, server_default="[]"),
    CheckConstraint(f"status IN ({STATUSES})", name="status"),
    Index("ix_sandboxes_org_created", "org_id", "created_at", "id"),
    Index("ix_sandboxes_node", "node_id", "status"),
    Index("ix_sandboxes_status", "status", "updated_at"),
    Index("ix_sandboxes_name", "name", sqlite_where=text(LIVE), postgresql_where=text(LIVE)),
    Index(
        "ix_sandboxes_lease_owner",
        "lease_owner",
        sqlite_where=text("lease_owner IS NOT NULL"),
        postgresql_where=text("lease_owner IS NOT NULL"),
    ),
    Index(
        "ix_sandboxes_live",
        "org_id",
        "created_at",
        "id",
        sqlite_where=text(LIVE),
        postgresql_where=text(LIVE),
    ),
    Index(
        "uq_sandboxes_live_name",
        "org_id",
        "name",
        unique=True,
        sqlite_where=text(f"name IS NOT NULL AND {LIVE}"),
        postgresql_where=text(f"name IS NOT NULL AND {LIVE}"),
    ),
)

# The tags again, a row each, for lists that ask for some; sandboxes.tags is what is shown.
sandbox_tags = Table(
    "sandbox_tags",
    metadata,
    Column("sandbox_id", ForeignKey("sandboxes.id", ondelete="CASCADE"), primary_key=True),
    Column("tag", Text, primary_key=True),
)

# What sandboxes have mounted, a row each, to find them by; sandboxes.mounts is what is shown.
sandbox_mounts = Table(
    "sandbox_mounts",
    metadata,
    Column("sandbox_id", ForeignKey("sandboxes.id", ondelete="CASCADE"), primary_key=True),
    Column("workspace_id", String(36), primary_key=True),
    Index("ix_sandbox_mounts_workspace", "workspace_id"),
)

activity = Table(
    "activity",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("actor_user_id", String(36)),
    Column("actor_type", String(16), nullable=False),
    Column("event_type", Text, nullable=False),
    Column("resource_type", Text, nullable=False),
    Column("resource_id", Text, nullable=False),
    Column("severity", Text, nullable=False),
    Column("status", Text, nullable=False),
    Column("title", Text, nullable=False),
    Column("summary", Text, nullable=False),
    Column("attributes", JSON, nullable=False),
    Column("sandbox_id", Text),
    Column("created_at", Moment, nullable=False),
    Index("ix_activity_org_created", "org_id", "created_at", "id"),
    Index("ix_activity_sandbox", "sandbox_id", "created_at"),
)

snapshots = Table(
    "snapshots",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("owner_user_id", ForeignKey("users.id"), nullable=False),
    Column("sandbox_id", String(20), nullable=False),
    Column("node_id", Text, nullable=False),
    Column("name", Text),
    Column("template", Text, nullable=False),
    Column("os", Text),
    Column("vcpus", Integer, nullable=False),
    Column("memory_mib", Integer, nullable=False),
    Column("disk_mib", Integer, nullable=False),
    Column("is_ready", Boolean, nullable=False),
    Column("is_hidden", Boolean, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("held_until", Moment),
    Column("mounts", JSON, nullable=False, server_default="[]"),
    Column("network", JSON(none_as_null=True)),
    Column("is_test", Boolean, nullable=False, server_default=false()),
    Index("ix_snapshots_node", "node_id"),
    Index("ix_snapshots_org_created", "org_id", "created_at", "id"),
    Index(
        "uq_snapshots_name",
        "org_id",
        "name",
        unique=True,
        sqlite_where=text("name IS NOT NULL"),
        postgresql_where=text("name IS NOT NULL"),
    ),
)

# Snapshots that were removed, until their node has none of their files any more.
removed_snapshots = Table(
    "removed_snapshots",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("node_id", Text, nullable=False),
    Column("removed_at", Moment, nullable=False),
    Index("ix_removed_snapshots_node", "node_id"),
)

# Requests that carried an Idempotency-Key, with a digest of what they asked and what they made.
keyed_requests = Table(
    "keyed_requests",
    metadata,
    Column("org_id", ForeignKey("organizations.id"), primary_key=True),
    Column("user_id", String(36), primary_key=True),
    Column("route", Text, primary_key=True),
    Column("key", Text, primary_key=True),
    Column("digest", String(64), nullable=False),
    Column("resource_ids", JSON, nullable=False),
    Column("created_at", Moment, nullable=False),
    Index("ix_keyed_requests_created", "created_at"),
)

tickets = Table(
    "tickets",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("kind", Text, nullable=False),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("sandbox_id", String(20), nullable=False),
    Column("by", Text, nullable=False),
    Column("detail", Text, nullable=False),
    Column("expires_at", Moment, nullable=False),
    Index("ix_tickets_expires", "expires_at"),
)

usage_periods = Table(
    "usage_periods",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("sandbox_id", ForeignKey("sandboxes.id"), nullable=False, index=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("incarnation", Integer, nullable=False),
    Column("vcpus", Integer, nullable=False),
    Column("memory_mib", Integer, nullable=False),
    Column("disk_mib", Integer, nullable=False),
    Column("started_at", Moment, nullable=False),
    Column("ended_at", Moment),
    Column("is_free", Boolean, nullable=False, server_default=false()),
    Column("posted", BigInteger, nullable=False, server_default="0"),
    Column("is_settled", Boolean, nullable=False, server_default=false()),
    CheckConstraint("ended_at IS NULL OR ended_at >= started_at", name="order"),
    Index(
        "uq_usage_periods_open",
        "sandbox_id",
        unique=True,
        sqlite_where=text("ended_at IS NULL"),
        postgresql_where=text("ended_at IS NULL"),
    ),
    Index("ix_usage_periods_org", "org_id", "ended_at"),
    Index(
        "ix_usage_periods_unsettled",
        "org_id",
        sqlite_where=text("is_settled = 0"),
        postgresql_where=text("NOT is_settled"),
    ),
)

# What the rows of the two tables above come to, an organization; triggers keep it (migration 0006).
# `owed_…_s` less what is still open counts from TOTALS_EPOCH, so that no sum outgrows 64 bits.
TOTALS_EPOCH = datetime(2025, 1, 1, tzinfo=UTC)
org_totals = Table(
    "org_totals",
    metadata,
    Column("org_id", ForeignKey("organizations.id"), primary_key=True),
    *(
        Column(name, BigInteger, nullable=False, server_default="0")
        for name in (
            "active", "vcpus", "memory_mib", "disk_mib", "tests",
            "paid_vcpus", "paid_memory_mib", "paid_disk_mib", "owed_posted",
            "open_vcpus", "owed_vcpus_s", "open_memory_mib", "owed_memory_mib_s",
            "open_disk_mib", "owed_disk_mib_s",
        )
    ),
)  # fmt: skip

# Bytes that are kept: saved states, snapshots, workspaces.
storage_periods = Table(
    "storage_periods",
    metadata,
    Column("id", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("kind", Text, nullable=False),
    Column("resource_id", Text, nullable=False),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("started_at", Moment, nullable=False),
    Column("ended_at", Moment),
    Column("is_free", Boolean, nullable=False, server_default=false()),
    Column("posted", BigInteger, nullable=False, server_default="0"),
    Column("is_settled", Boolean, nullable=False, server_default=false()),
    CheckConstraint("ended_at IS NULL OR ended_at >= started_at", name="order"),
    Index(
        "uq_storage_periods_open",
        "kind",
        "resource_id",
        unique=True,
        sqlite_where=text("ended_at IS NULL"),
        postgresql_where=text("ended_at IS NULL"),
    ),
    Index("ix_storage_periods_resource", "kind", "resource_id"),
    Index("ix_storage_periods_org", "org_id", "ended_at"),
    Index(
        "ix_storage_periods_unsettled",
        "org_id",
        sqlite_where=text("is_settled = 0"),
        postgresql_where=text("NOT is_settled"),
    ),
)

accounts = Table(
    "accounts",
    metadata,
    Column("org_id", ForeignKey("organizations.id"), primary_key=True),
    Column("balance_cents", BigInteger, nullable=False),
    Column("granted_cents", BigInteger, nullable=False),
    Column("used_cents", BigInteger, nullable=False),
    Column("carried", BigInteger, nullable=False),
)

ledger = Table(
    "ledger",
    metadata,
    Column("number", BigInteger().with_variant(Integer, "sqlite"), primary_key=True),
    Column("id", String(36), nullable=False, unique=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("type", String(16), nullable=False),
    Column("amount_cents", BigInteger, nullable=False),
    Column("resource", Text),
    Column("description", Text, nullable=False),
    Column("reference_id", Text),
    Column("balance_after_cents", BigInteger, nullable=False),
    Column("created_at", Moment, nullable=False),
    CheckConstraint("type IN ('grant', 'topup', 'usage', 'refund', 'adjustment')", name="type"),
    Index("ix_ledger_org", "org_id", "number"),
    # What has a reference is posted once: a grant, a payment.
    Index("uq_ledger_reference", "org_id", "type", "reference_id", unique=True),
)

auto_topups = Table(
    "auto_topups",
    metadata,
    Column("org_id", ForeignKey("organizations.id"), primary_key=True),
    Column("is_enabled", Boolean, nullable=False),
    Column("threshold_cents", BigInteger, nullable=False),
    Column("amount_cents", BigInteger, nullable=False),
    Column("customer_id", Text),
    Column("last_at", Moment),
    Column("pending_key", Text),
    Column("pending_cents", BigInteger),
    Column("pending_since", Moment),
)

# Nodes, and when any server heard of each last.
nodes = Table(
    "nodes",
    metadata,
    Column("id", Text, primary_key=True),
    Column("first_seen_at", Moment, nullable=False),
    Column("seen_at", Moment, nullable=False),
)

# Nodes on other hosts; `lost_at` is when the lease ended of one that was given up.
joined_nodes = Table(
    "joined_nodes",
    metadata,
    Column("id", Text, primary_key=True),
    Column("name", Text, nullable=False),
    Column("joined_at", Moment, nullable=False),
    Column("is_draining", Boolean, nullable=False),
    Column("epoch", Integer, nullable=False),
    Column("boot", Text, nullable=False),
    Column("place", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("host", Text, nullable=False),
    Column("port", Integer, nullable=False),
    Column("lease_until", Moment),
    Column("lost_at", Moment),
    Column("compared_by", Text, nullable=False),
    Column("compared_until", Moment),
    Index("ix_joined_nodes_lease", "lease_until"),
)

invites = Table(
    "invites",
    metadata,
    Column("digest", String(64), primary_key=True),
    Column("expires_at", Moment, nullable=False),
    Index("ix_invites_expires", "expires_at"),
)

# Secrets of the installation, such as the keys that sign certificates.
secrets = Table(
    "secrets",
    metadata,
    Column("name", Text, primary_key=True),
    Column("sealed", Text, nullable=False),
)

# Named timestamps of the installation, such as when it last worked.
facts = Table(
    "facts",
    metadata,
    Column("name", Text, primary_key=True),
    Column("moment", Moment, nullable=False),
)

_PRICES = ("vcpu_hour", "memory_gib_hour", "disk_gib_month", "storage_gib_month")

# Prices hold from `since` on, and the first also before.
prices = Table(
    "prices",
    metadata,
    Column("since", Moment, primary_key=True),
    *(Column(name, BigInteger, nullable=False) for name in _PRICES),
)

# The prices that each server has.
meters = Table(
    "meters",
    metadata,
    Column("server_id", String(36), primary_key=True),
    *(Column(name, BigInteger, nullable=False) for name in _PRICES),
    Column("seen_at", Moment, nullable=False),
)

# What one server at a time does for all.
duties = Table(
    "duties",
    metadata,
    Column("name", Text, primary_key=True),
    Column("holder", String(36), nullable=False),
    Column("until", Moment, nullable=False),
)


# Templates of organizations. `tags` names versions by their numbers.
templates = Table(
    "templates",
    metadata,
    Column("org_id", ForeignKey("organizations.id"), primary_key=True),
    Column("slug", String(63), primary_key=True),
    Column("name", Text, nullable=False),
    Column("description", Text, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("updated_at", Moment, nullable=False),
    Column("tags", JSON, nullable=False),
    Column("last_number", Integer, nullable=False),
)

# `number` of a deleted version is never given again while any of its template are kept.
template_versions = Table(
    "template_versions",
    metadata,
    Column("build_id", String(36), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("slug", String(63), nullable=False),
    Column("number", Integer, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("root", String(64), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("about_sealed", Text, nullable=False),
    Column("source", JSON, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("removed_at", Moment),
    Index("ix_template_versions_slug", "org_id", "slug", "number"),
    Index(
        "ix_template_versions_removed",
        "removed_at",
        sqlite_where=text("removed_at IS NOT NULL"),
        postgresql_where=text("removed_at IS NOT NULL"),
    ),
)

builds = Table(
    "builds",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("slug", String(63), nullable=False),
    Column("number", Integer, nullable=False),
    Column("owner_user_id", ForeignKey("users.id"), nullable=False),
    Column("status", String(16), nullable=False),
    Column("plan_sealed", Text, nullable=False),
    Column("by", JSON, nullable=False),
    Column("server_id", String(36)),
    Column("phase", Text, nullable=False),
    Column("error", Text),
    Column("sandbox_id", String(20)),
    Column("stages", JSON, nullable=False),
    Column("is_cancelled", Boolean, nullable=False),
    Column("lines", Integer, nullable=False),
    Column("at_once", Integer),
    Column("created_at", Moment, nullable=False),
    Column("started_at", Moment),
    Column("ended_at", Moment),
    Column("lease_token", Text),
    Column("lease_until", Moment),
    Index("ix_builds_slug", "org_id", "slug", "created_at", "id"),
    Index("ix_builds_active", "ended_at", "org_id"),
)

build_lines = Table(
    "build_lines",
    metadata,
    Column("build_id", String(36), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("at", Moment, nullable=False),
    Column("phase", Text, nullable=False),
    Column("text", Text, nullable=False),
)

# Credentials for registries of container images.
registry_credentials = Table(
    "registry_credentials",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("owner_user_id", ForeignKey("users.id"), nullable=False),
    Column("host", Text, nullable=False),
    Column("sealed", Text, nullable=False),
    Column("created_at", Moment, nullable=False),
    Index("ix_registry_credentials_org", "org_id", "created_at"),
)

# Secrets of organizations, which requests of sandboxes are given outside the machine.
org_secrets = Table(
    "org_secrets",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("name", Text, nullable=False),
    Column("hosts", JSON, nullable=False),
    Column("sealed", Text, nullable=False),
    Column("created_at", Moment, nullable=False),
    Column("changed_at", Moment, nullable=False),
    Column("last_used_at", Moment),
    Index("ix_org_secrets_name", "org_id", "name", unique=True),
)

# Files that were uploaded for builds; each is on one server.
uploads = Table(
    "uploads",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("org_id", ForeignKey("organizations.id"), nullable=False),
    Column("owner_user_id", ForeignKey("users.id"), nullable=False),
    Column("server_id", String(36), nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("digest", String(64), nullable=False),
    Column("created_at", Moment, nullable=False),
    Index("ix_uploads_org", "org_id"),
    Index("ix_uploads_server", "server_id", "created_at"),
)


def is_any_of(statuses: Iterable[Status]) -> ColumnElement[bool]:
    """Return the condition for sandboxes with these statuses, which are literals in it."""
    return sandboxes.c.status.in_([literal_column(f"'{status.value}'") for status in statuses])
