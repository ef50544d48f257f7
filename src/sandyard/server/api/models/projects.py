"""Projects as HTTP carries them."""

from typing import Annotated

from pydantic import Field

from sandyard.server.api.models.base import Body, Model, Time, Title
from sandyard.server.core.ids import SLUG
from sandyard.server.core.records import (
    Project,
)
from sandyard.server.service.people.organizations import COLOR


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


Color = Annotated[
    str | None,
    Field(examples=["#3b82f6"], json_schema_extra={"pattern": COLOR}),
]


class CreateProject(Body):
    """The body of a new project."""

    name: Title = Field(examples=["Crawler"])
    slug: str | None = Field(None, json_schema_extra={"pattern": SLUG})
    color: Color = None


class PatchProject(Body):
    """The body of a change: what is left out stays as it is."""

    name: Title | None = None
    color: Color = None
