"""Sends calls over httpx: the only place of the SDK that knows of sockets."""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, Self, TypeVar

import httpx

from sandyard.client.archives import Progress
from sandyard.client.calls import Call, Retries, refusal_of, result_of
from sandyard.client.config import ClientConfig, ConfigError
from sandyard.client.errors import ApiError, ConnectionFailedError, TimedOutError, TransferError
from sandyard.client.streams import EVENTS_S, EventT, Followed

T = TypeVar("T")
_CONNECT_S = 5.0


def _failed(url: str, error: Exception) -> ConnectionFailedError:
    kind = TimedOutError if isinstance(error, httpx.TimeoutException) else ConnectionFailedError
    return kind(f"cannot reach {url}: {str(error) or type(error).__name__}")


def _limits(call: Call[Any]) -> httpx.Timeout:
    return httpx.Timeout(call.limit_s, connect=_CONNECT_S)


def _asked(call: Call[Any]) -> dict[str, Any]:
    asked: dict[str, Any] = {
        "params": dict(call.query), "headers": dict(call.headers), "timeout": _limits(call),
    }  # fmt: skip
    if call.content is not None:
        asked["content"] = call.content
    elif call.body is not None:
        asked["content"] = _encoded(call.body)
        asked["headers"] = {"Content-Type": "application/json", **call.headers}
    return asked


class Transport:
    """One pooled connection to a server, for threads."""

    def __init__(self, config: ClientConfig, *, retries: int) -> None:
        self.config = config
        self.retries = retries
        with _configured(config):
            self._http = httpx.Client(**_options(config))

    def __enter__(self) -> Self:
        """Return this."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it."""
        self.close()

    def close(self) -> None:
        """Close the connection."""
        self._http.close()

    def send(self, call: Call[T]) -> T:
        """Send a call, repeat it if that is safe and useful, and return its result.

        Raises:
            ConnectionFailedError: the server cannot be reached, or the connection broke.
            ApiError: the server refused.
        """
        retries = Retries(self.retries)
        while True:
            try:
                answer = self._http.request(call.method, call.path, **_asked(call))
            except httpx.HTTPError as error:
                pause_s = retries.pause_s(call)
                if pause_s is None:
                    raise _failed(self.config.url, error) from error
            else:
                if answer.is_success:
                    return result_of(call, answer.status_code, answer.content, json.loads)
                pause_s = _pause_s(retries, call, answer, answer.content)
            time.sleep(pause_s)

    def send_raw(self, call: Call[Any]) -> bytes | None:
        """Send a call and return the bytes of its answer, None if nothing has changed (304)."""
        retries = Retries(self.retries)
        while True:
            try:
                answer = self._http.request(call.method, call.path, **_asked(call))
            except httpx.HTTPError as error:
                pause_s = retries.pause_s(call)
                if pause_s is None:
                    raise _failed(self.config.url, error) from error
            else:
                if answer.is_success:
                    return answer.content
                if answer.status_code == httpx.codes.NOT_MODIFIED:
                    return None
                pause_s = _pause_s(retries, call, answer, answer.content)
            time.sleep(pause_s)

    @contextmanager
    def stream(self, call: Call[Any]) -> Iterator[httpx.Response]:
        """Send a call whose answer is read as it comes. See `send`; what breaks off in the middle
        is not sent again."""
        retries = Retries(self.retries)
        while True:
            try:
                with self._http.stream(call.method, call.path, **_asked(call)) as answer:
                    if answer.is_success:
                        yield answer
                        return
                    pause_s = _pause_s(retries, call, answer, answer.read())
            except (httpx.HTTPError, httpx.StreamError) as error:
                raise _failed(self.config.url, error) from error
            time.sleep(pause_s)

    def follow(
        self, followed: Followed[EventT], *, until: threading.Event | None = None
    ) -> Iterator[EventT]:
        """Yield what is followed to its end, over connections that break. Soon after another thread
        has set `until`, this ends.

        Raises:
            ApiError: the server refused, or told why it is over.
            ConnectionFailedError: it was unreachable for two minutes, or several seconds at first.
        """
        while not followed.is_over:
            try:
                call = Call("GET", followed.path, bool, query=followed.query, limit_s=EVENTS_S)
                with self.stream(call) as answer:
                    yield from followed.began()
                    for line in answer.iter_lines():
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
            time.sleep(pause_s)


