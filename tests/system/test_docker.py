"""Docker in a sandbox, by the template that comes with it: no registry is asked."""

import json
from collections.abc import Iterator

import pytest
from tests.support.ports import free_port
from tests.support.server import QEMU, RealServer, wait_until

pytestmark = [pytest.mark.machine, pytest.mark.large]

BUILD_LIMIT_S = 1200
IMAGE = """
mkdir -p /tmp/image/bin
cp /run/sandyard/tools/usr/bin/busybox /tmp/image/bin/busybox
tar -C /tmp/image -c . | docker import - tiny
"""
COUNTER = """
docker run -d --name counter -p 127.0.0.1:8000:80 tiny busybox sh -c \
    'busybox httpd -p 80 -h /bin; i=0; while :; do i=$((i + 1)); echo $i; busybox sleep 0.5; done'
"""


@pytest.fixture(scope="module")
def server() -> Iterator[RealServer]:
    made = RealServer(free_port(), **QEMU, SANDYARD_POOL__FLOOR="1", SANDYARD_POOL__CEILING="1")
    made.share_goldens("docker-ubuntu")
    try:
        made.run("template", "build", "docker-ubuntu", limit_s=BUILD_LIMIT_S)
        made.start()
        yield made
    finally:
        made.remove()


def said(server: RealServer, box: object, command: str, user: str = "root") -> str:
    """Return what a command printed that did well."""
    end = server.execute(box, command, timeout=120_000, user=user)
    assert end["exitCode"] == 0, end
    return str(end["stdout"]).strip()


def count_of(server: RealServer, box: object) -> int:
    """Return how far a container has counted."""
    return int(said(server, box, "docker logs --tail 1 counter") or 0)


def test_containers_run_at_once_and_go_on_after_a_pause(server: RealServer) -> None:
    # Whoever asks for the first has a golden machine made for all others; its own boot is not
    # waited for.
    server.delete(server.create(template="docker-ubuntu", wait=0)["id"])
    wait_until(
        lambda: any(one["template"] == "docker-ubuntu" for one in server.waiting()),
        limit_s=BUILD_LIMIT_S, what="one waits",
    )  # fmt: skip
    box = server.create(template="docker-ubuntu", idleTimeout=0)["id"]
    said(server, box, "docker version")  # of the daemon too, which was saved running
    said(server, box, IMAGE)
    told = said(server, box, "docker run --rm tiny busybox echo from a container", "user")
    assert told == "from a container"
    name = said(server, box, COUNTER)
    wait_until(lambda: count_of(server, box) > 1)
    head = "curl -sI http://127.0.0.1:8000/busybox"
    assert said(server, box, head).startswith("HTTP/1.1 200")

    server.client.post(f"/v1/sandboxes/{box}/pause").raise_for_status()
    server.client.post(f"/v1/sandboxes/{box}/resume").raise_for_status()
    before = count_of(server, box)
    wait_until(lambda: count_of(server, box) > before)
    assert said(server, box, head).startswith("HTTP/1.1 200")
    state = json.loads(said(server, box, "docker inspect counter"))[0]
    assert (state["Id"], state["RestartCount"], state["State"]["Running"]) == (name, 0, True)

    # Its daemon is started again if it ends.
    said(server, box, "pkill -KILL dockerd")
    wait_until(lambda: server.execute(box, "docker version")["exitCode"] == 0, limit_s=60)
    server.client.delete(f"/v1/sandboxes/{box}").raise_for_status()
    wait_until(lambda: server.machines() == set(), what="nothing is left")
