"""Workspaces and their files."""

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Header, Query, Request, Response

from sandyard.server.api.access import Scope
from sandyard.server.api.models.base import Data
from sandyard.server.api.models.workspaces import (
    ChangeEntries,
    ChangeEntry,
    CreateEntry,
    CreateWorkspace,
    DriveOut,
    EntryOut,
    MeasureOut,
    OutcomesOut,
    RemoveEntries,
    RenameWorkspace,
    WorkspaceOut,
    WorkspaceRemovedOut,
    WorkspacesOut,
    WorkspaceUsageOut,
    entries_json,
    entry_out,
    id_of,
    kind_of,
    name_in,
    outcomes_out,
    path_in,
    storage_use_out,
    usage_out,
    workspace_out,
)
from sandyard.server.api.paths import WHOLE
from sandyard.server.api.routes.common import (
    Keyed,
    KeyHeader,
    enveloped,
    errors,
    provided,
    repeatable,
)
from sandyard.server.api.uploads import Upload
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ids import checked_text
from sandyard.server.front.bodies import streams_body, takes_body
from sandyard.server.front.downloads import exactly, file_headers, span_of
from sandyard.server.front.streams import HeldStream
from sandyard.server.service.actor import Actor
from sandyard.server.service.workspaces.beneath import Parts
from sandyard.server.service.workspaces.files import WorkspaceFiles
from sandyard.server.service.workspaces.tree import TreeEntry
from sandyard.server.service.workspaces.workspaces import Workspaces
from sandyard.server.tasks import in_thread

router = APIRouter(prefix="/v1/workspaces", tags=["workspaces"])

_PATH = f"{{path:{WHOLE}}}"
_FILES = f"/{{reference}}/files/{_PATH}"
_INFO = f"/{{reference}}/info/{_PATH}"
_UPLOAD = f"/{{reference}}/upload/{_PATH}"
_FORM = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "name": {"type": "string", "minLength": 1},
                    },
                }
            }
        },
    }
}
_CONTENTS_MAX = 10 * 1024 * 1024
_BATCH_MAX = 2 * 1024 * 1024  # of the longest paths there are

CanRead = Annotated[Actor, Depends(Scope("files:read"))]
CanWrite = Annotated[Actor, Depends(Scope("files:write"))]
Service = Annotated[Workspaces, provided("workspaces")]
Files = Annotated[WorkspaceFiles, provided("workspace_files")]


async def _reference(reference: str) -> str:
    return checked_text(reference, field="reference")


Which = Annotated[str, Depends(_reference)]


async def _path(path: str = "") -> Parts:
    return path_in(path, field="path")


Where = Annotated[Parts, Depends(_path)]
Hidden = Annotated[bool, Query(alias="showHidden", description="Names that begin with `.`, too.")]


@router.get("", responses=errors())
async def list_workspaces(
    request: Request,
    actor: CanRead,
    service: Service,
    of_all: Annotated[
        bool, Query(alias="all", description="Personal ones of all members; for admins.")
    ] = False,
) -> Data[WorkspacesOut]:
    """List the organization's workspaces and the user's own, newest first."""
    found, storage = await service.page(actor, of_all=of_all)
    return enveloped(
        request,
        WorkspacesOut(
            workspaces=[workspace_out(one) for one in found], storage=storage_use_out(storage)
        ),
    )


@router.post("", status_code=201, responses=errors(404, 409))
async def create_workspace(
    request: Request, actor: CanWrite, service: Service, body: CreateWorkspace, keyed: Keyed
) -> Data[WorkspaceOut]:
    """Create a workspace for the organization."""
    made = await service.create(actor, body.name, body.slug, org_id=body.org_id, request=keyed)
    return enveloped(request, workspace_out(made))


@router.get("/{reference}", responses=errors(404))
async def get_workspace(
    request: Request, actor: CanRead, service: Service, reference: Which
) -> Data[WorkspaceOut]:
    """Return one workspace, by id or slug."""
    return enveloped(request, workspace_out(await service.get(actor, reference)))


@router.patch("/{reference}", responses=errors(404))
async def rename_workspace(
    request: Request, actor: CanWrite, service: Service, reference: Which, body: RenameWorkspace
) -> Data[WorkspaceOut]:
    """Rename a workspace. Its slug does not change."""
    return enveloped(request, workspace_out(await service.rename(actor, reference, body.name)))


