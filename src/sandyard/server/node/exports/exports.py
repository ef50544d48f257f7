"""Lets machines mount workspaces: one file server an organization, looked after as machines are."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Collection, Iterable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

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
from sandyard.server.node.exports.server import Export, Server, check_here
from sandyard.server.node.exports.shares import Share
from sandyard.server.node.host.network import Network
from sandyard.server.tasks import Crew, in_thread, to_the_end

log = logging.getLogger(__name__)

_IDLE_S = 120.0
_LOOK_S = 15.0
_AGAIN_S = (0.0, 1.0, 5.0, 30.0)
_WELL_S = 60.0
_MEND_AGAIN_S = 600.0
_NUMBERS = 65_534
_FOLDERS = (
    "cannot mount workspaces: here they lie in plain folders, out of which a guest could reach "
    'others; whoever runs the server sets workspaces.volumes to "images"'
)


class _Served:
    """An organization's server, and all that is open for it."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.lock = asyncio.Lock()
        self.shares: dict[int, tuple[Place, Share]] = {}
        self.volumes: dict[str, AsyncExitStack] = {}
        self.numbers: dict[str, int] = {}
        self.idle_since: float | None = None
        self.is_behind = False
        self.mended_at: dict[str, float] = {}
        self.watching: asyncio.Task[None] | None = None

    def exports(self) -> list[Export]:
        """Return what is to be exported now, to whom: of what is granted, what is open."""
        writers: dict[str, list[str]] = {}
        readers: dict[str, list[str]] = {}
        for place, share in self.shares.values():
            for one in share.mounts:
                among = readers if one.read_only else writers
                among.setdefault(one.workspace_id, []).append(place.ip)
        return [
            Export(
                number,
                workspace_id,
                tuple(sorted(set(writers.get(workspace_id, ())))),
                tuple(sorted(set(readers.get(workspace_id, ())))),
            )
            for workspace_id, number in self.numbers.items()
            if workspace_id in self.volumes
        ]

    @property
    def clients(self) -> dict[str, str]:
        """The names of those who mount, and their addresses."""
        return {share.client: place.ip for place, share in self.shares.values()}

    @property
    def used(self) -> set[str]:
        """The ids of the workspaces that somebody may mount."""
        return {one.workspace_id for _, share in self.shares.values() for one in share.mounts}


