"""Files of a sandbox as HTTP carries them.

A path is text; one that is not UTF-8 is written in base64, in a field whose name ends so.
"""

import base64
import re
from datetime import UTC, datetime
from typing import Final, Literal
from urllib.parse import unquote_to_bytes

from pydantic import ConfigDict, Field
from pydantic.config import JsonDict

from sandyard.server.api.models.base import BASE64, Body, Model, Time, UserName, bounds, either
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ops import ChangeKind, FileChange, FileFact
from sandyard.server.service.sandboxes.fields import ACCOUNT
from sandyard.server.service.sandboxes.files import path_of
from sandyard.server.service.sandboxes.signing import METHODS, SECONDS

ETAG: Final = r'^(\*|(W/)?"[!#-~]{1,64}")$'
"""The pattern of an entity tag, or `*`."""
OCTAL: Final = "^0?[0-7]{1,4}$"
"""The pattern of permissions."""
_NOT_EMPTY: JsonDict = {"minLength": 1, "maxLength": 4096, "pattern": r"^[^\x00]+$"}
_BASE64: JsonDict = {"format": "byte", "minLength": 4, "pattern": BASE64}
_ETAG = re.compile(r'(?:W/)?"([!#-~]{1,64})"')
_MOMENT_MAX_MS = 253_402_300_799_000  # the last second of the year 9999


class MakeFolderBody(Body):
    """The body of a mkdir."""

    model_config = ConfigDict(json_schema_extra=either("path", "pathBase64"))

    path: str | None = Field(None, examples=["/workspace/data"], json_schema_extra=_NOT_EMPTY)
    path_base64: str | None = Field(None, json_schema_extra=_BASE64)
    parents: bool = Field(
        True, description="Make what is above it, too; one that is there is fine."
    )
    mode: str | None = Field(
        None,
        examples=["0755"],
        description="Permissions, octal.",
        json_schema_extra={"pattern": OCTAL},
    )
    owner: str | None = Field(
        None, json_schema_extra={"minLength": 1, "maxLength": 64, "pattern": ACCOUNT}
    )
    user: UserName = "root"


class MoveBody(Body):
    """The body of a move or a copy."""

    model_config = ConfigDict(
        json_schema_extra={"allOf": [either("from", "fromBase64"), either("to", "toBase64")]}
    )

    source: str | None = Field(
        None, alias="from", examples=["/workspace/a"], json_schema_extra=_NOT_EMPTY
    )
    source_base64: str | None = Field(None, alias="fromBase64", json_schema_extra=_BASE64)
    target: str | None = Field(
        None, alias="to", examples=["/workspace/b"], json_schema_extra=_NOT_EMPTY
    )
    target_base64: str | None = Field(None, alias="toBase64", json_schema_extra=_BASE64)
    overwrite: bool = Field(False, description="Replace a file that is there.")
    user: UserName = "root"


class SignBody(Body):
    """The body of a request for a signed URL."""

    model_config = ConfigDict(json_schema_extra=either("path", "pathBase64"))

    path: str | None = Field(None, examples=["/workspace/report.pdf"], json_schema_extra=_NOT_EMPTY)
    path_base64: str | None = Field(None, json_schema_extra=_BASE64)
    method: str = Field(
        "GET",
        description=f"{METHODS[0]} to read, {METHODS[1]} to write.",
        json_schema_extra={"enum": list(METHODS)},
    )
    expires_in: int = Field(
        3600,
        description="Seconds until it is good no more.",
        json_schema_extra=bounds(SECONDS.start, SECONDS.stop - 1),
    )
    user: UserName = "root"


class SignedOut(Model):
    """A URL that reads or writes one file without a key."""

    url: str
    method: str
    expires_at: Time


class FileOut(Model):
    """A file, folder or link."""

    path: str
    path_base64: str | None
    name: str
    type: Literal["file", "folder", "link", "other"]
    size: int
    mode: str
    uid: int
    gid: int
    owner: str | None
    group: str | None
    modified_at: Time
    target: str | None
    etag: str | None


