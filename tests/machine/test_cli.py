"""The command line against a real server."""

import fcntl
import json
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from pathlib import Path

import pytest
from tests.support.server import SANDYARD, RealServer, is_slow, longer, some, wait_until

from sandyard.client import ApiError, Exited, Printed, Sandyard

pytestmark = pytest.mark.machine


def patience() -> tuple[str, str]:
    return ("--timeout", str(longer(30)))


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
    late = server.run("sandbox", "exec", "cli", "--timeout", "9", "--", "true", check=False)
    assert (late.returncode, "stand before the sandbox" in late.stderr) == (2, True)
    done = server.run("sandbox", "exec", *limit, "cli", "ls", "-t", "/", check=False)
    assert (done.returncode, "workspace" in done.stdout) == (0, True)
    zeros = "head -c 17000000 /dev/zero"
    much = server.run("sandbox", "exec", *limit, "cli", "--", zeros, check=False)
    assert (much.returncode, len(much.stdout)) == (0, 17_000_000)  # as it comes, without an end
    enough = subprocess.run(
        ["bash", "-c", '"$0" sandbox exec --timeout 999 cli -- yes | head -n 1', str(SANDYARD)],
        env=server.environment, capture_output=True, text=True, check=False, timeout=longer(60),
    )  # fmt: skip
    assert enough.stdout == "y\n"
    wait_until(lambda: "yes " not in server.running("cli"))
    restart = server.run("sandbox", "restart", "cli", check=not is_slow())
    if restart.returncode:  # it has waited as long as it does, and the restart goes on
        assert "ask again" in restart.stderr
        server.wait_running("cli")
    else:
        assert "restarted cli" in restart.stdout
    # It has booted by itself now, whatever it was a clone of before.
    assert "sandyard agent: ready" in server.run("sandbox", "logs", "cli").stdout
    both = server.run("sandbox", "delete", "nothing", "cli", check=False)
    assert (both.returncode, both.stdout) == (1, "deleted cli\n")
    server.run("sandbox", "create", "--template", "base-minimal", "--name", "cli")
    assert "deleted cli" in server.run("sandbox", "destroy", "cli").stdout  # as it was called
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
        said, is_broken, code = b"", False, None
        for event in made.events():
            if isinstance(event, Printed):
                said += event.data
                if b"line 5\n" in said and not is_broken:
                    is_broken = True
                    assert b"line 60\n" not in said
                    server.kill()
                    server.start()
                if said.endswith(b"line 60\n"):
                    made.write("the end")
                    made.close_stdin()
            elif isinstance(event, Exited):
                code = event.exit_code
        assert (is_broken, code) == (True, 4)
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


class Terminal:
    """A command on a terminal, and somebody at its keys."""

    def __init__(self, server: RealServer, *words: str) -> None:
        self._side, other = pty.openpty()
        fcntl.ioctl(other, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
        self.process = subprocess.Popen(
            [str(SANDYARD), *words], stdin=other, stdout=other, stderr=other,
            env=server.environment, start_new_session=True,
        )  # fmt: skip
        os.close(other)
        self.said = ""

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._side)
        self.process.kill()
        self.process.wait()

    def type(self, text: str) -> None:
        os.write(self._side, text.encode())

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self._side, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        os.kill(self.process.pid, signal.SIGWINCH)

    def until(self, words: str) -> str:
        """Return what was said up to some words, and take it away."""
        until = time.monotonic() + longer(60)
        while words not in self.said:
            assert time.monotonic() < until, self.said
            ready, _, _ = select.select([self._side], [], [], 1)
            try:
                data = os.read(self._side, 65536) if ready else b""
            except OSError:  # the command has ended
                data = b""
                assert words in self.said, self.said
            self.said += data.decode(errors="replace")
        before, _, self.said = self.said.partition(words)
        return before + words


