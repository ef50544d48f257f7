"""Sandboxes as HTTP carries them."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Annotated, Final, Literal, Self

from pydantic import Field, JsonValue, ModelWrapValidatorHandler, PrivateAttr, model_validator

from sandyard.server.api.models.base import (
    PRINTABLE,
    STRICT,
    Body,
    Env,
    Model,
    Name,
    Time,
    bounds,
    filled,
)
from sandyard.server.api.models.network import NetworkIn
from sandyard.server.core.ids import TAG_MAX, TAGS_MAX
from sandyard.server.core.ops import Figures
from sandyard.server.core.records import Mount, Sandbox
from sandyard.server.core.shapes import format_size
from sandyard.server.core.states import Status
from sandyard.server.service.actor import Actor
from sandyard.server.service.addresses import Addresses
from sandyard.server.service.sandboxes.change import Changes
from sandyard.server.service.sandboxes.create import NewSandbox
from sandyard.server.service.templates.templates import REFERENCE

# The rules themselves are the service's; here they are for the OpenAPI description.
_PATH = r"^/workspace(/(?!\.{1,2}(/|$))[^/\x00-\x1f\x7f]{1,255})*$"
Tags = Annotated[
    list[Annotated[str, Field(json_schema_extra=filled(TAG_MAX))]],
    Field(json_schema_extra={"maxItems": TAGS_MAX}),
]
IdleTimeout = Annotated[int, Field(json_schema_extra=bounds(0, 604_800))]


class ResourcesIn(Body):
    """What a sandbox is to be given; what is left out is the template's default."""

    vcpus: int | None = Field(None, examples=[2], json_schema_extra=bounds(1, 32))
    memory: str | None = Field(None, examples=["4GB"], description="128MB to 64GB.")
    disk: str | None = Field(None, examples=["10GB"], description="1GB to 500GB.")


OnExpiry = Annotated[
    Literal["destroy", "pause"],
    Field(
        description="What is done at its end. With `pause` it has no end while it is paused, and "
        "each time it is resumed another, `expiresIn` seconds later."
    ),
]


class MountIn(Body):
    """A workspace to mount."""

    workspace_id: str = Field(description="Its id; a personal workspace cannot be mounted.")
    path: str = Field(
        examples=["/workspace"],
        description="/workspace or below.",
        json_schema_extra={"pattern": _PATH},
    )
    read_only: bool = False


class CreateSandbox(Body):
    """The body of a create. `{}` is enough."""

    template: str = Field(
        "base-ubuntu",
        max_length=200,
        json_schema_extra={"pattern": f"^{REFERENCE}$"},
        description="A slug; or, of the organization's own, also `slug:tag` or `slug@digest`.",
    )
    name: Name | None = None
    tags: Tags = []
    mounts: list[MountIn] = Field(
        [], description="Default for one from a snapshot: what that had mounted."
    )
    idle_timeout: IdleTimeout = 600
    resources: ResourcesIn | None = None
    env: Env = {}
    ssh_keys: list[str] | None = Field(
        None, description="Ids of the organization's keys, or public keys; default: all of them."
    )
    root_password: str | None = Field(
        None,
        repr=False,
        description="8 to 72 bytes of printable characters.",
        json_schema_extra={"minLength": 8, "maxLength": 72, "pattern": PRINTABLE},
    )
    project_id: str | None = None
    metadata: dict[str, JsonValue] = Field({}, description="Up to 16 KiB.")
    auto_resume: bool = True
    expires_in: int | None = Field(None, ge=1, le=315_360_000)
    on_expiry: OnExpiry = "destroy"
    network: NetworkIn | None = Field(
        None,
        description="Default for one from a snapshot: the rules of what that was taken of; for "
        "others: none.",
    )
    snapshot: str | None = None

    def wish(self) -> NewSandbox:
        """Return what is asked for; fields of one name mean the same."""
        given = self.model_fields_set - {"resources", "mounts", "network", "on_expiry"}
        resources = vars(self.resources) if self.resources else {}
        named = {name: getattr(self, name) for name in given}
        if "mounts" in self.model_fields_set:
            named["mounts"] = tuple(
                Mount(one.workspace_id, one.path, one.read_only) for one in self.mounts
            )
        if self.network is not None:
            named["network"] = self.network.policy()
        named["pauses_at_end"] = self.on_expiry == "pause"
        return NewSandbox(**named, **resources)


class PatchSandbox(Body):
    """The body of a patch: what is left out stays as it is. With `Sandyard-Strict: 1` a `name` that
    is null is removed; without, null is the same as left out."""

    name: Name | None = None
    tags: Tags | None = None
    idle_timeout: IdleTimeout | None = None
    metadata: dict[str, JsonValue] | None = None
    project_id: str | None = None
    auto_resume: bool | None = None
    expires_in: int | None = Field(
        None, ge=0, le=315_360_000, description="Seconds from now to its end; 0: none any more."
    )
    on_expiry: OnExpiry | None = None
    network: NetworkIn | None = Field(None, description="Replaces all rules.")

    _clears_name: bool = PrivateAttr(default=False)

    @model_validator(mode="wrap")
    @classmethod
    def _with_null_name(cls, given: object, validated: ModelWrapValidatorHandler[Self]) -> Self:
        made = validated(given)
        is_null = isinstance(given, dict) and "name" in given and given["name"] is None
        made._clears_name = is_null and STRICT.get()
        return made

    def changes(self) -> Changes:
        """Return what is to be changed; fields of one name mean the same."""
        given = self.model_fields_set - {"on_expiry", "network"}
        pauses = None if self.on_expiry is None else self.on_expiry == "pause"
        return Changes(
            pauses_at_end=pauses,
            clears_name=self._clears_name,
            network=None if self.network is None else self.network.policy(),
            **{name: getattr(self, name) for name in given},
        )


