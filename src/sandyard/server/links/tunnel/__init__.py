"""The tunnel between control planes and nodes, which carries bytes over mutual TLS."""
