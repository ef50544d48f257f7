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
        self._collected: set[str] = set()
        self._ran: set[str] = set()
        self._passed: set[str] = set()
        self._left_out: set[str] = set()

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort tests: modules of which some were left out come first, and begin with those; those
        that wait for large templates come last."""
        left_out = read().left_out
        modules = {_module(one) for one in left_out}
        groups = {_group(one) for one in items if one.nodeid in left_out}

        def rank(item: pytest.Item) -> tuple[bool, int, bool, bool, str, bool]:
            group, module = _group(item), _module(item.nodeid)
            is_large = item.get_closest_marker("large") is not None
            is_first = item.nodeid in left_out
            return group not in groups, group, module not in modules, is_large, module, not is_first

        items.sort(key=rank)

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Note which tests there are, also of those that are deselected."""
        self._collected.add(item.nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what became of a test. One that is skipped for another reason is not left out."""
        if report.skipped and TOO_LATE in str(report.longrepr):
            self._left_out.add(report.nodeid)
        elif report.when == "call" or report.skipped:
            self._ran.add(report.nodeid)
            if report.passed:
                self._passed.add(report.nodeid)

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        """Leave to the next run what this one had no time for."""
        if not self._ran and not self._left_out:
            return
        gone = set[str]()
        if not any("::" in one for one in session.config.args):  # modules were collected whole
            modules = {_module(one) for one in self._collected}
            gone = {one for one in read().left_out if _module(one) in modules} - self._collected
        try:
            record(self._ran | gone, self._passed, self._left_out)
        except OSError as error:  # such as of a cache that is root's
            print(f"the next run will not know what this one left out: {error}")  # noqa: T201


def _group(item: pytest.Item) -> int:
    """Return the number of the hypervisor: each has a server of its own, for all modules."""
    return item.callspec.indices.get("hypervisor", 0) if hasattr(item, "callspec") else 0


def _module(nodeid: str) -> str:
    return nodeid.partition("::")[0]


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "history.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
