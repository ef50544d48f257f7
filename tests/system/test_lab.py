"""An installation on several hosts, and its bad days: real processes, namespaces, cables cut."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from cryptography import x509
from tests.support.lab import API, DATABASE, DOOR, METRICS, NATS, PREVIEWS, Host, Lab, lab
from tests.support.server import QEMU, SANDYARD, longer, wait_until

from sandyard.server.app.member import home_of
from sandyard.server.app.settings import Settings

pytestmark = [pytest.mark.machine]
LONG = pytest.mark.long
NAMES = ("one", "two", "three", "four", "five")


@pytest.fixture(scope="module")
def whole() -> Iterator[Lab]:
    with lab(*NAMES) as made:
        yield made


@pytest.fixture
def built(whole: Lab) -> Iterator[Lab]:
    """The hosts, and whatever a test did to them undone after it."""
    yield whole
    for host in whole.hosts:
        host.heal()
        if host.process is not None:
            host.signal(signal.SIGCONT)
    whole.start_nats()
    for number, control in enumerate(whole.controls):
        if control.process is None:
            whole.start_control(number)
    whole.until_up()
    for box in whole.ask("GET", "/v1/sandboxes"):
        whole.delete(box)
    wait_until(lambda: not whole.ask("GET", "/v1/sandboxes"), what="every sandbox is gone")


def statuses(built: Lab, boxes: list[dict[str, Any]]) -> set[str]:
    return {built.status(one) for one in boxes}


def while_it_lasts(seconds: float, work: Callable[[], None]) -> None:
    """Do something again and again for so long."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        work()
        time.sleep(0.2)


# --- whole --------------------------------------------------------------------------------------


def test_both_control_planes_reach_what_is_on_every_node(built: Lab) -> None:
    boxes = [built.on(name) for name in built.nodes]
    for control in built.controls:
        for box in boxes:
            url = f"http://{control.address}:{API}/v1/sandboxes/{box['id']}/exec"
            done = httpx.post(
                url, json={"command": "echo hi"}, headers=built.client.headers, timeout=60
            )
            assert "hi" in done.json()["data"]["stdout"]


def test_fifty_creates_of_one_key_over_two_control_planes_make_one_sandbox(built: Lab) -> None:
    def create(_: int) -> tuple[int, str]:
        answer = built.client.post(
            "/v1/sandboxes?wait=60", json={"template": "base-minimal", "idleTimeout": 0},
            headers={"Idempotency-Key": "once"},
        )  # fmt: skip
        return answer.status_code, answer.json().get("data", {}).get("id", "")

    with ThreadPoolExecutor(25) as threads:
        answers = list(threads.map(create, range(50)))
    assert {code for code, _ in answers} <= {200, 201}
    assert len({one for _, one in answers}) == 1
    assert len(built.ask("GET", "/v1/sandboxes")) == 1


def test_a_node_serves_its_own_metrics_to_its_own_host(built: Lab) -> None:
    node = built.nodes["one"]
    built.on("one")
    url = f"http://127.0.0.1:{METRICS}/metrics"
    script = f"import urllib.request as u; print(u.urlopen('{url}', timeout=20).read().decode())"
    said = node.run(sys.executable, "-c", script)
    assert re.search(r'^sandyard_pool_requests_total\{result="(hit|miss)",.*\} [1-9]', said, re.M)
    assert re.search(r"^sandyard_machine_start_seconds_count\{.*\} [1-9]", said, re.M)
    assert re.search(r'^sandyard_machines\{node="\S+",state="running"\} [1-9]', said, re.M)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"http://{node.address}:{METRICS}/metrics", timeout=20)


def test_nothing_new_comes_to_a_node_that_is_drained(built: Lab) -> None:
    boxes = [built.on("two") for _ in range(2)]
    assert built.nodes_of(boxes) == {"two"}


def test_the_doctor_tries_every_link(built: Lab) -> None:
    control, node = built.controls[0], built.nodes["one"]
    said = control.run(SANDYARD, "doctor")
    assert "the database answers" in said
    assert "a control plane: machines are started on other hosts" in said
    assert "template" not in said
    assert said.count("NATS answers at") == len(built.nats)
    assert "the node one can be reached" in said
    said = node.run(SANDYARD, "doctor")
    assert "the template base-ubuntu is built" in said
    assert said.count("NATS answers at") == len(built.nats)
    assert f"the control plane at {control.address}:{DOOR} can be reached" in said
    control.cut(DOOR)
    built.nats[1].kill()
    said = control.run(SANDYARD, "doctor")
    assert "the node two is there, and cannot be reached" in said
    assert f"NATS does not answer at {built.servers[1]}" in said


