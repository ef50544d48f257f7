"""How fast guests' output is taken in: by budget of each sandbox and each organization.

To decode a frame costs this thread the same however little is in it, so a guest that writes a byte
at a time, in many streams at once, could keep the thread from everyone else. What one sandbox, and
what one organization may have decoded in a second is bounded, over all their streams together.
"""

from sandyard.server.core.contracts.clock import Clock

_SANDBOX_A_SECOND, _ORG_A_SECOND = 10_000, 20_000
_AT_ONCE = 2_000
_KEPT_MAX = 4096


class Pace:
    """The budgets, in frames. They fill up again as time passes (a generic cell rate algorithm)."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._used_up_to: dict[str, float] = {}

    async def spend(self, sandbox_id: str, org_id: str, frames: int) -> None:
        """Take so many frames from both budgets, and return once both have room for more."""
        now = self._clock.monotonic()
        wait_s = max(
            self._take(sandbox_id, frames / _SANDBOX_A_SECOND, _AT_ONCE / _SANDBOX_A_SECOND, now),
            self._take(org_id, frames / _ORG_A_SECOND, _AT_ONCE / _ORG_A_SECOND, now),
        )
        if len(self._used_up_to) > _KEPT_MAX:
            self._used_up_to = {one: at for one, at in self._used_up_to.items() if at > now}
        if wait_s > 0:
            await self._clock.sleep(wait_s)

    def _take(self, key: str, cost_s: float, at_once_s: float, now: float) -> float:
        used_up_to = max(now, self._used_up_to.get(key, now)) + cost_s
        self._used_up_to[key] = used_up_to
        return used_up_to - now - at_once_s
