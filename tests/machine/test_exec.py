"""Commands in a real machine, the awkward ones above all."""

import base64
import concurrent.futures
import time

import pytest
from tests.support.server import RealServer, is_slow, longer, some, wait_until

pytestmark = pytest.mark.machine


def test_it_is_a_machine_of_its_own(
    server: RealServer, box: str, hypervisor: dict[str, str]
) -> None:
    hypervisor_name = hypervisor.get("SANDYARD_NODE__DRIVER", "qemu")
    with open("/proc/sys/kernel/osrelease") as file:
        host = file.read().strip()
    guest = server.execute(box, "uname -r; id -u; pwd; hostname")
    release, uid, cwd, hostname = str(guest["stdout"]).split()
    assert release != host
    assert (uid, cwd, hostname) == ("0", "/workspace", box)
    got = server.get(box)
    assert str(got["driver"]).partition("-")[0] == hypervisor_name
    assert got["os"] == "Debian 13"


def test_streams_exit_codes_and_signals_are_told_apart(server: RealServer, box: str) -> None:
    end = server.execute(box, "echo out; echo err >&2; exit 3")
    assert (end["stdout"], end["stderr"], end["exitCode"]) == ("out\n", "err\n", 3)
    end = server.execute(box, "kill -KILL $$")
    assert (end["exitCode"], end["signal"]) == (137, "SIGKILL")


def test_the_environment_is_the_logins_then_the_sandboxs_then_the_requests(
    server: RealServer, box: str
) -> None:
    shown = "echo $HOME $LANG $FROM_CREATE $MINE; echo $PATH"
    lines = str(server.execute(box, shown, env={"MINE": "m", "LANG": "x"})["stdout"]).splitlines()
    assert lines[0] == "/root x yes m"
    assert "/usr/local/bin" in lines[1]
    lines = str(server.execute(box, shown, env={"PATH": "/bin"})["stdout"]).splitlines()
    assert lines[1] == "/bin"


def test_a_line_of_plain_words_does_what_it_does_by_a_shell(server: RealServer, box: str) -> None:
    server.execute(
        box,
        "mkdir -p /tmp/p/bin /tmp/p/link && cd /tmp/p && echo echo none $0 > bin/none &&"
        " printf '#!/no/such\\n' > bin/lost && printf '#!/bin/sh\\nkill -TERM $$\\n' > bin/dies &&"
        " chmod +x bin/* && echo x > bin/closed && ln -s /etc link/etc",
    )
    own: dict[str, object] = {"env": {"PATH": "/tmp/p/bin:/usr/bin:/bin", "LANG": "no_Such"}}
    lines: tuple[tuple[str, dict[str, object]], ...] = (
        ("env", {}), ("env -0", own), ("env", {"env": {"BASH_ENV": "/tmp/p/bin/none"}}),
        ("env", {"cwd": "/tmp/p/link/etc"}), ("readlink /proc/self/exe", {}),
        ("grep -E 'Sig|Cap|Umask|Groups|NoNew|Seccomp' /proc/self/status", {}),
        ("cat /proc/self/limits /proc/self/oom_score_adj", {}), ("readlink /proc/self/fd/0", {}),
        ("cat -A", {"stdin": "a\tb"}), ("true", {}), ("false", {}), ("no-such-program -v", {}),
        ("none a", own), ("lost", own), ("dies", own), ("closed", own), ("bin", own), ("/etc", {}),
        ("./bin/none", {"cwd": "/tmp/p"}), ("bin/no", {"cwd": "/tmp/p"}), ("env", {"cwd": "/none"}),
        ("python3 -c 'import sys; print(sys.argv, end=\"\")' \"a b\" '' c", {}),
        ("id -un", {"user": "nobody"}),
    )  # fmt: skip
    for line, more in lines:
        plain, by_shell = (
            server.client.post(f"/v1/sandboxes/{box}/exec", json={"command": one} | more).json()
            for one in (line, f"{line}\n")
        )
        for answer in (plain, by_shell):
            answer.pop("meta", None)
            answer.get("error", {}).pop("requestId", None)
            for duration in ("executionTime", "durationMs"):
                answer.get("data", {}).pop(duration, None)
            if line.startswith("env") and "data" in answer:  # in no order that anybody goes by
                said = answer["data"]["stdout"]
                answer["data"]["stdout"] = sorted(said.split("\0" if "-0" in line else "\n"))
        assert plain == by_shell, line
    try:
        server.execute(
            box,
            "cp /bin/bash /bin/real && printf '#!/bin/sh\\necho shell\\nexec /bin/real \"$@\"\\n'"
            " > /bin/new && chmod +x /bin/new && mv /bin/new /bin/bash",
        )
        said = [server.execute(box, line)["stdout"] for line in ("true", "true;", "id -u")]
        assert said == ["", "shell\n", "0\n"]
    finally:
        server.execute(box, "if true; then mv /bin/real /bin/bash; fi")


