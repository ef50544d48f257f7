"""Whether the installation can create sandboxes, and what is missing if not."""

import asyncio
import logging
from contextlib import suppress

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Store
from sandyard.server.core.errors import UnavailableError
from sandyard.server.service.nodes import Nodes

log = logging.getLogger(__name__)

_LOOK_S = 0.5
_FRESH_S = 2.0


class Readiness:
    """Checks the store and the nodes."""

    def __init__(self, store: Store, nodes: Nodes, clock: Clock) -> None:
        self._store = store
        self._nodes = nodes
        self._clock = clock
        self._seen_at = clock.monotonic()
        self._asking = asyncio.Lock()
        self._asked_at: float | None = None
        self._trouble = ""
        self._is_stopping = False

    def stop_serving(self) -> None:
        """Have load balancers send no more requests: this server is being stopped."""
        self._is_stopping = True

    @property
    def cannot_serve(self) -> str | None:
        """Why this server cannot serve requests, as a sentence, or None if it can: its database
        answered within the last two seconds, as `run` has found."""
        if self._is_stopping:
            return "this server is being stopped"
        if self._clock.monotonic() - self._seen_at > _FRESH_S:
            return "the database does not answer this server"
        return None

    async def run(self) -> None:
        """Keep asking the database whether it answers, until cancelled."""
        while True:
            try:
                await self._ask()
            except Exception:  # a wrong password, say: it may be put right
                log.exception("cannot use the database; trying again")
                await self._clock.sleep(_FRESH_S)
            await self._clock.sleep(_LOOK_S)

    async def _ask(self) -> str:
        """Return why the database does not answer, or nothing if it does. However many ask, one
        ping is under way: of many at once, the last would take it for silent."""
        async with self._asking:
            asked_at = self._asked_at
            if asked_at is not None and self._clock.monotonic() - asked_at < _LOOK_S / 2:
                return self._trouble
            try:
                # Later than the store's own limit, which has all others give up, too.
                async with self._clock.timeout(2 * _FRESH_S):
                    await self._store.ping()
            except (UnavailableError, TimeoutError) as error:
                self._trouble = getattr(error, "message", "the database does not answer")
            else:
                self._trouble = ""
                self._seen_at = self._clock.monotonic()
            self._asked_at = self._clock.monotonic()
            return self._trouble

    async def missing(self) -> list[str]:
        """Return what is missing, one sentence each; empty if ready.

        One node that can start machines suffices.
        """
        trouble = await self._ask()
        missing = [trouble] if trouble else []
        return missing + await self._missing_on_nodes()

    async def limited(self) -> list[str]:
        """Return features that sandboxes lack, and why one of several nodes cannot start machines,
        one sentence each."""
        limited: dict[str, None] = {}
        nodes = self._nodes.all()
        for node in nodes:
            with suppress(UnavailableError):
                report = await self._nodes.report_of(node)
                limited |= dict.fromkeys(report.limited)
                if len(nodes) > 1:
                    limited |= {f"node {node.node_id}: {one}": None for one in report.missing}
        return list(limited)

    async def _missing_on_nodes(self) -> list[str]:
        missing: list[str] = []
        for node in self._nodes.all():
            try:
                found = (await self._nodes.report_of(node)).missing
            except UnavailableError as error:
                found = (error.message,)
            if not found:
                return []
            missing += found
        return missing or ["the installation has no node"]
