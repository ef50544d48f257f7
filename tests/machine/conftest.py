"""One real server for the tier, one sandbox that tests share, and a leak check after each test."""

from collections.abc import Iterator

import pytest
from tests.support.firecracker import WITHOUT_WHOLE_MEMORY, has_test_kernel, lacks_option
from tests.support.ports import free_port
from tests.support.server import RealServer, is_slow, wait_until

SPARE_SLOTS = 3
POOL = 2


@pytest.fixture(scope="session")
def server(hypervisor: dict[str, str]) -> Iterator[RealServer]:
    """A running installation; taken down whole at the end, which checks that nothing is left."""
    pool = 0 if is_slow() else POOL
    made = RealServer(
        free_port(),
        **hypervisor,
        SANDYARD_POOL__FLOOR=str(pool),
        SANDYARD_POOL__CEILING=str(pool),
    )
    made.share_goldens()
    try:
        made.start()
        yield made
    finally:
        made.remove()


@pytest.fixture(autouse=True)
def _memory_is_whole(request: pytest.FixtureRequest, server: RealServer) -> None:
    """Skip, loudly, what a guest's memory is not up to.

    On a KVM that needs a kernel made for it, a process that has forked loses what it stores while
    its pages are copied, sixteen bytes at a time: a C program of ten lines that writes by memcpy
    into pages it shares with its parent reads other bytes back.
    """
    if request.node.get_closest_marker("whole_memory") and has_test_kernel(server.environment):
        pytest.skip(WITHOUT_WHOLE_MEMORY)


@pytest.fixture(autouse=True)
def _kernel_can(request: pytest.FixtureRequest, server: RealServer) -> None:
    """Skip, loudly, what the guests' kernel says that it was built without."""
    for marker in request.node.iter_markers("kernel_option"):
        if lacks_option(server.environment, marker.args[0]):
            pytest.skip(f"NOT RUN: the kernel for tests has no CONFIG_{marker.args[0]}")


@pytest.fixture(scope="session")
def box(server: RealServer) -> str:
    """The id of a sandbox that tests may use but not break."""
    # Other servers' tests may come between: it is not to be paused for that.
    return str(server.create(env={"FROM_CREATE": "yes"}, idleTimeout=0)["id"])


def _is_settled(server: RealServer, box: str) -> bool:
    """Tell whether there is the box and what waits in the pool, and nothing else at all.

    What is made ahead may be on its way for a while.
    """
    waiting = server.waiting()
    machines = 1 + len(waiting)
    expected = {one["id"] for one in waiting} | {server.record_of(box)["id"]}
    return (
        server.folders() == expected
        and len(server.processes()) == machines
        and len(server.namespaces()) == machines + SPARE_SLOTS
        and len(server.links()) == machines + SPARE_SLOTS
        and not server.mounts()
        and not server.unfinished()
    )


@pytest.fixture(autouse=True)
def _leaves_nothing(server: RealServer, box: str) -> Iterator[None]:
    yield
    listed = server.client.get("/v1/sandboxes").json()["data"]
    for one in listed:
        if one["id"] != box:
            server.delete(one["id"])
    for one in server.client.get("/v1/snapshots").json()["data"]:
        server.client.delete(f"/v1/snapshots/{one['id']}")
    assert server.machines() == {box}
    settled = lambda: _is_settled(server, box)  # noqa: E731
    wait_until(settled, limit_s=120, what="only the box and the pool are there")
