"""Whether the installation can serve, and if not, what is missing."""

from sandyard.server.core.contracts.store import Store
from sandyard.server.core.errors import UnavailableError
from sandyard.server.service.placement import Placement


class Readiness:
    """Asks the store and the nodes."""

    def __init__(self, store: Store, placement: Placement) -> None:
        self._store = store
        self._placement = placement

    async def missing(self) -> list[str]:
        """Return what is missing, a sentence each; empty if the installation is ready."""
        missing = []
        try:
            await self._store.ping()
        except UnavailableError as error:
            missing.append(error.message)
        nodes = self._placement.all()
        if not nodes:
            missing.append("the installation has no node")
        for node in nodes:
            missing += (await node.report()).missing
        return missing
