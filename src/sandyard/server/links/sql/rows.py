"""Statements, and the conversion of rows to records. See core.contracts for the behaviour of each
method."""

import functools
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields, replace
from datetime import datetime, timedelta
from typing import Any, Final, Protocol

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    CursorResult,
    Dialect,
    Executable,
    Integer,
    ScalarSelect,
    Select,
    String,
    Table,
    Text,
    and_,
    bindparam,
    case,
    cast,
    delete,
    exists,
    func,
    insert,
    not_,
    or_,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import IntegrityError
from typing_extensions import override

from sandyard.server.core.codec import decode, encode
from sandyard.server.core.contracts.store import (
    NO_EFFECTS,
    ActivityRows,
    Effects,
    Hold,
    LeaseRows,
    NodeRows,
    RequestRows,
    SandboxRows,
    SnapshotRows,
    TicketRows,
)
from sandyard.server.core.egress import NO_RULES, Policy
from sandyard.server.core.errors import AlreadyExistsError, InternalError, UnavailableError
from sandyard.server.core.records import (
    Activity,
    ActivityQuery,
    Claim,
    Kept,
    KeyedRequest,
    Mark,
    Mount,
    NodeSeen,
    Reason,
    RequestKey,
    Ruled,
    Sandbox,
    SandboxQuery,
    Snapshot,
    Standing,
    Ticket,
)
from sandyard.server.core.shapes import Shape
from sandyard.server.core.states import ENDING, HIDDEN, Status
from sandyard.server.links.sql import tables as t
from sandyard.server.links.sql.effects import APPEND, as_one, of_effects, of_line
from sandyard.server.links.sql.prepared import Prepared, Values
from sandyard.server.links.sql.seal import Seal

# Fields that the database keeps otherwise than by their own name and kind; what is left is kept as
# it is, so that a field is added to the record and to the table alone.
_OTHERWISE = frozenset(
    {
        "status", "shape", "env", "reason", "mounts", "network", "owner_display_name",
        "owner_email",
    }
)  # fmt: skip
_TUPLES = ("tags", "authorized_keys", "ssh_key_ids")
_SAME = tuple(one.name for one in fields(Sandbox) if one.name not in _OTHERWISE)
_USED = ("last_activity_at", "last_activity_kind")
_FORGET_MAX = 1000
_COMING = ("pending", "creating", "resuming")


class Connection(Protocol):
    """A connection to either database, as the rows use it."""

    dialect: Dialect
    """The kind of database."""

    async def execute(
        self, statement: Executable, parameters: Sequence[Mapping[str, object]] | None = None
    ) -> CursorResult[Any]:
        """Run one statement."""
        ...

    async def fetch(self, statement: Prepared, values: Values) -> list[dict[str, Any]]:
        """Run a prepared statement and return its rows."""
        ...

    async def run(self, statement: Prepared, values: Values) -> int:
        """Run a prepared statement and return how many rows it changed."""
        ...