class ResourcesOut(Model):
    """What a sandbox was given."""

    vcpus: int
    memory: str
    disk: str


class MountOut(Model):
    """A workspace that is mounted."""

    workspace_id: str
    path: str
    read_only: bool


class ReasonOut(Model):
    """The reason for a sandbox's status."""

    code: str
    message: str


class SandboxOut(Model):
    """A sandbox."""

    id: str
    name: str | None
    status: Status
    tags: list[str]
    template: str
    template_digest: str | None = Field(
        description="The version of a template of the organization; null for others."
    )
    owner_user_id: str
    owner_display_name: str
    owner_email: str
    project_id: str
    mounts: list[MountOut]
    has_writable_workspace_mount: bool
    ssh_ready: bool
    vnc_ready: bool
    ip: str | None
    public_ip: str | None
    ssh_access_configured: bool
    ssh_auth_method: Literal["key", "password", "key_and_password", "none"]
    vnc_url: str | None
    resources: ResourcesOut
    created_at: Time
    updated_at: Time
    started_at: Time | None
    paused_at: Time | None
    last_activity_at: Time | None
    last_activity_kind: str | None
    idle_timeout: int
    metadata: dict[str, JsonValue]
    status_reason: ReasonOut | None
    node_id: str | None = Field(description="The node it is on; told to admins only.")
    driver: str | None
    os: str | None
    auto_resume: bool
    expires_at: Time | None
    on_expiry: Literal["destroy", "pause"]


_SHOWN_AS_THEY_ARE = tuple(
    name for name in SandboxOut.model_fields if name in {one.name for one in fields(Sandbox)}
)
_SSH_METHODS: Final[Mapping[tuple[bool, bool], str]] = {
    (True, True): "key_and_password",
    (True, False): "key",
    (False, True): "password",
    (False, False): "none",
}


def sandbox_out(sandbox: Sandbox, actor: Actor, where: Addresses) -> SandboxOut:
    """Return a sandbox as an actor may see it; fields of one name mean the same."""
    has_key, has_password = bool(sandbox.authorized_keys), sandbox.root_password_hash is not None
    reason, shape = sandbox.reason, sandbox.shape
    slug, _, digest = sandbox.template.partition("@")
    has_desktop = where.has_desktop(sandbox)
    shown = {name: getattr(sandbox, name) for name in _SHOWN_AS_THEY_ARE}
    shown |= {
        "template": slug,
        "template_digest": digest or None,
        "tags": list(sandbox.tags),
        "metadata": dict(sandbox.metadata),
        "mounts": [vars(one) for one in sandbox.mounts],
        "has_writable_workspace_mount": any(not one.read_only for one in sandbox.mounts),
        "ssh_ready": where.ssh is not None and (has_key or has_password) and _is_up(sandbox),
        "public_ip": where.public_ip,
        "vnc_ready": has_desktop and _is_up(sandbox),
        "vnc_url": where.desktop_url(sandbox.id) if has_desktop else None,
        "ssh_access_configured": has_key or has_password,
        "ssh_auth_method": _SSH_METHODS[has_key, has_password],
        "resources": ResourcesOut(
            vcpus=shape.vcpus,
            memory=format_size(shape.memory_mib),
            disk=format_size(shape.disk_mib),
        ),
        "idle_timeout": sandbox.idle_timeout_s,
        "on_expiry": "pause" if sandbox.pauses_at_end else "destroy",
        "status_reason": ReasonOut(code=reason.code, message=reason.message) if reason else None,
        "node_id": sandbox.node_id if actor.role == "admin" else None,
    }
    return SandboxOut.model_validate(shown, by_name=True)


def _is_up(sandbox: Sandbox) -> bool:
    """Tell whether a login finds it running, or resumes it."""
    is_resumed = sandbox.status is Status.PAUSED and sandbox.auto_resume
    return sandbox.status is Status.RUNNING or is_resumed


class PausedOut(Model):
    """What became of a pause: `status` is `pausing` while it is still under way."""

    id: str
    status: Status
    paused_at: Time | None


class ResumedOut(Model):
    """What became of a resume: `status` is `resuming` while it is still under way."""

    id: str
    status: Status
    resumed_at: Time | None
    status_reason: ReasonOut | None


def resumed_out(sandbox: Sandbox) -> ResumedOut:
    """Return what became of a resume or restart as it is shown."""
    reason = sandbox.reason
    return ResumedOut(
        id=sandbox.id,
        status=sandbox.status,
        resumed_at=sandbox.started_at if sandbox.status is Status.RUNNING else None,
        status_reason=ReasonOut(code=reason.code, message=reason.message) if reason else None,
    )


class DeletedOut(Model):
    """What became of a delete: `deleted` is false while it is still under way."""

    id: str
    deleted: bool


class LogsOut(Model):
    """What a sandbox's machine printed, the last 64 KiB of it."""

    sandbox_id: str
    console: str


class Stats(Model):
    """A sandbox's figures as of now; 100 % is one whole CPU."""

    cpu_percent: float
    memory_used_bytes: int
    memory_total_bytes: int
    disk_used_bytes: int
    disk_total_bytes: int
    uptime: float


class StatsOut(Model):
    """A sandbox's figures."""

    sandbox_id: str
    stats: Stats


def stats_of(figures: Figures) -> Stats:
    """Return a sandbox's figures as they are shown."""
    return Stats.model_validate(vars(figures), by_name=True)
