"""Prices and rounding, without a database."""

from datetime import UTC, datetime, timedelta
from decimal import Decimal
from fractions import Fraction
from math import floor

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.core.money import MICROS, Prices, cents_up, micros_of, show
from sandyard.server.core.plans import Plan
from sandyard.server.core.records import UsagePeriod
from sandyard.server.core.shapes import Shape
from sandyard.server.service.money.metering import _charged

NOW = datetime(2026, 5, 6, tzinfo=UTC)

PRICES = Prices(5 * MICROS, 1_500_000, 10 * MICROS, 10 * MICROS)
shapes = st.builds(Shape, st.integers(1, 32), st.integers(128, 65536), st.integers(1024, 512_000))
times = st.integers(0, 10**15).map(lambda us: timedelta(microseconds=us))
prices = st.builds(Prices, *[st.integers(0, 10**12)] * 4)


def exactly(price: Prices, shape: Shape, time: timedelta) -> Fraction:
    hours = Fraction(time // timedelta(microseconds=1), 3_600_000_000)
    return hours * (
        shape.vcpus * price.vcpu_hour
        + Fraction(shape.memory_mib, 1024) * price.memory_gib_hour
        + Fraction(shape.disk_mib, 1024) * Fraction(price.disk_gib_month, 730)
    )


@given(prices, shapes, times)
def test_compute_costs_what_it_does_exactly_rounded_down_once(
    price: Prices, shape: Shape, time: timedelta
) -> None:
    assert price.compute(shape, time) == floor(exactly(price, shape, time))


@given(prices, st.integers(0, 10**14), times)
def test_storage_costs_what_it_does_exactly_rounded_down_once(
    price: Prices, size: int, time: timedelta
) -> None:
    months = Fraction(time // timedelta(microseconds=1), 730 * 3_600_000_000)
    wanted = floor(months * Fraction(size, 2**30) * price.storage_gib_month)
    assert price.storage(size, time) == wanted


@given(prices, shapes, st.lists(times, max_size=8))
def test_however_time_is_cut_the_sum_is_the_same(
    price: Prices, shape: Shape, pieces: list[timedelta]
) -> None:
    one = UsagePeriod("sandbox", "org", 1, shape, started_at=NOW)
    charged, so_far = 0, timedelta()
    for piece in [*pieces, timedelta()]:
        so_far += piece
        found = _charged([one], NOW + so_far, lambda _, end: price.compute(shape, end - NOW))
        (one,) = found.periods
        charged += found.added
    assert charged == floor(exactly(price, shape, so_far))


def test_the_default_prices_are_the_contracts() -> None:
    # 2 vCPUs at 5 ¢, 4 GiB at 1.5 ¢, and a tenth of a month's share of 10 GiB at 10 ¢.
    hour = PRICES.hour_of(Shape(2, 4096, 10240))
    assert hour == floor(Fraction(16 * MICROS) + Fraction(100 * MICROS, 730))
    assert PRICES.compute(Shape(1, 1024, 1024), timedelta(seconds=-1)) == 0


@pytest.mark.parametrize(
    ("micros", "cents"), [(0, 0), (1, 1), (MICROS, 1), (MICROS + 1, 2), (-1, 0), (-MICROS, -1)]
)
def test_cents_that_suffice(micros: int, cents: int) -> None:
    assert cents_up(micros) == cents


def test_money_is_shown_as_people_read_it() -> None:
    assert [show(one) for one in (0, 5, 1234, -5, -1234)] == [
        "0.00", "0.05", "12.34", "-0.05", "-12.34",
    ]  # fmt: skip
    assert micros_of(Decimal("1.5")) == 1_500_000
    assert micros_of(Decimal("0.000001")) == 1


def test_an_organizations_own_limits_take_the_place_of_its_plans() -> None:
    plan = Plan(requests_per_minute=60, sandboxes=1)
    assert plan.changed_by({"sandboxes": 9, "unknown": 1}) == Plan(60, 9)
