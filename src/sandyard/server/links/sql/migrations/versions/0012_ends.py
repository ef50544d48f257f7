"""How long sandboxes live, and whether they are paused at their end."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    op.add_column("sandboxes", sa.Column("lives_s", sa.Integer(), nullable=True))
    op.add_column(
        "sandboxes",
        sa.Column("pauses_at_end", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
