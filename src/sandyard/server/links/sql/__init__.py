"""The store on SQLite or PostgreSQL, with one set of statements."""

from sandyard.server.links.sql.migrate import Schema
from sandyard.server.links.sql.store import open_store, read_schema

__all__ = ["Schema", "open_store", "read_schema"]
