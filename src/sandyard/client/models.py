"""Results of the server; `raw` has every field."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

RemotePath = str | PurePosixPath
"""A path in a sandbox or workspace."""


class SandboxFacts:
    """A sandbox, as of the last answer of the server."""

    def __init__(self, raw: Mapping[str, Any]) -> None:
        self.raw = raw

    @property
    def id(self) -> str:
        """The id: `sandbox-` and twelve letters or digits."""
        return str(self.raw["id"])

    @property
    def name(self) -> str | None:
        """The name, if it has one."""
        name: str | None = self.raw["name"]
        return name

    @property
    def status(self) -> str:
        """The status at that time: `running`, `paused` and so on."""
        return str(self.raw["status"])

    @property
    def template(self) -> str:
        """The template."""
        return str(self.raw["template"])

    @property
    def created_at(self) -> str:
        """The time of creation (ISO 8601, UTC)."""
        return str(self.raw["createdAt"])

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id!r}, name={self.name!r}, status={self.status!r})"


@dataclass(frozen=True)
class Snapshot:
    """A saved state of a sandbox."""

    id: str
    name: str | None
    sandbox_id: str
    size_bytes: int
    created_at: str
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Template:
    """A template for sandboxes."""

    slug: str
    name: str
    status: str
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class ExecResult:
    """The result of a command; `print` shows its output. In text, invalid UTF-8 becomes U+FFFD;
    bytes are exact."""

    stdout_bytes: bytes = field(repr=False)
    stderr_bytes: bytes = field(repr=False)
    exit_code: int
    duration_ms: int
    timed_out: bool
    truncated: bool

    def __str__(self) -> str:
        """Return the output, standard error after standard output, so that `print` shows it."""
        return self.stdout + self.stderr

    @property
    def stdout(self) -> str:
        """Standard output."""
        return self.stdout_bytes.decode(errors="replace")

    @property
    def stderr(self) -> str:
        """Standard error."""
        return self.stderr_bytes.decode(errors="replace")


@dataclass(frozen=True)
class CodeError:
    """An exception raised by code."""

    name: str
    message: str
    traceback: str = field(repr=False)


@dataclass(frozen=True)
class CodeResult:
    """The output of code, the value of its last expression, and its exception.

    `truncated` means that output was lost or exceeded 16 MiB.
    """

    stdout: str
    stderr: str
    value: str | None
    error: CodeError | None
    truncated: bool = False


@dataclass(frozen=True)
class Printed:
    """A piece of output, on `stdout`, `stderr` or the `terminal`."""

    stream: str
    data: bytes


@dataclass(frozen=True)
class Lost:
    """A number of bytes that are no longer kept."""

    count: int


@dataclass(frozen=True)
class Exited:
    """The exit of a process."""

    exit_code: int
    signal: str | None
    timed_out: bool


ProcessEvent = Printed | Lost | Exited


@dataclass(frozen=True)
class ProcessInfo:
    """A process that was started through the API."""

    pid: int
    tag: str | None
    command: str
    status: str
    exit_code: int | None
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class FileInfo:
    """The metadata of a file."""

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
        """Whether it is a directory."""
        return self.type == "folder"


@dataclass(frozen=True)
class FileChange:
    """A change in a watched directory.

    `type` is `created`, `modified`, `attributes`, `removed`, `moved` (with the old path in
    `source`), or `overflow`: changes were missed, so list the directory again.
    """

    type: str
    path: str
    is_folder: bool
    source: str | None = None


@dataclass(frozen=True)
class SignedUrl:
    """A URL that reads or writes one file without a key."""

    url: str
    method: str
    expires_at: str


@dataclass(frozen=True)
class PreviewUrl:
    """A URL of a sandbox's port that works without a key."""

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
    """A window on a sandbox's screen, and its position in pixels."""

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
    """A directory that outlives sandboxes."""

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
    """A file or directory of a workspace. `path` is accepted wherever a path is expected."""

    path: str
    name: str
    is_folder: bool
    is_link: bool
    size: int
    modified_at: str
    raw: Mapping[str, Any] = field(repr=False, compare=False)


def workspace_of(raw: Mapping[str, Any]) -> Workspace:
    """Return the workspace in an answer."""
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
    """Return the entry of a workspace in an answer."""
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
    """Return the snapshot in an answer."""
    return Snapshot(
        id=raw["id"],
        name=raw["name"],
        sandbox_id=raw["sandboxId"],
        size_bytes=raw["sizeBytes"],
        created_at=raw["createdAt"],
        raw=raw,
    )


def template_of(raw: Mapping[str, Any]) -> Template:
    """Return the template in an answer."""
    return Template(slug=raw["slug"], name=raw["name"], status=raw["status"], raw=raw)


def process_of(raw: Mapping[str, Any]) -> ProcessInfo:
    """Return the process in an answer."""
    return ProcessInfo(
        pid=raw["pid"],
        tag=raw["tag"],
        command=raw["command"],
        status=raw["status"],
        exit_code=raw["exitCode"],
        raw=raw,
    )


def file_of(raw: Mapping[str, Any]) -> FileInfo:
    """Return the file in an answer."""
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
