"""Requests to a node and their answers as messages.

    node.<node>.do   {"op", "args", "from"}   control plane → node
    its reply        {"working": true}        every `WORKING_S`, while the request is in progress
                     {"value"} or {"error": {"code", "message", "facts"}}

The names of arguments are those of the operation's fields.
"""

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Final, cast, get_type_hints

from sandyard.server.core.codec import CodecError, decode, encode
from sandyard.server.core.contracts.node import NodeOperation
from sandyard.server.core.errors import InternalError, SandyardError, error_of, kind_of
from sandyard.server.core.node_ops import BY_OP
from sandyard.server.core.ops import AnswerT

TEXT_MAX: Final = 2000
"""As many characters of a text are heard."""
_DEPTH_MAX: Final = 10
WORKING_S: Final = 2.0
SILENCE_S: Final = 5.0
"""After so long without a message, the caller assumes that the request is lost."""


def request_of(operation: NodeOperation[Any]) -> dict[str, object]:
    """Return the request for an operation."""
    names = _fields(operation.op)
    return {"op": operation.op, "args": {one: encode(getattr(operation, one)) for one in names}}


def operation_of(values: Mapping[str, object]) -> NodeOperation[Any]:
    """Return the requested operation.

    Raises:
        CodecError: it is unknown, or its arguments are invalid.
    """
    op, args = str(values.get("op")), values.get("args")
    if op not in BY_OP:
        raise CodecError("there is no such operation")
    if not isinstance(args, dict):
        raise CodecError("the arguments are not an object")
    fields = _fields(op)
    found = {name: decode(fields[name], raw) for name, raw in args.items() if name in fields}
    try:
        return BY_OP[op](**found)
    except TypeError as error:
        raise CodecError("an argument is missing") from error


def answer_of(operation: NodeOperation[AnswerT], raw: object) -> AnswerT:
    """Return an operation's answer from its JSON value.

    Raises:
        CodecError: it is not of the answer's type.
    """
    if operation.answer is None:
        return cast("AnswerT", None)
    answer: AnswerT = decode(operation.answer, raw if operation.answer is bytes else _plain(raw))
    return answer


@functools.cache
def _fields(op: str) -> Mapping[str, Any]:
    """Return the types of an operation's fields."""
    hints = get_type_hints(BY_OP[op])
    return {one.name: hints[one.name] for one in dataclasses.fields(BY_OP[op])}


def _plain(raw: object, depth: int = 0) -> object:
    """Return a node's error with its texts shortened and limited to characters that any database
    accepts: the node may be hostile."""
    if isinstance(raw, str):
        return raw[:TEXT_MAX].replace("\0", "").encode(errors="replace").decode()
    if isinstance(raw, list):
        return [_plain(one, depth + 1) for one in raw] if depth < _DEPTH_MAX else []
    if isinstance(raw, dict):
        return {name: _plain(one, depth + 1) for name, one in raw.items() if depth < _DEPTH_MAX}
    return raw


def failure(error: SandyardError) -> dict[str, object]:
    """Return the JSON form of an error."""
    return {
        "error": {
            "kind": kind_of(error),
            "code": error.code.value,
            "message": error.text,
            "facts": dict(error.facts),
        }
    }


def failed(values: object) -> SandyardError:
    """Return the error from its JSON form."""
    values = _plain(values)
    if not isinstance(values, dict):
        return InternalError("a node sent an error in an unknown format")
    facts = values.get("facts")
    known = {
        str(name): one
        for name, one in (facts.items() if isinstance(facts, dict) else ())
        if isinstance(one, str | int)
    }
    return error_of(
        str(values.get("kind")), str(values.get("code")), str(values.get("message")), known
    )
