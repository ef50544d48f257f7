"""Sums that are kept say what sums that are made would."""

from hypothesis import given
from hypothesis import strategies as st
from tests.support.clock import DrivenClock

from sandyard.server.node.host.ledger import Ledger, Promise, Totals, nobody_counts

PROMISES = st.builds(
    Promise,
    st.integers(0, 10_000),
    st.integers(0, 10_000),
    st.integers(0, 20_000),
    st.integers(0, 1),
)


class One:
    def __init__(self, promise: Promise) -> None:
        self.counted = nobody_counts
        self.promise = promise
        self.asked = 0

    def promised(self, now: float) -> Promise:
        self.asked += 1
        return self.promise


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["enter", "leave", "change", "sum"]), PROMISES)
    )
)
def test_sums_are_what_a_recount_finds(
    steps: list[tuple[int, str, Promise]],
) -> None:
    ledger = Ledger(DrivenClock())
    every = [One(Promise()) for _ in range(6)]
    here: set[One] = set()
    for number, step, promise in steps:
        one = every[number]
        if step == "enter" and one not in here:
            ledger.enter(one)
            here.add(one)
        elif step == "enter":
            one.counted()
        elif step == "leave":
            ledger.leave(one)
            here.discard(one)
        elif step == "change":
            one.promise = promise
            one.counted()
        else:
            assert ledger.totals() == ledger.recount()
    assert (
        ledger.totals()
        == ledger.recount()
        == Totals(
            sum(one.promise.memory_mib for one in here),
            sum(max(0, one.promise.disk_mib - one.promise.disk_used_mib) for one in here),
            sum(one.promise.coming for one in here),
        )
    )


async def test_only_what_changed_is_looked_at_and_what_was_not_for_long() -> None:
    clock = DrivenClock()
    ledger = Ledger(clock)
    every = [One(Promise(disk_mib=10)) for _ in range(100)]
    for one in every:
        ledger.enter(one)
    ledger.totals()
    every[7].counted()
    ledger.totals()
    assert sum(one.asked for one in every) == 101
    for one in every:  # on disk, which nobody is told of
        one.promise = Promise(disk_mib=10, disk_used_mib=4)
    assert ledger.totals().disk_left_mib == 1000
    await clock.advance(16)
    for _ in range(10):
        ledger.totals()
    assert ledger.totals().disk_left_mib == 600
    assert sum(one.asked for one in every) == 201
