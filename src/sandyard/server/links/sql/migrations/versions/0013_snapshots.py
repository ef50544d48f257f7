"""Which snapshots were removed, until their files are gone as well; which are of test keys."""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the table and the column."""
    op.create_table(
        "removed_snapshots",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column("node_id", sa.Text(), nullable=False),
        sa.Column("removed_at", sa.BigInteger(), nullable=False),
    )
    op.add_column(
        "snapshots",
        sa.Column("is_test", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
    op.create_index("ix_removed_snapshots_node", "removed_snapshots", ["node_id"])
