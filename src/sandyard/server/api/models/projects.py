"""Projects as HTTP carries them."""

from pydantic import Field

from sandyard.server.api.models.base import Body, Model, Time
from sandyard.server.core.records import (
    Project,
)


class ProjectOut(Model):
    """A project."""

    id: str
    name: str
    slug: str
    color: str
    is_default: bool
    created_at: Time


def project_out(project: Project) -> ProjectOut:
    """Return a project as it is shown."""
    return ProjectOut(
        id=project.id,
        name=project.name,
        slug=project.slug,
        color=project.color,
        is_default=project.is_default,
        created_at=project.created_at,
    )


class CreateProject(Body):
    """The body of a new project."""

    name: str = Field(examples=["Crawler"])
    slug: str | None = None
    color: str | None = Field(None, examples=["#3b82f6"])


class PatchProject(Body):
    """The body of a change: what is left out stays as it is."""

    name: str | None = None
    color: str | None = None
