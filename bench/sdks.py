"""E2B's SDKs beside our own and plain HTTP, on one server with machines of one template.

    .venv/bin/python -m bench.sdks [--rounds 8]

Each way creates sandboxes from the pool and runs `true`, runs `true` in one sandbox many times,
and sends 32 MiB there and back. Of the server, it tells what a command costs of CPU time by the E2B
API and by our own.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import median
from typing import Any

import httpx
from tests.support.e2b_sdks import node_with_sdk, python_with
from tests.support.ports import free_port
from tests.support.server import RealServer, wait_until

from sandyard import Sandyard

_COMMANDS = 50
_SIZE = 32 * 2**20
_POOL = 2
_PYTHON = """
import json, sys, time
from e2b import Sandbox
ready, rounds, commands, size = sys.stdin, int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
found = {"create": [], "first": [], "command": [], "write": [], "read": []}
def timed(name, work):
    began = time.perf_counter(); made = work(); found[name].append(time.perf_counter() - began)
    return made
for _ in range(rounds):
    print("next", flush=True); ready.readline()
    began = time.perf_counter()
    box = timed("create", lambda: Sandbox.create("base", timeout=600))
    box.commands.run("true")
    found["first"].append(time.perf_counter() - began)
    box.kill()
print("next", flush=True); ready.readline()
box = Sandbox.create("base", timeout=600)
box.commands.run("true")
print("commands", flush=True); ready.readline()
for _ in range(commands): timed("command", lambda: box.commands.run("true"))
print("commands", flush=True); ready.readline()
data = bytes(size)
timed("write", lambda: box.files.write("/tmp/f", data))
timed("read", lambda: box.files.read("/tmp/f", format="bytes"))
box.kill()
print(json.dumps(found), flush=True)
"""
_JAVASCRIPT = """
import { createInterface } from 'node:readline'
import { Sandbox } from 'e2b'
const [rounds, commands, size] = process.argv.slice(2).map(Number)
const lines = createInterface({ input: process.stdin })[Symbol.asyncIterator]()
const found = { create: [], first: [], command: [], write: [], read: [] }
const told = async (word) => { console.log(word); await lines.next() }
const timed = async (name, work) => {
  const began = performance.now(); const made = await work()
  found[name].push((performance.now() - began) / 1000)
  return made
}
for (let i = 0; i < rounds; i++) {
  await told('next')
  const began = performance.now()
  const box = await timed('create', () => Sandbox.create('base', { timeoutMs: 600_000 }))
  await box.commands.run('true')
  found.first.push((performance.now() - began) / 1000)
  await box.kill()
}
await told('next')
const box = await Sandbox.create('base', { timeoutMs: 600_000 })
await box.commands.run('true')
await told('commands')
for (let i = 0; i < commands; i++) await timed('command', () => box.commands.run('true'))
await told('commands')
await timed('write', () => box.files.write('/tmp/f', new Uint8Array(size).buffer))
await timed('read', () => box.files.read('/tmp/f', { format: 'bytes' }))
await box.kill()
console.log(JSON.stringify(found))
process.exit(0)
"""
Times = dict[str, list[float]]


class Watch:
    """Waits for the pool, and reads what the server takes of the CPU."""

    def __init__(self, server: RealServer) -> None:
        self._server = server
        self._before = 0.0
        self.cpu_s: list[float] = []

    def full(self) -> None:
        """Return once the pool is full and the host has come to rest."""

        def waits() -> bool:
            of_it = [one for one in self._server.waiting() if one["template"] == "e2b-base"]
            return len(of_it) >= _POOL

        wait_until(waits, limit_s=600, what="the pool is full")
        time.sleep(1)

    def lap(self) -> None:
        """Note the CPU time since the last lap."""
        assert self._server.process is not None
        fields = (
            Path(f"/proc/{self._server.process.pid}/stat").read_text().rpartition(")")[2].split()
        )
        now = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        self.cpu_s.append(now - self._before)
        self._before = now

    def heard(self, word: str) -> None:
        """Do what a word of a driver asks for."""
        if word == "next":
            self.full()
        else:
            self.lap()


def driven(command: list[Any], env: Mapping[str, str], rounds: int, watch: Watch) -> Times:
    """Run a driver in another language or environment."""
    numbers = [str(one) for one in (rounds, _COMMANDS, _SIZE)]
    with subprocess.Popen(
        [*command, *numbers],
        env=dict(env),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                found: Times = json.loads(line)
                return found
            watch.heard(line.strip())
            process.stdin.write("\n")
            process.stdin.flush()
    raise AssertionError("the driver has ended without a word")


def ours(server: RealServer, rounds: int, watch: Watch) -> Times:
    """Drive our own SDK."""
    key = server.client.headers["Authorization"].removeprefix("Bearer ")
    with Sandyard(key, f"http://127.0.0.1:{server.port}") as client:
        return timed(
            lambda: client.create("e2b-base"),
            lambda box: box.exec("true"),
            lambda box, data: box.files.write("/tmp/f", data),
            lambda box: box.files.read("/tmp/f"),
            lambda box: box.delete(),
            rounds, watch,
        )  # fmt: skip


def plain(server: RealServer, rounds: int, watch: Watch) -> Times:
    """Send the same requests without an SDK."""
    http = server.client

    def sent(answer: httpx.Response) -> Any:
        assert answer.is_success, answer.text
        return answer

    return timed(
        lambda: server.create(template="e2b-base")["id"],
        lambda box: server.execute(box, "true"),
        lambda box, data: sent(
            http.put(f"/v1/sandboxes/{box}/files", params={"path": "/tmp/f"}, content=data)
        ),
        lambda box: sent(
            http.get(f"/v1/sandboxes/{box}/files", params={"path": "/tmp/f"})
        ).content,
        server.delete,
        rounds, watch,
    )  # fmt: skip


def timed(
    create: Callable[[], Any],
    run: Callable[[Any], object],
    write: Callable[[Any, bytes], object],
    read: Callable[[Any], object],
    delete: Callable[[Any], object],
    rounds: int,
    watch: Watch,
) -> Times:
    """Do what the drivers do."""
    found: Times = {"create": [], "first": [], "command": [], "write": [], "read": []}

    def note(name: str, work: Callable[[], Any]) -> Any:
        began = time.perf_counter()
        made = work()
        found[name].append(time.perf_counter() - began)
        return made

    for _ in range(rounds):
        watch.full()
        began = time.perf_counter()
        box = note("create", create)
        run(box)
        found["first"].append(time.perf_counter() - began)
        delete(box)
    watch.full()
    box = create()
    run(box)
    watch.lap()
    for _ in range(_COMMANDS):
        note("command", lambda: run(box))
    watch.lap()
    data = bytes(_SIZE)
    note("write", lambda: write(box, data))
    note("read", lambda: read(box))
    delete(box)
    return found


def measured(rounds: int) -> dict[str, dict[str, float]]:
    """Return the figures of each way."""
    server = RealServer(
        free_port(), SANDYARD_POOL__FLOOR=str(_POOL), SANDYARD_POOL__CEILING=str(_POOL)
    )
    figures = {}
    try:
        server.run("template", "build", "e2b-base", limit_s=1200)
        server.start()
        made = server.client.post("/v1/api-keys", json={"name": "e2b", "format": "e2b"})
        url = f"http://127.0.0.1:{server.port}"
        env = {
            "PATH": os.environ["PATH"], "HOME": str(server.home), "E2B_API_URL": url,
            "E2B_SANDBOX_URL": url, "E2B_API_KEY": made.json()["data"]["key"],
        }  # fmt: skip
        node, drive = node_with_sdk()
        script = drive.with_name("bench.mjs")
        script.write_text(_JAVASCRIPT)
        ways: dict[str, Callable[[Watch], Times]] = {
            "plain HTTP": lambda watch: plain(server, rounds, watch),
            "our SDK": lambda watch: ours(server, rounds, watch),
            "E2B's in JavaScript": lambda watch: driven([node, script], env, rounds, watch),
        }
        for which in ("oldest", "newest"):
            python = [python_with(which), "-c", _PYTHON]
            ways[f"E2B's in Python, {which}"] = lambda watch, python=python: driven(  # type: ignore[misc]
                python, env, rounds, watch
            )
        for name, drive_it in ways.items():
            watch = Watch(server)
            took = drive_it(watch)
            ms = {one: round(median(values) * 1000, 1) for one, values in took.items()}
            figures[name] = {
                "create ms": ms["create"],
                "create → true ms": ms["first"],
                "true ms": ms["command"],
                "server's CPU a command, ms": round(watch.cpu_s[-1] / _COMMANDS * 1000, 2),
                "write MB/s": round(_SIZE / 1e3 / ms["write"], 1),
                "read MB/s": round(_SIZE / 1e3 / ms["read"], 1),
            }
            sys.stderr.write(f"{name}: {figures[name]}\n")
    finally:
        server.remove()
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=8)
    print(json.dumps(measured(parser.parse_args().rounds), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
