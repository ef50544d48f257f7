"""The prices that held at each time, those of each server, and who has which duty."""

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None

_PRICES = ("vcpu_hour", "memory_gib_hour", "disk_gib_month", "storage_gib_month")


def upgrade() -> None:
    """Add the tables. Servers of the version before do not know that prices change."""
    op.create_table(
        "prices",
        sa.Column("since", sa.BigInteger(), primary_key=True, autoincrement=False),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in _PRICES),
    )
    op.create_table(
        "meters",
        sa.Column("server_id", sa.String(36), primary_key=True),
        *(sa.Column(name, sa.BigInteger(), nullable=False) for name in _PRICES),
        sa.Column("seen_at", sa.BigInteger(), nullable=False),
    )
    op.create_table(
        "duties",
        sa.Column("name", sa.String(32), primary_key=True),
        sa.Column("holder", sa.String(36), nullable=False),
        sa.Column("until", sa.BigInteger(), nullable=False),
    )
