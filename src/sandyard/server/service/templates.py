"""The templates of the installation."""

import asyncio
from collections import Counter
from typing import Final

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import NodeControl, TemplateFact, TemplateStatus
from sandyard.server.core.errors import InvalidArgumentError, UnavailableError
from sandyard.server.service.nodes import Nodes

_READY_S: Final = 2.0


async def _templates_of(node: NodeControl) -> tuple[TemplateFact, ...] | None:
    """Return a node's templates, or None if it does not answer."""
    try:
        return await node.templates()
    except UnavailableError:
        return None


def _is_ready(fact: TemplateFact) -> bool:
    return fact.status is TemplateStatus.READY


class Templates:
    """Looks templates up."""

    def __init__(self, nodes: Nodes, clock: Clock) -> None:
        self._nodes = nodes
        self._clock = clock
        self._ready: dict[str, tuple[float, TemplateFact]] = {}

    async def all(self) -> list[TemplateFact]:
        """Return every template by slug. If nodes differ, return the most common state, preferring
        ready ones and then the smallest."""
        found, _ = await self._found()
        return found

    async def _found(self) -> tuple[list[TemplateFact], bool]:
        """Return the templates, and whether every expected node answered."""
        found: dict[str, TemplateFact] = {}
        nodes = [one for one in self._nodes.all() if self._nodes.is_there(one.node_id)]
        async with asyncio.TaskGroup() as tasks:
            asking = [tasks.create_task(_templates_of(one)) for one in nodes]
        told = [one.result() for one in asking]
        votes = Counter(
            (fact.slug, fact.defaults) for facts in told for fact in facts or () if _is_ready(fact)
        )

        def rank(fact: TemplateFact) -> tuple[bool, int, int, int, int]:
            shape = fact.defaults
            count = votes[fact.slug, shape]
            return _is_ready(fact), count, -shape.memory_mib, -shape.vcpus, -shape.disk_mib

        for facts in told:
            for fact in facts or ():
                known = found.setdefault(fact.slug, fact)
                if rank(fact) > rank(known):
                    found[fact.slug] = fact
        return [found[slug] for slug in sorted(found)], bool(nodes) and None not in told

    async def ready(self, slug: str) -> TemplateFact:
        """Return a template that is ready to use.

        Raises:
            InvalidArgumentError: there is no such template.
            UnavailableError: it is not built, or no node that may have it answers.
        """
        # Asking all nodes on other hosts would take longer than everything else together.
        # The chosen node decides in the end.
        at, fact = self._ready.get(slug, (0.0, None))
        if fact is not None and 0 <= self._clock.monotonic() - at < _READY_S:
            return fact
        every, is_whole = await self._found()
        fact = next((one for one in every if one.slug == slug), None)
        if fact is None and not is_whole:
            raise UnavailableError(
                "cannot start a sandbox now: not every node answers, and those that do know of no "
                "such template; ask again"
            )
        if fact is None:
            known = ", ".join(one.slug for one in every)
            raise InvalidArgumentError(
                f"cannot use the template {slug[:80]!r}: known are {known}", field="template"
            )
        if fact.status is not TemplateStatus.READY:
            raise UnavailableError(
                f"cannot start from the template {slug} yet: it is {fact.status}; "
                f"run `sandyard template build {slug}` on the host and ask again"
            )
        if self._nodes.are_remote:
            self._ready = {
                one.slug: (self._clock.monotonic(), one) for one in every if _is_ready(one)
            }
        return fact
