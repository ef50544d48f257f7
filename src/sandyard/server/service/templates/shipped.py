"""The templates of the installation, as its nodes know them."""

import asyncio
from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Final

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import NodeControl, TemplateFact, TemplateStatus
from sandyard.server.core.errors import ConflictError, InvalidArgumentError, UnavailableError
from sandyard.server.core.node_ops import ListTemplates
from sandyard.server.service.nodes import Nodes

_FRESH_S: Final = 2.0


@dataclass(frozen=True)
class _Picture:
    """The templates as of a moment in monotonic time. It `is_whole` if every node answered that is
    expected to."""

    at: float
    facts: tuple[TemplateFact, ...]
    is_whole: bool


def _is_ready(fact: TemplateFact) -> bool:
    return fact.status is TemplateStatus.READY


class ShippedTemplates:
    """Looks templates up. Of a node that does not answer, the last known ones count."""

    def __init__(self, nodes: Nodes, clock: Clock) -> None:
        self._nodes = nodes
        self._clock = clock
        self._facts: dict[str, tuple[TemplateFact, ...]] = {}
        self._picture: _Picture | None = None
        self._asking = asyncio.Lock()

    async def all(self) -> list[TemplateFact]:
        """Return every template by slug. If nodes differ, return the most common state, preferring
        ready ones and then the smallest.

        Raises:
            UnavailableError: no template is known, and not every node answers.
        """
        picture = await self._current()
        if not picture.facts and not picture.is_whole and self._nodes.ids():
            raise UnavailableError("cannot list the templates now: no node answers; try again")
        return list(picture.facts)

    async def _current(self) -> _Picture:
        """Return the templates as of now, or as of up to two seconds ago with remote nodes: to ask
        all of them for each create would take longer than everything else together, and the chosen
        node decides in the end."""
        async with self._asking:  # who waits here finds the answer that another has asked for
            known = self._picture
            is_fresh = known is not None and 0 <= self._clock.monotonic() - known.at < _FRESH_S
            if known is None or not is_fresh or not self._nodes.are_remote:
                known = self._picture = await self._asked()
            return known

    async def _asked(self) -> _Picture:
        every = {one.node_id: one for one in self._nodes.all()}
        expected = [one for one in every.values() if self._nodes.is_there(one.node_id)]
        async with asyncio.TaskGroup() as tasks:
            asking = {one.node_id: tasks.create_task(_templates_of(one)) for one in expected}
        answers = {
            one: facts for one, task in asking.items() if (facts := task.result()) is not None
        }
        last = {one: facts for one, facts in self._facts.items() if one in every}
        self._facts = last | answers
        return _Picture(
            self._clock.monotonic(),
            _elected(self._facts.values()),
            is_whole=bool(expected) and len(answers) == len(expected),
        )

    async def last(self, slug: str) -> TemplateFact | None:
        """Return a template as it was when templates were last looked up."""
        picture = self._picture or await self._current()
        return next((one for one in picture.facts if one.slug == slug), None)

    async def by_node(self) -> dict[str, tuple[TemplateFact, ...]]:
        """Return the templates of each node that has answered, by its id."""
        await self._current()
        return dict(self._facts)

    async def known(self) -> tuple[TemplateFact, ...]:
        """Return the templates that are known now, hidden ones as well."""
        return (await self._current()).facts

    async def ready(self, slug: str, *, others: Iterable[str] = ()) -> TemplateFact:
        """Return a template that is ready to use. `others` are slugs that exist besides.

        Raises:
            InvalidArgumentError: there is no such template.
            ConflictError: it is not built.
            UnavailableError: it is being built, or no node that may have it answers.
        """
        picture = await self._current()
        fact = next((one for one in picture.facts if one.slug == slug), None)
        if fact is None and not picture.is_whole:
            raise UnavailableError(
                "cannot start a sandbox now: not every node answers, and those that do know of no "
                "such template; ask again"
            )
        if fact is None:
            shown = [one.slug for one in picture.facts if not one.is_hidden]
            known = ", ".join([*shown, *others])
            raise InvalidArgumentError(
                f"cannot use the template {slug[:80]!r}: known are {known}",
                field="template",
                reason="no_template",
            )
        if fact.status is TemplateStatus.BUILDING:
            raise UnavailableError(
                f"cannot start from the template {slug} yet: it is being built; ask again"
            )
        if fact.status is not TemplateStatus.READY and not picture.is_whole:
            raise UnavailableError(
                f"cannot start from the template {slug} now: not every node answers, and those "
                "that do have not built it; ask again"
            )
        if fact.status is not TemplateStatus.READY:
            what = "its build failed" if fact.status is TemplateStatus.FAILED else "it is not built"
            raise ConflictError(
                f"cannot start from the template {slug}: {what}; an operator runs `sandyard "
                f"template build {slug}` on the host",
                field="template",
                reason="template_not_built",
            )
        return fact


async def _templates_of(node: NodeControl) -> tuple[TemplateFact, ...] | None:
    """Return a node's templates, or None if it does not answer."""
    try:
        facts = await node.do(ListTemplates())
    except UnavailableError:
        return None
    # A word of a newer node: in any case it is not ready.
    return tuple(
        replace(one, status=TemplateStatus.PENDING) if one.status is TemplateStatus.UNKNOWN else one
        for one in facts
    )


def _elected(answers: Collection[tuple[TemplateFact, ...]]) -> tuple[TemplateFact, ...]:
    """Return each template of several nodes once; see `ShippedTemplates.all`."""
    votes = Counter(
        (fact.slug, fact.defaults) for facts in answers for fact in facts if _is_ready(fact)
    )

    def rank(fact: TemplateFact) -> tuple[bool, int, int, int, int]:
        shape = fact.defaults
        count = votes[fact.slug, shape]
        return _is_ready(fact), count, -shape.memory_mib, -shape.vcpus, -shape.disk_mib

    found: dict[str, TemplateFact] = {}
    for fact in (fact for facts in answers for fact in facts):
        known = found.setdefault(fact.slug, fact)
        if rank(fact) > rank(known):
            found[fact.slug] = fact
    return tuple(found[slug] for slug in sorted(found))
