"""Files of a sandbox, accessed as one of its users."""

import asyncio
import inspect
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from sandyard.client import archives, calls
from sandyard.client.archives import PIECE, Progress
from sandyard.client.errors import AbsentError, ApiError, NotFolderError
from sandyard.client.models import FileChange, FileInfo, OutsideLink, RemotePath, SignedUrl
from sandyard.client.streams import Watching
from sandyard.client.transport import AsyncTransport, Transport, in_own_thread

_PAST_ITS_END = 416
_BEGIN_S = 60.0

T = TypeVar("T")


class Files:
    """The files of one sandbox, accessed as `user`.

    Relative paths are below /workspace. Failures raise `ApiError`, with `details["reason"]` one of
    absent, exists, not_a_folder, is_a_folder, denied or no_space.
    """

    def __init__(self, transport: Transport, sandbox_path: str, user: str = "root") -> None:
        self._transport = transport
        self._path = f"{sandbox_path}/files"
        self._user = user

    def read(self, path: RemotePath, *, offset: int = 0, length: int | None = None) -> bytes:
        """Return up to `length` bytes of a file, from `offset` on."""
        return b"".join(self.read_pieces(path, offset=offset, length=length))

    def read_text(self, path: RemotePath, *, errors: str = "strict") -> str:
        """Return a file as text. `errors` is that of `bytes.decode`: invalid UTF-8 raises
        UnicodeDecodeError, or with `replace` becomes U+FFFD."""
        return self.read(path).decode(errors=errors)

    def read_pieces(
        self, path: RemotePath, *, offset: int = 0, length: int | None = None
    ) -> Iterator[bytes]:
        """Yield a file's bytes as they arrive, without keeping the file in memory."""
        call = calls.read_file(self._path, path, self._user, offset, length)
        try:
            with self._transport.stream(call) as answer:
                part = calls.Part(answer.status_code, offset, length)
                for piece in answer.iter_bytes(PIECE):
                    if cut := part.cut(piece):
                        yield cut
                    if part.is_whole:
                        return
        except ApiError as error:
            if error.status != _PAST_ITS_END:
                raise

    def write(
        self,
        path: RemotePath,
        data: bytes | str | Iterable[bytes],
        *,
        mode: str | None = None,
        owner: str | None = None,
        if_match: str | None = None,
    ) -> int:
        """Write a file and return its size. The old content stays until the upload is complete.

        With `if_match`, the `etag` of `info`, a file that has changed meanwhile is not replaced;
        `*` means that it must exist.

        Raises:
            ChangedError: it has changed, or does not exist.
        """
        content = data.encode() if isinstance(data, str) else data
        call = calls.write_file(self._path, path, self._user, content, mode, owner, if_match)
        return self._transport.send(call)

    def read_if_changed(self, path: RemotePath, etag: str) -> bytes | None:
        """Return a file's content, or None if it still has this `etag` (see `info`)."""
        return self._transport.send_raw(calls.read_changed(self._path, path, self._user, etag))

    def write_all(self, files: Mapping[RemotePath, bytes | str]) -> None:
        """Write several files, by path. The first that fails ends it; earlier ones are written."""
        for path, data in files.items():
            self.write(path, data)

    def exists(self, path: RemotePath) -> bool:
        """Tell whether there is a file, directory or link at a path."""
        try:
            self.info(path)
        except (AbsentError, NotFolderError):  # the latter: a file is on the way to it
            return False
        return True

    def list(self, path: RemotePath = "", *, depth: int = 1) -> list[FileInfo]:
        """List a directory by name, each subdirectory followed by its contents."""
        return self._transport.send(calls.list_folder(self._path, path, self._user, depth))

    def info(self, path: RemotePath) -> FileInfo:
        """Return the metadata of a path."""
        return self._transport.send(calls.file_info(self._path, path, self._user))

    def make_folder(self, path: RemotePath) -> FileInfo:
        """Create a directory and its parents. An existing directory is not an error."""
        return self._transport.send(calls.make_folder(self._path, path, self._user))

    def move(self, source: RemotePath, target: RemotePath, *, overwrite: bool = False) -> FileInfo:
        """Move or rename a file or directory."""
        return self._transfer("move", source, target, overwrite=overwrite)

    def copy(self, source: RemotePath, target: RemotePath, *, overwrite: bool = False) -> FileInfo:
        """Copy a file, or a directory and its contents."""
        return self._transfer("copy", source, target, overwrite=overwrite)

    def remove(self, path: RemotePath, *, recursive: bool = False) -> None:
        """Delete a file or an empty directory, or with `recursive` a directory and its contents."""
        self._transport.send(calls.remove(self._path, path, self._user, recursive=recursive))

    def watch(
        self, path: RemotePath = "/workspace", *, recursive: bool = False
    ) -> Iterator[FileChange]:
        """Yield changes in a directory, with `recursive` also below it.

        Watching starts when the first change is requested. A broken connection is reopened and
        reported as an `overflow`. The iteration raises when the directory or the sandbox is gone.
        """
        watching = Watching(self._path, str(path), self._user, recursive=recursive)
        return self._transport.follow(watching)

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

    def sign(self, path: RemotePath, *, method: str = "GET", expires_s: int = 3600) -> SignedUrl:
        """Return a URL that reads (GET) or writes (PUT) one file without a key."""
        return self._transport.send(calls.sign(self._path, path, self._user, method, expires_s))

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

    def _transfer(
        self, action: str, source: RemotePath, target: RemotePath, *, overwrite: bool
    ) -> FileInfo:
        return self._transport.send(
            calls.transfer(self._path, action, source, target, self._user, overwrite=overwrite)
        )


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


