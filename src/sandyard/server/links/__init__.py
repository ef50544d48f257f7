"""Implementations of the seams of core.contracts: database, NATS, tunnel, payments, clock."""
