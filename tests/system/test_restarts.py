"""Real servers that are killed, restarted, put side by side and starved."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack
from ipaddress import ip_network
from pathlib import Path

import pytest
from tests.support.disks import own_disk
from tests.support.ports import free_port
from tests.support.server import COLD, NO_POOL, QEMU, RealServer, is_slow, wait_until

pytestmark = pytest.mark.machine


def installation(hypervisor: dict[str, str]) -> RealServer:
    """Return one whose machines boot from cold, or, where that takes minutes, are clones."""
    if not is_slow():
        return RealServer(free_port(), **hypervisor, **COLD)
    made = RealServer(free_port(), **hypervisor, **NO_POOL)
    made.share_goldens()
    return made


@pytest.fixture
def server(hypervisor: dict[str, str]) -> Iterator[RealServer]:
    made = installation(hypervisor)
    try:
        yield made
    finally:
        made.remove()


@pytest.fixture
def qemu_server() -> Iterator[RealServer]:
    made = RealServer(free_port(), **QEMU, **COLD)
    try:
        yield made
    finally:
        made.remove()


def test_a_killed_server_adopts_what_runs_and_finishes_what_was_starting(
    server: RealServer,
) -> None:
    server.start()
    lives = server.create(name="lives")["id"]
    server.execute(lives, "(while :; do date +%s%N > /tick; sleep 0.2; done) >/dev/null 2>&1 &")
    pid = server.pid_of(lives)
    starting = server.create(wait=0)["id"]
    wait_until(lambda: len(server.processes()) == 2, what="the second machine boots")
    assert server.get(starting)["status"] == "creating"
    server.kill()
    before = server.processes()
    assert len(before) == 2
    server.start()
    # The one that ran goes on under the same process, and its own processes never noticed.
    assert server.pid_of(lives) == pid
    first = server.execute(lives, "cat /tick")["stdout"]
    wait_until(lambda: server.execute(lives, "cat /tick")["stdout"] != first, what="it ticks")
    # The one that was starting is started anew; nothing of the first try is left.
    wait_until(lambda: server.get(starting)["status"] == "running", what="the start is finished")
    assert len(server.processes()) == 2
    assert server.machines() == {str(lives), str(starting)}
    assert server.execute(starting, "echo fine")["stdout"] == "fine\n"


def test_a_machine_that_died_while_the_server_was_down_is_told_and_cleaned_up(
    server: RealServer,
) -> None:
    server.start()
    box = server.create()["id"]
    pid = server.pid_of(box)
    server.kill()
    os.kill(pid, signal.SIGKILL)
    server.start()
    wait_until(lambda: server.get(box)["status"] == "error", limit_s=10)
    reason = server.get(box)["statusReason"]
    assert isinstance(reason, dict)
    assert reason["code"] == "machine_died"
    assert not server.processes()
    server.delete(box)
    assert not server.machines()


def test_a_delete_under_way_is_finished_by_the_next_server(server: RealServer) -> None:
    server.start()
    box = server.create()["id"]
    server.client.delete(f"/v1/sandboxes/{box}", params={"async": "true"})
    server.kill()
    server.start()
    wait_until(
        lambda: server.client.get(f"/v1/sandboxes/{box}").status_code == 404, what="it is gone"
    )
    assert not server.processes()
    assert not server.machines()


def test_an_orderly_stop_says_which_machines_live_on(server: RealServer) -> None:
    server.start()
    box = str(server.create()["id"])
    said = server.run("stop").stdout
    assert "stopped the server" in said
    assert box in said
    assert not (server.home / "server.pid").exists()
    assert len(server.processes()) == 1
    server.start()
    assert server.execute(box, "echo still")["stdout"] == "still\n"
    pid = int((server.home / "server.pid").read_text())
    assert server.process is not None
    assert pid == server.process.pid
    refused = server.run("serve", check=False)
    assert refused.returncode == 1
    assert "another server uses" in refused.stderr


def test_two_installations_on_one_host_never_meet(
    server: RealServer, hypervisor: dict[str, str]
) -> None:
    other = installation(hypervisor)
    try:
        server.start()
        other.start()
        assert server.instance["id"] != other.instance["id"]
        one, two = server.create()["id"], other.create()["id"]
        assert not server.processes() & other.processes()
        assert server.namespaces()
        assert other.namespaces()
        subnets = [
            ip_network(f"{at.get(box)['ip']}/20", strict=False)
            for at, box in ((server, one), (other, two))
        ]
        assert not subnets[0].overlaps(subnets[1])
        # Taking one down whole leaves the other alone.
        other.remove()
        assert server.execute(one, "echo here")["stdout"] == "here\n"
    finally:
        if other.home.exists():
            other.remove()


def test_a_full_host_disk_stalls_a_machine_and_room_lets_it_go_on(tmp_path: Path) -> None:
    server = RealServer(
        free_port(),
        SANDYARD_NODE__DISK_FLOOR_MIB="1",
        SANDYARD_NODE__DISK_OVERCOMMIT="1000",
        **QEMU,
        **COLD,
    )
    machines = server.home / "machines"
    machines.mkdir(mode=0o711)
    with ExitStack() as held:
        held.callback(server.remove)
        held.enter_context(own_disk(machines, tmp_path / "disk", size_mib=700))
        filling = machines / "filling"
        subprocess.run(["fallocate", "-l", "500M", filling], check=True)
        server.start()
        box = server.create()["id"]
        server.execute(
            box,
            "(head -c 200000000 /dev/zero > /big; sync; echo done > /end) >/dev/null 2>&1 &",
        )

        def reason() -> object:
            told = server.get(box)["statusReason"]
            return told["code"] if isinstance(told, dict) else None

        wait_until(lambda: reason() == "host_disk_full", limit_s=120)
        assert server.get(box)["status"] == "running"
        full = server.client.post("/v1/sandboxes", json={"template": "base-minimal"})
        assert (full.status_code, full.json()["error"]["code"]) == (503, "no_capacity")
        filling.unlink()
        wait_until(lambda: reason() is None, what="it goes on")
        wait_until(
            lambda: server.execute(box, "cat /end")["stdout"] == "done\n",
            what="it wrote it all",
            limit_s=120,
        )
        server.delete(box)
        server.stop()
        server.run("stop", "--all")
        assert not server.folders()


def test_a_boot_without_progress_is_tried_once_more_then_given_up(
    qemu_server: RealServer,
) -> None:
    """A machine that stands still from its first moment on; found by the silent console."""
    server = qemu_server
    stub = server.home / "qemu-stopped"
    server.environment["SANDYARD_NODE__QEMU_BINARY"] = str(stub)
    server.environment["SANDYARD_NODE__DRIVER"] = "qemu-tcg"
    server.environment["SANDYARD_NODE__NO_PROGRESS_S"] = "1"
    real = 'exec qemu-system-x86_64 "$@"'
    # The probe, which has no monitor, runs as ever; real machines are held before their first step.
    stub.write_text(
        '#!/bin/sh\ncase "$*" in *-qmp*) echo x >> ' + str(server.home / "tries") +
        ' 2>/dev/null; set -- "$@" -S ;; esac\n' + real + "\n"
    )  # fmt: skip
    stub.chmod(0o755)
    (server.home / "tries").touch(mode=0o666)
    (server.home / "tries").chmod(0o666)
    server.start()
    box = server.create(wait=0)["id"]
    wait_until(lambda: server.get(box)["status"] == "failed", limit_s=60)
    assert (server.home / "tries").read_text().count("x") == 2
    reason = server.get(box)["statusReason"]
    assert isinstance(reason, dict)
    assert "no progress" in reason["message"]
    server.delete(box)
    assert not server.processes()
    assert not server.machines()


def test_the_doctor_names_what_is_wrong_and_what_mends_it(
    qemu_server: RealServer,
) -> None:
    server = qemu_server
    server.run("template", "build", "base-minimal")
    said = server.run("doctor", check=False)
    assert said.returncode == 1
    for word in (
        "running as root", "/dev/net/tun", "network namespaces", "nftables", "is free",
        "qemu-", "template base-ubuntu is not built", "sandyard template build base-ubuntu",
    ):  # fmt: skip
        assert word in said.stdout, said.stdout
    empty = {**server.environment, "PATH": "/nonexistent"}
    program = Path(os.sys.executable).parent / "sandyard"  # type: ignore[attr-defined]
    said = subprocess.run(
        [str(program), "doctor"], env=empty, capture_output=True, text=True, check=False
    )
    assert "apt-get install -y nftables" in said.stdout
    assert "qemu-system-x86_64 is not installed" in said.stdout
    server.instance = {}


@pytest.mark.parametrize("policy", ["drop"])
def test_a_dropping_forward_chain_as_dockers_is_passed(server: RealServer, policy: str) -> None:
    # What other tests run meanwhile is let through, the lab's hosts as well.
    others = {one.name.rpartition("-")[0] for one in Path("/run/netns").glob("syd-*")} | {"sl"}
    pass_ = "\n".join(f'{way} "{one}*" accept' for one in others for way in ("iifname", "oifname"))
    docker = f"""