class SandboxTable(SandboxRows):
    """See core.contracts.store.SandboxRows."""

    def __init__(self, connection: Connection, seal: Seal) -> None:
        self._connection = connection
        self._seal = seal

    @override
    async def insert(
        self, sandbox: Sandbox, *, hold: Hold | None = None, effects: Effects = NO_EFFECTS
    ) -> Sandbox:
        values = self._values(sandbox) | _held(hold)
        [owner] = await self._write(sandbox, _INSERT, values, effects)
        if sandbox.tags:
            await self._add_tags(sandbox)
        if sandbox.mounts:
            mounted = {one.workspace_id for one in sandbox.mounts}
            await self._connection.execute(
                insert(t.sandbox_mounts),
                [{"sandbox_id": sandbox.id, "workspace_id": one} for one in sorted(mounted)],
            )
        return replace(sandbox, **owner)

    @override
    async def find(self, sandbox_id: str) -> Sandbox | None:
        found = await self._connection.fetch(_FIND, {"wanted_id": sandbox_id})
        return self._sandbox(found[0]) if found else None

    @override
    async def find_named(self, org_id: str, name: str) -> Sandbox | None:
        found = await self._connection.fetch(
            _FIND_NAMED, {"wanted_org": org_id, "wanted_name": name}
        )
        return self._sandbox(found[0]) if found else None

    @override
    async def named(self, name: str, *, limit: int) -> list[Sandbox]:
        c = t.sandboxes.c
        return await self.where(
            _selected()
            .where(c.name == name, ~t.is_any_of(sorted(HIDDEN)))
            .order_by(c.created_at, c.id)
            .limit(limit)
        )

    @override
    async def with_rules(self, org_id: str) -> list[Sandbox]:
        c = t.sandboxes.c
        which = (c.org_id == org_id, *_have_rules())
        return await self.where(_selected().where(*which).order_by(c.created_at, c.id))

    @override
    async def ruled(self) -> list[Ruled]:
        c = t.sandboxes.c
        found = await self._connection.execute(
            select(c.id, c.org_id, c.node_id, c.status).where(*_have_rules())
        )
        return [Ruled(**{**row, "status": Status(row["status"])}) for row in found.mappings()]

    @override
    async def page(self, query: SandboxQuery) -> list[Sandbox]:
        given = {name: value for name in _ASKED if (value := getattr(query, name)) is not None}
        values = given | {"org_id": query.org_id, "most": query.limit}
        values |= {f"tag_{place}": tag for place, tag in enumerate(query.tags)}
        if query.name_prefix is not None:
            values["prefix_length"] = len(query.name_prefix)
        if query.metadata is not None:
            values["metadata"] = json.dumps(query.metadata)
        if query.after is not None:
            values["after_created_at"], values["after_id"] = query.after
        statement = _page_of(query.statuses, frozenset(values), len(query.tags), query.oldest_first)
        found = await self._connection.fetch(statement, values)
        return [self._sandbox(row) for row in found if row["status"] in _KNOWN]

    @override
    async def replace(
        self,
        sandbox: Sandbox,
        *,
        lease: str | None = None,
        hold: Hold | None = None,
        retag: bool = False,
        is_use: bool = False,
        effects: Effects = NO_EFFECTS,
    ) -> Sandbox | None:
        values = self._values(sandbox) | {"version": sandbox.version + 1}
        for name in ("id", "mounts", *(() if is_use else _USED)):
            del values[name]
        values |= {"known_id": sandbox.id, "known_version": sandbox.version}
        values |= _held(hold) if lease is None else {"known_lease": lease}
        change = _replacing(lease is not None, is_use)
        if not await self._write(sandbox, change, values, effects):
            return None
        if retag:
            await self._connection.execute(
                delete(t.sandbox_tags).where(t.sandbox_tags.c.sandbox_id == sandbox.id)
            )
            await self._add_tags(sandbox)
        return replace(sandbox, version=sandbox.version + 1)

    @override
    async def catch_up(self, sandbox: Sandbox, *, version: int, incarnation: int) -> bool:
        c = t.sandboxes.c
        done = await self._connection.execute(
            update(t.sandboxes)
            .where(c.id == sandbox.id, c.version == sandbox.version)
            .values(version=version, incarnation=incarnation)
        )
        return done.rowcount > 0

    @override
    async def on_node(self, node_id: str | None, statuses: frozenset[Status]) -> list[Sandbox]:
        c = t.sandboxes.c
        return await self.where(
            _selected().where(
                c.node_id == node_id, c.status.in_([status.value for status in statuses])
            )
        )

    @override
    async def standing(
        self, node_id: str, statuses: frozenset[Status], *, known: Mapping[str, Standing]
    ) -> list[Standing]:
        on_node = {"wanted_node": node_id}
        if not known:
            return await self._standing(_standing_of(statuses), on_node)
        at_rest = await self._connection.fetch(_versions_of(statuses - _USED_UNSEEN), on_node)
        same, changed = [], []
        for row in at_rest:
            one = known.get(row["id"])
            if one is not None and (one.version, one.status) == (row["version"], row["status"]):
                same.append(one)
            else:
                changed.append(row["id"])
        if len(changed) > _ONE_BY_ONE_MAX:
            return await self._standing(_standing_of(statuses), on_node)
        if in_use := statuses & _USED_UNSEEN:
            same += await self._standing(_standing_of(in_use), on_node)
        for sandbox_id in changed:
            same += await self._standing(_STANDING_ONE, {"wanted_id": sandbox_id})
        return same

    async def _standing(self, statement: Prepared, values: Values) -> list[Standing]:
        found = await self._connection.fetch(statement, values)
        standing = []
        for row in found:
            code, message = row.pop("reason_code"), row.pop("reason_message")
            reason = Reason(code, message) if code else None
            row |= {"status": Status(row["status"]), "network": _policy(row["network"], self._seal)}
            standing.append(Standing(**row, reason=reason))
        return standing

    @override
    async def marks(
        self, node_ids: Collection[str], statuses: frozenset[Status]
    ) -> Mapping[str, Mark]:
        c, s = t.sandboxes.c, t.snapshots.c
        sandboxes = await self._connection.execute(
            select(
                c.node_id,
                func.count().label("number"),
                cast(func.sum(c.version), BigInteger).label("versions"),
                func.max(c.updated_at).label("updated_at"),
            )
            .where(c.node_id.in_(node_ids), t.is_any_of(sorted(statuses)))
            .group_by(c.node_id)
        )
        is_unready = case((or_(s.is_ready.is_(False), s.is_hidden.is_(True)), 1), else_=0)
        snapshots = await self._connection.execute(
            select(
                s.node_id,
                func.count().label("number"),
                cast(func.sum(is_unready), BigInteger).label("unready"),
            )
            .where(s.node_id.in_(node_ids))
            .group_by(s.node_id)
        )
        marks = {row.node_id: Mark(row.number, row.versions, row.updated_at) for row in sandboxes}
        for row in snapshots:
            mark = marks.get(row.node_id, Mark())
            marks[row.node_id] = replace(mark, snapshots=row.number, unready=row.unready)
        return marks

    @override
    async def unplaced_until(self, end: datetime, statuses: frozenset[Status]) -> list[Sandbox]:
        c = t.sandboxes.c
        return await self.where(
            _selected().where(
                c.node_id.is_(None),
                c.expires_at <= end,
                c.pauses_at_end.is_(False),
                t.is_any_of(sorted(statuses)),
            )
        )

    @override
    async def with_ssh_key(self, org_id: str, key_id: str) -> list[Sandbox]:
        c = t.sandboxes.c
        return await self.where(
            _selected().where(
                c.org_id == org_id,
                # A key's id is no part of another's, so the text of the list says enough.
                cast(c.ssh_key_ids, Text).contains(f'"{key_id}"', autoescape=True),
                ~t.is_any_of(sorted(HIDDEN)),
            )
        )

    @override
    async def mounting(self, workspace_id: str) -> list[Sandbox]:
        c, mounted = t.sandboxes.c, t.sandbox_mounts.c
        return await self.where(
            _selected()
            .where(
                c.id.in_(select(mounted.sandbox_id).where(mounted.workspace_id == workspace_id)),
                ~t.is_any_of(sorted(HIDDEN)),
            )
            .order_by(c.created_at, c.id)
        )

    @override
    async def mounted(self) -> frozenset[str]:
        c, mounted = t.sandboxes.c, t.sandbox_mounts.c
        found = await self._connection.execute(
            select(mounted.workspace_id)
            .join(t.sandboxes, c.id == mounted.sandbox_id)
            .where(c.status == Status.RUNNING.value)
            .distinct()
        )
        return frozenset(found.scalars())

    @override
    async def forget_mounts(self, workspace_id: str) -> None:
        c = t.sandboxes.c
        for one in await self.mounting(workspace_id):
            left = [mount for mount in one.mounts if mount.workspace_id != workspace_id]
            await self._connection.execute(
                update(t.sandboxes).where(c.id == one.id).values(mounts=_plain(left))
            )
        await self._connection.execute(
            delete(t.sandbox_mounts).where(t.sandbox_mounts.c.workspace_id == workspace_id)
        )

    async def where(self, statement: Select[tuple[object]]) -> list[Sandbox]:
        """Return the sandboxes that a statement selects."""
        found = await self._connection.execute(statement)
        names = tuple(found.keys())  # a row's own mapping looks each name up again
        rows = [dict(zip(names, row, strict=True)) for row in found]
        return [self._sandbox(row) for row in rows if row["status"] in _KNOWN]

    async def _write(
        self, sandbox: Sandbox, change: Prepared, values: Values, effects: Effects
    ) -> list[dict[str, Any]]:
        """Run a change of a sandbox, and what is written with it. Return columns of the row, or
        nothing if there is none."""
        rest = of_effects(sandbox.id, effects)
        if rest and self._connection.dialect.name != "sqlite":
            change, values = as_one(change, values, rest)
            rest = []
        try:
            changed = await self._connection.fetch(change, values)
        except IntegrityError as error:
            raise _name_is_taken(error, sandbox.name) from error
        if changed:
            for statement, its in rest:
                await self._connection.fetch(statement, its)
        return changed

    async def _add_tags(self, sandbox: Sandbox) -> None:
        if sandbox.tags:
            await self._connection.execute(
                insert(t.sandbox_tags),
                [{"sandbox_id": sandbox.id, "tag": tag} for tag in sandbox.tags],
            )

    def _values(self, sandbox: Sandbox) -> dict[str, object]:
        values: dict[str, object] = {name: getattr(sandbox, name) for name in _SAME}
        values |= {name: list(getattr(sandbox, name)) for name in _TUPLES}
        reason = sandbox.reason
        return values | {
            "status": sandbox.status.value,
            "vcpus": sandbox.shape.vcpus,
            "memory_mib": sandbox.shape.memory_mib,
            "disk_mib": sandbox.shape.disk_mib,
            "env_sealed": self._seal.close(sandbox.env),
            "mounts": _plain(sandbox.mounts),
            "network": _rules(sandbox.network, self._seal),
            "metadata": dict(sandbox.metadata),
            "reason_code": reason.code if reason else None,
            "reason_message": reason.message if reason else None,
        }

    def _sandbox(self, found: Mapping[Any, Any]) -> Sandbox:
        if found["status"] not in _KNOWN:
            raise UnavailableError(
                f"cannot use the sandbox {found['id']}: a newer version of Sandyard has written "
                "it; try again when all servers are updated"
            )
        same = {name: found[name] for name in _SAME}
        same |= {name: tuple(found[name]) for name in _TUPLES}
        return Sandbox(
            **same,
            status=Status(found["status"]),
            shape=Shape(found["vcpus"], found["memory_mib"], found["disk_mib"]),
            env=self._seal.open(found["env_sealed"]),
            mounts=_mounts(found["mounts"]),
            network=_policy(found["network"], self._seal),
            reason=Reason(found["reason_code"], found["reason_message"])
            if found["reason_code"]
            else None,
            owner_display_name=found["owner_display_name"],
            owner_email=found["owner_email"],
        )


