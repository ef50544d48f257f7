"""Keeps a server's clock set by its reference: the database's clock, or this host's."""

import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime

from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.errors import UnavailableError
from sandyard.server.links.local import AgreedClock
from sandyard.server.tasks import concurrently

log = logging.getLogger(__name__)

_AGREE_S = 5.0
_PROMPT_S = 0.5
_TRIES = 20
_CONFIRMED = "clock_confirmed"
Reading = tuple[datetime, float, float]
"""The time by the reference, and the elapsed seconds before and after it was read."""
Read = Callable[[Callable[[], float]], Awaitable[Reading]]
"""Reads the reference; it is given what counts elapsed seconds."""


async def read_host(elapsed: Callable[[], float]) -> Reading:
    """Read this host's clock."""
    at = elapsed()
    return datetime.now(UTC), at, at


def database_of(store: Store) -> Read:
    """Return a function that reads a database's clock."""

    async def read(elapsed: Callable[[], float]) -> Reading:
        async with store.read() as tx:  # not to count the wait for a connection
            before = elapsed()
            moment = await tx.facts.now()
            return moment, before, elapsed()

    return read


async def agree(clock: AgreedClock, read: Read) -> bool:
    """Set a clock by its reference; return False if the answer took too long to be accurate."""
    moment, before, after = await read(clock.elapsed)
    if after - before > _PROMPT_S:
        return False
    clock.agree(moment, (before + after) / 2)
    return True


async def agree_at_first(clock: AgreedClock, read: Read) -> None:
    """Set a clock by its reference before it is used.

    Raises:
        UnavailableError: the reference is too slow, repeatedly.
    """
    for _ in range(_TRIES):
        if await agree(clock, read):
            return
    raise UnavailableError("cannot read the time: the database takes too long to answer")


@asynccontextmanager
async def agreeing(clock: AgreedClock, store: Store, read: Read) -> AsyncIterator[None]:
    """Keep a clock set by its reference while the block runs. Otherwise two hosts with different
    clocks would disagree on idle and expired sandboxes.

    A step of the reference is followed after a while, or when the operator has confirmed it; see
    `AgreedClock.agree` and `confirm`.
    """

    async def keep_at_it(known: datetime | None) -> None:
        while True:
            await clock.sleep(_AGREE_S)
            try:
                await agree(clock, read)
                async with store.glance() as tx:
                    confirmed = await tx.facts.moment(_CONFIRMED)
                if clock.step is not None and confirmed != known:
                    clock.follow()
                if clock.step is None:
                    known = confirmed
            except UnavailableError:
                log.debug("cannot read the clock; retrying")
            except Exception:  # the next answer may do
                log.exception("unexpected error while reading the clock; retrying")

    await agree_at_first(clock, read)
    async with store.glance() as tx:
        confirmed_before = await tx.facts.moment(_CONFIRMED)
    async with concurrently(keep_at_it(confirmed_before)):
        yield


async def confirm(store: Store) -> datetime:
    """Have all servers follow a step of their reference now; return the time by the database."""
    async with store.write(Turn.SHARED) as tx:
        now = await tx.facts.now()
        await tx.facts.note(_CONFIRMED, now)
    return now
