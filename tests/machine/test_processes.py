"""Processes that belong to the agent, in real machines."""

import base64
import contextlib
import hashlib
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.support.events import Heard, bytes_of, events_of
from tests.support.server import RealServer, longer, some, wait_until
from websockets.sync.client import connect

pytestmark = pytest.mark.machine


def start(server: RealServer, box: str, **body: object) -> dict[str, Any]:
    answer = server.client.post(f"/v1/sandboxes/{box}/processes", json=body)
    assert answer.status_code == 201, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


def get(server: RealServer, box: str, which: object) -> dict[str, Any]:
    answer = server.client.get(f"/v1/sandboxes/{box}/processes/{which}")
    assert answer.status_code == 200, answer.text
    data: dict[str, Any] = answer.json()["data"]
    return data


def act(server: RealServer, box: str, which: object, action: str, **body: object) -> Any:
    answer = server.client.post(f"/v1/sandboxes/{box}/processes/{which}/{action}", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()["data"]


def follow(
    server: RealServer,
    box: str,
    which: object,
    offset: int = 0,
    until: Callable[[bytes], bool] = lambda said: False,
) -> Heard:
    """Return the events up to the last one, or until enough was said."""
    heard: Heard = []
    query: dict[str, str | int] = {"offset": offset, "encoding": "base64"}
    path = f"/v1/sandboxes/{box}/processes/{which}/output"
    with server.client.stream("GET", path, params=query) as answer:
        assert answer.status_code == 200, answer.read()
        for event in events_of(answer.iter_lines()):
            heard.append(event)
            if until(bytes_of(heard)):
                break
    return heard


def test_it_starts_where_as_whom_and_with_what_it_is_told(server: RealServer, box: str) -> None:
    body: dict[str, object] = {"cwd": "/usr", "env": {"A": "b c"}}
    made = start(server, box, argv=["sh", "-c", 'pwd; id -un; echo "$A" "$0"', "x"], **body)
    assert made["status"] == "running"
    heard = follow(server, box, made["pid"])
    assert bytes_of(heard) == b"/usr\nroot\nb c x\n"
    assert heard[-1][0] == "exit"
    assert heard[-1][2]["exitCode"] == 0
    made = start(server, box, command="id -un; echo err >&2; exit 3", user="nobody", tag="who")
    heard = follow(server, box, "who")
    assert {one[2]["stream"] for one in heard[:-1]} == {"stdout", "stderr"}
    assert sorted(bytes_of(heard).split()) == [b"err", b"nobody"]
    found = get(server, box, made["pid"])
    assert (found["status"], found["exitCode"], found["outputBytes"]) == ("exited", 3, 11)
    refused: list[tuple[dict[str, object], str]] = [
        ({"argv": ["no-such-program"]}, "no-such-program"), ({"argv": ["/etc/passwd"]}, "passwd"),
        ({"command": "id", "cwd": "/nowhere"}, "/nowhere"), ({"argv": ["id"], "user": "x"}, "x"),
    ]  # fmt: skip
    for body, word in refused:
        answer = server.client.post(f"/v1/sandboxes/{box}/processes", json=body)
        assert answer.status_code == 400, answer.text
        assert word in answer.json()["error"]["message"]


def test_on_a_terminal_it_is_as_at_a_desk(server: RealServer, box: str) -> None:
    made = start(server, box, argv=["bash", "--norc", "-i"], pty={"cols": 91, "rows": 33})
    pid = made["pid"]

    def says(line: str, word: bytes) -> None:
        begin = get(server, box, pid)["outputBytes"]
        act(server, box, pid, "stdin", data=line)
        follow(server, box, pid, offset=begin, until=lambda said: word in said)

    says("PS1='> '; tty; stty size\n", b"33 91")
    says("echo $TERM; test -t 0 && test -t 2 && echo al''l\n", b"all")
    act(server, box, pid, "resize", cols=100, rows=40)
    says("stty size\n", b"40 100")
    # Ctrl-C ends what runs and not the shell.
    act(server, box, pid, "stdin", data="sh -c \"echo be''gun; exec sleep 1000\"\n")
    follow(server, box, pid, until=lambda said: b"begun" in said)
    says("\x03", b"^C")
    says("echo stil''l\n", b"still")
    act(server, box, pid, "stdin", data="exit 7\n")
    heard = follow(server, box, pid)
    assert heard[-1][2]["exitCode"] == 7
    assert {one[2]["stream"] for one in heard[:-1]} == {"terminal"}
    # A command of any length, there as well.
    line = "test -t 1 && echo yes; exit 3 #" + "x" * 200_000
    made = start(server, box, command=line, pty={})
    heard = follow(server, box, made["pid"])
    assert (bytes_of(heard).strip(), heard[-1][2]["exitCode"]) == (b"yes", 3)
    # One that ignores the hang-up is ended by force.
    made = start(server, box, command="trap '' HUP TERM INT; echo on; sleep 1000", pty={})
    follow(server, box, made["pid"], until=lambda said: b"on" in said)
    act(server, box, made["pid"], "signal", signal="KILL", everything=True)
    assert follow(server, box, made["pid"])[-1][2]["signal"] == "SIGKILL"


def test_its_input_is_exact_however_large_and_however_slowly_it_reads(
    server: RealServer, box: str
) -> None:
    data = os.urandom(some(5_000_000))
    made = start(server, box, command="sleep 1; sha256sum", stdin=True)
    at = 0
    while at < len(data):
        piece = base64.b64encode(data[at : at + 2**19]).decode()
        at += act(server, box, made["pid"], "stdin", data=piece, encoding="base64")["written"]
    act(server, box, made["pid"], "stdin", close=True)
    said = bytes_of(follow(server, box, made["pid"])).split()[0]
    assert said.decode() == hashlib.sha256(data).hexdigest()


def test_a_signal_reaches_the_leader_or_all_of_it(server: RealServer, box: str) -> None:
    line = "trap 'echo usr' USR1; (sleep 777 & echo up); while :; do sleep 0.1; done"
    made = start(server, box, command=line)
    follow(server, box, made["pid"], until=lambda said: b"up" in said)
    act(server, box, made["pid"], "signal", signal="SIGUSR1")
    follow(server, box, made["pid"], until=lambda said: b"usr" in said)
    act(server, box, made["pid"], "signal", signal="SIGKILL", everything=True)
    assert follow(server, box, made["pid"])[-1][2]["signal"] == "SIGKILL"
    left = server.execute(box, "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'sleep 77[7]'")
    assert left["stdout"] == "0\n"
    made = start(server, box, command="sleep 1000", timeout=500)
    end = follow(server, box, made["pid"])[-1][2]
    assert (end["exitCode"], end["timedOut"]) == (124, True)


def test_many_short_ones_leave_nothing(server: RealServer, box: str) -> None:
    with ThreadPoolExecutor(8) as threads:
        made = list(threads.map(lambda n: start(server, box, argv=["echo", str(n)]), range(300)))
    last = made[-1]["pid"]
    wait_until(lambda: get(server, box, last)["status"] == "exited")
    listed = server.client.get(f"/v1/sandboxes/{box}/processes").json()["data"]
    for one in listed[-3:]:
        wait_until(lambda pid=one["pid"]: get(server, box, pid)["status"] == "exited")  # type: ignore[misc]
    zombies = "cat /proc/[0-9]*/stat 2>/dev/null | awk '$3 == \"Z\"' | wc -l"
    assert server.execute(box, zombies)["stdout"] == "0\n"
    assert 200 <= len(listed) <= 300  # the ends of 256 are kept
    assert follow(server, box, last)[0][2]["data"]
    groups = "ls -d /sys/fs/cgroup/sandyard/kept-*/ 2>/dev/null | wc -l"
    wait_until(lambda: int(str(server.execute(box, groups)["stdout"])) <= 3)


def test_a_pause_is_told_and_what_runs_goes_on_from_its_byte(server: RealServer) -> None:
    box = str(server.create()["id"])
    line = "exec 9<> <(:); for n in $(seq 1 400); do echo line $n; read -rt 0.02 -u 9; done; true"
    made = start(server, box, command=line)
    heard: Heard = []

    def listen() -> None:
        heard.extend(follow(server, box, made["pid"]))

    thread = threading.Thread(target=listen)
    thread.start()
    wait_until(lambda: int(get(server, box, made["pid"])["outputBytes"]) > 50)
    server.act(box, "pause")
    thread.join(30)
    assert heard[-1][0] == "error"
    assert heard[-1][2]["details"] == {"status": "paused"}
    server.act(box, "resume")
    rest = follow(server, box, made["pid"], offset=len(bytes_of(heard)))
    assert rest[-1][0] == "exit"
    said = (bytes_of(heard) + bytes_of(rest)).decode().splitlines()
    assert said == [f"line {number}" for number in range(1, 401)]


def test_an_agent_that_is_killed_ends_them_and_the_next_starts(server: RealServer) -> None:
    box = str(server.create()["id"])
    made = start(server, box, command="echo on; sleep 1000")
    follow(server, box, made["pid"], until=lambda said: b"on" in said)
    heard: Heard = []

    def listen() -> None:
        with contextlib.suppress(AssertionError):
            heard.extend(follow(server, box, made["pid"]))

    thread = threading.Thread(target=listen)
    thread.start()
    agent = "grep -l sandyard/agent /proc/[0-9]*/cmdline | cut -d/ -f3 | head -1"
    pid = str(server.execute(box, agent)["stdout"]).strip()
    server.client.post(f"/v1/sandboxes/{box}/exec", json={"command": f"kill -9 {pid}"})
    thread.join(60)
    assert heard[-1][0] == "error"
    assert heard[-1][2]["code"] == "unavailable"

    def starts() -> bool:
        body = {"argv": ["true"]}
        answer = server.client.post(f"/v1/sandboxes/{box}/processes", json=body)
        return answer.status_code == 201

    wait_until(starts, what="the agent is back")
    gone = server.client.get(f"/v1/sandboxes/{box}/processes/{made['pid']}")
    assert gone.status_code == 404
    left = "cat /proc/[0-9]*/cmdline | tr '\\0' ' ' | grep -c 'sleep 100[0]'"
    wait_until(lambda: server.execute(box, left)["stdout"] == "0\n", what="they have ended")


def test_a_signal_passes_input_that_is_not_read(server: RealServer, box: str) -> None:
    made = start(server, box, command="sleep 1000", stdin=True)
    url = f"ws://127.0.0.1:{server.port}/v1/sandboxes/{box}/processes/{made['pid']}/attach"
    headers = {"Authorization": server.client.headers["authorization"]}
    with connect(url, additional_headers=headers, proxy=None, ping_interval=None) as socket:
        for _ in range(3):
            socket.send(bytes(512 * 1024))
        socket.send('{"type": "signal", "signal": "KILL"}')
        until = time.monotonic() + longer(30)
        said = ""
        while '"exit"' not in said:
            said = str(socket.recv(timeout=until - time.monotonic()))
        assert '"signal":"SIGKILL"' in said
