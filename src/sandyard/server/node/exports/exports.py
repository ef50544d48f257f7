"""Lets machines mount workspaces from one or two file servers per machine, which are supervised."""

import asyncio
import logging
from collections.abc import Collection, Iterable
from contextlib import AsyncExitStack, suppress
from pathlib import Path

from typing_extensions import override

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import MountWish
from sandyard.server.core.contracts.volumes import Volumes
from sandyard.server.core.errors import (
    InternalError,
    NotFoundError,
    SandyardError,
    UnavailableError,
    UnsupportedError,
)
from sandyard.server.drivers.contract import Place
from sandyard.server.node.exports.library import (
    library_of,
    missing_here,
    note_verdict,
    verdict_in,
)
from sandyard.server.node.exports.self_test import missing_by_test, remove_volume
from sandyard.server.node.exports.server import Server, check_here, owner_in
from sandyard.server.node.exports.shares import Exports, Part, Share
from sandyard.server.node.host.network import Network
from sandyard.server.tasks import Crew, Task, in_thread, to_the_end

log = logging.getLogger(__name__)

_LOOK_S = 15.0
_AGAIN_S = (0.0, 1.0, 5.0, 30.0)
_WELL_S = 60.0
_REPAIR_AGAIN_S = 600.0
_FOLDERS = (
    "cannot mount workspaces: here they lie in plain directories, out of which a guest could reach "
    'others; the operator can set workspaces.volumes to "images"'
)


class _OpenVolumes:
    """The volumes that servers export; each is opened once, however many servers export it."""

    def __init__(self, volumes: Volumes) -> None:
        self._volumes = volumes
        # By workspace: to open one may take as long as its file system is checked.
        self._locks: dict[str, asyncio.Lock] = {}
        self._held: dict[str, tuple[AsyncExitStack, Path, set[Server]]] = {}

    async def take(self, mount: MountWish, server: Server) -> Path:
        """Return a volume's folder, which stays open until `release`."""
        async with self._locked(mount.workspace_id):
            if mount.workspace_id not in self._held:
                async with AsyncExitStack() as held:
                    folder = await held.enter_async_context(
                        self._volumes.open(mount.workspace_id, mount.quota_bytes)
                    )
                    self._held[mount.workspace_id] = held.pop_all(), folder, set()
            _, folder, servers = self._held[mount.workspace_id]
            servers.add(server)
            return folder

    async def release(self, workspace_id: str, server: Server) -> None:
        """Close a volume unless another server exports it; does nothing if this server does not
        export it."""
        async with self._locked(workspace_id):
            if workspace_id not in self._held:
                return
            held, _, servers = self._held[workspace_id]
            servers.discard(server)
            if not servers:
                del self._held[workspace_id]
                await held.aclose()

    def _locked(self, workspace_id: str) -> asyncio.Lock:
        return self._locks.setdefault(workspace_id, asyncio.Lock())

    async def stuck(self, among: Collection[str]) -> list[str]:
        """See core.contracts.volumes.Volumes.stuck."""
        return await self._volumes.stuck(among)


class _Served:
    """One server and the workspaces that it should export."""

    def __init__(self, server: Server, part: Part) -> None:
        self.server = server
        self.wanted = part.mounts
        self.bound: set[str] = set()
        self.lock = asyncio.Lock()
        self.is_behind = False
        self.is_over = False
        self.watching: Task | None = None


