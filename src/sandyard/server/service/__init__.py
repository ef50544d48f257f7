"""The platform's use cases, on the seams in core.contracts; independent of HTTP and SQL."""
