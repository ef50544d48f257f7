"""Who may use the ports of sandboxes of the E2B API."""

import sqlalchemy as sa
from alembic import op

revision = "0020"
down_revision = "0019"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the columns."""
    op.add_column(
        "sandboxes",
        sa.Column("public_ports", sa.Boolean(), nullable=False, server_default=sa.false()),
    )
    op.add_column("sandboxes", sa.Column("port_host", sa.Text(), nullable=True))
