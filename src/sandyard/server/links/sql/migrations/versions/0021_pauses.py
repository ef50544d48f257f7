"""Which sandboxes boot from their disk after the pause at their end."""

import sqlalchemy as sa
from alembic import op

revision = "0021"
down_revision = "0020"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column(
        "sandboxes",
        sa.Column("keeps_memory", sa.Boolean(), nullable=False, server_default=sa.true()),
    )
