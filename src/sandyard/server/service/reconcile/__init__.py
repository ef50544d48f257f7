"""Reconciles actual state with desired state."""
