"""The files of a workspace."""

from collections.abc import AsyncIterator, Sequence

from sandyard.client import workspaces
from sandyard.client._async.transport import AsyncTransport
from sandyard.client.archives import PIECE
from sandyard.client.models import RemotePath, WorkspaceEntry


class AsyncRemoteWorkspaceFiles:
    """The files of one workspace. Paths start at its root, with or without the leading /.

    Use it as `yard.workspace_files("data")`. Failures raise `ApiError`.
    """

    def __init__(self, transport: AsyncTransport, reference: str) -> None:
        self._transport = transport
        self._reference = reference
        self._calls = workspaces.FileCalls(reference)

    async def read(self, path: RemotePath) -> bytes:
        """Return a file's bytes."""
        return b"".join([piece async for piece in self.read_pieces(path)])

    async def read_text(self, path: RemotePath, *, errors: str = "strict") -> str:
        """Return a file as text. `errors` is that of `bytes.decode`: invalid UTF-8 raises
        UnicodeDecodeError, or with `replace` becomes U+FFFD."""
        return (await self.read(path)).decode(errors=errors)

    async def read_pieces(self, path: RemotePath) -> AsyncIterator[bytes]:
        """Yield a file's bytes as they arrive, without keeping the file in memory."""
        async with self._transport.stream(self._calls.read(path)) as answer:
            async for piece in answer.aiter_bytes(PIECE):
                yield piece

    async def list(self, path: RemotePath = "/") -> Sequence[WorkspaceEntry]:
        """List a directory: subdirectories first, by name."""
        return await self._transport.send(self._calls.list(path))

    async def make_folder(self, path: RemotePath) -> WorkspaceEntry:
        """Create a directory and its parents."""
        return await self._transport.send(self._calls.make_folder(path))

    async def move(
        self, source: RemotePath, target: RemotePath, *, overwrite: bool = False
    ) -> WorkspaceEntry:
        """Move or rename a file or directory. If `target` is a directory, move into it."""
        return await self._transport.send(
            self._calls.change("move", source, target, overwrite=overwrite)
        )

    async def copy(
        self, source: RemotePath, target: RemotePath, *, overwrite: bool = False
    ) -> WorkspaceEntry:
        """Copy a file, or a directory and its contents. If `target` is a directory, copy into
        it."""
        return await self._transport.send(
            self._calls.change("copy", source, target, overwrite=overwrite)
        )

    async def remove(self, *paths: RemotePath) -> None:
        """Delete files, and directories with their contents.

        Raises:
            ApiError: one could not be deleted; the others were.
        """
        for start in range(0, len(paths), workspaces.AT_ONCE):
            await self._transport.send(
                self._calls.remove(paths[start : start + workspaces.AT_ONCE])
            )