class AsyncTransport:
    """The same for asyncio."""

    def __init__(self, config: ClientConfig, *, retries: int) -> None:
        self.config = config
        self.retries = retries
        with _configured(config):
            self._http = httpx.AsyncClient(**_options(config))

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
        """See `Transport.send`."""
        retries = Retries(self.retries)
        while True:
            try:
                answer = await self._http.request(call.method, call.path, **_asked(call))
            except httpx.HTTPError as error:
                pause_s = retries.pause_s(call)
                if pause_s is None:
                    raise _failed(self.config.url, error) from error
            else:
                if answer.is_success:
                    return result_of(call, answer.status_code, answer.content, json.loads)
                pause_s = _pause_s(retries, call, answer, answer.content)
            await asyncio.sleep(pause_s)

    async def send_raw(self, call: Call[Any]) -> bytes | None:
        """See `Transport.send_raw`."""
        retries = Retries(self.retries)
        while True:
            try:
                answer = await self._http.request(call.method, call.path, **_asked(call))
            except httpx.HTTPError as error:
                pause_s = retries.pause_s(call)
                if pause_s is None:
                    raise _failed(self.config.url, error) from error
            else:
                if answer.is_success:
                    return answer.content
                if answer.status_code == httpx.codes.NOT_MODIFIED:
                    return None
                pause_s = _pause_s(retries, call, answer, answer.content)
            await asyncio.sleep(pause_s)

    @asynccontextmanager
    async def stream(self, call: Call[Any]) -> AsyncIterator[httpx.Response]:
        """See `Transport.stream`."""
        retries = Retries(self.retries)
        while True:
            try:
                async with self._http.stream(call.method, call.path, **_asked(call)) as answer:
                    if answer.is_success:
                        yield answer
                        return
                    pause_s = _pause_s(retries, call, answer, await answer.aread())
            except (httpx.HTTPError, httpx.StreamError) as error:
                raise _failed(self.config.url, error) from error
            await asyncio.sleep(pause_s)

    async def follow(self, followed: Followed[EventT]) -> AsyncIterator[EventT]:
        """See `Transport.follow`."""
        while not followed.is_over:
            try:
                call = Call("GET", followed.path, bool, query=followed.query, limit_s=EVENTS_S)
                async with self.stream(call) as answer:
                    for event in followed.began():
                        yield event
                    async for line in answer.aiter_lines():
                        told = followed.feed(line)
                        if told is not None:
                            yield told
                        if followed.is_over:
                            return
                pause_s = followed.ended()
            except ApiError as error:
                pause_s = followed.refused(error)
            except ConnectionFailedError as error:
                pause_s = followed.broke(error)
            await asyncio.sleep(pause_s)


def _pause_s(retries: Retries, call: Call[Any], answer: httpx.Response, body: bytes) -> float:
    """Return after how long a call that was refused is sent again.

    Raises:
        ApiError: it is not.
    """
    after = answer.headers.get("retry-after")
    pause_s = retries.pause_s(call, status=answer.status_code, retry_after=after)
    if pause_s is None:
        raise refusal_of(answer.status_code, body, json.loads)
    return pause_s


def _encoded(body: Any) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # what is no Unicode is for the server to refuse
        return json.dumps(body).encode()


def _options(config: ClientConfig) -> dict[str, Any]:
    return {
        "base_url": config.url,
        "headers": {
            "Authorization": f"Bearer {config.api_key}",
            "User-Agent": "sandyard-python",
            "Sandyard-Strict": "1",
        },
        # Streams stay open for hours; nothing else is to wait for them.
        "limits": httpx.Limits(max_connections=None, max_keepalive_connections=20),
    }


@contextmanager
def _configured(config: ClientConfig) -> Iterator[None]:
    """Tell what of the configuration, or of the environment's proxies, cannot be used."""
    try:
        yield
    except (httpx.InvalidURL, ImportError, ValueError) as error:
        raise ConfigError(f"cannot connect to {config.url}: {error}") from error


async def in_own_thread(
    transport: AsyncTransport,
    work: Callable[[Transport, Progress], T],
    on_progress: Progress | None,
) -> T:
    """Do what reads and writes files here beside the loop, over a connection of its own, and return
    its result; if cancelled, it ends with the piece that is on its way.

    `work` is given the connection, and whom to tell of each number of bytes that went by.
    """
    is_over = threading.Event()

    def told(count: int) -> None:
        if is_over.is_set():
            raise TransferError("the copy was cancelled")
        if on_progress is not None:
            on_progress(count)

    def do() -> T:
        with Transport(transport.config, retries=transport.retries) as own:
            return work(own, told)

    try:
        return await asyncio.to_thread(do)
    finally:
        is_over.set()
