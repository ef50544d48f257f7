"""Workspaces: how large they may be and are, and when they were used and removed."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_QUOTA = 10 * 1024**3


def upgrade() -> None:
    """Add the columns."""
    for name, default in (("updated_at", 0), ("quota_bytes", _QUOTA), ("size_bytes", 0)):
        op.add_column(
            "workspaces",
            sa.Column(name, sa.BigInteger(), nullable=False, server_default=str(default)),
        )
    for name in ("last_accessed_at", "removed_at"):
        op.add_column("workspaces", sa.Column(name, sa.BigInteger(), nullable=True))
    op.execute("UPDATE workspaces SET updated_at = created_at")
