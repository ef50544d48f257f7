"""Limits that are kept in memory: a rate over time, and a share of a total."""

from collections import Counter


class Rate:
    """A rate limit: `per_second` on average, `burst` at once (a generic cell rate algorithm)."""

    def __init__(self, *, per_second: float, burst: float) -> None:
        self._cost_s = 1 / per_second
        self._burst_s = burst / per_second
        self._used_up_to: float | None = None

    def spend(self, amount: float, now: float) -> float:
        """Count `amount` at the monotonic time `now`; return how many seconds to wait before more,
        0 or less if there is no need to."""
        used_up_to = now if self._used_up_to is None else max(now, self._used_up_to)
        self._used_up_to = used_up_to + amount * self._cost_s
        return self._used_up_to - now - self._burst_s

    def is_whole(self, now: float) -> bool:
        """Tell whether nothing has been used, or all of it is available again."""
        return self._used_up_to is None or self._used_up_to <= now


class Allotment:
    """A total that organizations share. Each may hold `each` at most, all together `total`."""

    def __init__(self, *, each: int, total: int | None = None) -> None:
        self._each = each
        self._total = total
        self._held: Counter[str] = Counter()
        self.held = 0

    def take(self, org_id: str, amount: int) -> bool:
        """Take an amount for an organization and return True; False if that is over a limit."""
        if self._held[org_id] + amount > self._each:
            return False
        if self._total is not None and self.held + amount > self._total:
            return False
        self._held[org_id] += amount
        self.held += amount
        return True

    def give_back(self, org_id: str, amount: int) -> None:
        """Give back what was taken."""
        self.held -= amount
        self._held[org_id] -= amount
        if self._held[org_id] <= 0:
            del self._held[org_id]
