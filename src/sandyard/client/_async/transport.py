"""Sends calls over httpx: the only place of the SDK that knows of sockets."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Self, TypeVar

import httpx

from sandyard.client._async.concurrency import Event, sleep
from sandyard.client.calls import Call, Retries, refusal_of, result_of
from sandyard.client.config import ClientConfig
from sandyard.client.errors import ApiError, ConnectionFailedError
from sandyard.client.requests import (
    client_options,
    configured,
    failed,
    options_of,
    pause_after,
)
from sandyard.client.streams import EVENTS_S, EventT, Followed

T = TypeVar("T")


class AsyncTransport:
    """One pool of connections to a server."""

    def __init__(self, config: ClientConfig, *, retries: int) -> None:
        self.config = config
        self.retries = retries
        with configured(config):
            self._http = httpx.AsyncClient(**client_options(config))

    async def __aenter__(self) -> Self:
        """Return this."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close it."""
        await self.close()

    async def close(self) -> None:
        """Close the connection."""
        await self._http.aclose()

    async def send(self, call: Call[T]) -> T:
        """Send a call, repeat it if that is safe and useful, and return its result.

        Raises:
            ConnectionFailedError: the server cannot be reached, or the connection broke.
            ApiError: the server refused.
        """
        answer = await self._answer(call)
        if answer.status_code == httpx.codes.NOT_MODIFIED:  # only `send_raw` asks for it
            raise refusal_of(answer.status_code, answer.content, json.loads)
        return result_of(call, answer.status_code, answer.content, json.loads)

    async def send_raw(self, call: Call[Any]) -> bytes | None:
        """Send a call and return the bytes of its answer, None if nothing has changed (304)."""
        answer = await self._answer(call)
        return None if answer.status_code == httpx.codes.NOT_MODIFIED else answer.content

    async def _answer(self, call: Call[Any]) -> httpx.Response:
        retries = Retries(self.retries)
        while True:
            try:
                answer = await self._http.request(call.method, call.path, **options_of(call))
            except httpx.HTTPError as error:
                pause_s = retries.pause_s(call)
                if pause_s is None:
                    raise failed(self.config.url, error) from error
            else:
                if answer.is_success or answer.status_code == httpx.codes.NOT_MODIFIED:
                    return answer
                pause_s = pause_after(retries, call, answer, answer.content)
            await sleep(pause_s)

    @asynccontextmanager
    async def stream(self, call: Call[Any]) -> AsyncIterator[httpx.Response]:
        """Send a call whose answer is read as it comes. See `send`; what breaks off in the middle
        is not sent again."""
        retries = Retries(self.retries)
        while True:
            try:
                async with self._http.stream(call.method, call.path, **options_of(call)) as answer:
                    if answer.is_success:
                        yield answer
                        return
                    pause_s = pause_after(retries, call, answer, await answer.aread())
            except (httpx.HTTPError, httpx.StreamError) as error:
                raise failed(self.config.url, error) from error
            await sleep(pause_s)

    async def follow(
        self, followed: Followed[EventT], *, until: Event | None = None
    ) -> AsyncIterator[EventT]:
        """Yield what is followed to its end, over connections that break. After `until` is
        set, this ends with the next line.

        Raises:
            ApiError: the server refused, or reported why it is over.
            ConnectionFailedError: it was unreachable for two minutes, or several seconds at first.
        """
        while not followed.is_over:
            try:
                call = Call("GET", followed.path, bool, query=followed.query, limit_s=EVENTS_S)
                async with self.stream(call) as answer:
                    for one in followed.began():
                        yield one
                    async for line in answer.aiter_lines():
                        if (event := followed.feed(line)) is not None:
                            yield event
                        if followed.is_over:
                            return
                        if until is not None and until.is_set():
                            return
                pause_s = followed.ended()
            except ApiError as error:
                pause_s = followed.refused(error)
            except ConnectionFailedError as error:
                pause_s = followed.broke(error)
            await sleep(pause_s)
