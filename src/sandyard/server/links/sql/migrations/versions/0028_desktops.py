"""Whether a sandbox of an organization's template has a desktop."""

import sqlalchemy as sa
from alembic import op

revision = "0028"
down_revision = "0027"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column(
        "sandboxes",
        sa.Column("has_desktop", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