@router.get("/{reference}/usage", responses=errors(404))
async def get_workspace_usage(
    request: Request, actor: CanRead, service: Service, reference: Which
) -> Data[WorkspaceUsageOut]:
    """Return the sandboxes that have a workspace mounted."""
    found, mounting = await service.mounting(actor, reference)
    return enveloped(request, usage_out(found, mounting, actor))


@router.delete("/{reference}", responses=errors(404, 409))
async def delete_workspace(
    request: Request,
    actor: CanWrite,
    service: Service,
    reference: Which,
    force: Annotated[bool, Query(description="Also if a sandbox has it mounted.")] = False,
) -> Data[WorkspaceRemovedOut]:
    """Delete a workspace and its files."""
    gone = await service.delete(actor, reference, force=force)
    return enveloped(request, WorkspaceRemovedOut(id=gone.id, deleted=True))


# --- its files --------------------------------------------------------------------------------


@router.get("/{reference}/files", responses=errors(404, 413), response_model=list[EntryOut])
@router.get(_FILES, responses=errors(404, 413), response_model=list[EntryOut])
async def list_files(
    actor: CanRead, files: Files, reference: Which, path: Where, hidden: Hidden = False
) -> Response:
    """List a directory: subdirectories first, by name."""
    found = await files.entries(actor, reference, path, hidden=hidden)
    return Response(await in_thread(entries_json, found), media_type="application/json")


@router.get("/{reference}/info", responses=errors(404))
async def get_drive_info(actor: CanRead, files: Files, reference: Which) -> list[DriveOut]:
    """Return a workspace's capacity and usage."""
    used, total = await files.drive(actor, reference)
    return [DriveOut(free=max(0, total - used), total=total, used=used)]


@router.get(_INFO, responses=errors(404, 413))
async def get_file_info(
    request: Request, actor: CanRead, files: Files, reference: Which, path: Where
) -> Data[MeasureOut]:
    """Return the size and number of entries below a path."""
    found = await files.measure(actor, reference, path)
    return enveloped(
        request,
        MeasureOut(
            id=id_of(path),
            size=found.size,
            count=found.files + found.folders,
            files=found.files,
            folders=found.folders,
        ),
    )


@router.post("/{reference}/files", status_code=201, responses=errors(404, 409, 413))
@router.post(_FILES, status_code=201, responses=errors(404, 409, 413))
@takes_body(_CONTENTS_MAX)
async def create_file(
    request: Request,
    actor: CanWrite,
    files: Files,
    reference: Which,
    path: Where,
    body: CreateEntry,
    keyed: Keyed,
) -> Data[EntryOut]:
    """Create a file or directory. Missing parent directories are created."""
    name = name_in(body.name, field="name")

    async def create() -> TreeEntry:
        if body.type != "file":
            return await files.make_folder(actor, reference, (*path, name))
        return await files.write(
            actor, reference, path, _once(body.contents), lambda: name, replaces=body.overwrite
        )

    made = await files.create(actor, reference, create, request=keyed)
    return enveloped(request, entry_out(made))


async def _once(contents: str) -> AsyncIterator[bytes]:
    yield contents.encode("utf-8", "surrogatepass")


@router.post(
    "/{reference}/upload", status_code=201, responses=errors(404, 409, 413), openapi_extra=_FORM
)
@router.post(_UPLOAD, status_code=201, responses=errors(404, 409, 413), openapi_extra=_FORM)
@streams_body
async def upload_file(
    request: Request,
    actor: CanWrite,
    files: Files,
    reference: Which,
    path: Where,
    folder: Annotated[
        str, Query(alias="id", description="The directory, if the path does not name it.")
    ] = "",
    overwrite: Annotated[bool, Query(description="Replace a file that is there.")] = True,
    idempotency_key: KeyHeader = None,
) -> Data[EntryOut]:
    """Upload a file as a form: the field `file`, and optionally `name`. The file appears when the
    upload is complete."""
    upload = Upload(request.headers.get("content-type", ""), request.stream())

    async def create() -> TreeEntry:
        return await files.write(
            actor,
            reference,
            path or path_in(folder, field="id"),
            upload.pieces(),
            upload.name,
            replaces=overwrite,
            most=files.upload_max,
        )

    # What is uploaded is not compared: it may be large, and each form has another boundary.
    keyed = repeatable(request, idempotency_key, request.scope["query_string"])
    made = await files.create(actor, reference, create, request=keyed)
    return enveloped(request, entry_out(made))


