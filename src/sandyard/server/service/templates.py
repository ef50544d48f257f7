"""Templates as the installation has them."""

from sandyard.server.core.contracts.node import TemplateFact
from sandyard.server.service.placement import Placement


class Templates:
    """What can be started."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement

    async def all(self) -> list[TemplateFact]:
        """Return every template by slug; one that several nodes have is told of once."""
        found: dict[str, TemplateFact] = {}
        for node in self._placement.all():
            for fact in await node.templates():
                found.setdefault(fact.slug, fact)
        return [found[slug] for slug in sorted(found)]
