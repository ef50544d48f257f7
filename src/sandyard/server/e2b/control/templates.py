"""The routes of the control API for templates."""

import re
from typing import Final
from urllib.parse import urlencode

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from sandyard.server.core.contracts.node import TemplateFact, TemplateStatus
from sandyard.server.core.errors import ConflictError, InvalidArgumentError, NotFoundError
from sandyard.server.core.records import BuildLine, BuildStatus, Snapshot
from sandyard.server.e2b.control import models
from sandyard.server.e2b.control.models import ALIASES, DEFAULT_TAG, name_and_tag
from sandyard.server.e2b.control.routes import Control, template_of
from sandyard.server.front.bodies import streams_body, takes_body
from sandyard.server.front.headers import first
from sandyard.server.front.hosts import is_below
from sandyard.server.service.builds.plan import NewTemplate, Step, StepKind, check_tags
from sandyard.server.service.builds.steps import HOME
from sandyard.server.service.templates.templates import OwnTemplate, check_count

_STATUS: Final = {
    TemplateStatus.READY: "ready",
    TemplateStatus.BUILDING: "building",
    TemplateStatus.PENDING: "waiting",
}
_BUILD_STATUS: Final = {
    BuildStatus.WAITING: "waiting", BuildStatus.QUEUED: "building",
    BuildStatus.BUILDING: "building", BuildStatus.READY: "ready",
}  # fmt: skip
_STEP = "step "
_FINALLY = ("pack", "start")
_LINES_MAX = 100
_WAIT_S = 1.0
"""How long a client waits for news of a build. Clients ask again every 0.2 s otherwise."""
_BODY_MAX = 2 * 1024 * 1024
_DISK_MIN_MIB = 1024
_USER = "user"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_HUB = ("docker.io/library/", "docker.io/")


async def list_templates(request: Request) -> Response:
    """List every template that the caller can use."""
    control = Control(request)
    control.actor.require("template:read")
    facts = await control.services.templates.all(control.actor)
    return JSONResponse([_template(one) for one in facts])


async def by_alias(request: Request) -> Response:
    """Tell which template has a name; clients ask whether there is one."""
    control = Control(request)
    control.actor.require("template:read")
    name, tag = name_and_tag(request.path_params["alias"])
    fact = await control.services.templates.get(control.actor, name)
    if tag not in (None, DEFAULT_TAG):
        own = await control.services.templates.own(control.actor, name)
        if own.tagged(str(tag)) is None:
            raise NotFoundError(f"cannot find the tag {tag!r} of the template {name}")
    return JSONResponse({"templateID": fact.slug, "public": False})


async def remove(request: Request) -> Response:
    """Delete a snapshot, or a template of the organization's own."""
    control = Control(request)
    name = request.path_params["template_id"].rpartition("/")[2].partition(":")[0]
    try:
        snapshot: Snapshot = await control.services.snapshots.get(control.actor, name)
    except NotFoundError:
        await control.services.templates.remove(control.actor, name_and_tag(name)[0])
        return Response(status_code=204)
    try:
        await control.services.snapshots.delete(control.actor, snapshot.id)
    except ConflictError as error:
        raise InvalidArgumentError(error.message, field="templateID") from error
    return Response(status_code=204)


def _template(fact: TemplateFact) -> dict[str, object]:
    names = [alias for alias, slug in ALIASES.items() if slug == fact.slug] or [fact.slug]
    created = models.moment(fact.created_at) if fact.created_at else None
    return {
        "templateID": fact.slug,
        "buildID": fact.digest or "",
        "aliases": names,
        "names": names,
        "public": False,
        "cpuCount": fact.defaults.vcpus,
        "memoryMB": fact.defaults.memory_mib,
        "diskSizeMB": fact.defaults.disk_mib,
        "envdVersion": models.ENVD_VERSION,
        "buildStatus": _STATUS.get(fact.status, "error"),
        "createdAt": created,
        "updatedAt": created,
        "createdBy": None,
        "lastSpawnedAt": None,
        "spawnCount": 0,
        "buildCount": 1,
    }


# --- builds ---------------------------------------------------------------------------------


async def announce(request: Request) -> Response:
    """Request a build. Its files are uploaded next, and then it is begun."""
    control = Control(request)
    body = await models.body_of(request, models.NewTemplateBody)
    name, tag = name_and_tag(body.name or body.alias or "")
    given = [*([tag] if tag else []), *(one.lower() for one in body.tags or ())]
    tags = tuple(dict.fromkeys(given)) or (DEFAULT_TAG,)
    disk = None if body.disk_mib is None else f"{max(body.disk_mib, _DISK_MIN_MIB)}MB"
    wish = NewTemplate(name, tags=tags, vcpus=body.vcpus, memory=f"{body.memory_mib}MB", disk=disk)
    build = await control.services.builds.announce(control.actor, wish)
    values = {
        "templateID": build.slug,
        "buildID": build.id,
        "public": False,
        "names": [build.slug],
        "aliases": [build.slug],
        "tags": list(tags),
    }
    return JSONResponse(values, status_code=202)


