"""The server's rooms; which may import which is held by import-linter (see pyproject.toml)."""
