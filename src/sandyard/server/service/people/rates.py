"""Rate limits: requests per minute of keys and users, and failed logins of addresses."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.errors import RateLimitedError
from sandyard.server.core.plans import Plan
from sandyard.server.core.sources import source_of
from sandyard.server.service.actor import Actor, plan_of

_WINDOW_S = 60.0
_WINDOWS_MAX = 100_000
UNLIMITED = 1_000_000_000
"""Sent where there is no limit, since clients expect a number."""


@dataclass(frozen=True)
class Allowance:
    """The requests allowed in the current minute, how many are left, and its end.

    `resets_at` is in seconds since 1970.
    """

    limit: int
    remaining: int
    resets_at: int


@dataclass
class _Window:
    ends: float
    count: int = 0


class Rates:
    """Counts in memory; a restart resets the counters."""

    def __init__(
        self, clock: Clock, plans: Mapping[str, Plan], *, failures_per_minute: int
    ) -> None:
        self._clock = clock
        self._plans = plans
        self._failures = failures_per_minute
        self._windows: dict[str, _Window] = {}

    def count(self, actor: Actor) -> Allowance:
        """Count one request of an actor and return what is left.

        A key and its user have separate limits. The one closer to its limit is returned.

        Raises:
            RateLimitedError: there were too many.
        """
        limit = plan_of(self._plans, actor).requests_per_minute
        if limit is None:
            # For clients that follow these headers.
            resets_at = math.ceil(self._clock.now().timestamp() + _WINDOW_S)
            return Allowance(UNLIMITED, UNLIMITED, resets_at)
        names = [f"user {actor.org_id} {actor.user_id}"]
        if actor.key_id is not None:
            names.append(f"key {actor.key_id}")
        windows = [self._window(name) for name in names]
        fullest = max(windows, key=lambda one: (one.count, one.ends))
        if fullest.count >= limit:
            wait = self._left(fullest)
            raise RateLimitedError(
                f"cannot serve more now: {limit} requests a minute are allowed; "
                f"try again in {wait} s",
                retry_after_s=wait,
                limit=limit,
            )
        for window in windows:
            window.count += 1
        return self._allowance(fullest, limit)

    def refused(self, actor: Actor) -> Allowance:
        """Return the allowance of an actor that `count` refused."""
        limit = plan_of(self._plans, actor).requests_per_minute or UNLIMITED
        window = self._window(f"user {actor.org_id} {actor.user_id}")
        return Allowance(limit, 0, self._allowance(window, limit).resets_at)

    def of_address(self, address: str) -> Allowance:
        """Return how many invalid credentials an address may still try."""
        return self._allowance(self._of_source(address), self._failures)

    def failed(self, address: str) -> None:
        """Count an invalid credential from an address; IPv6 is counted by /64.

        Valid credentials are never refused because of their address, which many clients may share.

        Raises:
            RateLimitedError: there were too many.
        """
        window = self._of_source(address)
        window.count += 1
        if window.count > self._failures:
            wait = self._left(window)
            raise RateLimitedError(
                "cannot accept the credential: too many that were no good came from this address; "
                f"try again in {wait} s with a good one",
                retry_after_s=wait,
            )

    def try_guess(self, address: str) -> bool:
        """Count a login attempt of an address before it is checked; return whether it may be.

        Checking takes a while, and parallel attempts would otherwise all be checked.
        `guessed_right` takes back a successful one.
        """
        window = self._of_source(address)
        if window.count >= self._failures:
            return False
        window.count += 1
        return True

    def guessed_right(self, address: str) -> None:
        """Take back what `try_guess` counted."""
        window = self._of_source(address)
        window.count = max(0, window.count - 1)

    def _of_source(self, address: str) -> _Window:
        return self._window(f"address {source_of(address)}")

    def _window(self, name: str) -> _Window:
        now = self._clock.monotonic()
        window = self._windows.get(name)
        if window is None or window.ends <= now:
            self._windows.pop(name, None)
            self._make_room(now)
            window = self._windows[name] = _Window(now + _WINDOW_S)
        return window

    def _make_room(self, now: float) -> None:
        """Remove the two oldest windows if they have ended, and the oldest in any case if there are
        too many. All have the same length, so they are ordered by their end."""
        for name in list(islice(self._windows, 2)):
            if self._windows[name].ends <= now or len(self._windows) >= _WINDOWS_MAX:
                del self._windows[name]

    def _left(self, window: _Window) -> int:
        return max(1, math.ceil(window.ends - self._clock.monotonic()))

    def _allowance(self, window: _Window, limit: int) -> Allowance:
        resets_at = math.ceil(self._clock.now().timestamp() + self._left(window))
        return Allowance(limit, max(0, limit - window.count), resets_at)
