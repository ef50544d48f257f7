"""The owners of all sandboxes on a node."""

from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from sandyard.server.core.contracts.node import Phase
from sandyard.server.core.errors import ConflictError
from sandyard.server.node.host.ledger import Ledger
from sandyard.server.node.machines.phases import Ask
from sandyard.server.node.owner import Owner, nothing_here
from sandyard.server.tasks import Crew

_REMOVED_MAX = 4096


class Owners:
    """The owners by sandbox. One exists for as long as it has a machine, a job or a request."""

    def __init__(self, crew: Crew, ledger: Ledger, on_change: Callable[[], None]) -> None:
        self._crew = crew
        self._ledger = ledger
        self._on_change = on_change
        self._owners: dict[str, Owner] = {}
        self._users: dict[Owner, int] = {}
        # Of sandboxes that have no owner any more: the incarnation that was removed last, and the
        # latest version. A request that comes after its own removal is refused.
        self._removed: OrderedDict[str, tuple[int, int]] = OrderedDict()

    def ids(self) -> list[str]:
        """Return the ids of all sandboxes."""
        return list(self._owners)

    def all(self) -> list[Owner]:
        """Return every owner."""
        return list(self._owners.values())

    def running(self) -> list[Owner]:
        """Return the owners of machines that run, or are held, while no job is at work."""
        return [
            one
            for one in self._owners.values()
            if one.phase in (Phase.RUNNING, Phase.HELD) and not one.is_busy and one.resident.is_up
        ]

    def find(self, sandbox_id: str) -> Owner:
        """Return the owner of a machine.

        Raises:
            NotFoundError: there is none.
        """
        owner = self._owners.get(sandbox_id)
        if owner is None or owner.phase is None:
            raise nothing_here(sandbox_id)
        return owner

    def reached(self, sandbox_id: str, incarnation: int) -> Owner:
        """Return the owner of a machine whose agent may be asked.

        Raises:
            NotFoundError: there is no such incarnation.
            ConflictError: it does not run.
        """
        owner = self.find(sandbox_id)
        if owner.incarnation > incarnation:
            raise nothing_here(sandbox_id)
        if owner.is_starting:
            raise ConflictError(f"cannot reach {sandbox_id}: it is being started")
        owner.step(Ask.OPEN, incarnation)
        return owner

    @contextmanager
    def lent(self, sandbox_id: str) -> Iterator[Owner]:
        """Lend the owner of a sandbox to a request."""
        owner = self._owners.get(sandbox_id)
        if owner is None:
            owner = self._new(sandbox_id)
        self._users[owner] = self._users.get(owner, 0) + 1
        try:
            yield owner
        finally:
            self._users[owner] -= 1
            self._drop_if_unused(owner)

    def _new(self, sandbox_id: str) -> Owner:
        removed, version = self._removed.pop(sandbox_id, (0, 0))
        owner = self._owners[sandbox_id] = Owner(
            sandbox_id,
            self._crew,
            removed=removed,
            version=version,
            on_idle=self._drop_if_unused,
            on_machine=self._ledger.enter,
            on_change=self._on_change,
        )
        self._ledger.enter(owner)
        return owner

    def _drop_if_unused(self, owner: Owner) -> None:
        if self._users.get(owner) == 0:
            del self._users[owner]
        if owner in self._users or not owner.is_empty:
            return
        if self._owners.pop(owner.sandbox_id, None) is not None:
            self._ledger.leave(owner)
            if owner.removed or owner.version:
                self._removed[owner.sandbox_id] = (owner.removed, owner.version)
            while len(self._removed) > _REMOVED_MAX:
                self._removed.popitem(last=False)
