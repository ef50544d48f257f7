"""Indexes for what was looked for by reading through a table."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add them."""
    op.create_index("ix_memberships_user_id", "memberships", ["user_id"])
    op.create_index("ix_api_keys_project_id", "api_keys", ["project_id"])
    op.create_index("ix_sandboxes_owner_user_id", "sandboxes", ["owner_user_id"])
    op.create_index("ix_sandboxes_project_id", "sandboxes", ["project_id"])
    held = sa.text("lease_owner IS NOT NULL")
    op.create_index(
        "ix_sandboxes_lease_owner",
        "sandboxes",
        ["lease_owner"],
        sqlite_where=held,
        postgresql_where=held,
    )
    op.create_index("ix_storage_periods_resource", "storage_periods", ["kind", "resource_id"])
    op.create_index("ix_storage_periods_org", "storage_periods", ["org_id", "ended_at"])
