"""Names of secrets and facts of any length: that of a network authority has an organization's id."""

import sqlalchemy as sa
from alembic import op

revision = "0024"
down_revision = "0023"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Lift the limit of 32 characters, which PostgreSQL enforces and SQLite does not."""
    for table in ("secrets", "facts", "duties"):
        with op.batch_alter_table(table) as batch:
            batch.alter_column(
                "name", existing_type=sa.String(32), type_=sa.Text(), existing_nullable=False
            )
