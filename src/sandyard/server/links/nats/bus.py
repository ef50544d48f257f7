"""Hints between control planes."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager, suppress
from typing import Final

from typing_extensions import override

from sandyard.server.core.contracts.bus import Bus, Subscription
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.errors import UnavailableError
from sandyard.server.links.local import LocalBus
from sandyard.server.links.nats.link import Link, NatsMessage
from sandyard.server.tasks import Crew

log = logging.getLogger(__name__)

_HINT: Final = "hint"
_WAITING_MAX: Final = 10_000


class NatsBus(Bus):
    """See core.contracts.bus.Bus. Use `hinting`."""

    def __init__(self, link: Link, clock: Clock) -> None:
        self._link = link
        self._here = LocalBus(clock)
        self._waiting: dict[str, None] = {}
        self._has_some = asyncio.Event()
        link.listen(f"{_HINT}.>", self._take)

    @override
    def hint(self, topic: str) -> None:
        self._here.hint(topic)
        if len(self._waiting) < _WAITING_MAX:
            self._waiting[topic] = None
            self._has_some.set()

    def hint_here(self, topic: str) -> None:
        """Wake the subscribers of `topic` in this process; the other processes have been notified,
        too."""
        self._here.hint(topic)

    @override
    def subscribe(self, topic: str) -> AbstractContextManager[Subscription]:
        return self._here.subscribe(topic)

    def _take(self, heard: NatsMessage) -> None:
        self._here.hint(heard.subject.removeprefix(f"{_HINT}."))

    async def _pass_on(self) -> None:
        while True:
            await self._has_some.wait()
            self._has_some.clear()
            topics, self._waiting = list(self._waiting), {}
            with suppress(UnavailableError):  # a lost hint only delays work
                for topic in topics:
                    await self._link.say(f"{_HINT}.{topic}", {})


@asynccontextmanager
async def hinting(link: Link, clock: Clock) -> AsyncIterator[NatsBus]:
    """Forward hints while the block runs; enter it before the link is opened."""
    bus = NatsBus(link, clock)
    async with Crew() as crew:
        crew.start(bus._pass_on(), "hints are passed on no longer")
        yield bus
