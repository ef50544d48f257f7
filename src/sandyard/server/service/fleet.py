"""Nodes on other hosts: how they join, register, send heartbeats and leave."""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Final

from typing_extensions import override

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.cluster import (
    Beat,
    Grant,
    Hello,
    Identity,
    Joining,
    Registrar,
    Registry,
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
from sandyard.server.core.records import JoinedNode, NodeStart, Reason
from sandyard.server.core.states import Event, Status
from sandyard.server.service.sandboxes.lifecycle import Lifecycle

log = logging.getLogger(__name__)

LEASE_S: Final = 4.0
_GATHER_S: Final = 0.1
_EPOCHS: Final = 2**31
INVITE_LASTS: Final = timedelta(hours=1)
_LEASE = timedelta(seconds=LEASE_S)
_REST = frozenset({Status.DESTROYED, Status.ORPHANED, Status.FAILED, Status.PAUSED, Status.ERROR})
_HOST_OFF = Reason("host_off", "the host that the sandbox ran on is off")
_TEXT_MAX = 512
_NAME_MAX = 64
_GONE = frozenset({Status.DESTROYED, Status.DESTROYING, Status.ORPHANED, Status.FAILED})


class Fleet(Registry):
    """See core.contracts.cluster.Registry, and what an operator does with nodes. `door` is where
    nodes reach this control plane; `hear` is given every beat that counts. While it `hears_late`
    nothing is noted of a node, which says it again."""

    def __init__(
        self,
        store: Store,
        registrar: Registrar,
        lifecycle: Lifecycle,
        clock: Clock,
        *,
        door: str = "",
        hear: Callable[[str, Beat], None] = lambda _node_id, _beat: None,
        hears_late: Callable[[], bool] = lambda: False,
    ) -> None:
        self._hear = hear
        self._hears_late = hears_late
        self._beats = _Beats(store)
        self._lifecycle = lifecycle
        self._door = door
        self._store = store
        self._registrar = registrar
        self._clock = clock

    # --- what an operator does ------------------------------------------------------------

    async def invite(self) -> str:
        """Return the secret of a new invite, which is valid once and for an hour."""
        secret = new_secret()
        async with self._store.write(Turn.ALONE) as tx:
            await tx.invites.add(digest_of_key(secret), lasts=INVITE_LASTS)
        return secret

    async def nodes(self) -> list[JoinedNode]:
        """Return every node by name."""
        async with self._store.glance() as tx:
            return await tx.joined_nodes.all()

    async def known(self, reference: str) -> JoinedNode:
        """Return a node by its name or id.

        Raises:
            NotFoundError: there is no such node.
            ConflictError: several have this name.
        """
        found = [one for one in await self.nodes() if reference in (one.id, one.name)]
        if not found:
            raise NotFoundError(f"cannot find a node {reference[:80]!r}")
        if len(found) > 1:
            ids = ", ".join(one.id for one in found)
            raise ConflictError(f"cannot tell which node is meant: name it by its id, one of {ids}")
        return found[0]

    async def holdings(self, node_id: str) -> "Holdings":
        """Return what the database places on a node."""
        async with self._store.read() as tx:
            sandboxes = await tx.sandboxes.on_node(node_id, frozenset(Status) - _GONE)
            snapshots = await tx.snapshots.on_node(node_id)
        return Holdings(Counter(one.status for one in sandboxes), len(snapshots))

    async def drain(self, reference: str, *, is_draining: bool) -> JoinedNode:
        """Stop placing new sandboxes on a node, or allow it again.

        Raises:
            NotFoundError: there is no such node.
        """
        node = await self.known(reference)
        async with self._store.write(Turn.ALONE) as tx:
            await tx.joined_nodes.drain(node.id, is_draining=is_draining)
        return node

    async def forget(self, reference: str) -> JoinedNode:
        """Remove a node that is offline and has no resources.

        Raises:
            NotFoundError: there is no such node.
            ConflictError: it is online, or it has sandboxes or snapshots.
        """
        node = await self.known(reference)
        if node.has_lease:
            raise ConflictError(
                f"cannot forget the node {node.name}: it is online; drain and stop it, then try "
                "again"
            )
        async with self._store.write(Turn.ALONE) as tx:
            kept = await tx.sandboxes.on_node(node.id, frozenset(Status) - _GONE)
            snapshots = await tx.snapshots.on_node(node.id)
            if kept or snapshots:
                raise ConflictError(
                    f"cannot forget the node {node.name}: {len(kept)} sandboxes and "
                    f"{len(snapshots)} snapshots are on it; start it again, or delete them first"
                )
            await tx.joined_nodes.forget(node.id)
        return node

    async def confirm_off(self, reference: str) -> tuple[JoinedNode, int]:
        """Record the operator's confirmation that a lost node's host is off, and return how many
        sandboxes that ended.

        Its running sandboxes are in error, and its pending deletes complete. Paused sandboxes and
        snapshots are kept, and are available again if the host returns.

        Raises:
            NotFoundError: there is no such node.
            ConflictError: it is not lost.
        """
        node = await self.known(reference)
        if node.lost_at is None or node.has_lease:
            raise ConflictError(
                f"cannot confirm that the host of {node.name} is off: the node is not lost; stop "
                "it first"
            )
        async with self._store.read() as tx:
            there = await tx.sandboxes.on_node(node.id, frozenset(Status) - _REST)
        ended = 0
        for sandbox in there:
            if sandbox.status is Status.DESTROYING:
                done = await self._lifecycle.apply(sandbox, Event.GONE, ip=None, reason=None)
            else:
                done = await self._lifecycle.apply(
                    sandbox, Event.BROKE, ip=None, reason=_HOST_OFF, ended_at=node.lost_at
                )
            ended += done is not None
        return node, ended

    # --- Registry -------------------------------------------------------------------------

    @override
    async def join(self, joining: Joining) -> Identity:
        name = checked_text(joining.name, field="name")[:_NAME_MAX] or "node"
        node_id = new_uuid()
        async with self._store.write(Turn.ALONE) as tx:
            if not await tx.invites.take(digest_of_key(joining.secret)):
                raise PermissionDeniedError(
                    "cannot join with this invite: it was used, or is over an hour old; make "
                    "another with `sandyard admin node invite`"
                )
            if any(one.name == name for one in await tx.joined_nodes.all()):
                raise ConflictError(
                    f"cannot join as {name}: another node has this name; give another with "
                    "--name, or remove that one with `sandyard admin node forget`"
                )
            identity = self._registrar.identity_of(node_id, joining.application)
            await tx.joined_nodes.add(JoinedNode(node_id, name, self._clock.now()))
        log.warning("the host %s has joined as the node %s", name, node_id)
        return identity

    @override
    async def hello(self, node_id: str, hello: Hello) -> Welcome:
        self._must_be_in_time()
        _check_start(hello.start)
        identity = self._registrar.identity_of(node_id, hello.application)
        async with self._store.write(Turn.SHARED) as tx:
            epoch = await tx.joined_nodes.start(node_id, hello.start, lasts=_LEASE)
        if epoch is None:
            await self._must_be_known(node_id)
            raise ConflictError(
                "cannot start this node: another process is it, in another place, and lives; if "
                "its home was copied, let this host join by an invite of its own"
            )
        log.info(
            "the node %s has registered, at %s:%s", node_id, hello.start.host, hello.start.port
        )
        return Welcome(epoch, LEASE_S, identity, self._door)

    @override
    async def beat(self, node_id: str, beat: Beat) -> Grant:
        self._must_be_in_time()
        if not 0 <= beat.epoch < _EPOCHS:  # it is written together with what others say
            raise InvalidArgumentError("cannot record the heartbeat: there is no such epoch")
        if not await self._beats.is_current(node_id, beat.epoch):
            await self._must_be_known(node_id)
            raise ConflictError("this process is no longer the node: a later one has started")
        self._hear(node_id, beat)
        return Grant(LEASE_S, self._door, self._registrar.trust)

    def _must_be_in_time(self) -> None:
        """Refuse messages after this process was suspended: a delayed heartbeat would renew the
        lease of a node that may be lost by now."""
        if self._hears_late():
            raise UnavailableError(
                "this control plane was suspended, and has just resumed; try again"
            )

    async def _must_be_known(self, node_id: str) -> None:
        async with self._store.glance() as tx:
            if await tx.joined_nodes.find(node_id) is None:
                raise NotFoundError("cannot find this node: it was forgotten")


@dataclass(frozen=True)
class Holdings:
    """What is on a node: how many sandboxes by status, and how many snapshots."""

    sandboxes: Mapping[Status, int]
    snapshots: int


class _Beats:
    """Writes heartbeats in batches: one transaction for each would dominate the control plane's
    load."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._beats: set[tuple[str, int]] = set()
        self._written: asyncio.Future[frozenset[tuple[str, int]]] | None = None

    async def is_current(self, node_id: str, epoch: int) -> bool:
        """Renew a node's lease; return False if a later epoch of it has begun.

        Raises:
            UnavailableError: it could not be written.
        """
        if (written := self._written) is not None:
            self._beats.add((node_id, epoch))
            return (node_id, epoch) in await asyncio.shield(written)
        written = self._written = asyncio.get_running_loop().create_future()
        beats = self._beats = {(node_id, epoch)}
        try:
            await asyncio.sleep(_GATHER_S)  # of real time: it gathers what arrives concurrently
            self._written = None
            async with self._store.write(Turn.SHARED) as tx:
                current = await tx.joined_nodes.beat(beats, lasts=_LEASE)
            written.set_result(current)
        finally:
            if self._written is written:
                self._written = None
            if not written.done():
                written.set_exception(
                    UnavailableError("cannot record the heartbeat now; it is repeated")
                )
                written.exception()  # retrieved, in case nothing else waits for it
        return (node_id, epoch) in current


def _check_start(start: NodeStart) -> None:
    texts = (start.boot, start.place, start.version, start.host)
    if not 0 < start.port < 65536 or any(len(one) > _TEXT_MAX for one in texts):
        raise InvalidArgumentError("cannot register this node: its report is too long")