class NfsExports:
    """See node.exports.shares.Exports: the real thing."""

    def __init__(
        self, home: Path, *, network: Network, volumes: Volumes, clock: Clock, can_share: bool
    ) -> None:
        self._folder = home.resolve() / "exports"  # what is mounted is known by that path
        self._network = network
        self._volumes = volumes
        self._clock = clock
        self._can_share = can_share
        self._served: dict[str, _Served] = {}
        self._opening = asyncio.Lock()
        self._crew: Crew | None = None

    # --- over a restart -------------------------------------------------------------------

    def slots(self) -> list[int]:
        """Return the numbers of the places that file servers of an earlier process have."""
        return [slot for _, slot in self._told().values()]

    def _told(self) -> Mapping[Path, tuple[str, int]]:
        """Return whose the servers are that an earlier process noted, and their slots."""
        found: dict[Path, tuple[str, int]] = {}
        for folder in sorted(self._folder.iterdir()) if self._folder.is_dir() else ():
            with suppress(OSError, ValueError, KeyError, TypeError):
                told = json.loads((folder / "server.json").read_text())
                found[folder] = (str(told["org_id"]), int(told["slot"]))
        return found

    async def open(self, shares: Iterable[tuple[Place, Share]], crew: Crew) -> None:
        """See node.exports.shares.Exports.open."""
        self._crew = crew
        by_org: dict[str, list[tuple[Place, Share]]] = {}
        for place, share in shares:
            by_org.setdefault(share.org_id, []).append((place, share))
        for folder, (org_id, slot) in (await in_thread(self._told)).items():
            server = Server(folder, self._network.place(slot), org_id)
            is_up = await server.recover()
            if org_id in by_org and org_id not in self._served:
                served = self._served[org_id] = _Served(server)
                served.numbers = await in_thread(_numbers_in, folder)
                if is_up:
                    self._watch(served)
            else:
                await self._remove(server)
        for folder in list(self._folder.iterdir()) if self._folder.is_dir() else ():
            if all(one.server.folder != folder for one in self._served.values()):
                # It was being made: nothing of it was noted yet.
                with suppress(SandyardError, OSError):
                    await Server(folder, self._network.place(0), "").remove()
        for org_id, found in by_org.items():
            await self._take_up(org_id, found)
        crew.start(self._look_around(), "file servers are not looked after any more")

    async def _take_up(self, org_id: str, found: list[tuple[Place, Share]]) -> None:
        """Serve machines of an organization that live on, all of them at once: what is exported to
        one alone is taken away from the others for a moment, and with it what they have locked."""
        try:
            async with self._locked(org_id) as served:
                served.shares = {place.number: (place, share) for place, share in found}
                served.is_behind = True
                await self._let_go_of_stuck(served)
                await self._catch_up(served)
        except SandyardError as error:
            log.error("machines cannot reach their workspaces: %s", error.message)

    async def _catch_up(self, served: _Served) -> None:
        try:
            await self._serve(served)
            for place, share in served.shares.values():
                await self._network.let(place, served.server.place, port=share.port)
            served.is_behind = False
        except (SandyardError, OSError) as error:
            log.error("machines cannot reach their workspaces yet: %s", error)

    async def close(self) -> None:
        """See node.exports.shares.Exports.close."""
        for served in list(self._served.values()):
            if served.watching is not None:
                served.watching.cancel()
                await asyncio.wait([served.watching])
            if served.shares:
                # Its machines go on, and so does what they have open.
                served.server.let_go()
            else:
                await self._give_up(served)

    # --- what machines may ----------------------------------------------------------------

    async def prepare(self, org_id: str) -> None:
        """See node.exports.shares.Exports.prepare."""
        if not self._can_share:
            raise UnsupportedError(_FOLDERS)
        await in_thread(check_here)
        async with self._locked(org_id) as served:
            if not served.server.is_up:
                try:
                    await self._serve(served)
                except (InternalError, OSError) as error:
                    raise UnavailableError(f"cannot mount workspaces: {error}") from error
            if not served.shares:
                served.idle_since = self._clock.monotonic()

    async def grant(self, place: Place, share: Share) -> None:
        """See node.exports.shares.Exports.grant."""
        if not self._can_share:  # it may have been otherwise when it was mounted first
            raise UnavailableError(_FOLDERS)
        async with self._locked(share.org_id) as served:
            served.idle_since = None
            served.shares[place.number] = (place, share)
            try:
                await self._serve(served, asking=place)
                await self._network.let(place, served.server.place, port=share.port)
            except BaseException as error:
                await to_the_end(self._take_back(served, place))
                if isinstance(error, InternalError | OSError):
                    raise UnavailableError(f"cannot mount workspaces: {error}") from error
                raise

    async def _serve(self, served: _Served, *, asking: Place | None = None) -> None:
        """Have a server up that exports what is granted now.

        Workspaces that were removed are left out, and those that cannot be opened now, unless it
        is who asks that is to have them.
        """
        await self._open_granted(served, asking=asking)
        await served.server.export(served.exports())
        if not served.server.is_up:
            await served.server.keep_clients(served.clients)
            await served.server.start()
            self._watch(served)

    async def _open_granted(self, served: _Served, *, asking: Place | None = None) -> None:
        for number, (place, share) in list(served.shares.items()):
            mounts = [
                one
                for one in share.mounts
                if await self._has_opened(served, one, is_patient=place is not asking)
            ]
            if len(mounts) < len(share.mounts):
                served.shares[number] = (place, replace(share, mounts=tuple(mounts)))

    async def _has_opened(self, served: _Served, mount: MountWish, *, is_patient: bool) -> bool:
        """Open a volume if it is to be had; False if it was removed."""
        try:
            await self._open_volume(served, mount.workspace_id, mount.quota_bytes)
        except NotFoundError:
            return False
        except (UnavailableError, InternalError, OSError) as error:
            if not is_patient:
                raise
            log.error("machines cannot reach a workspace yet: %s", error)
        return True

    async def revoke(self, place: Place) -> None:
        """See node.exports.shares.Exports.revoke."""
        for served in list(self._served.values()):
            if place.number in served.shares:
                async with served.lock:
                    await self._take_back(served, place)

    async def _take_back(self, served: _Served, place: Place) -> None:
        # First no packet of its comes through, then the server is told.
        served.shares.pop(place.number, None)
        try:
            await self._network.forbid(place)
        finally:
            await self._settle(served)

    async def withdraw(self, workspace_id: str) -> None:
        """See node.exports.shares.Exports.withdraw."""
        for served in list(self._served.values()):
            if workspace_id not in served.used and workspace_id not in served.volumes:
                continue
            async with served.lock:
                for number, (place, share) in list(served.shares.items()):
                    left = tuple(one for one in share.mounts if one.workspace_id != workspace_id)
                    served.shares[number] = (place, replace(share, mounts=left))
                await self._settle(served)
                served.numbers.pop(workspace_id, None)

    async def _settle(self, served: _Served) -> None:
        """Export what is still used, and let go of the rest."""
        try:
            await served.server.export(served.exports())
        except (UnavailableError, OSError) as error:
            # A server that hears nobody may serve nobody: its next start reads what is so.
            log.error("a file server is started anew: %s", error)
            served.is_behind = True
            await served.server.stop()
        for workspace_id in set(served.volumes) - served.used:
            with suppress(InternalError, OSError):
                await served.server.unbind(workspace_id)
            await served.volumes.pop(workspace_id).aclose()
        if not served.shares:
            served.idle_since = self._clock.monotonic()

    async def _open_volume(self, served: _Served, workspace_id: str, quota_bytes: int) -> None:
        if workspace_id in served.volumes:
            return
        async with AsyncExitStack() as held:
            source = await held.enter_async_context(self._volumes.open(workspace_id, quota_bytes))
            await served.server.bind(workspace_id, source)
            served.volumes[workspace_id] = held.pop_all()
        served.numbers.setdefault(workspace_id, _number_of(workspace_id, served.numbers.values()))

    # --- servers --------------------------------------------------------------------------

    @asynccontextmanager
    async def _locked(self, org_id: str) -> AsyncIterator[_Served]:
        """Hold an organization's server, which is there, until the block is left."""
        while True:
            served = await self._served_for(org_id)
            async with served.lock:
                # It may have been given up while this waited for it.
                if self._served.get(org_id) is served:
                    yield served
                    return

    async def _served_for(self, org_id: str) -> _Served:
        async with self._opening:
            if org_id not in self._served:
                place = await self._network.take_for_server()
                server = Server(self._folder / str(place.number), place, org_id)
                self._served[org_id] = _Served(server)
            return self._served[org_id]

    def _watch(self, served: _Served) -> None:
        if self._crew is not None and (served.watching is None or served.watching.done()):
            served.watching = self._crew.start(
                self._keep_up(served), "a file server is not looked after any more"
            )

    async def _keep_up(self, served: _Served) -> None:
        """Start a server again whenever it ends, with what it is to serve then."""
        tries = 0
        while True:
            began = self._clock.monotonic()
            await served.server.ended()
            if self._clock.monotonic() - began > _WELL_S:
                tries = 0
            await self._clock.sleep(_AGAIN_S[min(tries, len(_AGAIN_S) - 1)])
            tries += 1
            async with served.lock:
                if not served.shares:
                    await served.server.stop()
                    return
                if served.server.is_up:  # whoever stopped it has started it again
                    continue
                log.error("a file server ended and is started again")
                try:
                    await served.server.stop()
                    await self._serve(served)
                except (SandyardError, OSError) as error:
                    log.error("a file server does not start: %s", error)

    async def _look_around(self) -> None:
        while True:
            await self._clock.sleep(_LOOK_S)
            for served in list(self._served.values()):
                async with served.lock:
                    await in_thread(served.server.bound_log)
                    await self._let_go_of_stuck(served)
                    if not served.used <= served.volumes.keys():
                        had = set(served.volumes)
                        await self._open_granted(served)
                        served.is_behind |= set(served.volumes) != had
                    if served.is_behind and served.shares:
                        await self._catch_up(served)
                since = served.idle_since
                if since is not None and self._clock.monotonic() - since > _IDLE_S:
                    await self._give_up(served)

    async def _let_go_of_stuck(self, served: _Served) -> None:
        """Stop a server that has volumes open which take no more writes, for them to be mended.

        Its machines wait meanwhile, as they do whenever it is started anew. It may be that of an
        earlier process, and what it has open not be known here yet.
        """
        now = self._clock.monotonic()
        lately = {one for one, at in served.mended_at.items() if now - at < _MEND_AGAIN_S}
        try:
            stuck = await self._volumes.stuck(list(served.used - lately))
            if not stuck:
                return
            served.mended_at |= dict.fromkeys(stuck, now)
            log.error("the host's disk was full: mending the workspaces %s", ", ".join(stuck))
            served.is_behind = True
            await served.server.stop()
            for workspace_id in stuck:
                await served.server.unbind(workspace_id)
                if workspace_id in served.volumes:
                    await served.volumes.pop(workspace_id).aclose()
        except (SandyardError, OSError) as error:
            log.error("workspaces cannot be mended yet: %s", error)

    async def _give_up(self, served: _Served) -> None:
        """End a server that nobody uses; what would not go is for the next process."""
        async with self._opening, served.lock:
            if served.shares:
                return
            if served.watching is not None:
                served.watching.cancel()
                await asyncio.wait([served.watching])
            await self._remove(served.server)
            for held in served.volumes.values():
                await held.aclose()
            self._served.pop(served.server.org_id, None)

    async def _remove(self, server: Server) -> None:
        try:
            await server.stop()
            await self._network.give_back(server.place)
            await server.remove()
        except (SandyardError, OSError):
            log.exception("what a file server left cannot be removed yet")


def _number_of(workspace_id: str, taken: Collection[int]) -> int:
    """Return the number that a workspace is exported under, by which it is known to machines that
    have it mounted: the same whenever it is exported, unless another has it."""
    first = int.from_bytes(sha256(workspace_id.encode()).digest()[:4])
    # 0 is the root that all exports lie below.
    among = (1 + (first + step) % _NUMBERS for step in range(_NUMBERS))
    return next(one for one in among if one not in taken)


def _numbers_in(folder: Path) -> dict[str, int]:
    """Return the numbers that workspaces are exported under: handles that guests have tell them."""
    found: dict[str, int] = {}
    with suppress(OSError):
        number = 0
        for line in (folder / "conf/ganesha.conf").read_text().splitlines():
            words = line.replace(";", " ").replace("=", " ").split()
            if words[:1] == ["Export_Id"]:
                number = int(words[1])
                found[words[3].removeprefix("/tree/")] = number
    return found
