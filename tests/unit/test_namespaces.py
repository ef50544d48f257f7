"""Sockets in a namespace of a test's own, made by a thread that stays outside."""

import os
import socket
import subprocess
import uuid
from collections.abc import Iterator

import pytest

from sandyard.server.core.errors import InternalError
from sandyard.server.drivers.namespaces import in_namespace, path_of, socket_in

pytestmark = pytest.mark.root


@pytest.fixture
def netns() -> Iterator[str]:
    """A namespace with nothing in it but a loopback that is up."""
    name = f"syt-{uuid.uuid4().hex[:8]}"
    subprocess.run(["ip", "netns", "add", name], check=True, timeout=10)
    try:
        subprocess.run(["ip", "-n", name, "link", "set", "lo", "up"], check=True, timeout=10)
        yield name
    finally:
        subprocess.run(["ip", "netns", "del", name], check=True, timeout=10)


def _here() -> int:
    return os.stat("/proc/thread-self/ns/net").st_ino


def test_a_socket_lies_in_a_namespace_and_whoever_made_it_does_not(netns: str) -> None:
    before, descriptors = _here(), len(os.listdir("/proc/self/fd"))
    with in_namespace(netns, lambda: socket.create_server(("127.0.0.1", 0))) as listener:
        port = listener.getsockname()[1]
        with socket_in(netns) as inside:
            assert (inside.getblocking(), os.get_inheritable(inside.fileno())) == (False, False)
            inside.settimeout(5)
            inside.connect(("127.0.0.1", port))
            there, _ = listener.accept()
            there.close()
            assert inside.recv(1) == b""
        # Nobody listens where this thread is.
        with socket.socket() as outside, pytest.raises(ConnectionRefusedError):
            outside.connect(("127.0.0.1", port))
    assert (_here(), len(os.listdir("/proc/self/fd"))) == (before, descriptors)


def test_a_namespace_that_is_not_there_is_told(netns: str) -> None:
    before, descriptors = _here(), len(os.listdir("/proc/self/fd"))
    with pytest.raises(InternalError, match=f"{netns}-not"):
        socket_in(f"{netns}-not")
    nothing = path_of(f"{netns}-not")
    nothing.touch()  # what a namespace that was taken apart leaves for a moment
    try:
        with pytest.raises(InternalError, match="Invalid argument"):
            socket_in(f"{netns}-not")
    finally:
        nothing.unlink()
    assert (_here(), len(os.listdir("/proc/self/fd"))) == (before, descriptors)