class LeaseTable(LeaseRows):
    """See core.contracts.store.LeaseRows."""

    def __init__(self, connection: Connection, sandboxes: SandboxTable) -> None:
        self._connection = connection
        self._sandboxes = sandboxes

    @override
    async def claim(self, statuses: frozenset[Status], *, hold: Hold, limit: int) -> list[Claim]:
        taken = await self._connection.fetch(_claim_of(statuses), {"most": limit, **_held(hold)})
        found = [await self._sandboxes.find(row["id"]) for row in taken]
        return [Claim(sandbox, hold.lease) for sandbox in found if sandbox is not None]

    @override
    async def waits(self, statuses: frozenset[Status]) -> bool:
        return bool(await self._connection.fetch(_waiting_of(statuses), {"most": 1}))

    @override
    async def extend(self, sandbox_id: str, *, lease: str, lasts: timedelta | None) -> bool:
        values = {
            "known_id": sandbox_id,
            "known_lease": lease,
            "lease_token": lease if lasts is not None else None,
            _LASTS: _microseconds(lasts),
        }
        return await self._connection.run(_EXTEND, values) > 0

    @override
    async def void(self, owner: str) -> None:
        await self._connection.execute(
            update(t.sandboxes)
            .where(t.sandboxes.c.lease_owner == owner)
            .values(dict.fromkeys(_leases))
        )


