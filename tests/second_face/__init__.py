"""A second public API: its own hosts, paths, key format and envelope, on the same services."""