def test_the_operator_sees_drains_and_forgets_nodes(built: Lab) -> None:
    control = built.controls[0]

    def admin(*words: str) -> str:
        return control.run(SANDYARD, "admin", "node", *words)

    rows = [one.split("\t") for one in admin("list").splitlines()]
    assert {"one", "two", "three"} <= {row[0] for row in rows}
    assert "nothing new comes to two" in admin("drain", "two")
    assert "draining" in next(row for row in admin("list").splitlines() if row.startswith("two"))
    assert "takes new sandboxes" in admin("undrain", "two")
    assert "it is online" in admin("forget", "two")
    box = built.on("two")
    # What is logged, of a schema that another test has left say, is no row.
    shown = dict(row.split("\t", 1) for row in admin("show", "two").splitlines() if "\t" in row)
    assert (shown["status"], shown["sandboxes"]) == ("up", "1 running")
    assert (shown["over NATS"], shown["directly"]) == ("reached", "reached")
    assert "base-minimal" in shown["templates"]
    assert shown["can be forgotten"].startswith("no: it is up")
    found = built.ask("GET", f"/v1/sandboxes?node_id={shown['id']}")
    assert [one["id"] for one in found] == [box["id"]]
    for words in (("admin", "orgs"), ("admin", "migrate"), ("init",)):
        refused = built.nodes["one"].run(SANDYARD, *words)
        assert "this host is a node of an installation on several hosts" in refused
    assert not (built.nodes["one"].home / "sandyard.db").exists()
    assert "cannot find a node" in admin("forget", "nobody")


# --- nodes that are gone ------------------------------------------------------------------------


@pytest.mark.parametrize("seconds", [0, pytest.param(60, marks=LONG)])
def test_a_host_that_is_gone_is_lost_and_whole_when_it_is_back(built: Lab, seconds: int) -> None:
    there = [built.on("one") for _ in range(3)]
    other = built.on("two")
    built.nodes["one"].cut()
    wait_until(lambda: built.known()["one"].lost_at is not None, what="it is lost")
    wait_until(lambda: statuses(built, there) == {"suspected_missing"}, what="rows are true")
    assert built.status(other) == "running"
    assert "one" not in built.nodes_of([built.create() for _ in range(12)])
    gone = built.client.delete(f"/v1/sandboxes/{there[2]['id']}")
    assert (gone.status_code, gone.json()["data"]["deleted"]) == (202, False)
    while_it_lasts(seconds, lambda: None)
    assert statuses(built, there[:2]) == {"suspected_missing"}
    built.nodes["one"].heal()
    built.until_up("one")
    for box in there[:2]:
        built.until(box, "running")
        assert built.execute(box, "echo here") == "echo here"
    gone_now = lambda: built.client.get(f"/v1/sandboxes/{there[2]['id']}").status_code == 404  # noqa: E731
    wait_until(gone_now, limit_s=60, what="it goes")


def test_an_operator_says_that_a_lost_host_is_off(built: Lab) -> None:
    control = built.controls[0]
    box, deleted = built.on("three"), built.on("three")
    assert "not lost" in control.run(SANDYARD, "admin", "node", "confirm-off", "three", "--yes")
    built.nodes["three"].cut()
    built.until(box, "suspected_missing")
    assert built.client.delete(f"/v1/sandboxes/{deleted['id']}").status_code == 202
    said = control.run(SANDYARD, "admin", "node", "confirm-off", "three", "--yes")
    assert "three is off; 2 sandboxes ended with it" in said
    assert built.status(box) == "error"
    assert built.client.get(f"/v1/sandboxes/{deleted['id']}").status_code == 404
    # It was not, after all: nothing of what was deleted is left on it.
    built.nodes["three"].heal()
    built.until_up("three")
    built.ask("POST", f"/v1/sandboxes/{box['id']}/resume")
    assert built.execute(box, "echo hi") == "echo hi"


def test_a_start_on_a_host_that_is_cut_off_goes_to_another(built: Lab) -> None:
    def create(_: int) -> dict[str, Any]:
        return built.create()

    with ThreadPoolExecutor(12) as threads:
        making = threads.map(create, range(60))
        time.sleep(0.3)
        built.nodes["three"].cut()
        boxes = list(making)
    for box in boxes:
        if built.status(box) != "suspected_missing":  # that one was up before
            built.until(box, "running", limit_s=40)
    assert len(built.nodes_of(boxes)) > 2