def test_a_command_in_the_background_is_listed_and_its_output_followed(
    server: RealServer, box: str
) -> None:
    line = "echo one; read -r _ < /tmp/go; echo two; echo err >&2; exit 3"
    server.run("sandbox", "exec", *patience(), box, "--", "mkfifo /tmp/go")
    pid = server.run("sandbox", "exec", "-d", box, "--", line).stdout.strip()
    shown = json.loads(server.run("sandbox", "ps", box, "--json").stdout)
    assert [(one["pid"], one["status"]) for one in shown if one["command"] == line] == [
        (int(pid), "running")
    ]
    wait_until(
        lambda: server.run("sandbox", "logs", box, pid).stdout == "one\n", limit_s=longer(30)
    )
    with subprocess.Popen(
        [str(SANDYARD), "sandbox", "logs", "-f", box, pid], env=server.environment,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as following:  # fmt: skip
        server.run("sandbox", "exec", *patience(), box, "--", "echo > /tmp/go")
        assert following.communicate(timeout=longer(60)) == ("one\ntwo\n", "err\n")
    assert f"{pid}\texited\t3\t" in server.run("sandbox", "ps", box).stdout
    refused = server.run("sandbox", "exec", "-d", "-i", box, "--", "true", check=False)
    assert (refused.returncode, "exclude" in refused.stderr) == (2, True)


def test_results_are_json(server: RealServer, box: str) -> None:
    line = "echo a; echo b >&2; exit 5"
    done = server.run("sandbox", "exec", *patience(), "--json", box, "--", line, check=False)
    result = json.loads(done.stdout)
    assert (result["exitCode"], result["stdout"], result["stderr"]) == (5, "a\n", "b\n")
    assert (result["timedOut"], done.returncode, done.stderr) == (False, 5, "")
    gone = server.run("sandbox", "delete", "nobody", "--json", check=False)
    assert (gone.returncode, json.loads(gone.stdout)[0]["error"]["code"]) == (1, "not_found")
    absent = server.run("sandbox", "get", "nobody", "--json", check=False)
    assert json.loads(absent.stderr)["error"]["code"] == "not_found"
    levels = {
        one["level"] for one in json.loads(server.run("doctor", "--json", check=False).stdout)
    }
    assert "ok" in levels


def test_the_console_is_followed(server: RealServer, box: str) -> None:
    with subprocess.Popen(
        [str(SANDYARD), "sandbox", "logs", "-f", box], env=server.environment,
        stdout=subprocess.PIPE, bufsize=0,
    ) as following:  # fmt: skip
        try:
            assert following.stdout is not None
            output, seen = following.stdout.fileno(), b""
            line = "echo said on the console > /dev/console"
            server.run("sandbox", "exec", *patience(), box, "--", line)
            while b"said on the console" not in seen:
                assert select.select([output], [], [], longer(30))[0], seen
                seen += os.read(output, 65536)
            following.send_signal(signal.SIGINT)
            assert following.wait(longer(20)) == 0
        finally:
            following.kill()


def test_a_shell_on_this_terminal(server: RealServer, box: str) -> None:
    with Terminal(server, "sandbox", "exec", "-it", box) as shell:
        shell.type("stty -echo; PS1='rea''dy> '\n")
        shell.until("ready> ")
        shell.type("stty size; tty; echo $TERM\n")
        assert "24 80" in shell.until("24 80")
        shell.until("/dev/pts/")
        shell.resize(132, 50)
        shell.type("while [ \"$(stty size)\" != '50 132' ]; do sleep 0.1; done; echo gro''wn\n")
        shell.until("grown")
        # A shell may miss a signal that comes just before it starts a program.
        # So may Python just before it begins to sleep, which is why it does not sleep for long.
        shell.type("python3 -c 'import time; print(\"wait\" \"ing\"); "
                   "exec(\"while True: time.sleep(0.2)\")'\n")  # fmt: skip
        shell.until("waiting\r\n")
        shell.type("\x03")  # Ctrl-C is the program's, not this command's
        shell.until("KeyboardInterrupt")
        shell.until("ready> ")
        shell.type("echo st''ill there\n")
        shell.until("still there")
        shell.type("printf '\\001\\377' | od -An -tx1; exit 7\n")
        shell.until("01 ff")
        assert shell.process.wait(longer(30)) == 7
    # Who closes the window leaves nothing behind.
    with Terminal(server, "sandbox", "exec", "-it", box, "--", "sh", "-c",
                  "trap '' HUP; echo st''arted; sleep 1000") as shell:  # fmt: skip
        shell.until("started")
        shell.process.terminate()
        assert shell.process.wait(longer(30)) != 0
    wait_until(lambda: "sleep 1000 " not in server.running(box))


def test_input_and_output_of_a_command_as_they_come(server: RealServer, box: str) -> None:
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [str(SANDYARD), "sandbox", "exec", "-i", box, "while read l; do echo got $l; done; exit 3"],
        stdin=pipe, stdout=pipe, stderr=pipe, env=server.environment,
    ) as running:  # fmt: skip
        assert running.stdin is not None
        assert running.stdout is not None
        for word in (b"one", b"two"):
            running.stdin.write(word + b"\n")
            running.stdin.flush()
            assert running.stdout.readline() == b"got " + word + b"\n"
        running.stdin.close()
        assert running.wait(longer(30)) == 3
    data = os.urandom(some(3_000_000))
    done = subprocess.run(
        [str(SANDYARD), "sandbox", "exec", "-i", box, "cat; echo end >&2"], input=data,
        env=server.environment, capture_output=True, check=True, timeout=longer(60),
    )  # fmt: skip
    assert (done.stdout, done.stderr) == (data, b"end\n")
    # Ctrl-C is passed on, and its second time ends this command and the other.
    with subprocess.Popen(
        [str(SANDYARD), "sandbox", "exec", "-i", box,
         "trap 'echo int' INT; echo up; while true; do sleep 0.1; done"],
        stdin=pipe, stdout=pipe, stderr=pipe, env=server.environment,
    ) as running:  # fmt: skip
        assert running.stdout is not None
        assert running.stdout.readline() == b"up\n"
        running.send_signal(signal.SIGINT)
        assert running.stdout.readline() == b"int\n"
        running.send_signal(signal.SIGINT)
        assert running.wait(longer(30)) == 130
    wait_until(lambda: not any("trap 'echo" in one for one in server.running(box)))
    # Who has seen enough ends it on both sides, without a word.
    line = f"{SANDYARD} sandbox exec -i {box} yes | head -n 2; echo ${{PIPESTATUS[0]}}"
    done_early = subprocess.run(
        ["bash", "-c", line], env=server.environment, capture_output=True, text=True, check=True,
        stdin=subprocess.DEVNULL, timeout=longer(60),
    )  # fmt: skip
    assert (done_early.stdout, done_early.stderr) == ("y\ny\n0\n", "")
    wait_until(lambda: "yes " not in server.running(box))
    for words, said in (
        (("-it", box), "needs a terminal"), ((box,), "say which command"),
        (("-i", "nobody", "cat"), "nobody"), (("-i", "--user", "nobody-there", box, "cat"), "user"),
    ):  # fmt: skip
        failed = server.run("sandbox", "exec", *words, check=False)
        assert failed.returncode in (1, 2)
        assert said in failed.stderr
        assert "Traceback" not in failed.stderr


