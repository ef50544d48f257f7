"""The oldest schema that a server must know to use this database."""

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0015"
branch_labels = None
depends_on = None
floor = "0016"


def upgrade() -> None:
    """Add the table; `migrate.upgrade` fills it."""
    op.create_table("schema_floor", sa.Column("revision", sa.String(32), primary_key=True))
