"""What filling the pool costs the creates that come meanwhile.

    .venv/bin/python -m bench.fillers [--rounds 20] [--template base-ubuntu] [--command 'node -v']

A create every two seconds, so that the pool is nearly always being filled, against creates that wait
until it is full and the host is quiet. A member is waiting for each of them.
"""

import argparse
import json
import time

from tests.support.ports import free_port
from tests.support.server import RealServer, wait_until

from bench.figures import percentile

_PERIOD_S = 2.0
_REST_S = 1.5
_SIZE = 6
Figures = dict[str, dict[str, float]]


def measured(rounds: int, template: str, command: str) -> Figures:
    """Return the p50 of each step, at rest and while the pool is filled, and their ratio."""
    pool = {"SANDYARD_POOL__FLOOR": str(_SIZE), "SANDYARD_POOL__CEILING": str(_SIZE)}
    server = RealServer(free_port(), **pool)
    times: dict[str, dict[str, list[float]]] = {"rest": {}, "filling": {}}
    fullness: list[int] = []
    try:
        server.run("template", "build", template, limit_s=1200)
        server.start()
        wanted = _SIZE * (1 if template == "base-minimal" else 2)

        def is_full() -> bool:
            return len(server.waiting()) >= wanted

        for state in times:
            wait_until(is_full, limit_s=600, what="a full pool")
            time.sleep(_REST_S)
            for _ in range(rounds):
                if state == "rest":
                    wait_until(is_full, limit_s=300, what="a full pool")
                    time.sleep(_REST_S)
                began = time.perf_counter()
                fullness.append(len(server.waiting()))
                _one(server, template, command, times[state])
                if state == "filling":
                    time.sleep(max(0.0, _PERIOD_S - (time.perf_counter() - began)))
    finally:
        server.remove()
    print(f"members at each create: {fullness}")
    return {
        f"{step}, {template}": {
            **{state: _ms(times[state][step]) for state in times},
            "ratio": round(_ms(times["filling"][step]) / _ms(times["rest"][step]), 2),
        }
        for step in times["rest"]
    }


def _one(
    server: RealServer, template: str, command: str, times: dict[str, list[float]]
) -> None:
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
