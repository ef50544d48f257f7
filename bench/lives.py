"""Pause and resume by dirty memory, density, a long run of short lives, and long lists.

    .venv/bin/python -m bench.lives [--cycles 500] [--clones 20] [--rows 10000]

Density is the proportional set size (PSS) of each machine's process: a page that n clones share
counts 1/n in each. The long run creates, runs a command and deletes, and looks before and after at
the server's memory and descriptors, at namespaces and at the home's size on disk.
"""

import argparse
import asyncio
import json
import os
import re
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from tests.support.house import open_yard
from tests.support.ports import free_port
from tests.support.server import RealServer, wait_until

from bench.figures import RESULTS, percentile
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.ids import new_sandbox_id
from sandyard.server.core.states import Status

_DIRTY_MIB = (0, 30, 100, 300)


def millis(seconds: list[float]) -> dict[str, float]:
    return {
        name: round(percentile(seconds, share) * 1000, 1)
        for name, share in (("p50", 0.5), ("p99", 0.99))
    }


def pss_mib(pid: int) -> float:
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    found = re.search(r"^Pss: +(\d+) kB", text, re.MULTILINE)
    assert found
    return int(found[1]) / 1024


def pauses(server: RealServer, times: int) -> dict[str, object]:
    found: dict[str, object] = {}
    for dirty in _DIRTY_MIB:
        box = server.create()["id"]
        if dirty:
            server.execute(box, f"head -c {dirty * 2**20} /dev/urandom > /dev/shm/dirty")
        paused, resumed, used = [], [], []
        for _ in range(times):
            started = time.perf_counter()
            server.act(box, "pause")
            paused.append(time.perf_counter() - started)
            started = time.perf_counter()
            server.act(box, "resume")
            resumed.append(time.perf_counter() - started)
            server.execute(box, "true")
            used.append(time.perf_counter() - started)
        server.delete(box)
        found[f"{dirty} MiB dirty"] = {
            "pause ms": millis(paused),
            "resume ms": millis(resumed),
            "resume to exec ms": millis(used),
        }
    return found


def density(count: int) -> dict[str, object]:
    cold = RealServer(free_port(), SANDYARD_NODE__GOLDEN_MACHINES="false")
    try:
        cold.start()
        booted = cold.create()["id"]
        cold.execute(booted, "true")
        one_cold = pss_mib(cold.pid_of(booted))
    finally:
        cold.remove()
    server = RealServer(free_port(), SANDYARD_POOL__FLOOR="1", SANDYARD_POOL__CEILING="4")
    try:
        server.start()
        boxes = []
        for _ in range(count):
            boxes.append(server.create()["id"])
            server.execute(boxes[-1], "true")
        each = [pss_mib(server.pid_of(box)) for box in boxes]
    finally:
        server.remove()
    memory = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available_mib = int(memory["MemAvailable"].split()[0]) / 1024
    return {
        "booted cold MiB": round(one_cold, 1),
        "each clone MiB": round(sum(each) / count, 1),
        "share": round(sum(each) / count / one_cold, 3),
        "clones by memory alone": int((available_mib - 1024) / (sum(each) / count)),
    }


def state_of(server: RealServer) -> dict[str, float]:
    assert server.process is not None
    pid = server.process.pid
    status = Path(f"/proc/{pid}/status").read_text()
    used = subprocess.run(
        ["du", "-sm", server.home], capture_output=True, text=True, check=True
    ).stdout
    return {
        "server RSS MiB": int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024,  # type: ignore[index]
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(re.search(r"Threads:\s+(\d+)", status)[1]),  # type: ignore[index]
        "namespaces": len(server.namespaces()),
        "machine processes": len(server.processes()),
        "home MiB": int(used.split()[0]),
    }


def cycles(count: int) -> dict[str, object]:
    server = RealServer(free_port(), SANDYARD_POOL__FLOOR="2", SANDYARD_POOL__CEILING="2")
    seen: list[dict[str, float]] = []

    def settle() -> None:
        wait_until(lambda: len(server.waiting()) == 2, limit_s=60, what="the pool is full")

    def one(_: int) -> None:
        box = server.create()["id"]
        assert server.execute(box, "echo here")["stdout"] == "here\n"
        server.delete(box)

    try:
        server.start()
        for _ in range(5):
            started = time.perf_counter()
            with ThreadPoolExecutor(2) as threads:
                list(threads.map(one, range(count // 5)))
            took = time.perf_counter() - started
            settle()
            seen.append(state_of(server) | {"lives per second": round(count / 5 / took, 2)})
            print(json.dumps(seen[-1]), flush=True)
    finally:
        server.remove()  # and fails if anything is left
    return {"after each fifth": seen}


async def lists(rows: int) -> dict[str, object]:
    """Time pages of a list of many sandboxes, on fake machines."""
    with tempfile.TemporaryDirectory() as home:
        async with open_yard(Path(home)) as yard:
            made = yard.house.store
            first = (await yard.client.post("/v1/sandboxes", json={})).json()["data"]
            async with made.read() as tx:
                pattern = await tx.sandboxes.find(first["id"])
            assert pattern is not None
            async with made.write(Turn.ALONE) as tx:
                for _ in range(rows):
                    await tx.sandboxes.insert(
                        replace(pattern, id=new_sandbox_id(), name=None, status=Status.FAILED)
                    )
            took: list[float] = []
            cursor, pages = None, 0
            while True:
                started = time.perf_counter()
                query = {"limit": "100"} | ({"cursor": cursor} if cursor else {})
                answer = (await yard.client.get("/v1/sandboxes", params=query)).json()
                took.append(time.perf_counter() - started)
                pages += 1
                cursor = answer["nextCursor"]
                if not cursor or pages > rows // 50:
                    break
            return {"rows": rows, "pages": pages, "page of 100 ms": millis(took)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cycles", type=int, default=500)
    parser.add_argument("--clones", type=int, default=20)
    parser.add_argument("--rows", type=int, default=10_000)
    parser.add_argument("--pauses", type=int, default=10)
    asked = parser.parse_args()
    results: dict[str, object] = {}

    def note(name: str, found: dict[str, object]) -> None:
        results[name] = found
        print(name, json.dumps(found, indent=1), flush=True)

    note("lists", asyncio.run(lists(asked.rows)))
    server = RealServer(free_port(), SANDYARD_POOL__CEILING="2")
    try:
        server.start()
        # What is made ahead would take the processors from what is measured.
        wait_until(lambda: len(server.waiting()) >= 2, limit_s=120, what="the pool is full")
        note("pause and resume, 512 MB", pauses(server, asked.pauses))
    finally:
        server.remove()
    note("density", density(asked.clones))
    note("a long run", cycles(asked.cycles))
    RESULTS.mkdir(exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    (RESULTS / f"lives-{stamp}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