@router.put(_FILES, responses=errors(404, 409, 413))
@takes_body(_CONTENTS_MAX)
async def change_file(
    request: Request,
    actor: CanWrite,
    files: Files,
    reference: Which,
    path: Where,
    body: ChangeEntry,
) -> Data[EntryOut]:
    """Rename, move, copy or write one file, or a directory and its contents."""
    if body.operation == "write":
        if body.contents is None:
            raise InvalidArgumentError("cannot write without contents", field="contents")
        if not path:
            raise InvalidArgumentError("cannot write to the workspace's root", field="path")
        done = await files.write(
            actor, reference, path[:-1], _once(body.contents), lambda: path[-1], replaces=True
        )
        return enveloped(request, entry_out(done))
    if body.target is None:
        raise InvalidArgumentError(f"cannot {body.operation} without a target", field="target")
    if body.operation == "rename":
        name = name_in(body.target, field="target")
        done = await files.rename(actor, reference, path, name, replaces=body.overwrite)
    else:
        target = path_in(body.target, field="target")
        work = files.move if body.operation == "move" else files.copy
        done = await work(actor, reference, path, target, replaces=body.overwrite)
    return enveloped(request, entry_out(done))


@router.put("/{reference}/files", responses=errors(404, 409, 413))
@takes_body(_BATCH_MAX)
async def change_files(
    request: Request, actor: CanWrite, files: Files, reference: Which, body: ChangeEntries
) -> Data[OutcomesOut]:
    """Move or copy several entries into a directory. The answer reports each outcome."""
    done = await files.place(
        actor,
        reference,
        [path_in(one, field="ids") for one in body.ids],
        path_in(body.target, field="target"),
        copies=body.operation == "copy",
        replaces=body.overwrite,
    )
    return enveloped(request, outcomes_out(done))


@router.delete("/{reference}/files", responses=errors(404, 413))
@takes_body(_BATCH_MAX)
async def remove_files(
    request: Request, actor: CanWrite, files: Files, reference: Which, body: RemoveEntries
) -> Data[OutcomesOut]:
    """Delete files, and directories with their contents. The answer reports each outcome."""
    paths = [path_in(one, field="ids") for one in body.ids]
    return enveloped(request, outcomes_out(await files.remove(actor, reference, paths)))


@router.get(
    "/{reference}/direct",
    responses={
        **errors(404),
        200: {"description": "The file.", "content": {"application/octet-stream": {}}},
        206: {"description": "The part of it that was asked for."},
        416: {"description": "It has no such part."},
    },
    response_model=None,
)
async def read_workspace_file(
    request: Request,
    actor: CanRead,
    files: Files,
    reference: Which,
    which: Annotated[str, Query(alias="id", description="Its path.")],
    download: Annotated[bool, Query(description="To be kept, not shown.")] = False,
    range_: Annotated[str | None, Header(alias="Range")] = None,
    if_range: Annotated[str | None, Header(alias="If-Range")] = None,
) -> Any:
    """Read a file, or a range of it."""
    path = path_in(which, field="id")
    async with AsyncExitStack() as opening:
        reading = await opening.enter_async_context(files.read(actor, reference, path))
        held = opening.pop_all()
    size = reading.entry.size
    name = reading.entry.name.decode("utf-8", "replace")
    how = "attachment" if download else "inline"
    headers = file_headers(name, reading.entry.modified, how=how)
    span = span_of(range_, if_range, size)
    wanted = range(size) if span is None else span
    status = 200
    if span is not None:
        status = 206 if span else 416
        sent = f"{span.start}-{span.stop - 1}" if span else "*"
        headers["Content-Range"] = f"bytes {sent}/{size}"
    if status == 416 or getattr(request.state, "is_head", False):
        await held.aclose()
        if status != 416:
            headers["Content-Length"] = str(len(wanted))
        return Response(status_code=status, media_type=kind_of(name), headers=headers)
    headers["Content-Length"] = str(len(wanted))
    return HeldStream(
        exactly(reading.pieces(wanted.start, len(wanted)), len(wanted)),
        held,
        media_type=kind_of(name),
        headers=headers,
        status_code=status,
    )
