"""Names of secrets and facts of any length: that of a network authority has an organization's id."""

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Lift the limit of 32 characters, which PostgreSQL enforces and SQLite does not."""
    if op.get_bind().dialect.name == "postgresql":
        for table in ("secrets", "facts", "duties"):
            op.alter_column(table, "name", type_=sa.Text(), existing_nullable=False)
