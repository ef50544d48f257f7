"""Results of the server; `raw` has every field."""

import base64
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

_SHOWN_MAX = 200
RemotePath = str | PurePosixPath
"""A path in a sandbox or workspace."""


@dataclass(frozen=True)
class Resources:
    """Virtual CPUs, and memory and disk such as `4GB`."""

    vcpus: int
    memory: str
    disk: str


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

    @property
    def tags(self) -> list[str]:
        """The tags."""
        return [str(one) for one in self.raw.get("tags") or ()]

    @property
    def metadata(self) -> dict[str, Any]:
        """The metadata."""
        return dict(self.raw.get("metadata") or {})

    @property
    def ip(self) -> str | None:
        """The private address while it runs; the host reaches it, and no other sandbox."""
        ip: str | None = self.raw.get("ip")
        return ip

    @property
    def resources(self) -> Resources:
        """The virtual CPUs, memory and disk."""
        given = self.raw["resources"]
        return Resources(int(given["vcpus"]), str(given["memory"]), str(given["disk"]))

    @property
    def expires_at(self) -> str | None:
        """When it ends (ISO 8601, UTC), or None."""
        at: str | None = self.raw.get("expiresAt")
        return at

    @property
    def status_reason(self) -> str | None:
        """Why it has this status, if there is more to say than the status."""
        reason = self.raw.get("statusReason") or {}
        return str(reason["message"]) if reason.get("message") else None

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
class TemplateInfo:
    """A template for sandboxes."""

    slug: str
    name: str
    status: str
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class TemplateVersion:
    """A version of a template of the organization."""

    slug: str
    version: int
    digest: str
    tags: tuple[str, ...]
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class TemplateBuild:
    """A build of a version. `status` is `waiting` (for what to build), `queued`, `building`,
    `ready`, `failed` or `cancelled`."""

    id: str
    slug: str
    version: int
    status: str
    error: str | None
    raw: Mapping[str, Any] = field(repr=False)

    @property
    def is_over(self) -> bool:
        """Whether it has ended."""
        return self.status not in ("waiting", "queued", "building")

    @property
    def place(self) -> int | None:
        """The place in the queue, from 1, of a build that is queued."""
        return self.raw.get("place")


@dataclass(frozen=True)
class RegistryCredential:
    """A credential for a registry of container images, without its password."""

    id: str
    host: str
    username: str
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class Secret:
    """A secret, without its value. `last_used_at` is when a connection that it was sent over last
    ended."""

    id: str
    name: str
    hosts: tuple[str, ...]
    last_used_at: str | None
    raw: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True)
class BuildLine:
    """A line of the log of a build."""

    text: str
    phase: str
    time: str


@dataclass(frozen=True, repr=False)
class ExecResult:
    """The result of a command; `print` shows its output. In text, invalid UTF-8 becomes U+FFFD;
    bytes are exact."""

    stdout_bytes: bytes = field(repr=False)
    stderr_bytes: bytes = field(repr=False)
    exit_code: int
    duration_ms: int
    timed_out: bool
    truncated: bool

    def __repr__(self) -> str:
        """Return the exit code and the beginning of the output."""
        text = f"exit_code={self.exit_code}, stdout={_beginning(self.stdout)}"
        if self.stderr_bytes:
            text += f", stderr={_beginning(self.stderr)}"
        for name in ("timed_out", "truncated"):
            text += f", {name}=True" if getattr(self, name) else ""
        return f"ExecResult({text})"

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


def _beginning(text: str) -> str:
    return repr(text if len(text) <= _SHOWN_MAX else text[:_SHOWN_MAX] + "…")


@dataclass(frozen=True)
class CodeError:
    """An exception raised by code."""

    name: str
    message: str
    traceback: str = field(repr=False)


@dataclass(frozen=True)
class Result:
    """A value that code has shown, in all the forms that it has: as `text`, and by name as `html`,
    `markdown`, `svg`, `latex`, `javascript`, `json`, or as bytes of `png`, `jpeg` and `pdf`.

    `is_main` is the value of the last expression; others are what `display` and charts show.
    `truncated` means that the text was cut, or a form left out, because it was too large.
    """

    text: str
    forms: Mapping[str, Any] = field(default_factory=dict, repr=False)
    is_main: bool = False
    truncated: bool = False

    @property
    def html(self) -> str | None:
        """As HTML."""
        return self.forms.get("html")

    @property
    def markdown(self) -> str | None:
        """As Markdown."""
        return self.forms.get("markdown")

    @property
    def svg(self) -> str | None:
        """As a picture in SVG."""
        return self.forms.get("svg")

    @property
    def png(self) -> bytes | None:
        """As a picture in PNG."""
        return self.forms.get("png")

    @property
    def jpeg(self) -> bytes | None:
        """As a picture in JPEG."""
        return self.forms.get("jpeg")

    @property
    def json(self) -> Any:
        """As JSON, decoded."""
        return self.forms.get("json")


@dataclass(frozen=True)
class CodeResult:
    """The output of code, the value of its last expression as text, its exception, and all results.

    `truncated` means that output exceeded 16 MiB, or a result was too large.
    """

    stdout: str
    stderr: str
    value: str | None
    error: CodeError | None
    truncated: bool = False
    results: tuple[Result, ...] = ()


@dataclass(frozen=True)
class OutsideLink:
    """A symbolic link that leads out of the folder that was copied: its path in that folder, and
    its target."""

    path: str
    target: str


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
    etag: str | None = None
    """Differs after each change of the content; for `read_if_changed` and `if_match`."""

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
class Cost:
    """What a sandbox has cost since it was created, and what it costs in an hour as it is now."""

    total_dollars: float
    hourly_dollars: float
    is_free: bool


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


def template_of(raw: Mapping[str, Any]) -> TemplateInfo:
    """Return the template in an answer."""
    return TemplateInfo(slug=raw["slug"], name=raw["name"], status=raw["status"], raw=raw)


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
        etag=raw.get("etag"),
    )
