"""Copies templates and versions to the nodes that lack them, so that any node can start their
sandboxes.

One server at a time looks. What it copies goes through it, from one node's tunnel to another's. A
template of the installation goes to the nodes that have not built it themselves, a version to all.
"""

import asyncio
import logging
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, TypeVar

from sandyard.server.core.contracts.node import (
    SHORT,
    MachineRef,
    NodeView,
    TemplateFact,
    TemplateStatus,
    version_name,
)
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.copies import ReadCopy, WriteCopy
from sandyard.server.core.errors import (
    DamagedError,
    DeadlineExceededError,
    NoCapacityError,
    SandyardError,
    UnavailableError,
)
from sandyard.server.core.node_ops import DropVersion
from sandyard.server.core.records import VersionKey
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.tasks import Crew

log = logging.getLogger(__name__)
_T = TypeVar("_T")

COPY: Final = "copies"
"""The topic of hints that nodes may lack a version."""
_DUTY: Final = "copies"
_DUTY_LASTS: Final = timedelta(minutes=1)
_DUTY_BEAT_S: Final = 20.0
_PIECE: Final = 256 * 1024
_LOOK_S: Final = 10.0
_LIMIT_S: Final = 1800.0
_STALL_S: Final = 30.0
_AHEAD: Final = timedelta(minutes=5)
_SOON_S, _AGAIN_S = 5.0, 300.0


@dataclass(frozen=True)
class _Failure:
    until: float
    pause_s: float