class WrittenOut(Model):
    """A file was written. `etag` is for a later `If-Match`."""

    path: str
    size: int
    etag: str | None


class FileRemovedOut(Model):
    """A file was removed."""

    path: str
    deleted: bool


class ListingOut(Model):
    """What is in a folder."""

    path: str
    entries: list[FileOut]
    truncated: bool


def file_out(fact: FileFact) -> FileOut:
    """Return a file as it is shown."""
    path = shown(fact.path)
    is_text = path.encode() == fact.path
    return FileOut(
        path=path,
        path_base64=None if is_text else base64.b64encode(fact.path).decode(),
        name=path.rstrip("/").rpartition("/")[2] or "/",
        type=fact.kind.value,
        size=fact.size,
        mode=f"{fact.mode:04o}",
        uid=fact.uid,
        gid=fact.gid,
        owner=fact.owner,
        group=fact.group,
        modified_at=datetime.fromtimestamp(min(_MOMENT_MAX_MS, fact.modified_ms) / 1000, UTC),
        target=None if fact.target is None else shown(fact.target),
        etag=etag_of(fact),
    )


def etag_of(fact: FileFact | None) -> str | None:
    """Return the entity tag (RFC 9110, 8.8.3) of a file."""
    return None if fact is None or fact.version is None else f'"{fact.version}"'


def version_in(header: str | None, *, field: str) -> str | None:
    """Return the version that a header names: an entity tag, or `*`.

    Raises:
        InvalidArgumentError: it is neither.
    """
    if not header:
        return None
    if header.strip() == "*":
        return "*"
    found = _ETAG.fullmatch(header.strip())
    if found is None:
        raise InvalidArgumentError(
            'cannot use {field}: give one entity tag, such as "1a-2b-3c", or *', field=field
        )
    return found[1]


def change_out(change: FileChange) -> dict[str, object]:
    """Return a change of a watched folder, for an event of a stream."""
    values: dict[str, object] = {"type": change.kind.value, "folder": change.is_folder}
    for name, path in (("path", change.path), ("from", change.source)):
        if path is not None:
            values[name] = shown(path)
            if shown(path).encode() != path:
                values[f"{name}Base64"] = base64.b64encode(path).decode()
    if change.kind is ChangeKind.OVERFLOW:
        del values["folder"]
    return values


def path_in(query: bytes) -> bytes | None:
    """Return the path of a query, byte by byte as it was sent: text need not be UTF-8."""
    sent = None
    for part in query.split(b"&"):
        name, _, value = part.partition(b"=")
        if name == b"path":
            sent = unquote_to_bytes(value.replace(b"+", b" "))
    return sent


def shown(path: bytes) -> str:
    """Return a path as text, with U+FFFD for what is none."""
    return path.decode(errors="replace")


def given_path(text: str | bytes | None, in_base64: str | None, *, field: str) -> bytes:
    """Return the path that a request names in one of two ways.

    Raises:
        InvalidArgumentError: neither, or both, or it cannot be a path.
    """
    if (text is None) == (in_base64 is None):
        raise InvalidArgumentError(
            f"cannot tell which file is meant: give {field}, or {field}Base64 if it is not UTF-8",
            field=field,
        )
    if in_base64 is not None:
        try:
            return path_of(base64.b64decode(in_base64, validate=True), field=f"{field}Base64")
        except ValueError as error:
            raise InvalidArgumentError(
                f"cannot use {field}Base64: it is not base64", field=f"{field}Base64"
            ) from error
    assert text is not None
    try:
        return path_of(text if isinstance(text, bytes) else text.encode(), field=field)
    except UnicodeEncodeError as error:
        raise InvalidArgumentError(
            f"cannot use {field}: it is not valid Unicode; give {field}Base64", field=field
        ) from error


def octal(mode: str | None) -> int | None:
    """Return permissions that are written in octal.

    Raises:
        InvalidArgumentError: they are not.
    """
    if mode is None:
        return None
    if not re.fullmatch(OCTAL, mode):
        raise InvalidArgumentError("cannot use mode: give it in octal, such as 0644", field="mode")
    return int(mode, 8)
