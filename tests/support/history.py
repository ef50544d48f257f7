"""The order of tests with machines, and their history: which of them a run left out for lack of
time, with which the next run begins, and when each last passed."""

import contextlib
import fcntl
import json
import os
import time
from collections import Counter
from collections.abc import Iterator, Set
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from xdist.remote import Producer
from xdist.scheduler.loadscope import LoadScopeScheduling
from xdist.workermanage import WorkerController

from tests.support.images import CACHE

TOO_LATE = "NOT RUN: the time for tests was over; scripts/test without --within runs it"
"""Why a test was left out."""
_FORGET_S = 90 * 86_400
_ONE_SERVER = "tests/machine/"


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
    """A plugin of pytest for runs whose order is not random, in one process or several.

    Several processes share the tests by units, whose tests run one after the other in one of them.
    """

    def __init__(self, left_out: Set[str]) -> None:
        self._left_out = left_out

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node: WorkerController) -> None:
        """Tell a worker what was left out: all of them must have the same order."""
        node.workerinput["left_out"] = sorted(self._left_out)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_make_scheduler(
        self, config: pytest.Config, log: Producer
    ) -> LoadScopeScheduling:
        """Give the units to workers in the tests' order, the next to whoever is done."""
        return _ByUnit(config, log)

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort tests: units of which some were left out come first, and begin with those; then the
        long ones, so that none is left to the end."""
        first = {one.nodeid for one in items if one.nodeid in self._left_out}
        modules, units = {_module(one) for one in first}, {_unit(one) for one in first}
        large = {_unit(one.nodeid) for one in items if one.get_closest_marker("large")}
        sizes = Counter(_unit(one.nodeid) for one in items)

        def rank(item: pytest.Item) -> tuple[object, ...]:
            unit, module = _unit(item.nodeid), _module(item.nodeid)
            of_unit = (unit not in units, unit != _ONE_SERVER, unit not in large, -sizes[unit])
            is_large = item.get_closest_marker("large") is not None
            of_module = (_hypervisor(item), module not in modules, is_large, module)
            return *of_unit, unit, *of_module, item.nodeid not in first

        items.sort(key=rank)


class Recorder:
    """A plugin of pytest that adds a run whose order is not random to the history."""

    def __init__(self) -> None:
        self._ran: set[str] = set()
        self._passed: set[str] = set()
        self._left_out: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what became of a test. One that is skipped for another reason is not left out."""
        if report.skipped and TOO_LATE in str(report.longrepr):
            self._left_out.add(report.nodeid)
        elif report.when == "call" or report.skipped:
            self._ran.add(report.nodeid)
            if report.passed:
                self._passed.add(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Leave to the next run what this one had no time for."""
        if not self._ran and not self._left_out:
            return
        try:
            record(self._ran, self._passed, self._left_out)
        except OSError as error:  # such as of a cache that is root's
            print(f"the next run will not know what this one left out: {error}")  # noqa: T201


class _ByUnit(LoadScopeScheduling):
    def __init__(self, config: pytest.Config, log: Producer) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # the tests are in order

    def _split_scope(self, nodeid: str) -> str:
        return _unit(nodeid)


def _hypervisor(item: pytest.Item) -> int:
    """Return the number of the hypervisor: each has a server of its own."""
    return item.callspec.indices.get("hypervisor", 0) if hasattr(item, "callspec") else 0


def _module(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def _unit(nodeid: str) -> str:
    """Return what runs in one process: a module, or the modules that have one server."""
    module = _module(nodeid)
    return _ONE_SERVER if module.startswith(_ONE_SERVER) else module


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / "history.lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
