"""Tickets, and whence each of a sandbox's public keys comes."""

import json

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

LIVE = "status NOT IN ('destroyed', 'orphaned')"


def upgrade() -> None:
    """Add the table and the column."""
    op.create_table(
        "tickets",
        sa.Column("digest", sa.String(64), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("org_id", sa.String(36), nullable=False),
        sa.Column("sandbox_id", sa.String(20), nullable=False),
        sa.Column("by", sa.Text(), nullable=False),
        sa.Column("detail", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["org_id"], ["organizations.id"], name="fk_tickets_org_id"),
        sa.PrimaryKeyConstraint("digest", name="pk_tickets"),
    )
    op.create_index("ix_tickets_expires", "tickets", ["expires_at"])
    op.add_column(
        "sandboxes", sa.Column("ssh_key_ids", sa.JSON(), nullable=False, server_default="[]")
    )
    op.create_index(
        "ix_sandboxes_name",
        "sandboxes",
        ["name"],
        sqlite_where=sa.text(LIVE),
        postgresql_where=sa.text(LIVE),
    )
    _find_sources()


def _find_sources() -> None:
    """Take keys that are an organization's for its own, so that they can be revoked."""
    connection = op.get_bind()
    keys = {
        (row.org_id, row.public_key): row.id
        for row in connection.execute(sa.text("SELECT org_id, public_key, id FROM ssh_keys"))
    }
    boxes = connection.execute(
        sa.text(f"SELECT id, org_id, authorized_keys FROM sandboxes WHERE {LIVE}")
    ).all()
    for box in boxes:
        known = box.authorized_keys
        lines = json.loads(known) if isinstance(known, str) else known
        ids = [keys.get((box.org_id, line), "") for line in lines]
        if ids:
            connection.execute(
                sa.text("UPDATE sandboxes SET ssh_key_ids = :ids WHERE id = :id"),
                {"ids": json.dumps(ids), "id": box.id},
            )
