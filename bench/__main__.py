"""All that is measured, beside what it was last time.

    .venv/bin/python -m bench [--rounds 8] [--template base-ubuntu --command 'node -v'] [--page]
    .venv/bin/python -m bench --against COMMIT [--turns 3] [--only control] [--burners 1]

Prints a table and JSON, keeps the figures in bench/results/, and with `--page` writes
docs/reference/performance.md and its chart. Run it on a host that does nothing else. Under
Firecracker, with a guest kernel that boots there, `bench.guests_firecracker` measures the same.
With `--against`, the figures of another commit stand beside those of this tree (`bench.against`).
"""

import argparse
import asyncio
import json
import os
import platform
from datetime import UTC, datetime
from pathlib import Path

from bench import against, chart, control, fillers, guests
from bench.figures import RESULTS

Figures = dict[str, dict[str, float]]


def machine() -> str:
    """Return what it was measured on, in a line."""
    cpu = next(
        (line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
         if line.startswith("model name")), "a processor without a name",
    )  # fmt: skip
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores ({cpu}), {memory:.0f} GiB, Linux {platform.release()}"


def last() -> Figures:
    """Return the figures of the run before."""
    found = sorted(RESULTS.glob("all-*.json"))
    result: Figures = json.loads(found[-1].read_text())["figures"] if found else {}
    return result


def shown(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in values.items())


def page(figures: Figures, before: Figures, about: str) -> str:
    """Return the table of the figures in Markdown."""
    lines = [
        "# Figures",
        "",
        "Made by `python -m bench --page`; [how fast it is](../explanation/performance.md) tells",
        "what they mean. Times are of one host; ratios to the same steps by hand say more.",
        "",
        f"Measured on {about}.",
        "",
        "| What | Now | The run before |",
        "|---|---|---|",
    ]
    for name, values in figures.items():
        earlier = shown(before[name]) if name in before else ""
        lines.append(f"| {name} | {shown(values)} | {earlier} |")
    return "\n".join(lines) + "\n"


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"needs a number of at least 1, not {text!r}")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(prog="bench")
    guests.arguments(parser)
    parser.add_argument("--page", action="store_true", help="write the page of figures")
    parser.add_argument("--against", metavar="COMMIT", help="compare with this commit instead")
    parser.add_argument("--turns", type=_positive, default=3, help="how often each is measured")
    parser.add_argument("--only", action="append", choices=["control", "guests"])
    parser.add_argument("--burners", type=int, default=0, help="processors to keep busy meanwhile")
    asked = parser.parse_args()
    if asked.against is not None:
        against.run(asked)
        return
    before, about = last(), machine()
    figures: Figures = asyncio.run(control.measured(asked.rounds * 25, [10, 1000, 10_000]))
    figures["one durable row, by hand"] = control.by_hand(200)
    of_guests, driver = guests.measured(asked.rounds, asked.template, asked.command)
    figures |= of_guests
    figures |= fillers.measured(asked.rounds, asked.template, asked.command)
    about += f", machines by {driver}"
    stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    RESULTS.mkdir(exist_ok=True)
    content = json.dumps({"machine": about, "figures": figures}, indent=1)
    (RESULTS / f"all-{stamp}.json").write_text(content)
    if asked.page:
        chart.PAGE.write_text(page(figures, before, about))
        chart.main()
    print(content)
    print(about)
    for name, values in figures.items():
        was = f"   (before: {shown(before[name])})" if name in before else ""
        print(f"{name:44} {shown(values)}{was}")


if __name__ == "__main__":
    main()