class NodeTable(NodeRows):
    """See core.contracts.store.NodeRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def heard(self, node_ids: Collection[str], at: datetime) -> None:
        new = [{"id": one, "first_seen_at": at, "seen_at": at} for one in sorted(node_ids)]
        await put(self._connection, t.nodes, new, changes={"seen_at": at})

    @override
    async def find(self, node_id: str) -> NodeSeen | None:
        found = await self._connection.fetch(_NODE, {"wanted_id": node_id})
        return NodeSeen(**found[0]) if found else None


class ActivityTable(ActivityRows):
    """See core.contracts.store.ActivityRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def append(self, activity: Activity) -> None:
        await self._connection.run(APPEND, of_line(activity))

    @override
    async def touch(self, sandbox_id: str, *, at: datetime, kind: str) -> None:
        await self._connection.run(
            _TOUCH, {"known_id": sandbox_id, "last_activity_at": at, "last_activity_kind": kind}
        )

    @override
    async def page(self, query: ActivityQuery) -> list[Activity]:
        c = t.activity.c
        wanted: list[ColumnElement[bool]] = [c.org_id == query.org_id]
        wanted += [c[name] == value for name, value in query.matches.items()]
        if query.seen_by is not None:
            own = select(t.sandboxes.c.id).where(t.sandboxes.c.owner_user_id == query.seen_by)
            wanted.append(or_(c.actor_user_id == query.seen_by, c.sandbox_id.in_(own)))
        if query.since is not None:
            wanted.append(c.created_at >= query.since)
        if query.until is not None:
            wanted.append(c.created_at < query.until)
        if query.after is not None:
            wanted.append(older(c, query.after))
        found = await self._connection.execute(
            select(t.activity)
            .where(*wanted)
            .order_by(c.created_at.desc(), c.id.desc())
            .limit(query.limit)
        )
        return [Activity(**row) for row in found.mappings()]


