"""What sandboxes have mounted, and what they had when a snapshot was made of them."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns, and the table by which sandboxes are found."""
    for table in ("sandboxes", "snapshots"):
        op.add_column(table, sa.Column("mounts", sa.JSON(), nullable=False, server_default="[]"))
    op.create_table(
        "sandbox_mounts",
        sa.Column(
            "sandbox_id",
            sa.String(20),
            sa.ForeignKey("sandboxes.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("workspace_id", sa.String(36), primary_key=True),
    )
    op.create_index("ix_sandbox_mounts_workspace", "sandbox_mounts", ["workspace_id"])