class NfsExports(Exports):
    """See node.exports.shares.Exports: the real thing."""

    def __init__(
        self, home: Path, *, network: Network, volumes: Volumes, clock: Clock, can_share: bool
    ) -> None:
        self._folder = home.resolve() / "exports"  # what is mounted is known by that path
        self._verdict = verdict_in(home)
        self._network = network
        self._volumes = _OpenVolumes(volumes)
        self._clock = clock
        self._can_share = can_share
        self._served: dict[int, list[_Served]] = {}
        self._repaired_at: dict[str, float] = {}
        self._crew: Crew | None = None

    # --- over a restart -------------------------------------------------------------------

    @override
    async def open(self, shares: Iterable[tuple[Place, Share]], crew: Crew) -> None:
        self._crew = crew
        with suppress(SandyardError, OSError):
            await remove_volume(self._folder)
        adopted = [served for place, share in shares for served in self._add(place, share)]
        owners = {one.server.owner for one in adopted}
        for folder in await in_thread(_folders_in, self._folder):
            if (await in_thread(owner_in, folder)) not in owners:
                # Another machine's before, or of a version in which servers were shared.
                server = Server(folder, self._network.place(0), Part(0, ""))
                await server.recover()
                await self._remove(server)
        for served in adopted:
            async with served.lock:
                await served.server.recover()
                served.is_behind = True
        await self._repair_stuck()
        for served in adopted:
            async with served.lock:
                await self._catch_up(served)
        crew.start(self._look_around(), "file servers are not supervised any more")
        crew.start(self._test(), "file servers were not tested")

    async def _test(self) -> None:
        """Test what the file servers of this host can do, and save the result for
        `missing_here`."""
        library = library_of()
        if not self._can_share or library is None:
            return
        try:
            missing = await missing_by_test(self._folder, self._network)
            await in_thread(note_verdict, self._verdict, library, missing)
        except (SandyardError, OSError) as error:
            log.warning(
                "the self-test of the file servers failed: %s; going by their build",
                error,
            )
            await in_thread(self._verdict.unlink, missing_ok=True)
        for feature in await in_thread(missing_here, self._verdict):
            log.warning("in mounted workspaces, %s: use another build of NFS-Ganesha", feature)

    @override
    async def close(self) -> None:
        for served in self._every():
            await self._unwatch(served)
            served.server.detach()

    # --- what machines may ----------------------------------------------------------------

    @override
    def limited(self) -> tuple[str, ...]:
        if not self._can_share:
            return ()
        return tuple(f"in mounted workspaces, {one}" for one in missing_here(self._verdict))

    @override
    async def check(self) -> None:
        if not self._can_share:
            raise UnsupportedError(_FOLDERS)
        await in_thread(check_here)

    @override
    async def grant(self, place: Place, share: Share) -> None:
        if not self._can_share:  # the mount may have been writable before
            raise UnavailableError(_FOLDERS)
        await self.revoke(place)
        try:
            async with asyncio.TaskGroup() as starting:
                for served in self._add(place, share):
                    starting.create_task(self._start(served))
        except BaseException as error:
            await to_the_end(self.revoke(place))
            if isinstance(error, BaseExceptionGroup):
                raise _first_of(error) from error
            raise

    async def _start(self, served: _Served) -> None:
        async with served.lock:
            for one in list(served.wanted.values()):
                await self._bind(served, one)
            await self._serve(served)

    @override
    async def revoke(self, place: Place) -> None:
        if place.number in self._served:
            # If this were cancelled midway, nothing would release the rest later.
            await to_the_end(self._revoke(place))

    async def _revoke(self, place: Place) -> None:
        for served in self._served.pop(place.number, []):
            served.is_over = True
            await self._unwatch(served)
            async with served.lock:
                served.wanted.clear()
                await self._remove(served.server)
                for workspace_id in list(served.bound):
                    await self._release(served, workspace_id)

    @override
    async def withdraw(self, workspace_id: str) -> None:
        for served in self._every():
            if workspace_id not in served.wanted and workspace_id not in served.bound:
                continue
            async with served.lock:
                served.wanted.pop(workspace_id, None)
                try:
                    await served.server.unbind(workspace_id)
                    await served.server.export()
                except (UnavailableError, InternalError, OSError) as error:
                    # It may still have the volume open; its next start reads what it may export.
                    log.error("a file server does not answer; restarting it: %s", error)
                    served.is_behind = True
                    await served.server.stop()
                finally:
                    await self._release(served, workspace_id)

    # --- servers --------------------------------------------------------------------------

    def _every(self) -> list[_Served]:
        return [one for servers in self._served.values() for one in servers]

    def _add(self, place: Place, share: Share) -> list[_Served]:
        made = [
            _Served(Server(self._folder / f"{place.number}-{part.port}", place, part), part)
            for part in share.parts
        ]
        self._served[place.number] = made
        return made

    async def _bind(self, served: _Served, mount: MountWish) -> None:
        """Open a workspace's volume and bind-mount it into the server's tree.

        A deleted workspace is skipped.
        """
        if mount.workspace_id in served.bound:
            return
        try:
            folder = await self._volumes.take(mount, served.server)
        except NotFoundError:
            served.wanted.pop(mount.workspace_id, None)
            return
        served.bound.add(mount.workspace_id)
        try:
            await served.server.bind(mount.workspace_id, folder)
        except BaseException:
            await to_the_end(self._release(served, mount.workspace_id))
            raise

    async def _release(self, served: _Served, workspace_id: str) -> None:
        served.bound.discard(workspace_id)
        await self._volumes.release(workspace_id, served.server)

    async def _serve(self, served: _Served) -> None:
        """Export the bound workspaces, starting the server if necessary."""
        await served.server.export()
        if not served.server.is_up:
            await in_thread(served.server.forget_strangers)
            await served.server.start()
        self._watch(served)

    async def _catch_up(self, served: _Served) -> None:
        """Export all workspaces that should be exported; those that cannot be opened now are
        retried later."""
        if served.is_over:
            return
        served.is_behind = True
        for one in list(served.wanted.values()):
            try:
                await self._bind(served, one)
            except (UnavailableError, InternalError, OSError) as error:
                log.error("cannot export a workspace to a machine yet: %s; retrying", error)
        try:
            await self._serve(served)
        except (SandyardError, OSError) as error:
            log.error("cannot export the workspaces of a machine yet: %s; retrying", error)
        else:
            served.is_behind = not served.wanted.keys() <= served.bound

    def _watch(self, served: _Served) -> None:
        is_watched = served.watching is not None and not served.watching.done()
        if self._crew is not None and not is_watched and not served.is_over:
            served.watching = self._crew.start(
                self._keep_up(served), "a file server is not supervised any more"
            )

    async def _unwatch(self, served: _Served) -> None:
        if served.watching is not None:
            served.watching.cancel()
            await asyncio.wait([served.watching])

    async def _keep_up(self, served: _Served) -> None:
        """Restart a server whenever it ends, with its current workspaces."""
        tries = 0
        while True:
            began = self._clock.monotonic()
            await served.server.ended()
            if self._clock.monotonic() - began > _WELL_S:
                tries = 0
            await self._clock.sleep(_AGAIN_S[min(tries, len(_AGAIN_S) - 1)])
            tries += 1
            async with served.lock:
                if served.is_over:
                    return
                if served.server.is_up:  # it was stopped, and has been started again
                    continue
                log.error("a file server ended; restarting it")
                await self._catch_up(served)

    async def _look_around(self) -> None:
        while True:
            await self._clock.sleep(_LOOK_S)
            await self._repair_stuck()
            for served in self._every():
                async with served.lock:
                    await in_thread(served.server.bound_log)
                    if served.is_behind and served.wanted:
                        await self._catch_up(served)

    async def _repair_stuck(self) -> None:
        """Stop the servers of volumes that can no longer be written, so that these are repaired.

        The file system is checked when the next server opens the volume. Machines wait meanwhile,
        as during any restart of their server.
        """
        now = self._clock.monotonic()
        wanted = {one for served in self._every() for one in served.wanted}
        lately = {one for one, at in self._repaired_at.items() if now - at < _REPAIR_AGAIN_S}
        try:
            stuck = set(await self._volumes.stuck(list(wanted - lately)))
        except (SandyardError, OSError) as error:
            log.error("cannot check workspaces for damage by a full disk: %s; retrying", error)
            return
        if not stuck:
            return
        self._repaired_at |= dict.fromkeys(stuck, now)
        log.error("the host's disk was full; repairing the workspaces %s", ", ".join(stuck))
        async with AsyncExitStack() as held:
            affected = [one for one in self._every() if stuck & one.wanted.keys()]
            for served in affected:
                # All must have closed a volume before any opens it again.
                await held.enter_async_context(served.lock)
            for served in affected:
                served.is_behind = True
                try:
                    await served.server.stop()
                    for workspace_id in stuck & served.wanted.keys():
                        await served.server.unbind(workspace_id)
                        await self._release(served, workspace_id)
                except (SandyardError, OSError) as error:
                    log.error("a workspace cannot be repaired yet: %s", error)

    async def _remove(self, server: Server) -> None:
        try:
            await server.stop()
            await server.remove()
        except (SandyardError, OSError):
            log.exception("cannot clean up after a file server; its next start tries again")


def _folders_in(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _first_of(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """Return the first error of a group, for `grant` to raise."""
    error = group.exceptions[0]
    if isinstance(error, BaseExceptionGroup):
        return _first_of(error)
    if isinstance(error, InternalError | OSError):
        return UnavailableError(f"cannot mount workspaces: {error}")
    return error
