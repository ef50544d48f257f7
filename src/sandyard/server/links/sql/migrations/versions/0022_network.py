"""What sandboxes may reach, and those from their snapshots."""

import sqlalchemy as sa
from alembic import op

revision = "0022"
down_revision = "0021"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns; nothing in them means no rules."""
    for table in ("sandboxes", "snapshots"):
        op.add_column(table, sa.Column("network", sa.JSON(none_as_null=True)))
