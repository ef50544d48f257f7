"""A node's ear: what control planes ask for is done, and answered."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

from sandyard.server.core.codec import CodecError, encode
from sandyard.server.core.contracts.node import NodeControl, NodeExports
from sandyard.server.core.errors import (
    InternalError,
    InvalidArgumentError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.links.nats.asks import ASKS, WORKING_S, NodeMethod, failure
from sandyard.server.links.nats.link import Link, NatsMessage
from sandyard.server.tasks import Crew, beside

log = logging.getLogger(__name__)

_AT_ONCE_MAX = 2000


class WholeNode(NodeControl, NodeExports, Protocol):
    """All that a control plane may ask of a node in words."""


@asynccontextmanager
async def answering(
    node: WholeNode, link: Link, *, check: Callable[[], None] = lambda: None
) -> AsyncIterator[None]:
    """Do what is asked of a node for as long as the block runs; open it before the link is.

    `check` raises if the node may not be changed now; what only looks is answered all the same.
    """
    async with Crew() as crew:
        ear = _Ear(node, link, check, crew)
        link.listen(f"node.{node.node_id}.do", ear.take)
        yield


class _Ear:
    def __init__(self, node: WholeNode, link: Link, check: Callable[[], None], crew: Crew) -> None:
        self._node = node
        self._link = link
        self._check = check
        self._crew = crew
        self._at_work = 0

    def take(self, heard: NatsMessage) -> None:
        self._crew.start(self._answer(heard), "what was asked could not be answered", quietly=True)

    async def _answer(self, heard: NatsMessage) -> None:
        self._at_work += 1
        try:
            words = await self._outcome(heard)
        except SandyardError as error:
            words = failure(error)
        except Exception as error:  # one that fails is not all, and whoever waits is told
            log.exception("what was asked failed in a way that nobody foresaw")
            words = failure(InternalError(f"cannot carry this out: {error}"))
        finally:
            self._at_work -= 1
        try:
            await self._link.answer(heard, words)
        except UnavailableError as error:
            if "value" in words:  # perhaps too long to be said
                await self._link.answer(heard, failure(error))

    async def _outcome(self, heard: NatsMessage) -> dict[str, object]:
        """Do it, and say meanwhile that it is being done.

        Raises:
            SandyardError: what it failed with.
        """
        if self._at_work > _AT_ONCE_MAX:
            raise UnavailableError("cannot do this now: the node is asked for too much at once")
        ask = ASKS.get(str(heard.values.get("op")))
        if ask is None:
            raise InvalidArgumentError("cannot tell what is asked: it is of another version")
        try:
            args = ask.read(heard.values.get("args"))
        except CodecError as error:
            raise InvalidArgumentError(f"cannot tell what is asked: {error}") from error
        if ask.is_wish:
            self._check()
        async with beside(self._say_so(heard)):
            return {"value": encode(await self._done(ask, args))}

    async def _done(self, ask: NodeMethod, args: dict[str, Any]) -> Any:
        return await getattr(self._node, ask.name)(**args)

    async def _say_so(self, heard: NatsMessage) -> None:
        while True:
            await asyncio.sleep(WORKING_S)
            with suppress(UnavailableError):
                await self._link.answer(heard, {"working": True})
