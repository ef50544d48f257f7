"""Alembic's entry point: migrations run on the connection that `migrate.upgrade` was given."""

from alembic import context

from sandyard.server.links.sql.tables import metadata

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=metadata,
    render_as_batch=True,
)
context.run_migrations()
