"""Workspaces and their files as HTTP carries them.

A file is named by its path in the workspace. One that is not UTF-8 is named `base64:` and the path
in base64, in every field and parameter.
"""

import base64
import binascii
import json
import mimetypes
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any, Literal

from pydantic import ConfigDict, Field
from pydantic.config import JsonDict

from sandyard.server.api.errors import error_out
from sandyard.server.api.models.base import Body, Content, Model, Time, Title
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ids import SLUG, checked_text
from sandyard.server.core.records import Sandbox, Workspace
from sandyard.server.service.actor import Actor
from sandyard.server.service.workspaces.beneath import Parts
from sandyard.server.service.workspaces.files import BATCH_MAX, EntryOutcome, name_of, path_of
from sandyard.server.service.workspaces.tree import TreeEntry
from sandyard.server.service.workspaces.workspaces import Owned, Storage

CODED = b"base64:"
"""How a path or a name begins that is not UTF-8."""
_BYTES = "application/octet-stream"
_MOMENT_MAX = 253_402_300_799  # the last second of the year 9999


class CreateWorkspace(Body):
    """The body of a create."""

    name: Title = Field(examples=["Data"])
    slug: str | None = Field(
        None,
        description="A name for addresses; made from the name.",
        json_schema_extra={"pattern": SLUG},
    )
    org_id: str | None = Field(None, description="The organization; that of the credential.")


class RenameWorkspace(Body):
    """The body of a change."""

    name: Title


class WorkspaceOut(Model):
    """A workspace."""

    id: str
    slug: str
    name: str
    nfs_path: str
    size_bytes: int
    quota_bytes: int
    created_at: Time
    updated_at: Time
    last_accessed_at: Time | None
    is_personal: bool
    owner_user_id: str | None
    owner_display_name: str | None
    owner_email: str | None


class StorageUseOut(Model):
    """What all of an organization's workspaces take."""

    used_bytes: int
    quota_bytes: int = Field(description="-1 where there is no limit.")
    unlimited: bool


class WorkspacesOut(Model):
    """The workspaces of an organization."""

    workspaces: list[WorkspaceOut]
    storage: StorageUseOut


class UsageCountsOut(Model):
    """How many use a workspace."""

    mounted_sandboxes: int
    installable_agents: int = 0
    custom_agents: int = 0


class MountedOut(Model):
    """A sandbox that has a workspace mounted."""

    sandbox_id: str
    sandbox_name: str | None
    sandbox_status: str
    mount_path: str
    read_only: bool


class WorkspaceUsageOut(Model):
    """Who uses a workspace."""

    workspace_id: str
    workspace_name: str
    in_use: bool
    counts: UsageCountsOut
    mounted_sandboxes: list[MountedOut]
    installable_agents: list[str] = Field(default_factory=list)
    custom_agents: list[str] = Field(default_factory=list)


def usage_out(workspace: Workspace, mounting: Sequence[Sandbox], actor: Actor) -> WorkspaceUsageOut:
    """Return who uses a workspace; of others' sandboxes a member gets only the number."""
    seen = [one for one in mounting if actor.sees_all or one.owner_user_id == actor.user_id]
    return WorkspaceUsageOut(
        workspace_id=workspace.id,
        workspace_name=workspace.name,
        in_use=bool(mounting),
        counts=UsageCountsOut(mounted_sandboxes=len(mounting)),
        mounted_sandboxes=[
            MountedOut(
                sandbox_id=one.id,
                sandbox_name=one.name,
                sandbox_status=one.status.value,
                mount_path=mount.path,
                read_only=mount.read_only,
            )
            for one in seen
            for mount in one.mounts
            if mount.workspace_id == workspace.id
        ],
    )


class EntryOut(Model):
    """A file or folder; `lazy` and `count` are there for folders."""

    id: str = Field(examples=["/src/index.ts"])
    path: str
    value: str
    name: str
    type: Literal["file", "folder"]
    size: int
    date: Time
    mtime: Time
    mime_type: str | None
    is_link: bool = Field(description="It is a link; the rest tells what it leads to.")
    lazy: bool | None = None
    count: int | None = None


class DriveOut(Model):
    """How full a workspace is, in bytes; -1 is unlimited."""

    free: int
    total: int
    used: int


class MeasureOut(Model):
    """How much is below a path."""

    id: str
    size: int
    count: int = Field(description="Files and directories in it.")
    files: int
    folders: int


_NAME = r"^(?!\.{1,2}$)[^/\x00]{1,255}$"
_ANY_TEXT: JsonDict = {"type": "string", "contentMediaType": "text/plain"}
_TARGET_OR_CONTENTS: JsonDict = {
    "if": {"properties": {"operation": {"const": "write"}}},
    "then": {"required": ["contents"], "properties": {"contents": _ANY_TEXT}},
    "else": {
        "if": {"properties": {"operation": {"const": "rename"}}},
        "then": {
            "required": ["target"],
            "properties": {"target": {"type": "string", "pattern": _NAME}},
        },
        "else": {"required": ["target"], "properties": {"target": {"type": "string"}}},
    },
}


class CreateEntry(Body):
    """The body of a new file or folder."""

    name: str = Field(
        examples=["notes.txt"],
        json_schema_extra={"maxLength": 255, "pattern": _NAME},
    )
    type: Literal["file", "folder", "directory"] = "file"
    contents: Content = ""
    overwrite: bool = Field(False, description="Replace a file that is there.")