class SnapshotTable(SnapshotRows):
    """See core.contracts.store.SnapshotRows."""

    def __init__(self, connection: Connection, seal: Seal) -> None:
        self._connection = connection
        self._seal = seal

    @override
    async def insert(self, snapshot: Snapshot) -> None:
        values = vars(snapshot) | {
            "mounts": _plain(snapshot.mounts),
            "network": _rules(snapshot.network, self._seal),
        }
        del values["shape"]
        try:
            await self._connection.execute(
                insert(t.snapshots).values(values | vars(snapshot.shape))
            )
        except IntegrityError as error:
            raise _taken_by_snapshot(snapshot.name) from error

    @override
    async def find(self, org_id: str, reference: str) -> Snapshot | None:
        c = t.snapshots.c
        named = and_(c.name == reference, c.is_hidden.is_(False))
        found = await self._snapshots(
            select(t.snapshots).where(c.org_id == org_id, or_(c.id == reference, named))
        )
        return found[0] if found else None

    @override
    async def page(
        self,
        org_id: str,
        *,
        owner_user_id: str | None,
        limit: int,
        after: tuple[datetime, str] | None,
    ) -> list[Snapshot]:
        c = t.snapshots.c
        wanted: list[ColumnElement[bool]] = [c.org_id == org_id, c.is_hidden.is_(False)]
        if owner_user_id is not None:
            wanted.append(c.owner_user_id == owner_user_id)
        if after is not None:
            wanted.append(older(c, after))
        return await self._snapshots(
            select(t.snapshots)
            .where(*wanted)
            .order_by(c.created_at.desc(), c.id.desc())
            .limit(limit)
        )

    @override
    async def extend(self, snapshot_id: str, *, held_until: datetime) -> bool:
        done = await self._connection.execute(
            update(t.snapshots).where(t.snapshots.c.id == snapshot_id).values(held_until=held_until)
        )
        return done.rowcount > 0

    @override
    async def complete(self, snapshot_id: str, *, size_bytes: int) -> bool:
        done = await self._connection.execute(
            update(t.snapshots)
            .where(t.snapshots.c.id == snapshot_id)
            .values(is_ready=True, size_bytes=size_bytes, held_until=None)
        )
        return done.rowcount > 0

    @override
    async def rename(self, snapshot_id: str, name: str | None) -> None:
        c = t.snapshots.c
        try:
            await self._connection.execute(
                update(t.snapshots).where(c.id == snapshot_id).values(name=name)
            )
        except IntegrityError as error:
            raise _taken_by_snapshot(name) from error

    @override
    async def remove(self, snapshot_id: str, *, at: datetime) -> bool:
        c = t.snapshots.c
        done = await self._connection.execute(
            delete(t.snapshots).where(c.id == snapshot_id).returning(c.id, c.node_id)
        )
        found = done.first()
        if found is None:
            return False
        await self._connection.execute(
            insert(t.removed_snapshots).values(id=found.id, node_id=found.node_id, removed_at=at)
        )
        return True

    @override
    async def removed(self, node_id: str) -> Mapping[str, datetime]:
        c = t.removed_snapshots.c
        found = await self._connection.execute(
            select(c.id, c.removed_at).where(c.node_id == node_id)
        )
        return {row.id: row.removed_at for row in found}

    @override
    async def kept(self, org_id: str) -> Kept:
        c = t.snapshots.c
        found = await self._connection.execute(
            select(
                func.count(),
                cast(func.coalesce(func.sum(c.size_bytes), 0), BigInteger),
                cast(func.coalesce(func.sum(case((c.is_test.is_(True), 1), else_=0)), 0), Integer),
            ).where(c.org_id == org_id, c.is_hidden.is_(False))
        )
        return Kept(*found.one())

    @override
    async def forget(self, snapshot_ids: Collection[str]) -> None:
        await self._connection.execute(
            delete(t.removed_snapshots).where(t.removed_snapshots.c.id.in_(snapshot_ids))
        )

    @override
    async def on_node(self, node_id: str) -> list[Snapshot]:
        return await self._snapshots(select(t.snapshots).where(t.snapshots.c.node_id == node_id))

    @override
    async def is_awaited(self, snapshot_id: str) -> bool:
        c = t.sandboxes.c
        found = await self._connection.execute(
            select(c.id)
            .where(
                c.from_snapshot_id == snapshot_id,
                c.from_snapshot_incarnation == c.incarnation,
                c.status.in_(_COMING),
            )
            .limit(1)
        )
        return found.first() is not None

    async def _snapshots(self, statement: Select[Any]) -> list[Snapshot]:
        found = []
        for row in (await self._connection.execute(statement)).mappings():
            values = dict(row) | {
                "mounts": _mounts(row["mounts"]),
                "network": _policy(row["network"], self._seal),
            }
            shape = Shape(*(values.pop(name) for name in ("vcpus", "memory_mib", "disk_mib")))
            found.append(Snapshot(**values, shape=shape))
        return found


