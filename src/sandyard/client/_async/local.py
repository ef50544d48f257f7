"""Files that are copied from and to this machine, in threads, and directories that are watched."""

import asyncio
import inspect
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from sandyard.client._async.files import AsyncRemoteFiles
from sandyard.client._async.transport import AsyncTransport
from sandyard.client._async.workspaces import AsyncRemoteWorkspaceFiles
from sandyard.client._sync.local import Files, WorkspaceFiles
from sandyard.client._sync.transport import Transport
from sandyard.client.archives import Progress
from sandyard.client.errors import TransferError
from sandyard.client.models import FileChange, OutsideLink, RemotePath, WorkspaceEntry
from sandyard.client.streams import Watching

T = TypeVar("T")


class AsyncFiles(AsyncRemoteFiles):
    """The files of one sandbox, accessed as `user`.

    Relative paths are below /workspace. Failures raise `ApiError`, with `details["reason"]` one of
    absent, exists, not_a_folder, is_a_folder, denied or no_space.
    """

    async def upload(
        self, local: str | Path, path: RemotePath, *, on_progress: Progress | None = None
    ) -> None:
        """Copy a local file or directory to a path in the sandbox.

        This runs in a thread, which calls `on_progress` with the size of each piece that was sent.

        Raises:
            ApiError: the sandbox refused it.
            OSError: it cannot be read locally.
        """
        await self._in_thread(
            lambda files, progress: files.upload(local, path, on_progress=progress), on_progress
        )

    async def download(
        self, path: RemotePath, local: str | Path, *, on_progress: Progress | None = None
    ) -> Sequence[OutsideLink]:
        """Copy a file or directory of the sandbox to a local path.

        What is new appears when it is complete, and an existing file stays until then. Symbolic
        links stay links. Those that lead out of the directory are copied as they are and returned;
        nothing is written through them. Devices are refused. This runs in a thread, which calls
        `on_progress`.

        Raises:
            ApiError: it does not exist.
            TransferError: part of a directory must not or cannot be written locally.
            OSError: it cannot be written locally.
        """
        return await self._in_thread(
            lambda files, progress: files.download(path, local, on_progress=progress), on_progress
        )

    async def on_change(
        self,
        path: RemotePath,
        callback: Callable[[FileChange], object],
        *,
        recursive: bool = False,
    ) -> "AsyncWatch":
        """Call a function, or a coroutine function, for each change in a directory, in a task of
        its own, until it is stopped, or the directory or the sandbox is gone. Watching has begun on
        return."""
        watching = Watching(self._path, str(path), self._user, recursive=recursive)
        watch = AsyncWatch(self._transport, watching, callback)
        try:
            await watch.begun()
        except BaseException:
            await watch.stop()
            raise
        return watch

    async def _in_thread(
        self, work: Callable[[Files, Progress], T], on_progress: Progress | None
    ) -> T:
        return await in_own_thread(
            self._transport,
            lambda own, progress: work(Files(own, self._sandbox_path, self._user), progress),
            on_progress,
        )


class AsyncWorkspaceFiles(AsyncRemoteWorkspaceFiles):
    """The files of one workspace. Paths start at its root, with or without the leading /.

    Use it as `yard.workspace_files("data")`. Failures raise `ApiError`.
    """

    async def write(self, path: RemotePath, data: bytes | str) -> WorkspaceEntry:
        """Write a file. The old content stays until the upload is complete; missing directories are
        created."""
        return await self._in_thread(lambda files, _: files.write(path, data), None)

    async def upload(
        self, local: str | Path, path: RemotePath, *, on_progress: Progress | None = None
    ) -> None:
        """Copy a local file or directory to a path in the workspace. This runs in a thread, which
        calls `on_progress`.

        Raises:
            ApiError: the workspace refused it.
            TransferError: links to directories and special files were skipped; all else was copied.
            OSError: it cannot be read locally.
        """
        await self._in_thread(
            lambda files, progress: files.upload(local, path, on_progress=progress), on_progress
        )

    async def download(
        self, path: RemotePath, local: str | Path, *, on_progress: Progress | None = None
    ) -> None:
        """Copy a file or directory of the workspace to a local path.

        An existing file stays until the new one is complete. Links and special files of a directory
        are skipped, since a link may lead anywhere. This runs in a thread, which calls
        `on_progress`.

        Raises:
            ApiError: it does not exist.
            TransferError: some entries were skipped; all else was copied.
            OSError: it cannot be written locally.
        """
        await self._in_thread(
            lambda files, progress: files.download(path, local, on_progress=progress), on_progress
        )

    async def _in_thread(
        self, work: Callable[[WorkspaceFiles, Progress], T], on_progress: Progress | None
    ) -> T:
        return await in_own_thread(
            self._transport,
            lambda own, progress: work(WorkspaceFiles(own, self._reference), progress),
            on_progress,
        )


class AsyncWatch:
    """A watched directory. If the watch failed, `error` is the reason."""

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
        """Call the function no more."""
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
                result = callback(change)
                if inspect.isawaitable(result):
                    await result
        except Exception as error:  # noqa: BLE001 - kept in `error` for the caller
            self.error = error
        finally:
            self._has_begun.set()


async def in_own_thread(
    transport: AsyncTransport,
    work: Callable[[Transport, Progress], T],
    on_progress: Progress | None,
) -> T:
    """Read or write local files in a thread, over a connection of its own, and return the result.
    If cancelled, the thread ends with the piece that is being copied.

    `work` receives the connection, and a function to call with each number of copied bytes.
    """
    is_over = threading.Event()

    def progress(count: int) -> None:
        if is_over.is_set():
            raise TransferError("the copy was cancelled")
        if on_progress is not None:
            on_progress(count)

    def do() -> T:
        with Transport(transport.config, retries=transport.retries) as own:
            return work(own, progress)

    try:
        return await asyncio.to_thread(do)
    finally:
        is_over.set()
