"""Destroyed sandboxes keep no secrets: neither environment nor password nor injected headers."""

from alembic import op

revision = "0025"
down_revision = "0024"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Remove what sandboxes kept that were destroyed before."""
    op.execute(
        "UPDATE sandboxes SET env_sealed = '', root_password_hash = NULL, network = NULL "
        "WHERE status = 'destroyed'"
    )
