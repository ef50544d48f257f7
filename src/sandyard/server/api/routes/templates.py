"""/v1/templates."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Path, Query, Request
from starlette.requests import ClientDisconnect
from starlette.responses import Response

from sandyard.server.api.access import Scope, takes_query_key
from sandyard.server.api.events import EventStream, Recheck, SseEvent, rechecked
from sandyard.server.api.models.base import Data, RemovedOut
from sandyard.server.api.models.templates import (
    BuildOut,
    BuildRequestedOut,
    BuildTemplate,
    TagVersion,
    TemplateOut,
    UploadOut,
    VersionOut,
    build_out,
    line_out,
    template_out,
    upload_out,
    versions_out,
)
from sandyard.server.api.routes.common import Keyed, enveloped, errors, provided
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ids import checked_text
from sandyard.server.core.records import Build, BuildLine
from sandyard.server.front.bodies import streams_body, takes_body
from sandyard.server.service.actor import Actor
from sandyard.server.service.builds.builds import Builds
from sandyard.server.service.builds.uploads import Uploads
from sandyard.server.service.templates.templates import TAG, Templates

router = APIRouter(prefix="/v1/templates", tags=["templates"])

CanRead = Annotated[Actor, Depends(Scope("sandbox:read"))]
CanReadBuilds = Annotated[Actor, Depends(Scope("template:read"))]
CanWrite = Annotated[Actor, Depends(Scope("template:write"))]
MayFollow = Annotated[Recheck, rechecked("template:read")]


Service = Annotated[Templates, provided("templates")]
BuildService = Annotated[Builds, provided("builds")]
UploadService = Annotated[Uploads, provided("uploads")]

_BODY_MAX = 4 * 1024 * 1024
_DIGITS_MAX = 9
Tag = Annotated[str, Path(json_schema_extra={"pattern": f"^{TAG}$"})]


@router.get("", responses=errors())
async def list_templates(
    request: Request, actor: CanRead, service: Service
) -> Data[list[TemplateOut]]:
    """List the templates of this installation, built or not, and those of the organization."""
    return enveloped(request, [template_out(fact) for fact in await service.all(actor)])


@router.post("", status_code=202, responses=errors(402, 409))
@takes_body(_BODY_MAX)
async def build_template(
    request: Request, actor: CanWrite, service: BuildService, keyed: Keyed, body: BuildTemplate
) -> Data[BuildRequestedOut]:
    """Build a new version of a template, which is created with its first one.

    The build runs in the background; follow its log, or get the build. When it has succeeded, the
    version gets the tag `latest`.
    """
    build = await service.create(actor, body.wish(), request=keyed)
    out = BuildRequestedOut(slug=build.slug, build_id=build.id, version=build.number)
    return enveloped(request, out)


@router.post("/uploads", status_code=201, responses=errors(409, 413))
@streams_body
async def upload_for_template(
    request: Request, actor: CanWrite, service: UploadService
) -> Data[UploadOut]:
    """Upload a tar archive for a build: an image, or the context of a Dockerfile.

    It is kept for a day, or until the build that uses it has ended.
    """
    try:
        upload = await service.take(actor, request.stream())
    except ClientDisconnect as error:
        raise InvalidArgumentError(
            "the upload did not come whole; nothing is kept", field="body"
        ) from error
    return enveloped(request, upload_out(upload))


@router.get("/{slug}", responses=errors(404))
async def get_template(
    request: Request, actor: CanRead, service: Service, slug: str
) -> Data[TemplateOut]:
    """Return one template."""
    fact = await service.get(actor, checked_text(slug, field="slug"))
    return enveloped(request, template_out(fact))


@router.delete("/{slug}", responses=errors(404))
async def delete_template(
    request: Request, actor: CanWrite, service: Service, slug: str
) -> Data[RemovedOut]:
    """Delete a template of the organization, with all its versions. Its sandboxes and snapshots are
    not affected."""
    await service.remove(actor, checked_text(slug, field="slug"))
    return enveloped(request, RemovedOut(id=slug, deleted=True))


# --- builds ---------------------------------------------------------------------------------


@router.get("/{slug}/builds", responses=errors(404))
async def list_builds(
    request: Request, actor: CanReadBuilds, service: BuildService, slug: str
) -> Data[list[BuildOut]]:
    """List the latest 100 builds of a template, newest first."""
    found = await service.list(actor, checked_text(slug, field="slug"))
    return enveloped(request, [build_out(one, await service.place(one)) for one in found])


@router.get("/{slug}/builds/{build}", responses=errors(404))
async def get_build(
    request: Request, actor: CanReadBuilds, service: BuildService, slug: str, build: str
) -> Data[BuildOut]:
    """Return one build."""
    found = await service.get(actor, checked_text(slug, field="slug"), build)
    return enveloped(request, build_out(found, await service.place(found)))


@router.post("/{slug}/builds/{build}/cancel", responses=errors(404, 409))
async def cancel_build(
    request: Request, actor: CanWrite, service: BuildService, slug: str, build: str
) -> Data[BuildOut]:
    """Cancel a build. It ends soon; nothing of it is left."""
    found = await service.cancel(actor, checked_text(slug, field="slug"), build)
    return enveloped(request, build_out(found))


@router.get(
    "/{slug}/logs",
    responses={
        **errors(404, 409),
        200: {"description": "Events.", "content": {"text/event-stream": {}}},
    },
    response_model=None,
)
@takes_query_key
async def follow_build(
    request: Request,
    actor: CanReadBuilds,
    service: BuildService,
    check: MayFollow,
    slug: str,
    build: Annotated[
        str | None, Query(description="The id of a build. Default: the latest one.")
    ] = None,
    after: Annotated[
        int, Query(ge=0, lt=2**31, description="The id of the last line that is known already.")
    ] = 0,
    last_event_id: Annotated[
        str | None,
        Header(
            description="What a browser sends when it comes again.",
            json_schema_extra={"pattern": "^[0-9]{0,9}$"},
        ),
    ] = None,
) -> Any:
    """Follow the log of a build by server-sent events: `line` for each line, and finally `end` with
    the build.

    To resume, send the id of the last event as `Last-Event-ID` or as `after`.
    """
    slug = checked_text(slug, field="slug")
    if last_event_id:
        is_number = last_event_id.isascii() and last_event_id.isdigit()
        if not is_number or len(last_event_id) > _DIGITS_MAX:
            raise InvalidArgumentError(
                "cannot use Last-Event-ID: it is no id of an event here", field="Last-Event-ID"
            )
        after = int(last_event_id)
    found = (
        await service.get(actor, slug, build)
        if build is not None
        else next(iter(await service.list(actor, slug)), None)
    )
    if getattr(request.state, "is_head", False):
        return Response(media_type="text/event-stream")
    held = AsyncExitStack()
    held.enter_context(service.following(actor))
    lines = service.lines(actor, slug, found.id if found else None, after=after)
    return EventStream(_events(lines), held, check)


async def _events(lines: AsyncIterator[BuildLine | Build]) -> AsyncIterator[SseEvent]:
    async for one in lines:
        if isinstance(one, BuildLine):
            yield SseEvent("line", line_out(one), one.number)
        else:
            yield SseEvent("end", build_out(one).model_dump(mode="json", by_alias=True))


# --- versions -------------------------------------------------------------------------------


@router.get("/{slug}/versions", responses=errors(404))
async def list_versions(
    request: Request, actor: CanReadBuilds, service: Service, slug: str
) -> Data[list[VersionOut]]:
    """List the versions of a template of the organization, newest first."""
    own = await service.own(actor, checked_text(slug, field="slug"))
    return enveloped(request, versions_out(own))


@router.delete("/{slug}/versions/{version}", responses=errors(404))
async def delete_version(
    request: Request, actor: CanWrite, service: Service, slug: str, version: int
) -> Data[RemovedOut]:
    """Delete one version, and its tags. Its sandboxes and snapshots are not affected."""
    await service.remove_version(actor, checked_text(slug, field="slug"), version)
    return enveloped(request, RemovedOut(id=f"{slug}:{version}", deleted=True))


@router.put("/{slug}/tags/{tag}", responses=errors(404))
async def tag_version(
    request: Request, actor: CanWrite, service: Service, slug: str, tag: Tag, body: TagVersion
) -> Data[list[VersionOut]]:
    """Give a version a tag, which another one loses, and return all versions."""
    slug, tag = checked_text(slug, field="slug"), checked_text(tag, field="tag")
    return enveloped(request, versions_out(await service.tag(actor, slug, tag, body.version)))


@router.delete("/{slug}/tags/{tag}", responses=errors(404))
async def untag_version(
    request: Request, actor: CanWrite, service: Service, slug: str, tag: Tag
) -> Data[RemovedOut]:
    """Remove a tag; the version stays."""
    slug, tag = checked_text(slug, field="slug"), checked_text(tag, field="tag")
    await service.untag(actor, slug, tag)
    return enveloped(request, RemovedOut(id=f"{slug}:{tag}", deleted=True))
