"""Files in sandboxes."""

import mimetypes
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Any
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Header, Query, Request, Response
from starlette.requests import ClientDisconnect

from sandyard.server.api.access import Scope, takes_query_key, takes_signature
from sandyard.server.api.events import EventStream, Recheck, SseEvent, rechecked
from sandyard.server.api.models.base import Data
from sandyard.server.api.models.files import (
    ETAG,
    OCTAL,
    FileOut,
    FileRemovedOut,
    ListingOut,
    MakeFolderBody,
    MoveBody,
    SignBody,
    SignedOut,
    WrittenOut,
    change_out,
    etag_of,
    file_out,
    given_path,
    octal,
    path_in,
    shown,
    version_in,
)
from sandyard.server.api.routes.common import Keyed, enveloped, errors, provided
from sandyard.server.core import ops
from sandyard.server.core.errors import (
    AgentError,
    InvalidArgumentError,
)
from sandyard.server.core.ids import checked_text
from sandyard.server.core.ops import FileChange, FileFact
from sandyard.server.front.bodies import streams_body
from sandyard.server.front.downloads import exactly, file_headers, requested_range
from sandyard.server.front.streams import HeldStream
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.fields import ACCOUNT
from sandyard.server.service.sandboxes.files import DEPTH_MAX, LIST_MAX, Files
from sandyard.server.service.sandboxes.signing import Signing, moment_of

router = APIRouter(prefix="/v1/sandboxes/{reference}/files", tags=["files"])


CanWrite = Annotated[Actor, Depends(Scope("sandbox:write"))]
Service = Annotated[Files, provided("files")]
MayWatch = Annotated[Recheck, rechecked("sandbox:write")]
Signer = Annotated[Signing, provided("signing")]
_ACCOUNT = {"minLength": 1, "maxLength": 64, "pattern": ACCOUNT}
User = Annotated[
    str, Query(description="Who does it: a name or a number.", json_schema_extra=_ACCOUNT)
]
Owner = Annotated[
    str | None, Query(description="The owner: a name or a number.", json_schema_extra=_ACCOUNT)
]


async def _where(
    request: Request,
    path: Annotated[
        str | None,
        Query(description="Where it is; without / at its beginning, below /workspace."),
    ] = None,
    path_base64: Annotated[
        str | None,
        Query(alias="pathBase64", description="The same in base64, if it is not UTF-8."),
    ] = None,
) -> bytes:
    """Return the path that a query names."""
    del path
    return given_path(path_in(request.scope["query_string"]), path_base64, field="path")


Where = Annotated[bytes, Depends(_where)]


@router.get(
    "",
    responses={
        **errors(402, 404, 409),
        200: {"description": "The file.", "content": {"application/octet-stream": {}}},
        206: {"description": "The part of it that was asked for."},
        304: {"description": "It has not changed."},
        416: {"description": "It has no such part."},
    },
    response_model=None,
)
@takes_signature
async def read_file(
    request: Request,
    actor: CanWrite,
    service: Service,
    reference: str,
    where: Where,
    user: User = "root",
    range_: Annotated[str | None, Header(alias="Range")] = None,
    if_range: Annotated[str | None, Header(alias="If-Range")] = None,
    if_none_match: Annotated[
        str | None,
        Header(
            description="Answer 304 if the file still has this entity tag.",
            json_schema_extra={"pattern": ETAG},
        ),
    ] = None,
) -> Any:
    """Read a file, or a range of it."""
    known = version_in(if_none_match, field="If-None-Match")
    reference = checked_text(reference, field="reference")
    begin, end = requested_range(range_, if_range) or (None, None)
    if begin is None and end is not None:  # the last so many bytes
        async with service.read(actor, reference, ops.Read(where, 0, 0, user)) as looked_at:
            size = looked_at.fact.size
        begin, end = (max(0, size - end), None) if size else (None, None)
    length = None if end is None or begin is None else end - begin + 1
    is_head = getattr(request.state, "is_head", False)
    wish = ops.Read(where, begin or 0, 0 if is_head else length, user)
    async with AsyncExitStack() as opening:
        reading = await opening.enter_async_context(service.read(actor, reference, wish))
        size = reading.fact.size
        if size == 0 and begin is not None:  # it ends where it ends: there is only the whole
            await opening.aclose()
            begin = length = None
            wish = ops.Read(where, 0, 0 if is_head else None, user)
            reading = await opening.enter_async_context(service.read(actor, reference, wish))
            size = reading.fact.size
        name = shown(reading.fact.path).rpartition("/")[2]
        headers = file_headers(name, reading.fact.modified_ms / 1000, how="attachment")
        etag = etag_of(reading.fact)
        if etag is not None:
            headers["ETag"] = etag
        if known is not None and known in ("*", reading.fact.version):
            return Response(status_code=304, headers=headers)
        if begin is not None and begin >= size > 0:
            headers["Content-Range"] = f"bytes */{size}"
            return Response(status_code=416, headers=headers)
        held = opening.pop_all()
    # A file of /proc has no size, and ends where it ends.
    count = None if size == 0 else min(length or size, size - (begin or 0))
    if count is not None:
        headers["Content-Length"] = str(count)
    is_part = begin is not None and count is not None
    if is_part:
        headers["Content-Range"] = f"bytes {begin}-{(begin or 0) + (count or 0) - 1}/{size}"
    kind = mimetypes.guess_type(shown(where))[0] or "application/octet-stream"
    status = 206 if is_part else 200
    if is_head:
        await held.aclose()
        return Response(status_code=status, media_type=kind, headers=headers)
    return HeldStream(
        exactly(reading.pieces(count), count),
        held,
        media_type=kind,
        headers=headers,
        status_code=status,
    )


