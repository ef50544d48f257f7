"""Workspaces, directories that outlive sandboxes, and the files in them."""

import base64
import os
import secrets
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

from sandyard.client import archives
from sandyard.client.archives import PIECE, Progress
from sandyard.client.calls import TRANSFER_S, WORK_S, Call, part_of
from sandyard.client.errors import ApiError, BadRequestError, NotFoundError, TransferError
from sandyard.client.models import RemotePath, Workspace, WorkspaceEntry, entry_of, workspace_of
from sandyard.client.transport import AsyncTransport, Transport, in_own_thread

T = TypeVar("T")
_ROUTE = "/v1/workspaces"
_AT_ONCE = 250
_CODED = "base64:"
_OF_ONE = frozenset({"/", ""})


def _path(path: RemotePath) -> str:
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
        return _path(text)
    return _CODED + base64.b64encode(text.encode(errors="surrogateescape")).decode()


def _quoted(path: RemotePath) -> str:
    return quote(_path(path).removeprefix("/"), safe="/:")


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


class _Calls:
    """The calls for the files of one workspace."""

    def __init__(self, reference: str) -> None:
        self._path = part_of(_ROUTE, reference)

    def list(self, path: RemotePath) -> Call[Sequence[WorkspaceEntry]]:
        return Call(
            "GET", f"{self._path}/files/{_quoted(path)}",
            lambda a: [entry_of(one) for one in a], query={"showHidden": "true"}, safe=True,
        )  # fmt: skip

    def read(self, path: RemotePath) -> Call[None]:
        return Call(
            "GET", f"{self._path}/direct", lambda _: None, query={"id": _path(path)}, safe=True,
            limit_s=TRANSFER_S,
        )  # fmt: skip

    def upload(self, path: RemotePath, content: Iterable[bytes]) -> Call[WorkspaceEntry]:
        folder, name = _split(path)
        boundary = secrets.token_hex(16)
        return Call(
            "POST", f"{self._path}/upload", lambda a: entry_of(a["data"]),
            query={"id": _path(folder)}, content=_form(boundary, name, content),
            headers={"Content-Type": f"multipart/form-data; boundary={boundary}"},
            limit_s=TRANSFER_S,
        )  # fmt: skip

    def make_folder(self, path: RemotePath) -> Call[WorkspaceEntry]:
        folder, name = _split(path)
        return Call(
            "POST", f"{self._path}/files/{_quoted(folder)}", lambda a: entry_of(a["data"]),
            body={"name": _name(name), "type": "folder"},
        )  # fmt: skip

    def change(
        self, operation: str, source: RemotePath, target: RemotePath, *, overwrite: bool
    ) -> Call[WorkspaceEntry]:
        body = {"operation": operation, "target": _path(target), "overwrite": overwrite}
        return Call(
            "PUT", f"{self._path}/files/{_quoted(source)}", lambda a: entry_of(a["data"]),
            body=body, limit_s=WORK_S,
        )  # fmt: skip

    def remove(self, paths: Sequence[RemotePath]) -> Call[None]:
        return Call(
            "DELETE", f"{self._path}/files", _all_done,
            body={"ids": [_path(one) for one in paths]}, limit_s=WORK_S,
        )  # fmt: skip


def _all_done(answer: Any) -> None:
    for one in answer["data"]["results"]:
        if not one["ok"]:
            told = one["error"]
            raise ApiError(
                told["message"], status=200, code=told["code"],
                request_id=answer["meta"]["requestId"], details={"id": one["id"]},
            )  # fmt: skip


def _form(boundary: str, name: str, content: Iterable[bytes]) -> Iterator[bytes]:
    """Yield a form with a file. The file's name is a field of its own, in any bytes."""
    line = f"--{boundary}\r\nContent-Disposition: form-data; name=".encode()
    yield line + b'"name"\r\n\r\n' + _name(name).encode() + b"\r\n"
    yield line + b'"file"; filename="file"\r\n\r\n'
    yield from content
    yield f"\r\n--{boundary}--\r\n".encode()


def _pieces(data: bytes | str) -> Iterator[bytes]:
    whole = data.encode() if isinstance(data, str) else data
    for start in range(0, len(whole), PIECE):
        yield whole[start : start + PIECE]


