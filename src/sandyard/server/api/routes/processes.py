"""Processes in sandboxes that outlive the request which started them."""

import asyncio
import base64
import codecs
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import (
    APIRouter,
    Depends,
    Header,
    Query,
    Request,
    Response,
    WebSocket,
)
from starlette.requests import ClientDisconnect

from sandyard.server.api.access import Scope, socket_scope, takes_query_key
from sandyard.server.api.errors import error_out
from sandyard.server.api.events import EventStream, Recheck, SseEvent, rechecked
from sandyard.server.api.models.base import Data, Page
from sandyard.server.api.models.processes import (
    AttachMessage,
    Encoding,
    EndMessage,
    InputMessage,
    ProcessOut,
    Pty,
    ResizeMessage,
    SendSignal,
    SignalledOut,
    SignalMessage,
    StartProcess,
    StdinOut,
    WriteStdin,
    attach_message,
    end_out,
    process_out,
)
from sandyard.server.api.routes.common import Keyed, enveloped, errors, provided, whole
from sandyard.server.api.sockets import Inflow, messages_of, send_json, served, watched
from sandyard.server.core.errors import (
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    RateLimitedError,
)
from sandyard.server.core.ids import checked_text
from sandyard.server.core.ops import Ended
from sandyard.server.front.bodies import streams_body, takes_body
from sandyard.server.service.actor import Actor
from sandyard.server.service.people.rates import Rates
from sandyard.server.service.sandboxes.processes import STREAMS, Following, Processes, Which
from sandyard.server.tasks import concurrently

router = APIRouter(prefix="/v1/sandboxes/{reference}/processes", tags=["processes"])

_START_MAX = 3 * 1024 * 1024  # a command of 2 MiB, and what JSON makes of it
_STDIN_MAX = 1536 * 1024  # 1 MiB in base64
_PID_DIGITS = 10
_NUMBERS = {name: bytes((channel,)) for channel, name in STREAMS.items()}

CanWrite = Annotated[Actor, Depends(Scope("sandbox:write"))]
Service = Annotated[Processes, provided("processes")]
MayFollow = Annotated[Recheck, rechecked("sandbox:write")]


@router.post("", status_code=201, responses=errors(402, 404, 409, 413))
@takes_body(_START_MAX)
async def start_process(
    request: Request,
    actor: CanWrite,
    service: Service,
    reference: str,
    body: StartProcess,
    keyed: Keyed,
) -> Data[ProcessOut]:
    """Start a process that keeps running after this request. The end of its output is kept."""
    reference = checked_text(reference, field="reference")
    found = await service.start(actor, reference, body.wish(), request=keyed)
    return enveloped(request, process_out(found))


@router.get("", responses=errors(404, 409))
async def list_processes(
    request: Request, actor: CanWrite, service: Service, reference: str
) -> Page[ProcessOut]:
    """List started processes, oldest first. Ended ones are listed for ten minutes."""
    found = await service.list(actor, checked_text(reference, field="reference"))
    listed = whole(request, [process_out(one) for one in found.items])
    # Of very many, with long commands, the newest; there is no further page.
    return listed.model_copy(update={"has_more": found.is_cut})


@router.get("/{process}", responses=errors(404, 409))
async def get_process(
    request: Request, actor: CanWrite, service: Service, reference: str, process: str
) -> Data[ProcessOut]:
    """Return one process, by pid or tag."""
    found = await service.get(actor, checked_text(reference, field="reference"), which_of(process))
    return enveloped(request, process_out(found))


@router.post("/{process}/signal", responses=errors(402, 404, 409))
async def signal_process(
    request: Request,
    actor: CanWrite,
    service: Service,
    reference: str,
    process: str,
    body: SendSignal,
) -> Data[SignalledOut]:
    """Send a signal to a process, or to it and everything it has started."""
    reference = checked_text(reference, field="reference")
    pid, name = await service.signal(
        actor, reference, which_of(process), str(body.signal), everything=body.everything
    )
    return enveloped(request, SignalledOut(pid=pid, signal=name))


@router.post("/{process}/stdin", responses=errors(402, 404, 409, 413))
@takes_body(_STDIN_MAX)
async def write_stdin(
    request: Request,
    actor: CanWrite,
    service: Service,
    reference: str,
    process: str,
    body: WriteStdin,
) -> Data[StdinOut]:
    """Write to a process's input. The answer comes after at most 5 s and reports how much was
    written; send the rest again."""
    reference = checked_text(reference, field="reference")
    written, closed = await service.write(
        actor, reference, which_of(process), body.bytes(), closes=body.close
    )
    return enveloped(request, StdinOut(written=written, closed=closed))