def test_a_node_that_is_cut_off_from_nats_alone_goes_on_by_the_other_way(built: Lab) -> None:
    node = built.nodes["one"]
    box = built.on("one")
    before = node.said().count("by another way")
    node.cut(NATS)

    def goes_on() -> None:
        assert built.status(box) == "running"
        assert built.execute(box, "echo hi") == "echo hi"
        assert built.known()["one"].lost_at is None

    while_it_lasts(8, goes_on)
    wait_until(lambda: node.said().count("by another way") > before, what="it says how it goes on")
    shown = built.controls[0].run(SANDYARD, "admin", "node", "show", "one")
    assert "cut off from NATS only" in shown


def test_when_all_nodes_are_cut_off_at_once_that_is_undone_when_they_are_back(built: Lab) -> None:
    boxes = [built.on(name) for name in built.nodes]
    for node in built.nodes.values():
        node.cut()
    wait_until(lambda: statuses(built, boxes) == {"suspected_missing"}, what="all are suspected")
    assert built.client.post(
        "/v1/sandboxes", json={"template": "base-minimal"}
    ).status_code == 503  # fmt: skip
    for node in built.nodes.values():
        node.heal()
    wait_until(lambda: statuses(built, boxes) == {"running"}, what="all run again")


def test_a_home_that_was_copied_is_refused_while_the_first_lives(built: Lab) -> None:
    first = built.nodes["one"]
    copy = built.nodes["two"].home.parent / "copy"
    shutil.copytree(first.home, copy, ignore=shutil.ignore_patterns("*.sock", "server.*"))
    spare = built.nodes["three"]
    process = spare.process
    spare.process = None
    spare.environment["SANDYARD_HOME"], home = str(copy), spare.environment["SANDYARD_HOME"]
    spare.environment["SANDYARD_CLUSTER__PORT"] = "8701"
    try:
        spare.start(SANDYARD, "node")
        wait_until(
            lambda: spare.process is not None and spare.process.poll() is not None,
            what="the copy ends",
        )
        assert "another process is it, in another place" in spare.said()
        assert built.known()["one"].has_lease
    finally:
        spare.kill()
        spare.environment["SANDYARD_HOME"] = home
        del spare.environment["SANDYARD_CLUSTER__PORT"]
        spare.process = process
        shutil.rmtree(copy)


# --- NATS and the database away -----------------------------------------------------------------


def nobody_is_lost(built: Lab, box: dict[str, Any], seconds: float) -> None:
    def works() -> None:
        assert built.execute(box, "echo hi") == "echo hi"
        assert built.status(box) == "running"

    while_it_lasts(seconds, works)
    assert all(one.lost_at is None for one in built.known().values())


@pytest.mark.parametrize(
    ("way", "seconds"),
    [
        ("killed", 10),
        ("hung", 10),
        pytest.param("killed", 60, marks=LONG),
        pytest.param("hung", 60, marks=LONG),
    ],
)
def test_without_nats_no_node_is_lost_and_what_runs_is_used(
    built: Lab, way: str, seconds: int
) -> None:
    box, other = built.on("one"), built.on("two")
    for control in built.controls:
        for path in ("/v1/templates", "/metrics"):
            built.get_from(control, path)
    for host in built.nats:
        host.kill() if way == "killed" else host.signal(signal.SIGSTOP)
    nobody_is_lost(built, box, seconds)
    # What was known of them is shown, with its age.
    assert "base-minimal" in {one["slug"] for one in built.ask("GET", "/v1/templates")}
    said = built.get_from(built.controls[0], "/metrics")
    node = f'node="{built.known()["one"].id}"'
    assert re.search(rf'^sandyard_machines\{{{node},state="running"\}} [1-9]', said, re.M)
    assert re.search(rf"^sandyard_node_report_age_seconds\{{{node}\}} [1-9]", said, re.M)
    assert re.search(rf'^sandyard_node_info\{{name="one",{node},version="[^"]+"\}} 1', said, re.M)
    refused = built.client.post("/v1/sandboxes", json={"template": "base-minimal"})
    assert refused.status_code == 503
    assert int(refused.headers["Retry-After"]) > 0
    # Done when the node can be asked again; nobody waits for that.
    gone = built.client.delete(f"/v1/sandboxes/{other['id']}", timeout=longer(30))
    assert (gone.status_code, gone.json()["data"]["deleted"]) == (202, False)
    for host in built.nats:
        if way == "hung":
            host.signal(signal.SIGCONT)
    built.start_nats()
    built.until_up()
    built.create()
    url = f"/v1/sandboxes/{other['id']}"
    wait_until(lambda: built.client.get(url).status_code == 404, limit_s=60, what="it is gone")
    nobody_is_lost(built, box, 3)


def test_a_nats_server_that_dies_is_one_of_three(built: Lab) -> None:
    box = built.on("one")
    built.nats[0].kill()
    nobody_is_lost(built, box, 3)
    wait_until(lambda: built.try_create() == 201, what="a sandbox is created")


