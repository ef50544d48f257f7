"""Executes and answers the requests of control planes on a node."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

from sandyard.server.core.codec import CodecError, encode
from sandyard.server.core.contracts.node import NodeControl, NodeExports, NodeVersions
from sandyard.server.core.errors import (
    InternalError,
    OtherVersionError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.links.nats.asks import ASKS, WORKING_S, NodeMethod, failure
from sandyard.server.links.nats.link import Link, NatsMessage
from sandyard.server.tasks import Crew, concurrently

log = logging.getLogger(__name__)

_AT_ONCE_MAX = 2000


class WholeNode(NodeControl, NodeExports, NodeVersions, Protocol):
    """Everything that a control plane may request from a node over NATS."""


@asynccontextmanager
async def answering(
    node: WholeNode, link: Link, *, check: Callable[[], None] = lambda: None
) -> AsyncIterator[None]:
    """Handle requests to a node while the block runs; enter it before the link is opened.

    `check` raises if the node may not be changed now. Requests that only read are answered
    nevertheless.
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
        except Exception as error:  # answered as an error; other requests continue
            log.exception("unexpected error in a request")
            words = failure(InternalError(f"cannot carry out the request: {error}"))
        finally:
            self._at_work -= 1
        try:
            await self._link.answer(heard, words)
        except UnavailableError as error:
            if "value" in words:  # the answer may be too long
                await self._link.answer(heard, failure(error))

    async def _outcome(self, heard: NatsMessage) -> dict[str, object]:
        """Carry out a request, and report progress meanwhile.

        Raises:
            SandyardError: the request failed.
        """
        if self._at_work > _AT_ONCE_MAX:
            raise UnavailableError(
                "cannot do this now: too many requests to the node are in progress"
            )
        ask = ASKS.get(str(heard.values.get("op")))
        if ask is None:
            raise OtherVersionError("cannot carry out the request: this node does not know it")
        try:
            args = ask.read(heard.values.get("args"))
        except CodecError as error:
            raise OtherVersionError(
                f"cannot carry out the request, which is of another version: {error}"
            ) from error
        if ask.is_wish:
            self._check()
        async with concurrently(self._say_so(heard)):
            return {"value": encode(await self._done(ask, args))}

    async def _done(self, ask: NodeMethod, args: dict[str, Any]) -> Any:
        return await getattr(self._node, ask.name)(**args)

    async def _say_so(self, heard: NatsMessage) -> None:
        while True:
            await asyncio.sleep(WORKING_S)
            with suppress(UnavailableError):
                await self._link.answer(heard, {"working": True})
