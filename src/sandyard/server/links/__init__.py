"""Implementations of the seams in core.contracts."""
