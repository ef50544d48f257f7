"""Files that are copied from and to this machine, and directories that are watched in a thread."""

import os
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from sandyard.client import archives, calls, workspaces
from sandyard.client._sync.files import RemoteFiles
from sandyard.client._sync.transport import Transport
from sandyard.client._sync.workspaces import RemoteWorkspaceFiles
from sandyard.client.archives import PIECE, Progress
from sandyard.client.errors import ApiError, BadRequestError, NotFoundError, TransferError
from sandyard.client.models import FileChange, OutsideLink, RemotePath, WorkspaceEntry
from sandyard.client.streams import Watching

_BEGIN_S = 60.0


class Files(RemoteFiles):
    """The files of one sandbox, accessed as `user`.

    Relative paths are below /workspace. Failures raise `ApiError`, with `details["reason"]` one of
    absent, exists, not_a_folder, is_a_folder, denied or no_space.
    """

    def upload(
        self, local: str | Path, path: RemotePath, *, on_progress: Progress | None = None
    ) -> None:
        """Copy a local file or directory to a path in the sandbox.

        `on_progress` receives the size of each piece that was sent.

        Raises:
            ApiError: the sandbox refused it.
            OSError: it cannot be read locally.
        """
        source = Path(local)
        if source.is_dir():
            with archives.packed(source) as archive:
                content = archives.with_progress(archives.pieces_of(archive), on_progress)
                self._transport.send(calls.unpack(self._path, path, self._user, content))
            return
        with source.open("rb") as file:
            mode = f"{source.stat().st_mode & 0o777:04o}"
            self.write(
                path, archives.with_progress(archives.pieces_of(file), on_progress), mode=mode
            )

    def download(
        self, path: RemotePath, local: str | Path, *, on_progress: Progress | None = None
    ) -> Sequence[OutsideLink]:
        """Copy a file or directory of the sandbox to a local path.

        What is new appears when it is complete, and an existing file stays until then. Symbolic
        links stay links. Those that lead out of the directory are copied as they are and returned;
        nothing is written through them. Devices are refused.

        Raises:
            ApiError: it does not exist.
            TransferError: part of a directory must not or cannot be written locally.
            OSError: it cannot be written locally.
        """
        target = Path(local)
        try:
            pieces = archives.begun(self.read_pieces(path))
        except ApiError as error:
            if error.details.get("reason") != "is_a_folder":
                raise
        else:
            with archives.written(target) as file:
                for piece in archives.with_progress(pieces, on_progress):
                    file.write(piece)
            return []
        call = calls.read_file(f"{self._path}/archive", path, self._user)
        with self._transport.stream(call) as answer:
            pieces = archives.with_progress(answer.iter_bytes(PIECE), on_progress)
            return archives.unpack(pieces, target, str(path))

    def on_change(
        self,
        path: RemotePath,
        callback: Callable[[FileChange], object],
        *,
        recursive: bool = False,
    ) -> "Watch":
        """Call a function for each change in a directory, in a thread of its own, until it is
        stopped, or the directory or the sandbox is gone. Watching has begun on return."""
        watching = Watching(self._path, str(path), self._user, recursive=recursive)
        return Watch(self._transport, watching, callback)


class WorkspaceFiles(RemoteWorkspaceFiles):
    """The files of one workspace. Paths start at its root, with or without the leading /.

    Use it as `yard.workspace_files("data")`. Failures raise `ApiError`.
    """

    def write(self, path: RemotePath, data: bytes | str | Iterable[bytes]) -> WorkspaceEntry:
        """Write a file. The old content stays until the upload is complete; missing directories are
        created."""
        content = workspaces.pieces(data) if isinstance(data, bytes | str) else data
        return self._transport.send(self._calls.upload(path, content))

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
        if str(path) not in workspaces.OF_ONE:
            entries = self.list(path)
            if len(entries) == 1 and entries[0].path.strip("/") == workspaces.path_of(path).strip(
                "/"
            ):
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


class Watch:
    """A watched directory. If the watch failed, `error` is the reason."""

    def __init__(
        self, transport: Transport, watching: Watching, callback: Callable[[FileChange], object]
    ) -> None:
        self.error: Exception | None = None
        self._is_over, self._has_begun = threading.Event(), threading.Event()
        watching.on_begin = self._has_begun.set
        self._thread = threading.Thread(
            target=self._run, args=(transport, watching, callback), daemon=True
        )
        self._thread.start()
        self._has_begun.wait(_BEGIN_S)
        if self.error is not None:
            raise self.error

    def stop(self) -> None:
        """Call the function no more."""
        self._is_over.set()

    def _run(
        self, transport: Transport, watching: Watching, callback: Callable[[FileChange], object]
    ) -> None:
        try:
            for change in transport.follow(watching, until=self._is_over):
                if self._is_over.is_set():
                    return
                callback(change)
        except Exception as error:  # noqa: BLE001 - kept in `error` for the caller
            self.error = error
        finally:
            self._has_begun.set()
