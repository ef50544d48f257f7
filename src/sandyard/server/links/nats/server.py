"""Executes and answers the requests of control planes on a node."""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress

from sandyard.server.core.codec import CodecError, encode
from sandyard.server.core.contracts.node import NodeControl
from sandyard.server.core.errors import (
    InternalError,
    OtherVersionError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.links.nats.link import Link, NatsMessage
from sandyard.server.links.nats.messages import WORKING_S, failure, operation_of
from sandyard.server.tasks import Crew, concurrently

log = logging.getLogger(__name__)

_AT_ONCE_MAX = 2000


@asynccontextmanager
async def answering(
    node: NodeControl, link: Link, *, check: Callable[[], None] = lambda: None
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
    def __init__(
        self, node: NodeControl, link: Link, check: Callable[[], None], crew: Crew
    ) -> None:
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
        try:
            operation = operation_of(heard.values)
        except CodecError as error:
            raise OtherVersionError(
                f"cannot carry out the request, which is of another version: {error}"
            ) from error
        if operation.changes:
            self._check()
        async with concurrently(self._say_so(heard)):
            return {"value": encode(await self._node.do(operation))}

    async def _say_so(self, heard: NatsMessage) -> None:
        while True:
            await asyncio.sleep(WORKING_S)
            with suppress(UnavailableError):
                await self._link.answer(heard, {"working": True})
