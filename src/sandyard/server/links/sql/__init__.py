"""The store on SQLite or PostgreSQL, with one set of statements."""

from sandyard.server.links.sql.store import open_store

__all__ = ["open_store"]