class AsyncWatch:
    """See `Watch`."""

    def __init__(
        self,
        transport: AsyncTransport,
        watching: Watching,
        callback: Callable[[FileChange], object],
    ) -> None:
        self.error: Exception | None = None
        self._has_begun = asyncio.Event()
        watching.on_begin = self._has_begun.set
        self._task = asyncio.get_running_loop().create_task(
            self._run(transport, watching, callback)
        )

    async def begun(self) -> None:
        """Wait until the directory is watched, or raise why it cannot be."""
        await self._has_begun.wait()
        if self.error is not None:
            raise self.error

    async def stop(self) -> None:
        """See `Watch.stop`."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(
        self,
        transport: AsyncTransport,
        watching: Watching,
        callback: Callable[[FileChange], object],
    ) -> None:
        try:
            async for change in transport.follow(watching):
                said = callback(change)
                if inspect.isawaitable(said):
                    await said
        except Exception as error:  # noqa: BLE001 - kept in `error` for the caller
            self.error = error
        finally:
            self._has_begun.set()


class AsyncFiles:
    """See `Files`."""

    def __init__(self, transport: AsyncTransport, sandbox_path: str, user: str = "root") -> None:
        self._transport = transport
        self._sandbox_path = sandbox_path
        self._path = f"{sandbox_path}/files"
        self._user = user

    async def read(self, path: RemotePath, *, offset: int = 0, length: int | None = None) -> bytes:
        """See `Files.read`."""
        pieces = self.read_pieces(path, offset=offset, length=length)
        return b"".join([piece async for piece in pieces])

    async def read_text(self, path: RemotePath, *, errors: str = "strict") -> str:
        """See `Files.read_text`."""
        return (await self.read(path)).decode(errors=errors)

    async def read_pieces(
        self, path: RemotePath, *, offset: int = 0, length: int | None = None
    ) -> AsyncIterator[bytes]:
        """See `Files.read_pieces`."""
        call = calls.read_file(self._path, path, self._user, offset, length)
        try:
            async with self._transport.stream(call) as answer:
                part = calls.Part(answer.status_code, offset, length)
                async for piece in answer.aiter_bytes(PIECE):
                    if cut := part.cut(piece):
                        yield cut
                    if part.is_whole:
                        return
        except ApiError as error:
            if error.status != _PAST_ITS_END:
                raise

    async def write(
        self,
        path: RemotePath,
        data: bytes | str | AsyncIterator[bytes],
        *,
        mode: str | None = None,
        owner: str | None = None,
        if_match: str | None = None,
    ) -> int:
        """See `Files.write`."""
        content = data.encode() if isinstance(data, str) else data
        call = calls.write_file(self._path, path, self._user, content, mode, owner, if_match)
        return await self._transport.send(call)

    async def read_if_changed(self, path: RemotePath, etag: str) -> bytes | None:
        """See `Files.read_if_changed`."""
        return await self._transport.send_raw(
            calls.read_changed(self._path, path, self._user, etag)
        )

    async def write_all(self, files: Mapping[RemotePath, bytes | str]) -> None:
        """See `Files.write_all`."""
        for path, data in files.items():
            await self.write(path, data)

    async def exists(self, path: RemotePath) -> bool:
        """See `Files.exists`."""
        try:
            await self.info(path)
        except (AbsentError, NotFolderError):
            return False
        return True

    async def list(self, path: RemotePath = "", *, depth: int = 1) -> list[FileInfo]:
        """See `Files.list`."""
        return await self._transport.send(calls.list_folder(self._path, path, self._user, depth))

    async def info(self, path: RemotePath) -> FileInfo:
        """See `Files.info`."""
        return await self._transport.send(calls.file_info(self._path, path, self._user))

    async def make_folder(self, path: RemotePath) -> FileInfo:
        """See `Files.make_folder`."""
        return await self._transport.send(calls.make_folder(self._path, path, self._user))

    async def move(
        self, source: RemotePath, target: RemotePath, *, overwrite: bool = False
    ) -> FileInfo:
        """See `Files.move`."""
        return await self._transfer("move", source, target, overwrite=overwrite)

    async def copy(
        self, source: RemotePath, target: RemotePath, *, overwrite: bool = False
    ) -> FileInfo:
        """See `Files.copy`."""
        return await self._transfer("copy", source, target, overwrite=overwrite)

    async def remove(self, path: RemotePath, *, recursive: bool = False) -> None:
        """See `Files.remove`."""
        await self._transport.send(calls.remove(self._path, path, self._user, recursive=recursive))

    def watch(
        self, path: RemotePath = "/workspace", *, recursive: bool = False
    ) -> AsyncIterator[FileChange]:
        """See `Files.watch`."""
        watching = Watching(self._path, str(path), self._user, recursive=recursive)
        return self._transport.follow(watching)

    async def on_change(
        self,
        path: RemotePath,
        callback: Callable[[FileChange], object],
        *,
        recursive: bool = False,
    ) -> "AsyncWatch":
        """See `Files.on_change`. The function may be a coroutine function; it is called in a
        task."""
        watching = Watching(self._path, str(path), self._user, recursive=recursive)
        watch = AsyncWatch(self._transport, watching, callback)
        try:
            await watch.begun()
        except BaseException:
            await watch.stop()
            raise
        return watch

    async def sign(
        self, path: RemotePath, *, method: str = "GET", expires_s: int = 3600
    ) -> SignedUrl:
        """See `Files.sign`."""
        return await self._transport.send(
            calls.sign(self._path, path, self._user, method, expires_s)
        )

    async def upload(
        self, local: str | Path, path: RemotePath, *, on_progress: Progress | None = None
    ) -> None:
        """See `Files.upload`. Runs in a thread, which calls `on_progress`."""
        await self._in_thread(
            lambda files, told: files.upload(local, path, on_progress=told), on_progress
        )

    async def download(
        self, path: RemotePath, local: str | Path, *, on_progress: Progress | None = None
    ) -> Sequence[OutsideLink]:
        """See `Files.download`. Runs in a thread, which calls `on_progress`."""
        return await self._in_thread(
            lambda files, told: files.download(path, local, on_progress=told), on_progress
        )

    async def _in_thread(
        self, work: Callable[[Files, Progress], T], on_progress: Progress | None
    ) -> T:
        return await in_own_thread(
            self._transport,
            lambda own, told: work(Files(own, self._sandbox_path, self._user), told),
            on_progress,
        )

    async def _transfer(
        self, action: str, source: RemotePath, target: RemotePath, *, overwrite: bool
    ) -> FileInfo:
        return await self._transport.send(
            calls.transfer(self._path, action, source, target, self._user, overwrite=overwrite)
        )