class Copies:
    """Copies between nodes; it is to be run."""

    def __init__(self, platform: Platform) -> None:
        self._server_id = platform.server_id
        self._store = platform.store
        self._bus = platform.bus
        self._clock = platform.clock
        self._nodes = platform.nodes
        self._shipped = platform.templates.shipped
        self._tunnel = platform.tunnel
        self._failed: dict[tuple[str, str, str], _Failure] = {}

    async def run(self) -> None:
        """Look forever. With a single machine there is nothing to do."""
        if not self._nodes.are_remote:
            return
        with self._bus.subscribe(COPY) as hints:
            while True:
                try:
                    await self._look()
                except SandyardError as error:
                    log.warning("cannot compare the nodes' templates: %s; retrying", error.message)
                except Exception:  # the next look may succeed
                    log.exception("cannot copy templates; retrying")
                await hints.wait(_LOOK_S)

    async def _look(self) -> None:
        if not await self._has_duty():
            return
        now = self._clock.monotonic()
        self._failed = {key: one for key, one in self._failed.items() if now < one.until + _AGAIN_S}
        async with Crew() as crew:
            crew.start(self._keep_duty(), "the duty of copying is no longer renewed")
            await self._spread_templates()
            async with self._store.read() as tx:
                versions = await tx.versions.every()
            await self._spread_versions(versions)

    async def _has_duty(self) -> bool:
        async with self._store.write(Turn.SHARED) as tx:
            return await tx.duties.take(_DUTY, self._server_id, lasts=_DUTY_LASTS)

    async def _keep_duty(self) -> None:
        while True:
            await self._clock.sleep(_DUTY_BEAT_S)
            try:
                await self._has_duty()
            except SandyardError as error:
                log.debug("cannot renew the duty of copying: %s", error.message)

    async def _views(self) -> dict[str, NodeView]:
        """Return the last reports of reachable nodes, with all of their versions."""
        views = {}
        for one in self._nodes.ids():
            if not self._nodes.is_there(one):
                continue
            known = self._nodes.last_view(one)
            if known is not None and known[1].mark:  # a heartbeat has no room for all
                with suppress(UnavailableError):
                    await self._nodes.report_of(self._nodes.get(one))
                known = self._nodes.last_view(one)
            if known is not None and not known[1].mark:
                views[one] = known[1]
        return views

    async def _spread_templates(self) -> None:
        facts_of, now = await self._shipped.by_node(), self._clock.now()
        for slug in sorted({fact.slug for facts in facts_of.values() for fact in facts}):
            facts = {
                node_id: fact
                for node_id, every in facts_of.items()
                for fact in every
                if fact.slug == slug and self._nodes.is_there(node_id)
            }
            built = {one: at for one, fact in facts.items() if (at := _built_at(fact, now))}
            if not built:
                continue
            source = max(built, key=lambda one: (built[one], one))
            for node_id, fact in facts.items():
                if _wants(fact, facts[source]) and self._nodes.takes_new(node_id):
                    await self._copy(slug, source, node_id, digest=facts[source].digest)

    async def _spread_versions(self, versions: Sequence[VersionKey]) -> None:
        """Copy versions to the nodes that lack them, the oldest first."""
        views = await self._views()
        wanted = {one.digest[:SHORT] for one in versions}
        lacking: dict[str, list[str]] = {}
        having: dict[str, list[str]] = {}
        for node_id, view in views.items():
            # It needs a template of the installation, whose kernel it boots.
            if view.templates and self._nodes.takes_new(node_id):
                for digest in wanted - view.versions:
                    lacking.setdefault(digest, []).append(node_id)
            await asyncio.sleep(0)  # there may be thousands of each
        for node_id, view in views.items():
            for digest in view.versions & lacking.keys():
                having.setdefault(digest, []).append(node_id)
            await asyncio.sleep(0)
        for version in versions:
            digest = version.digest[:SHORT]
            if digest in lacking and digest in having:
                try:
                    await self._spread_version(version, having[digest], lacking[digest])
                except SandyardError as error:
                    log.warning("cannot copy a version: %s; retrying", error.message)

    async def _spread_version(
        self, version: VersionKey, having: Sequence[str], lacking: Sequence[str]
    ) -> None:
        name = version_name(version.slug, version.digest)
        for node_id in lacking:
            for source in having:
                if await self._copy(name, source, node_id):
                    break
            async with self._store.read() as tx:
                is_kept = await tx.versions.is_kept(version)
            if not is_kept:  # deleted meanwhile, and perhaps removed from all nodes that had it
                await self._drop(node_id, name)
                return

    async def _drop(self, node_id: str, name: str) -> None:
        if self._nodes.has(node_id):
            await self._nodes.get(node_id).do(DropVersion(name))

    async def _copy(
        self, name: str, source: str, target: str, *, digest: str | None = None
    ) -> bool:
        """Copy a template or version; return whether that succeeded. `digest` is that of the
        template's image."""
        now = self._clock.monotonic()
        keys = ((source, target, name), (source, target, ""))
        failures = [self._failed[key] for key in keys if key in self._failed]
        if any(now < one.until for one in failures):
            return False
        try:
            async with self._clock.timeout(_LIMIT_S):
                size = await self._carry(name, source, target, digest)
        except (SandyardError, TimeoutError) as error:
            is_slow = isinstance(error, TimeoutError | DeadlineExceededError)
            # Whatever else they are to exchange would wait as long.
            key = "" if is_slow or isinstance(error, UnavailableError) else name
            pause_s = _AGAIN_S
            if isinstance(error, UnavailableError) and not (
                is_slow or isinstance(error, NoCapacityError)
            ):  # one of them was killed or restarted, and may be back soon
                before = self._failed.get((source, target, key))
                pause_s = _SOON_S if before is None else min(2 * before.pause_s, _AGAIN_S)
            self._failed[source, target, key] = _Failure(now + pause_s, pause_s)
            why = error.message if isinstance(error, SandyardError) else "it takes too long"
            log.warning(
                "cannot copy %s from the node %s to %s: %s; retrying in %g s",
                name, source, target, why, pause_s,
            )  # fmt: skip
            return False
        for succeeded in keys:
            self._failed.pop(succeeded, None)
        if size is not None:
            log.info(
                "copied %s from the node %s to %s: %.0f MiB in %.1f s",
                name, source, target, size / 2**20, self._clock.monotonic() - now,
            )  # fmt: skip
        with suppress(UnavailableError):  # it says so in its next report
            await self._nodes.report_of(self._nodes.get(target))
        return True

    async def _carry(self, name: str, source: str, target: str, digest: str | None) -> int | None:
        """Carry the files over, and return their size; None if the target has them."""
        async with self._tunnel.open(MachineRef(source, "", 0), ReadCopy(name)) as read:
            copy = read.answer
            # What is written is what was meant to be, whatever the source says.
            if copy.name != name or copy.digest != (digest or ""):
                raise DamagedError(f"the node has another {name} than it reported")
            async with self._tunnel.open(MachineRef(target, "", 0), WriteCopy(copy)) as written:
                if not written.answer.is_wanted:
                    return None
                left = copy.size_bytes
                while left > 0 and (data := await self._soon(read.stream.read(min(_PIECE, left)))):
                    left -= len(data)
                    await self._soon(written.stream.write(data))
                await written.stream.write_eof()
                while await written.stream.read(_PIECE):
                    pass
        return copy.size_bytes

    async def _soon(self, work: Awaitable[_T]) -> _T:
        """Raise TimeoutError if the other end stalls."""
        async with self._clock.timeout(_STALL_S):
            return await work


def _built_at(fact: TemplateFact, now: datetime) -> datetime | None:
    """Return when a node built a template itself; a time that is to come is none."""
    if fact.status is not TemplateStatus.READY or fact.is_copy or fact.created_at is None:
        return None
    return fact.created_at if fact.created_at < now + _AHEAD else None


def _wants(fact: TemplateFact, built: TemplateFact) -> bool:
    """Tell whether a node with `fact` is to receive what another one built."""
    if fact.status is TemplateStatus.READY:
        is_older = fact.created_at is None or built.created_at is None
        is_older = is_older or fact.created_at < built.created_at  # type: ignore[operator]
        return fact.is_copy and fact.digest != built.digest and is_older
    return fact.status is not TemplateStatus.BUILDING
