"""Whether the installation can create sandboxes, and what is missing if not."""

from contextlib import suppress

from sandyard.server.core.contracts.store import Store
from sandyard.server.core.errors import UnavailableError
from sandyard.server.service.nodes import Nodes


class Readiness:
    """Checks the store and the nodes."""

    def __init__(self, store: Store, nodes: Nodes) -> None:
        self._store = store
        self._nodes = nodes

    async def missing(self) -> list[str]:
        """Return what is missing, one sentence each; empty if ready.

        One node that can start machines suffices.
        """
        missing = []
        try:
            await self._store.ping()
        except UnavailableError as error:
            missing.append(error.message)
        return missing + await self._missing_on_nodes()

    async def limited(self) -> list[str]:
        """Return features that sandboxes lack on this host, one sentence each."""
        limited: dict[str, None] = {}
        for node in self._nodes.all():
            with suppress(UnavailableError):
                limited |= dict.fromkeys((await self._nodes.report_of(node)).limited)
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
