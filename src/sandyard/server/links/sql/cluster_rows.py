"""Rows of nodes, invites, and the installation's own secrets."""

from collections.abc import Collection, Mapping
from datetime import timedelta
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Label,
    Select,
    and_,
    bindparam,
    case,
    delete,
    false,
    func,
    insert,
    literal,
    or_,
    select,
    tuple_,
    type_coerce,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from typing_extensions import override

from sandyard.server.core.codec import decode, encode
from sandyard.server.core.contracts.store import (
    DutyRows,
    InviteRows,
    JoinedNodeRows,
    QuarantineRows,
    SecretRows,
)
from sandyard.server.core.egress import Policy
from sandyard.server.core.records import JoinedNode, Mount, NodeStart, Quarantined
from sandyard.server.core.shapes import Shape
from sandyard.server.links.sql import tables as t
from sandyard.server.links.sql.prepared import Prepared
from sandyard.server.links.sql.rows import LEASE_MAX_US, Connection, remove_some
from sandyard.server.links.sql.seal import Seal

_c = t.joined_nodes.c


class QuarantineTable(QuarantineRows):
    """See core.contracts.store.QuarantineRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def put(self, machine: Quarantined) -> None:
        values = vars(machine) | vars(machine.shape)
        del values["shape"]
        values["network"] = None if machine.network is None else encode(machine.network)
        values["mounts"] = encode(machine.mounts)
        kept = {"id", "found_at", "is_unwanted"}
        seen = {name: value for name, value in values.items() if name not in kept}
        c = t.quarantine.c
        # One that a sandbox had since is there for the first time.
        is_again = c.incarnation < machine.incarnation
        done = await self._connection.execute(
            update(t.quarantine)
            .where(c.id == machine.id)
            .values(
                **seen,
                found_at=case((is_again, literal(machine.found_at, t.Moment)), else_=c.found_at),
                is_unwanted=case((is_again, false()), else_=c.is_unwanted),
            )
        )
        if not done.rowcount:
            await self._connection.execute(insert(t.quarantine).values(values))

    @override
    async def all(self) -> list[Quarantined]:
        return await self._found(select(t.quarantine))

    @override
    async def on_node(self, node_id: str) -> list[Quarantined]:
        return await self._found(select(t.quarantine).where(t.quarantine.c.node_id == node_id))

    @override
    async def condemn(self, wanted_id: str) -> bool:
        c = t.quarantine.c
        done = await self._connection.execute(
            update(t.quarantine).where(c.id == wanted_id).values(is_unwanted=True)
        )
        return done.rowcount > 0

    @override
    async def remove(self, ids: Collection[str]) -> None:
        c = t.quarantine.c
        await self._connection.execute(delete(t.quarantine).where(c.id.in_(list(ids))))

    async def _found(self, query: Select[Any]) -> list[Quarantined]:
        c = t.quarantine.c
        found = await self._connection.execute(query.order_by(c.found_at, c.id))
        return [_quarantined(row) for row in found.mappings()]


def _quarantined(row: Mapping[Any, Any]) -> Quarantined:
    values = dict(row)
    shape = Shape(*(values.pop(name) for name in ("vcpus", "memory_mib", "disk_mib")))
    network, mounts = values.pop("network"), values.pop("mounts")
    return Quarantined(
        shape=shape,
        network=None if network is None else decode(Policy, network),
        mounts=decode(tuple[Mount, ...], mounts),
        **values,
    )


class JoinedNodeTable(JoinedNodeRows):
    """See core.contracts.store.JoinedNodeRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def add(self, node: JoinedNode) -> None:
        values = {name: value for name, value in vars(node).items() if name not in _TOLD_NOW}
        values |= {"boot": "", "place": ""}
        await self._connection.execute(insert(t.joined_nodes).values(values))

    @override
    async def all(self) -> list[JoinedNode]:
        return [_node_of(row) for row in await self._connection.fetch(_ALL, {})]

    @override
    async def find(self, node_id: str) -> JoinedNode | None:
        found = await self._connection.fetch(_FIND, {"wanted_id": node_id})
        return _node_of(found[0]) if found else None

    @override
    async def start(self, node_id: str, start: NodeStart, *, lasts: timedelta) -> int | None:
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

    @override
    async def beat(
        self, beats: Collection[tuple[str, int]], *, lasts: timedelta
    ) -> frozenset[tuple[str, int]]:
        # The ids by themselves too: for pairs, PostgreSQL searches no index.
        current = _c.id.in_([one for one, _ in beats]), tuple_(_c.id, _c.epoch).in_(list(beats))
        done = await self._connection.execute(
            update(t.joined_nodes)
            .where(_c.id.in_(_in_turn(*current)))
            .values(lease_until=t.now() + lasts // _MICROSECOND, lost_at=None)
            .returning(_c.id, _c.epoch)
        )
        return frozenset((row.id, row.epoch) for row in done)

    @override
    async def have_compared(
        self,
        node_ids: Collection[str],
        *,
        by: str,
        over: str | None = None,
        lasts: timedelta,
        free_for: timedelta = timedelta(),
    ) -> frozenset[str]:
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

    @override
    async def lose(self, *, grace: timedelta) -> list[str]:
        # The database's clock was set back. A node that is running renews its lease in time.
        await self._connection.execute(
            update(t.joined_nodes)
            .where(_c.lease_until > _once(t.now() + LEASE_MAX_US))
            .values(lease_until=t.now() + _TRIMMED // _MICROSECOND)
        )
        is_over = _c.lease_until < _once(t.now() - grace // _MICROSECOND)
        done = await self._connection.execute(
            update(t.joined_nodes)
            .where(_c.id.in_(_in_turn(_c.lost_at.is_(None), is_over)))
            .values(lost_at=_c.lease_until)
            .returning(_c.id)
        )
        return [row.id for row in done]

    @override
    async def drain(self, node_id: str, *, is_draining: bool) -> bool:
        done = await self._connection.execute(
            update(t.joined_nodes).where(_c.id == node_id).values(is_draining=is_draining)
        )
        return done.rowcount > 0

    @override
    async def forget(self, node_id: str) -> bool:
        done = await self._connection.execute(delete(t.joined_nodes).where(_c.id == node_id))
        return done.rowcount > 0


class DutyTable(DutyRows):
    """See core.contracts.store.DutyRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def take(self, name: str, holder: str, *, lasts: timedelta) -> bool:
        c = t.duties.c
        until = t.now() + lasts // _MICROSECOND
        # One that ends later than it could was taken before the clock was set back.
        is_free = or_(c.holder == holder, c.until <= t.now(), c.until > until)
        put = sqlite.insert if self._connection.dialect.name == "sqlite" else postgresql.insert
        done = await self._connection.execute(
            put(t.duties)
            .values(name=name, holder=holder, until=until)
            .on_conflict_do_update(
                index_elements=[c.name], set_={"holder": holder, "until": until}, where=is_free
            )
            .returning(c.name)
        )
        return done.first() is not None


class InviteTable(InviteRows):
    """See core.contracts.store.InviteRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def add(self, digest: str, *, lasts: timedelta) -> None:
        c = t.invites.c
        await remove_some(self._connection, t.invites, c.expires_at < _once(t.now()))
        await self._connection.execute(
            insert(t.invites).values(digest=digest, expires_at=t.now() + lasts // _MICROSECOND)
        )

    @override
    async def take(self, digest: str) -> bool:
        c = t.invites.c
        done = await self._connection.execute(
            delete(t.invites).where(c.digest == digest, c.expires_at > t.now())
        )
        return done.rowcount > 0


class SecretTable(SecretRows):
    """See core.contracts.store.SecretRows."""

    def __init__(self, connection: Connection, seal: Seal) -> None:
        self._connection = connection
        self._seal = seal

    @override
    async def find(self, name: str) -> Mapping[str, str] | None:
        c = t.secrets.c
        found = await self._connection.execute(select(c.sealed).where(c.name == name))
        row = found.first()
        return None if row is None else self._seal.open(row.sealed)

    @override
    async def add(self, name: str, values: Mapping[str, str]) -> None:
        await self._connection.execute(
            insert(t.secrets).values(name=name, sealed=self._seal.close(values))
        )

    @override
    async def replace(self, name: str, values: Mapping[str, str]) -> None:
        await self._connection.execute(
            update(t.secrets)
            .where(t.secrets.c.name == name)
            .values(sealed=self._seal.close(values))
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
_TRIMMED = timedelta(seconds=5)
_NOW: list[Label[Any]] = [
    func.coalesce(
        and_(_c.lease_until > t.now(), _c.lease_until <= t.now() + LEASE_MAX_US), false()
    ).label("has_lease"),
    func.coalesce(_c.compared_until > t.now(), false()).label("is_compared"),
    type_coerce(t.now(), t.Moment).label("read_at"),
]
_TOLD_NOW = frozenset(one.name for one in _NOW)
_UNTOLD = frozenset({"boot", "place", "compared_until"})
_COLUMNS = [one for one in t.joined_nodes.columns if one.name not in _UNTOLD]


_ALL = Prepared(select(*_COLUMNS, *_NOW).order_by(_c.name, _c.id))
_FIND = Prepared(select(*_COLUMNS, *_NOW).where(_c.id == bindparam("wanted_id")))


def _node_of(row: Mapping[str, Any]) -> JoinedNode:
    flags = {name: bool(row[name]) for name in ("has_lease", "is_compared")}
    return JoinedNode(**dict(row) | flags)
