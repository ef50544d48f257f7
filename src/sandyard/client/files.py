"""Files of a sandbox, accessed as one of its users."""

from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from pathlib import Path

from sandyard.client import archives, calls
from sandyard.client.archives import PIECE, Progress
from sandyard.client.errors import ApiError
from sandyard.client.models import FileChange, FileInfo, RemotePath, SignedUrl
from sandyard.client.streams import Watching
from sandyard.client.transport import AsyncTransport, Transport, in_own_thread

_PAST_ITS_END = 416


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
    ) -> int:
        """Write a file and return its size. The old content stays until the upload is complete."""
        content = data.encode() if isinstance(data, str) else data
        call = calls.write_file(self._path, path, self._user, content, mode, owner)
        return self._transport.send(call)

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
    ) -> None:
        """Copy a file or directory of the sandbox to a local path.

        An existing file stays until the new one is complete. Nothing of a directory is written
        outside `local`: devices, and links that lead out of it, are refused.

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
            return
        call = calls.read_file(f"{self._path}/archive", path, self._user)
        with self._transport.stream(call) as answer:
            archives.unpack(
                archives.with_progress(answer.iter_bytes(PIECE), on_progress), target, str(path)
            )

    def _transfer(
        self, action: str, source: RemotePath, target: RemotePath, *, overwrite: bool
    ) -> FileInfo:
        return self._transport.send(
            calls.transfer(self._path, action, source, target, self._user, overwrite=overwrite)
        )


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
    ) -> int:
        """See `Files.write`."""
        content = data.encode() if isinstance(data, str) else data
        call = calls.write_file(self._path, path, self._user, content, mode, owner)
        return await self._transport.send(call)

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
    ) -> None:
        """See `Files.download`. Runs in a thread, which calls `on_progress`."""
        await self._in_thread(
            lambda files, told: files.download(path, local, on_progress=told), on_progress
        )

    async def _in_thread(
        self, work: Callable[[Files, Progress], None], on_progress: Progress | None
    ) -> None:
        await in_own_thread(
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