@router.put("", status_code=201, responses=errors(402, 404, 409, 412))
@streams_body
@takes_signature
async def write_file(
    request: Request,
    actor: CanWrite,
    service: Service,
    reference: str,
    where: Where,
    user: User = "root",
    mode: Annotated[
        str | None, Query(description="Permissions, octal.", json_schema_extra={"pattern": OCTAL})
    ] = None,
    owner: Owner = None,
    parents: Annotated[bool, Query(description="Create missing parent directories.")] = True,
    in_place: Annotated[
        bool,
        Query(
            alias="inPlace",
            description="Write over what is there, which is neither whole nor gone meanwhile.",
        ),
    ] = False,
    if_match: Annotated[
        str | None,
        Header(
            description="Write only if the file has this entity tag.",
            json_schema_extra={"pattern": ETAG},
        ),
    ] = None,
    if_none_match: Annotated[
        str | None,
        Header(
            description="`*`: write only if there is no file yet.",
            json_schema_extra={"pattern": r"^\*$"},
        ),
    ] = None,
) -> Data[WrittenOut]:
    """Write the request body to a file. The old content stays until the upload is complete."""
    reference = checked_text(reference, field="reference")
    if if_none_match and if_none_match.strip() != "*":
        raise InvalidArgumentError(
            "cannot use {field}: for a write it can be * only", field="If-None-Match"
        )
    wish = ops.Write(
        where,
        in_place,
        parents,
        octal(mode),
        owner,
        user,
        if_version=version_in(if_match, field="If-Match"),
        is_new=bool(if_none_match),
    )
    try:
        size, fact = await service.write(actor, reference, wish, request.stream())
    except ClientDisconnect as error:
        raise InvalidArgumentError(
            "the file did not come whole; nothing was written", field="body"
        ) from error
    return enveloped(request, WrittenOut(path=shown(where), size=size, etag=etag_of(fact)))


@router.delete("", responses=errors(402, 404, 409))
async def remove_file(
    request: Request,
    actor: CanWrite,
    service: Service,
    reference: str,
    where: Where,
    user: User = "root",
    recursive: Annotated[bool, Query(description="Delete a directory with its contents.")] = False,
) -> Data[FileRemovedOut]:
    """Delete a file or an empty directory, or with `recursive` a directory and its contents."""
    reference = checked_text(reference, field="reference")
    await service.ask(actor, reference, ops.Remove(where, recursive, user))
    return enveloped(request, FileRemovedOut(path=shown(where), deleted=True))


@router.get("/list", responses=errors(402, 404, 409))
async def list_folder(
    request: Request,
    actor: CanWrite,
    service: Service,
    reference: str,
    where: Where,
    user: User = "root",
    depth: Annotated[int, Query(ge=1, le=DEPTH_MAX)] = 1,
    limit: Annotated[int, Query(ge=1, le=LIST_MAX)] = LIST_MAX,
) -> Data[ListingOut]:
    """List a directory by name. With `depth`, each subdirectory is followed by its contents."""
    reference = checked_text(reference, field="reference")
    found = await service.list(actor, reference, ops.ListFolder(where, depth, limit, user))
    entries = [file_out(one) for one in found.entries]
    return enveloped(
        request, ListingOut(path=shown(where), entries=entries, truncated=found.is_cut)
    )


@router.get("/stat", responses=errors(402, 404, 409))
async def stat_file(
    request: Request,
    actor: CanWrite,
    service: Service,
    reference: str,
    where: Where,
    user: User = "root",
) -> Data[FileOut]:
    """Return the metadata of a path."""
    reference = checked_text(reference, field="reference")
    return enveloped(
        request, file_out(await _stat(service, actor, reference, ops.Stat(where, user)))
    )


@router.get(
    "/archive",
    responses={
        **errors(402, 404, 409),
        200: {"description": "A tar archive.", "content": {"application/x-tar": {}}},
    },
    response_model=None,
)
async def pack_folder(
    request: Request,
    actor: CanWrite,
    service: Service,
    reference: str,
    where: Where,
    user: User = "root",
) -> Any:
    """Download a directory as a tar archive."""
    reference = checked_text(reference, field="reference")
    if getattr(request.state, "is_head", False):
        await _stat(service, actor, reference, ops.Stat(where, user))
        return Response(media_type="application/x-tar")
    async with AsyncExitStack() as opening:
        pieces = await opening.enter_async_context(service.pack(actor, reference, where, user))
        held = opening.pop_all()
    name = (shown(where).rstrip("/").rpartition("/")[2] or "root") + ".tar"
    headers = file_headers(name, how="attachment")
    return HeldStream(pieces, held, media_type="application/x-tar", headers=headers)


