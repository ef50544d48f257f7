"""A control plane's view of the nodes: requests are sent over NATS, answers arrive in an inbox."""

import asyncio
import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Final

from typing_extensions import override

from sandyard.server.core.codec import CodecError
from sandyard.server.core.contracts.node import NodeControl, NodeOperation
from sandyard.server.core.errors import DeadlineExceededError, UnavailableError
from sandyard.server.core.ids import new_secret
from sandyard.server.core.ops import AnswerT
from sandyard.server.links.nats.link import Link, NatsMessage
from sandyard.server.links.nats.messages import SILENCE_S, answer_of, failed, request_of

log = logging.getLogger(__name__)

_BACK_S: Final = 1.0
_AGAIN_S: Final = 0.1
INBOX: Final = "inbox"
"""What the places begin with where answers come."""


class Inbox:
    """Receives the answers to one control plane; create it before the link is opened."""

    def __init__(self, link: Link, name: str) -> None:
        self._place = f"{INBOX}.{name}"
        self._waiting: dict[str, asyncio.Queue[NatsMessage]] = {}
        link.listen(f"{self._place}.*", self._take)

    @contextmanager
    def answers(self) -> Iterator[tuple[str, "asyncio.Queue[NatsMessage]"]]:
        """Yield a reply subject, and a queue of the messages sent to it."""
        place, came = f"{self._place}.{new_secret()}", asyncio.Queue[NatsMessage]()
        self._waiting[place] = came
        try:
            yield place, came
        finally:
            del self._waiting[place]

    def _take(self, heard: NatsMessage) -> None:
        came = self._waiting.get(heard.subject)
        if came is not None:  # otherwise its caller has given up
            came.put_nowait(heard)


class RemoteNode(NodeControl):
    """The node that listens as `node_id`. See core.contracts.node.NodeControl.

    If NATS or the node does not answer, the request may have been executed.
    """

    def __init__(self, link: Link, inbox: Inbox, node_id: str) -> None:
        self._link = link
        self._inbox = inbox
        self._node_id = node_id

    @property
    @override
    def node_id(self) -> str:
        return self._node_id

    @override
    async def do(self, operation: NodeOperation[AnswerT]) -> AnswerT:
        request = request_of(operation)
        until = asyncio.get_running_loop().time() + _BACK_S
        while (heard := await self._heard(request)).is_undelivered:
            # It may be moving from one server to another, and has not received the request.
            if asyncio.get_running_loop().time() > until:
                raise UnavailableError(f"the node {self._node_id} is not there")
            await asyncio.sleep(_AGAIN_S)
        if "error" in heard.values:
            raise failed(heard.values["error"])
        try:
            return answer_of(operation, heard.values.get("value"))
        except CodecError as error:
            log.warning("the node %s sent an invalid answer: %s", self._node_id, error)
            raise UnavailableError(f"the node {self._node_id} sent an invalid answer") from error

    async def _heard(self, request: Mapping[str, object]) -> NatsMessage:
        """Send the request once, and return its outcome."""
        with self._inbox.answers() as (place, came):
            await self._link.say(f"node.{self._node_id}.do", request, reply=place)
            while True:
                try:
                    async with asyncio.timeout(SILENCE_S):
                        heard = await came.get()
                except TimeoutError as error:
                    raise DeadlineExceededError(
                        f"the node {self._node_id} does not answer"
                    ) from error
                if not heard.values.get("working"):
                    return heard
