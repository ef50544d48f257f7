"""Processors for those that run tests with machines side by side.

What waits in a pool is started only while nobody else wants the processor: beside the machines of
another run it would never come up.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_all = os.sched_getaffinity(0)


def take_lane() -> None:
    """Keep this process, and what it starts, to a processor of its own, if it is one of several
    that are told to (SANDYARD_TEST_LANES)."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and os.environ.get("SANDYARD_TEST_LANES"):
        processors = sorted(_all)
        os.sched_setaffinity(0, {processors[int(worker) % len(processors)]})


@contextmanager
def every_processor() -> Iterator[None]:
    """Have what is started in the block run on all of them: it is too much for one."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, _all)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
