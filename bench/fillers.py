"""What filling the pool costs creates, and what a busy host costs filling it.

    .venv/bin/python -m bench.fillers [--rounds 20] [--template base-ubuntu] [--command 'node -v']

First, a create every two seconds, so that the pool is nearly always being filled, against creates
on a quiet host with a full pool. A member waits for each of them. Second, how long a member takes
while two busy loops run on each processor, against a quiet host, and how many fillers failed.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.ports import free_port
from tests.support.server import RealServer, wait_until

from bench.figures import percentile

_PERIOD_S = 2.0
_REST_S = 1.5
_SIZE = 6
_SMALL = 4
_LOOPS = 2
_FILL_S = 1800
Figures = dict[str, dict[str, float]]


def measured(rounds: int, template: str, command: str) -> Figures:
    """Return what filling costs creates, and what load costs filling."""
    return creates(rounds, template, command) | fills(template)


def _shelves(template: str) -> int:
    """Return how many shelves have a floor: base-minimal is always one."""
    return 1 if template == "base-minimal" else 2


@contextmanager
def _server(template: str, size: int) -> Iterator[RealServer]:
    pool = {"SANDYARD_POOL__FLOOR": str(size), "SANDYARD_POOL__CEILING": str(size)}
    server = RealServer(free_port(), **pool)
    try:
        server.run("template", "build", template, limit_s=1200)
        server.start()
        yield server
    finally:
        server.remove()


def creates(rounds: int, template: str, command: str) -> Figures:
    """Return the p50 of each step, at rest and while the pool is filled, and their ratio."""
    times: dict[str, dict[str, list[float]]] = {"rest": {}, "filling": {}}
    with _server(template, _SIZE) as server:

        def is_full() -> bool:
            return len(server.waiting()) >= _SIZE * _shelves(template)

        for state in times:
            wait_until(is_full, limit_s=_FILL_S, what="a full pool")
            time.sleep(_REST_S)
            for _ in range(rounds):
                if state == "rest":
                    wait_until(is_full, limit_s=_FILL_S, what="a full pool")
                    time.sleep(_REST_S)
                began = time.perf_counter()
                _one(server, template, command, times[state])
                if state == "filling":
                    time.sleep(max(0.0, _PERIOD_S - (time.perf_counter() - began)))
        lines = server.client.get("/metrics").text.splitlines()
        missed = sum(
            float(line.rpartition(" ")[2])
            for line in lines
            if line.startswith("sandyard_pool_requests_total{") and 'result="miss"' in line
        )
    return {
        f"{step}, {template}, while the pool fills": {
            **{f"{state} ms": _ms(times[state][step]) for state in times},
            "ratio": round(_ms(times["filling"][step]) / _ms(times["rest"][step]), 2),
            "missed": missed,
        }
        for step in times["rest"]
    }


def _one(server: RealServer, template: str, command: str, times: dict[str, list[float]]) -> None:
    started = time.perf_counter()

    def note(step: str) -> None:
        times.setdefault(step, []).append(time.perf_counter() - started)

    box = server.create(template=template)["id"]
    note("create")
    assert server.execute(box, "true")["exitCode"] == 0
    note("create → true")
    assert server.execute(box, command)["exitCode"] == 0
    note(f"create → true → {command}")
    server.delete(box)


def fills(template: str) -> Figures:
    """Return how long a pool takes to fill, on a quiet host and on a busy one."""
    took = {}
    for state, loops in (("quiet", 0), ("busy", _LOOPS * (os.cpu_count() or 1))):
        with _server(template, _SMALL) as server:
            # The golden machines are made first; no filler has failed then.
            wait_until(lambda: len(server.waiting()) > 0, limit_s=_FILL_S, what="a first member")
            with _load(loops):
                started, already = time.perf_counter(), len(server.waiting())
                wanted = _SMALL * _shelves(template)
                wait_until(
                    lambda: len(server.waiting()) >= wanted,  # noqa: B023
                    limit_s=_FILL_S, what="a full pool",
                )  # fmt: skip
                took[state] = (time.perf_counter() - started) / max(1, wanted - already)
                failed = server.metric("sandyard_pool_failures")
    return {
        f"one member of the pool, {template}": {
            **{f"{state} s": round(seconds, 1) for state, seconds in took.items()},
            "ratio": round(took["busy"] / took["quiet"], 1),
            "failed": failed,
        }
    }


@contextmanager
def _load(loops: int) -> Iterator[None]:
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(loops)]
    try:
        yield
    finally:
        for one in running:
            one.kill()
            one.wait()


def _ms(seconds: list[float]) -> float:
    return round(percentile(seconds, 0.5) * 1000, 1)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--template", default="base-ubuntu")
    parser.add_argument("--command", default="node -v")
    asked = parser.parse_args()
    print(json.dumps(measured(asked.rounds, asked.template, asked.command), indent=1))


if __name__ == "__main__":
    main()
