"""Whether the installation can serve, and if not, what is missing."""

from contextlib import suppress

from sandyard.server.core.contracts.store import Store
from sandyard.server.core.errors import UnavailableError
from sandyard.server.service.nodes import Nodes


class Readiness:
    """Asks the store and the nodes."""

    def __init__(self, store: Store, nodes: Nodes) -> None:
        self._store = store
        self._nodes = nodes

    async def missing(self) -> list[str]:
        """Return what is missing, a sentence each; empty if the installation is ready.

        One node that can start machines is enough.
        """
        missing = []
        try:
            await self._store.ping()
        except UnavailableError as error:
            missing.append(error.message)
        return missing + await self._missing_on_nodes()

    async def limited(self) -> list[str]:
        """Return what sandboxes have to do without, a sentence each; they start all the same."""
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
