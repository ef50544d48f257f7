"""SSH with OpenSSH's own programs, in real machines."""

import contextlib
import hashlib
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from tests.support.ports import free_port
from tests.support.server import RealServer, longer, some, wait_until

pytestmark = [pytest.mark.machine, pytest.mark.whole_memory]

PASSWORD = "correct horse"


class Client:
    """OpenSSH's programs, with a key and settings of the test's own."""

    def __init__(self, server: RealServer) -> None:
        self.server = server
        self.folder = Path(tempfile.mkdtemp(prefix="sy-ssh-", dir="/tmp"))
        self.folder.chmod(0o700)
        self.key = self.folder / "id"
        subprocess.run(
            ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.key)], check=True
        )
        self.config = self.folder / "config"
        self.env = {**os.environ, "HOME": str(self.folder)}
        self.env.pop("SSH_AUTH_SOCK", None)
        self.options = {
            "IdentityFile": str(self.key), "IdentitiesOnly": "yes", "LogLevel": "ERROR",
            "UserKnownHostsFile": str(self.folder / "known"), "BatchMode": "yes",
            "StrictHostKeyChecking": "yes", "Port": str(server.ssh_port),
        }  # fmt: skip
        self.configure()

    @property
    def public_key(self) -> str:
        return self.key.with_suffix(".pub").read_text().strip()

    def configure(self, **more: str) -> None:
        """Write the settings; every program of OpenSSH, and what calls them, reads these."""
        lines = [f" {name} {value}\n" for name, value in {**self.options, **more}.items()]
        self.config.write_text("Host *\n" + "".join(lines))

    def box(self, **body: object) -> str:
        """Create a sandbox that takes the key, and know the gateway by what the API says of it."""
        wished: Any = {"sshKeys": [self.public_key], "idleTimeout": 0, **body}
        box = str(self.server.create(**wished)["id"])
        said = self.server.client.get(f"/v1/sandboxes/{box}/ssh").json()["data"]
        (self.folder / "known").write_text(said["knownHosts"] + "\n")
        assert said["port"] == self.server.ssh_port
        return box

    def run(
        self, *words: str, program: str = "ssh", check: bool = True, **options: Any
    ) -> subprocess.CompletedProcess[bytes]:
        """Run one of the programs to its end."""
        return subprocess.run(
            [program, "-F", str(self.config), *words], env=self.env, check=check,
            capture_output=True, timeout=longer(120), **options,
        )  # fmt: skip

    def says(self, box: str, command: str, **options: Any) -> bytes:
        """Return what a command prints."""
        return self.run(f"{box}@127.0.0.1", command, **options).stdout

    @contextlib.contextmanager
    def concurrently(self, *words: str) -> Iterator[subprocess.Popen[bytes]]:
        """Run ssh while the block lasts."""
        process = subprocess.Popen(
            ["ssh", "-F", str(self.config), *words], env=self.env, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        try:
            yield process
        finally:
            process.kill()
            process.communicate(timeout=30)


@pytest.fixture(scope="module")
def ssh(server: RealServer) -> Iterator[Client]:
    made = Client(server)
    yield made
    shutil.rmtree(made.folder)


@pytest.mark.core
def test_commands_shells_and_how_they_end(ssh: Client) -> None:
    box = ssh.box(rootPassword=PASSWORD, env={"MINE": "1"}, name="by-name")
    here = f"{box}@127.0.0.1"
    done = ssh.run(here, "echo out; echo err >&2; exit 7", check=False)
    assert (done.stdout, done.stderr, done.returncode) == (b"out\n", b"err\n", 7)
    assert ssh.run(here, "kill -KILL $$", check=False).returncode == 255
    assert ssh.says("by-name", "hostname") == b"by-name\n"
    # Nothing asked for is a login shell, in the user's home.
    said = ssh.run(here, input=b'pwd; shopt -q login_shell && echo "login $0 $MINE"\n').stdout
    assert said == b"/root\nlogin -bash 1\n"
    # All bytes, both ways, also such as are no text in the command itself.
    data = os.urandom(some(3_000_000))
    assert ssh.says(box, "cat", input=data) == data
    said = subprocess.run(
        [b"ssh", b"-F", str(ssh.config).encode(), here.encode(), b"printf %s 'a\xffb'"],
        env=ssh.env, capture_output=True, check=True,
    ).stdout  # fmt: skip
    assert said == b"a\xffb"
    assert ssh.says(box, f"printf %s {'x' * 100_000} | wc -c") == b"100000\n"
    # Its environment: the client's own, but for languages that are not in the sandbox.
    ssh.configure(SendEnv="SEEN LANG")
    env = {**ssh.env, "SEEN": "yes", "LANG": "de_DE.UTF-8"}
    words = ["ssh", "-F", str(ssh.config), here, "echo $SEEN $LANG $SSH_CONNECTION"]
    said = subprocess.run(words, env=env, capture_output=True, check=True).stdout
    ssh.configure()
    assert said.startswith(b"yes C.UTF-8 127.0.0.1 ")
    # What the guest has of all that is what is wished for.
    shadow = ssh.says(box, "grep ^root: /etc/shadow; cat /root/.ssh/authorized_keys").decode()
    assert "root:$2b$" in shadow
    assert ssh.public_key in shadow


@pytest.mark.core
def test_a_terminal_has_a_size_and_is_hung_up_on(ssh: Client) -> None:
    box = ssh.box()
    here = f"{box}@127.0.0.1"
    said = ssh.run("-tt", here, "tty; echo $SSH_TTY; who; stty size", input=b"").stdout.split()
    assert said[0].startswith(b"/dev/pts/")
    assert said[1] == said[0]
    assert said[2:4] == [b"root", said[0].removeprefix(b"/dev/")]
    assert ssh.says(box, "echo ${SSH_TTY:-none}; who") == b"none\n"
    pty = subprocess.run(
        ["script", "-qec",
         f"stty rows 33 cols 99; ssh -F {ssh.config} -tt {here} 'stty size; exit 4'",
         "/dev/null"], env={**ssh.env, "TERM": "xterm"}, capture_output=True, check=False,
        stdin=subprocess.DEVNULL, timeout=longer(60),
    )  # fmt: skip
    assert b"33 99" in pty.stdout
    assert pty.returncode == 4

    def lives(pattern: str) -> bool:
        found = (
            f"for p in /proc/[0-9]*/cmdline; do tr '\\0' ' ' <$p; echo; done | grep -c '^{pattern}'"
        )
        done = ssh.run(here, found, check=False)
        assert done.returncode in (0, 1), done  # else nothing was looked for
        return int(done.stdout) > 0

    # A client that vanishes: what was on its terminal, or writes to it, ends; what was let go of
    # lives on.
    with ssh.concurrently("-tt", here, "nohup sleep 2222 >/dev/null 2>&1 & sleep 1111"):
        wait_until(lambda: lives("sleep 1111"), what="it runs")
    wait_until(lambda: not lives("sleep 1111"), what="it was hung up on")
    assert lives("sleep 2222")
    with ssh.concurrently(here, "exec yes") as process:
        assert process.stdout is not None
        process.stdout.read(100)
    wait_until(lambda: not lives("yes"), what="it wrote to nobody")


@pytest.mark.core
def test_files_are_copied_whole(ssh: Client) -> None:
    box = ssh.box()
    there = f"{box}@127.0.0.1:/tmp"
    source, back = ssh.folder / "source", ssh.folder / "back"
    source.write_bytes(os.urandom(some(30_000_000)))
    ssh.run("-q", str(source), f"{there}/a file", program="scp")
    said = ssh.says(box, "sha256sum <'/tmp/a file'").decode().split()[0]
    assert said == hashlib.sha256(source.read_bytes()).hexdigest()
    ssh.run("-q", f"{there}/a file", str(back), program="scp")
    assert back.read_bytes() == source.read_bytes()
    batch = ssh.folder / "batch"
    batch.write_text(
        f"cd /root\nput {source} up\nrename up moved\nmkdir d\nls -l\nget moved {back}\n"
    )
    back.unlink()
    ssh.run("-b", str(batch), f"{box}@127.0.0.1", program="sftp")
    assert back.read_bytes() == source.read_bytes()
    back.unlink()
    # A client that vanishes in the middle leaves no server behind.
    with ssh.concurrently("-s", f"{box}@127.0.0.1", "sftp") as process:
        wait_until(lambda: _servers(ssh, box) == 1, what="it has a server")
        assert process.poll() is None
    wait_until(lambda: _servers(ssh, box) == 0, what="no server is left")


@pytest.mark.core
def test_a_deleted_key_ends_connections_and_goes_from_files(ssh: Client) -> None:
    client = ssh.server.client
    body = {"name": "laptop", "publicKey": ssh.public_key}
    key_id = client.post("/v1/ssh-keys", json=body).json()["data"]["id"]
    box, resting = (ssh.box(sshKeys=[key_id]) for _ in range(2))
    line = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIOMqqnkVzrm0SdG6UOoqKLsabgH5C9okWi0dh2l9GKJl own"
    ssh.says(box, f"echo '{line}' >>/root/.ssh/authorized_keys")
    ssh.server.act(resting, "pause")
    control = ssh.folder / "ended"
    with ssh.concurrently(
        "-M", "-S", str(control), f"{box}@127.0.0.1", "echo in; sleep 1000"
    ) as open_:
        assert open_.stdout is not None
        assert open_.stdout.readline() == b"in\n"
        client.delete(f"/v1/ssh-keys/{key_id}").raise_for_status()
        assert ssh.run("-S", str(control), "x", "true", check=False).returncode == 255
        open_.communicate(timeout=longer(60))
    assert open_.returncode == 255

    def file_of(box: str) -> str:
        return str(ssh.server.execute(box, "cat /root/.ssh/authorized_keys")["stdout"])

    wait_until(lambda: file_of(box) == f"{line}\n", what="the key is out of the file")
    ssh.server.act(resting, "resume")
    wait_until(lambda: file_of(resting) == "", what="the key is out of the other's file")


def _servers(ssh: Client, box: str) -> int:
    return int(ssh.says(box, "cat /proc/[0-9]*/comm | grep -c '^sftp-server$'; true"))


class _Hello(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"hello from outside")

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.core
def test_connections_are_forwarded_both_ways(ssh: Client) -> None:
    box = ssh.box()
    here = f"{box}@127.0.0.1"
    ssh.says(
        box, "mkdir /srv; cd /srv; echo hello >f; (exec nohup python3 -m http.server 8123 --bind "
        "127.0.0.1 >/dev/null 2>&1 &) ; until python3 -c 'import socket; "
        'socket.create_connection(("127.0.0.1", 8123))\' 2>/dev/null; do sleep 0.2; done',
    )  # fmt: skip
    local, socks, outside = free_port(), free_port(), free_port()
    control = ssh.folder / "control"
    web = ThreadingHTTPServer(("127.0.0.1", outside), _Hello)
    serving = threading.Thread(target=web.serve_forever)
    serving.start()
    fetch = (
        "python3 -c 'import sys, urllib.request as u; "
        'sys.stdout.write(u.urlopen("http://127.0.0.1:%s/").read().decode())\''
    )
    try:
        words = ("-M", "-S", str(control), "-N", "-L", f"{local}:localhost:8123", "-D", str(socks))
        with ssh.concurrently(*words, "-o", "ExitOnForwardFailure=yes", here):
            wait_until(control.exists, what="the connection is there")
            url = f"http://127.0.0.1:{local}/f"
            assert _curl(url) == b"hello\n"
            assert (
                _curl("http://localhost:8123/f", "-x", f"socks5h://127.0.0.1:{socks}") == b"hello\n"
            )
            # What a sandbox may not reach, nobody reaches through it.
            for closed in ("10.0.0.1:80", "169.254.169.254:80", "localhost:9111", "localhost:1"):
                proxy = ("-x", f"socks5h://127.0.0.1:{socks}", "-m", "4")
                assert _curl(f"http://{closed}/", *proxy) == b""
            given = ssh.run(
                "-S", str(control), "-O", "forward", "-R", f"0:127.0.0.1:{outside}", "x"
            )
            port = int(given.stdout)
            shared = ("-S", str(control), "x")
            assert ssh.run(*shared, fetch % port).stdout == b"hello from outside"
            # A socket, which is the user's alone, and one that was left behind is in nobody's way.
            ssh.says(box, "python3 -c 'import socket as s; s.socket(s.AF_UNIX).bind(\"/tmp/s\")'")
            ssh.run("-S", str(control), "-O", "forward", "-R", f"/tmp/s:127.0.0.1:{outside}", "x")
            assert ssh.run(*shared, "stat -c %a%U /tmp/s").stdout == b"600root\n"
            ask = (
                "python3 -c 'import socket; s = socket.socket(socket.AF_UNIX); "
                's.connect("/tmp/s"); '
                's.send(b"GET / HTTP/1.0\\r\\n\\r\\n"); '
                'print(b"".join(iter(lambda: s.recv(999), b"")).decode())\''
            )
            assert b"hello from outside" in ssh.run(*shared, ask).stdout
            for taken in ("/etc/passwd", "/nowhere/s", f"/tmp/{'x' * 200}"):
                forward = ("-O", "forward", "-R", f"{taken}:127.0.0.1:{outside}", "x")
                assert ssh.run("-S", str(control), *forward, check=False).returncode == 255
            ssh.run("-S", str(control), "-O", "cancel", "-R", f"/tmp/s:127.0.0.1:{outside}", "x")
            wait_until(
                lambda: ssh.run(*shared, "test ! -e /tmp/s", check=False).returncode == 0,
                what="the socket is gone",
            )
            # Many sessions on one connection.
            running = [
                subprocess.Popen(["ssh", "-F", str(ssh.config), *shared, f"echo {one}"],
                                 env=ssh.env, stdout=subprocess.PIPE)
                for one in range(10)
            ]  # fmt: skip
            said = {one.communicate(timeout=longer(60))[0] for one in running}
            assert said == {b"%d\n" % one for one in range(10)}
        # With the connection the port is given back.
        gone = fetch % port
        wait_until(
            lambda: ssh.run(here, gone, check=False).returncode != 0, what="the port is closed"
        )
    finally:
        web.shutdown()
        web.server_close()
        serving.join()


def _curl(url: str, *options: str) -> bytes:
    return subprocess.run(
        ["curl", "-s", "--noproxy", "", "-m", "30", *options, url], capture_output=True, check=False
    ).stdout


@pytest.mark.core
def test_an_agent_is_forwarded_if_asked_for(ssh: Client) -> None:
    box = ssh.box()
    lines = subprocess.run(["ssh-agent", "-s"], capture_output=True, check=True, text=True).stdout
    found = dict(one.split(";")[0].split("=") for one in lines.splitlines() if "=" in one)
    env = {**ssh.env, **found}
    ask = (
        "python3 -c 'import os, socket; s = socket.socket(socket.AF_UNIX); "
        's.connect(os.environ["SSH_AUTH_SOCK"]); s.send(bytes([0, 0, 0, 1, 11])); '
        "print(s.recv(9)[4])'"
    )
    try:
        subprocess.run(["ssh-add", "-q", str(ssh.key)], env=env, check=True)
        words = ["ssh", "-F", str(ssh.config), "-A", f"{box}@127.0.0.1"]
        done = subprocess.run([*words, ask], env=env, capture_output=True, check=True)
        assert done.stdout == b"12\n"  # SSH_AGENT_IDENTITIES_ANSWER
        assert ssh.says(box, "echo ${SSH_AUTH_SOCK:-none}; ls /tmp") == b"none\n"
    finally:
        os.kill(int(found["SSH_AGENT_PID"]), signal.SIGTERM)


@pytest.mark.core
def test_passwords_open_it_too(ssh: Client) -> None:
    box = ssh.box(rootPassword=PASSWORD)
    ask = ssh.folder / "ask"
    ssh.configure(PubkeyAuthentication="no", BatchMode="no", NumberOfPasswordPrompts="1")
    key = ssh.server.client.headers["authorization"].removeprefix("Bearer ")
    try:
        for password, code in ((PASSWORD, 0), (key, 0), ("wrong horse", 255)):
            ask.write_text(f"#!/bin/sh\necho '{password}'\n")
            ask.chmod(0o700)
            env = {**ssh.env, "SSH_ASKPASS": str(ask), "SSH_ASKPASS_REQUIRE": "force"}
            words = ["ssh", "-F", str(ssh.config), f"{box}@127.0.0.1", "true"]
            assert (
                subprocess.run(words, env=env, capture_output=True, check=False).returncode == code
            )
    finally:
        ssh.configure()
        ask.unlink()


@pytest.mark.core
def test_a_sandbox_that_sleeps_is_woken_and_one_that_goes_is_told_of(ssh: Client) -> None:
    box = ssh.box()
    here = f"{box}@127.0.0.1"
    ssh.server.act(box, "pause")
    assert ssh.says(box, "echo up") == b"up\n"
    with ssh.concurrently(here, "echo in; exec sleep 1000") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        ssh.server.act(box, "pause")
        _, said = process.communicate(timeout=longer(30))
        assert process.returncode == 255
        assert said.startswith(b"sandyard: ")
    with ssh.concurrently(here, "echo in; exec sleep 1000") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"in\n"
        os.kill(ssh.server.pid_of(box), signal.SIGKILL)
        _, said = process.communicate(timeout=longer(30))
        assert process.returncode == 255
        assert b"sandyard: " in said


def test_an_idle_connection_keeps_nothing_awake_and_a_busy_one_does(ssh: Client) -> None:
    box = ssh.box(idleTimeout=round(longer(8)))
    # It ends with its client: a loop that does not care whether anybody reads is busy for ever.
    with ssh.concurrently(f"{box}@127.0.0.1", "while sleep 0.5 && date; do :; done") as busy:
        assert busy.stdout is not None
        assert busy.stdout.readline()  # to connect takes as long as it takes
        until = time.monotonic() + longer(12)
        while time.monotonic() < until:
            assert ssh.server.status(box) == "running"
            time.sleep(0.5)
    with ssh.concurrently(f"{box}@127.0.0.1", "exec sleep 1000"):
        is_paused = lambda: ssh.server.status(box) == "paused"  # noqa: E731
        wait_until(is_paused, limit_s=90, what="it is paused")


@pytest.mark.core
def test_the_command_line_logs_in_without_any_key(ssh: Client) -> None:
    box = str(ssh.server.create(sshKeys=[], name="no-key")["id"])
    home = ssh.folder / "home"
    home.mkdir(mode=0o700, exist_ok=True)
    for name in (box, "no-key"):
        done = ssh.server.run("sandbox", "ssh", name, "--", "echo", "in $(hostname)")
        assert done.stdout == "in no-key\n"
    done = ssh.server.run("sandbox", "ssh", "no-key", "--", "exit 5", check=False)
    assert done.returncode == 5
    done = ssh.server.run("sandbox", "ssh", "absent", check=False)
    assert "cannot find the sandbox" in done.stderr
