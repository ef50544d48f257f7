"""A clock and an event bus for a single process."""

import asyncio
import logging
import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from datetime import UTC, datetime, timedelta
from typing import Final

from typing_extensions import override

from sandyard.server.core.contracts.bus import Bus, Subscription
from sandyard.server.core.contracts.clock import Clock

log = logging.getLogger(__name__)

_NEARLY: Final = timedelta(seconds=0.25)
_ODD: Final = timedelta(seconds=5)
_STEP: Final = timedelta(seconds=60)
_LASTS_S: Final = 300


class SystemClock(Clock):
    """See core.contracts.clock.Clock."""

    @override
    def now(self) -> datetime:
        return datetime.now(UTC)

    @override
    def monotonic(self) -> float:
        return time.monotonic()

    @override
    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    @override
    def timeout(self, seconds: float) -> AbstractAsyncContextManager[object]:
        return asyncio.timeout(seconds)


class AgreedClock(SystemClock):
    """The time by a reference clock that several hosts share, such as the database's.

    Between two readings of the reference, time is counted by a clock that cannot be set and that
    continues while the host is suspended. A step of the reference of over a minute is an alarm: it
    is followed once it has lasted for five minutes, because what is decided by time, such as
    deletes at the end of sandboxes, cannot be undone.
    """

    def __init__(self) -> None:
        self._agreed: tuple[datetime, float] | None = None
        self._step: tuple[timedelta, float] | None = None

    @override
    def now(self) -> datetime:
        """Return the time agreed with the control plane; before that, this host's."""
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
        Tiny differences are ignored, and a step is followed later."""
        now = self.now() + timedelta(seconds=at - self.elapsed())
        ahead = moment - now
        if self._agreed is None and abs(ahead) > _ODD:
            log.warning(
                "this host's clock differs from the database's, which is ahead by %s", ahead
            )
        if self._agreed is not None and abs(ahead) > _STEP:
            if self._step is None or abs(self._step[0] - ahead) > _STEP:
                self._step = ahead, at
                log.error(
                    "the clock was set %s by %s; it is followed in %d minutes, or at once after "
                    "`sandyard admin confirm-clock`; set it right if this was a mistake",
                    "forward" if ahead > timedelta() else "back",
                    timedelta(seconds=round(abs(ahead).total_seconds())),
                    _LASTS_S // 60,
                )
            if at - self._step[1] < _LASTS_S:
                return
            log.warning("following the clock, which has stayed as it was set")
        self._step = None
        if self._agreed is None or abs(ahead) > _NEARLY:
            self._agreed = moment, at

    @property
    def step(self) -> timedelta | None:
        """By how much the reference was set, if that is not followed yet."""
        return None if self._step is None else self._step[0]

    def follow(self) -> None:
        """Follow a step at the next reading: it is right."""
        if self._step is not None:
            self._step = self._step[0], -math.inf


class LocalSubscription(Subscription):
    """See core.contracts.bus.Subscription."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._hinted = asyncio.Event()

    def wake(self) -> None:
        """Note that a hint has arrived."""
        self._hinted.set()

    @override
    async def wait(self, limit_s: float) -> bool:
        try:
            async with self._clock.timeout(limit_s):
                await self._hinted.wait()
        except TimeoutError:
            return False
        self._hinted.clear()
        return True


class LocalBus(Bus):
    """See core.contracts.bus.Bus."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._topics: defaultdict[str, set[LocalSubscription]] = defaultdict(set)

    @override
    def hint(self, topic: str) -> None:
        for subscription in self._topics.get(topic, ()):
            subscription.wake()

    @contextmanager
    @override
    def subscribe(self, topic: str) -> Iterator[LocalSubscription]:
        subscription = LocalSubscription(self._clock)
        self._topics[topic].add(subscription)
        try:
            yield subscription
        finally:
            self._topics[topic].discard(subscription)
            if not self._topics[topic]:
                del self._topics[topic]
