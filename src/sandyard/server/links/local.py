"""A clock and an event bus for a single process."""

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Final

from sandyard.server.core.contracts.clock import Clock

log = logging.getLogger(__name__)

_NEARLY: Final = timedelta(seconds=0.25)
_ODD: Final = timedelta(seconds=5)


class SystemClock:
    """See core.contracts.clock.Clock."""

    def now(self) -> datetime:
        """See core.contracts.clock.Clock.now."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """See core.contracts.clock.Clock.monotonic."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """See core.contracts.clock.Clock.sleep."""
        await asyncio.sleep(seconds)

    def timeout(self, seconds: float) -> AbstractAsyncContextManager[object]:
        """See core.contracts.clock.Clock.timeout."""
        return asyncio.timeout(seconds)


class AgreedClock(SystemClock):
    """The time by a reference clock that several hosts share, such as the database's.

    Between two readings of the reference, time is counted by a clock that cannot be set and that
    continues while the host is suspended.
    """

    def __init__(self) -> None:
        self._agreed: tuple[datetime, float] | None = None

    def now(self) -> datetime:
        """See core.contracts.clock.Clock.now; this host's until something was agreed."""
        if self._agreed is None:
            return super().now()
        moment, at = self._agreed
        return moment + timedelta(seconds=self.elapsed() - at)

    @staticmethod
    def elapsed() -> float:
        """Return the seconds counted locally, from an arbitrary start."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def agree(self, moment: datetime, at: float) -> None:
        """Adopt a reading of the reference clock, taken when `at` seconds had been counted locally.
        Tiny differences are ignored."""
        now = self.now() + timedelta(seconds=at - self.elapsed())
        if self._agreed is None and abs(moment - now) > _ODD:
            log.warning(
                "this host's clock differs from the database's, which is ahead by %s", moment - now
            )
        if self._agreed is None or abs(moment - now) > _NEARLY:
            self._agreed = moment, at


class LocalSubscription:
    """See core.contracts.bus.Subscription."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._hinted = asyncio.Event()

    def wake(self) -> None:
        """Note that a hint has arrived."""
        self._hinted.set()

    async def wait(self, limit_s: float) -> bool:
        """See core.contracts.bus.Subscription.wait."""
        try:
            async with self._clock.timeout(limit_s):
                await self._hinted.wait()
        except TimeoutError:
            return False
        self._hinted.clear()
        return True


class LocalBus:
    """See core.contracts.bus.Bus."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._topics: defaultdict[str, set[LocalSubscription]] = defaultdict(set)

    def hint(self, topic: str) -> None:
        """See core.contracts.bus.Bus.hint."""
        for subscription in self._topics.get(topic, ()):
            subscription.wake()

    @contextmanager
    def subscribe(self, topic: str) -> Iterator[LocalSubscription]:
        """See core.contracts.bus.Bus.subscribe."""
        subscription = LocalSubscription(self._clock)
        self._topics[topic].add(subscription)
        try:
            yield subscription
        finally:
            self._topics[topic].discard(subscription)
            if not self._topics[topic]:
                del self._topics[topic]
