"""The requests that a control plane sends to a node, and their encoding: the contract's own
methods.

    node.<node>.do   {"op", "args", "from"}   control plane → node
    its reply        {"working": true}        every `WORKING_S`, while the request is in progress
                     {"value"} or {"error": {"code", "message", "facts"}}
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, get_type_hints

from sandyard.server.core.codec import CodecError, decode, encode
from sandyard.server.core.contracts.node import NodeControl, NodeExports, NodeVersions
from sandyard.server.core.errors import InternalError, SandyardError, error_of, kind_of

TEXT_MAX: Final = 2000
"""As many characters of a text are heard."""
_DEPTH_MAX: Final = 10
WORKING_S: Final = 2.0
SILENCE_S: Final = 5.0
"""After so long without a message, the caller assumes that the request is lost."""


@dataclass(frozen=True)
class NodeMethod:
    """One method of a node: its parameters and its return type."""

    name: str
    takes: Mapping[str, Any]
    returns: Any
    is_wish: bool
    may_leave_out: frozenset[str]

    def written(self, args: Mapping[str, object]) -> dict[str, Any]:
        """Return arguments as JSON values."""
        return {name: encode(value) for name, value in args.items()}

    def read(self, raw: object) -> dict[str, Any]:
        """Return arguments from their JSON values.

        Raises:
            CodecError: they do not match the method's parameters.
        """
        if not isinstance(raw, dict):
            raise CodecError("the arguments are not an object")
        found = {name: decode(kind, raw[name]) for name, kind in self.takes.items() if name in raw}
        if missing := set(self.takes) - set(found) - self.may_leave_out:
            raise CodecError(f"{', '.join(sorted(missing))} is missing")
        return found

    def answer(self, raw: object) -> Any:
        """Return a method's result from its JSON value.

        Raises:
            CodecError: it does not match the return type.
        """
        if self.returns is type(None):
            return None
        return decode(self.returns, raw if self.returns is bytes else _plain(raw))


def _ask(contract: type, name: str, *, is_wish: bool = True) -> NodeMethod:
    method = getattr(contract, name)
    hints = get_type_hints(method)
    returns = hints.pop("return")
    parameters = inspect.signature(method).parameters
    optional = {one for one in hints if parameters[one].default is not inspect.Parameter.empty}
    return NodeMethod(name, hints, returns, is_wish, frozenset(optional))


ASKS: Final[Mapping[str, NodeMethod]] = {
    one.name: one
    for one in (
        _ask(NodeControl, "ensure_running"),
        _ask(NodeControl, "ensure_paused"),
        _ask(NodeControl, "ensure_gone"),
        _ask(NodeControl, "ensure_snapshot"),
        _ask(NodeControl, "drop_snapshot"),
        _ask(NodeControl, "ensure_network"),
        _ask(NodeExports, "withdraw"),
        _ask(NodeVersions, "keep_version"),
        _ask(NodeVersions, "prepare_version"),
        _ask(NodeVersions, "drop_version"),
        _ask(NodeVersions, "drop_stages"),
        _ask(NodeControl, "find_machine", is_wish=False),
        _ask(NodeControl, "find_snapshot", is_wish=False),
        _ask(NodeControl, "find_room", is_wish=False),
        _ask(NodeControl, "console", is_wish=False),
        _ask(NodeControl, "connections", is_wish=False),
        _ask(NodeControl, "report", is_wish=False),
        _ask(NodeControl, "templates", is_wish=False),
    )
}
"""By name; a wish changes something."""


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


def failed(told: object) -> SandyardError:
    """Return the error from its JSON form."""
    told = _plain(told)
    if not isinstance(told, dict):
        return InternalError("a node sent an error in an unknown format")
    facts = told.get("facts")
    known = {
        str(name): one
        for name, one in (facts.items() if isinstance(facts, dict) else ())
        if isinstance(one, str | int)
    }
    return error_of(str(told.get("kind")), str(told.get("code")), str(told.get("message")), known)
