"""Runs the reconciler's work at once, for a request that has just changed the desired state."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from sandyard.server.core.contracts.store import Hold
from sandyard.server.core.errors import UnavailableError
from sandyard.server.core.records import Claim


class Worker(Protocol):
    """Works on a sandbox that was just changed, under a lease that was written with the change."""

    def new_hold(self) -> Hold:
        """Return a new lease to write with a change."""
        ...

    async def run_now(self, claim: Claim, *, limit_s: float) -> None:
        """Work on it now. Return when done or after the limit; the work continues."""
        ...

    def release(self, sandbox_id: str, hold: Hold) -> None:
        """Release a lease in the background, if it was written and is not in use."""
        ...


@contextmanager
def new_lease(worker: Worker, *sandbox_ids: str) -> Iterator[Hold]:
    """Lend a lease for each change that the block writes.

    If the block fails so that it is unknown whether the lease was written, release it: the next
    server finds the change at once instead of after the lease expires.
    """
    hold = worker.new_hold()
    try:
        yield hold
    except (UnavailableError, asyncio.CancelledError):
        for sandbox_id in sandbox_ids:
            worker.release(sandbox_id, hold)
        raise