class ChangeEntry(Body):
    """The body of a change to one file or folder."""

    model_config = ConfigDict(json_schema_extra=_TARGET_OR_CONTENTS)

    operation: Literal["rename", "move", "copy", "write"]
    target: str | None = Field(
        None,
        description="`rename`: the new name. `move`, `copy`: an existing directory to put it into, "
        "or the new path.",
    )
    contents: Content | None = Field(None, description="`write`: the new content.")
    overwrite: bool = Field(False, description="Replace a file that has the target's name.")


class ChangeEntries(Body):
    """The body of a change to several."""

    operation: Literal["copy", "move"]
    target: str = Field(description="An existing directory.", examples=["/archive"])
    ids: list[str] = Field(
        description=f"1 to {BATCH_MAX} paths.",
        json_schema_extra={"minItems": 1, "maxItems": BATCH_MAX},
    )
    overwrite: bool = False


class RemoveEntries(Body):
    """The body of a removal."""

    ids: list[str] = Field(
        description=f"1 to {BATCH_MAX} paths.",
        json_schema_extra={"minItems": 1, "maxItems": BATCH_MAX},
    )


class OutcomeOut(Model):
    """What became of one of several."""

    id: str
    ok: bool
    entry: EntryOut | None = None
    error: dict[str, Any] | None = Field(None, description="code and message, if it was not done.")


class OutcomesOut(Model):
    """What became of each."""

    results: list[OutcomeOut]
    done: int
    failed: int


class WorkspaceRemovedOut(Model):
    """A workspace was removed."""

    id: str
    deleted: bool


def workspace_out(owned: Owned) -> WorkspaceOut:
    """Return a workspace as it is shown."""
    one, owner = owned.workspace, owned.owner
    return WorkspaceOut(
        id=one.id,
        slug=one.slug,
        name=one.name,
        nfs_path=f"/{one.id}",
        size_bytes=one.size_bytes,
        quota_bytes=one.quota_bytes,
        created_at=one.created_at,
        updated_at=one.updated_at,
        last_accessed_at=one.last_accessed_at,
        is_personal=one.is_personal,
        owner_user_id=one.owner_user_id,
        owner_display_name=owner.display_name if owner else None,
        owner_email=owner.email if owner else None,
    )


def storage_use_out(storage: Storage) -> StorageUseOut:
    """Return what an organization keeps as it is shown."""
    quota = storage.quota_bytes
    return StorageUseOut(
        used_bytes=storage.used_bytes,
        quota_bytes=-1 if quota is None else quota,
        unlimited=quota is None,
    )


def path_in(text: str, *, field: str) -> Parts:
    """Return the path that a client names.

    Raises:
        InvalidArgumentError: it is none.
    """
    return path_of(_plain(text, field=field), field=field)


def name_in(text: str, *, field: str) -> bytes:
    """Return the single name that a client gives.

    Raises:
        InvalidArgumentError: it is none.
    """
    return name_of(_plain(text, field=field), field=field)


def _plain(text: str, *, field: str) -> bytes:
    plain = checked_text(text, field=field).encode()
    return coded(plain.removeprefix(CODED), field=field) if plain.startswith(CODED) else plain


def coded(text: bytes, *, field: str) -> bytes:
    """Return what base64 says.

    Raises:
        InvalidArgumentError: it is none.
    """
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidArgumentError(f"cannot read this in base64: {error}", field=field) from error


def id_of(path: Parts) -> str:
    """Return the name by which clients know a path."""
    plain = b"/" + b"/".join(path)
    try:
        return plain.decode()
    except UnicodeDecodeError:
        return (CODED + base64.b64encode(plain)).decode()


def _entry_values(entry: TreeEntry) -> dict[str, Any]:
    name = entry.name.decode("utf-8", "replace")
    modified = datetime.fromtimestamp(max(0.0, min(_MOMENT_MAX, entry.modified)), UTC)
    stamp = modified.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    an_id = id_of(entry.path)
    values: dict[str, Any] = {
        "id": an_id,
        "path": an_id,
        "value": name,
        "name": name,
        "type": "folder" if entry.is_folder else "file",
        "size": entry.size,
        "date": stamp,
        "mtime": stamp,
        "mimeType": None if entry.is_folder else kind_of(name),
        "isLink": entry.is_link,
    }
    return {**values, "lazy": True, "count": entry.count} if entry.is_folder else values


def entries_json(entries: Sequence[TreeEntry]) -> bytes:
    """Return a listing, written out; of very many, which is for a thread."""
    return json.dumps([_entry_values(one) for one in entries], ensure_ascii=False).encode()


def entry_out(entry: TreeEntry) -> EntryOut:
    """Return a file or folder as it is shown."""
    values = _entry_values(entry)
    moment = datetime.fromisoformat(values["date"])
    return EntryOut.model_validate({**values, "date": moment, "mtime": moment})


def kind_of(name: str) -> str:
    """Return a file's media type by its name."""
    kind, packed = mimetypes.guess_type(name)
    if packed is not None:  # what is sent is what is packed
        return {"gzip": "application/gzip", "bzip2": "application/x-bzip2"}.get(packed, _BYTES)
    return kind or _BYTES


def outcomes_out(done: Sequence[EntryOutcome]) -> OutcomesOut:
    """Return what became of each as it is shown."""
    results = [
        OutcomeOut(
            id=id_of(one.path),
            ok=one.error is None,
            entry=entry_out(one.entry) if one.entry else None,
            error=error_out(one.error) if one.error else None,
        )
        for one in done
    ]
    failed = sum(not one.ok for one in results)
    return OutcomesOut(results=results, done=len(results) - failed, failed=failed)
