"""Shared by all tests: which tiers can run here, loudly, and the servers that a run starts."""

import asyncio
import inspect
import os
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import hypothesis
import pytest
from xdist.workermanage import WorkerController

from tests.support import history, postgres
from tests.support.firecracker import environment_of, guests_of, needs_test_kernel, said_of_guests
from tests.support.leftovers import open_sockets, open_things
from tests.support.ports import free_port
from tests.support.routes import compile_once
from tests.support.server import QEMU, is_slow, keep_a_golden, paced

_PATIENCE, _BRIEFLY = 3000, 50  # looks, ten milliseconds apart
_BEGAN = time.monotonic()
_said_by_workers: set[str] = set()
_USUAL_LIMIT_S = 1200
"""The time limit of tests with machines."""


compile_once()
# A busy machine is not what these tests are about.
hypothesis.settings.register_profile("here", deadline=None)
hypothesis.settings.load_profile("here")


def pytest_configure(config: pytest.Config) -> None:
    """Take an interrupt back where the shell that started us in its background ignores it; give a
    run without `randomly` its fixed order.

    What we start would ignore an interrupt too, and some tests interrupt what they start.
    """
    worker = getattr(config, "workerinput", None)
    if not config.pluginmanager.has_plugin("randomly"):
        left_out = history.read().left_out if worker is None else worker["left_out"]
        config.pluginmanager.register(history.InOrder(set(left_out)))
        if worker is None:
            config.pluginmanager.register(history.Recorder())
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options for whoever has an hour, and for whoever has no longer than that."""
    parser.addoption(
        "--every",
        action="store_true",
        help="run those with KVM that are not marked as the core, and those marked as long",
    )
    parser.addoption(
        "--within",
        type=float,
        metavar="MINUTES",
        help="run no test that has not begun by then, and name those",
    )


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test for which the time is over; one that may take long must begin earlier."""
    within, limit = item.config.getoption("--within"), item.get_closest_marker("timeout")
    longer_s = max(0, limit.args[0] - _USUAL_LIMIT_S) / 2 if limit is not None else 0
    if item.get_closest_marker("skip") is not None:
        return  # whatever the time is
    if within is not None and time.monotonic() - _BEGAN > within * 60 - longer_s:
        pytest.skip(history.TOO_LATE)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what needs root where there is none, or an hour, and say so."""
    wants_every = config.getoption("--every")
    for item in items:
        is_core = item.get_closest_marker("core")
        is_for_hours = item.get_closest_marker("kvm") and not is_core
        if (is_for_hours or item.get_closest_marker("long")) and not wants_every:
            item.add_marker(pytest.mark.skip(reason="NOT RUN: scripts/test --all runs it"))
        if isinstance(item, pytest.Function) and inspect.iscoroutinefunction(item.function):
            # First, so that it looks when everything else has been taken down.
            item.fixturenames.insert(0, "_leaves_no_task")
        if item.get_closest_marker("machine"):
            item.add_marker(pytest.mark.root)
            item.add_marker(pytest.mark.slow)
            if item.get_closest_marker("timeout") is None:
                # The first of them on a new machine builds the templates.
                item.add_marker(pytest.mark.timeout(_USUAL_LIMIT_S))
        if item.get_closest_marker("root") and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="NOT RUN: needs root"))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Leave what is to be said of guests to the process that sums up."""
    if output := getattr(session.config, "workeroutput", None):
        output["said"] = said_of_guests()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: WorkerController) -> None:
    """Take what a worker leaves; one that was killed leaves nothing."""
    _said_by_workers.update(getattr(node, "workeroutput", {}).get("said", ()))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say loudly what guests ran with, and what was left out."""
    for line in sorted(_said_by_workers.union(said_of_guests())):
        terminalreporter.write_line(line, red="NOT RUN" in line)
    skipped = terminalreporter.stats.get("skipped", [])
    if late := [one.nodeid for one in skipped if history.TOO_LATE in str(one.longrepr)]:
        passed, now = history.read().passed, time.time()
        names = "\n".join(f"{one} ({history.age(passed.get(one), now)})" for one in sorted(late))
        terminalreporter.write_line(f"{len(late)} tests {history.TOO_LATE}:\n{names}", red=True)


@pytest.fixture(
    scope="session",
    params=[
        "qemu",
        pytest.param("firecracker", marks=pytest.mark.kvm),
        pytest.param("qemu-kvm", marks=pytest.mark.kvm),
    ],
)
def hypervisor(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Settings that have machines run under each hypervisor in turn, where one boots at all."""
    if request.param == "qemu":
        yield dict(QEMU)
        return
    if not request.config.getoption("--every") and needs_test_kernel(request.param):
        # A boot takes minutes. Guests are in the exams of the drivers all the same.
        pytest.skip("NOT RUN: with a kernel for tests, scripts/test --all runs it")
    guests = guests_of(request.param)
    if not guests.verdict.is_usable:
        pytest.skip(f"NOT RUN: {request.param} boots no machine here: {guests.verdict.reason}")
    # With a kernel for tests only a guest's programs run at full speed: what they ask of it takes
    # longer still than its start tells.
    with paced(guests.pace if guests.kernel is None else guests.pace * 3):
        environment = environment_of(request.param)
        if is_slow():
            keep_a_golden(environment)
        yield environment


@pytest.fixture(scope="session", autouse=True)
def _postgres(request: pytest.FixtureRequest) -> Iterator[None]:
    wanted = any(item.get_closest_marker("postgres") for item in request.session.items)
    if not wanted:
        yield
        return
    folder = postgres.start_server(free_port())
    yield
    postgres.stop_server(folder)


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder of the test's own whose path is short enough for sockets, wherever tests run."""
    with tempfile.TemporaryDirectory(
        prefix=f"t-{os.getpid()}-", dir="/tmp", ignore_cleanup_errors=True
    ) as path:
        yield Path(path)


def _is_of_machines(request: pytest.FixtureRequest) -> bool:
    """Tell whether a test is of a tier whose tests share servers."""
    return request.node.path.parent.name in ("machine", "system")


@pytest.fixture
async def _leaves_no_task(request: pytest.FixtureRequest) -> AsyncIterator[None]:
    """Fail a test that leaves a task at work, and let what it closed come to its end."""
    tasks, sockets = asyncio.all_tasks(), open_sockets()
    yield
    # The client of a server that tests share keeps the connection that it has opened meanwhile.
    looks_at_sockets = _PATIENCE if not _is_of_machines(request) else _BRIEFLY
    for look in range(_PATIENCE):
        left = {one for one in asyncio.all_tasks() - tasks if not one.done()}
        left.discard(asyncio.current_task())
        if not left and (look >= looks_at_sockets or not open_sockets() - sockets):
            return
        await asyncio.sleep(0.01)
    assert not left, f"tasks are still at work: {left}"


@pytest.fixture(autouse=True)
def _leaves_nothing_behind(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fail a test that leaves a socket, a mount, a namespace or a temporary home.

    What a whole tier shares is looked after by that tier's own fixture.
    """
    if _is_of_machines(request):
        yield
        return
    is_root = request.node.get_closest_marker("root") is not None
    before = open_things(namespaces=is_root)
    left: set[str] = set()
    yield
    for _ in range(_PATIENCE):
        # A thread of a test's server may be about to close the socket of its last request.
        left = open_things(namespaces=is_root) - before
        if not left:
            return
        time.sleep(0.01)
    raise AssertionError(f"left behind: {sorted(left)}")