class WorkspaceFiles:
    """The files of one workspace. Paths start at its root, with or without the leading /.

    Use it as `yard.workspace_files("data")`. Failures raise `ApiError`.
    """

    def __init__(self, transport: Transport, reference: str) -> None:
        self._transport = transport
        self._calls = _Calls(reference)

    def read(self, path: RemotePath) -> bytes:
        """Return a file's bytes."""
        return b"".join(self.read_pieces(path))

    def read_text(self, path: RemotePath, *, errors: str = "strict") -> str:
        """Return a file as text. `errors` is that of `bytes.decode`: invalid UTF-8 raises
        UnicodeDecodeError, or with `replace` becomes U+FFFD."""
        return self.read(path).decode(errors=errors)

    def read_pieces(self, path: RemotePath) -> Iterator[bytes]:
        """Yield a file's bytes as they arrive, without keeping the file in memory."""
        with self._transport.stream(self._calls.read(path)) as answer:
            yield from answer.iter_bytes(PIECE)

    def write(self, path: RemotePath, data: bytes | str | Iterable[bytes]) -> WorkspaceEntry:
        """Write a file. The old content stays until the upload is complete; missing directories are
        created."""
        content = _pieces(data) if isinstance(data, bytes | str) else data
        return self._transport.send(self._calls.upload(path, content))

    def list(self, path: RemotePath = "/") -> Sequence[WorkspaceEntry]:
        """List a directory: subdirectories first, by name."""
        return self._transport.send(self._calls.list(path))

    def make_folder(self, path: RemotePath) -> WorkspaceEntry:
        """Create a directory and its parents."""
        return self._transport.send(self._calls.make_folder(path))

    def move(
        self, source: RemotePath, target: RemotePath, *, overwrite: bool = False
    ) -> WorkspaceEntry:
        """Move or rename a file or directory. If `target` is a directory, move into it."""
        return self._transport.send(self._calls.change("move", source, target, overwrite=overwrite))

    def copy(
        self, source: RemotePath, target: RemotePath, *, overwrite: bool = False
    ) -> WorkspaceEntry:
        """Copy a file, or a directory and its contents. If `target` is a directory, copy into
        it."""
        return self._transport.send(self._calls.change("copy", source, target, overwrite=overwrite))

    def remove(self, *paths: RemotePath) -> None:
        """Delete files, and directories with their contents.

        Raises:
            ApiError: one could not be deleted; the others were.
        """
        for start in range(0, len(paths), _AT_ONCE):
            self._transport.send(self._calls.remove(paths[start : start + _AT_ONCE]))

    def upload(
        self, local: str | Path, path: RemotePath, *, on_progress: Progress | None = None
    ) -> None:
        """Copy a local file or directory to a path in the workspace.

        Raises:
            ApiError: the workspace refused it.
            TransferError: links to directories and special files were skipped; all else was copied.
            OSError: it cannot be read locally.
        """
        source, left = Path(local), []
        if not source.is_dir():
            self._send(source, path, on_progress)
            return
        if str(path).strip("/"):
            self._make(path)

        def unread(error: OSError) -> None:
            raise error

        for folder, folders, files in os.walk(source, onerror=unread):
            inside = Path(folder).relative_to(source)
            for name in folders:
                if (Path(folder) / name).is_symlink():
                    left.append(str(inside / name))
                else:
                    self._make(f"{str(path).rstrip('/')}/{(inside / name).as_posix()}")
            for name in files:
                if (Path(folder) / name).is_file():
                    where = f"{str(path).rstrip('/')}/{(inside / name).as_posix()}"
                    self._send(Path(folder) / name, where, on_progress)
                else:
                    left.append(str(inside / name))
        if left:
            raise TransferError(
                f"{len(left)} were left out, which are neither files nor directories: "
                + ", ".join(left[:5])
            )

    def download(
        self, path: RemotePath, local: str | Path, *, on_progress: Progress | None = None
    ) -> None:
        """Copy a file or directory of the workspace to a local path.

        An existing file stays until the new one is complete. Links and special files of a directory
        are skipped, since a link may lead anywhere.

        Raises:
            ApiError: it does not exist.
            TransferError: some entries were skipped; all else was copied.
            OSError: it cannot be written locally.
        """
        target = Path(local)
        if str(path) not in _OF_ONE:
            entries = self.list(path)
            if len(entries) == 1 and entries[0].path.strip("/") == _path(path).strip("/"):
                self._take(path, target, on_progress)
                return
        self._take_folder(path, target, on_progress)

    def _take_folder(self, path: RemotePath, target: Path, on_progress: Progress | None) -> None:
        target.mkdir(parents=True, exist_ok=True)
        todo, left = [(path, target)], []
        while todo:
            there, here = todo.pop()
            for one in self.list(there):
                place = here / one.name
                # What is a link here would lead what is written elsewhere.
                is_odd = "/" in one.name or one.name in ("", ".", "..") or place.is_symlink()
                if one.is_link or is_odd:
                    left.append(one.path)
                elif one.is_folder:
                    place.mkdir(exist_ok=True)
                    todo.append((one.path, place))
                else:
                    try:
                        self._take(one.path, place, on_progress)
                    except (BadRequestError, NotFoundError):  # no file, or gone meanwhile
                        left.append(one.path)
        if left:
            raise TransferError(
                f"{len(left)} were left out, which are links or no files: " + ", ".join(left[:5])
            )

    def _take(self, path: RemotePath, target: Path, on_progress: Progress | None) -> None:
        pieces = archives.begun(self.read_pieces(path))
        with archives.written(target) as file:
            for piece in archives.with_progress(pieces, on_progress):
                file.write(piece)

    def _make(self, path: RemotePath) -> None:
        try:
            self.make_folder(path)
        except ApiError as error:
            if error.status != 409:  # it is there
                raise

    def _send(self, source: Path, path: RemotePath, on_progress: Progress | None) -> None:
        with source.open("rb") as file:
            self.write(path, archives.with_progress(archives.pieces_of(file), on_progress))


