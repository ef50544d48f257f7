"""Workspaces, directories that outlive sandboxes, and the files in them."""

import base64
import secrets
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final
from urllib.parse import quote

from sandyard.client.archives import PIECE
from sandyard.client.calls import TRANSFER_S, WORK_S, Call, part_of
from sandyard.client.errors import ApiError
from sandyard.client.models import RemotePath, Workspace, WorkspaceEntry, entry_of, workspace_of

_ROUTE = "/v1/workspaces"
AT_ONCE: Final = 250
"""So many entries are removed by one call."""
_CODED = "base64:"
OF_ONE: Final = frozenset({"/", ""})
"""The paths of a workspace's root."""


def path_of(path: RemotePath) -> str:
    """Return a path or name as the API expects it: in base64 if it is not text, or looks like
    base64. Paths from a listing are passed on unchanged."""
    text = str(path)
    if text.startswith(_CODED):
        return text
    try:
        text.encode()
    except UnicodeEncodeError:
        pass
    else:
        if not text.lstrip("/").startswith(_CODED):
            return text
    exact = text.encode(errors="surrogateescape")
    return _CODED + base64.b64encode(exact).decode()


def _name(text: str) -> str:
    """Return a single name as the API expects it."""
    if not text.startswith(_CODED):
        return path_of(text)
    return _CODED + base64.b64encode(text.encode(errors="surrogateescape")).decode()


def _quoted(path: RemotePath) -> str:
    return quote(path_of(path).removeprefix("/"), safe="/:")


def _split(path: RemotePath) -> tuple[str, str]:
    """Return the directory and the name of a path."""
    path = plain = str(path)
    if path.startswith(_CODED):
        exact = base64.b64decode(path.removeprefix(_CODED))
        plain = exact.decode(errors="surrogateescape")
    folder, _, name = plain.rstrip("/").rpartition("/")
    if not name:
        raise ValueError(f"cannot write to {path!r}: it names nothing")
    return folder or "/", name


def listing() -> Call[list[Workspace]]:
    """List the workspaces."""
    return Call(
        "GET", _ROUTE, lambda a: [workspace_of(one) for one in a["data"]["workspaces"]], safe=True
    )


def find(reference: str) -> Call[Workspace]:
    """Find a workspace."""
    return Call("GET", part_of(_ROUTE, reference), lambda a: workspace_of(a["data"]), safe=True)


def create(name: str, slug: str | None) -> Call[Workspace]:
    """Create a workspace."""
    body = {"name": name, **({} if slug is None else {"slug": slug})}
    key = {"Idempotency-Key": secrets.token_hex(16)}
    return Call(
        "POST", _ROUTE, lambda a: workspace_of(a["data"]), body=body, headers=key, safe=True
    )


def rename(reference: str, name: str) -> Call[Workspace]:
    """Rename a workspace."""
    return Call(
        "PATCH", part_of(_ROUTE, reference), lambda a: workspace_of(a["data"]),
        body={"name": name}, safe=True,
    )  # fmt: skip


def delete(reference: str, *, force: bool) -> Call[None]:
    """Delete a workspace."""
    query = {"force": "true"} if force else {}
    path = part_of(_ROUTE, reference)
    return Call("DELETE", path, lambda _: None, query=query, limit_s=WORK_S)


class FileCalls:
    """The calls for the files of one workspace."""

    def __init__(self, reference: str) -> None:
        self._path = part_of(_ROUTE, reference)

    def list(self, path: RemotePath) -> Call[Sequence[WorkspaceEntry]]:
        """List a directory."""
        return Call(
            "GET", f"{self._path}/files/{_quoted(path)}",
            lambda a: [entry_of(one) for one in a], query={"showHidden": "true"}, safe=True,
        )  # fmt: skip

    def read(self, path: RemotePath) -> Call[None]:
        """Read a file."""
        return Call(
            "GET", f"{self._path}/direct", lambda _: None, query={"id": path_of(path)}, safe=True,
            limit_s=TRANSFER_S,
        )  # fmt: skip

    def upload(self, path: RemotePath, content: Iterable[bytes]) -> Call[WorkspaceEntry]:
        """Write a file."""
        folder, name = _split(path)
        boundary = secrets.token_hex(16)
        return Call(
            "POST", f"{self._path}/upload", lambda a: entry_of(a["data"]),
            query={"id": path_of(folder)}, content=_form(boundary, name, content),
            headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
            limit_s=TRANSFER_S,
        )  # fmt: skip

    def make_folder(self, path: RemotePath) -> Call[WorkspaceEntry]:
        """Create a directory."""
        folder, name = _split(path)
        return Call(
            "POST", f"{self._path}/files/{_quoted(folder)}", lambda a: entry_of(a["data"]),
            body={"name": _name(name), "type": "folder"},
        )  # fmt: skip

    def change(
        self, operation: str, source: RemotePath, target: RemotePath, *, overwrite: bool
    ) -> Call[WorkspaceEntry]:
        """Move or copy an entry."""
        body = {"operation": operation, "target": path_of(target), "overwrite": overwrite}
        return Call(
            "PUT", f"{self._path}/files/{_quoted(source)}", lambda a: entry_of(a["data"]),
            body=body, limit_s=WORK_S,
        )  # fmt: skip

    def remove(self, paths: Sequence[RemotePath]) -> Call[None]:
        """Delete entries."""
        return Call(
            "DELETE", f"{self._path}/files", _all_done,
            body={"ids": [path_of(one) for one in paths]}, limit_s=WORK_S,
        )  # fmt: skip


def _all_done(answer: Any) -> None:
    for one in answer["data"]["results"]:
        if not one["ok"]:
            failure = one["error"]
            raise ApiError(
                failure["message"], status=200, code=failure["code"],
                request_id=answer["meta"]["requestId"], details={"id": one["id"]},
            )  # fmt: skip


def _form(boundary: str, name: str, content: Iterable[bytes]) -> Iterator[bytes]:
    """Yield a form with a file. The file's name is a field of its own, in any bytes."""
    line = f"--{boundary}\r\nContent-Disposition: form-data; name=".encode()
    yield line + b'"name"\r\n\r\n' + _name(name).encode() + b"\r\n"
    yield line + b'"file"; filename="file"\r\n\r\n'
    yield from content
    yield f"\r\n--{boundary}--\r\n".encode()


def pieces(data: bytes | str) -> Iterator[bytes]:
    """Yield data in pieces."""
    whole = data.encode() if isinstance(data, str) else data
    for start in range(0, len(whole), PIECE):
        yield whole[start : start + PIECE]
