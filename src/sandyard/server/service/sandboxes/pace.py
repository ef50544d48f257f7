"""Rate limits for guests' output, for each sandbox and each organization.

Decoding a frame costs the same however small it is, so a guest that writes single bytes to many
streams could keep the event loop from other tenants. The limits apply to all streams together.
"""

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.limits import Rate

_SANDBOX_A_SECOND, _ORG_A_SECOND = 10_000, 20_000
_AT_ONCE = 2_000
_KEPT_MAX = 4096


class FrameRates:
    """The limits, in frames."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._rates: dict[str, Rate] = {}

    async def spend(self, sandbox_id: str, org_id: str, frames: int) -> None:
        """Take so many frames from both limits, and return once both allow more."""
        now = self._clock.monotonic()
        wait_s = max(
            self._rate(sandbox_id, _SANDBOX_A_SECOND).spend(frames, now),
            self._rate(org_id, _ORG_A_SECOND).spend(frames, now),
        )
        if len(self._rates) > _KEPT_MAX:
            self._rates = {name: one for name, one in self._rates.items() if not one.is_whole(now)}
        if wait_s > 0:
            await self._clock.sleep(wait_s)

    def _rate(self, name: str, per_second: int) -> Rate:
        if name not in self._rates:
            self._rates[name] = Rate(per_second=per_second, burst=_AT_ONCE)
        return self._rates[name]
