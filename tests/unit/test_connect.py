"""The Connect protocol: envelopes in any pieces, and values as strangers write them."""

import contextlib
import json
import struct
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.core.connect import (
    ENVELOPE_MAX,
    STATUS_OF,
    Code,
    ConnectError,
    Envelope,
    EnvelopeDecoder,
    Fields,
    encode_data,
    encode_end,
    encode_message,
    encode_time,
    error_value,
    read_message,
)

DEEP = b'{"a":' * 60 + b"1" + b"}" * 60
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def taken(*pieces: bytes) -> list[Envelope]:
    decoder, found = EnvelopeDecoder(), []
    for one in pieces:
        decoder.feed(one)
        while (envelope := decoder.take()) is not None:
            found.append(envelope)
    decoder.finish()
    return found


@given(
    st.lists(st.dictionaries(st.text(max_size=9), JSON, max_size=4), max_size=5), st.integers(1, 50)
)
def test_a_stream_comes_whole_in_any_pieces(messages: list[dict[str, Any]], size: int) -> None:
    data = b"".join(map(encode_message, messages)) + encode_end(error_value(Code.ABORTED, "why"))
    *found, end = taken(*(data[at : at + size] for at in range(0, len(data), size)))
    assert [read_message(one.payload) for one in found] == messages
    assert end.is_end
    assert json.loads(end.payload) == {"error": {"code": "aborted", "message": "why"}}
    assert taken(encode_end()) == [Envelope(b"{}", is_end=True)]


@given(st.binary(max_size=200))
def test_whatever_comes_is_taken_apart_or_refused(data: bytes) -> None:
    decoder = EnvelopeDecoder()
    decoder.feed(data)
    with contextlib.suppress(ConnectError):  # and no other error
        while (envelope := decoder.take()) is not None:
            read_message(envelope.payload)
        decoder.finish()


@pytest.mark.parametrize(
    ("data", "code"),
    [
        (struct.pack(">BI", 1, 2) + b"{}", Code.UNIMPLEMENTED),
        (struct.pack(">BI", 3, 2) + b"{}", Code.UNIMPLEMENTED),
        (struct.pack(">BI", 4, 2) + b"{}", Code.INVALID_ARGUMENT),
        (struct.pack(">BI", 0, ENVELOPE_MAX + 1), Code.RESOURCE_EXHAUSTED),
        (struct.pack(">BI", 0, 3) + b"{}", Code.INVALID_ARGUMENT),
        (b"\0\0", Code.INVALID_ARGUMENT),
    ],
)
def test_an_envelope_that_is_wrong_is_refused(data: bytes, code: Code) -> None:
    with pytest.raises(ConnectError) as caught:
        taken(data)
    assert caught.value.code is code


def test_a_message_of_the_largest_size_is_taken() -> None:
    data = b'"' + b"x" * (ENVELOPE_MAX - 2) + b'"'
    (envelope,) = taken(struct.pack(">BI", 0, len(data)), data)
    assert len(envelope.payload) == ENVELOPE_MAX


@pytest.mark.parametrize(
    "payload",
    [b"[]", b"1", b"null", b'"x"', b"{", b"\xff", b"[" * 100_000, b'{"a":' * 60 + b"1" + b"}" * 60],
)
def test_a_message_that_is_no_object_is_refused(payload: bytes) -> None:
    with pytest.raises(ConnectError) as caught:
        read_message(payload)
    assert caught.value.code is Code.INVALID_ARGUMENT


def test_nothing_is_an_empty_message() -> None:
    assert read_message(b"") == read_message(b"{}") == {}


def test_values_are_accepted_as_proto3_has_them() -> None:
    kinds = {"TYPE_NONE": 0, "TYPE_FILE": 1}
    told = Fields(
        {
            "isSymlink": True, "size": "12", "data": "_-8", "other": "/+8=", "kind": "TYPE_FILE",
            "number": 1, "symlink_target": "x", "none": None, "args": ["a", ""],
            "envs": {"A": "b"}, "process": {"cmd_line": "ls"}, "float": 3.0, "more": {"new": 1},
        }
    )  # fmt: skip
    assert told.flag("isSymlink")
    assert (told.integer("size"), told.integer("float"), told.integer("none", 7)) == (12, 3, 7)
    assert told.data("data") == told.data("other") == b"\xff\xef"
    assert told.choice("kind", kinds, "") == told.choice("number", kinds, "") == "TYPE_FILE"
    assert told.text("symlinkTarget") == "x"
    assert (told.texts("args"), told.mapping("envs")) == (("a", ""), {"A": "b"})
    process = told.message("process")
    assert process is not None
    assert process.text("cmdLine") == "ls"
    assert "args" in told
    assert "none" not in told
    assert (told.text("absent"), told.data("absent"), told.message("absent")) == ("", b"", None)


def refusal_of(read: Callable[[str], object]) -> ConnectError | None:
    try:
        read("a")
    except ConnectError as error:
        return error
    return None


@given(JSON)
def test_values_of_another_kind_are_refused_by_name(value: Any) -> None:
    told = Fields({"inner": {"a": value}}).message("inner")
    assert told is not None
    for read in (
        told.text, told.flag, told.integer, told.data, told.texts, told.mapping, told.message,
        lambda name: told.choice(name, {"ONE": 1}, "ONE"),
    ):  # fmt: skip
        refusal = refusal_of(read)
        if refusal is not None:
            assert refusal.message.startswith("inner.a must be ")
            assert refusal.code is Code.INVALID_ARGUMENT


def test_what_is_written() -> None:
    assert encode_data(b"\xff\xef") == "/+8="
    assert encode_time(datetime(2026, 1, 2, 3, 4, 5, 600_000, tzinfo=UTC)) == (
        "2026-01-02T03:04:05.600000Z"
    )
    assert set(STATUS_OF) == set(Code)
