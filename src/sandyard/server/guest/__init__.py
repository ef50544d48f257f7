"""The agent inside a machine: standard library only, reached through core.wire."""