def test_a_changed_profile_is_taken_up(server: RealServer, box: str) -> None:
    server.execute(box, "echo 'export ADDED=1' > /etc/profile.d/added.sh")
    assert server.execute(box, "echo $ADDED")["stdout"] == "1\n"
    server.execute(box, "rm /etc/profile.d/added.sh")
    assert server.execute(box, "echo $ADDED")["stdout"] == "\n"


def test_cwd_and_user_are_respected_or_refused_in_words(server: RealServer, box: str) -> None:
    assert server.execute(box, "pwd", cwd="/usr")["stdout"] == "/usr\n"
    end = server.execute(box, "id -un; echo $HOME; touch /root/x", user="nobody")
    assert str(end["stdout"]).startswith("nobody\n")
    assert end["exitCode"] == 1
    for body, word in (({"cwd": "/nowhere"}, "/nowhere"), ({"user": "ghost"}, "ghost")):
        answer = server.client.post(f"/v1/sandboxes/{box}/exec", json={"command": "id", **body})
        assert answer.status_code == 400
        assert word in answer.json()["error"]["message"]


def test_stdin_is_read_to_its_end(server: RealServer, box: str) -> None:
    text = "line \x00 ü\n" * 50_000
    end = server.execute(box, "wc -c; echo done", stdin=text)
    assert str(end["stdout"]).split() == [str(len(text.encode())), "done"]
    assert server.execute(box, "cat")["stdout"] == ""
    # A command that does not read its input is not held up by it.
    assert server.execute(box, "echo early", stdin="x" * 1_000_000)["stdout"] == "early\n"


def test_nul_survives_and_what_is_not_utf8_is_replaced_or_exact(
    server: RealServer, box: str
) -> None:
    command = r"printf 'a\000b\377'"
    assert server.execute(box, command)["stdout"] == "a\x00b\ufffd"
    end = server.execute(box, command, encoding="base64")
    assert base64.b64decode(str(end["stdout"])) == b"a\x00b\xff"


def test_a_hundred_megabytes_are_cut_and_memory_does_not_grow(server: RealServer, box: str) -> None:
    def resident() -> int:
        assert server.process is not None
        with open(f"/proc/{server.process.pid}/status") as file:
            line = next(line for line in file if line.startswith("VmRSS"))
        return int(line.split()[1]) // 1024

    before = most = resident()
    size = 20_000_000 if is_slow() else 100_000_000
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            server.execute, box, f"head -c {size} /dev/zero", timeout=120_000
        )  # fmt: skip
        while not running.done():
            most = max(most, resident())
            concurrent.futures.wait([running], timeout=0.02)
    end = running.result()
    assert end["truncated"] is True
    assert len(str(end["stdout"])) == 16 * 1024 * 1024
    assert end["exitCode"] == 0
    assert most - before < 100
    assert "MemAvailable" in str(server.execute(box, "cat /proc/meminfo")["stdout"])


def test_a_timeout_ends_everything_however_it_hides(server: RealServer, box: str) -> None:
    command = (
        "trap '' TERM; (trap '' TERM; setsid sh -c 'trap \"\" TERM; sleep 901' &) ; "
        "sleep 902 & sleep 903"
    )
    end = server.execute(box, command, timeout=500)
    assert (end["exitCode"], end["timedOut"]) == (124, True)
    found = server.execute(box, "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'sleep 90[123]'")
    # The grep's own shell carries the pattern, not one of the numbers.
    assert found["stdout"] == "0\n"


def test_a_background_job_lives_on_and_does_not_hold_the_answer(
    server: RealServer, box: str
) -> None:
    started = time.monotonic()
    end = server.execute(box, "sleep 1000 & echo $!", timeout=20_000)
    assert end["exitCode"] == 0
    assert time.monotonic() - started < longer(15)
    job = str(end["stdout"]).strip()
    assert server.execute(box, f"kill -0 {job}")["exitCode"] == 0
    server.execute(box, f"kill {job}")


def test_a_background_job_that_goes_on_writing_lives_on(server: RealServer, box: str) -> None:
    end = server.execute(box, "(while :; do echo x; done) & echo $!")
    (pid,) = (one for one in str(end["stdout"]).splitlines() if one.isdigit())
    assert server.execute(box, f"kill -0 {pid}")["exitCode"] == 0
    assert server.execute(box, f"kill -9 {pid}")["exitCode"] == 0