def test_a_nodes_papers_make_no_nats_server(built: Lab, tmp_path: Path) -> None:
    node, real = built.nodes["two"], built.nats[0]
    own = node.home / "cluster"
    kept = home_of(Settings(home=node.home)).identity.nats_authority
    (tmp_path / "authority.pem").write_text(kept)
    words = (real.home / "nats.conf").read_text()

    # It dials, from a port of its own, and they do not take its certificate.
    refusal = re.compile(
        rf"{re.escape(node.address)}:(?!6222 ).* TLS route handshake error: .*certificate"
    )

    def refusals() -> int:
        return sum(len(refusal.findall(one.said())) for one in built.nats)

    def routes(certificate: Path, key: Path) -> Any:
        """Return how many others one with these papers finds itself among, once that is certain."""
        config = tmp_path / "nats.conf"
        said = words.replace(real.address, node.address).replace(f'"{real.name}"', '"rogue"')
        for name, path in (
            ("certificate", certificate), ("key", key), ("authority", tmp_path / "authority.pem"),
        ):  # fmt: skip
            said = said.replace(str(real.home / f"{name}.pem"), str(path))
        config.write_text(f'{said}http: "127.0.0.1:8333"\n')
        rogue = subprocess.Popen(
            ["nsenter", f"--net=/run/netns/{node.netns}", "nats-server", "-c", config],
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        try:
            before = refusals()
            found: Any = {}

            def looked() -> bool:
                said = node.run("curl", "-s", "--retry", "9", "http://127.0.0.1:8333/routez")
                found.update(json.loads(said or "{}"))
                is_up = "num_routes" in found
                return is_up and (found["num_routes"] > 0 or refusals() > before + 2)

            wait_until(looked, what="it is let in, or refused")
            return found["num_routes"]
        finally:
            rogue.kill()
            rogue.wait()

    assert routes(built.nats[1].home / "certificate.pem", built.nats[1].home / "key.pem") > 0
    assert routes(own / "certificate.pem", own / "key.pem") == 0


@pytest.mark.parametrize(
    ("way", "seconds"),
    [("stopped", 12), ("restarted", 6), pytest.param("stopped", 30, marks=LONG)],
)
def test_without_the_database_no_node_is_lost(built: Lab, way: str, seconds: int) -> None:
    box = built.on("one")
    if way == "stopped":
        built.postgres.hang_all()
        time.sleep(seconds)
        built.postgres.go_on_all()
    else:
        built.postgres.signal(signal.SIGINT)
        assert built.postgres.process is not None
        built.postgres.process.wait(30)
        time.sleep(seconds)
        built.start_postgres()
    built.until_up()
    wait_until(lambda: built.try_status(box) == "running", limit_s=60, what="it is seen to run")
    assert built.execute(box, "echo hi") == "echo hi"
    assert all(one.lost_at is None for one in built.known().values())
    built.create()


# --- control planes away ------------------------------------------------------------------------


def test_a_control_plane_that_is_killed_is_one_of_two(built: Lab) -> None:
    box = built.on("two")
    built.controls[1].kill()
    failed: list[int] = []

    def use() -> None:
        answer = built.client.get(f"/v1/sandboxes/{box['id']}")
        if answer.status_code >= 300:
            failed.append(answer.status_code)

    while_it_lasts(4, use)
    assert len(failed) < 10  # until the balancer has seen it
    made = built.create()
    built.start_control(1)
    built.until_up()
    assert built.execute(made, "echo hi") == "echo hi"


def test_a_control_plane_without_its_database_gets_no_requests(built: Lab) -> None:
    box, control = built.on("one"), built.controls[1]
    control.cut(DATABASE)

    def serves(expected: int) -> Callable[[], bool]:
        def look() -> bool:
            with suppress(httpx.HTTPError):
                url = f"http://{control.address}:{API}/servez"
                return httpx.get(url, timeout=5).status_code == expected
            return False

        return look

    failed: list[int] = []

    def use() -> None:
        answer = built.client.get(f"/v1/sandboxes/{box['id']}")
        if answer.status_code >= 300:
            failed.append(answer.status_code)

    wait_until(serves(503), limit_s=20, what="it says that it cannot serve")
    # Who asks it nevertheless does not wait for the database.
    direct = f"http://{control.address}:{API}/v1/sandboxes/{box['id']}"
    refused = httpx.get(direct, headers=built.client.headers, timeout=longer(4))
    assert refused.status_code == 503
    assert "the database does not answer" in refused.text
    while_it_lasts(3, lambda: None)  # until the balancer has asked twice
    while_it_lasts(6, use)
    assert failed == []
    control.heal()
    wait_until(serves(200), limit_s=30, what="it serves again")
    built.until_up()
    assert built.execute(box, "echo hi") == "echo hi"


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=LONG)])
def test_a_control_plane_that_stands_still_changes_nothing_when_it_goes_on(
    built: Lab, seconds: int
) -> None:
    box = built.on("two")
    other = built.controls[1]
    direct = f"http://{other.address}:{API}/v1/sandboxes/{box['id']}/pause"
    late = threading.Thread(
        target=lambda: httpx.post(direct, headers=built.client.headers, timeout=90)
    )
    other.signal(signal.SIGSTOP)
    late.start()
    time.sleep(seconds)
    for action in ("pause", "resume"):
        built.ask("POST", f"/v1/sandboxes/{box['id']}/{action}")
    other.signal(signal.SIGCONT)
    late.join(90)
    assert all(one.lost_at is None for one in built.known().values())
    # What was asked of it is done now; nothing that it was at work on before was done twice.
    assert built.status(box) in {"paused", "running"}
    if built.status(box) == "paused":
        built.ask("POST", f"/v1/sandboxes/{box['id']}/resume")
    assert built.execute(box, "echo hi") == "echo hi"


