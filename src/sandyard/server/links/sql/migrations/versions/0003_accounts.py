"""Who may do what, and what it costs."""

from typing import Any

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

LIVE = "status NOT IN ('destroyed', 'orphaned')"


def _number() -> sa.types.TypeEngine[int]:
    return sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def _flag(name: str) -> sa.Column[Any]:
    return sa.Column(name, sa.Boolean(), nullable=False, server_default=sa.false())


def _charged() -> list[sa.Column[Any]]:
    return [
        _flag("is_free"),
        sa.Column("posted", sa.BigInteger(), nullable=False, server_default="0"),
        _flag("is_settled"),
    ]


def upgrade() -> None:
    """Add the tables and columns; usage from before there were prices stays free."""
    columns: list[tuple[str, sa.Column[Any]]] = [
        (
            "organizations",
            sa.Column("plan", sa.Text(), nullable=False, server_default="enterprise"),
        ),
        ("organizations", sa.Column("external_id", sa.Text())),
        ("organizations", sa.Column("settings", sa.JSON(), nullable=False, server_default="{}")),
        ("organizations", sa.Column("limits", sa.JSON(), nullable=False, server_default="{}")),
        ("users", sa.Column("external_id", sa.Text())),
        ("users", sa.Column("first_name", sa.Text())),
        ("users", sa.Column("last_name", sa.Text())),
        ("users", sa.Column("picture_url", sa.Text())),
        ("users", _flag("is_operator")),
        (
            "memberships",
            sa.Column("created_at", sa.BigInteger(), nullable=False, server_default="0"),
        ),
        ("memberships", sa.Column("role_at", sa.BigInteger(), nullable=False, server_default="0")),
        ("projects", sa.Column("color", sa.Text(), nullable=False, server_default="#6b7280")),
        ("api_keys", _flag("is_test")),
        ("api_keys", sa.Column("project_id", sa.String(36))),
        ("sandboxes", _flag("is_test")),
        (
            "sandboxes",
            sa.Column("saved_bytes", sa.BigInteger(), nullable=False, server_default="0"),
        ),
        *(("usage_periods", column) for column in _charged()),
    ]
    for table, column in columns:
        op.add_column(table, column)
    op.create_index(
        "ix_sandboxes_live",
        "sandboxes",
        ["org_id"],
        sqlite_where=sa.text(LIVE),
        postgresql_where=sa.text(LIVE),
    )
    op.create_index("uq_organizations_external_id", "organizations", ["external_id"], unique=True)
    op.create_index("uq_users_external_id", "users", ["external_id"], unique=True)
    op.create_index("uq_projects_slug", "projects", ["org_id", "slug"], unique=True)
    tables: list[tuple[str, list[sa.Column[Any]]]] = [
        (
            "workspaces",
            [
                sa.Column("id", sa.String(36), nullable=False),
                sa.Column("org_id", sa.String(36), nullable=False),
                sa.Column("owner_user_id", sa.String(36)),
                sa.Column("slug", sa.Text(), nullable=False),
                sa.Column("name", sa.Text(), nullable=False),
                sa.Column("is_personal", sa.Boolean(), nullable=False),
                sa.Column("created_at", sa.BigInteger(), nullable=False),
            ],
        ),
        (
            "ssh_keys",
            [
                sa.Column("id", sa.String(36), nullable=False),
                sa.Column("org_id", sa.String(36), nullable=False),
                sa.Column("owner_user_id", sa.String(36), nullable=False),
                sa.Column("name", sa.Text(), nullable=False),
                sa.Column("public_key", sa.Text(), nullable=False),
                sa.Column("fingerprint", sa.Text(), nullable=False),
                sa.Column("key_type", sa.Text(), nullable=False),
                sa.Column("created_at", sa.BigInteger(), nullable=False),
                sa.Column("last_used_at", sa.BigInteger()),
            ],
        ),
    ]
    for name, its_columns in tables:
        op.create_table(
            name,
            *its_columns,
            sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name=f"fk_{name}_org_id"),
            sa.ForeignKeyConstraint(
                ["owner_user_id"], ["users.id"], name=f"fk_{name}_owner_user_id"
            ),
            sa.PrimaryKeyConstraint("id", name=f"pk_{name}"),
        )
    op.create_table(
        "former_members",
        sa.Column("org_id", sa.String(36), nullable=False),
        sa.Column("user_id", sa.String(36), nullable=False),
        sa.Column("removed_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name="fk_former_members_org_id"),
        sa.ForeignKeyConstraint(["user_id"], ["users.id"], name="fk_former_members_user_id"),
        sa.PrimaryKeyConstraint("org_id", "user_id", name="pk_former_members"),
    )
    op.create_index("uq_workspaces_slug", "workspaces", ["org_id", "slug"], unique=True)
    op.create_index("uq_ssh_keys_fingerprint", "ssh_keys", ["org_id", "fingerprint"], unique=True)
    _add_money()
    # Whoever was here from the start runs the installation.
    op.execute(
        "UPDATE users SET is_operator = true WHERE id IN (SELECT m.user_id FROM memberships m "
        "WHERE m.role = 'admin' AND m.org_id = "
        "(SELECT id FROM organizations ORDER BY created_at LIMIT 1))"
    )
    _begin_charging()
    op.execute(
        "UPDATE memberships SET created_at = "
        "(SELECT created_at FROM users WHERE users.id = memberships.user_id)"
    )


def _begin_charging() -> None:
    """Leave what was used until now free, and charge what runs from now on."""
    now = "CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER)"
    if op.get_bind().dialect.name == "postgresql":
        now = "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS BIGINT)"
    op.execute("UPDATE usage_periods SET is_free = true")
    op.execute(
        "CREATE TEMPORARY TABLE was_running AS SELECT id FROM usage_periods WHERE ended_at IS NULL"
    )
    for statement in (
        "UPDATE usage_periods SET ended_at = CASE WHEN started_at > {now} THEN started_at "
        "ELSE {now} END WHERE id IN (SELECT id FROM was_running)",
        "INSERT INTO usage_periods (sandbox_id, org_id, incarnation, vcpus, memory_mib, disk_mib, "
        "started_at, is_free, posted, is_settled) SELECT sandbox_id, org_id, incarnation, vcpus, "
        "memory_mib, disk_mib, ended_at, false, 0, false FROM usage_periods "
        "WHERE id IN (SELECT id FROM was_running)",
    ):
        op.execute(statement.format(now=now))
    op.execute("DROP TABLE was_running")
    op.execute("UPDATE usage_periods SET is_settled = true WHERE ended_at IS NOT NULL")


def _add_money() -> None:
    open_only = sa.text("ended_at IS NULL")
    # As SQLAlchemy writes the condition: SQLite uses a partial index only for the very same one.
    unsettled: Any = {
        "sqlite_where": sa.text("is_settled = 0"),
        "postgresql_where": sa.text("NOT is_settled"),
    }
    op.create_index("ix_usage_periods_org", "usage_periods", ["org_id", "ended_at"])
    op.create_index(
        "ix_usage_periods_unsettled",
        "usage_periods",
        ["org_id"],
        **unsettled,
    )
    op.create_table(
        "storage_periods",
        sa.Column("id", _number(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("resource_id", sa.Text(), nullable=False),
        sa.Column("org_id", sa.String(36), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("started_at", sa.BigInteger(), nullable=False),
        sa.Column("ended_at", sa.BigInteger()),
        *_charged(),
        sa.CheckConstraint(
            "ended_at IS NULL OR ended_at >= started_at", name="ck_storage_periods_order"
        ),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name="fk_storage_periods_org_id"),
        sa.PrimaryKeyConstraint("id", name="pk_storage_periods"),
    )
    op.create_index(
        "uq_storage_periods_open",
        "storage_periods",
        ["kind", "resource_id"],
        unique=True,
        sqlite_where=open_only,
        postgresql_where=open_only,
    )
    op.create_index(
        "ix_storage_periods_unsettled",
        "storage_periods",
        ["org_id"],
        **unsettled,
    )
    op.create_table(
        "accounts",
        sa.Column("org_id", sa.String(36), nullable=False),
        sa.Column("balance_cents", sa.BigInteger(), nullable=False),
        sa.Column("granted_cents", sa.BigInteger(), nullable=False),
        sa.Column("used_cents", sa.BigInteger(), nullable=False),
        sa.Column("carried", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name="fk_accounts_org_id"),
        sa.PrimaryKeyConstraint("org_id", name="pk_accounts"),
    )
    op.create_table(
        "ledger",
        sa.Column("number", _number(), nullable=False),
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("org_id", sa.String(36), nullable=False),
        sa.Column("type", sa.String(16), nullable=False),
        sa.Column("amount_cents", sa.BigInteger(), nullable=False),
        sa.Column("resource", sa.Text()),
        sa.Column("description", sa.Text(), nullable=False),
        sa.Column("reference_id", sa.Text()),
        sa.Column("balance_after_cents", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.CheckConstraint(
            "type IN ('grant', 'topup', 'usage', 'refund', 'adjustment')", name="ck_ledger_type"
        ),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name="fk_ledger_org_id"),
        sa.PrimaryKeyConstraint("number", name="pk_ledger"),
        sa.UniqueConstraint("id", name="uq_ledger_id"),
    )
    op.create_index("ix_ledger_org", "ledger", ["org_id", "number"])
    op.create_index(
        "uq_ledger_reference", "ledger", ["org_id", "type", "reference_id"], unique=True
    )
    op.create_table(
        "auto_topups",
        sa.Column("org_id", sa.String(36), nullable=False),
        sa.Column("is_enabled", sa.Boolean(), nullable=False),
        sa.Column("threshold_cents", sa.BigInteger(), nullable=False),
        sa.Column("amount_cents", sa.BigInteger(), nullable=False),
        sa.Column("customer_id", sa.Text()),
        sa.Column("last_at", sa.BigInteger()),
        sa.Column("pending_key", sa.Text()),
        sa.Column("pending_cents", sa.BigInteger()),
        sa.Column("pending_since", sa.BigInteger()),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name="fk_auto_topups_org_id"),
        sa.PrimaryKeyConstraint("org_id", name="pk_auto_topups"),
    )
    op.create_table(
        "facts",
        sa.Column("name", sa.String(32), nullable=False),
        sa.Column("moment", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_facts"),
    )
