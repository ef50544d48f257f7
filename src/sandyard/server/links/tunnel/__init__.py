"""The second way between control planes and nodes: bytes, over mutual TLS."""
