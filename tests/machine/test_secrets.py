"""Secrets in the requests of real machines, and where they must not be found.

The world outside is that of the lab of `tests/system/test_injection.py`.
"""

import os
import shlex
import signal
from collections.abc import Iterator

import pytest
from tests.machine.test_network import egress_process
from tests.support.egress import world
from tests.support.folders import files_with
from tests.support.ports import free_port
from tests.support.server import NO_POOL, QEMU, RealServer, wait_until
from tests.support.world import RESOLVER

pytestmark = [pytest.mark.machine, pytest.mark.large, pytest.mark.timeout(1800)]

SECRET, NEXT = "s3cret-5d0c7e11", "s3cret-91f2ab60"
RULES = {
    "egress": "deny",
    "allow": ["good.test", "other.test"],
    "inject": [{"host": "good.test", "headers": {"Authorization": "Bearer ${TOKEN}"}}],
}
FETCH = (
    "import urllib.request as u; print(u.urlopen('https://good.test{}', timeout=60).read()[:999])"
)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealServer]:
    outside = tmp_path_factory.mktemp("outside")
    with world(outside):
        made = RealServer(
            free_port(),
            **QEMU,
            **NO_POOL,
            SANDYARD_NODE__DNS=f'["{RESOLVER}"]',
        )
        made.share_goldens("base-ubuntu")
        try:
            made.run("template", "build", "base-ubuntu", limit_s=1500)
            made.start()
            made.stop()
            # Not in the templates, which would have to be built anew.
            made.environment["SANDYARD_NODE__EXTRA_CA"] = str(outside / "trusted.pem")
            made.start()
            yield made
        finally:
            made.remove()


@pytest.fixture(autouse=True)
def _leaves_nothing(server: RealServer) -> Iterator[None]:
    yield
    for one in server.client.get("/v1/sandboxes").json()["data"]:
        server.client.delete(f"/v1/sandboxes/{one['id']}")
    for one in server.client.get("/v1/snapshots").json()["data"]:
        server.client.delete(f"/v1/snapshots/{one['id']}")
    for one in server.client.get("/v1/secrets").json()["data"]:
        server.client.delete(f"/v1/secrets/{one['name']}")
    wait_until(lambda: server.machines() == set(), what="nothing is left")


def add(server: RealServer, value: str = SECRET) -> None:
    body = {"name": "token", "value": value, "hosts": ["good.test"]}
    answer = server.client.post("/v1/secrets", json=body)
    assert answer.status_code == 201, answer.text
    assert value not in answer.text


def fetched(server: RealServer, box: object, path: str = "/", **body: object) -> str:
    command = f"python3 -c {shlex.quote(FETCH.format(path))} 2>&1 | tail -1"
    return str(server.execute(box, command, **{"timeout": 120_000, **body})["stdout"])


def test_a_secret_is_added_outside_the_machine_whatever_becomes_of_that(
    server: RealServer,
) -> None:
    add(server)
    box = str(server.create(network=RULES)["id"])
    # What its host does not repeat is nowhere in the machine, nor in any file of the host's.
    assert "\\x00" in fetched(server, box, "/large")
    server.act(box, "pause")
    wait_until(lambda: server.status(box) == "paused", what="it is paused")
    assert files_with(SECRET.encode(), server.home) == []
    server.wait_running(server.act(box, "resume")["id"])

    assert f"Authorization: Bearer {SECRET}" in fetched(server, box)
    assert SECRET in fetched(server, box, user="nobody")
    bare = f"env -i /usr/bin/python3 -c {shlex.quote(FETCH.format('/'))}"
    assert SECRET in str(server.execute(box, bare, timeout=120_000)["stdout"]), "by the store alone"
    (fork,) = server.act(box, "fork", count=1)
    server.wait_running(fork["id"])
    assert SECRET in fetched(server, fork["id"])

    # Rotated for both, and in force when that is answered.
    answer = server.client.put("/v1/secrets/TOKEN", json={"value": NEXT})
    assert answer.status_code == 200, answer.text
    for one in (box, fork["id"]):
        assert NEXT in fetched(server, one)
    server.delete(fork["id"])

    # The server dies, and its process lives; then both die, and it is given its secrets again.
    [pid] = egress_process(server, box)
    server.kill()
    os.kill(pid, 0)
    server.start()
    assert NEXT in fetched(server, box)
    server.kill()
    os.kill(pid, signal.SIGKILL)
    server.start()
    wait_until(lambda: NEXT in fetched(server, box), limit_s=60, what="its secrets are back")

    server.client.delete("/v1/secrets/TOKEN")
    assert "502" in fetched(server, box)
    add(server)
    assert SECRET in fetched(server, box)
    lines = server.client.get(f"/v1/sandboxes/{box}/egress").json()["data"]
    assert {tuple(one["secrets"]) for one in lines} == {(), ("TOKEN",)}
    fetched(server, box, "/")
    server.execute(box, "getent ahostsv4 bad.test", timeout=30_000)

    def is_told() -> bool:
        [secret] = server.client.get("/v1/secrets").json()["data"]
        feed = server.client.get("/v1/activity").json()["data"]["events"]
        told = [one for one in feed if one["eventType"] == "sandbox.network_refused"]
        names = {one["attributes"]["name"] for one in told}
        return secret["lastUsedAt"] is not None and "bad.test" in names

    wait_until(is_told, limit_s=30, what="the use and the refusal are told")


