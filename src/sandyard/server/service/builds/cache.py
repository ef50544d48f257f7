"""The build cache: snapshots of machines of builds, named after everything that produced them.

They belong to the user who requested the build. They are metered and listed like other snapshots,
and can be deleted. The oldest are removed when there are too many, and all that are older than two
weeks. Builds with secrets or credentials keep nothing, because a snapshot has the machine's memory.
"""

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from typing import Final

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.errors import LimitReachedError, NotFoundError, SandyardError
from sandyard.server.core.ids import new_secret
from sandyard.server.core.records import Snapshot
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.snapshots import CACHE_PREFIX, Snapshots

log = logging.getLogger(__name__)

_PAGE: Final = 100
_DIGITS: Final = 24
_MOST: Final = 20
_LASTS: Final = timedelta(days=14)


@dataclass(frozen=True)
class Hit:
    """A machine that an earlier build kept after so many of the steps."""

    snapshot_id: str
    done: int


def step_names(actor: Actor, origin: Sequence[object], steps: Sequence[object]) -> list[str]:
    """Return the name of the snapshot after each step. It depends on the machine that the steps
    begin in, and on this step and all before it."""
    names, digest = [], digest_of([actor.org_id, actor.user_id, *origin])
    for one in steps:
        digest = digest_of([digest, one])
        names.append(f"{CACHE_PREFIX}{digest[:_DIGITS]}")
    return names


def digest_of(value: object) -> str:
    """Return the SHA-256 of a value as JSON, in hex."""
    return sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def layers_prefix(actor: Actor, slug: str) -> str:
    """Return what the names begin with of the machines with a template's image layers."""
    return f"{CACHE_PREFIX}layers-{digest_of([actor.org_id, actor.user_id, slug])[:_DIGITS]}-"


class BuildCache:
    """The snapshots of builds. `size_max` limits those of one user, in bytes; with 0 none are
    kept."""

    def __init__(self, snapshots: Snapshots, clock: Clock, *, size_max: int) -> None:
        self._snapshots = snapshots
        self._clock = clock
        self._size_max = size_max

    @property
    def is_on(self) -> bool:
        """Whether anything is kept."""
        return self._size_max > 0

    async def find_step(self, actor: Actor, names: Sequence[str]) -> Hit | None:
        """Return the machine after the latest step that has one."""
        for done in range(len(names), 0, -1):
            found = await self._own(actor, names[done - 1])
            if found is not None and found.is_ready:
                return Hit(found.id, done)
        return None

    async def find_layers(self, actor: Actor, slug: str) -> Hit | None:
        """Return the machine with the image layers of the last build of a template."""
        found = await self._layers(actor, slug)
        return Hit(found[0].id, 0) if found else None

    async def keep_step(self, actor: Actor, sandbox_id: str, name: str) -> None:
        """Keep a machine after a step.

        Raises:
            SandyardError: it cannot be kept, for example for a limit of the plan.
        """
        if (known := await self._own(actor, name)) is not None:
            await self._drop(actor, known)
        await self._keep(actor, sandbox_id, name)

    async def keep_layers(self, actor: Actor, sandbox_id: str, slug: str) -> None:
        """Keep a machine with the image layers of a template, and remove earlier ones.

        Raises: see `keep_step`.
        """
        before = await self._layers(actor, slug)
        name = f"{layers_prefix(actor, slug)}{new_secret()[:8]}"
        await self._keep(actor, sandbox_id, name)
        for one in before:
            await self._drop(actor, one)

    async def drop_layers(self, actor: Actor, slug: str) -> None:
        """Remove the machines with the image layers of a template."""
        for one in await self._layers(actor, slug):
            await self._drop(actor, one)

    async def _keep(self, actor: Actor, sandbox_id: str, name: str) -> None:
        try:
            await self._snapshots.create(actor, sandbox_id, name, is_for_cache=True)
        except LimitReachedError:
            oldest = (await self._all(actor))[-1:]
            if not oldest:
                raise
            await self._drop(actor, *oldest)
            await self._snapshots.create(actor, sandbox_id, name, is_for_cache=True)
        await self._tidy(actor)

    async def _tidy(self, actor: Actor) -> None:
        """Remove the oldest snapshots beyond the limits, and any larger than the size limit."""
        left, since = self._size_max, self._clock.now() - _LASTS
        for number, one in enumerate(await self._all(actor)):
            is_large = one.size_bytes > self._size_max
            left -= 0 if is_large else one.size_bytes
            if is_large or left < 0 or number >= _MOST or one.created_at < since:
                await self._drop(actor, one)

    async def _drop(self, actor: Actor, snapshot: Snapshot) -> None:
        try:
            await self._snapshots.delete(actor, snapshot.id)
        except SandyardError as error:  # another build begins with it
            log.debug("cannot delete %s of the build cache yet: %s", snapshot.id, error.message)

    async def _own(self, actor: Actor, name: str) -> Snapshot | None:
        with suppress(NotFoundError):
            found = await self._snapshots.get(actor, name)
            return found if found.owner_user_id == actor.user_id else None
        return None

    async def _layers(self, actor: Actor, slug: str) -> list[Snapshot]:
        prefix = layers_prefix(actor, slug)
        return [one for one in await self._all(actor) if (one.name or "").startswith(prefix)]

    async def _all(self, actor: Actor) -> list[Snapshot]:
        """Return what is kept and ready, newest first."""
        found: list[Snapshot] = []
        after = None
        while True:
            page = await self._snapshots.page(actor, limit=_PAGE, after=after)
            found += page
            if len(page) < _PAGE:
                break
            after = (page[-1].created_at, page[-1].id)
        return [
            one
            for one in found
            if (one.name or "").startswith(CACHE_PREFIX)
            and one.is_ready
            and one.owner_user_id == actor.user_id
        ]
