"""Workspaces: folders that outlive sandboxes, and the files in them."""
