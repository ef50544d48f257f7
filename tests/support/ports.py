"""Ports to listen on."""

import contextlib
import secrets
import socket

# Below those that the kernel lends to clients (ip_local_port_range begins at 32768): one of these
# that is free now may be the client's end of somebody's connection when a server wants it.
_PORTS = range(15_000, 32_000)


def free_port() -> int:
    """Return a port of loopback that nothing uses now."""
    while True:
        port = secrets.choice(_PORTS)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
