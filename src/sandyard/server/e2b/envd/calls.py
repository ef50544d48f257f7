"""Calls in Connect: reads messages of requests, and sends answers and streams of messages."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, AsyncExitStack
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from sandyard.server.core import connect
from sandyard.server.core.connect import ConnectError, EnvelopeDecoder, Fields
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.errors import (
    GuestNotFoundError,
    InvalidArgumentError,
    PayloadTooLargeError,
    SandyardError,
)
from sandyard.server.e2b.envd.box import Box, box_of
from sandyard.server.e2b.errors import code_of, is_gone, message_of, other_type
from sandyard.server.front.bodies import streams_body, takes_body
from sandyard.server.front.bounds import JsonBounds
from sandyard.server.front.streams import HeldStream, while_connected, with_beats

Message = Mapping[str, Any]
Unary = Callable[[Box, Fields], Awaitable[Message]]
Streamed = Callable[["Call"], AbstractAsyncContextManager[AsyncIterator[Message]]]
Fed = Callable[[Box, AsyncIterator[Fields]], Awaitable[Message]]
Route = Callable[[Request], Awaitable[Response]]
_CALL_MAX = 512 * 1024
"""The size limit of a message that is answered by a stream: its memory is held as long as that."""
_PING_S, _PING_LEAST_S = 90.0, 1.0
_NUMBER = re.compile(r"[0-9]{1,12}")
_NO_BUFFER = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class Call:
    """A call that is answered by a stream: its one message, and its deadline in milliseconds."""

    def __init__(self, request: Request, box: Box, message: Fields) -> None:
        self.box = box
        self.message = message
        self.timeout_ms = _number(request, "connect-timeout-ms") or None
        self.ping_s = max(_PING_LEAST_S, _number(request, "keepalive-ping-interval") or _PING_S)


def unary(work: Unary) -> Route:
    """Return the route of a call with one message and one answer."""

    @takes_body(connect.ENVELOPE_MAX)
    async def route(request: Request) -> Response:
        _check_type(request, connect.UNARY_TYPE)
        box = await box_of(request)
        try:
            message = _read(await request.body())
            async with while_connected(request):
                return JSONResponse(dict(await work(box, message)))
        except (ConnectError, SandyardError) as error:
            refusal = _refusal_of(error)
            body = connect.error_value(refusal.code, refusal.message)
            return JSONResponse(body, status_code=connect.STATUS_OF[refusal.code])

    return route


def streamed(work: Streamed, *, alive: Message) -> Route:
    """Return the route of a call with one message that is answered by a stream, with the message
    `alive` in it from time to time.

    If the sandbox goes meanwhile, the connection is reset: clients then ask whether it is healthy,
    and tell their user that it is gone. An error in good order they would take for the process's.
    """

    @takes_body(_CALL_MAX)
    async def route(request: Request) -> Response:
        _check_type(request, connect.STREAM_TYPE)
        box = await box_of(request)
        async with AsyncExitStack() as opening:
            try:
                call = Call(request, box, _only_message(await request.body()))
                messages = await opening.enter_async_context(work(call))
            except (ConnectError, SandyardError) as error:
                refusal = _refusal_of(error)
                end = connect.encode_end(connect.error_value(refusal.code, refusal.message))
                return Response(end, media_type=connect.STREAM_TYPE)
            held = opening.pop_all()
        return HeldStream(
            _framed(messages, call, box.services.clock, alive),
            held,
            media_type=connect.STREAM_TYPE,
            headers=_NO_BUFFER,
        )

    return route


def fed(work: Fed) -> Route:
    """Return the route of a call with a stream of messages and one answer."""

    @streams_body
    async def route(request: Request) -> Response:
        _check_type(request, connect.STREAM_TYPE)
        box = await box_of(request)
        try:
            answer = await work(box, _messages(request))
            found = connect.encode_message(answer) + connect.encode_end()
        except (ConnectError, SandyardError) as error:
            refusal = _refusal_of(error)
            found = connect.encode_end(connect.error_value(refusal.code, refusal.message))
        except ClientDisconnect as error:
            raise InvalidArgumentError("the stream did not come whole") from error
        return Response(found, media_type=connect.STREAM_TYPE)

    return route


async def _framed(
    messages: AsyncIterator[Message], call: Call, clock: Clock, alive: Message
) -> AsyncIterator[bytes]:
    try:
        async for message in with_beats(messages, clock, call.ping_s):
            yield connect.encode_message(alive if message is None else message)
    except (ConnectError, GuestNotFoundError) as error:
        refusal = _refusal_of(error)
        yield connect.encode_end(connect.error_value(refusal.code, refusal.message))
    else:
        yield connect.encode_end()


async def until_deadline(
    messages: AsyncIterator[Message], clock: Clock, timeout_ms: int | None
) -> AsyncIterator[Message]:
    """Yield messages until the deadline.

    Raises:
        ConnectError: it is reached.
    """
    if timeout_ms is None:
        async for message in messages:
            yield message
        return
    until = clock.monotonic() + timeout_ms / 1000
    try:
        while True:
            async with clock.timeout(max(0.0, until - clock.monotonic())):
                message = await anext(messages)
            yield message
    except StopAsyncIteration:
        return
    except TimeoutError:
        raise deadline_exceeded() from None


def deadline_exceeded() -> ConnectError:
    """Return the error for a call that has reached its deadline."""
    return ConnectError(connect.Code.DEADLINE_EXCEEDED, "the deadline of the call was reached")


def _refusal_of(error: ConnectError | SandyardError) -> ConnectError:
    """Return an error as Connect has it. Raise it again if its answer is plain HTTP: the sandbox is
    gone, or the body is too large."""
    if isinstance(error, ConnectError):
        return error
    if is_gone(error) or isinstance(error, PayloadTooLargeError):
        raise error
    return ConnectError(code_of(error), message_of(error))


def _check_type(request: Request, wanted: str) -> None:
    given = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if given != wanted:
        raise other_type(given)


def _number(request: Request, header: str) -> int:
    """Return the number in a header, 0 without one."""
    text = request.headers.get(header, "")
    return int(text) if _NUMBER.fullmatch(text) else 0


def _read(payload: bytes) -> Fields:
    """Return a message.

    Raises:
        ConnectError: it is none.
        InvalidArgumentError: it is nested too deep, or has too many values, which take many times
            their size.
    """
    JsonBounds().feed(payload)
    return Fields(connect.read_message(payload))


def _only_message(body: bytes) -> Fields:
    decoder = EnvelopeDecoder()
    decoder.feed(body)
    envelope = decoder.take()
    if envelope is None or envelope.is_end:
        raise ConnectError(connect.Code.INVALID_ARGUMENT, "the request has no message")
    if decoder.take() is not None:
        raise ConnectError(connect.Code.INVALID_ARGUMENT, "the request has more than one message")
    decoder.finish()
    return _read(envelope.payload)


async def _messages(request: Request) -> AsyncIterator[Fields]:
    """Yield the messages of a request as they come."""
    decoder = EnvelopeDecoder()
    async for data in request.stream():
        decoder.feed(data)
        while (envelope := decoder.take()) is not None:
            if envelope.is_end:
                return
            yield _read(envelope.payload)
    decoder.finish()
