"""The nodes on other hosts: how they join, say that they are there, and are given up."""

import logging
from collections.abc import Callable
from datetime import timedelta
from typing import Final

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.cluster import (
    Beat,
    Grant,
    Hello,
    Identity,
    Joining,
    Registrar,
    Welcome,
)
from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.errors import (
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    UnavailableError,
)
from sandyard.server.core.ids import checked_text, digest_of_key, new_secret, new_uuid
from sandyard.server.core.records import JoinedNode, NodeStart
from sandyard.server.core.states import Status

log = logging.getLogger(__name__)

LEASE_S: Final = 4.0
INVITE_LASTS: Final = timedelta(hours=1)
_LEASE = timedelta(seconds=LEASE_S)
_GRACE = timedelta(seconds=0.5)
_LOOK_S = 0.4
_CALM_S = 5.0
_STILL_S = 2.0
_TEXT_MAX = 512
_NAME_MAX = 64
_GONE = frozenset({Status.DESTROYED, Status.DESTROYING, Status.ORPHANED, Status.FAILED})


class Fleet:
    """See core.contracts.cluster.Registry, and what an operator does with nodes. `door` is where
    nodes reach this control plane."""

    def __init__(self, store: Store, registrar: Registrar, clock: Clock, *, door: str = "") -> None:
        self._door = door
        self._store = store
        self._registrar = registrar
        self._clock = clock

    # --- what an operator does ------------------------------------------------------------

    async def invite(self) -> str:
        """Return the secret of a fresh invite: good once, for an hour."""
        secret = new_secret()
        async with self._store.write(Turn.ALONE) as tx:
            await tx.invites.add(digest_of_key(secret), lasts=INVITE_LASTS)
        return secret

    async def nodes(self) -> list[JoinedNode]:
        """Return every node by name."""
        async with self._store.read() as tx:
            return await tx.joined_nodes.all()

    async def drain(self, reference: str, *, is_draining: bool) -> JoinedNode:
        """Have nothing new placed on a node, or have it placed there again.

        Raises:
            NotFoundError: there is no such node.
        """
        node = await self._known(reference)
        async with self._store.write(Turn.ALONE) as tx:
            await tx.joined_nodes.drain(node.id, is_draining=is_draining)
        return node

    async def forget(self, reference: str) -> JoinedNode:
        """Remove a node that is not there any more, and has nothing.

        Raises:
            NotFoundError: there is no such node.
            ConflictError: it is there, or sandboxes are on it.
        """
        node = await self._known(reference)
        if node.has_lease:
            raise ConflictError(
                f"cannot forget the node {node.name}: it is there; drain it, stop it, and ask again"
            )
        async with self._store.write(Turn.ALONE) as tx:
            kept = await tx.sandboxes.on_node(node.id, frozenset(Status) - _GONE)
            snapshots = await tx.snapshots.on_node(node.id)
            if kept or snapshots:
                raise ConflictError(
                    f"cannot forget the node {node.name}: {len(kept)} sandboxes and "
                    f"{len(snapshots)} snapshots are on it; have it back, or delete them first"
                )
            await tx.joined_nodes.forget(node.id)
        return node

    async def _known(self, reference: str) -> JoinedNode:
        found = [one for one in await self.nodes() if reference in (one.id, one.name)]
        if not found:
            raise NotFoundError(f"cannot find a node {reference[:80]!r}")
        if len(found) > 1:
            ids = ", ".join(one.id for one in found)
            raise ConflictError(f"cannot tell which node is meant: name it by its id, one of {ids}")
        return found[0]

    # --- Registry -------------------------------------------------------------------------

    async def join(self, joining: Joining) -> Identity:
        """See core.contracts.cluster.Registry.join."""
        name = checked_text(joining.name, field="name")[:_NAME_MAX] or "node"
        node_id = new_uuid()
        async with self._store.write(Turn.BESIDE) as tx:
            if not await tx.invites.take(digest_of_key(joining.secret)):
                raise PermissionDeniedError(
                    "cannot join with this invite: it was used, or is over an hour old; make "
                    "another with `sandyard admin node invite`"
                )
            identity = self._registrar.identity_of(node_id, joining.application)
            await tx.joined_nodes.add(JoinedNode(node_id, name, self._clock.now()))
        log.warning("the host %s has joined as the node %s", name, node_id)
        return identity

    async def hello(self, node_id: str, hello: Hello) -> Welcome:
        """See core.contracts.cluster.Registry.hello."""
        _check_start(hello.start)
        identity = self._registrar.identity_of(node_id, hello.application)
        async with self._store.write(Turn.BESIDE) as tx:
            epoch = await tx.joined_nodes.start(node_id, hello.start, lasts=_LEASE)
        if epoch is None:
            await self._must_be_known(node_id)
            raise ConflictError(
                "cannot start this node: another process is it, in another place, and lives; if "
                "its home was copied, let this host join by an invite of its own"
            )
        log.info("the node %s is there, at %s:%s", node_id, hello.start.host, hello.start.port)
        return Welcome(epoch, LEASE_S, identity, self._door)

    async def beat(self, node_id: str, beat: Beat) -> Grant:
        """See core.contracts.cluster.Registry.beat."""
        async with self._store.write(Turn.BESIDE) as tx:
            is_current = await tx.joined_nodes.beat(node_id, beat.epoch, lasts=_LEASE)
        if not is_current:
            await self._must_be_known(node_id)
            raise ConflictError("cannot go on as this node: a later process of it has started")
        return Grant(LEASE_S, self._door)

    async def _must_be_known(self, node_id: str) -> None:
        async with self._store.read() as tx:
            if await tx.joined_nodes.find(node_id) is None:
                raise NotFoundError("cannot find this node: it was forgotten")


