"""Restarts from a sandbox's own disk."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Say which start of a sandbox's machine is to be from its own disk."""
    op.add_column(
        "sandboxes",
        sa.Column("from_disk_incarnation", sa.Integer(), nullable=False, server_default="0"),
    )
