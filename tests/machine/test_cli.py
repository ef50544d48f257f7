"""The command line against a real server."""

import json
import subprocess

import pytest
from tests.support.server import SANDYARD, RealServer, is_slow, longer

pytestmark = pytest.mark.machine


def test_a_sandboxs_life_on_the_command_line(server: RealServer) -> None:
    # Where guests are slow, one that is ready: it would not have booted before the answer is due.
    memory = "512MB" if is_slow() else "256MB"
    limit = ("--timeout", str(longer(30)))
    made = server.run(
        "sandbox", "create", "--template", "base-minimal", "--name", "cli", "--tag", "t",
        "--env", "A=from cli", "--memory", memory, "--json",
    ).stdout  # fmt: skip
    sandbox = json.loads(made)
    assert (sandbox["name"], sandbox["status"]) == ("cli", "running")
    assert sandbox["resources"]["memory"] == memory
    line = "echo $A; echo err >&2; exit 7"
    done = server.run("sandbox", "exec", *limit, "cli", "--", line, check=False)
    assert (done.stdout, done.stderr, done.returncode) == ("from cli\n", "err\n", 7)
    done = server.run("sandbox", "exec", *limit, "cli", "--", "python3", "-c", "print('$A', 6 * 7)")
    assert done.stdout == "$A 42\n"
    got = json.loads(server.run("sandbox", "get", "cli", "--json").stdout)
    assert got["id"] == sandbox["id"]
    assert sandbox["id"] in server.run("sandbox", "list", "--tag", "t", "--json").stdout
    data = bytes(range(256)) * 1000
    done_raw = subprocess.run(
        [str(SANDYARD), "sandbox", "exec", *limit, "--stdin", "cli", "--", "cat"], input=data,
        env=server.environment, capture_output=True, check=True, timeout=longer(60),
    )  # fmt: skip
    assert done_raw.stdout == data
    zeros = "head -c 17000000 /dev/zero"
    cut = server.run("sandbox", "exec", *limit, "cli", "--", zeros, check=False)
    assert (cut.returncode, len(cut.stdout)) == (74, 2**24)
    assert "the output was cut" in cut.stderr
    assert "sandyard agent: ready" in server.run("sandbox", "logs", "cli").stdout
    restart = server.run("sandbox", "restart", "cli", check=not is_slow())
    if restart.returncode:  # it has waited as long as it does, and the restart goes on
        assert "ask again" in restart.stderr
        server.wait_running("cli")
    else:
        assert "restarted cli" in restart.stdout
    both = server.run("sandbox", "delete", "nothing", "cli", check=False)
    assert (both.returncode, both.stdout) == (1, "deleted cli\n")
    server.run("sandbox", "create", "--template", "base-minimal", "--name", "cli")
    assert "deleted cli" in server.run("sandbox", "delete", "cli").stdout
    gone = server.run("sandbox", "get", "cli", check=False)
    assert gone.returncode == 1
    assert "not_found" in gone.stderr


def test_templates_are_listed(server: RealServer) -> None:
    said = server.run("template", "list").stdout
    assert "base-minimal" in said
    assert "ready" in said
    assert server.run("template", "build", "nonsense", check=False).returncode == 1


def test_a_server_that_is_not_there_is_told_in_a_sentence(server: RealServer) -> None:
    server.environment["SANDYARD_URL"] = "http://127.0.0.1:1"
    server.environment["SANDYARD_API_KEY"] = "rt_live_x"
    try:
        said = server.run("sandbox", "list", check=False)
    finally:
        del server.environment["SANDYARD_URL"], server.environment["SANDYARD_API_KEY"]
    assert said.returncode == 1
    assert "scripts/up" in said.stderr
    assert "Traceback" not in said.stderr