class RequestTable(RequestRows):
    """See core.contracts.store.RequestRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def find(self, key: RequestKey) -> KeyedRequest | None:
        c = t.keyed_requests.c
        found = await self._connection.execute(
            select(c.digest, c.resource_ids).where(
                *(c[name] == value for name, value in vars(key).items())
            )
        )
        row = found.first()
        return None if row is None else KeyedRequest(row.digest, tuple(row.resource_ids))

    @override
    async def add(self, key: RequestKey, request: KeyedRequest, *, at: datetime) -> None:
        await self._connection.execute(
            insert(t.keyed_requests).values(
                **vars(key),
                digest=request.digest,
                resource_ids=list(request.resource_ids),
                created_at=at,
            )
        )

    @override
    async def remove(self, key: RequestKey, *, before: datetime | None = None) -> None:
        c = t.keyed_requests.c
        statement = delete(t.keyed_requests).where(
            *(c[name] == value for name, value in vars(key).items())
        )
        if before is not None:
            statement = statement.where(c.created_at < before)
        await self._connection.execute(statement)

    @override
    async def forget(self, *, before: datetime) -> None:
        await remove_some(
            self._connection, t.keyed_requests, t.keyed_requests.c.created_at < before
        )


class TicketTable(TicketRows):
    """See core.contracts.store.TicketRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def put(self, ticket: Ticket) -> None:
        await put(self._connection, t.tickets, vars(ticket), changes=vars(ticket))

    @override
    async def find(self, digest: str) -> Ticket | None:
        found = await self._connection.fetch(_TICKET, {"wanted_digest": digest})
        return Ticket(**found[0]) if found else None

    @override
    async def take(self, digest: str, kind: str) -> Ticket | None:
        c = t.tickets.c
        found = await self._connection.execute(
            delete(t.tickets).where(c.digest == digest, c.kind == kind).returning(*c)
        )
        row = found.mappings().first()
        return None if row is None else Ticket(**row)

    @override
    async def forget(self, *, before: datetime) -> None:
        await remove_some(self._connection, t.tickets, t.tickets.c.expires_at < before)


async def put(
    connection: Connection,
    table: Table,
    new: Mapping[str, object] | Sequence[Mapping[str, object]],
    *,
    changes: Mapping[str, object],
) -> None:
    """Insert rows, or update those with the same key, in one statement that is safe with concurrent
    writers."""
    kind = sqlite.insert if connection.dialect.name == "sqlite" else postgresql.insert
    await connection.execute(
        kind(table)
        .values(new)
        .on_conflict_do_update(index_elements=list(table.primary_key.columns), set_=changes)
    )


def _have_rules() -> tuple[ColumnElement[bool], ...]:
    c = t.sandboxes.c
    return (c.network.is_not(None), c.node_id.is_not(None), ~t.is_any_of(sorted(HIDDEN)))


async def remove_some(connection: Connection, table: Table, *which: ColumnElement[bool]) -> None:
    """Remove rows of any organization in batches; rows that another transaction is removing are
    skipped."""
    keys = list(table.primary_key.columns)
    chosen = select(*keys).where(*which).limit(_FORGET_MAX).with_for_update(skip_locked=True)
    if found := (await connection.execute(chosen)).mappings().all():
        this = [one == bindparam(f"old_{one.name}") for one in keys]
        old = [{f"old_{name}": value for name, value in row.items()} for row in found]
        await connection.execute(delete(table).where(*this), old)


def _plain(mounts: Sequence[Mount]) -> list[dict[str, object]]:
    return [vars(one) for one in mounts]


def _mounts(found: Sequence[Mapping[str, Any]]) -> tuple[Mount, ...]:
    return tuple(Mount(**one) for one in found)


def _rules(policy: Policy, seal: Seal) -> object:
    if policy == NO_RULES:
        return None
    if not policy.inject:
        return encode(policy)
    # The headers may have secrets that are written out.
    return {"sealed": seal.close({"policy": json.dumps(encode(policy))})}


def _policy(found: Any, seal: Seal) -> Policy:
    if found is None:
        return NO_RULES
    if "sealed" in found:
        found = json.loads(seal.open(found["sealed"])["policy"])
    return decode(Policy, found)