def _check_start(start: NodeStart) -> None:
    texts = (start.boot, start.place, start.version, start.host)
    if not 0 < start.port < 65536 or any(len(one) > _TEXT_MAX for one in texts):
        raise InvalidArgumentError("cannot start this node: what it says of itself is too much")


class Roster:
    """The nodes as they were a moment ago. Run it, and refresh it once before.

    `can_hear` tells whether NATS answers; `elapsed` is a time that goes on while this host does not
    run, in seconds.
    """

    def __init__(
        self,
        store: Store,
        clock: Clock,
        *,
        can_hear: Callable[[], bool],
        elapsed: Callable[[], float] | None = None,
    ) -> None:
        self._store = store
        self._clock = clock
        self._can_hear = can_hear
        self._elapsed = elapsed or clock.monotonic
        self._calm_since: float | None = None
        self._looked_at = 0.0
        self.nodes: dict[str, JoinedNode] = {}

    async def refresh(self) -> None:
        """Read the nodes.

        Raises:
            UnavailableError: the store does not answer.
        """
        async with self._store.read() as tx:
            self.nodes = {one.id: one for one in await tx.joined_nodes.all()}

    async def run(self) -> None:
        """Keep them fresh, and give up whoever's lease has ended.

        Only after a while in which database and NATS both answered: where either was away, no node
        could say that it is there, and that is nobody's end.
        """
        while True:
            began = self._elapsed()
            try:
                await self.refresh()
                await self._lose(began)
            except UnavailableError:
                self._calm_since = None
            except Exception:  # looked after at the next look
                log.exception("nodes could not be looked after")
            await self._clock.sleep(_LOOK_S)

    async def _lose(self, began: float) -> None:
        """Give up whoever is to be, in a look that `began` just now."""
        now = self._elapsed()
        # Where a look took long, the database or this process stood still.
        if not self._can_hear() or now - began > _STILL_S or now - self._looked_at > _STILL_S:
            self._calm_since = None
        self._looked_at = now
        if self._calm_since is None:
            self._calm_since = now
        is_ending = [
            one for one in self.nodes.values() if one.lease_until and not one.has_lease
            and one.lost_at is None
        ]  # fmt: skip
        if not is_ending or now - self._calm_since < _CALM_S:
            return
        async with self._store.write(Turn.BESIDE) as tx:
            if self._elapsed() - now > _STILL_S:
                return
            lost = await tx.joined_nodes.lose(grace=_GRACE)
        for node_id in lost:
            log.error("the node %s is lost: it has not been heard of", node_id)

    def is_lost(self, node_id: str) -> bool:
        """Tell whether a node was given up, and has not come back."""
        node = self.nodes.get(node_id)
        return node is not None and node.lost_at is not None

    def takes_new(self, node_id: str) -> bool:
        """Tell whether new sandboxes may come to a node."""
        node = self.nodes.get(node_id)
        return node is not None and node.has_lease and not node.is_draining