@pytest.mark.parametrize("way", ["killed", "stands still"])
def test_what_a_control_plane_was_at_work_on_is_done_once_by_another(built: Lab, way: str) -> None:
    """Whichever steps forty creates and twenty deletes have come to when it goes."""
    other = built.controls[1]
    direct = f"http://{other.address}:{API}/v1/sandboxes"
    gone = [built.create() for _ in range(20)]

    def ask(number: int) -> None:
        with suppress(httpx.HTTPError), httpx.Client(headers=built.client.headers) as own:
            if number % 3 == 0:
                own.delete(f"{direct}/{gone[number // 3]['id']}", timeout=5)
            else:
                body = {"template": "base-minimal", "idleTimeout": 0}
                own.post(direct, json=body, timeout=5)

    with ThreadPoolExecutor(20) as threads:
        asking = threads.map(ask, range(60))
        time.sleep(0.4)
        other.kill() if way == "killed" else other.signal(signal.SIGSTOP)
        list(asking)

    # What it had leased is free after half a minute.
    def unsettled() -> list[tuple[str, ...]]:
        boxes = built.ask("GET", "/v1/sandboxes")
        shown = ("id", "status", "statusReason", "updatedAt")
        return [
            tuple(str(one.get(name)) for name in shown)
            for one in boxes
            if one["status"] != "running"
        ]

    wait_until(lambda: not unsettled(), limit_s=180, what=unsettled)
    if way == "killed":
        built.start_control(1)
    else:
        other.signal(signal.SIGCONT)
    built.until_up()
    while_it_lasts(4, lambda: None)
    wait_until(lambda: not unsettled(), limit_s=30, what=unsettled)
    boxes = built.ask("GET", "/v1/sandboxes")
    for box in boxes:
        assert built.execute(box, "echo hi") == "echo hi"

    # Those whose delete it had not begun are there; of all that are, there is one machine each. One
    # that stood still may have answered a request from before only now, so both are read again.
    def differing() -> Counter[str]:
        machines = Counter(built.machines())
        ids = Counter(str(one["id"]) for one in built.ask("GET", "/v1/sandboxes"))
        return (machines - ids) + (ids - machines)

    wait_until(lambda: not differing(), limit_s=60, what=lambda: f"one each: {differing()}")
    for box in gone:
        if box["id"] in built.machines():
            built.delete(box)


@pytest.mark.parametrize("ahead", ["+1h", "-1h"])
def test_clocks_that_are_an_hour_apart_change_nothing(built: Lab, ahead: str) -> None:
    brief = built.on("two")
    said = "this host's clock differs"
    before = built.controls[1].said().count(said)
    for host in (built.nodes["one"], built.controls[1]):
        built.restart_with_clock(host, ahead)
    try:
        built.until_up()
        box = built.on("one")
        nobody_is_lost(built, box, 6)
        assert built.status(brief) == "running"
        for control in built.controls:
            answer = httpx.post(
                f"http://{control.address}:{API}/v1/sandboxes?wait=60", timeout=100,
                json={"template": "base-minimal", "idleTimeout": 600, "expiresIn": 1800},
                headers=built.client.headers,
            )  # fmt: skip
            made = answer.json()["data"]
            assert made["status"] == "running"
            for other in (made, built.on("one")):
                assert built.execute(other, "echo hi") == "echo hi"
        while_it_lasts(5, lambda: None)
        assert {one["status"] for one in built.ask("GET", "/v1/sandboxes")} == {"running"}
    finally:
        for host in (built.nodes["one"], built.controls[1]):
            built.restart_with_clock(host, "+0")
    assert built.controls[1].said().count(said) > before


