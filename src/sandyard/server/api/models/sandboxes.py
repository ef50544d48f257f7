"""Sandboxes as HTTP carries them."""

from typing import Literal

from pydantic import Field, JsonValue

from sandyard.server.api.models.base import Model, Time
from sandyard.server.core.records import Sandbox
from sandyard.server.core.shapes import format_size
from sandyard.server.core.states import Status
from sandyard.server.service.actor import Actor


class ResourcesIn(Model):
    """What a sandbox is to be given; what is left out is the template's default."""

    vcpus: int | None = Field(None, examples=[2])
    memory: str | None = Field(None, examples=["4GB"])
    disk: str | None = Field(None, examples=["10GB"])


class MountIn(Model):
    """A workspace to mount."""

    workspace_id: str
    path: str
    read_only: bool = False


class CreateSandbox(Model):
    """The body of a create. `{}` is enough."""

    template: str = Field("base-ubuntu", max_length=64)
    name: str | None = None
    tags: list[str] = []
    mounts: list[MountIn] = []
    idle_timeout: int = 600
    resources: ResourcesIn | None = None
    env: dict[str, str] = {}
    ssh_keys: list[str] | None = None
    root_password: str | None = Field(None, repr=False)
    project_id: str | None = None
    metadata: dict[str, JsonValue] = {}
    auto_resume: bool = True
    expires_in: int | None = Field(None, ge=1, le=315_360_000)
    network: dict[str, JsonValue] | None = None
    snapshot: str | None = None


class PatchSandbox(Model):
    """The body of a patch: what is left out stays as it is."""

    name: str | None = None
    tags: list[str] | None = None
    idle_timeout: int | None = None
    metadata: dict[str, JsonValue] | None = None
    project_id: str | None = None
    auto_resume: bool | None = None


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
    """Why a sandbox is where it is."""

    code: str
    message: str


class SandboxOut(Model):
    """A sandbox."""

    id: str
    name: str | None
    status: Status
    tags: list[str]
    template: str
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


def sandbox_out(sandbox: Sandbox, actor: Actor) -> SandboxOut:
    """Return a sandbox as an actor may see it."""
    has_key, has_password = bool(sandbox.ssh_keys), sandbox.root_password_hash is not None
    methods: dict[tuple[bool, bool], Literal["key", "password", "key_and_password", "none"]] = {
        (True, True): "key_and_password",
        (True, False): "key",
        (False, True): "password",
        (False, False): "none",
    }
    reason = sandbox.reason
    return SandboxOut(
        id=sandbox.id,
        name=sandbox.name,
        status=sandbox.status,
        tags=list(sandbox.tags),
        template=sandbox.template,
        owner_user_id=sandbox.owner_user_id,
        owner_display_name=sandbox.owner_display_name,
        owner_email=sandbox.owner_email,
        project_id=sandbox.project_id,
        mounts=[],
        has_writable_workspace_mount=False,
        ssh_ready=False,
        vnc_ready=False,
        ip=sandbox.ip,
        public_ip=None,
        ssh_access_configured=has_key or has_password,
        ssh_auth_method=methods[has_key, has_password],
        vnc_url=None,
        resources=ResourcesOut(
            vcpus=sandbox.shape.vcpus,
            memory=format_size(sandbox.shape.memory_mib),
            disk=format_size(sandbox.shape.disk_mib),
        ),
        created_at=sandbox.created_at,
        updated_at=sandbox.updated_at,
        started_at=sandbox.started_at,
        paused_at=sandbox.paused_at,
        last_activity_at=sandbox.last_activity_at,
        last_activity_kind=sandbox.last_activity_kind,
        idle_timeout=sandbox.idle_timeout_s,
        metadata=dict(sandbox.metadata),  # type: ignore[arg-type]  # it came in as JSON
        status_reason=ReasonOut(code=reason.code, message=reason.message) if reason else None,
        node_id=sandbox.node_id if actor.role == "admin" else None,
        driver=sandbox.driver,
        os=sandbox.os,
        auto_resume=sandbox.auto_resume,
        expires_at=sandbox.expires_at,
    )


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


class DeletedOut(Model):
    """What became of a delete: `deleted` is false while it is still under way."""

    id: str
    deleted: bool


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
