"""Measures a Sandyard on this host, beside the same steps by hand, and prints JSON and a table.

    .venv/bin/python -m bench.figures [--quick]

Absolute times drift from machine to machine; the ratios to `raw_qemu.py`, run between ours, count.
"""

import asyncio
import json
import multiprocessing
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

from tests.support.house import open_yard
from tests.support.ports import free_port
from tests.support.server import RealServer

from sandyard.server.drivers.namespaces import in_namespace

RESULTS = Path(__file__).parent / "results"


def percentile(values: list[float], share: float) -> float:
    """Return the nearest-rank percentile."""
    ordered = sorted(values)
    return ordered[max(0, -(-int(share * len(ordered) * 1000) // 1000) - 1)]


def timed(work: Callable[[], object], times: int) -> list[float]:
    took = []
    for _ in range(times):
        started = time.perf_counter()
        work()
        took.append(time.perf_counter() - started)
    return took


def raw(boots: int, execs: int) -> dict[str, list[float]]:
    said = subprocess.run(
        [sys.executable, "-m", "bench.raw_qemu", str(boots), str(execs)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found: dict[str, list[float]] = json.loads(said)
    return found


def straight_at_the_agent(server: RealServer, box: str, times: int) -> list[float]:
    from bench import raw_qemu

    record = server.record_of(box)
    raw_qemu.TOKEN = record["token"]
    netns = f"{server.prefix}-{record['slot']}"
    return in_namespace(netns, lambda: [raw_qemu.exec_true() for _ in range(times)])


def burn() -> None:
    while True:
        pass


def boots_under_load(server: RealServer, count: int) -> list[float]:
    """Boot many, four asked for at a time, with every core busy besides."""
    burners = [multiprocessing.Process(target=burn, daemon=True) for _ in range(2)]
    for one in burners:
        one.start()

    def one_boot(_: int) -> float:
        started = time.perf_counter()
        box = server.create()["id"]
        took = time.perf_counter() - started
        server.delete(box)
        return took

    try:
        with ThreadPoolExecutor(4) as pool:
            return list(pool.map(one_boot, range(count)))
    finally:
        for one in burners:
            one.kill()


async def control_plane(count: int) -> float:
    """Return creates a second on fake machines, asked for sixteen at a time."""
    with tempfile.TemporaryDirectory() as home:
        rich = {"billing": {"sign_up_cents": 10**9}}
        async with open_yard(Path(home), sections=rich) as yard:
            room = asyncio.Semaphore(16)

            async def create() -> None:
                async with room:
                    answer = await yard.client.post("/v1/sandboxes", json={})
                    assert answer.status_code == 201

            started = time.perf_counter()
            await asyncio.gather(*(create() for _ in range(count)))
            return count / (time.perf_counter() - started)


def main() -> None:
    quick = "--quick" in sys.argv
    boots, execs, loaded = (2, 50, 4) if quick else (5, 200, 40)
    figures: dict[str, list[float]] = {}
    cold = {"SANDYARD_NODE__GOLDEN_MACHINES": "false"}
    server = RealServer(free_port(), **cold)
    try:
        server.start()
        raws: dict[str, list[float]] = {"boot": [], "exec": []}
        ours = []
        for _ in range(boots):
            # Turn and turn about, so that a slow moment of the host hits both.
            one = raw(1, execs // boots)
            raws["boot"] += one["boot"]
            raws["exec"] += one["exec"]
            started = time.perf_counter()
            box = str(server.create()["id"])
            ours.append(time.perf_counter() - started)
            server.delete(box)
        figures["cold boot to agent, by hand"] = raws["boot"]
        figures["cold boot to running, HTTP"] = ours
        figures["exec true, by hand"] = raws["exec"]
        box = str(server.create()["id"])
        timed(lambda: server.execute(box, "true"), 20)
        figures["exec true, straight at the agent"] = straight_at_the_agent(server, box, execs)
        figures["exec true, HTTP"] = timed(lambda: server.execute(box, "true"), execs)
        figures["get, HTTP"] = timed(lambda: server.get(box), execs)
        made: list[object] = []
        figures["create, API part alone"] = timed(
            lambda: made.append(server.create(wait=0)["id"]), 10
        )
        for one_made in made:
            server.delete(one_made)
        figures["cold boot under load"] = boots_under_load(server, loaded)
        server.delete(box)
    finally:
        server.remove()
    rate = asyncio.run(control_plane(200 if quick else 1000))
    print(f"{'what':36} {'n':>4} {'p50 ms':>9} {'p99 ms':>9}")
    for name, values in figures.items():
        p50, p99 = percentile(values, 0.5) * 1000, percentile(values, 0.99) * 1000
        print(f"{name:36} {len(values):4} {p50:9.1f} {p99:9.1f}")
    print(f"control plane alone (fake machines): {rate:.0f} creates/s")
    for name, ours_, raw_ in (
        ("cold boot", "cold boot to running, HTTP", "cold boot to agent, by hand"),
        ("exec", "exec true, HTTP", "exec true, by hand"),
    ):
        ratio = percentile(figures[ours_], 0.5) / percentile(figures[raw_], 0.5)
        print(f"{name}: ours is {ratio:.2f} times by hand")
    RESULTS.mkdir(exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    (RESULTS / f"{stamp}.json").write_text(
        json.dumps({"seconds": figures, "createsPerSecond": rate}, indent=1)
    )


if __name__ == "__main__":
    main()
