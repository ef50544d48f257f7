"""Workspaces for machines: who may mount what, and the servers that they mount it from."""
