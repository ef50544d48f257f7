"""What the server tells of things; `raw` has every field of it."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


class SandboxFacts:
    """A sandbox as the server told of it last."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    @property
    def id(self) -> str:
        """Its id: `sandbox-` and twelve letters or digits."""
        return str(self.raw["id"])

    @property
    def name(self) -> str | None:
        """The name that it was given."""
        name: str | None = self.raw["name"]
        return name

    @property
    def status(self) -> str:
        """Its status when it was told of: `running`, `paused` and so on."""
        return str(self.raw["status"])

    @property
    def template(self) -> str:
        """What it was made from."""
        return str(self.raw["template"])

    @property
    def created_at(self) -> str:
        """When it was made (ISO 8601, UTC)."""
        return str(self.raw["createdAt"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r}, name={self.name!r}, status={self.status!r})"


@dataclass(frozen=True)
class Snapshot:
    """A sandbox as it was at a moment."""

    id: str
    name: str | None
    sandbox_id: str
    size_bytes: int
    created_at: str
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Template:
    """What sandboxes are made from."""

    slug: str
    name: str
    status: str
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class ExecResult:
    """How a command ended. Text has U+FFFD for what is not UTF-8; the bytes are exact."""

    stdout_bytes: bytes = field(repr=False)
    stderr_bytes: bytes = field(repr=False)
    exit_code: int
    duration_ms: int
    timed_out: bool
    truncated: bool

    @property
    def stdout(self) -> str:
        """What it printed on standard output."""
        return self.stdout_bytes.decode(errors="replace")

    @property
    def stderr(self) -> str:
        """What it printed on standard error."""
        return self.stderr_bytes.decode(errors="replace")


@dataclass(frozen=True)
class CodeError:
    """What a piece of code raised."""

    name: str
    message: str
    traceback: str = field(repr=False)


@dataclass(frozen=True)
class CodeResult:
    """What a piece of code printed, the value of its last expression, and what it raised.

    `truncated` says that some of what it printed was lost, or was over 16 MiB.
    """

    stdout: str
    stderr: str
    value: str | None
    error: CodeError | None
    truncated: bool = False


@dataclass(frozen=True)
class Printed:
    """A piece of what a process printed, on `stdout`, `stderr` or its `terminal`."""

    stream: str
    data: bytes


@dataclass(frozen=True)
class Lost:
    """So many bytes are kept no more."""

    count: int


@dataclass(frozen=True)
class Exited:
    """How a process ended."""

    exit_code: int
    signal: str | None
    timed_out: bool


ProcessEvent = Printed | Lost | Exited


@dataclass(frozen=True)
class ProcessInfo:
    """A process that was started by the API."""

    pid: int
    tag: str | None
    command: str
    status: str
    exit_code: int | None
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class FileInfo:
    """What the sandbox's file system tells of a file."""

    path: str
    name: str
    type: str
    size: int
    mode: str
    owner: str | None
    modified_at: str
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def is_folder(self) -> bool:
        """Whether it is a folder."""
        return self.type == "folder"


@dataclass(frozen=True)
class FileChange:
    """Something changed in a watched folder.

    `type` is `created`, `modified`, `attributes`, `removed`, `moved` (then `source` says from
    where), or `overflow`: more happened than could be told, so look at the folder anew.
    """

    type: str
    path: str
    is_folder: bool
    source: str | None = None


@dataclass(frozen=True)
class SignedUrl:
    """A URL that reads or writes one file; whoever has it needs no key."""

    url: str
    method: str
    expires_at: str


@dataclass(frozen=True)
class PreviewUrl:
    """A URL of what listens on a port of a sandbox; whoever has it needs no key."""

    url: str
    port: int
    expires_at: str


@dataclass(frozen=True)
class SshAccess:
    """How to log in to a sandbox by SSH; `command` can be pasted into a terminal."""

    host: str
    port: int
    user: str
    command: str
    host_key: str
    known_hosts: str


@dataclass(frozen=True)
class WindowInfo:
    """A window on a sandbox's screen, and where it is, in pixels."""

    id: str
    title: str
    program: str
    pid: int
    x: int
    y: int
    width: int
    height: int
    is_active: bool


@dataclass(frozen=True)
class Workspace:
    """A folder that outlives sandboxes."""

    id: str
    slug: str
    name: str
    size_bytes: int
    quota_bytes: int
    is_personal: bool
    created_at: str
    raw: Mapping[str, Any] = field(repr=False, compare=False)


@dataclass(frozen=True)
class WorkspaceEntry:
    """A file or folder of a workspace; `path` names it wherever a path is asked for."""

    path: str
    name: str
    is_folder: bool
    is_link: bool
    size: int
    modified_at: str
    raw: Mapping[str, Any] = field(repr=False, compare=False)


def workspace_of(raw: Mapping[str, Any]) -> Workspace:
    """Return a workspace out of an answer."""
    return Workspace(
        id=raw["id"],
        slug=raw["slug"],
        name=raw["name"],
        size_bytes=raw["sizeBytes"],
        quota_bytes=raw["quotaBytes"],
        is_personal=raw["isPersonal"],
        created_at=raw["createdAt"],
        raw=raw,
    )


def entry_of(raw: Mapping[str, Any]) -> WorkspaceEntry:
    """Return a file or folder of a workspace out of an answer."""
    path, name = raw["path"], raw["name"]
    if path.startswith("base64:"):
        plain = base64.b64decode(path.removeprefix("base64:"))
        name = plain.rpartition(b"/")[2].decode(errors="surrogateescape")
    return WorkspaceEntry(
        path=path,
        name=name,
        is_folder=raw["type"] == "folder",
        is_link=raw["isLink"],
        size=raw["size"],
        modified_at=raw["mtime"],
        raw=raw,
    )


def snapshot_of(raw: Mapping[str, Any]) -> Snapshot:
    """Return a snapshot out of an answer."""
    return Snapshot(
        id=raw["id"],
        name=raw["name"],
        sandbox_id=raw["sandboxId"],
        size_bytes=raw["sizeBytes"],
        created_at=raw["createdAt"],
        raw=raw,
    )


def template_of(raw: Mapping[str, Any]) -> Template:
    """Return a template out of an answer."""
    return Template(slug=raw["slug"], name=raw["name"], status=raw["status"], raw=raw)


def process_of(raw: Mapping[str, Any]) -> ProcessInfo:
    """Return a process out of an answer."""
    return ProcessInfo(
        pid=raw["pid"],
        tag=raw["tag"],
        command=raw["command"],
        status=raw["status"],
        exit_code=raw["exitCode"],
        raw=raw,
    )


def file_of(raw: Mapping[str, Any]) -> FileInfo:
    """Return a file out of an answer."""
    return FileInfo(
        path=raw["path"],
        name=raw["name"],
        type=raw["type"],
        size=raw["size"],
        mode=raw["mode"],
        owner=raw["owner"],
        modified_at=raw["modifiedAt"],
        raw=raw,
    )