@pytest.mark.parametrize("ahead", [pytest.param("+2h", marks=LONG), "-2h"])
def test_a_database_whose_clock_is_set_ends_nothing(built: Lab, ahead: str) -> None:
    """As after a failover to another host."""
    body = {"template": "base-minimal", "idleTimeout": 600, "expiresIn": 1800}
    brief = built.ask("POST", "/v1/sandboxes?wait=60", **body)
    lost = built.losses()

    def alarms() -> int:
        return sum(
            "the clock was set" in one for c in built.controls for one in c.said().splitlines()
        )

    before = alarms()
    try:
        built.restart_with_clock(built.postgres, ahead)
        wait_until(lambda: alarms() == before + 2, limit_s=60, what="both raise an alarm")
        built.until_up()
        wait_until(lambda: built.try_status(brief) == "running", limit_s=60, what="it runs")
        while_it_lasts(6, lambda: None)
        assert built.execute(brief, "echo hi") == "echo hi"
        made = built.create()
        assert built.execute(made, "echo hi") == "echo hi"
    finally:
        built.restart_with_clock(built.postgres, "+0")
        built.until_up()
    wait_until(lambda: built.try_status(brief) == "running", limit_s=60, what="it runs")
    assert built.losses() == lost
    # No lease outlives its holder because of it: what a control plane that is killed was at work on
    # is done by the other, and a host that is gone is lost.
    built.nodes["three"].cut()
    wait_until(lambda: built.known()["three"].lost_at is not None, what="it is lost")


# --- real machines ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real(whole: Lab) -> Lab:
    """The same, with two nodes beside the others whose machines are real."""
    for name in ("real", "real-too"):
        whole.add_node(name, is_real=True, **QEMU, SANDYARD_POOL__CEILING="0")
    whole.until_up("real", "real-too")
    whole.keep_real_apart()
    return whole


def test_a_node_that_is_killed_finds_its_machines_and_no_status_changes(
    real: Lab, built: Lab
) -> None:
    node = real.nodes["real"]
    box = real.on("real")
    real.execute(box, "(while :; do date +%s%N > /tick; sleep 0.2; done) >/dev/null 2>&1 &")
    node.kill()
    seen = set()
    lost = real.losses()
    while_it_lasts(0.5, lambda: seen.add(real.status(box)))
    real.start_node("real")
    while_it_lasts(4, lambda: seen.add(real.status(box)))
    real.until_up("real")
    real.until(box, "running")
    # It is there before it has found its machines.
    wait_until(lambda: real.try_execute(box, "cat /tick") != "", what="it is reached again")
    first = real.execute(box, "cat /tick")
    wait_until(lambda: real.execute(box, "cat /tick") != first, what="it ticks")
    # On a host so busy that the process was not back in time, it was lost, and rightly.
    assert seen == {"running"} or real.losses() > lost


def test_machines_of_a_host_that_was_cut_off_run_on_with_their_memory(
    real: Lab, built: Lab
) -> None:
    node = real.nodes["real-too"]
    box, other = real.on("real-too"), real.on("real")
    real.execute(box, "mkdir -p /dev/shm; echo kept > /dev/shm/memory; date +%s > /start")
    node.cut()
    real.until(box, "suspected_missing")
    assert (real.status(other), real.execute(other, "echo hi").strip()) == ("running", "hi")
    node.heal()
    real.until(box, "running")
    wait_until(lambda: real.try_execute(box, "cat /dev/shm/memory") != "", what="it is reached")
    assert real.execute(box, "cat /dev/shm/memory").strip() == "kept"
    saved = real.ask("POST", f"/v1/sandboxes/{box['id']}/pause")
    assert saved["status"] == "paused"
    real.ask("POST", f"/v1/sandboxes/{box['id']}/resume")
    assert real.execute(box, "cat /dev/shm/memory").strip() == "kept"


# --- behind the balancer ------------------------------------------------------------------------