def _held(hold: Hold | None) -> dict[str, object]:
    return {
        "lease_owner": hold.owner if hold else None,
        "lease_token": hold.lease if hold else None,
        _LASTS: _microseconds(hold.lasts if hold else None),
    }


def _microseconds(time: timedelta | None) -> int | None:
    return None if time is None else time // timedelta(microseconds=1)


def _selected() -> Select[tuple[object]]:
    return select(
        t.sandboxes,
        t.users.c.display_name.label("owner_display_name"),
        t.users.c.email.label("owner_email"),
    ).join(t.users, t.users.c.id == t.sandboxes.c.owner_user_id)


def _owners(column: ColumnElement[str]) -> ScalarSelect[str]:
    return select(column).where(t.users.c.id == bindparam("owner_user_id")).scalar_subquery()


_KNOWN: Final = frozenset(one.value for one in Status)  # a newer server may write others
_c = t.sandboxes.c
_node = t.joined_nodes.c
_known = (_c.id == bindparam("known_id"), _c.version == bindparam("known_version"))
_written: dict[str, Any] = {
    one.name: bindparam(one.name)
    for one in _c
    if one.name not in {"id", "created_at", "mounts", *_USED}
}
_leases = ("lease_owner", "lease_token", "lease_until")
_LASTS = "lease_lasts"
# Nothing, where it is to last for no time at all.
_until = t.now() + bindparam(_LASTS, type_=BigInteger)
_written["lease_until"] = _until
# What every request runs is built once: to build a statement takes as long as to run it.
_INSERT = Prepared(
    insert(t.sandboxes)
    .values({**{one.name: bindparam(one.name) for one in _c}, "lease_until": _until})
    .returning(
        _owners(t.users.c.display_name).label("owner_display_name"),
        _owners(t.users.c.email).label("owner_email"),
    )
)
_FIND = Prepared(_selected().where(_c.id == bindparam("wanted_id")))
_FIND_NAMED = Prepared(
    _selected().where(
        _c.org_id == bindparam("wanted_org"),
        _c.name == bindparam("wanted_name"),
        ~t.is_any_of(sorted(HIDDEN)),
    )
)


_ASKED = (
    "owner_user_id", "template", "project_id", "is_test", "exclude_template", "name_prefix",
    "node_id", "created_from",
)  # fmt: skip


@functools.lru_cache(maxsize=128)  # there are too many kinds of list queries to keep them
def _page_of(
    statuses: frozenset[Status], given: frozenset[str], tags: int, oldest_first: bool
) -> Prepared:
    """Return the statement for a page of sandboxes with some statuses, or of all that are not
    hidden, with named parameters."""
    wanted: list[ColumnElement[bool]] = [t.is_any_of(sorted(statuses))] if statuses else []
    if not statuses & HIDDEN:
        # Said of those that cannot be hidden, too: SQLite finds its index of the others by it.
        wanted.append(~t.is_any_of(sorted(HIDDEN)))
    for name in ("org_id", *_ASKED):
        if name in ("template", "exclude_template") and name in given:
            # A version's name begins with its template's slug.
            slug = bindparam(name, type_=String)
            is_of = or_(_c.template == slug, _c.template.like(slug + "@%"))
            wanted.append(is_of if name == "template" else not_(is_of))
        elif name == "name_prefix" and name in given:
            length = bindparam("prefix_length", type_=Integer)
            wanted.append(func.substr(_c.name, 1, length) == bindparam(name, type_=String))
        elif name == "created_from" and name in given:
            wanted.append(_c.created_at >= bindparam(name))
        elif name in given:
            wanted.append(_c[name] == bindparam(name))
    has = t.sandbox_tags.c
    wanted += [
        exists().where(has.sandbox_id == _c.id, has.tag == bindparam(f"tag_{place}"))
        for place in range(tags)
    ]
    if "metadata" in given:
        wanted.append(t.holds(_c.metadata, bindparam("metadata", type_=String)))
    if "after_id" in given:
        after: tuple[Any, Any] = (bindparam("after_created_at"), bindparam("after_id"))
        wanted.append(newer(_c, after) if oldest_first else older(_c, after))
    order = [one.asc() if oldest_first else one.desc() for one in (_c.created_at, _c.id)]
    found = _selected().where(*wanted).order_by(*order)
    return Prepared(found.limit(bindparam("most", type_=Integer)))


@functools.cache
def _replacing(is_held: bool, is_use: bool) -> Prepared:
    written = _written | {name: bindparam(name) for name in (_USED if is_use else ())}
    change = update(t.sandboxes).where(*_known)
    if is_held:
        change = change.where(_c.lease_token == bindparam("known_lease"))
        written = {name: value for name, value in written.items() if name not in _leases}
    return Prepared(change.values(written).returning(_c.id))


