"""Templates as HTTP carries them."""

from typing import Literal

from sandyard.server.api.models.base import Model, Time


class TemplateDefaults(Model):
    """The shape a sandbox gets when none is asked for."""

    vcpus: int
    memory: str
    disk: str


class TemplateOut(Model):
    """A template."""

    slug: str
    name: str
    description: str
    os: str | None
    kind: Literal["headless", "desktop"]
    status: Literal["pending", "building", "ready", "failed"]
    size_bytes: int | None
    defaults: TemplateDefaults
    digest: str | None
    created_at: Time | None
    error: str | None