def test_ssh_and_previews_go_through_the_balancer(real: Lab, built: Lab, tmp_path: Path) -> None:
    box = real.on("real")
    real.execute(box, "mkdir -p /srv/www; echo shown > /srv/www/page")
    real.ask(
        "POST", f"/v1/sandboxes/{box['id']}/processes",
        command="python3 -m http.server 8000 --directory /srv/www",
    )  # fmt: skip

    def typed(*words: str) -> str:
        done = subprocess.run(
            [SANDYARD, "sandbox", *words],
            env={
                **os.environ,
                "XDG_CONFIG_HOME": str(tmp_path),
                "SANDYARD_URL": str(real.client.base_url).rstrip("/"),
                "SANDYARD_API_KEY": real.client.headers["authorization"].removeprefix("Bearer "),
            },
            capture_output=True, text=True, timeout=longer(60), check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def shown() -> str:
        place = f"http://{real.balancer.address}:{API}/page"
        return httpx.get(place, headers={"Host": name}, timeout=60).text

    name = urlsplit(typed("url", box["id"], "8000")).netloc
    assert name.endswith(f".{PREVIEWS}:{API}")
    wait_until(lambda: shown() == "shown\n", what=shown)
    assert typed("ssh", box["id"], "--", "cat /srv/www/page") == "shown"
    # By either control plane alone: of one host key, and for tokens of the other.
    for number, control in enumerate(built.controls):
        is_up = f"Server gateways/{control.name} is UP"
        before = built.balancer.said().count(is_up)
        control.stop()
        assert typed("ssh", box["id"], "--", "echo $((6 * 7))") == "42"
        assert shown() == "shown\n"
        built.start_control(number)
        wait_until(
            lambda is_up=is_up, before=before: built.balancer.said().count(is_up) > before,  # type: ignore[misc]
            what="the balancer uses it again",
        )  # fmt: skip


# --- certificates -------------------------------------------------------------------------------


def _issuer_of(host: Host) -> bytes | None:
    """Return which key has signed a host's certificate."""
    text = (host.home / "cluster" / "certificate.pem").read_bytes()
    found = x509.load_pem_x509_certificate(text).extensions
    return found.get_extension_for_class(x509.AuthorityKeyIdentifier).value.key_identifier


def test_the_certificate_authority_is_replaced_while_all_is_used(built: Lab) -> None:
    control, losses = built.controls[0], built.losses()
    failed: list[str] = []
    done: list[str] = []
    stop = threading.Event()

    def admin(word: str) -> str:
        return control.run(SANDYARD, "admin", "authority", word)

    def reload_nats() -> None:
        built.configure_nats()
        for host in built.nats:
            host.signal(signal.SIGHUP)

    def use() -> None:
        with httpx.Client(
            base_url=built.client.base_url, headers=built.client.headers, timeout=60
        ) as own:
            while not stop.wait(0.5):  # others have work to do meanwhile
                made = own.post("/v1/sandboxes?wait=60", json={"template": "base-minimal"})
                if made.status_code != 201 or made.json()["data"]["status"] != "running":
                    failed.append(f"create: {made.text}")
                    continue
                url = f"/v1/sandboxes/{made.json()['data']['id']}"
                ran = own.post(f"{url}/exec", json={"command": "echo hi"})
                gone = own.delete(url)
                failed.extend(one.text for one in (ran, gone) if one.status_code >= 300)
                done.append(url)

    def papers(host: Host, name: str) -> list[x509.Certificate]:
        text = (host.home / "cluster" / f"{name}.pem").read_bytes()
        return x509.load_pem_x509_certificates(text)

    def until_all(what: str, is_so: Callable[[Host], bool]) -> None:
        hosts = [*built.controls, *built.nodes.values()]
        wait_until(lambda: all(is_so(one) for one in hosts), limit_s=60, what=what)

    def until_said(word: str, answer: str) -> None:
        wait_until(lambda: answer in admin(word), limit_s=120, what=lambda: admin(word))

    (first,) = papers(built.nodes["one"], "authority")
    assert "there is only the one in use" in admin("remove")
    using = threading.Thread(target=use)
    using.start()
    try:
        assert "then sandyard admin authority use" in admin("add")
        assert "the last replacement is not over" in admin("add")
        assert "wait" in admin("use")
        reload_nats()
        until_all("trusts both", lambda one: len(papers(one, "authority")) == 2)
        (second,) = set(papers(control, "authority")) - {first}
        key = second.extensions.get_extension_for_class(x509.SubjectKeyIdentifier).value.digest
        until_said("use", "then sandyard admin authority delete")
        until_all("has a certificate of the second", lambda one: key == _issuer_of(one))
        until_said("remove", "shows no certificate of the new authority")
        reload_nats()
        until_said("remove", "next: sandyard admin authority add")
        until_all("trusts the second alone", lambda one: papers(one, "authority") == [second])
    finally:
        stop.set()
        using.join()
    assert failed == []
    assert len(done) > 20
    assert built.losses() == losses
    # A process that begins now has never known the first.
    for host in (built.controls[1], built.nodes["two"]):
        host.stop()
    built.start_control(1)
    built.start_node("two")
    built.until_up()
    assert built.execute(built.on("two"), "echo hi")
    assert "the node one can be reached" in control.run(SANDYARD, "doctor")


# --- two versions -------------------------------------------------------------------------------

MIGRATION = """
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "0999", "{newest}", None, None


def upgrade() -> None:
    op.add_column("sandboxes", sa.Column("colour", sa.Text(), nullable=False, server_default="red"))
    op.add_column("usage_periods", sa.Column("shade", sa.Integer()))
    op.create_table("colours", sa.Column("name", sa.Text(), primary_key=True))
"""
NEWER = {
    "core/wire.py": ("VERSIONS: Final = Versions(now=1,", "VERSIONS: Final = Versions(now=2,"),
    "links/tunnel/frames.py": ("Versions(now=1,", "Versions(now=2,"),
    "core/contracts/node.py": (
        "    unreadable: tuple[str, ...] = ()\n",
        '    unreadable: tuple[str, ...] = ()\n    weather: str = "fine"\n',
    ),
}


@pytest.fixture(scope="module")
def newer(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment in which the next version runs: a wheel with a newer schema, and newer
    protocols."""
    place = tmp_path_factory.mktemp("newer")
    project = Path(__file__).parents[2]
    shutil.copytree(
        project / "src", place / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(project / name, place / name)
    server = place / "src/sandyard/server"
    for name, (old, new) in NEWER.items():
        text = (server / name).read_text()
        assert text.count(old) == 1, name
        (server / name).write_text(text.replace(old, new))
    versions = server / "links/sql/migrations/versions"
    newest = max(path.name[:4] for path in versions.glob("0*.py"))
    (versions / "0999_colours.py").write_text(MIGRATION.format(newest=newest))
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    for words in (
        ("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", ".", "."),
        ("install", "--no-deps", "--no-index", "--find-links", ".", "--target", "site", "sandyard"),
    ):
        subprocess.run([*pip, *words], check=True, cwd=place, timeout=longer(120))
    return {"PYTHONPATH": str(place / "site")}


def test_two_versions_work_side_by_side_and_back(
    real: Lab, built: Lab, newer: dict[str, str]
) -> None:
    kept, other = real.on("real"), real.on("two")
    real.execute(kept, "mkdir -p /dev/shm; echo kept > /dev/shm/memory")
    failed: list[str] = []
    done: list[str] = []
    stop = threading.Event()

    def use() -> None:
        with httpx.Client(
            base_url=real.client.base_url, headers=real.client.headers, timeout=60
        ) as own:
            while not stop.is_set():
                body = {"template": "base-minimal", "idleTimeout": 0}
                made = own.post("/v1/sandboxes?wait=60", json=body)
                if made.status_code != 201 or made.json()["data"]["status"] != "running":
                    failed.append(f"create: {made.text}")
                    continue
                url = f"/v1/sandboxes/{made.json()['data']['id']}"
                ran = own.post(f"{url}/exec", json={"command": "echo hi"})
                gone = own.delete(url)
                failed.extend(one.text for one in (ran, gone) if one.status_code >= 300)
                done.append(url)

    def restart(name: str, environment: dict[str, str]) -> None:
        is_control = name in ("0", "1")
        host = real.controls[int(name)] if is_control else real.nodes[name]
        before = len(done)
        host.stop()
        host.environment = {one: value for one, value in host.environment.items()
                            if one != "PYTHONPATH"} | environment  # fmt: skip
        if is_control:
            real.start_control(int(name))
        else:
            real.start_node(name)
        real.until_up()
        # A node has its lease before it listens.
        there = lambda: real.try_execute(kept, "cat /dev/shm/memory").strip() == "kept"  # noqa: E731
        wait_until(there, what="the machine is reached, with its memory")
        wait_until(lambda: len(done) > before + 4, what="the work goes on")

    with ThreadPoolExecutor(3) as threads:
        using = [threads.submit(use) for _ in range(3)]
        try:
            control = real.controls[0]
            first = dict(control.environment)
            control.environment = first | newer
            said = control.run(SANDYARD, "upgrade", "--check")
            assert "will be migrated" in said
            assert "servers of the version before can use the database after that" in said
            said = control.run(SANDYARD, "admin", "migrate")
            assert re.search(r"migrated the database from \d{4} to 0999", said)
            control.environment = first
            for name in ("1", "real", "0"):
                restart(name, newer)
            for name in ("0", "real", "1"):
                restart(name, {})
        finally:
            stop.set()
        for one in using:
            one.result()
    assert failed == []
    assert len(done) > 20
    assert real.status(other) == "running"
    assert real.overlapping_periods() == 0
    wait_until(
        lambda: real.machines() == sorted(one["id"] for one in real.ask("GET", "/v1/sandboxes")),
        what="one machine for each sandbox",
    )
