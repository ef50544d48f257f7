"""Reads the journals of sandboxes with network rules: what was refused for the first time in an
hour is a line of the activity feed, and the use of a secret is noted."""

import asyncio
import logging
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta

from sandyard.server.core.contracts.node import Connection
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.errors import NotFoundError, SandyardError
from sandyard.server.core.node_ops import ReadJournal
from sandyard.server.core.records import Activity, ActivityQuery, Ruled
from sandyard.server.service.lines import line
from sandyard.server.service.sandboxes.enforcing import MAY_RUN
from sandyard.server.service.sandboxes.platform import Platform

log = logging.getLogger(__name__)

_PERIOD_S = 3.0
_DUTY, _DUTY_LASTS = "egress journals", timedelta(seconds=30)
_QUIET_S = 3600.0
_TOLD_MAX = 100
"""How many names of one sandbox are reported in an hour: a guest can make up any number."""
_BACK_S = 60.0
_NODE_S = 5.0
_REFUSED = "sandbox.network_refused"


class Journals:
    """Run `run` as a task for as long as the server works; with several hosts, one server at a
    time does the work."""

    def __init__(self, platform: Platform) -> None:
        self._store = platform.store
        self._nodes = platform.nodes
        self._clock = platform.clock
        self._server_id = platform.server_id
        self._read: dict[str, float] = {}
        self._noted: dict[str, dict[str, float]] = {}
        self._finished: set[str] = set()
        """Sandboxes that do not run, and whose journals have been read to their ends."""

    async def run(self) -> None:
        """Read forever."""
        while True:
            await self._clock.sleep(_PERIOD_S)
            try:
                await self.look()
            except SandyardError as error:
                log.warning("cannot read the journals of connections: %s; retrying", error.message)
            except Exception:  # the next look may succeed
                log.exception("cannot read the journals of connections; retrying")

    async def look(self) -> None:
        """Read what is new in all journals.

        Raises:
            SandyardError: the store does not answer.
        """
        if self._nodes.are_remote:
            async with self._store.write(Turn.SHARED) as tx:
                if not await tx.duties.take(_DUTY, self._server_id, lasts=_DUTY_LASTS):
                    return
        async with self._store.read() as tx:
            found = await tx.sandboxes.ruled()
        known = {one.id for one in found}
        for state in (self._read, self._noted):
            for gone in state.keys() - known:
                del state[gone]
        resting = {one.id for one in found if one.status not in MAY_RUN}
        self._finished &= resting
        by_node: dict[str, list[Ruled]] = {}
        for one in found:
            is_there = self._nodes.has(one.node_id) and not self._nodes.is_lost(one.node_id)
            if is_there and one.id not in self._finished:
                by_node.setdefault(one.node_id, []).append(one)
        async with asyncio.TaskGroup() as tasks:
            for node_id, each in by_node.items():
                tasks.create_task(self._look_at(node_id, each))

    async def _look_at(self, node_id: str, sandboxes: Sequence[Ruled]) -> None:
        """Read the journals on one node, as long as it answers."""
        node = self._nodes.get(node_id)
        for sandbox in sandboxes:
            if sandbox.id not in self._read:
                await self._begin(sandbox)
            try:
                async with self._clock.timeout(_NODE_S):
                    lines = await node.do(ReadJournal(sandbox.id, since=self._read[sandbox.id]))
            except NotFoundError:
                continue
            except (SandyardError, TimeoutError) as error:
                log.debug("cannot read journals of connections on %s: %s", node_id, error)
                return
            if lines:
                await self._take(sandbox, lines)
            elif sandbox.status not in MAY_RUN:
                self._finished.add(sandbox.id)

    async def _begin(self, sandbox: Ruled) -> None:
        """Begin with a sandbox where an earlier server may have ended."""
        now = self._clock.now()
        query = ActivityQuery(
            sandbox.org_id,
            limit=_TOLD_MAX,
            matches={"event_type": _REFUSED, "sandbox_id": sandbox.id},
            since=now - timedelta(seconds=_QUIET_S),
        )
        async with self._store.read() as tx:
            noted = await tx.activity.page(query)
        self._noted[sandbox.id] = {
            str(one.attributes.get("name")): one.created_at.timestamp() for one in noted
        }
        self._read[sandbox.id] = now.timestamp() - _BACK_S

    async def _take(self, sandbox: Ruled, lines: Sequence[Connection]) -> None:
        activity = self._refusals(sandbox, lines)
        used = {secret: one.time for one in lines for secret in one.secrets}
        if activity or used:
            async with self._store.write(sandbox.org_id) as tx:
                for each in activity:
                    await tx.activity.append(each)
                for secret, at in used.items():
                    await tx.org_secrets.used(
                        sandbox.org_id, secret, at=datetime.fromtimestamp(at, UTC)
                    )
        self._read[sandbox.id] = lines[-1].time

    def _refusals(self, sandbox: Ruled, lines: Sequence[Connection]) -> list[Activity]:
        noted, found = self._noted.setdefault(sandbox.id, {}), []
        for one in lines:
            name = one.name or one.address
            if one.verdict != "refused" or not name:
                continue
            for old in [key for key, at in noted.items() if at <= one.time - _QUIET_S]:
                del noted[old]
            if name in noted or len(noted) >= _TOLD_MAX:
                continue
            noted[name] = one.time
            found.append(
                line(
                    _REFUSED,
                    "Connection refused by network rules",
                    org_id=sandbox.org_id,
                    actor=None,
                    resource_id=sandbox.id,
                    sandbox_id=sandbox.id,
                    at=datetime.fromtimestamp(one.time, UTC),
                    summary=f"{name}: {one.rule}",
                    severity="warning",
                    attributes={"name": name, "rule": one.rule, "port": one.port},
                )
            )
        return found