@router.put("/archive", status_code=201, responses=errors(402, 404, 409))
@streams_body
async def unpack_folder(
    request: Request,
    actor: CanWrite,
    service: Service,
    reference: str,
    where: Where,
    user: User = "root",
) -> Data[FileOut]:
    """Unpack a tar archive into a directory, which is created if necessary."""
    reference = checked_text(reference, field="reference")
    try:
        found = await service.unpack(actor, reference, where, user, request.stream())
    except ClientDisconnect as error:
        raise InvalidArgumentError("the archive did not come whole", field="body") from error
    return enveloped(request, file_out(found))


@router.post("/mkdir", status_code=201, responses=errors(402, 404, 409))
async def make_folder(
    request: Request, actor: CanWrite, service: Service, reference: str, body: MakeFolderBody
) -> Data[FileOut]:
    """Create a directory."""
    where = given_path(body.path, body.path_base64, field="path")
    wish = ops.MakeFolder(where, body.parents, octal(body.mode), body.owner, body.user)
    reference = checked_text(reference, field="reference")
    return enveloped(request, file_out(await _stat(service, actor, reference, wish)))


@router.post("/move", responses=errors(402, 404, 409))
async def move_file(
    request: Request, actor: CanWrite, service: Service, reference: str, body: MoveBody
) -> Data[FileOut]:
    """Move or rename a file or directory."""
    reference = checked_text(reference, field="reference")
    wish = ops.Move(*_both(body), body.overwrite, body.user)
    return enveloped(request, file_out(await _stat(service, actor, reference, wish)))


@router.post("/copy", status_code=201, responses=errors(402, 404, 409))
async def copy_file(
    request: Request, actor: CanWrite, service: Service, reference: str, body: MoveBody
) -> Data[FileOut]:
    """Copy a file, or a directory and its contents."""
    reference = checked_text(reference, field="reference")
    wish = ops.Copy(*_both(body), body.overwrite, body.user)
    return enveloped(request, file_out(await _stat(service, actor, reference, wish)))


@router.get(
    "/watch",
    responses={
        **errors(402, 404, 409),
        200: {"description": "Events.", "content": {"text/event-stream": {}}},
    },
    response_model=None,
)
@takes_query_key
async def watch_folder(
    request: Request,
    actor: CanWrite,
    service: Service,
    check: MayWatch,
    reference: str,
    where: Where,
    user: User = "root",
    recursive: Annotated[bool, Query(description="All that is in it, too.")] = False,
) -> Any:
    """Watch a directory by server-sent events.

    An event `change` reports each entry that is created, changed, moved or deleted after the answer
    has begun. `overflow` says that events were dropped. `error` with the reason `absent` says that
    the directory was deleted.
    """
    reference = checked_text(reference, field="reference")
    if getattr(request.state, "is_head", False):
        await _stat(service, actor, reference, ops.Stat(where, user))
        return Response(media_type="text/event-stream")
    wish = ops.WatchFolder(where, recursive, user)
    async with AsyncExitStack() as opening:
        changes = await opening.enter_async_context(service.watch(actor, reference, wish))
        held = opening.pop_all()
    return EventStream(_events_of(changes), held, check)


async def _events_of(changes: AsyncIterator[FileChange]) -> AsyncIterator[SseEvent]:
    async for one in changes:
        name = "overflow" if one.kind is ops.ChangeKind.OVERFLOW else "change"
        yield SseEvent(name, change_out(one))


@router.post("/sign", status_code=201, responses=errors(404))
async def sign_file(
    request: Request,
    actor: CanWrite,
    service: Signer,
    reference: str,
    body: SignBody,
    keyed: Keyed,
) -> Data[SignedOut]:
    """Create a URL that reads or writes one file without a key, until it expires.

    It is valid for one method, path and user. It stops working with the API key that created it,
    or, if a session created it, with the user's membership.
    """
    where = given_path(body.path, body.path_base64, field="path")
    use, signature = await service.sign(
        actor,
        checked_text(reference, field="reference"),
        body.method.upper(),
        where,
        body.user,
        body.expires_in,
        request=keyed,
    )
    query = urlencode(
        {"path": use.path, "user": use.user, "expires": use.expires, "by": use.by,
         "signature": signature}
    )  # fmt: skip
    url = f"{str(request.base_url).rstrip('/')}/v1/sandboxes/{use.sandbox_id}/files?{query}"
    return enveloped(request, SignedOut(url=url, method=use.method, expires_at=moment_of(use)))


def _both(body: MoveBody) -> tuple[bytes, bytes]:
    return (
        given_path(body.source, body.source_base64, field="from"),
        given_path(body.target, body.target_base64, field="to"),
    )


async def _stat(
    service: Files,
    actor: Actor,
    reference: str,
    wish: ops.Stat | ops.MakeFolder | ops.Move | ops.Copy,
) -> FileFact:
    found = await service.ask(actor, reference, wish)
    if found is None:
        raise AgentError
    return found
