"""Plugs for one process: a clock that is the machine's, a bus that is a set of events."""

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
    """The time by a clock that several hosts go by. From one answer of that to the next it is
    counted by one that nobody sets, and that goes on while the host is suspended."""

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
        """Return the seconds that are counted from one answer to the next."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def agree(self, moment: datetime, at: float) -> None:
        """Go by a moment of the other clock, which it was `at` so many seconds counted here; what
        differs by nearly nothing changes nothing."""
        now = self.now() + timedelta(seconds=at - self.elapsed())
        if self._agreed is None and abs(moment - now) > _ODD:
            log.warning("this host's clock is off: the database's is ahead by %s", moment - now)
        if self._agreed is None or abs(moment - now) > _NEARLY:
            self._agreed = moment, at


class LocalSubscription:
    """See core.contracts.bus.Subscription."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._hinted = asyncio.Event()

    def wake(self) -> None:
        """Note that a hint has come."""
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
