"""Finds sandboxes that were idle for longer than their idle timeout.

A use is a command, a file call, a touch, or a program that keeps a processor busy. Reading a
sandbox (get, list, stats) is not a use.
"""

import logging
from datetime import timedelta

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import MachineFact, NodeTunnel
from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.errors import SandyardError
from sandyard.server.core.ops import Stats
from sandyard.server.core.records import Reason, Standing
from sandyard.server.core.states import Status
from sandyard.server.service.sandboxes.register import ref_of
from sandyard.server.service.sandboxes.uses import last_used

log = logging.getLogger(__name__)

_BUSY_PERCENT = 5.0
_WINDOW_S = 60.0
IDLE = Reason("idle", "it was not used for as long as its idle timeout allows")


class Idleness:
    """Decides whether a sandbox is idle."""

    def __init__(self, *, store: Store, tunnel: NodeTunnel, clock: Clock) -> None:
        self._store = store
        self._tunnel = tunnel
        self._clock = clock

    def is_due(self, sandbox: Standing, fact: MachineFact | None) -> bool:
        """Tell whether a running sandbox's idle timeout has passed and no use is in progress."""
        if sandbox.status is not Status.RUNNING or sandbox.idle_timeout_s == 0:
            return False
        if fact is None or fact.is_used:
            return False
        return self._clock.now() - last_used(sandbox) >= timedelta(seconds=sandbox.idle_timeout_s)

    async def is_idle(self, sandbox: Standing) -> bool:
        """Tell whether a sandbox that is due is also not busy on its own. If it is busy, store that
        as a use."""
        if not await self._is_busy(sandbox):
            return True
        async with self._store.write(Turn.SHARED) as tx:
            await tx.activity.touch(sandbox.id, at=self._clock.now(), kind="cpu")
        return False

    async def _is_busy(self, sandbox: Standing) -> bool:
        """Tell whether programs have kept a processor busy since the last use, averaged over a
        minute."""
        unused_s = (self._clock.now() - last_used(sandbox)).total_seconds()
        window_s = max(1.0, min(_WINDOW_S, unused_s))
        try:
            async with self._tunnel.open(ref_of(sandbox), Stats(window_s)) as opened:
                percent = opened.answer.recent_cpu_percent
        except SandyardError as error:
            log.warning(
                "cannot tell whether a sandbox is busy: %s; leaving it running", error.message
            )
            return True
        return percent is not None and percent > _BUSY_PERCENT
