"""How many bad credentials a source may try."""

import pytest
from tests.support.clock import DrivenClock

from sandyard.server.core.errors import RateLimitedError
from sandyard.server.service.people import rates
from sandyard.server.service.people.rates import Rates


def of(clock: DrivenClock, failures: int = 3) -> Rates:
    return Rates(clock, {}, failures_per_minute=failures)


async def test_guesses_that_come_in_parallel_are_counted_before_they_are_checked() -> None:
    clock = DrivenClock()
    made = of(clock)
    assert [made.try_guess("192.0.2.1") for _ in range(50)].count(True) == 3
    assert made.try_guess("192.0.2.2")
    await clock.advance(61)
    assert made.try_guess("192.0.2.1")
    # One that was right costs nothing.
    for _ in range(20):
        assert made.try_guess("198.51.100.1")
        made.guessed_right("198.51.100.1")


async def test_addresses_of_one_network_of_a_host_are_one_source() -> None:
    made = of(DrivenClock())
    for number in range(3):
        made.failed(f"2001:db8:1:2::{number}")
    with pytest.raises(RateLimitedError):
        made.failed("2001:db8:1:2:ffff::9")
    assert not made.try_guess("2001:db8:1:2::77")
    assert made.try_guess("2001:db8:1:3::1")


async def test_what_is_remembered_is_bounded_and_the_oldest_goes_first(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(rates, "_WINDOWS_MAX", 10)
    clock = DrivenClock()
    made = of(clock, failures=1)
    for number in range(30):
        assert made.try_guess(f"192.0.2.{number}")
        assert len(made._windows) <= 10
    assert not made.try_guess("192.0.2.29")
    assert made.try_guess("192.0.2.0")  # forgotten long ago
    # What is over goes by and by, without a look at everything.
    await clock.advance(61)
    for number in range(10):
        made.try_guess(f"198.51.100.{number}")
    assert all(one.ends > clock.monotonic() for one in made._windows.values())