_TOUCH = Prepared(
    update(t.sandboxes)
    .where(_c.id == bindparam("known_id"))
    .values({name: bindparam(name) for name in _USED})
)
_EXTEND = Prepared(
    update(t.sandboxes)
    .where(_c.id == bindparam("known_id"), _c.lease_token == bindparam("known_lease"))
    .values(lease_until=_until, lease_token=bindparam("lease_token"))
)
# One that ends later than any lease can was taken before the database's clock was set back.
LEASE_MAX_US: Final = 120 * 1_000_000
_is_free = or_(
    _c.lease_until.is_(None),
    _c.lease_until < t.now(),
    _c.lease_until > t.now() + LEASE_MAX_US,
)


def _waiting(statuses: frozenset[Status]) -> Select[Any]:
    lost = select(_node.id).where(_node.id == _c.node_id, _node.lost_at.is_not(None))
    return (
        select(_c.id)
        .where(
            t.is_any_of(sorted(statuses)),
            _is_free,
            or_(~t.is_any_of(sorted(ENDING)), ~lost.exists()),
        )
        .order_by(_c.updated_at)
        .limit(bindparam("most", type_=Integer))
    )


@functools.cache
def _waiting_of(statuses: frozenset[Status]) -> Prepared:
    return Prepared(_waiting(statuses))


_STANDING = (
    *(_c[one.name] for one in fields(Standing) if one.name != "reason"),
    *(_c.reason_code, _c.reason_message),
)
_STANDING_ONE = Prepared(select(*_STANDING).where(_c.id == bindparam("wanted_id")))
# When they were last used is written beside their version.
_USED_UNSEEN = frozenset({Status.RUNNING, Status.SUSPECTED_MISSING})
_ONE_BY_ONE_MAX = 50


@functools.cache
def _standing_of(statuses: frozenset[Status]) -> Prepared:
    return Prepared(select(*_STANDING).where(*_on_node(statuses)))


@functools.cache
def _versions_of(statuses: frozenset[Status]) -> Prepared:
    return Prepared(select(_c.id, _c.version, _c.status).where(*_on_node(statuses)))


def _on_node(statuses: frozenset[Status]) -> tuple[ColumnElement[bool], ...]:
    return _c.node_id == bindparam("wanted_node"), t.is_any_of(sorted(statuses))


@functools.cache
def _claim_of(statuses: frozenset[Status]) -> Prepared:
    # PostgreSQL skips rows that others are writing: two concurrent claims get different
    # rows. A separate expression selects them once, whatever the planner does.
    chosen = _waiting(statuses).with_for_update(skip_locked=True).cte("chosen")
    return Prepared(
        update(t.sandboxes)
        .where(_c.id.in_(select(chosen.c.id)))
        .values(
            lease_owner=bindparam("lease_owner"),
            lease_token=bindparam("lease_token"),
            lease_until=_until,
        )
        .returning(_c.id)
    )


_NODE = Prepared(select(t.nodes).where(t.nodes.c.id == bindparam("wanted_id")))
_TICKET = Prepared(select(t.tickets).where(t.tickets.c.digest == bindparam("wanted_digest")))


def older(columns: Any, after: tuple[Any, Any]) -> ColumnElement[bool]:
    """Return the condition for rows that follow another one in a list sorted newest first; `after`
    is its creation time and id, or expressions for them."""
    created, last = after
    return or_(columns.created_at < created, and_(columns.created_at == created, columns.id < last))


def newer(columns: Any, after: tuple[Any, Any]) -> ColumnElement[bool]:
    """Return the condition for rows that follow another one in a list sorted oldest first."""
    created, last = after
    return or_(columns.created_at > created, and_(columns.created_at == created, columns.id > last))


def _name_is_taken(error: IntegrityError, name: str | None) -> AlreadyExistsError | InternalError:
    text = str(error.orig)
    if "uq_sandboxes_live_name" in text or "sandboxes.org_id, sandboxes.name" in text:
        return AlreadyExistsError(
            f"cannot use the name {name!r}: another sandbox of the organization has it; "
            "choose another or delete that one",
            field="name",
        )
    return InternalError(f"the database refused a row: {text}")


def _taken_by_snapshot(name: str | None) -> AlreadyExistsError:
    return AlreadyExistsError(
        f"cannot use the name {name!r}: another snapshot of the organization has it; choose "
        "another or delete that one",
        field="name",
    )