async def find_files(request: Request) -> Response:
    """Tell whether the files of a COPY are here already, and where to upload them."""
    control = Control(request)
    control.actor.require("template:write")
    template = await _own(control)
    slug, digest = template.template.slug, _digest_of(request)
    uploads = control.services.uploads
    permit, signature = uploads.permit(control.actor, slug, digest)
    query = urlencode({"by": permit.by, "expires": permit.expires, "signature": signature})
    url = f"{_origin(control)}/templates/{slug}/files/{digest}?{query}"
    is_there = await uploads.has(control.actor, uploads.named(control.actor, slug, digest))
    return JSONResponse({"present": is_there, "url": url}, status_code=201)


def _digest_of(request: Request) -> str:
    digest = str(request.path_params["digest"])
    if not _DIGEST.fullmatch(digest):
        raise InvalidArgumentError("cannot use the hash: it is no SHA-256 in hex", field="hash")
    return digest


def _origin(control: Control) -> str:
    """Return the URL of this server that the client used."""
    scope, domain = control.request.scope, control.request.app.state.domain
    host = first(scope["headers"], b"host") or ""
    is_tls = domain is not None and is_below(host, domain)
    return f"{'https' if is_tls else scope['scheme']}://{host}"


@streams_body
async def upload_files(request: Request) -> Response:
    """Keep the files of a COPY for the builds that need them."""
    control = Control(request)
    slug, digest = (await _own(control)).template.slug, _digest_of(request)
    uploads = control.services.uploads
    upload_id = uploads.named(control.actor, slug, digest)
    try:
        await uploads.take(control.actor, request.stream(), upload_id=upload_id)
    except ClientDisconnect as error:
        raise InvalidArgumentError(
            "the upload did not come whole; nothing is kept", field="body"
        ) from error
    return Response(status_code=200)


@takes_body(_BODY_MAX)
async def begin(request: Request) -> Response:
    """Say what a build is to do, and begin it."""
    control = Control(request)
    body = await models.body_of(request, models.BuildBody)
    slug, _ = name_and_tag(request.path_params["template_id"])
    if body.registry is not None:
        raise InvalidArgumentError(
            "cannot use fromImageRegistry: this API takes no credentials; add them with "
            "`sandyard registry add`, and build with `sandyard template build --image`",
            field="fromImageRegistry",
        )
    steps = [
        _step(control, slug, one, f"{_STEP}{number}")
        for number, one in enumerate(body.steps or (), 1)
    ]
    base = image = stands_for = None
    if body.from_template:
        base, _ = await template_of(control, body.from_template)
    elif body.from_image:
        base = _stand_in(body.from_image, request.app.state.images)
        image, stands_for = (body.from_image, None) if base is None else (None, body.from_image)
    if image is not None:  # clients expect this account in every template
        steps = [Step(StepKind.USER, (_USER, "true"), "base"), *steps]
    wish = NewTemplate(
        slug,
        base=base,
        image=image,
        stands_for=stands_for,
        is_bare=True,
        workdir=None if image is None else HOME,
        steps=tuple(steps),
        start=body.start or None,
        ready=body.ready or None,
        force=bool(body.force),
    )
    await control.services.builds.describe(control.actor, request.path_params["build_id"], wish)
    return Response(status_code=202)


def _step(control: Control, slug: str, body: models.StepBody, phase: str) -> Step:
    try:
        kind = StepKind(body.type.upper())
    except ValueError as error:
        raise InvalidArgumentError(
            f"cannot take {phase}: {body.type[:40]!r} is none of {', '.join(StepKind)}",
            field="steps",
        ) from error
    uploads = control.services.uploads
    is_copy = kind is StepKind.COPY and body.files_hash is not None
    upload = uploads.named(control.actor, slug, str(body.files_hash)) if is_copy else None
    return Step(kind, tuple(body.args or ()), phase, upload, bool(body.force))


def _stand_in(image: str, images: dict[str, str]) -> str | None:
    """Return the template that is used for an image."""
    if "@" in image:  # this one, and no other
        return None
    folder, slash, last = image.rpartition("/")
    name = f"{folder}{slash}{last.partition(':')[0]}"
    for prefix in _HUB:
        name = name.removeprefix(prefix)
    return images.get(name)


