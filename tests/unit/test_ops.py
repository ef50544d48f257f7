"""The guest's operations: what one end writes the other reads, and a hostile end is refused."""

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sandyard.server.core import copies, ops, wire
from sandyard.server.core.codec import CodecError, decode, encode
from sandyard.server.core.collect import Collector
from sandyard.server.core.contracts.node import MachineFact, MachineWish, NodeReport, Phase, Way
from sandyard.server.core.shapes import Shape

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
ENV = st.dictionaries(TEXT, TEXT, max_size=3)
NUMBER = st.integers(-(2**40), 2**40)
OPERATIONS = st.one_of(
    st.builds(ops.Hello),
    st.builds(ops.Wake, st.binary(max_size=64), NUMBER, st.booleans()),
    st.builds(
        ops.SetUp, TEXT, ENV, TEXT, TEXT, st.none() | TEXT, st.none() | st.binary(max_size=64),
        st.none() | NUMBER, st.booleans(), st.none() | TEXT, st.none() | NUMBER,
    ),
    st.builds(ops.Execute, TEXT, NUMBER, TEXT, ENV, TEXT, st.booleans()),
    st.builds(ops.Dial, NUMBER),
    st.builds(ops.Flush),
    st.builds(ops.Stats, st.none() | st.floats(0, 1e6)),
)  # fmt: skip
ANSWERS = st.one_of(
    st.builds(ops.Greeting, NUMBER),
    st.builds(ops.Started, NUMBER),
    st.builds(ops.Ended, NUMBER, NUMBER, st.booleans(), st.none() | TEXT),
    st.builds(ops.Done),
    st.builds(ops.Figures, *(st.none() | st.floats(0, 1e9),), st.none() | NUMBER),
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)
KEYS = st.sampled_from(
    ["command", "timeoutMs", "cwd", "env", "user", "stdin", "port", "entropy", "wallNs", "hostname",
     "token", "windowS", "exitCode", "durationMs", "signal", "pid"]
)  # fmt: skip


@given(OPERATIONS, st.text(max_size=20))
def test_an_operation_crosses_the_wire_whole(operation: ops.AnyOperation, token: str) -> None:
    decoder = wire.Decoder()
    decoder.feed(wire.encode_request(ops.request_of(operation, token)))
    request = decoder.take_request()
    assert request is not None
    assert ops.operation_of(request.op, request.args) == operation


@given(ANSWERS)
def test_an_answer_crosses_the_wire_whole(answer: object) -> None:
    assert decode(type(answer), json.loads(json.dumps(encode(answer)))) == answer


@given(st.sampled_from(ops.Op), st.dictionaries(KEYS | st.text(), JSON, max_size=8))
def test_any_arguments_are_understood_or_refused_with_one_error(
    op: ops.Op, args: dict[str, Any]
) -> None:
    with contextlib.suppress(CodecError):
        ops.operation_of(op.value, args)


@given(st.dictionaries(KEYS | st.text(), JSON, max_size=8))
def test_any_answer_is_understood_or_refused_with_one_error(values: dict[str, Any]) -> None:
    asked: list[ops.Operation[Any]] = [ops.Hello(), ops.Stats(), ops.Execute("x", 1), ops.Dial(1)]
    for operation in asked:
        with contextlib.suppress(CodecError):
            ops.answer_of(operation, values)


@given(st.text().filter(lambda name: name not in set(ops.Op)))
def test_an_operation_that_nobody_knows_is_refused(name: str) -> None:
    with pytest.raises(ops.UnknownOperationError):
        ops.operation_of(name, {})


def test_every_operation_is_written_down_once() -> None:
    every = [*vars(ops).values(), *vars(copies).values()]
    found = {one for one in every if isinstance(one, type) and hasattr(one, "answer")}
    # One that adds nothing for the agent is another's, seen otherwise from here.
    kinds = [one for one in found if "op" in vars(one)]
    assert sorted(str(vars(kind)["op"]) for kind in kinds) == sorted(ops.Op)


