"""Files of a sandbox, accessed as one of its users."""

from collections.abc import AsyncIterable, AsyncIterator, Mapping
from typing import Self

from sandyard.client import calls
from sandyard.client._async.transport import AsyncTransport
from sandyard.client.archives import PIECE
from sandyard.client.errors import AbsentError, ApiError, NotFolderError
from sandyard.client.models import FileChange, FileInfo, RemotePath, SignedUrl
from sandyard.client.streams import Watching

_PAST_ITS_END = 416


class AsyncRemoteFiles:
    """The files of one sandbox, accessed as `user`.

    Relative paths are below /workspace. Failures raise `ApiError`, with `details["reason"]` one of
    absent, exists, not_a_folder, is_a_folder, denied or no_space.
    """

    def __init__(self, transport: AsyncTransport, sandbox_path: str, user: str = "root") -> None:
        self._transport = transport
        self._sandbox_path = sandbox_path
        self._path = f"{sandbox_path}/files"
        self._user = user

    def as_user(self, user: str | int) -> Self:
        """Return the same files, accessed as another user."""
        return type(self)(self._transport, self._sandbox_path, str(user))

    async def read(self, path: RemotePath, *, offset: int = 0, length: int | None = None) -> bytes:
        """Return up to `length` bytes of a file, from `offset` on."""
        pieces = self.read_pieces(path, offset=offset, length=length)
        return b"".join([piece async for piece in pieces])

    async def read_text(self, path: RemotePath, *, errors: str = "strict") -> str:
        """Return a file as text. `errors` is that of `bytes.decode`: invalid UTF-8 raises
        UnicodeDecodeError, or with `replace` becomes U+FFFD."""
        return (await self.read(path)).decode(errors=errors)

    async def read_pieces(
        self, path: RemotePath, *, offset: int = 0, length: int | None = None
    ) -> AsyncIterator[bytes]:
        """Yield a file's bytes as they arrive, without keeping the file in memory."""
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
        data: bytes | str | AsyncIterable[bytes],
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
        return await self._transport.send(call)

    async def read_if_changed(self, path: RemotePath, etag: str) -> bytes | None:
        """Return a file's content, or None if it still has this `etag` (see `info`)."""
        return await self._transport.send_raw(
            calls.read_changed(self._path, path, self._user, etag)
        )

    async def write_all(self, files: Mapping[RemotePath, bytes | str]) -> None:
        """Write several files, by path. The first that fails ends it; earlier ones are written."""
        for path, data in files.items():
            await self.write(path, data)

    async def exists(self, path: RemotePath) -> bool:
        """Tell whether there is a file, directory or link at a path."""
        try:
            await self.info(path)
        except (AbsentError, NotFolderError):
            return False
        return True

    async def list(self, path: RemotePath = "", *, depth: int = 1) -> list[FileInfo]:
        """List a directory by name, each subdirectory followed by its contents."""
        return await self._transport.send(calls.list_folder(self._path, path, self._user, depth))

    async def info(self, path: RemotePath) -> FileInfo:
        """Return the metadata of a path."""
        return await self._transport.send(calls.file_info(self._path, path, self._user))

    async def make_folder(self, path: RemotePath) -> FileInfo:
        """Create a directory and its parents. An existing directory is not an error."""
        return await self._transport.send(calls.make_folder(self._path, path, self._user))

    async def move(
        self, source: RemotePath, target: RemotePath, *, overwrite: bool = False
    ) -> FileInfo:
        """Move or rename a file or directory."""
        return await self._transfer("move", source, target, overwrite=overwrite)

    async def copy(
        self, source: RemotePath, target: RemotePath, *, overwrite: bool = False
    ) -> FileInfo:
        """Copy a file, or a directory and its contents."""
        return await self._transfer("copy", source, target, overwrite=overwrite)

    async def remove(self, path: RemotePath, *, recursive: bool = False) -> None:
        """Delete a file or an empty directory, or with `recursive` a directory and its contents."""
        await self._transport.send(calls.remove(self._path, path, self._user, recursive=recursive))

    def watch(
        self, path: RemotePath = "/workspace", *, recursive: bool = False
    ) -> AsyncIterator[FileChange]:
        """Yield changes in a directory, with `recursive` also below it.

        Watching starts when the first change is requested. A broken connection is reopened and
        reported as an `overflow`. The iteration raises when the directory or the sandbox is gone.
        """
        watching = Watching(self._path, str(path), self._user, recursive=recursive)
        return self._transport.follow(watching)

    async def sign(
        self, path: RemotePath, *, method: str = "GET", expires_s: int = 3600
    ) -> SignedUrl:
        """Return a URL that reads (GET) or writes (PUT) one file without a key."""
        return await self._transport.send(
            calls.sign(self._path, path, self._user, method, expires_s)
        )

    async def _transfer(
        self, action: str, source: RemotePath, target: RemotePath, *, overwrite: bool
    ) -> FileInfo:
        return await self._transport.send(
            calls.transfer(self._path, action, source, target, self._user, overwrite=overwrite)
        )
