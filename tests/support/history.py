"""The order of tests that run one after the other, and their history: which of them a run left out
for lack of time, with which the next run begins, and when each last passed."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.support.images import CACHE

TOO_LATE = "NOT RUN: the time for tests was over; scripts/test without --within runs it"
"""Why a test was left out."""
_FORGET_S = 90 * 86_400


@dataclass
class History:
    """`passed` has the time (seconds since 1970) at which each test last passed; `left_out` those
    that have not run since a run had no time for them."""

    passed: dict[str, float] = field(default_factory=dict)
    left_out: set[str] = field(default_factory=set)


def read(folder: Path = CACHE) -> History:
    """Return the history; an empty one if there is none, or what is there cannot be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        found = json.loads((folder / "history.json").read_text())
        passed = {str(name): float(at) for name, at in found["passed"].items()}
        return History(passed, {str(one) for one in found["left_out"]})
    return History()


def record(ran: Set[str], passed: Set[str], left_out: Set[str], folder: Path = CACHE) -> None:
    """Add which tests ran, which of those passed, and which were left out. Several runs may do so
    at once."""
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        before, now = read(folder), time.time()
        kept = {name: at for name, at in before.passed.items() if at > now - _FORGET_S}
        after = {
            "passed": kept | dict.fromkeys(passed, now),
            "left_out": sorted(before.left_out - ran | left_out),
        }
        part = folder / f".history-{os.getpid()}"
        part.write_text(json.dumps(after, indent=1))
        part.replace(folder / "history.json")


def age(passed_at: float | None, now: float) -> str:
    """Return how long ago a test passed, as a person says it."""
    if passed_at is None:
        return "never passed here"
    minutes = max(0, round((now - passed_at) / 60))
    if minutes < 120:
        return f"passed {minutes} min ago"
    if minutes < 48 * 60:
        return f"passed {minutes // 60} h ago"
    return f"passed {minutes // (24 * 60)} days ago"


class InOrder:
    """A plugin of pytest for runs whose order is not random."""

    def __init__(self) -> None:
        self._ran: set[str] = set()
        self._passed: set[str] = set()
        self._left_out: set[str] = set()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort tests: modules of which some were left out come first, and begin with those; those
        that wait for large templates come last."""
        left_out = read().left_out
        first = {_module(one) for one in left_out}

        def rank(item: pytest.Item) -> tuple[int, bool, bool, str, bool]:
            # One server for all modules, and another one for each hypervisor.
            under = item.callspec.indices.get("hypervisor", 0) if hasattr(item, "callspec") else 0
            module = _module(item.nodeid)
            is_large = item.get_closest_marker("large") is not None
            return under, module not in first, is_large, module, item.nodeid not in left_out

        items.sort(key=rank)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what became of a test."""
        if report.when == "call":
            self._ran.add(report.nodeid)
            if report.passed:
                self._passed.add(report.nodeid)
        elif report.skipped and TOO_LATE in str(report.longrepr):
            self._left_out.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Leave to the next run what this one had no time for."""
        if self._ran or self._left_out:
            record(self._ran, self._passed, self._left_out)


def _module(nodeid: str) -> str:
    return nodeid.partition("::")[0]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "history.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
