"""Removes from nodes and from the store what deleted templates and ended builds have left."""

import asyncio
import logging
from datetime import timedelta
from typing import Final

from sandyard.server.core.contracts.node import NodeControl, NodeOperation, version_name
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.errors import SandyardError
from sandyard.server.core.node_ops import DropStages, DropVersion
from sandyard.server.core.records import Build
from sandyard.server.service.builds.builds import WAITS
from sandyard.server.service.builds.uploads import KEPT, Uploads
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.templates.templates import REMOVED

log = logging.getLogger(__name__)

_TIDY_S: Final = 60.0
_NODES_AT_ONCE: Final = 32
_GRACE: Final = timedelta(seconds=30)


class Removal:
    """Removes versions, stages and builds; it is to be run."""

    def __init__(self, platform: Platform, uploads: Uploads) -> None:
        self._store = platform.store
        self._bus = platform.bus
        self._clock = platform.clock
        self._nodes = platform.nodes
        self._uploads = uploads

    async def run(self) -> None:
        """Work forever."""
        with self._bus.subscribe(REMOVED) as hints:
            while True:
                try:
                    await self._uploads.tidy()
                    await self._give_up()
                    await self._remove_versions()
                except SandyardError as error:
                    log.warning("cannot remove deleted templates: %s; retrying", error.message)
                except Exception:  # the next look may succeed
                    log.exception("cannot remove deleted templates; retrying")
                await hints.wait(_TIDY_S)

    async def published(self, build: Build) -> tuple[str, ...]:
        """Return the names on nodes of what a build has published."""
        async with self._store.read() as tx:
            found = await tx.versions.of(build.org_id, build.slug)
        mine = (one for one in found if one.build_id == build.id)
        return tuple(version_name(one.slug, one.digest) for one in mine)

    async def drop_stages(self, build: Build, *, but: tuple[str, ...]) -> tuple[str, ...]:
        """Remove what nodes kept for a build, and return the names of what may be left."""
        is_done = await self._on_all_nodes(
            DropStages(build.id, but=but), f"the stages of the build {build.id}"
        )
        return () if is_done else build.stages

    async def _give_up(self) -> None:
        """End builds whose upload is on a server that has not come back: it is gone by now."""
        now = self._clock.now()
        async with self._store.write(Turn.SHARED) as tx:
            given_up = await tx.builds.give_up(
                before=now - KEPT,
                at=now,
                error="the server that has its upload did not return within a day; build it again",
            )
            await tx.builds.expire(
                before=now - WAITS,
                at=now,
                error="it was announced, and not started within two hours",
            )
        for build in given_up:
            await self.drop_stages(build, but=await self.published(build))

    async def _remove_versions(self) -> None:
        async with self._store.read() as tx:
            removed = await tx.versions.removed()
        since = self._clock.now() - _GRACE
        for version in removed:
            if version.removed_at is None or version.removed_at > since:
                continue  # a request that has chosen it may not have been written yet
            async with self._store.read() as tx:
                is_kept = await tx.versions.is_kept(version)
                if not is_kept and await tx.versions.is_used(version):
                    continue
            name = version_name(version.slug, version.digest)
            if is_kept or await self._on_all_nodes(DropVersion(name), name):
                async with self._store.write(version.org_id) as tx:
                    await tx.versions.forget(version)

    async def _on_all_nodes(self, operation: NodeOperation[None], what: str) -> bool:
        """Ask all nodes concurrently to remove something; return False if one is away or failed."""
        turns = asyncio.Semaphore(_NODES_AT_ONCE)

        async def ask_one(node: NodeControl) -> bool:
            if not self._nodes.is_there(node.node_id):
                return False
            async with turns:
                try:
                    await node.do(operation)
                except SandyardError as error:
                    log.warning(
                        "cannot remove %s from the node %s: %s", what, node.node_id, error.message
                    )
                    return False
            return True

        async with asyncio.TaskGroup() as tasks:
            asked = [tasks.create_task(ask_one(one)) for one in self._nodes.all()]
        return all(one.result() for one in asked)