table ip filter {{
  chain DOCKER-USER {{ }}
  chain FORWARD {{
    type filter hook forward priority filter; policy {policy};
    jump DOCKER-USER
    {pass_}
  }}
}}
"""
    subprocess.run(["nft", "-f", "-"], input=docker, text=True, check=True)
    try:
        server.start()
        shown = subprocess.run(
            ["nft", "list", "chain", "ip", "filter", "DOCKER-USER"],
            capture_output=True, text=True, check=True,
        ).stdout  # fmt: skip
        ours = [one for one in shown.splitlines() if f'"{server.prefix}*"' in one]
        assert [" accept " in one for one in ours] == [True, True], shown
        server.stop()
        server.run("stop", "--all")
        shown = subprocess.run(
            ["nft", "list", "ruleset"], capture_output=True, text=True, check=True
        ).stdout
        assert server.prefix not in shown
    finally:
        subprocess.run(["nft", "delete", "table", "ip", "filter"], check=True)


def test_a_newcomers_day(tmp_path: Path) -> None:
    """scripts/up, the request it prints, scripts/down: as the README tells it."""
    root = Path(__file__).parents[2]
    server = RealServer(free_port())
    environment = {**server.environment, "SANDYARD_VENV": str(Path(os.sys.prefix))}  # type: ignore[attr-defined]

    def script(name: str, *arguments: str) -> str:
        done = subprocess.run(
            [str(root / "scripts" / name), *arguments], env=environment, text=True,
            capture_output=True, check=False, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        said = script("up", "--detach")
        assert "Linux sandbox-" in said
        config = server.home / "xdg/sandyard/config.toml"
        assert config.stat().st_mode & 0o777 == 0o600
        request = said[said.index("curl -X POST") :].split("\n\n")[0]
        answer = subprocess.run(
            ["bash", "-c", f"{request} -s"], capture_output=True, text=True, check=True
        ).stdout
        made = json.loads(answer)["data"]
        key = config.read_text().split('api_key = "')[1].split('"')[0]
        server.client.headers["Authorization"] = f"Bearer {key}"
        server.client.base_url = f"http://127.0.0.1:{server.port}"
        server.wait_running(made["id"])  # on a host that is busy, later than the answer
        started = time.monotonic()
        assert "running already" in script("up", "--detach")
        assert time.monotonic() - started < 120
        said = script("down")
        assert made["id"] in said
        server.instance = json.loads((server.home / "instance.json").read_text())
        assert "deleted" in script("down", "--all")
        assert server.leftovers() == {}
    finally:
        # Where something above failed, its server still runs.
        subprocess.run(
            [str(root / "scripts/down"), "--all"], env=environment, capture_output=True, check=False
        )
        server.remove()
