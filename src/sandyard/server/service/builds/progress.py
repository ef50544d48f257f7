"""The row of a build that is being carried out: its lease, its phase and its log.

Only the server that holds the lease writes the row. One that finds that it has lost the lease stops
without a trace: another server carries the build out.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from typing import Final, TypeVar

from sandyard.server.core.contracts.node import version_name
from sandyard.server.core.contracts.store import Transaction, Turn
from sandyard.server.core.errors import SandyardError, UnavailableError
from sandyard.server.core.records import Build, BuildLine, BuildStatus, TemplateVersion
from sandyard.server.service.builds.builds import LIST_MAX, topic_of
from sandyard.server.service.builds.output import LINE_MAX, Masks
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.tasks import to_the_end

log = logging.getLogger(__name__)
_T = TypeVar("_T")

LEASE: Final = timedelta(seconds=30)
PATIENCE_S: Final = 300.0
_BEAT_S: Final = 2.0
_FLUSH_S: Final = 0.5
_LINES_AT_ONCE: Final = 1000
_LOGS_KEPT: Final = 20
"""Logs of ended builds that are kept of each template."""
_AGAIN_S: Final = 3.0
_ENDINGS: Final = 100


class BuildCancelled(Exception):  # noqa: N818 - no error
    """The build was cancelled, or its template was deleted."""


class LostLeaseError(Exception):
    """Another server has the build."""


class Progress:
    """One build's row and log. `log_bytes` limits the log."""

    def __init__(self, platform: Platform, build: Build, lease: str, *, log_bytes: int) -> None:
        self.build = build
        self.clock = platform.clock
        self._store = platform.store
        self._bus = platform.bus
        self._lease = lease
        self._lines: list[BuildLine] = []
        self._log_left = log_bytes
        self._flushing = asyncio.Lock()
        self._masks = Masks()

    # --- the log --------------------------------------------------------------------------

    @property
    def is_cut_off(self) -> bool:
        """Whether the log has reached its limit, and takes no more lines."""
        return self._log_left <= 0

    def mask(self, secrets: Iterable[str]) -> None:
        """Hide secrets in the log, and in the build's error, from now on."""
        self._masks = Masks(secrets)

    async def say(self, text: str) -> None:
        """Add a line to the log."""
        if self.is_cut_off:
            return
        shown = self._masks.over(text)[:LINE_MAX]
        self._log_left -= len(shown) + 32
        if self.is_cut_off:
            shown = "the log is cut off here: it is too long"
        number = self.build.lines + 1
        self.build = replace(self.build, lines=number)
        self._lines.append(BuildLine(number, self.clock.now(), self.build.phase, shown))
        if len(self._lines) >= _LINES_AT_ONCE:
            await self.flush()

    async def flush(self) -> None:
        """Write the lines that are not written yet."""
        # Whole: lines that are written, and not known to be, would be written again.
        await to_the_end(self._write_lines())

    async def _write_lines(self) -> None:
        async with self._flushing:
            lines = list(self._lines)
            if not lines:
                return
            async with self._store.write(Turn.SHARED) as tx:
                await tx.builds.append(self.build.id, lines)
                await self._saved(tx)
            del self._lines[: len(lines)]
        self._bus.hint(topic_of(self.build.id))

    async def patiently(
        self, work: Callable[[], Awaitable[_T]], *, limit_s: float = PATIENCE_S
    ) -> _T:
        """Do what may be impossible for a while, such as for lack of capacity; the log says why."""
        until, reason = self.clock.monotonic() + limit_s, ""
        while True:
            try:
                return await work()
            except UnavailableError as error:
                if self.clock.monotonic() >= until:
                    raise
                if error.message != reason:
                    reason = error.message
                    await self.say(f"waiting: {reason}")
                await self.clock.sleep(_AGAIN_S)

    # --- the row --------------------------------------------------------------------------

    async def phase(self, name: str) -> None:
        """Begin a phase, which the row and the next lines of the log name."""
        await self.save(phase=name)

    async def save(self, **changes: object) -> None:
        """Change the row, and renew the lease.

        Raises:
            LostLeaseError: another server has the build.
        """
        self.build = replace(self.build, **changes)  # type: ignore[arg-type]
        async with self._store.write(Turn.SHARED) as tx:
            await self._saved(tx)

    async def _saved(self, tx: Transaction) -> None:
        saved = await tx.builds.save(self.build, lease=self._lease, lasts=LEASE)
        if saved is None:
            raise LostLeaseError
        if saved.is_cancelled:
            self.build = replace(self.build, is_cancelled=True)

    async def keep(self) -> None:
        """Renew the lease and write the log, until the build is cancelled.

        Raises:
            BuildCancelled: it was cancelled.
            LostLeaseError: see `save`.
            UnavailableError: the store has been away for almost as long as the lease lasts.
        """
        written_at = self.clock.monotonic()
        while True:
            await self.clock.sleep(_FLUSH_S)
            now = self.clock.monotonic()
            try:
                await self.flush()
                if now - written_at >= _BEAT_S:
                    await self.save()
                    written_at = now
            except UnavailableError:
                if now - written_at > LEASE.total_seconds() - _BEAT_S:
                    raise
            if self.build.is_cancelled:
                raise BuildCancelled

    async def beat(self) -> None:
        """Renew the lease and nothing else, as long as there is one."""
        with suppress(LostLeaseError):
            while True:
                with suppress(UnavailableError):
                    await self.save()
                await self.clock.sleep(_BEAT_S)

    async def publish(self, version: TemplateVersion, tags: Iterable[str]) -> None:
        """Add the version that the build has made, and move tags to it unless a later one has them.

        Raises:
            BuildCancelled: the build was cancelled, or the template deleted.
            LostLeaseError: see `save`.
        """
        name = version_name(version.slug, version.digest)
        stages = tuple(one for one in self.build.stages if one != name)
        # With the version, so that nothing published is built once more.
        build = replace(self.build, stages=stages, status=BuildStatus.READY, phase="")
        async with self._store.write(build.org_id) as tx:
            template = await tx.templates.find(build.org_id, build.slug)
            if template is None or template.last_number < build.number:
                raise BuildCancelled  # it was deleted meanwhile
            saved = await tx.builds.save(build, lease=self._lease, lasts=LEASE)
            if saved is None:
                raise LostLeaseError
            if saved.is_cancelled:
                raise BuildCancelled
            await tx.versions.add(version)
            moved = {one: max(build.number, template.tags.get(one, 0)) for one in tags}
            await tx.templates.put(
                replace(template, tags={**template.tags, **moved}, updated_at=version.created_at)
            )
        self.build = build

    async def end(self, status: BuildStatus, error: str | None) -> None:
        """Write the end of the build, and remove what is over the limits of ended ones."""
        self.build = replace(
            self.build, status=status, error=self._masks.over(error) if error else None,
            ended_at=self.clock.now(),
            phase=self.build.phase if status is BuildStatus.FAILED else "",
            plan={},
        )  # fmt: skip
        for _ in range(_ENDINGS):
            try:
                async with self._store.write(Turn.SHARED) as tx:
                    await tx.builds.save(self.build, lease=self._lease, lasts=None)
                    await tx.builds.prune(
                        self.build.org_id, self.build.slug, keep=LIST_MAX, keep_logs=_LOGS_KEPT
                    )
                break
            except UnavailableError as failure:
                log.warning("cannot write the end of a build yet: %s", failure.message)
                await self.clock.sleep(_AGAIN_S)
        self._bus.hint(topic_of(self.build.id))
        log.info("the build %s of %s ended: %s", self.build.id, self.build.slug, status.value)

    async def release(self) -> None:
        """Give the lease back, so that a server may begin the build again at once."""
        with suppress(SandyardError, LostLeaseError):
            await self.flush()
            async with self._store.write(Turn.SHARED) as tx:
                await tx.builds.save(self.build, lease=self._lease, lasts=None)