def test_keys_and_figures_on_the_command_line(server: RealServer, box: str, tmp_path: Path) -> None:
    config = tmp_path / "config"
    mine = {**server.environment, "XDG_CONFIG_HOME": str(config)}

    def run(*words: str, given: str = "", ok: bool = True) -> str:
        done = subprocess.run(
            [str(SANDYARD), *words], env=mine, input=given, capture_output=True, text=True,
            check=False, timeout=longer(60),
        )  # fmt: skip
        assert (done.returncode == 0) is ok, done.stdout + done.stderr
        assert "Traceback" not in done.stderr
        return done.stdout + ("" if ok else done.stderr)

    made = json.loads(server.run("auth", "keys", "create", "of a test", "--json").stdout)
    url = f"http://127.0.0.1:{server.port}"
    assert "invalid_token" in run("login", "--url", url, given="rt_live_nonsense\n", ok=False)
    assert not (config / "sandyard/config.toml").exists()
    assert "you are" in run("login", "--url", f"{url}/", given=made["key"] + "\n")
    assert box in run("sandbox", "list")
    assert url in run("auth", "whoami")
    rotated = json.loads(run("auth", "keys", "rotate", made["id"], "--json"))
    assert "invalid_token" in run("sandbox", "list", ok=False)
    run("login", "--key", rotated["key"])
    assert "cost" in run("usage")
    assert json.loads(run("usage", "--period", "7d", "--json"))["period"] == "7d"
    assert "is none of" in run("usage", "--period", "never", ok=False)
    assert box in run("top", "--once")
    key = tmp_path / "id.pub"
    key.write_text(
        "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA me\n"
    )
    added = json.loads(run("ssh-key", "add", "laptop", "--file", str(key), "--json"))
    assert added["id"] in run("ssh-key", "list")
    assert "deleted laptop" in run("ssh-key", "delete", "laptop")
    key.write_text("-----BEGIN OPENSSH PRIVATE KEY-----\n")
    assert "private key" in run("ssh-key", "add", "x", "--file", str(key), ok=False)
    assert "of a test" in run("auth", "keys", "list")
    assert "revoked" in run("auth", "keys", "revoke", rotated["id"])
    run("logout")
    assert "no server is configured" in run("sandbox", "list", ok=False)


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
