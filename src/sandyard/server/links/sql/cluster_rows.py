"""Rows of nodes, invites, and the installation's own secrets."""

from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Select,
    bindparam,
    case,
    delete,
    false,
    func,
    insert,
    or_,
    select,
    tuple_,
    update,
)

from sandyard.server.core.records import JoinedNode, NodeStart
from sandyard.server.links.sql import tables as t
from sandyard.server.links.sql.prepared import Prepared
from sandyard.server.links.sql.rows import Connection, remove_some
from sandyard.server.links.sql.seal import Seal

_c = t.joined_nodes.c


class JoinedNodeTable:
    """See core.contracts.store.JoinedNodeRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, node: JoinedNode) -> None:
        """See core.contracts.store.JoinedNodeRows.add."""
        values = {name: value for name, value in vars(node).items() if name not in _TOLD_NOW}
        values |= {"boot": "", "place": ""}
        await self._connection.execute(insert(t.joined_nodes).values(values))

    async def all(self) -> list[JoinedNode]:
        """See core.contracts.store.JoinedNodeRows.all."""
        return [_node_of(row) for row in await self._connection.fetch(_ALL, {})]

    async def find(self, node_id: str) -> JoinedNode | None:
        """See core.contracts.store.JoinedNodeRows.find."""
        found = await self._connection.fetch(_FIND, {"wanted_id": node_id})
        return _node_of(found[0]) if found else None

    async def start(self, node_id: str, start: NodeStart, *, lasts: timedelta) -> int | None:
        """See core.contracts.store.JoinedNodeRows.start."""
        is_own = or_(_c.boot == start.boot, _c.place == start.place, _c.lease_until.is_(None))
        done = await self._connection.execute(
            update(t.joined_nodes)
            .where(_c.id == node_id, or_(is_own, _c.lease_until <= t.now()))
            .values(
                epoch=case((_c.boot == start.boot, _c.epoch), else_=_c.epoch + 1),
                lease_until=t.now() + lasts // _MICROSECOND,
                lost_at=None,
                **vars(start),
            )
            .returning(_c.epoch)
        )
        row = done.first()
        return None if row is None else int(row.epoch)

    async def beat(
        self, said: Collection[tuple[str, int]], *, lasts: timedelta
    ) -> frozenset[tuple[str, int]]:
        """See core.contracts.store.JoinedNodeRows.beat."""
        # The ids by themselves too: for pairs, PostgreSQL searches no index.
        current = _c.id.in_([one for one, _ in said]), tuple_(_c.id, _c.epoch).in_(list(said))
        done = await self._connection.execute(
            update(t.joined_nodes)
            .where(_c.id.in_(_in_turn(*current)))
            .values(lease_until=t.now() + lasts // _MICROSECOND, lost_at=None)
            .returning(_c.id, _c.epoch)
        )
        return frozenset((row.id, row.epoch) for row in done)

    async def have_compared(
        self,
        node_ids: Collection[str],
        *,
        by: str,
        over: str | None = None,
        lasts: timedelta,
        free_for: timedelta = timedelta(),
    ) -> frozenset[str]:
        """See core.contracts.store.JoinedNodeRows.have_compared."""
        is_to_have = _c.compared_by == (by if over is None else over)
        is_free = or_(
            false() if free_for else is_to_have,
            _c.compared_until.is_(None),
            _c.compared_until > t.now() + lasts // _MICROSECOND,  # the clock was set back
            _c.compared_until <= t.now() - free_for // _MICROSECOND,
        )
        done = await self._connection.execute(
            update(t.joined_nodes)
            .where(_c.id.in_(_in_turn(_c.id.in_(node_ids), is_free)))
            .values(compared_by=by, compared_until=t.now() + lasts // _MICROSECOND)
            .returning(_c.id)
        )
        return frozenset(done.scalars())

    async def lose(self, *, grace: timedelta) -> list[str]:
        """See core.contracts.store.JoinedNodeRows.lose."""
        is_over = _c.lease_until < _once(t.now() - grace // _MICROSECOND)
        done = await self._connection.execute(
            update(t.joined_nodes)
            .where(_c.id.in_(_in_turn(_c.lost_at.is_(None), is_over)))
            .values(lost_at=_c.lease_until)
            .returning(_c.id)
        )
        return [row.id for row in done]

    async def drain(self, node_id: str, *, is_draining: bool) -> bool:
        """See core.contracts.store.JoinedNodeRows.drain."""
        done = await self._connection.execute(
            update(t.joined_nodes).where(_c.id == node_id).values(is_draining=is_draining)
        )
        return done.rowcount > 0

    async def forget(self, node_id: str) -> bool:
        """See core.contracts.store.JoinedNodeRows.forget."""
        done = await self._connection.execute(delete(t.joined_nodes).where(_c.id == node_id))
        return done.rowcount > 0


class InviteTable:
    """See core.contracts.store.InviteRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    async def add(self, digest: str, *, lasts: timedelta) -> None:
        """See core.contracts.store.InviteRows.add."""
        c = t.invites.c
        await remove_some(self._connection, t.invites, c.expires_at < _once(t.now()))
        await self._connection.execute(
            insert(t.invites).values(digest=digest, expires_at=t.now() + lasts // _MICROSECOND)
        )

    async def take(self, digest: str) -> bool:
        """See core.contracts.store.InviteRows.take."""
        c = t.invites.c
        done = await self._connection.execute(
            delete(t.invites).where(c.digest == digest, c.expires_at > t.now())
        )
        return done.rowcount > 0


class SecretTable:
    """See core.contracts.store.SecretRows."""

    def __init__(self, connection: Connection, seal: Seal) -> None:
        self._connection = connection
        self._seal = seal

    async def find(self, name: str) -> Mapping[str, str] | None:
        """See core.contracts.store.SecretRows.find."""
        c = t.secrets.c
        found = await self._connection.execute(select(c.sealed).where(c.name == name))
        row = found.first()
        return None if row is None else self._seal.open(row.sealed)

    async def add(self, name: str, values: Mapping[str, str]) -> None:
        """See core.contracts.store.SecretRows.add."""
        await self._connection.execute(
            insert(t.secrets).values(name=name, sealed=self._seal.close(values))
        )


def _in_turn(*which: ColumnElement[bool]) -> Select[tuple[str]]:
    """Return the ids of nodes, locked in order, so that two transactions which write several nodes
    cannot deadlock."""
    return select(_c.id).where(*which).order_by(_c.id).with_for_update()


def _once(value: ColumnElement[int]) -> ColumnElement[int]:
    """Return an expression that is evaluated once: an index can be searched for its value, but not
    for a call of the clock."""
    return select(value).scalar_subquery()


_MICROSECOND = timedelta(microseconds=1)
_NOW = [
    func.coalesce(_c.lease_until > t.now(), false()).label("has_lease"),
    func.coalesce(_c.compared_until > t.now(), false()).label("is_compared"),
]
_TOLD_NOW = frozenset(one.name for one in _NOW)
_UNTOLD = frozenset({"boot", "place", "compared_until"})
_TOLD = [one for one in t.joined_nodes.columns if one.name not in _UNTOLD]


_ALL = Prepared(select(*_TOLD, *_NOW).order_by(_c.name, _c.id))
_FIND = Prepared(select(*_TOLD, *_NOW).where(_c.id == bindparam("wanted_id")))


def _node_of(row: Mapping[str, Any]) -> JoinedNode:
    return JoinedNode(**dict(row) | {name: bool(row[name]) for name in _TOLD_NOW})