@router.put(
    "/{process}/stdin",
    responses=errors(402, 404, 409),
    openapi_extra={
        "requestBody": {"content": {"application/octet-stream": {}}, "description": "The input."}
    },
)
@streams_body
async def stream_stdin(
    request: Request,
    actor: CanWrite,
    service: Service,
    reference: str,
    process: str,
    offset: Annotated[
        int | None,
        Query(
            ge=0,
            description="Where in the process's input the body begins. What was written from there "
            "on is not written again, so a request whose answer was lost can be repeated.",
        ),
    ] = None,
    close: Annotated[bool, Query(description="End its input when all is written.")] = False,
) -> Data[StdinOut]:
    """Write the request body to a process's input. Once the process has taken nothing for 5 s, the
    rest of the body is discarded; the answer reports how much was written."""
    reference = checked_text(reference, field="reference")
    try:
        fed = await service.feed(
            actor, reference, which_of(process), request.stream(), offset=offset, closes=close
        )
    except ClientDisconnect as error:
        raise InvalidArgumentError("the body did not come whole", field="body") from error
    return enveloped(request, StdinOut(written=fed.count, closed=fed.is_closed))


@router.post("/{process}/resize", responses=errors(402, 404, 409))
async def resize_terminal(
    request: Request,
    actor: CanWrite,
    service: Service,
    reference: str,
    process: str,
    body: Pty,
) -> Data[ProcessOut]:
    """Change the size of a process's terminal."""
    reference, which = checked_text(reference, field="reference"), which_of(process)
    await service.resize(actor, reference, which, body.size())
    return enveloped(request, process_out(await service.get(actor, reference, which)))


@router.get(
    "/{process}/output",
    responses={
        **errors(402, 404, 409),
        200: {"description": "Events.", "content": {"text/event-stream": {}}},
    },
    response_model=None,
)
@takes_query_key
async def follow_output(
    request: Request,
    actor: CanWrite,
    service: Service,
    check: MayFollow,
    reference: str,
    process: str,
    offset: Annotated[
        int | None,
        Query(ge=0, description="The first byte to tell of; without it, all that is kept."),
    ] = None,
    encoding: Annotated[
        Encoding, Query(description="How output is given: as text, or exactly in base64.")
    ] = "utf8",
    last_event_id: Annotated[
        str | None,
        Header(
            description="What a browser sends when it comes again.",
            json_schema_extra={"pattern": "^[0-9]{0,18}$"},
        ),
    ] = None,
) -> Any:
    """Follow a process's output by server-sent events: `output`, and finally `exit`.

    The id of each `output` is the offset of the byte after it. To resume, pass it as `offset`.
    `lost` comes first if requested bytes are no longer kept.
    """
    reference = checked_text(reference, field="reference")
    if last_event_id:
        if not (last_event_id.isascii() and last_event_id.isdigit() and len(last_event_id) < 19):
            raise InvalidArgumentError(
                "cannot use Last-Event-ID: it is no id of an event here", field="Last-Event-ID"
            )
        offset = int(last_event_id)
    if getattr(request.state, "is_head", False):
        await service.get(actor, reference, which_of(process))
        return Response(media_type="text/event-stream")
    async with AsyncExitStack() as opening:
        following = await opening.enter_async_context(
            service.follow(actor, reference, which_of(process), offset or 0)
        )
        held = opening.pop_all()
    return EventStream(_events(following, encoding, wants_lost=offset is not None), held, check)


@router.get("/{process}/attach", include_in_schema=False)
@takes_query_key
async def attach_by_request(actor: CanWrite, reference: str, process: str) -> None:
    """Refuse a plain request: this is a WebSocket."""
    del actor, reference, process
    raise InvalidArgumentError("cannot attach by a plain request: connect with a WebSocket")


