"""Registration and heartbeats of nodes over NATS.

ctl.<node>.hello     Hello → Welcome    to one control plane
ctl.<node>.beat      Beat → Grant       every second; one answers, all receive it
ctl.<node>.changed   nothing            to all
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, TypeVar

from typing_extensions import override

from sandyard.server.core.codec import CodecError, decode, encode
from sandyard.server.core.contracts.cluster import Beat, Grant, Hello, Presence, Welcome
from sandyard.server.core.errors import (
    InternalError,
    InvalidArgumentError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.links.nats.client import INBOX, Inbox
from sandyard.server.links.nats.link import PREFIX, Link, NatsMessage
from sandyard.server.links.nats.messages import failed, failure
from sandyard.server.tasks import Crew

log = logging.getLogger(__name__)

_CONTROLS: Final = "controls"
_ANSWER_S: Final = 1.0
_HELLOS_S: Final = 0.4
_CHANGES_S: Final = 0.02
_LONGEST: Final = 2**16
_T = TypeVar("_T")


@asynccontextmanager
async def registering(
    registry: Presence,
    link: Link,
    *,
    on_change: Callable[[str], None],
    on_beat: Callable[[str, Beat], None],
) -> AsyncIterator[None]:
    """Handle nodes' messages while the block runs; enter it before the link is opened."""
    async with Crew() as crew:

        def take(heard: NatsMessage) -> None:
            # A repetition before the answer counts once.
            answering = _answered(registry, link, heard)
            crew.start(answering, "a node was not answered", once=heard.subject, quietly=True)

        def changed(heard: NatsMessage) -> None:
            telling = _notify_later(on_change, heard.subject.split(".")[1])
            crew.start(telling, "a change was not looked at", once=heard.subject)

        def overheard(heard: NatsMessage) -> None:
            with suppress(CodecError):  # the handler reports it
                on_beat(heard.subject.split(".")[1], decode(Beat, heard.values))

        link.listen("ctl.*.hello", take, queue=_CONTROLS, longest=_LONGEST)
        link.listen("ctl.*.beat", take, queue=_CONTROLS, longest=_LONGEST)
        link.listen("ctl.*.beat", overheard, longest=_LONGEST)
        link.listen("ctl.*.changed", changed, longest=_LONGEST)
        yield


async def _notify_later(on_change: Callable[[str], None], node_id: str) -> None:
    await asyncio.sleep(_CHANGES_S)
    on_change(node_id)


async def _answered(registry: Presence, link: Link, heard: NatsMessage) -> None:
    _, node_id, word = heard.subject.split(".")
    if not heard.reply.startswith(f"{PREFIX}.{INBOX}.{node_id}."):
        return  # it would send it to another server
    try:
        # Done after its caller gave up, it could undo what was done since.
        async with asyncio.timeout(_ANSWER_S):
            reply: dict[str, object] = {
                "value": encode(await _registered(registry, node_id, word, heard))
            }
    except TimeoutError:
        return
    except SandyardError as error:
        reply = failure(error)
    except Exception as error:  # answered as an internal error
        log.exception("unexpected error while handling a node's message")
        reply = failure(InternalError(f"cannot answer the request: {error}"))
    await link.answer(heard, reply)
    if word == "hello":
        await asyncio.sleep(_HELLOS_S)


async def _registered(
    registry: Presence, node_id: str, word: str, heard: NatsMessage
) -> Welcome | Grant:
    try:
        if word == "hello":
            return await registry.hello(node_id, decode(Hello, heard.values))
        return await registry.beat(node_id, decode(Beat, heard.values))
    except CodecError as error:
        raise InvalidArgumentError(f"cannot read the message: {error}") from error


class NatsPresence(Presence):
    """See core.contracts.cluster.Presence: whichever control plane hears it.

    Raises, by any method: UnavailableError if none answers.
    """

    def __init__(self, link: Link, inbox: Inbox) -> None:
        self._link = link
        self._inbox = inbox

    @override
    async def hello(self, node_id: str, hello: Hello) -> Welcome:
        return await self._asked(f"ctl.{node_id}.hello", hello, Welcome)

    @override
    async def beat(self, node_id: str, beat: Beat) -> Grant:
        return await self._asked(f"ctl.{node_id}.beat", beat, Grant)

    async def changed(self, node_id: str) -> None:
        """Tell every control plane that the state of the node has changed."""
        await self._link.say(f"ctl.{node_id}.changed", {})

    async def _asked(self, subject: str, words: Any, kind: type[_T]) -> _T:
        with self._inbox.answers() as (place, came):
            await self._link.say(subject, encode(words), reply=place)
            try:
                async with asyncio.timeout(_ANSWER_S):
                    heard = await came.get()
            except TimeoutError as error:
                raise UnavailableError("no control plane answers") from error
        if heard.is_undelivered:
            raise UnavailableError("no control plane is there")
        if "error" in heard.values:
            raise failed(heard.values["error"])
        try:
            return decode(kind, heard.values.get("value"))
        except CodecError as error:
            raise UnavailableError(f"a control plane sent an invalid answer: {error}") from error
