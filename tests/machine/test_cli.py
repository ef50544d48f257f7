"""The command line against a real server."""

import json
import subprocess
from pathlib import Path

import pytest
from tests.support.server import SANDYARD, RealServer, is_slow, longer

from sandyard.client import ApiError, Exited, Printed, Sandyard

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


def test_files_and_folders_are_copied_both_ways(
    server: RealServer, box: str, tmp_path: Path
) -> None:
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/ü.bin").write_bytes(bytes(range(256)) * 999)
    (tmp_path / "deep/run").write_text("#!/bin/sh\necho ran\n")
    (tmp_path / "deep/run").chmod(0o755)
    server.run("cp", tmp_path / "deep", f"{box}:/tmp/copied")
    assert server.execute(box, "/tmp/copied/run")["stdout"] == "ran\n"
    server.run("cp", tmp_path / "deep", f"{box}:/tmp/copied")  # into it, as it is there now
    assert server.execute(box, "ls /tmp/copied/deep/er")["stdout"] == "ü.bin\n"
    server.run("cp", f"{box}:/tmp/copied", tmp_path / "back")
    for at in ("er/ü.bin", "deep/er/ü.bin"):
        assert (tmp_path / "back" / at).read_bytes() == bytes(range(256)) * 999
    assert (tmp_path / "back/run").stat().st_mode & 0o111
    server.run("cp", f"{box}:/tmp/copied/run", f"{tmp_path}/")
    assert (tmp_path / "run").read_text() == "#!/bin/sh\necho ran\n"
    # What a hostile sandbox packs stays where it was asked for.
    hostile = "mkdir -p /tmp/h && ln -sf /etc /tmp/h/out && mkfifo /tmp/h/pipe"
    server.execute(box, hostile)
    refused = server.run("cp", f"{box}:/tmp/h", tmp_path / "h", check=False)
    assert refused.returncode == 1
    assert "Traceback" not in refused.stderr
    assert not (tmp_path / "h/out").exists()
    for source, target, word in (
        ("a", "b", "SANDBOX:PATH"), (f"{box}:/a", f"{box}:/b", "SANDBOX:PATH"),
        (f"{tmp_path}/no", f"{box}:/x", "no"), (f"{box}:/no/such", tmp_path, "no/such"),
        ("/etc/hostname", "nobody:/x", "nobody"),
    ):  # fmt: skip
        said = server.run("cp", source, target, check=False)
        assert said.returncode != 0
        assert word in said.stderr
        assert "Traceback" not in said.stderr
    assert [one.name for one in tmp_path.iterdir() if "part" in one.name] == []


def test_one_command_in_a_sandbox_of_its_own(server: RealServer, tmp_path: Path) -> None:
    script = tmp_path / "count up.py"
    script.write_text(
        "import sys, os\n"
        "for n in range(int(sys.argv[1])): print(n, flush=True)\n"
        "print(os.getcwd(), file=sys.stderr)\nsys.exit(7)\n"
    )
    before = server.machines()
    base = ("run", "--template", "base-minimal")
    done = server.run(*base, script, "3", check=False)
    assert (done.returncode, done.stdout) == (7, "0\n1\n2\n"), done.stderr
    assert done.stderr == "/workspace\n"
    done = server.run(*base, "echo one; echo $((6 * 7))")
    assert done.stdout == "one\n42\n"
    done = server.run(*base, "--", "printf", "%s|", "a b", "-c")
    assert done.stdout == "a b|-c|"
    assert server.machines() == before


def test_a_process_is_followed_over_a_broken_connection(server: RealServer, box: str) -> None:
    config = (server.home / "xdg/sandyard/config.toml").read_text()
    key = config.split('api_key = "')[1].split('"')[0]
    with Sandyard(key, f"http://127.0.0.1:{server.port}") as client:
        made = client.processes(box).start(
            "for n in $(seq 1 60); do echo line $n; sleep 0.1; done; cat; exit 4", stdin=True
        )
        said = b""
        for event in made.events():
            if isinstance(event, Printed):
                said += event.data
                if b"line 5\n" in said and b"line 6\n" not in said:
                    server.kill()
                    server.start()
                if said.endswith(b"line 60\n"):
                    made.write("the end")
                    made.close_stdin()
            elif isinstance(event, Exited):
                assert event.exit_code == 4
        assert said.decode() == "".join(f"line {n}\n" for n in range(1, 61)) + "the end"
        files = client.files(box)
        files.write("notes/today", "hällo")
        assert files.read_text("/workspace/notes/today") == "hällo"
        assert [one.path for one in files.list("notes")] == ["/workspace/notes/today"]
        files.move("notes/today", "notes/then")
        files.remove("notes", recursive=True)
        with pytest.raises(ApiError) as caught:
            files.read("notes/then")
        assert caught.value.details["reason"] == "absent"


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
