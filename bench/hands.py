"""Processes and files of a guest, through the whole of Sandyard and straight at its agent.

    .venv/bin/python -m bench.hands [--mib 64] [--rounds 20]

The agent is asked from inside the machine's own namespace, with nothing in between: what is left is
ours. Beside it, how long the SDK and the command line take to start.
"""

import argparse
import functools
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from tests.support.ports import free_port
from tests.support.server import QEMU, SANDYARD, RealServer

from bench import raw_qemu
from bench.figures import percentile, timed
from sandyard.client import Sandbox, Sandyard, SandyardError
from sandyard.server.core import ops, wire
from sandyard.server.drivers.namespaces import in_namespace

MIB = 2**20
GUEST = "172.16.0.2"


def ms(seconds: list[float]) -> float:
    return round(percentile(seconds, 0.5) * 1000, 1)


def raw_command(command: str, *, given: int = 0) -> int:
    """Run a command straight at the agent, with so many bytes to read; return what it printed."""
    with socket.create_connection((GUEST, wire.AGENT_PORT), timeout=60) as connection:
        wish = ops.Execute(command, timeout_ms=600_000, stdin=bool(given))
        connection.sendall(wire.encode_request(ops.request_of(wish, raw_qemu.TOKEN)))
        decoder, printed = wire.Decoder(), 0
        while decoder.take_answer() is None:
            decoder.feed(connection.recv(65536))

        def feed() -> None:
            piece = wire.encode_frame(wire.Channel.STDIN, bytes(wire.FRAME_MAX))
            for _ in range(given // wire.FRAME_MAX):
                connection.sendall(piece)
            connection.sendall(wire.encode_frame(wire.Channel.STDIN, b""))

        feeding = threading.Thread(target=feed)
        if given:
            feeding.start()
        while True:
            while (frame := decoder.take_frame()) is None:
                decoder.feed(connection.recv(262_144))
            if frame.channel is wire.Channel.EXIT:
                break
            printed += len(frame.payload)
        if given:
            feeding.join()
        return printed


def rate(mib: int, work: Callable[[], object]) -> float:
    """Return MiB a second, the best of three."""
    return round(mib / min(timed(work, 3)), 1)


def start_up() -> dict[str, float]:
    """Return how long programs take to start, in ms."""
    found = {}
    for name, command in (
        ("python3 -c pass", [sys.executable, "-c", "pass"]),
        ("import sandyard", [sys.executable, "-c", "import sandyard"]),
        ("from sandyard import Sandbox", [sys.executable, "-c", "from sandyard import Sandbox"]),
        ("sandyard --version", [str(SANDYARD), "--version"]),
    ):
        run = functools.partial(subprocess.run, command, check=True, capture_output=True)
        took = timed(run, 8)
        found[name] = ms(took)
    return found


def watch_latency(sbx: Sandbox, rounds: int) -> list[float]:
    """Return the seconds from a change inside to its event here."""
    sbx.exec("mkdir -p /tmp/watched")
    changes = sbx.files.watch("/tmp/watched")
    heard: list[float] = []
    is_heard = threading.Event()

    def hear() -> None:
        with suppress(SandyardError):  # the sandbox is deleted at the end
            for _ in changes:
                heard.append(time.time())
                is_heard.set()

    threading.Thread(target=hear, daemon=True).start()
    while not is_heard.wait(0.2):
        sbx.exec("touch /tmp/watched/first")
    took = []
    for number in range(rounds):
        is_heard.clear()
        # The guest's clock is set from this one's when it is made.
        began = time.time()
        written = threading.Thread(target=sbx.files.write, args=(f"/tmp/watched/{number}", "x"))
        written.start()
        is_heard.wait(10)
        took.append(heard[-1] - began)
        written.join()
    return took


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--mib", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=20)
    asked = parser.parse_args()
    server = RealServer(free_port(), **QEMU)
    figures: dict[str, object] = {}
    try:
        server.start()
        config = (server.home / "xdg/sandyard/config.toml").read_text()
        key = config.split('api_key = "')[1].split('"')[0]
        with Sandyard(key, f"http://127.0.0.1:{server.port}") as yard:
            sbx = yard.create("base-minimal", resources={"disk": "10GB"})
            record = server.record_of(sbx.id)
            raw_qemu.TOKEN = record["token"]
            netns = f"{server.prefix}-{record['slot']}"

            def raw(command: str, given: int = 0) -> int:
                return in_namespace(netns, lambda: raw_command(command, given=given))

            many = range(asked.rounds)
            raw("true")
            figures["exec true, ms"] = {
                "ours": ms(timed(lambda: sbx.exec("true"), len(many))),
                "agent": ms(timed(lambda: raw("true"), len(many))),
            }
            figures["start, ms"] = ms(timed(lambda: sbx.processes.start(["true"]), len(many)))
            figures["run true to its end, ms"] = ms(
                timed(lambda: list(sbx.run(["true"])), len(many))
            )
            figures["run_code, kept, ms"] = ms(timed(lambda: sbx.run_code("1"), len(many)))
            figures["watch, write → event, ms"] = ms(watch_latency(sbx, asked.rounds))
            size, half = asked.mib * MIB, Path("/dev/shm/bench-hands")
            raw(f"head -c {size} /dev/urandom > /tmp/big; cat /tmp/big > /dev/null")
            down = {"raw cat": rate(asked.mib, lambda: raw("cat /tmp/big"))}

            def read_all() -> None:
                assert sum(len(one) for one in sbx.files.read_pieces("/tmp/big")) == size

            def attach_all() -> None:
                said = sum(len(getattr(one, "data", b"")) for one in sbx.run("cat /tmp/big"))
                assert said == size

            down["files"] = rate(asked.mib, read_all)
            down["processes, events"] = rate(asked.mib, attach_all)
            figures["down, MiB/s"] = down
            half.write_bytes(bytes(size))
            up = {"raw cat": rate(asked.mib, lambda: raw("cat > /tmp/up", size))}
            up["files"] = rate(asked.mib, lambda: sbx.files.upload(half, "/tmp/up2"))
            half.unlink()
            figures["up, MiB/s"] = up
            sbx.delete()
    finally:
        server.remove()
    figures["start-up, ms"] = start_up()
    print(json.dumps(figures, indent=2, ensure_ascii=False))


if __name__ == "__main__":
    main()
