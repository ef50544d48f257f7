"""Several nodes and servers, and names that say what is meant."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add nodes and who holds what; drop what nobody read."""
    op.create_table(
        "nodes",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("first_seen_at", sa.BigInteger(), nullable=False),
        sa.Column("seen_at", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_nodes"),
    )
    op.add_column("snapshots", sa.Column("held_until", sa.BigInteger()))
    op.create_index("ix_snapshots_node", "snapshots", ["node_id"])
    op.add_column("sandboxes", sa.Column("lease_owner", sa.Text()))
    op.create_index("ix_sandboxes_node", "sandboxes", ["node_id", "status"])
    # By statements of their own: a batch would copy the table, and with it lose partial indexes.
    for statement in (
        "ALTER TABLE sandboxes DROP COLUMN wanted",
        "ALTER TABLE sandboxes RENAME COLUMN ssh_keys TO authorized_keys",
        "ALTER TABLE sandboxes RENAME COLUMN from_snapshot_at TO from_snapshot_incarnation",
    ):
        op.execute(statement)
