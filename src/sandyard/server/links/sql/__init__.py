"""The store on SQLite or PostgreSQL, by one set of statements."""

from sandyard.server.links.sql.store import SqlStore, open_store

__all__ = ["SqlStore", "open_store"]