def test_no_cgroup_is_left_when_commands_have_ended(server: RealServer, box: str) -> None:
    for _ in range(3):
        server.execute(box, "true")
    # Those of background jobs, such as other tests may leave, are not empty.
    empty = "cd /sys/fs/cgroup/sandyard && grep -l 'populated 0' */cgroup.events"

    def left() -> object:
        return server.execute(box, empty)["stdout"]

    wait_until(lambda: left() == "", what=left)


def test_commands_run_side_by_side(server: RealServer, box: str) -> None:
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        ends = list(pool.map(lambda n: server.execute(box, f"sleep 0.2; echo {n}"), range(24)))
    assert [str(end["stdout"]).strip() for end in ends] == [str(n) for n in range(24)]


def test_the_agent_survives_what_users_do_to_python(server: RealServer) -> None:
    box = server.create()["id"]
    server.execute(box, "rm -rf /usr/bin/python3* /usr/lib/python3* /usr/lib/sandyard")
    assert server.execute(box, "python3 -V")["exitCode"] == 127
    # PID 1 starts the agent again from the base, where all of it is still there.
    agent = "grep -l sandyard/agent /proc/[0-9]*/cmdline | cut -d/ -f3 | head -1"
    before = str(server.execute(box, agent)["stdout"]).strip()
    server.client.post(f"/v1/sandboxes/{box}/exec", json={"command": f"kill -9 {before}"})
    wait_until(
        lambda: server.client.post(
            f"/v1/sandboxes/{box}/exec", json={"command": "true"}
        ).status_code == 200,
        what="the agent is back",
    )  # fmt: skip
    assert str(server.execute(box, agent)["stdout"]).strip() != before
    assert server.execute(box, "echo $((6 * 7))")["stdout"] == "42\n"


def test_the_token_is_out_of_reach(server: RealServer, box: str) -> None:
    command = "cat /proc/cmdline; cat /run/sandyard/token; cat /run/sandyard/state"
    found = server.execute(box, command, user="nobody")
    assert "console=" in str(found["stdout"])
    assert server.record_of(box)["token"] not in str(found["stdout"])
    assert str(found["stderr"]).lower().count("denied") == 2
    # Of ours there is nothing on the disk, which snapshots take with them.
    here = server.execute(box, "ls /run/sandyard/disk")
    assert set(str(here["stdout"]).split()) <= {"upper", "work", "direct", "lost+found"}, here
    assert "upper" in str(here["stdout"])


def test_another_agent_cannot_be_spoken_to_without_the_token(server: RealServer, box: str) -> None:
    head = '{"v":1,"token":"x","op":"hello","args":{}}'
    script = f"""
import socket
with socket.create_connection(("127.0.0.1", 9111)) as agent:
    agent.sendall(b'{head}\\n')
    print(agent.recv(999))
"""
    assert "unauthorized" in str(server.execute(box, "python3 -", stdin=script)["stdout"])


def test_stats_are_plausible(server: RealServer, box: str) -> None:
    stats = server.client.get(f"/v1/sandboxes/{box}/stats").json()["data"]["stats"]
    assert 400 * 2**20 < stats["memoryTotalBytes"] < 600 * 2**20
    assert 0 < stats["memoryUsedBytes"] < stats["memoryTotalBytes"]
    assert 4 * 2**30 < stats["diskTotalBytes"] < 6 * 2**30
    assert stats["uptime"] > 1


def test_a_full_guest_disk_hurts_only_who_writes(server: RealServer) -> None:
    box = server.create(resources={"disk": "1GB"})["id"]
    # To write it all would take a minute where guests are emulated, an hour where they are slow.
    left = f"$(($(df -B1 --output=avail / | tail -1) - {some(250_000_000)}))"
    assert server.execute(box, f"fallocate -l {left} /most")["exitCode"] == 0
    end = server.execute(box, "head -c 1200000000 /dev/zero > /big", timeout=120_000)
    assert end["exitCode"] != 0
    assert "No space left" in str(end["stderr"])
    assert server.execute(box, "rm /big && echo fine > /x && cat /x")["stdout"] == "fine\n"


def test_a_machine_killed_during_an_exec_ends_it_at_once(server: RealServer) -> None:
    box = server.create()["id"]
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            server.client.post, f"/v1/sandboxes/{box}/exec",
            json={"command": "touch /started; sleep 60", "timeout": 60_000},
        )  # fmt: skip
        wait_until(lambda: server.execute(box, "ls /started")["exitCode"] == 0)
        import os

        os.kill(server.pid_of(box), 9)
        answer = running.result(timeout=longer(10))
    assert answer.status_code == 409
    assert answer.json()["error"]["details"]["status"] == "error"
    wait_until(lambda: server.get(box)["status"] == "error", limit_s=20)
    reason = server.get(box)["statusReason"]
    assert isinstance(reason, dict)
    assert reason["code"] == "machine_died"


BUSYBOX = "/run/sandyard/tools/usr/bin/busybox"


