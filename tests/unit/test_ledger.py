"""Totals are those of what is counted, and the disk is read for few at a time."""

from hypothesis import given
from hypothesis import strategies as st
from tests.support.clock import DrivenClock

from sandyard.server.node.host.ledger import Ledger, Promise, Totals

PROMISES = st.builds(Promise, st.integers(0, 10_000), st.integers(0, 10_000), st.integers(0, 1))


class One:
    def __init__(self, promise: Promise, used_mib: int = 0) -> None:
        self.promise = promise
        self.used = used_mib
        self.read = 0

    @property
    def used_mib(self) -> int:
        self.read += 1
        return self.used


@given(
    st.lists(
        st.tuples(
            st.integers(0, 5),
            st.sampled_from(["enter", "leave", "change", "sum"]),
            PROMISES,
            st.integers(0, 20_000),
        )
    )
)
def test_totals_are_those_of_what_is_counted(
    steps: list[tuple[int, str, Promise, int]],
) -> None:
    ledger = Ledger(DrivenClock())
    every = [One(Promise()) for _ in range(6)]
    here: dict[One, int] = {}
    for number, step, promise, used in steps:
        one = every[number]
        if step == "enter":
            one.used = used
            ledger.enter(one)
            here[one] = used
        elif step == "leave":
            ledger.leave(one)
            here.pop(one, None)
        elif step == "change":
            one.promise = promise
        assert ledger.everyone == set(here)
        assert ledger.totals() == Totals(
            sum(one.promise.memory_mib for one in here),
            sum(max(0, one.promise.disk_mib - used) for one, used in here.items()),
            sum(one.promise.coming for one in here),
        )


def test_no_machine_reserves_more_of_the_disk_than_the_limit() -> None:
    ledger = Ledger(DrivenClock(), disk_most_mib=100)
    small, large = One(Promise(disk_mib=60)), One(Promise(disk_mib=10_000))
    for one in (small, large):
        ledger.enter(one)
    assert ledger.totals().disk_left_mib == 160
    assert [ledger.disk_left_mib(one) for one in (small, large)] == [60, 100]
    large.used = 9_950
    ledger.enter(large)
    assert ledger.disk_left_mib(large) == 50


async def test_the_disk_is_read_again_for_a_few_that_were_not_read_for_long() -> None:
    clock = DrivenClock()
    ledger = Ledger(clock)
    every = [One(Promise(disk_mib=10)) for _ in range(100)]
    for one in every:
        ledger.enter(one)
    ledger.totals()
    assert sum(one.read for one in every) == 100
    for one in every:
        one.used = 4
    assert ledger.totals().disk_left_mib == 1000
    await clock.advance(16)
    ledger.totals()
    assert sum(one.read for one in every) == 116
    for _ in range(10):
        ledger.totals()
    assert ledger.totals().disk_left_mib == 600
    assert sum(one.read for one in every) == 200
