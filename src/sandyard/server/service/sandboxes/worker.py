"""Who does the reconciler's work at once, for a request that waits for it."""

from typing import Protocol

from sandyard.server.core.contracts.store import Hold
from sandyard.server.core.records import Claim


class Worker(Protocol):
    """Takes up what has just been wished, under a lease that was written with the wish."""

    def hold(self) -> Hold:
        """Return a lease to write together with a wish."""
        ...

    async def take_up(self, claim: Claim, *, limit_s: float) -> None:
        """Work on it now; return when done, or at the limit, beyond which the work goes on."""
        ...
