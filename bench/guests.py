"""Guests over HTTP on a quiet host, beside the same steps by hand.

    .venv/bin/python -m bench.guests [--rounds 8] [--template base-minimal] [--command true]

Each create waits until the pool is full again and the host is quiet: what is measured is what one
person sees. How it goes when many ask at once is what `bench.tti` measures.
"""

import argparse
import json
import subprocess
import sys
import time

from tests.support.ports import free_port
from tests.support.server import RealServer, wait_until

from bench.figures import percentile
from bench.lives import pss_mib

_REST_S = 1.5
_DIRTY = f"head -c {30 * 2**20} /dev/urandom > /dev/shm/dirty"
Figures = dict[str, dict[str, float]]


def by_hand(clones: int) -> dict[str, list[float]]:
    said = subprocess.run(
        [sys.executable, "-m", "bench.raw_clones", str(clones)],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    found: dict[str, list[float]] = json.loads(said)
    return found


def _has_golden(server: RealServer) -> bool:
    return server.metric("sandyard_goldens{") >= 1


def pooled(rounds: int, template: str, command: str, size: int) -> dict[str, list[float]]:
    """Time creates that find a machine waiting, and their first command."""
    pool = {"SANDYARD_POOL__FLOOR": str(size), "SANDYARD_POOL__CEILING": str(size)}
    server = RealServer(free_port(), **pool)
    took: dict[str, list[float]] = {}
    try:
        server.run("template", "build", template, limit_s=1200)
        server.start()
        waiting = size * (1 if template == "base-minimal" else 2)
        for what in ("true", command) if command != "true" else ("true",):
            for _ in range(rounds):
                wait_until(lambda: len(server.waiting()) >= waiting, limit_s=300, what="full")
                time.sleep(_REST_S)
                started = time.perf_counter()
                box = server.create(template=template)["id"]
                took.setdefault("create", []).append(time.perf_counter() - started)
                assert server.execute(box, what)["exitCode"] == 0
                took.setdefault(f"create → {what}", []).append(time.perf_counter() - started)
                server.delete(box)
    finally:
        server.remove()
    return took


def unpooled(rounds: int) -> tuple[dict[str, list[float]], float, str]:
    """Time restores, pauses and resumes; return what a clone takes of memory (MiB, PSS) as well,
    and the driver."""
    server = RealServer(free_port(), SANDYARD_POOL__CEILING="0")
    took: dict[str, list[float]] = {}

    def note(what: str, started: float) -> None:
        took.setdefault(what, []).append(time.perf_counter() - started)

    try:
        server.start()
        server.delete(server.create()["id"])
        wait_until(lambda: _has_golden(server), limit_s=200, what="a golden machine")
        boxes = []
        for _ in range(rounds):
            time.sleep(_REST_S)
            started = time.perf_counter()
            box = server.create()["id"]
            server.execute(box, "true")
            note("restore → first exec", started)
            boxes.append(box)
        driver = str(server.record_of(boxes[0])["driver"])
        share = sum(pss_mib(server.pid_of(box)) for box in boxes) / len(boxes)
        for box in boxes:
            server.execute(box, _DIRTY)
            started = time.perf_counter()
            server.act(box, "pause")
            note("pause, 30 MiB dirty", started)
            started = time.perf_counter()
            server.act(box, "resume")
            server.execute(box, "true")
            note("resume → exec", started)
            server.delete(box)
        return took, share, driver
    finally:
        server.remove()


def cold_mib() -> float:
    """Return what a machine that booted takes of memory (PSS)."""
    server = RealServer(free_port(), SANDYARD_NODE__GOLDEN_MACHINES="false")
    try:
        server.start()
        box = server.create()["id"]
        server.execute(box, "true")
        return pss_mib(server.pid_of(box))
    finally:
        server.remove()


def _ms(seconds: list[float]) -> float:
    return round(percentile(seconds, 0.5) * 1000, 1)


def measured(rounds: int, template: str, command: str) -> tuple[Figures, str]:
    """Return the figures, and the driver whose machines they are of."""
    raw = by_hand(rounds)
    ours, clone, driver = unpooled(rounds)
    cold = cold_mib()
    figures: Figures = {}
    for name, hand in (
        ("restore → first exec", "restore → first exec"),
        ("pause, 30 MiB dirty", "pause by private pages"),
        ("resume → exec", "resume by private pages → exec"),
    ):
        mine, theirs = _ms(ours[name]), _ms(raw[hand])
        figures[name] = {"ms": mine, "by hand ms": theirs, "ratio": round(mine / theirs, 2)}
    figures["memory of a clone"] = {
        "MiB": round(clone, 1), "cold MiB": round(cold, 1), "ratio": round(clone / cold, 2),
    }  # fmt: skip
    for name, values in pooled(rounds, template, command, 4).items():
        figures[f"{name}, from the pool, {template}"] = {
            "ms": _ms(values), "p95 ms": round(percentile(values, 0.95) * 1000, 1),
        }  # fmt: skip
    return figures, driver


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--template", default="base-minimal")
    parser.add_argument("--command", default="true")


def main() -> None:
    parser = argparse.ArgumentParser()
    arguments(parser)
    asked = parser.parse_args()
    print(json.dumps(measured(asked.rounds, asked.template, asked.command), indent=1))


if __name__ == "__main__":
    main()
