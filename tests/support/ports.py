"""Ports to listen on."""

import contextlib
import itertools
import os
import secrets
import socket

# Below those that the kernel lends to clients (ip_local_port_range begins at 32768): one of these
# that is free now may be the client's end of somebody's connection when a server wants it.
_FIRST, _EACH, _SHARES = 15_000, 2_000, 8


def _share(worker: str) -> range:
    """Return the ports of one of the processes that run tests beside each other.

    Two that draw from the same ports come to have one in common: a port is free as well while the
    server that has it is started anew.
    """
    number = int(worker.removeprefix("gw") or _SHARES - 1) % _SHARES
    return range(_FIRST + number * _EACH, _FIRST + (number + 1) * _EACH)


_ports = itertools.cycle(
    sorted(_share(os.environ.get("PYTEST_XDIST_WORKER", "")), key=lambda _: secrets.randbits(32))
)


def free_port() -> int:
    """Return a port of loopback that nothing uses now, and that was not returned for long."""
    for port in _ports:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("there is always a next one")
