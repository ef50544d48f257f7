"""What network rules cost: a guest's requests with and without them, in one lab.

    .venv/bin/python -m bench.egress [--rounds 300]

The same requests go to the same server: in turn without rules, judged by name, and with TLS ended
to add a header. There is no machine: a namespace sits at the tap of a slot. Needs root.
"""

import argparse
import asyncio
import json
import sys
import tempfile
import time
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path

from tests.support.egress import Lab, lab, policy, world

from sandyard.server.core.egress import NO_RULES, Credentials, Header, Injection
from sandyard.server.links.identities import new_network_authority

_SIZE_MIB = 1
_NAMED = policy("good.test")
MODES = {
    "without": (NO_RULES, None),
    "by name": (_NAMED, None),
    "ended": (
        replace(_NAMED, inject=(Injection("good.test"),), stamp="one"),
        Credentials(
            "one",
            (Header("good.test", "X-Key", "value"),),
            *new_network_authority("bench", datetime.now(UTC)),
        ),
    ),
}
_CLIENT = """
import http.client, json, ssl, sys, time
rounds, name = int(sys.argv[1]), "good.test"
context = ssl._create_unverified_context()
def opened(scheme):
    if scheme == "https":
        return http.client.HTTPSConnection(name, context=context, timeout=20)
    return http.client.HTTPConnection(name, timeout=20)
def timed(work):
    began = time.perf_counter(); work(); return 1000 * (time.perf_counter() - began)
def ask(link, path="/"):
    link.request("GET", path); link.getresponse().read()
found = {}
for scheme in ("http", "https"):
    link = opened(scheme); ask(link)
    found[scheme] = [timed(lambda: ask(link)) for _ in range(rounds)]
    found[scheme + ", large"] = [timed(lambda: ask(link, "/large")) for _ in range(30)]
    link.close()
    def anew():
        one = opened(scheme); ask(one); one.close()
    found[scheme + ", new connection"] = [timed(anew) for _ in range(rounds // 5)]
print(json.dumps(found))
"""


async def measure(guest: Lab, rounds: int) -> dict[str, list[float]]:
    """Return the milliseconds of each kind of request."""
    found: dict[str, list[float]] = json.loads(await guest.python(_CLIENT, str(rounds)))
    return found


def at(values: list[float], share: float) -> float:
    """Return the value that a share of all does not pass."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def run(rounds: int) -> None:
    """Measure, and print the figures."""
    with tempfile.TemporaryDirectory(prefix="sy-egress-") as base:
        Path(base).chmod(0o755)
        outside, home = Path(base, "outside"), Path(base, "home")
        for folder in (outside, home):
            folder.mkdir()
        with world(outside), lab(home, outside) as guest:
            guest.restrict(policy("good.test"))  # the parent starts
            found: dict[str, dict[str, list[float]]] = {name: {} for name in MODES}
            starts, changes = [], []
            for turn in range(4):
                for mode, (rules, held) in MODES.items():
                    began = time.perf_counter()
                    guest.restrict(rules, held)
                    if mode == "by name":
                        starts.append(1000 * (time.perf_counter() - began))
                    for name, values in (await measure(guest, rounds)).items():
                        found[mode].setdefault(name, []).extend(values)
                    if mode != "without":
                        for number in range(10):
                            began = time.perf_counter()
                            changed = replace(rules, deny=(f"198.51.100.{10 * turn + number}/32",))
                            guest.restrict(changed, held)
                            changes.append(1000 * (time.perf_counter() - began))
            show(found)
            many = json.loads(guest.keeper.ask("many", count=50))
            say = sys.stdout.write
            say(f"rules for a sandbox without any: {at(starts, 0.5):.0f} ms\n")
            say(f"rules for 50 at once: {max(many['ms']):.0f} ms\n")
            say(f"a change of rules until it is in force: {at(changes, 0.5):.0f} ms\n")
            mib = sum(many["mib"]) / len(many["mib"])
            say(f"memory of a process of 50 (PSS): {mib:.1f} MiB\n")


def show(found: dict[str, dict[str, list[float]]]) -> None:
    """Print the medians and 99th percentiles of each mode, and its ratio to no rules."""
    say = sys.stdout.write
    for name, values in found["without"].items():
        say(f"{name}\n")
        for mode, each in found.items():
            if mode == "ended" and not name.startswith("https"):
                continue  # plain HTTP to such a host is refused
            middle, late = at(each[name], 0.5), at(each[name], 0.99)
            speed = f"{1000 * _SIZE_MIB / middle:>8.0f} MiB/s" if "large" in name else ""
            ratio = middle / at(values, 0.5)
            say(f"  {mode:<8} p50 {middle:>7.2f} ms  p99 {late:>7.2f} ms  x{ratio:.2f}{speed}\n")


def main() -> None:
    """Read the arguments, and measure."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=300)
    asyncio.run(run(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