@router.websocket("/{process}/attach")
@takes_query_key
@socket_scope("sandbox:write")
async def attach(
    socket: WebSocket,
    service: Service,
    rates: Annotated[Rates, provided("rates")],
    check: MayFollow,
    reference: str,
    process: str,
) -> None:
    """Attach to a process: follow its output and write to its input.

    Sent to the client: `attached`, output as bytes after one byte for the stream, `taken` with how
    much input was accepted, and `exit`. Sent by the client: input as bytes, and messages `input`,
    `end`, `resize` and `signal`.
    """
    async with served(socket) as actor:
        reference, which = checked_text(reference, field="reference"), which_of(process)
        offset = _offset(socket.query_params.get("offset"))
        async with service.follow(actor, reference, which, offset) as following:
            await socket.accept()
            about = {"pid": following.pid, "offset": following.offset, "lost": following.lost}
            await send_json(socket, {"type": "attached", **about})
            hands = _Hands(service, rates, actor, reference, following)
            async with (
                concurrently(hands.hear(socket)),
                concurrently(hands.pass_on()),
                concurrently(hands.tell(socket)),
                concurrently(watched(socket, check)),
            ):
                await _tell(following, socket)


async def _tell(following: Following, socket: WebSocket) -> None:
    """Send what a process prints and its end, and close."""
    async for one in following.events():
        if isinstance(one, Ended):
            await send_json(socket, {"type": "exit", **end_out(one)})
            await socket.close()
            return
        await socket.send_bytes(_NUMBERS[one.stream] + one.data)


class _Hands:
    """What an attached client may do with a process.

    Input waits apart for a process that does not read, so that a signal still reaches it.
    """

    def __init__(
        self,
        service: Processes,
        rates: Rates,
        actor: Actor,
        reference: str,
        following: Following,
    ) -> None:
        self._service = service
        self._rates = rates
        self._actor = actor
        self._reference = reference
        self._which = Which(pid=following.pid)
        self._taken = 0
        self._is_news = asyncio.Event()
        self._input = Inflow(following, self._note_taken)

    def _note_taken(self, count: int) -> None:
        # Separate, because a client that does not read must not block the process's input.
        self._taken += count
        self._is_news.set()

    async def tell(self, socket: WebSocket) -> None:
        """Tell how much of the input was taken, as fast as the client reads."""
        while True:
            await self._is_news.wait()
            self._is_news.clear()
            await send_json(socket, {"type": "taken", "bytes": self._taken})

    async def pass_on(self) -> None:
        """Write what came to the process's input, as it reads."""
        await self._input.pass_on()

    async def hear(self, socket: WebSocket) -> None:
        """Do what is asked for, until the socket is closed.

        Raises:
            WebSocketDisconnect: it is.
        """
        async for message in messages_of(socket):
            try:
                if isinstance(message, bytes):
                    await self._input.take(message)
                else:
                    await self._obey(attach_message(message))
            except (
                InvalidArgumentError, ConflictError, NotFoundError, RateLimitedError,
            ) as error:  # fmt: skip
                # The connection continues: the error was sent, and nothing was done.
                await send_json(socket, {"type": "refused", **error_out(error)})

    async def _obey(self, wish: AttachMessage) -> None:
        match wish:
            case InputMessage():
                await self._input.take(wish.bytes())
            case EndMessage():
                self._input.end()
            case ResizeMessage():
                self._rates.count(self._actor)
                await self._service.resize(self._actor, self._reference, self._which, wish.size())
            case SignalMessage():
                self._rates.count(self._actor)
                await self._service.signal(
                    self._actor, self._reference, self._which, str(wish.signal),
                    everything=wish.everything,
                )  # fmt: skip


def _offset(text: str | None) -> int | None:
    """Return the first byte that is asked for; None for what comes from now on."""
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise InvalidArgumentError("cannot use offset: it is the number of a byte", field="offset")
    return int(text)


async def _events(
    following: Following, encoding: str, *, wants_lost: bool
) -> AsyncIterator[SseEvent]:
    if following.lost and wants_lost:
        yield SseEvent("lost", {"bytes": following.lost}, id=following.offset)
    decoders: dict[str, codecs.IncrementalDecoder] = {}
    async for one in following.events():
        if isinstance(one, Ended):
            for stream, decoder in decoders.items():
                if rest := decoder.decode(b"", final=True):
                    yield SseEvent("output", {"stream": stream, "data": rest})
            yield SseEvent("exit", end_out(one))
            return
        if encoding == "base64":
            shown = base64.b64encode(one.data).decode()
        else:
            made = codecs.getincrementaldecoder("utf-8")
            decoder = decoders.setdefault(one.stream, made("replace"))
            shown = decoder.decode(one.data)
        yield SseEvent("output", {"stream": one.stream, "data": shown}, id=one.offset)


def which_of(process: str) -> Which:
    """Return the process that a part of a path means: a pid, or a tag."""
    checked_text(process, field="process")
    if process.isascii() and process.isdigit() and len(process) <= _PID_DIGITS:
        return Which(pid=int(process))
    return Which(tag=process)