def test_the_names_on_the_wire_are_those_of_machines_that_run() -> None:
    """Machines outlive an upgrade, and their agents speak as they did."""
    assert encode(ops.Execute("true", 5, "/", {"A": "b"}, "root", True)) == {
        "command": "true", "timeoutMs": 5, "cwd": "/", "env": {"A": "b"}, "user": "root",
        "stdin": True,
    }  # fmt: skip
    assert encode(ops.Wake(b"\0", 7)) == {"entropy": "AA==", "wallNs": 7, "keepsConnections": False}
    assert encode(ops.Stats()) == {}
    assert encode(ops.SetUp("h", {}, "t")) == {
        "hostname": "h", "env": {}, "token": "t", "authorizedKeys": "", "keepsConnections": False,
        "replacesAccess": False,
    }  # fmt: skip
    assert encode(ops.SetUp("h", {}, "t", pace=1.5))["pace"] == 1.5
    end = '{"exitCode": 0, "signal": null, "timedOut": false, "durationMs": 3, "more": [1]}'
    assert decode(ops.Ended, json.loads(end)) == ops.Ended(0, 3)


def test_what_is_secret_is_not_printed() -> None:
    wish = ops.SetUp("h", {"A": "s3cret"}, "s3cret", password_hash="s3cret", entropy=b"s3cret")
    assert "s3cret" not in repr(wish)
    assert "s3cret" not in repr(ops.Execute("true", 1, env={"A": "s3cret"}))


def test_text_that_utf_8_cannot_hold_goes_no_further() -> None:
    ended = decode(ops.Ended, json.loads('{"exitCode":1,"durationMs":1,"signal":"\\ud800"}'))
    assert ended.signal == "?"


# --- what a command says ------------------------------------------------------------------------


def frames(*pieces: tuple[wire.Channel, bytes]) -> bytes:
    return b"".join(wire.encode_frame(*piece) for piece in pieces)


OUT, ERR, EXIT = wire.Channel.STDOUT, wire.Channel.STDERR, wire.Channel.EXIT
END = b'{"exitCode":300,"durationMs":-5,"signal":"SIGTERM","timedOut":false}'


@given(st.integers(1, 60))
def test_output_is_gathered_however_it_is_cut(size: int) -> None:
    data = frames((OUT, b"one"), (ERR, b"two\xff"), (OUT, b"three"), (EXIT, END))
    collector = Collector(100)
    ends = [collector.feed(data[start : start + size]) for start in range(0, len(data), size)]
    assert ends[:-1] == [None] * (len(ends) - 1)
    assert (collector.stdout, collector.stderr) == (b"onethree", b"two\xff")
    # What a guest says of the end is bounded.
    assert ends[-1] == ops.Ended(255, 0, False, "SIGTERM")


def test_output_beyond_the_limit_is_cut_and_that_is_told() -> None:
    collector = Collector(4)
    assert collector.feed(frames((OUT, b"1234"), (ERR, b"1"))) is None
    assert not collector.is_truncated
    assert collector.feed(frames((OUT, b"5"))) is None
    assert collector.is_truncated
    assert collector.stdout == b"1234"


@pytest.mark.parametrize(
    "end", [b"", b"[]", b"{}", b'{"exitCode":"x","durationMs":1}', b"[" * 9999]
)
def test_an_end_that_is_not_told_as_agreed_breaks_the_protocol(end: bytes) -> None:
    with pytest.raises(wire.WireError):
        Collector().feed(frames((EXIT, end)))


def test_words_of_a_newer_node_degrade_what_they_are_said_of_and_nothing_else() -> None:
    known = MachineFact("a", 1, Phase.RUNNING, way=Way.POOL)
    report = NodeReport("n", (known, MachineFact("b", 1, Phase.PAUSED)))
    said = encode(report)
    said["machines"][1] |= {"phase": "frozen", "way": "teleport", "colour": "red"}
    said["weather"] = "fine"
    assert decode(NodeReport, said).machines == (known, MachineFact("b", 1, Phase.UNKNOWN))
    wrongs: tuple[object, ...] = (1, None, True, [], {})
    for wrong in wrongs:
        said["machines"][1]["phase"] = wrong
        with pytest.raises(CodecError):
            decode(NodeReport, said)


def test_a_wish_with_a_word_that_is_unknown_here_is_not_guessed_at() -> None:
    wish = MachineWish("a", 1, "t", Shape(1, 512, 1024), "h", "o", {})
    with pytest.raises(CodecError):
        decode(MachineWish, encode(wish) | {"origin": "cloud"})
