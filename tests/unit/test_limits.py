"""Limits kept in memory: rates and shares."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.core.limits import Allotment, Rate


def test_a_burst_is_free_and_then_the_rate_holds() -> None:
    rate = Rate(per_second=10, burst=5)
    assert [rate.spend(1, 100.0) > 1e-6 for _ in range(5)] == [False] * 5
    assert rate.spend(1, 100.0) == pytest.approx(0.1)
    assert rate.spend(1, 100.0) == pytest.approx(0.2)
    assert not rate.is_whole(100.6)
    assert rate.is_whole(100.8)
    # A long rest gives back one burst, and no more.
    assert [rate.spend(1, 1000.0) > 1e-6 for _ in range(6)] == [False] * 5 + [True]


@given(st.lists(st.tuples(st.floats(0, 5), st.integers(1, 50)), max_size=50))
def test_one_who_waits_as_told_never_exceeds_the_rate(steps: list[tuple[float, int]]) -> None:
    rate, now, spent = Rate(per_second=20, burst=10), 0.0, 0
    for rest, amount in steps:
        now += rest
        now += max(0.0, rate.spend(amount, now))
        spent += amount
        assert spent <= 10 + 20 * now + 1e-6


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 30)), max_size=60))
def test_no_organization_and_not_all_together_hold_more_than_they_may(
    asked: list[tuple[str, int]],
) -> None:
    shares, taken = Allotment(each=50, total=100), list[tuple[str, int]]()
    for org_id, amount in asked:
        held = sum(one for _, one in taken)
        own = sum(one for whose, one in taken if whose == org_id)
        fits = own + amount <= 50 and held + amount <= 100
        assert shares.take(org_id, amount) is fits
        if fits:
            taken.append((org_id, amount))
    assert shares.held == sum(one for _, one in taken)
    for org_id, amount in taken:
        shares.give_back(org_id, amount)
    assert shares.held == 0
    assert not shares._held
