"""Snapshots, what a sandbox comes from, and requests that carried a key."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the tables and columns."""
    op.add_column("sandboxes", sa.Column("from_snapshot_id", sa.String(36)))
    op.add_column(
        "sandboxes",
        sa.Column("from_snapshot_at", sa.Integer(), nullable=False, server_default="0"),
    )
    op.create_table(
        "snapshots",
        sa.Column("id", sa.String(36), nullable=False),
        sa.Column("org_id", sa.String(36), nullable=False),
        sa.Column("owner_user_id", sa.String(36), nullable=False),
        sa.Column("sandbox_id", sa.String(20), nullable=False),
        sa.Column("node_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text()),
        sa.Column("template", sa.Text(), nullable=False),
        sa.Column("os", sa.Text()),
        sa.Column("vcpus", sa.Integer(), nullable=False),
        sa.Column("memory_mib", sa.Integer(), nullable=False),
        sa.Column("disk_mib", sa.Integer(), nullable=False),
        sa.Column("is_ready", sa.Boolean(), nullable=False),
        sa.Column("is_hidden", sa.Boolean(), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name="fk_snapshots_org_id"),
        sa.ForeignKeyConstraint(["owner_user_id"], ["users.id"], name="fk_snapshots_owner_user_id"),
        sa.PrimaryKeyConstraint("id", name="pk_snapshots"),
    )
    op.create_index("ix_snapshots_org_created", "snapshots", ["org_id", "created_at", "id"])
    op.create_index(
        "uq_snapshots_name",
        "snapshots",
        ["org_id", "name"],
        unique=True,
        sqlite_where=sa.text("name IS NOT NULL"),
        postgresql_where=sa.text("name IS NOT NULL"),
    )
    op.create_table(
        "keyed_requests",
        sa.Column("org_id", sa.String(36), nullable=False),
        sa.Column("user_id", sa.String(36), nullable=False),
        sa.Column("route", sa.Text(), nullable=False),
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("resource_ids", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name="fk_keyed_requests_org_id"),
        sa.PrimaryKeyConstraint("org_id", "user_id", "route", "key", name="pk_keyed_requests"),
    )
    op.create_index("ix_keyed_requests_created", "keyed_requests", ["created_at"])
