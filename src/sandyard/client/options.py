"""The options of calls: names and types for editors and type checkers, checked at runtime too."""

import difflib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal, TypedDict, TypeVar, get_args

F = TypeVar("F", bound=Callable[..., Any])


class ChangeOptions(TypedDict, total=False):
    """What can be changed of a sandbox; what is left out stays."""

    name: str | None
    """None removes it."""
    tags: Sequence[str]
    idle_timeout: int
    """Seconds without use until it is paused; 0: never."""
    metadata: Mapping[str, Any]
    project_id: str
    auto_resume: bool
    """Whether a use resumes it when it is paused."""
    expires_in: int
    """Seconds from now until its end; 0: none."""
    on_expiry: Literal["destroy", "pause"]
    network: Mapping[str, Any]
    """What it may reach: `egress` (`allow` or `deny`), `allow`, `deny`, `inspect` and `inject`.
    Replaces all rules."""


class CreateOptions(ChangeOptions, total=False):
    """What a new sandbox can be given."""

    env: Mapping[str, str]
    vcpus: int
    memory: str
    """Such as `2GB`."""
    disk: str
    """Such as `10GB`."""
    resources: Mapping[str, int | str]
    """`vcpus`, `memory` and `disk` together."""
    mounts: Sequence[Mapping[str, Any]]
    """Workspaces: `workspaceId`, `path` and `readOnly` of each."""
    ssh_keys: Sequence[str]
    """Ids of the organization's keys, or public keys; by default, all of the organization's."""
    root_password: str
    snapshot: str
    """The id or name of a snapshot to start from."""


class ListOptions(TypedDict, total=False):
    """Which sandboxes are listed; all that is given must match."""

    status: str | Sequence[str] | None
    """One status, or several of which one must match."""
    tags: Sequence[str] | None
    """All of them must be there."""
    template: str | None
    project_id: str | None
    name_prefix: str | None
    node_id: str | None
    metadata: Mapping[str, Any] | None
    """Must be contained in the metadata, at every depth."""


class ProcessOptions(TypedDict, total=False):
    """How a process is started."""

    cwd: str | PurePosixPath | None
    """The working directory; a relative one is below /workspace."""
    make_cwd: bool
    """Whether the working directory is made if it is not there."""
    env: Mapping[str, str]
    user: str | int | None
    tag: str
    """A name to find it by."""
    stdin: bool
    """Whether it has an input that can be written to."""
    pty: Mapping[str, int]
    """A terminal: `cols` and `rows`."""
    timeout: int
    """Milliseconds until it is ended."""


class BackgroundOptions(TypedDict, total=False):
    """How a command in the background is started."""

    cwd: str | PurePosixPath | None
    make_cwd: bool
    env: Mapping[str, str]
    user: str | int | None
    timeout_s: float | None
    """Seconds until it is ended; without it there is no limit."""


_RESOURCES = ("vcpus", "memory", "disk")


class _LeftOut:
    def __repr__(self) -> str:
        return "..."


_LEFT_OUT = _LeftOut()


def listing_options(function: F) -> F:
    """Let `help()` and `inspect.signature` show each option of a function whose last parameter is
    `**options: Unpack[…]`. Type checkers know them already."""
    signature = inspect.signature(function)
    *before, last = signature.parameters.values()
    (kind,) = get_args(last.annotation)
    options = [
        inspect.Parameter(
            name, inspect.Parameter.KEYWORD_ONLY, default=_LEFT_OUT, annotation=annotation
        )
        for name, annotation in kind.__annotations__.items()
    ]
    function.__dict__["__signature__"] = signature.replace(parameters=[*before, *options])
    return function


def fields_of(options: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return options as fields of the HTTP API, whose own names are accepted as well.

    Raises:
        TypeError: there is no option of that name.
    """
    known, fields = sorted(kind.__annotations__), dict[str, Any]()
    for given, value in options.items():
        name = re.sub(r"(?<=[a-z])([A-Z])", lambda found: f"_{found[1].lower()}", given)
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(known)}"
            raise TypeError(f"there is no option {given!r}; {hint}")
        if value is not None:
            fields[_camel(name)] = str(value) if isinstance(value, PurePosixPath) else value
    if own := {name: fields.pop(name) for name in _RESOURCES if name in fields}:
        fields["resources"] = {**fields.get("resources", {}), **own}
    return fields


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join(one.capitalize() for one in rest)
