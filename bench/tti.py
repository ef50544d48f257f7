"""Time to interactive: from asking for a sandbox until its first command has answered.

    .venv/bin/python -m bench.tti [--count 100] [--template base-minimal] [--pool 10]

The method is that of the public leaderboard of hosted sandboxes, through HTTP against a running
server: sequential (create, command, delete, one after another), staggered (one started every
200 ms) and burst (all at once). The lowest and highest 5 % of successes are dropped; percentiles
are nearest rank; failures are counted. Before the command an identity probe runs, in the timed
window, that fails a sandbox which somebody has used before.
"""

import argparse
import json
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime

import httpx
from tests.support.ports import free_port
from tests.support.server import RealServer, wait_until

from bench.figures import RESULTS, percentile

# By the shell alone: what is measured is the sandbox, not how fast it starts a handful of programs.
PROBE = "set -C; : > /tmp/bench-marker && read -r id < /proc/sys/kernel/random/boot_id && echo $id"
COMMANDS = {"base-ubuntu": "node -v", "base-minimal": "true"}
STAGGER_S = 0.2


@dataclass
class Mode:
    """What one mode measured."""

    first_s: list[float] = field(default_factory=list)  # create → first command
    tti_s: list[float] = field(default_factory=list)  # create → probe → command
    create_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    boots: Counter[str] = field(default_factory=Counter)
    done_at: float = 0.0  # when the last first command had answered
    wall_s: float = 0.0

    def summary(self) -> dict[str, object]:
        count = len(self.tti_s)
        shown: dict[str, object] = {"ok": count, "failed": len(self.failures)}
        for name, values in (
            ("create", self.create_s), ("first exec", self.first_s), ("tti", self.tti_s),
        ):  # fmt: skip
            cut = int(len(values) * 0.05)
            kept = sorted(values)[cut : len(values) - cut] or values
            for share in (0.5, 0.95, 0.99):
                shown[f"{name} p{share * 100:g} ms"] = round(percentile(kept, share) * 1000, 1)
        shown["per second"] = round(count / self.wall_s, 1)
        shown["shared boot ids"] = sum(1 for seen in self.boots.values() if seen > 1)
        return shown


class Harness:
    def __init__(self, server: RealServer, template: str) -> None:
        self.server = server
        self.template = template
        self.command = COMMANDS[template]
        # One client a thread of work, its connections kept: what a good client library does.
        self.client = httpx.Client(
            base_url=server.client.base_url, headers=server.client.headers, timeout=120,
            limits=httpx.Limits(max_connections=200, max_keepalive_connections=200),
        )  # fmt: skip

    def one(self, mode: Mode) -> None:
        started = time.perf_counter()
        box = None
        try:
            answer = self.client.post("/v1/sandboxes", json={"template": self.template})
            assert answer.status_code == 201, answer.text
            created = time.perf_counter()
            box = answer.json()["data"]["id"]
            probe = self.execute(box, PROBE)
            probed = mode.done_at = time.perf_counter()
            self.execute(box, self.command)
            done = time.perf_counter()
        except (AssertionError, httpx.HTTPError) as error:
            mode.failures.append(str(error)[:300])
        else:
            mode.create_s.append(created - started)
            mode.first_s.append(probed - started)
            mode.tti_s.append(done - started)
            mode.boots[probe.split()[0]] += 1
        finally:
            if box:
                self.client.delete(f"/v1/sandboxes/{box}")

    def execute(self, box: str, command: str) -> str:
        answer = self.client.post(f"/v1/sandboxes/{box}/exec", json={"command": command})
        assert answer.status_code == 200, answer.text
        data = answer.json()["data"]
        assert data["exitCode"] == 0, data
        return str(data["stdout"])

    def run(self, work: Callable[[Mode], None]) -> Mode:
        self.settle()
        mode = Mode()
        started = time.perf_counter()
        work(mode)
        mode.wall_s = mode.done_at - started
        return mode

    def has_golden(self) -> bool:
        return self.server.metric("sandyard_goldens{") >= 1

    def settle(self) -> None:
        def is_full() -> bool:
            name = f'{{memory_mib="512",template="{self.template}"'
            if self.template != "base-minimal":
                name = f'{{memory_mib="4096",template="{self.template}"'
            return self.server.metric("sandyard_pool_size" + name) >= self.server.metric(
                "sandyard_pool_target" + name
            )

        wait_until(is_full, limit_s=180, what="the pool is full")
        time.sleep(1.0)

    def sequential(self, count: int, pause_s: float) -> Mode:
        def work(mode: Mode) -> None:
            for _ in range(count):
                self.one(mode)
                time.sleep(pause_s)

        return self.run(work)

    def staggered(self, count: int) -> Mode:
        def work(mode: Mode) -> None:
            with ThreadPoolExecutor(count) as threads:
                for _ in range(count):
                    threads.submit(self.one, mode)
                    time.sleep(STAGGER_S)

        return self.run(work)

    def burst(self, count: int) -> Mode:
        def work(mode: Mode) -> None:
            with ThreadPoolExecutor(count) as threads:
                for _ in range(count):
                    threads.submit(self.one, mode)

        return self.run(work)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=100)
    parser.add_argument("--burst", type=int, default=20)
    parser.add_argument("--template", default="base-minimal")
    parser.add_argument("--pool", type=int, default=10)
    asked = parser.parse_args()
    pools = {"SANDYARD_POOL__FLOOR": str(asked.pool), "SANDYARD_POOL__CEILING": str(asked.pool)}
    results: dict[str, object] = {}
    for pool, name in ((pools, "pool"), ({"SANDYARD_POOL__CEILING": "0"}, "no pool")):
        server = RealServer(free_port(), **pool)
        try:
            server.start()
            if asked.template != "base-minimal":
                server.run("template", "build", asked.template)
            harness = Harness(server, asked.template)
            if pool is not pools:  # so that there is a golden machine to restore
                server.delete(server.create(template=asked.template)["id"])
                wait_until(harness.has_golden, limit_s=120, what="a golden machine")
            modes = {"sequential": harness.sequential(asked.count, 0.0)}
            if pool is pools:
                modes["sequential, a second apart"] = harness.sequential(asked.count // 2, 1.0)
                modes["staggered"] = harness.staggered(asked.count // 2)
            modes["burst"] = harness.burst(asked.burst)
            for mode, found in modes.items():
                results[f"{name}: {mode}"] = found.summary()
                print(f"{name}: {mode}", json.dumps(found.summary(), indent=1), flush=True)
                for one in found.failures[:3]:
                    print("  failed:", one)
        finally:
            server.remove()
    RESULTS.mkdir(exist_ok=True)
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    (RESULTS / f"tti-{stamp}.json").write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
