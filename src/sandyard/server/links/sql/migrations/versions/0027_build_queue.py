"""How many builds of an organization may be in progress when a queued one begins."""

import sqlalchemy as sa
from alembic import op

revision = "0027"
down_revision = "0026"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("builds", sa.Column("at_once", sa.Integer()))
