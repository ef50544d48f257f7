"""What the platform promises: use cases over core.contracts, nothing of HTTP or SQL."""
