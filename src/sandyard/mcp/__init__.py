"""Sandboxes for agents, by the Model Context Protocol: `sandyard mcp`."""