async def status(request: Request) -> Response:
    """Return the status of a build, and the next lines of its log."""
    control = Control(request)
    control.actor.require("template:read")
    slug, _ = name_and_tag(request.path_params["template_id"])
    offset = _number(request, "logsOffset", 0, 2**31 - 1)
    limit = _number(request, "limit", _LINES_MAX, _LINES_MAX)
    build, lines = await control.services.builds.look(
        control.actor,
        slug,
        request.path_params["build_id"],
        after=offset,
        limit=limit,
        wait_s=_WAIT_S,
    )
    values: dict[str, object] = {
        "templateID": build.slug,
        "buildID": build.id,
        "status": _BUILD_STATUS.get(build.status, "error"),
        "logs": [one.text for one in lines],
        "logEntries": [_entry(one) for one in lines],
    }
    if build.error is not None:
        values["reason"] = {"message": build.error, "step": _step_of(build.phase), "logEntries": []}
    return JSONResponse(values)


def _step_of(phase: str) -> str:
    """Return what clients call the step that a phase of a build belongs to."""
    if phase.startswith(_STEP):
        return phase.removeprefix(_STEP)
    return "finalize" if phase in _FINALLY else "base"


def _entry(line: BuildLine) -> dict[str, object]:
    return {
        "timestamp": models.moment(line.at),
        "message": line.text,
        "level": "info",
        "step": _step_of(line.phase),
    }


def _number(request: Request, name: str, default: int, most: int) -> int:
    text = request.query_params.get(name, str(default))
    is_number = text.isascii() and text.isdigit() and len(text) <= len(str(most))
    if not is_number or int(text) > most:
        raise InvalidArgumentError(f"cannot use {name}: it must be 0 to {most}", field=name)
    return int(text)


# --- tags -----------------------------------------------------------------------------------


async def assign_tags(request: Request) -> Response:
    """Give the version that a name means more tags."""
    control = Control(request)
    body = await models.body_of(request, models.TagsBody)
    name, tag = name_and_tag(body.target)
    templates = control.services.templates
    own = await templates.own(control.actor, name)
    version = own.tagged(tag or DEFAULT_TAG) or (own.current if tag is None else None)
    if version is None:
        raise NotFoundError(f"cannot find the version {body.target[:200]!r}: there is no such tag")
    tags = [one.lower() for one in body.tags]
    check_tags(tags)
    check_count(own.template, tags)
    for one in tags:
        await templates.tag(control.actor, name, one, version.number)
    values = {"tags": tags, "buildID": version.build_id}
    return JSONResponse(values, status_code=201)


async def remove_tags(request: Request) -> Response:
    """Remove tags; the versions stay. A tag that is not there needs no removal."""
    control = Control(request)
    body = await models.body_of(request, models.UntagBody)
    name, tag = name_and_tag(body.name)
    if tag is not None:
        raise InvalidArgumentError(
            "cannot use name: give the template's name alone, and its tags in tags", field="name"
        )
    own = await control.services.templates.own(control.actor, name)
    tags = {one.lower() for one in body.tags}
    if DEFAULT_TAG in tags:
        raise InvalidArgumentError(
            f"cannot remove the tag {DEFAULT_TAG}: assign it to another version instead",
            field="tags",
        )
    for one in sorted(tags & {*own.template.tags}):
        await control.services.templates.untag(control.actor, name, one)
    return Response(status_code=204)


async def list_tags(request: Request) -> Response:
    """List the tags of a template."""
    control = Control(request)
    control.actor.require("template:read")
    own = await _own(control)
    values = [
        {"tag": tag, "buildID": one.build_id, "createdAt": models.moment(one.created_at)}
        for one in own.versions
        for tag in own.tags_of(one)
    ]
    return JSONResponse(values)


async def _own(control: Control) -> OwnTemplate:
    name, _ = name_and_tag(control.request.path_params["template_id"])
    return await control.services.templates.own(control.actor, name)


_FILES = "/templates/{template_id:path}/files/{digest}"
ROUTES: Final = [
    Route("/templates", list_templates, methods=["GET"]),
    Route("/v2/templates", list_templates, methods=["GET"]),
    Route("/v3/templates", announce, methods=["POST"]),
    Route("/templates/tags", assign_tags, methods=["POST"]),
    Route("/templates/tags", remove_tags, methods=["DELETE"]),
    Route("/templates/aliases/{alias:path}", by_alias, methods=["GET"]),
    Route(_FILES, find_files, methods=["GET"]),
    Route(_FILES, upload_files, methods=["PUT"]),
    Route("/v2/templates/{template_id:path}/builds/{build_id}", begin, methods=["POST"]),
    Route("/templates/{template_id:path}/builds/{build_id}/status", status, methods=["GET"]),
    Route("/templates/{template_id:path}/tags", list_tags, methods=["GET"]),
    Route("/templates/{template_id:path}", remove, methods=["DELETE"]),
]
"""What is served."""
