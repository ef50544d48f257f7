"""What one build takes from the build cache, and what it keeps there for later ones."""

import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict
from itertools import takewhile

from sandyard.server.core.errors import SandyardError
from sandyard.server.core.shapes import Shape
from sandyard.server.service.builds import recipes
from sandyard.server.service.builds.boxes import Box
from sandyard.server.service.builds.builds import actor_of
from sandyard.server.service.builds.cache import BuildCache, Hit, step_names
from sandyard.server.service.builds.plan import NewTemplate
from sandyard.server.service.builds.progress import Progress
from sandyard.server.service.builds.tasks import Task

log = logging.getLogger(__name__)


class Keeping:
    """The cache, as one build uses it. A build succeeds without it."""

    def __init__(
        self, cache: BuildCache, progress: Progress, wish: NewTemplate, shape: Shape
    ) -> None:
        self._cache = cache
        self._progress = progress
        self._actor = actor_of(progress.build)
        self._slug = wish.slug
        self._shape = shape
        self._keeps = wish.is_cached and cache.is_on
        self._reads = self._keeps and not wish.force

    def stop_reading(self) -> None:
        """Find nothing from now on: what was found could not be used."""
        self._reads = False

    async def find_layers(self) -> Hit | None:
        """Return the machine with the image layers of the template's last build."""
        return await self._cache.find_layers(self._actor, self._slug) if self._reads else None

    async def find_step(self, origin: Sequence[object], tasks: Sequence[Task]) -> Hit | None:
        """Return the machine of an earlier build that has the most of the tasks done."""
        if not self._reads:
            return None
        reusable = [*takewhile(lambda one: not one.is_forced, tasks)]
        return await self._cache.find_step(self._actor, self.names_of(origin, reusable))

    def names_of(self, origin: Sequence[object], tasks: Sequence[Task]) -> list[str]:
        """Return the names of the machines after each task, if they are kept."""
        keys = [one.key for one in tasks]
        return step_names(self._actor, [*origin, asdict(self._shape)], keys)

    async def keep_step(self, box: Box, name: str) -> None:
        """Keep a machine after a task."""
        if self._keeps:
            await self._for_later(lambda: self._cache.keep_step(self._actor, box.id, name))

    async def keep_layers(self, box: Box) -> None:
        """Keep a machine with the image layers that it has built."""
        if not self._keeps:
            return
        try:
            await box.shell(recipes.KEEP_LAYERS)
        except SandyardError as error:
            log.debug("cannot keep the image layers of a build: %s", error.message)
            await self._for_later(lambda: self._cache.drop_layers(self._actor, self._slug))
            return
        await self._for_later(lambda: self._cache.keep_layers(self._actor, box.id, self._slug))

    async def _for_later(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        except SandyardError as error:
            self._keeps = False
            await self._progress.say(f"not cached: {error.message}")
