"""Shared by all tests: which tiers can run here, loudly, and the servers that a run starts."""

import os
import socket
from collections.abc import Iterator

import pytest

from tests.support import postgres
from tests.support.firecracker import firecracker_environment, firecracker_verdict
from tests.support.server import QEMU


def free_port() -> int:
    """Return a port of loopback that nothing uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs root where there is none, and say so."""
    for item in items:
        if item.get_closest_marker("machine"):
            item.add_marker(pytest.mark.root)
            item.add_marker(pytest.mark.slow)
            # The first of them on a new machine builds the templates.
            item.add_marker(pytest.mark.timeout(1200))
        if item.get_closest_marker("root") and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="NOT RUN: needs root"))


@pytest.fixture(
    scope="session", params=["qemu", pytest.param("firecracker", marks=pytest.mark.kvm)]
)
def hypervisor(request: pytest.FixtureRequest) -> dict[str, str]:
    """Settings that have machines run under each hypervisor in turn, where one boots at all."""
    if request.param == "qemu":
        return dict(QEMU)
    verdict = firecracker_verdict()
    if not verdict.is_usable:
        pytest.skip(f"NOT RUN: Firecracker boots no machine here: {verdict.reason}")
    return firecracker_environment()


@pytest.fixture(scope="session", autouse=True)
def _postgres(request: pytest.FixtureRequest) -> Iterator[None]:
    wanted = any(item.get_closest_marker("postgres") for item in request.session.items)
    if not wanted:
        yield
        return
    folder = postgres.start_server(free_port())
    yield
    postgres.stop_server(folder)
