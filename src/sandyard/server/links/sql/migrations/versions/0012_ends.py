"""How long sandboxes live, and whether they are paused at their end; those that live by age."""

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None
LIVE = "status NOT IN ('destroyed', 'orphaned')"


def upgrade() -> None:
    """Add the columns, and make the index anew."""
    op.add_column("sandboxes", sa.Column("lives_s", sa.Integer(), nullable=True))
    op.add_column(
        "sandboxes",
        sa.Column("pauses_at_end", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
    op.drop_index("ix_sandboxes_live", "sandboxes")
    op.create_index(
        "ix_sandboxes_live",
        "sandboxes",
        ["org_id", "created_at", "id"],
        sqlite_where=sa.text(LIVE),
        postgresql_where=sa.text(LIVE),
    )
