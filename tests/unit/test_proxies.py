"""Clients behind proxies: who is believed, and what is never passed on."""

import asyncio
from ipaddress import ip_network
from typing import Any

import pytest

from sandyard.server.front.proxies import TrustedProxies

TRUSTED = [ip_network("127.0.0.1"), ip_network("10.0.0.0/8"), ip_network("fd00::/8")]


def seen(
    client: str | None, *forwarded: bytes, scheme: str = "http", proto: bytes | None = None
) -> tuple[Any, str]:
    """Return the client and scheme that an application sees."""
    found: list[Any] = []

    async def app(scope: Any, _receive: Any, _send: Any) -> None:
        found.append(scope)

    headers = [(b"x-forwarded-for", one) for one in forwarded]
    if proto is not None:
        headers.append((b"x-forwarded-proto", proto))
    scope = {
        "type": "http", "scheme": scheme, "headers": headers,
        "client": None if client is None else (client, 1234),
    }  # fmt: skip
    nothing: Any = None
    asyncio.run(TrustedProxies(app, TRUSTED)(scope, nothing, nothing))
    return found[0]["client"], found[0]["scheme"]


@pytest.mark.parametrize(
    ("forwarded", "client"),
    [
        ((b"192.0.2.1",), "192.0.2.1"),
        ((b"192.0.2.1:4711",), "192.0.2.1"),
        ((b"2001:db8::1",), "2001:db8::1"),
        ((b"[2001:db8::1]:4711",), "2001:db8::1"),
        ((b"::ffff:192.0.2.1",), "192.0.2.1"),
        # What the client claims itself stands before what a trusted proxy saw.
        ((b"198.51.100.9, 192.0.2.1",), "192.0.2.1"),
        ((b"198.51.100.9", b"192.0.2.1"), "192.0.2.1"),
        ((b"192.0.2.1, 10.0.0.2, 10.0.0.3",), "192.0.2.1"),
        ((b"192.0.2.1, fd00::2",), "192.0.2.1"),
        # What is no address ends the search at the last that was one.
        ((b"<script>",), "127.0.0.1"),
        ((b"192.0.2.1, nonsense, 10.0.0.2",), "10.0.0.2"),
        ((b"192.0.2.1,",), "127.0.0.1"),
        ((b"\xff\xfe",), "127.0.0.1"),
        ((b"",), "127.0.0.1"),
        ((), "127.0.0.1"),
        ((b", ".join([b"10.0.0.9"] * 5000),), "10.0.0.9"),
    ],
)
def test_the_client_is_the_first_that_no_trusted_proxy_is(
    forwarded: tuple[bytes, ...], client: str
) -> None:
    found, _ = seen("127.0.0.1", *forwarded)
    assert found[0] == client


@pytest.mark.parametrize("client", ["192.0.2.7", "127.0.0.2", "2001:db8::7", "unknown", None])
def test_others_are_not_believed(client: str | None) -> None:
    found, scheme = seen(client, b"198.51.100.9", proto=b"https")
    assert found == (None if client is None else (client, 1234))
    assert scheme == "http"


@pytest.mark.parametrize(
    ("proto", "scheme", "expected"),
    [
        (b"https", "http", "https"), (b"HTTPS", "http", "https"), (b"https", "ws", "wss"),
        (b"wss", "ws", "wss"), (b"http", "http", "http"), (b"javascript", "http", "http"),
        (b"http, https", "http", "https"), (b"https, http", "http", "http"), (b"", "ws", "ws"),
    ],
)  # fmt: skip
def test_the_scheme_is_one_of_http(proto: bytes, scheme: str, expected: str) -> None:
    assert seen("10.1.2.3", b"192.0.2.1", scheme=scheme, proto=proto)[1] == expected
