"""Handshakes of one source: so many at once, so many a second, and whoever logs in goes free."""

import math

from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.gateway.ssh import throttle
from sandyard.server.gateway.ssh.gateway import rest_of
from sandyard.server.gateway.ssh.throttle import Throttle


class Time:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def _throttle(time: Time, *, at_once: int = 4, a_second: float = 2.0) -> Throttle:
    return Throttle(at_once=at_once, a_second=a_second, monotonic=time)


def test_a_source_may_so_many_at_once_and_another_all_the_same() -> None:
    time = Time()
    made = _throttle(time)
    assert [made.begin("a") for _ in range(6)] == [True] * 4 + [False] * 2
    assert made.begin("b")
    time.now = 0.5
    assert [made.begin("a") for _ in range(2)] == [True, False]
    time.now = 60.0
    assert [made.begin("a") for _ in range(6)] == [True] * 4 + [False] * 2


def test_whoever_logs_in_may_go_on() -> None:
    made = _throttle(Time())
    for _ in range(100):
        assert made.begin("a")
        made.give_back("a")
    made.give_back("somebody else")


@given(st.lists(st.floats(0, 3), max_size=200))
def test_over_any_time_no_more_begin_than_its_budget(waits: list[float]) -> None:
    time = Time()
    made = _throttle(time)
    begun = 0
    for wait_s in waits:
        time.now += wait_s
        begun += made.begin("a")
    assert begun <= 4 + 2.0 * time.now + 1e-6


def test_sources_are_forgotten() -> None:
    time = Time()
    made = _throttle(time)
    for number in range(throttle._SOURCES_MAX + 500):
        made.begin(str(number))
    assert len(made._used_up_to) <= throttle._SOURCES_MAX + 2
    time.now = 100.0
    for number in range(throttle._SOURCES_MAX):
        made.begin(f"later {number % 3}")
    assert len(made._used_up_to) < 10


@given(st.floats(0, 100))
def test_a_refusal_takes_one_of_few_times(elapsed_s: float) -> None:
    rest_s = rest_of(elapsed_s)
    assert 0 <= rest_s <= max(0.01, elapsed_s)
    doubled = math.log2((elapsed_s + rest_s) / 0.01)
    assert abs(doubled - round(doubled)) < 1e-6
