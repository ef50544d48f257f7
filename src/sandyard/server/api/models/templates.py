"""Templates as HTTP carries them."""

import base64
import binascii
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, JsonValue

from sandyard.server.api.models.base import (
    BASE64,
    Body,
    Content,
    Env,
    Model,
    Time,
    UserName,
    either,
    filled,
)
from sandyard.server.api.models.network import NetworkIn
from sandyard.server.core.contracts.node import TemplateFact
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ids import SLUG
from sandyard.server.core.records import Build, BuildLine, Upload
from sandyard.server.core.shapes import Shape, format_size
from sandyard.server.service.builds.plan import (
    BUILD_SECRET,
    COMMAND_MAX,
    DESCRIPTION_MAX,
    IMAGE,
    NAME_MAX,
    PACKAGE,
    NewFile,
    NewTemplate,
)
from sandyard.server.service.templates.templates import REFERENCE, OwnTemplate

_PATH = r"^(/(?!\.\.(/|$))[^/\x00-\x1f\x7f]{1,255})+$"
TemplateStatusOut = Literal["pending", "building", "ready", "failed"]
BuildStatusOut = Literal["waiting", "queued", "building", "ready", "failed", "cancelled"]
Words = Annotated[
    list[Annotated[str, Field(json_schema_extra=filled(COMMAND_MAX))]],
    Field(json_schema_extra={"maxItems": 200}),
]
Packages = Annotated[
    list[Annotated[str, Field(json_schema_extra={"pattern": f"^{PACKAGE}$"})]],
    Field(json_schema_extra={"maxItems": 200}),
]


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
    status: TemplateStatusOut
    size_bytes: int | None
    defaults: TemplateDefaults
    digest: str | None
    created_at: Time | None
    error: str | None


class FileIn(Body):
    """A file to write: `contents` is text, `contentsBase64` bytes."""

    path: str = Field(examples=["/etc/motd"], json_schema_extra={"pattern": _PATH})
    model_config = ConfigDict(json_schema_extra=either("contents", "contentsBase64"))

    contents: Content | None = None
    contents_base64: str | None = Field(
        None, json_schema_extra={"contentEncoding": "base64", "pattern": BASE64}
    )
    mode: str = Field(
        "644",
        examples=["755"],
        description="Permissions in octal.",
        json_schema_extra={"pattern": "^(0o?)?[0-7]{1,4}$"},
    )

    def wish(self) -> NewFile:
        """Return it as the service takes it.

        Raises:
            InvalidArgumentError: it has no content, two, or not what it is said to be.
        """
        if (self.contents is None) == (self.contents_base64 is None):
            raise InvalidArgumentError(
                "cannot write a file: give either contents or contentsBase64", field="files"
            )
        try:
            data = (
                self.contents.encode()
                if self.contents is not None
                else base64.b64decode(self.contents_base64 or "", validate=True)
            )
            return NewFile(self.path, data, int(self.mode, 8))
        except (UnicodeEncodeError, binascii.Error, ValueError) as error:
            raise InvalidArgumentError(
                "cannot write a file: its contents or its mode are not what they are said to be",
                field="files",
            ) from error


class DefaultsIn(Body):
    """The default shape."""

    vcpus: int | None = Field(None, json_schema_extra={"minimum": 1})
    memory: str | None = Field(None, examples=["1GB"])
    disk: str | None = Field(None, examples=["10GB"])


