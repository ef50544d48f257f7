"""How fast handshakes may begin, by source: each costs this thread a key exchange, and the other
side nothing (CVE-2002-20001, "DHEat")."""

from collections.abc import Callable
from itertools import islice

_SOURCES_MAX = 10_000


class Throttle:
    """A budget of handshakes for each source, which fills up again as time passes (a generic cell
    rate algorithm). A handshake that led to a login costs nothing."""

    def __init__(self, *, at_once: int, a_second: float, monotonic: Callable[[], float]) -> None:
        self._at_once = at_once
        self._cost_s = 1 / a_second
        self._monotonic = monotonic
        self._used_up_to: dict[str, float] = {}

    def begin(self, source: str) -> bool:
        """Count a handshake of a source, and return whether it may begin."""
        now = self._monotonic()
        self._make_room(now)
        used_up_to = max(now, self._used_up_to.pop(source, now))
        if used_up_to - now > (self._at_once - 1) * self._cost_s:
            self._used_up_to[source] = used_up_to
            return False
        self._used_up_to[source] = used_up_to + self._cost_s
        return True

    def give_back(self, source: str) -> None:
        """Take back what `begin` counted."""
        if source in self._used_up_to:
            self._used_up_to[source] -= self._cost_s

    def _make_room(self, now: float) -> None:
        """Forget the two sources that came longest ago if their budgets are whole, and the first
        in any case if there are too many."""
        for source in list(islice(self._used_up_to, 2)):
            if self._used_up_to[source] <= now or len(self._used_up_to) >= _SOURCES_MAX:
                del self._used_up_to[source]
