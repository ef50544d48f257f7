"""The guest protocol: round trips, bounds, and what a hostile other side may send."""

import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.core import wire
from sandyard.server.core.wire import (
    Answer,
    Channel,
    Decoder,
    Frame,
    Request,
    VersionError,
    Versions,
    WireError,
)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
OBJECTS = st.dictionaries(st.text(), JSON, max_size=5)
FRAMES = st.lists(st.tuples(st.sampled_from(Channel), st.binary(max_size=300)), max_size=8)
CUTS = st.lists(st.integers(1, 40), min_size=1, max_size=5)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    result, at, turn = [], 0, 0
    while at < len(data):
        size = cuts[turn % len(cuts)]
        result.append(data[at : at + size])
        at, turn = at + size, turn + 1
    return result


@given(st.text(), st.text(), OBJECTS, FRAMES, CUTS)
def test_a_request_and_frames_come_back_however_they_are_cut(
    op: str,
    token: str,
    args: dict[str, object],
    frames: list[tuple[Channel, bytes]],
    cuts: list[int],
) -> None:
    data = wire.encode_request(Request(op, token, args))
    data += b"".join(wire.encode_frame(*frame) for frame in frames)
    decoder, request, found = Decoder(), None, []
    for piece in pieces(data, cuts):
        decoder.feed(piece)
        if request is None:
            request = decoder.take_request()
        while request is not None and (frame := decoder.take_frame()) is not None:
            found.append(frame)
    assert request == Request(op, token, args)
    assert found == [Frame(*frame) for frame in frames]
    assert decoder.take_raw() == b""


@given(OBJECTS, st.binary(max_size=100))
def test_an_answer_leaves_the_raw_bytes_behind_it(values: dict[str, object], rest: bytes) -> None:
    decoder = Decoder()
    decoder.feed(wire.encode_answer(Answer(values)) + rest)
    assert decoder.take_answer() == Answer(values)
    assert decoder.take_raw() == rest


@pytest.mark.parametrize("again", [False, True])
def test_both_sides_say_whether_another_operation_may_follow(again: bool) -> None:
    decoder = Decoder()
    decoder.feed(wire.encode_request(Request("hello", "t", {}, again=again)))
    decoder.feed(wire.encode_answer(Answer({}, again=again)))
    request, answer = decoder.take_request(), decoder.take_answer()
    assert request is not None
    assert answer is not None
    assert (request.again, answer.again) == (again, again)
    decoder.feed(b'{"v":1,"token":"t","op":"hello","args":{},"again":1}\n')
    assert decoder.take_request() == Request("hello", "t", {})


@given(
    st.lists(st.tuples(st.sampled_from(Channel), st.binary(max_size=50)), max_size=8),
    st.binary(max_size=50),
    CUTS,
    st.booleans(),
)
def test_the_end_of_frames_is_seen_in_whatever_pieces_they_come(
    frames: list[tuple[Channel, bytes]], exit_payload: bytes, cuts: list[int], is_more: bool
) -> None:
    before = b"".join(wire.encode_frame(*one) for one in frames if one[0] is not Channel.EXIT)
    last = wire.encode_frame(Channel.EXIT, exit_payload)
    seen = wire.LastFrame()
    for piece in pieces(before + last[:-1], cuts):
        seen.feed(piece)
        assert not seen.is_whole
    seen.feed(last[-1:])
    assert seen.is_whole
    if is_more:
        seen.feed(b"x")
        assert not seen.is_whole
        seen.feed(last)
        assert not seen.is_whole


def test_an_error_answer_is_told_with_its_message() -> None:
    decoder = Decoder()
    decoder.feed(wire.encode_answer(Answer({}, error="bad_request", message="no")))
    assert decoder.take_answer() == Answer({}, error="bad_request", message="no")


@given(st.lists(st.binary(max_size=64), max_size=20))
def test_any_bytes_are_understood_or_refused_with_one_error(chunks: list[bytes]) -> None:
    for take in ("take_request", "take_answer", "take_frame"):
        decoder = Decoder()
        try:
            for chunk in chunks:
                decoder.feed(chunk)
                getattr(decoder, take)()
        except WireError:
            pass


@given(JSON)
def test_any_json_head_is_understood_or_refused(value: object) -> None:
    for take in ("take_request", "take_answer"):
        decoder = Decoder()
        decoder.feed(json.dumps(value).encode() + b"\n")
        with contextlib.suppress(WireError):
            getattr(decoder, take)()


@pytest.mark.parametrize(
    "line",
    [
        b"{}\n",
        b'{"v":2,"token":"","op":"hello","args":{}}\n',
        b'{"v":true,"token":"","op":"hello","args":{}}\n',
        b'{"v":1,"now":[],"token":"","op":"hello","args":{}}\n',
        b'{"v":1,"now":' + b"9" * 4000 + b',"token":"","op":"hello","args":{}}\n',
        b'{"v":1,"token":1,"op":"hello","args":{}}\n',
        b'{"v":1,"token":"","op":"hello","args":[]}\n',
        b"[" * 100_000 + b"\n",
        b"\xff\n",
    ],
)
def test_bad_heads_are_refused(line: bytes) -> None:
    decoder = Decoder()
    decoder.feed(line)
    with pytest.raises(WireError):
        decoder.take_request()


SIDE = st.tuples(*[st.integers(1, 9)] * 3).map(sorted)


@given(SIDE, SIDE)
def test_two_sides_understand_each_other_if_their_versions_meet(
    one: list[int], other: list[int]
) -> None:
    writer, reader = (
        Versions(now=now, suffices=suffices, oldest=oldest)
        for oldest, suffices, now in (one, other)
    )
    head = json.loads(json.dumps(writer.head))
    if writer.suffices <= reader.now and writer.now >= reader.oldest:
        reader.check(head)
    else:
        with pytest.raises(VersionError, match=str(reader.now)):
            reader.check(head)


@pytest.mark.parametrize("ahead", [1, 500])
def test_what_a_newer_side_writes_for_older_ones_is_read(ahead: int) -> None:
    head = Versions(now=wire.VERSIONS.now + ahead, suffices=wire.VERSIONS.now, oldest=1).head
    line = json.dumps(head | {"ok": True, "values": {}, "more": 1}).encode() + b"\n"
    decoder = Decoder()
    decoder.feed(line)
    assert decoder.take_answer() == Answer({})


def test_lengths_have_bounds_on_both_sides() -> None:
    with pytest.raises(WireError):
        wire.encode_frame(Channel.STDOUT, bytes(wire.FRAME_MAX + 1))
    decoder = Decoder()
    decoder.feed(bytes((Channel.STDOUT,)) + (wire.FRAME_MAX + 1).to_bytes(4, "big"))
    with pytest.raises(WireError):
        decoder.take_frame()
    decoder = Decoder()
    decoder.feed(b"x" * (wire.HEAD_MAX + 1))
    with pytest.raises(WireError):
        decoder.take_answer()
    with pytest.raises(WireError):
        wire.encode_request(Request("exec", "t", {"command": "x" * wire.REQUEST_MAX}))
    decoder = Decoder()
    decoder.feed(b"x" * (wire.REQUEST_MAX + 1))
    with pytest.raises(WireError):
        decoder.take_request()


def test_an_unknown_channel_is_refused() -> None:
    decoder = Decoder()
    decoder.feed(b"\x09\x00\x00\x00\x00")
    with pytest.raises(WireError):
        decoder.take_frame()


def test_a_token_is_never_printed() -> None:
    assert "s3cret" not in repr(Request("hello", "s3cret", {}))