class AsyncWorkspaceFiles:
    """See `WorkspaceFiles`."""

    def __init__(self, transport: AsyncTransport, reference: str) -> None:
        self._transport = transport
        self._reference = reference
        self._calls = _Calls(reference)

    async def read(self, path: RemotePath) -> bytes:
        """See `WorkspaceFiles.read`."""
        return b"".join([piece async for piece in self.read_pieces(path)])

    async def read_text(self, path: RemotePath, *, errors: str = "strict") -> str:
        """See `WorkspaceFiles.read_text`."""
        return (await self.read(path)).decode(errors=errors)

    async def read_pieces(self, path: RemotePath) -> AsyncIterator[bytes]:
        """See `WorkspaceFiles.read_pieces`."""
        async with self._transport.stream(self._calls.read(path)) as answer:
            async for piece in answer.aiter_bytes(PIECE):
                yield piece

    async def write(self, path: RemotePath, data: bytes | str) -> WorkspaceEntry:
        """See `WorkspaceFiles.write`."""
        return await self._in_thread(lambda files, _: files.write(path, data), None)

    async def list(self, path: RemotePath = "/") -> Sequence[WorkspaceEntry]:
        """See `WorkspaceFiles.list`."""
        return await self._transport.send(self._calls.list(path))

    async def make_folder(self, path: RemotePath) -> WorkspaceEntry:
        """See `WorkspaceFiles.make_folder`."""
        return await self._transport.send(self._calls.make_folder(path))

    async def move(
        self, source: RemotePath, target: RemotePath, *, overwrite: bool = False
    ) -> WorkspaceEntry:
        """See `WorkspaceFiles.move`."""
        return await self._transport.send(
            self._calls.change("move", source, target, overwrite=overwrite)
        )

    async def copy(
        self, source: RemotePath, target: RemotePath, *, overwrite: bool = False
    ) -> WorkspaceEntry:
        """See `WorkspaceFiles.copy`."""
        return await self._transport.send(
            self._calls.change("copy", source, target, overwrite=overwrite)
        )

    async def remove(self, *paths: RemotePath) -> None:
        """See `WorkspaceFiles.remove`."""
        for start in range(0, len(paths), _AT_ONCE):
            await self._transport.send(self._calls.remove(paths[start : start + _AT_ONCE]))

    async def upload(
        self, local: str | Path, path: RemotePath, *, on_progress: Progress | None = None
    ) -> None:
        """See `WorkspaceFiles.upload`. Runs in a thread, which calls `on_progress`."""
        await self._in_thread(
            lambda files, told: files.upload(local, path, on_progress=told), on_progress
        )

    async def download(
        self, path: RemotePath, local: str | Path, *, on_progress: Progress | None = None
    ) -> None:
        """See `WorkspaceFiles.download`. Runs in a thread, which calls `on_progress`."""
        await self._in_thread(
            lambda files, told: files.download(path, local, on_progress=told), on_progress
        )

    async def _in_thread(
        self, work: Callable[[WorkspaceFiles, Progress], T], on_progress: Progress | None
    ) -> T:
        return await in_own_thread(
            self._transport,
            lambda own, told: work(WorkspaceFiles(own, self._reference), told),
            on_progress,
        )