@pytest.mark.parametrize("how", ["poweroff", "halt"])
def test_a_guest_that_shuts_down_is_told_as_such(server: RealServer, how: str) -> None:
    box = server.create()["id"]
    server.client.post(
        f"/v1/sandboxes/{box}/exec",
        json={"command": f"{BUSYBOX} {how} -f", "timeout": round(longer(2000))},
    )
    wait_until(lambda: server.get(box)["status"] == "error", limit_s=30)
    reason = server.get(box)["statusReason"]
    assert isinstance(reason, dict)
    assert reason["code"] == "powered_off"


def test_a_guest_that_only_says_that_it_has_halted_lives(server: RealServer) -> None:
    box = server.create()["id"]
    server.execute(box, "echo 'reboot: System halted' > /dev/console")
    wait_until(lambda: "System halted" in server.client.get(f"/v1/sandboxes/{box}/logs").text)
    until = time.monotonic() + 20
    while time.monotonic() < until:  # left in peace, it does not run for seconds on end
        assert server.get(box)["status"] == "running"
        time.sleep(2)
    assert server.execute(box, "echo here")["stdout"] == "here\n"


def test_the_first_password_and_keys_reach_the_guest(server: RealServer) -> None:
    key = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIIAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA me"
    box = server.create(name="My Box", rootPassword="correct horse", sshKeys=[key])["id"]
    assert server.execute(box, "cat /root/.ssh/authorized_keys")["stdout"] == f"{key}\n"
    shadow = str(server.execute(box, "head -1 /etc/shadow")["stdout"])
    assert shadow.startswith("root:$2b$")
    assert server.execute(box, "hostname; cat /etc/hostname")["stdout"] == "my-box\nmy-box\n"


def test_two_gigabytes_the_round_size_that_breaks_boots(server: RealServer) -> None:
    processors = 1 if is_slow() else 2  # a kernel for tests may know of no second one
    box = server.create(resources={"memory": "2GB", "vcpus": processors})["id"]
    end = server.execute(box, "grep MemTotal /proc/meminfo; nproc 2>/dev/null || grep -c ^proc "
                              "/proc/cpuinfo")  # fmt: skip
    total = int(str(end["stdout"]).split()[1])
    assert 1_900_000 < total < 2_200_000
    assert str(end["stdout"]).split()[-1] == str(processors)


def test_no_two_machines_share_what_must_be_unique(server: RealServer, box: str) -> None:
    other = server.create()["id"]
    for command in (
        "cat /etc/machine-id",
        "cat /proc/sys/kernel/random/boot_id",
        "head -c 32 /dev/urandom | base64",
    ):
        assert server.execute(box, command)["stdout"] != server.execute(other, command)["stdout"]
    before = time.time()
    told = float(str(server.execute(box, "date +%s.%N")["stdout"]))
    assert before - 2 < told < time.time() + 2


def test_bytes_that_are_no_text_go_in_and_come_out_as_they_are(
    server: RealServer, box: str
) -> None:
    data = bytes(range(256)) * 4096
    end = server.execute(
        box, "cat; cat /dev/null >&2", stdin=base64.b64encode(data).decode(),
        stdinEncoding="base64", encoding="base64",
    )  # fmt: skip
    assert base64.b64decode(str(end["stdout"])) == data
    told = server.execute(box, "cat", stdin=base64.b64encode(b"a\xffb\0").decode(),
                          stdinEncoding="base64")  # fmt: skip
    assert told["stdout"] == "a\ufffdb\0"


@pytest.mark.whole_memory
@pytest.mark.parametrize("size", [100_000, 131_071, 131_072, 200_000, 2**21])
@pytest.mark.parametrize("user", ["root", "nobody"])
def test_a_command_of_any_length_means_the_same(
    server: RealServer, box: str, size: int, user: str
) -> None:
    """A client that writes files by commands sends them so."""
    head, tail = (
        "set -- a 'b c'; f=$(mktemp); printf %s '",
        "' >$f; wc -c <$f; cat; echo $0 $#; exit 5",
    )
    line = head + "x" * (size - len(head) - len(tail)) + tail
    end = server.execute(box, line, stdin="from stdin\n", user=user, timeout=60_000)
    told = str(end["stdout"]).split("\n")
    assert int(told[0]) == size - len(head) - len(tail)
    assert told[1:3] == ["from stdin", "/bin/bash 2"]
    assert end["exitCode"] == 5
    # Nothing of how it got there is left open in what it starts.
    size = min(size, 2**21 - 100)
    assert (
        server.execute(box, "true" + " " * size + "; ls /proc/self/fd", user=user)["stdout"]
        == server.execute(box, "ls /proc/self/fd", user=user)["stdout"]
    )