def test_rules_that_come_later_and_go_again(server: RealServer) -> None:
    add(server)
    box = str(server.create()["id"])
    snapshot = server.act(box, "snapshots", name="before")
    assert "CERTIFICATE_VERIFY_FAILED" in fetched(server, box), "the guest knows no such host"
    answer = server.client.put(f"/v1/sandboxes/{box}/network", json=RULES)
    assert answer.status_code == 200, answer.text
    assert answer.json()["data"]["inject"] == RULES["inject"]
    assert SECRET in fetched(server, box)
    # A return to what was before is one of its files and memory, not of its rules.
    server.act(box, "rollback", snapshotId=snapshot["id"])
    server.wait_running(box)
    assert SECRET in fetched(server, box)
    # It is changed while it is paused.
    answer = server.client.put(f"/v1/sandboxes/{box}/network", json={})
    assert answer.status_code == 200, answer.text
    assert "CERTIFICATE_VERIFY_FAILED" in fetched(server, box)
    server.act(box, "pause")
    wait_until(lambda: server.status(box) == "paused", what="it is paused")
    answer = server.client.patch(f"/v1/sandboxes/{box}", json={"network": RULES})
    assert answer.status_code == 200, answer.text
    server.wait_running(server.act(box, "resume")["id"])
    assert SECRET in fetched(server, box)
    server.act(box, "restart")
    server.wait_running(box)
    assert SECRET in fetched(server, box)


def test_the_usual_programs_trust_the_authority(server: RealServer) -> None:
    add(server)
    basic = {"Authorization": "Basic ${base64:x-access-token:TOKEN}"}
    rules = RULES | {"inject": [{"host": "good.test", "headers": basic}]}
    box = str(server.create(template="base-ubuntu", network=rules)["id"])

    def said(command: str, **body: object) -> str:
        end = server.execute(box, command, **{"timeout": 180_000, **body})
        return f"{end['stdout']}{end['stderr']}"

    assert "Basic eC1hY2Nlc3MtdG9rZW46" in said("curl -sS https://good.test/")
    assert "Basic eC1h" in said("curl -sS https://good.test/", user="user")
    assert "Basic eC1h" in said("wget -qO- https://good.test/")
    node = "fetch('https://good.test/').then(one => one.text()).then(console.log)"
    assert "Basic eC1h" in said(f'node -e "{node}"')
    assert "Basic eC1h" in said(f"python3 -c {shlex.quote(FETCH.format('/'))}")
    # These find something else than what they look for, and nothing wrong with who says so.
    told = [
        said("git ls-remote https://good.test/some/repository 2>&1"),
        said("pip download --no-deps -i https://good.test/simple some-package 2>&1"),
        said("npm view --registry=https://good.test/ some-package 2>&1"),
    ]
    lines = server.client.get(f"/v1/sandboxes/{box}/egress").json()["data"]
    used = [one for one in lines if one["secrets"] == ["TOKEN"]]
    assert len(used) >= 8, (told, lines)
    assert not [one for one in lines if "certificate" in one["rule"]], lines