class BuildTemplate(Body):
    """The body of a build. Exactly one of `base`, `image`, `upload` and `dockerfile` is given."""

    model_config = ConfigDict(
        json_schema_extra={
            **either("base", "image", "upload", "dockerfile"),
            "if": {"required": ["context"], "properties": {"context": {"type": "string"}}},
            "then": {"required": ["dockerfile"]},
        }
    )

    slug: str = Field(examples=["my-agent"], json_schema_extra={"pattern": SLUG})
    name: str | None = Field(
        None, description="For people. Default: the slug.", json_schema_extra=filled(NAME_MAX)
    )
    description: str | None = Field(None, json_schema_extra=filled(DESCRIPTION_MAX))
    base: str | None = Field(
        None,
        examples=["base-ubuntu"],
        description="A template to build on: a slug, `slug:tag` or `slug@digest`.",
        json_schema_extra={"pattern": f"^{REFERENCE}$"},
    )
    image: str | None = Field(
        None,
        examples=["docker.io/library/alpine:3.22"],
        description="An image in a registry: `name[:tag][@digest]`.",
        json_schema_extra={"maxLength": 512, "pattern": f"^{IMAGE}$"},
    )
    upload: str | None = Field(
        None, description="The id of an upload: a `docker save` archive, or an OCI layout in a tar."
    )
    dockerfile: str | None = Field(None, description="The text of a Dockerfile.")
    context: str | None = Field(
        None, description="The id of an upload: the Dockerfile's context, a tar archive."
    )
    credentials: str | None = Field(
        None, description="The id of a credential for the registry that an image comes from."
    )
    apt: Packages = []
    pip: Packages = []
    npm: Packages = []
    env: Env = {}
    files: Annotated[list[FileIn], Field(json_schema_extra={"maxItems": 200})] = []
    run: Words = []
    start: str | None = Field(
        None,
        description="A shell command that every sandbox has running. Default: what the image runs.",
        json_schema_extra=filled(COMMAND_MAX),
    )
    ready: str | None = Field(
        None,
        description="A shell command that ends with 0 once what was started can be used. Default: "
        "the image's health check.",
        json_schema_extra=filled(COMMAND_MAX),
    )
    default_user: UserName | None = Field(None, description="Default: the image's, else root.")
    workdir: str | None = Field(None, description="Default: the image's, else /workspace.")
    defaults: DefaultsIn | None = None
    secrets: dict[str, str] = Field(
        {},
        repr=False,
        examples=[{"TOKEN": "…"}],
        description="For commands of the build, as files in `/run/secrets`, and for `RUN "
        "--mount=type=secret,id=…` of a Dockerfile. They are in no version and no cache, and "
        "masked in the log.",
        json_schema_extra={
            "maxProperties": 20,
            "propertyNames": {"pattern": f"^{BUILD_SECRET}$"},
            "additionalProperties": {"type": "string", "minLength": 1, "maxLength": 65_536},
        },
    )
    force: bool = Field(False, description="Use nothing that earlier builds have kept.")
    network: NetworkIn | None = Field(
        None, description="What the build may reach, as for a sandbox. Default: everything."
    )

    def wish(self) -> NewTemplate:
        """Return it as the service takes it.

        Raises:
            InvalidArgumentError: a file is not what it is said to be.
        """
        shape = self.defaults or DefaultsIn()
        return NewTemplate(
            slug=self.slug,
            name=self.name,
            description=self.description,
            base=self.base,
            image=self.image,
            upload=self.upload,
            dockerfile=self.dockerfile,
            context=self.context,
            credentials=self.credentials,
            apt=tuple(self.apt),
            pip=tuple(self.pip),
            npm=tuple(self.npm),
            env=self.env,
            files=tuple(one.wish() for one in self.files),
            run=tuple(self.run),
            start=self.start,
            ready=self.ready,
            default_user=self.default_user,
            workdir=self.workdir,
            vcpus=shape.vcpus,
            memory=shape.memory,
            disk=shape.disk,
            secrets=self.secrets,
            force=self.force,
            network=None if self.network is None else self.network.policy(),
        )


class TagVersion(Body):
    """The body of a tag."""

    version: int = Field(examples=[1], json_schema_extra={"minimum": 1})


class BuildRequestedOut(Model):
    """A build that was requested."""

    slug: str
    build_id: str
    version: int


class BuildOut(Model):
    """A build. `phase` says what it does now, `place` where it stands in the queue, from 1."""

    id: str
    slug: str
    version: int
    status: BuildStatusOut
    place: int | None
    phase: str
    error: str | None
    sandbox_id: str | None
    created_at: Time
    started_at: Time | None
    ended_at: Time | None


class VersionOut(Model):
    """A version of a template."""

    slug: str
    version: int
    digest: str
    tags: list[str]
    os: str
    size_bytes: int
    defaults: TemplateDefaults
    source: dict[str, JsonValue]
    default_user: str | None
    workdir: str | None
    build_id: str
    created_at: Time


class UploadOut(Model):
    """An upload."""

    upload_id: str
    size_bytes: int
    digest: str


def _defaults(shape: Shape) -> TemplateDefaults:
    return TemplateDefaults(
        vcpus=shape.vcpus, memory=format_size(shape.memory_mib), disk=format_size(shape.disk_mib)
    )


def template_out(fact: TemplateFact) -> TemplateOut:
    """Return a template as HTTP carries it."""
    return TemplateOut.model_validate(
        {
            "slug": fact.slug,
            "name": fact.name,
            "description": fact.description,
            "os": fact.os,
            "kind": fact.kind,
            "status": fact.status.value,
            "sizeBytes": fact.size_bytes,
            "defaults": _defaults(fact.defaults),
            "digest": fact.digest,
            "createdAt": fact.created_at,
            "error": fact.error,
        }
    )


def build_out(build: Build, place: int | None = None) -> BuildOut:
    """Return a build as HTTP carries it, with its place in the queue if it is queued."""
    return BuildOut.model_validate(
        {
            "id": build.id,
            "slug": build.slug,
            "version": build.number,
            "status": build.status.value,
            "place": place,
            "phase": build.phase,
            "error": build.error,
            "sandboxId": build.sandbox_id,
            "createdAt": build.created_at,
            "startedAt": build.started_at,
            "endedAt": build.ended_at,
        }
    )


def line_out(line: BuildLine) -> dict[str, object]:
    """Return a line of a log as an event carries it."""
    at = line.at.isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"
    return {"time": at, "phase": line.phase, "text": line.text}


def versions_out(own: OwnTemplate) -> list[VersionOut]:
    """Return a template's versions as HTTP carries them."""
    return [
        VersionOut.model_validate(
            {
                "slug": one.slug,
                "version": one.number,
                "digest": one.digest,
                "tags": own.tags_of(one),
                "os": one.about.os,
                "sizeBytes": one.size_bytes,
                "defaults": _defaults(one.about.defaults),
                "source": dict(one.source),
                "defaultUser": one.about.user or None,
                "workdir": one.about.workdir or None,
                "buildId": one.build_id,
                "createdAt": one.created_at,
            }
        )
        for one in own.versions
    ]


def upload_out(upload: Upload) -> UploadOut:
    """Return an upload as HTTP carries it."""
    return UploadOut(upload_id=upload.id, size_bytes=upload.size_bytes, digest=upload.digest)
