"""What machines in quarantine may reach, and what they have mounted."""

import sqlalchemy as sa
from alembic import op

revision = "0026"
down_revision = "0025"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    op.add_column("quarantine", sa.Column("network", sa.JSON()))
    op.add_column("quarantine", sa.Column("mounts", sa.JSON(), nullable=False, server_default="[]"))
