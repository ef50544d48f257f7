"""Mounted workspaces: what each machine may mount, and the file servers that export it."""
