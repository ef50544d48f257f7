"""The proxy: passes one HTTP exchange or upgrade on to a port of a sandbox, with back-pressure.

It holds no policy: who may enter, and how headers are rewritten, is the caller's decision.
"""

import asyncio
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from http import HTTPStatus

import h11
from starlette.types import Receive, Scope

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.front.answer import ProxyAnswer
from sandyard.server.front.exchange import REQUEST_TRAILERS, GuestExchange, send_body, until_gone
from sandyard.server.front.headers import (
    Headers,
    takes_trailers,
    trailers_of,
    waits_to_go_on,
)
from sandyard.server.front.relay import relay
from sandyard.server.tasks import concurrently

_ANSWER_S = 300.0
_CONTINUE_S = 1.0  # how long clients wait, too


class UnsendableError(Exception):
    """The request has a header that HTTP does not allow."""


@dataclass(frozen=True)
class Passage:
    """How a request is passed on.

    `target` is path and query, `headers` are those for the guest without framing. `rewrite` turns
    the guest's headers into the client's.
    """

    target: bytes
    headers: Headers
    rewrite: Callable[[Headers], list[tuple[bytes, bytes]]]


Dialing = AbstractAsyncContextManager[ByteStream]


async def pass_on(
    scope: Scope,
    receive: Receive,
    passage: Passage,
    dialing: Dialing,
    answer: ProxyAnswer,
    clock: Clock,
) -> None:
    """Send a request to the guest as it arrives, and its answer back as it arrives.

    Raises:
        UnsendableError: the request is malformed.
        GoneError: the client has left.
        HungUpError: the guest closed the connection before it answered.
        TimeoutError: the guest did not answer.
        h11.RemoteProtocolError: the guest does not speak HTTP/1.1.
        What `dialing` raises.
    """
    length, is_chunked = _framing_of(scope["headers"])
    has_trailers = takes_trailers(scope["headers"])
    framing = [(b"connection", b"close, TE" if has_trailers else b"close")]
    if has_trailers:
        framing.append((b"te", b"trailers"))
    if is_chunked:
        framing.append((b"transfer-encoding", b"chunked"))
    elif length is not None:
        framing.append((b"content-length", length))
    request = _request(scope, passage, framing)
    async with dialing as there:
        exchange = GuestExchange(there, clock)
        await there.write(exchange.send(request))
        has_body = is_chunked or length not in (None, b"0")
        if not has_body:
            await there.write(exchange.send(h11.EndOfMessage()))
        elif waits_to_go_on(scope["headers"]):
            # The guest decides whether the body is sent, so it is not read from the client before.
            early = await exchange.early_response(_CONTINUE_S)
            if early is not None:
                # Begun before anything is read: reading tells the client to send its body.
                await _begin(early, passage, answer, is_last=True)
                async with concurrently(until_gone(receive)):
                    await _copy(exchange, answer)
                return
        sent = asyncio.Event()
        sending = send_body(
            receive,
            exchange,
            clock,
            has_body=has_body,
            trailers=lambda: trailers_of(scope.get("extensions", {}).get(REQUEST_TRAILERS, ())),
            sent=sent,
        )
        async with concurrently(sending):
            await _begin(await _response(exchange, sent, clock), passage, answer)
            await _copy(exchange, answer)


async def tunnel(
    scope: Scope, passage: Passage, dialing: Dialing, answer: ProxyAnswer, clock: Clock
) -> None:
    """Ask the guest for a WebSocket, and relay bytes both ways once it agrees.

    Raises: see `pass_on`.
    """
    framing = [(b"connection", b"Upgrade"), (b"upgrade", b"websocket")]
    request = _request(scope, passage, framing)
    async with dialing as there:
        exchange = GuestExchange(there, clock)
        await there.write(exchange.send(request) + exchange.send(h11.EndOfMessage()))
        async with clock.timeout(_ANSWER_S):
            response = await exchange.response()
        await _begin(response, passage, answer)
        if response.status_code == HTTPStatus.SWITCHING_PROTOCOLS:
            rest, _ = exchange.rest()
            client: ByteStream = scope["stream"]
            if rest:
                await client.write(rest)
            await relay(client, there)
        else:
            async for piece in exchange.body():
                await answer.write(piece)
        await answer.end()


def _request(scope: Scope, passage: Passage, framing: list[tuple[bytes, bytes]]) -> h11.Request:
    try:
        return h11.Request(
            method=scope.get("method", "GET"),
            target=passage.target,
            headers=[*passage.headers, *framing],
        )
    except h11.LocalProtocolError as error:
        raise UnsendableError from error


async def _begin(
    response: h11.Response | h11.InformationalResponse,
    passage: Passage,
    answer: ProxyAnswer,
    *,
    is_last: bool = False,
) -> None:
    """Send the head of the guest's answer; with `is_last` the connection is closed after it."""
    given = [(bytes(name), bytes(value)) for name, value in response.headers]
    headers = passage.rewrite(given)
    if is_last:
        headers.append((b"connection", b"close"))
    # Whether there are trailers is known only after the body.
    may_have_trailers = any(name == b"transfer-encoding" for name, _ in given)
    await answer.begin(response.status_code, headers, may_have_trailers=may_have_trailers)


async def _copy(exchange: GuestExchange, answer: ProxyAnswer) -> None:
    async for piece in exchange.body():
        await answer.write(piece)
    await answer.end(exchange.trailers)


async def _response(
    exchange: GuestExchange, sent: asyncio.Event, clock: Clock
) -> h11.Response | h11.InformationalResponse:
    """Return the head of the guest's answer. The limit counts from when the guest has the whole
    request: a large or slow body takes its own time."""
    async with concurrently(exchange.response()) as response:
        async with concurrently(sent.wait()) as whole:
            await asyncio.wait([response, whole], return_when=asyncio.FIRST_COMPLETED)
        async with clock.timeout(_ANSWER_S):
            return await response


def _framing_of(headers: Headers) -> tuple[bytes | None, bool]:
    """Return the Content-Length of a request, and whether its body is chunked instead."""
    length = next((value for name, value in headers if name == b"content-length"), None)
    is_chunked = any(name == b"transfer-encoding" for name, _ in headers)
    return (None if is_chunked else length), is_chunked
