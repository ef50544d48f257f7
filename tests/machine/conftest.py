"""One real server for the tier, one sandbox that tests share, and a leak check after each test."""

from collections.abc import Iterator

import pytest
from tests.conftest import free_port
from tests.support.server import RealServer, wait_until

SPARE_SLOTS = 3


@pytest.fixture(scope="session")
def server() -> Iterator[RealServer]:
    """A running installation; taken down whole at the end, which checks that nothing is left."""
    made = RealServer(free_port())
    try:
        made.start()
        yield made
    finally:
        made.remove()


@pytest.fixture(scope="session")
def box(server: RealServer) -> str:
    """The id of a sandbox that tests may use but not break."""
    return str(server.create(env={"FROM_CREATE": "yes"})["id"])


@pytest.fixture(autouse=True)
def _leaves_nothing(server: RealServer, box: str) -> Iterator[None]:
    yield
    listed = server.client.get("/v1/sandboxes").json()["data"]
    for one in listed:
        if one["id"] != box:
            server.delete(one["id"])
    assert server.machines() == {box}
    assert len(server.processes()) == 1
    wait_until(lambda: len(server.namespaces()) == 1 + SPARE_SLOTS, what="spare slots are made")
    wait_until(lambda: len(server.links()) == 1 + SPARE_SLOTS, what="links match namespaces")
