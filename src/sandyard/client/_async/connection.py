"""Connections to a server, and the resources of an organization other than sandboxes."""

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, Self, TypeVar

from sandyard.client import calls, workspaces
from sandyard.client._async.local import AsyncWorkspaceFiles
from sandyard.client._async.secrets import AsyncSecretMethods
from sandyard.client._async.templates import AsyncTemplateMethods
from sandyard.client._async.transport import AsyncTransport
from sandyard.client.config import ClientConfig, find_config
from sandyard.client.models import Snapshot, Workspace, snapshot_of

T = TypeVar("T")


class AsyncConnection(AsyncTemplateMethods, AsyncSecretMethods):
    """A connection to a server, and the resources of an organization other than sandboxes.

    `AsyncSandyard` adds the sandboxes.
    """

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        *,
        profile: str | None = None,
        retries: int = 2,
    ) -> None:
        config = find_config(api_key, base_url, profile)
        self._transport = AsyncTransport(config, retries=retries)

    async def __aenter__(self) -> Self:
        """Return this client."""
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close the connection."""
        await self.close()

    @property
    def config(self) -> ClientConfig:
        """The server's URL and the API key."""
        return self._transport.config

    async def close(self) -> None:
        """Close the connection."""
        await self._transport.close()

    async def snapshots(self) -> AsyncIterator[Snapshot]:
        """Yield all snapshots, newest first."""
        async for one in self._pages("/v1/snapshots", {}, snapshot_of):
            yield one

    async def delete_snapshot(self, reference: str) -> None:
        """Delete a snapshot. Sandboxes created from it are not affected."""
        await self._transport.send(calls.delete_snapshot(reference))

    async def workspaces(self) -> list[Workspace]:
        """Return the organization's workspaces and your own."""
        return await self._transport.send(workspaces.listing())

    async def workspace(self, reference: str) -> Workspace:
        """Return a workspace, by id or slug."""
        return await self._transport.send(workspaces.find(reference))

    async def create_workspace(self, name: str, *, slug: str | None = None) -> Workspace:
        """Create a workspace."""
        return await self._transport.send(workspaces.create(name, slug))

    async def rename_workspace(self, reference: str, name: str) -> Workspace:
        """Rename a workspace. Its slug does not change."""
        return await self._transport.send(workspaces.rename(reference, name))

    async def delete_workspace(self, reference: str, *, force: bool = False) -> None:
        """Delete a workspace and its files. With `force`, unmount it from running sandboxes
        first."""
        await self._transport.send(workspaces.delete(reference, force=force))

    def workspace_files(self, reference: str) -> AsyncWorkspaceFiles:
        """Return the files of a workspace, by id or slug."""
        return AsyncWorkspaceFiles(self._transport, reference)

    async def credits(self) -> Mapping[str, Any]:
        """Return the organization's credits in cents: `balanceCents` and totals."""
        return await self._transport.send(calls.credits_left())

    async def usage(self, period: str = "current") -> Mapping[str, Any]:
        """Return the usage in a period: `current` (this month), `7d`, `30d` or `all_time`."""
        return await self._transport.send(calls.usage(period))

    async def ask(self, method: str, path: str, *, query: Any = None, body: Any = None) -> Any:
        """Call any endpoint of the HTTP API and return the decoded JSON."""
        return await self._transport.send(calls.plain(method, path, query=query, body=body))

    async def _pages(
        self, path: str, query: Mapping[str, Any], read: Callable[[calls.Raw], T]
    ) -> AsyncIterator[T]:
        cursor: str | None = None
        while True:
            found, cursor = await self._transport.send(calls.page(path, query, cursor, read))
            for one in found:
                yield one
            if cursor is None:
                return
