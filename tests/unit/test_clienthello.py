"""The name in a TLS client's first message, however it arrives."""

import ssl
import struct
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.core.clienthello import HELLO_MAX, HelloReader, NotHelloError


def real_hello(name: str | None) -> bytes:
    """Return the first message of Python's own client."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = name is not None
    if name is None:
        context.verify_mode = ssl.CERT_NONE
    client = context.wrap_bio(incoming, outgoing, server_hostname=name)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    return outgoing.read()


def vector(size: int, content: bytes) -> bytes:
    return len(content).to_bytes(size, "big") + content


def server_name(*names: bytes, kind: int = 0) -> bytes:
    listed = b"".join(bytes([kind]) + vector(2, one) for one in names)
    return struct.pack(">H", 0) + vector(2, vector(2, listed))


def hello(*extensions: bytes, records: int = 1) -> bytes:
    """Return a first message with these extensions, in so many records."""
    body = b"\3\3" + bytes(32) + vector(1, b"") + vector(2, b"\x13\x01") + vector(1, b"\0")
    body += vector(2, b"".join(extensions))
    message = b"\1" + vector(3, body)
    size = -(-len(message) // records)
    pieces = [message[at : at + size] for at in range(0, len(message), size)]
    return b"".join(b"\x16\3\1" + vector(2, one) for one in pieces)


def name_in(data: bytes) -> str | None:
    reader = HelloReader()
    assert reader.feed(data)
    return reader.name()


def test_the_name_of_a_real_client_is_read() -> None:
    assert name_in(real_hello("example.com")) == "example.com"
    assert name_in(real_hello(None)) is None


@given(st.lists(st.integers(1, 600), max_size=20), st.integers(1, 40))
def test_it_may_come_in_any_pieces_and_records(cuts: list[int], records: int) -> None:
    data = hello(b"\x0a\x0a" + vector(2, bytes(300)), server_name(b"a.test"), records=records)
    reader, edges = HelloReader(), sorted({0, len(data), *(one for one in cuts if one < len(data))})
    ends = [reader.feed(data[begin:end]) for begin, end in pairwise(edges)]
    assert ends == [False] * (len(ends) - 1) + [True]
    assert reader.name() == "a.test"
    assert reader.received == data


def test_byte_by_byte() -> None:
    data, reader = hello(server_name(b"a.test")), HelloReader()
    assert [reader.feed(bytes([one])) for one in data] == [False] * (len(data) - 1) + [True]


@pytest.mark.parametrize(
    "extensions",
    [
        (server_name(b"a.test"), server_name(b"b.test")), (server_name(b"a.test", b"b.test"),),
        (server_name(b"a.test", kind=1),), (server_name(b"\xff.test"),), (server_name(),),
        (struct.pack(">HH", 0, 9) + b"short",),
    ],
)  # fmt: skip
def test_two_names_or_odd_ones_are_refused(extensions: tuple[bytes, ...]) -> None:
    with pytest.raises(NotHelloError):
        name_in(hello(*extensions))


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.1\r\n", b"\x16\2\1", b"\x17\3\3", b"\x16\3\1\0\0", b"\x16\3\1\xff\xff",
        b"\x16\3\1" + vector(2, b"\2" + vector(3, bytes(40))),
        b"\x16\3\1" + vector(2, b"\1" + (HELLO_MAX + 1).to_bytes(3, "big")),
        (b"\x16\3\1" + vector(2, b"\1\0\x3f\xff" + bytes(60))) * 300,
    ],
)  # fmt: skip
def test_what_is_no_first_message_is_refused_at_once(data: bytes) -> None:
    with pytest.raises(NotHelloError):
        HelloReader().feed(data)


@given(st.binary(max_size=400))
def test_garbage_is_refused_or_not_complete(data: bytes) -> None:
    for start in (b"", b"\x16\3\1\1\0\1\0\0\xfc\3\3"):
        reader = HelloReader()
        try:
            if reader.feed(start + data):
                reader.name()
        except NotHelloError:
            pass
