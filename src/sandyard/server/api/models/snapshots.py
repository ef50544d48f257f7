"""Snapshots and forks as HTTP carries them."""

from typing import Literal

from pydantic import Field

from sandyard.server.api.models.base import Body, Model, Name, Time
from sandyard.server.api.models.sandboxes import ResourcesOut
from sandyard.server.core.records import Snapshot
from sandyard.server.core.shapes import format_size


class CreateSnapshot(Body):
    """The body of a snapshot; it may be left out."""

    name: Name | None = None


class CreateForks(Body):
    """The body of a fork."""

    count: int = Field(1, ge=1, le=100)
    name: Name | None = Field(
        None, description="What it is called; of several, each with its number: `name-1`."
    )


class RollBack(Body):
    """The body of a rollback."""

    snapshot_id: str = Field(description="A snapshot of this sandbox, by id or name.")


class SnapshotOut(Model):
    """A sandbox as it was at one moment."""

    id: str
    name: str | None
    sandbox_id: str = Field(
        description="The sandbox it was made of, which may be gone; empty if that is not known."
    )
    status: Literal["creating", "ready"]
    template: str
    os: str | None
    resources: ResourcesOut
    size_bytes: int = Field(description="What it takes on the host's disk.")
    owner_user_id: str
    created_at: Time


def snapshot_out(snapshot: Snapshot) -> SnapshotOut:
    """Return a snapshot as it is shown."""
    return SnapshotOut(
        id=snapshot.id,
        name=snapshot.name,
        sandbox_id=snapshot.sandbox_id,
        status="ready" if snapshot.is_ready else "creating",
        template=snapshot.template.partition("@")[0],
        os=snapshot.os,
        resources=ResourcesOut(
            vcpus=snapshot.shape.vcpus,
            memory=format_size(snapshot.shape.memory_mib),
            disk=format_size(snapshot.shape.disk_mib),
        ),
        size_bytes=snapshot.size_bytes,
        owner_user_id=snapshot.owner_user_id,
        created_at=snapshot.created_at,
    )
