"""Calls as httpx takes them, and its failures as errors of the SDK; no I/O."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from sandyard.client.calls import Call, Retries, refusal_of
from sandyard.client.config import ClientConfig, ConfigError
from sandyard.client.errors import ConnectionFailedError, TimedOutError

_CONNECT_S = 5.0


def failed(url: str, error: Exception) -> ConnectionFailedError:
    """Return the error for a request that failed."""
    kind = TimedOutError if isinstance(error, httpx.TimeoutException) else ConnectionFailedError
    return kind(f"cannot reach {url}: {str(error) or type(error).__name__}")


def options_of(call: Call[Any]) -> dict[str, Any]:
    """Return the options of httpx's request for a call."""
    options: dict[str, Any] = {
        "params": dict(call.query),
        "headers": dict(call.headers),
        "timeout": httpx.Timeout(call.limit_s, connect=_CONNECT_S),
    }
    if call.content is not None:
        options["content"] = call.content
    elif call.body is not None:
        options["content"] = _encoded(call.body)
        options["headers"] = {"Content-Type": "application/json", **call.headers}
    return options


def pause_after(retries: Retries, call: Call[Any], answer: httpx.Response, body: bytes) -> float:
    """Return after how many seconds a call that was refused is sent again.

    Raises:
        ApiError: it is not.
    """
    after = answer.headers.get("retry-after")
    seconds = retries.pause_s(call, status=answer.status_code, retry_after=after)
    if seconds is None:
        raise refusal_of(answer.status_code, body, json.loads)
    return seconds


def _encoded(body: Any) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:  # what is no Unicode is for the server to refuse
        return json.dumps(body).encode()


def client_options(config: ClientConfig) -> dict[str, Any]:
    """Return the options of httpx's client for a server."""
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
def configured(config: ClientConfig) -> Iterator[None]:
    """Raise ConfigError if the configuration, or a proxy that the environment names, cannot be
    used."""
    try:
        yield
    except (httpx.InvalidURL, ImportError, ValueError) as error:
        raise ConfigError(f"cannot connect to {config.url}: {error}") from error
