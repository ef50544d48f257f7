"""Usage, storage, accounts and the ledger. See core.contracts for the behaviour of each method."""

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Table,
    bindparam,
    column,
    delete,
    insert,
    or_,
    select,
    type_coerce,
    update,
    values,
)
from sqlalchemy.exc import IntegrityError
from typing_extensions import override

from sandyard.server.core.contracts.store import (
    CreditRows,
    FactRows,
    PriceRows,
    StorageRows,
    UsageRows,
)
from sandyard.server.core.errors import AlreadyExistsError, InternalError
from sandyard.server.core.money import Account, PriceList, Prices
from sandyard.server.core.records import (
    AutoTopup,
    InUse,
    LedgerEntry,
    PendingTopup,
    StoragePeriod,
    UsagePeriod,
)
from sandyard.server.core.shapes import Shape, ShapeSeconds
from sandyard.server.links.sql import tables as t
from sandyard.server.links.sql.effects import CLOSE, OPEN, closing, of_period
from sandyard.server.links.sql.prepared import Prepared
from sandyard.server.links.sql.rows import Connection, put

_SHAPE = ("vcpus", "memory_mib", "disk_mib")
_CHARGED_AT_ONCE = 500  # a statement takes 32,767 values at most


class UsageTable(UsageRows):
    """See core.contracts.store.UsageRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def open(self, period: UsagePeriod) -> None:
        try:
            await self._connection.run(OPEN, of_period(period))
        except IntegrityError as error:
            raise InternalError(
                f"cannot open a usage period: {period.sandbox_id} has one open"
            ) from error

    @override
    async def close(self, sandbox_id: str, at: datetime) -> bool:
        closed = {"ended_id": sandbox_id, "ended": at}
        return bool(await self._connection.fetch(CLOSE, closed))

    @override
    async def of_sandbox(self, sandbox_id: str) -> list[UsagePeriod]:
        return await self._periods(t.usage_periods.c.sandbox_id == sandbox_id)

    @override
    async def ended(self, org_id: str, *, most: int) -> list[UsagePeriod]:
        c = t.usage_periods.c
        wanted = c.org_id == org_id, ~c.is_settled, c.ended_at.is_not(None)
        return await self._periods(*wanted, most=most)

    @override
    async def unsettled(self, org_id: str) -> list[UsagePeriod]:
        c = t.usage_periods.c
        return await self._periods(c.org_id == org_id, ~c.is_settled)

    @override
    async def owing(self) -> list[str]:
        found: set[str] = set()
        for table in (t.usage_periods, t.storage_periods):
            rows = await self._connection.execute(
                select(table.c.org_id).where(~table.c.is_settled).distinct()
            )
            found |= {row.org_id for row in rows}
        return sorted(found)

    @override
    async def reopen(self, org_id: str, at: datetime, *, most: int) -> int:
        return await _reopen(self._connection, t.usage_periods, org_id, at, most)

    @override
    async def shorten(self, sandbox_id: str, at: datetime) -> None:
        c = t.usage_periods.c
        later: UsagePeriod | None = None
        for one in reversed(await self._periods(c.sandbox_id == sandbox_id)):
            if later is not None:
                is_part = (one.ended_at, one.incarnation) == (later.started_at, later.incarnation)
                if not is_part or later.started_at <= at:
                    return
                await self._connection.execute(
                    update(t.usage_periods)
                    .where(c.id == one.id)
                    .values(ended_at=max(one.started_at, at), is_settled=False)
                )
            later = one

    @override
    async def charge(self, periods: Sequence[UsagePeriod]) -> None:
        await _charge(self._connection, t.usage_periods, periods)

    @override
    async def within(
        self, org_id: str, *, since: datetime, owner_user_id: str | None
    ) -> list[UsagePeriod]:
        c = t.usage_periods.c
        wanted = [c.org_id == org_id, or_(c.ended_at.is_(None), c.ended_at > since)]
        if owner_user_id is not None:
            own = select(t.sandboxes.c.id).where(t.sandboxes.c.owner_user_id == owner_user_id)
            wanted.append(c.sandbox_id.in_(own))
        return await self._periods(*wanted)

    @override
    async def in_use(self, org_id: str, now: datetime) -> InUse:
        found = await self._connection.fetch(_TOTALS, {"wanted_org": org_id})
        return _in_use(found[0], now) if found else InUse()

    async def _periods(
        self, *wanted: ColumnElement[bool], most: int | None = None
    ) -> list[UsagePeriod]:
        found = await self._connection.execute(
            select(t.usage_periods).where(*wanted).order_by(t.usage_periods.c.id).limit(most)
        )
        result = []
        for row in found.mappings():
            values = dict(row)
            shape = Shape(*(values.pop(name) for name in _SHAPE))
            result.append(UsagePeriod(**values, shape=shape))
        return result


class StorageTable(StorageRows):
    """See core.contracts.store.StorageRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def open(self, period: StoragePeriod) -> None:
        values = {name: value for name, value in vars(period).items() if name != "id"}
        try:
            await self._connection.execute(insert(t.storage_periods).values(values))
        except IntegrityError as error:
            raise InternalError(
                f"cannot open a storage period: {period.resource_id} has one open"
            ) from error

    @override
    async def close(self, kind: str, resource_id: str, at: datetime) -> bool:
        closed = {"wanted_kind": kind, "wanted_id": resource_id, "ended": at}
        return bool(await self._connection.fetch(_CLOSE_STORAGE, closed))

    @override
    async def ended(self, org_id: str, *, most: int) -> list[StoragePeriod]:
        c = t.storage_periods.c
        wanted = c.org_id == org_id, ~c.is_settled, c.ended_at.is_not(None)
        return await self._periods(*wanted, most=most)

    @override
    async def unsettled(self, org_id: str) -> list[StoragePeriod]:
        c = t.storage_periods.c
        return await self._periods(c.org_id == org_id, ~c.is_settled)

    @override
    async def reopen(self, org_id: str, at: datetime, *, most: int) -> int:
        return await _reopen(self._connection, t.storage_periods, org_id, at, most)

    @override
    async def charge(self, periods: Sequence[StoragePeriod]) -> None:
        await _charge(self._connection, t.storage_periods, periods)

    @override
    async def within(self, org_id: str, *, since: datetime) -> list[StoragePeriod]:
        c = t.storage_periods.c
        return await self._periods(
            c.org_id == org_id, or_(c.ended_at.is_(None), c.ended_at > since)
        )

    @override
    async def of(self, kind: str, resource_id: str) -> list[StoragePeriod]:
        c = t.storage_periods.c
        return await self._periods(c.kind == kind, c.resource_id == resource_id)

    async def _periods(
        self, *wanted: ColumnElement[bool], most: int | None = None
    ) -> list[StoragePeriod]:
        found = await self._connection.execute(
            select(t.storage_periods).where(*wanted).order_by(t.storage_periods.c.id).limit(most)
        )
        return [StoragePeriod(**row) for row in found.mappings()]


class CreditTable(CreditRows):
    """See core.contracts.store.CreditRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def account(self, org_id: str) -> Account:
        found = await self._connection.fetch(_ACCOUNT, {"wanted_org": org_id})
        return Account(**found[0]) if found else Account(org_id)

    @override
    async def position(self, org_id: str, now: datetime) -> tuple[InUse, Account]:
        found = await self._connection.fetch(_POSITION, {"wanted_org": org_id})
        if not found:
            return InUse(), Account(org_id)
        of, account = found[0], Account(org_id)
        if of[_OF_ACCOUNTS[0]] is not None:
            account = Account(org_id, **{name: of[name] for name in _OF_ACCOUNTS})
        return InUse() if of[_OF_TOTALS[0]] is None else _in_use(of, now), account

    @override
    async def save(self, account: Account) -> None:
        done = await self._connection.execute(
            update(t.accounts).where(t.accounts.c.org_id == account.org_id).values(vars(account))
        )
        if done.rowcount == 0:  # an organization from before there were accounts
            await self._connection.execute(insert(t.accounts).values(vars(account)))

    @override
    async def post(self, entry: LedgerEntry) -> None:
        try:
            await self._connection.execute(insert(t.ledger).values(vars(entry)))
        except IntegrityError as error:
            raise AlreadyExistsError(
                f"cannot post this {entry.type}: one with the reference {entry.reference_id!r} "
                "was posted before",
                field="reference_id",
            ) from error

    @override
    async def find(self, org_id: str, type_: str, reference_id: str) -> LedgerEntry | None:
        c = t.ledger.c
        found = await self._entries(
            1, c.org_id == org_id, c.type == type_, c.reference_id == reference_id
        )
        return found[0] if found else None

    @override
    async def history(
        self, org_id: str, *, limit: int, after_id: str | None = None
    ) -> list[LedgerEntry]:
        c = t.ledger.c
        wanted = [c.org_id == org_id]
        if after_id is not None:
            last = select(c.number).where(c.org_id == org_id, c.id == after_id).scalar_subquery()
            wanted.append(c.number < last)
        return await self._entries(limit, *wanted)

    @override
    async def auto_topup(self, org_id: str) -> AutoTopup:
        found = await self._connection.execute(
            select(t.auto_topups).where(t.auto_topups.c.org_id == org_id)
        )
        row = found.mappings().first()
        if row is None:
            return AutoTopup(org_id)
        values = dict(row)
        key, cents, since = (values.pop(f"pending_{one}") for one in ("key", "cents", "since"))
        pending = None if key is None else PendingTopup(key, cents, since)
        return AutoTopup(**values, pending=pending)

    @override
    async def save_auto_topup(self, wish: AutoTopup) -> None:
        values = {name: value for name, value in vars(wish).items() if name != "pending"}
        for one in ("key", "cents", "since"):
            values[f"pending_{one}"] = getattr(wish.pending, one) if wish.pending else None
        done = await self._connection.execute(
            update(t.auto_topups).where(t.auto_topups.c.org_id == wish.org_id).values(values)
        )
        if done.rowcount == 0:
            await self._connection.execute(insert(t.auto_topups).values(values))

    @override
    async def topped_up(self) -> list[str]:
        c = t.auto_topups.c
        found = await self._connection.execute(
            select(c.org_id).where(c.is_enabled, c.customer_id.is_not(None))
        )
        return [row.org_id for row in found]

    async def _entries(self, limit: int, *wanted: ColumnElement[bool]) -> list[LedgerEntry]:
        found = await self._connection.execute(
            select(t.ledger).where(*wanted).order_by(t.ledger.c.number.desc()).limit(limit)
        )
        return [
            LedgerEntry(**{name: value for name, value in row.items() if name != "number"})
            for row in found.mappings()
        ]


class FactTable(FactRows):
    """See core.contracts.store.FactRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def now(self) -> datetime:
        [found] = await self._connection.fetch(_NOW, {})
        moment: datetime = found["moment"]
        return moment

    @override
    async def moment(self, name: str) -> datetime | None:
        found = await self._connection.fetch(_FACT, {"wanted_name": name})
        return found[0]["moment"] if found else None

    @override
    async def note(self, name: str, at: datetime) -> None:
        new = {"name": name, "moment": at}
        await put(self._connection, t.facts, new, changes={"moment": at})


class PriceTable(PriceRows):
    """See core.contracts.store.PriceRows."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @override
    async def history(self) -> PriceList | None:
        found = [(row.pop("since"), row) for row in await self._connection.fetch(_HISTORY, {})]
        return PriceList(tuple((since, Prices(**row)) for since, row in found)) if found else None

    @override
    async def add(self, prices: Prices, *, since: datetime) -> None:
        values = {"since": since, **vars(prices)}
        await self._connection.execute(insert(t.prices).values(values))

    @override
    async def note(self, server_id: str, prices: Prices, at: datetime) -> None:
        changes = {**vars(prices), "seen_at": at}
        new = {"server_id": server_id, **changes}
        await put(self._connection, t.meters, new, changes=changes)

    @override
    async def forget(self, *, after: datetime) -> None:
        await self._connection.execute(delete(t.prices).where(t.prices.c.since > after))

    @override
    async def noted(self, *, since: datetime, until: datetime) -> Mapping[str, Prices]:
        found = await self._connection.fetch(_NOTED, {"earliest": since, "latest": until})
        return {row.pop("server_id"): Prices(**row) for row in found}


def _in_use(of: Mapping[str, Any], now: datetime) -> InUse:
    now_s = (t.microseconds(now) - t.microseconds(t.TOTALS_EPOCH)) // 1_000_000
    # A clock that was set back must not make a charge negative.
    owed = (max(0, of[f"owed_{name}_s"] + of[f"open_{name}"] * now_s) for name in _SHAPE)
    return InUse(
        **{name: of[name] for name in ("active", *_SHAPE, "tests")},
        paid=Shape(*(of[f"paid_{name}"] for name in _SHAPE)),
        owed=ShapeSeconds(*owed),
        posted=of["owed_posted"],
    )


async def _reopen(
    connection: Connection, table: Table, org_id: str, at: datetime, most: int
) -> int:
    c = table.c
    found = await connection.execute(
        select(table)
        .where(c.org_id == org_id, ~c.is_settled, c.ended_at.is_(None), c.started_at < at)
        .limit(most)
    )
    rows = [dict(row) for row in found.mappings()]
    if rows:
        ids = [row["id"] for row in rows]
        await connection.execute(update(table).where(c.id.in_(ids)).values(ended_at=at))
        again = {"started_at": at, "posted": 0}
        await connection.execute(
            insert(table),
            [{name: one for name, one in row.items() if name != "id"} | again for row in rows],
        )
    return len(rows)


async def _charge(
    connection: Connection, table: Table, periods: Sequence[UsagePeriod | StoragePeriod]
) -> None:
    for at in range(0, len(periods), _CHARGED_AT_ONCE):
        await _charge_some(connection, table, periods[at : at + _CHARGED_AT_ONCE])


async def _charge_some(
    connection: Connection, table: Table, periods: Sequence[UsagePeriod | StoragePeriod]
) -> None:
    c = table.c
    columns = [column(one.name, one.type) for one in (c.id, c.posted, c.is_settled)]
    rows = [(one.id, one.posted, one.is_settled) for one in periods]
    now = values(*columns, name="now").data(rows).cte("now").c
    await connection.execute(
        update(table)
        # The second has the index used, whatever the planner believes of the table.
        .where(c.id == now.id, c.id.in_([one.id for one in periods]))
        .values(posted=now.posted, is_settled=now.is_settled)
    )


# What every create runs is built once: to build a statement takes longer than to run it.
_ACCOUNT = Prepared(select(t.accounts).where(t.accounts.c.org_id == bindparam("wanted_org")))
_TOTALS = Prepared(select(t.org_totals).where(t.org_totals.c.org_id == bindparam("wanted_org")))
_HISTORY = Prepared(select(t.prices).order_by(t.prices.c.since))
_NOTED = Prepared(
    select(*(one for one in t.meters.c if one.name != "seen_at")).where(
        t.meters.c.seen_at >= bindparam("earliest", type_=t.Moment),
        t.meters.c.seen_at <= bindparam("latest", type_=t.Moment),
    )
)
_OF_TOTALS = tuple(one.name for one in t.org_totals.c if one.name != "org_id")
_OF_ACCOUNTS = tuple(one.name for one in t.accounts.c if one.name != "org_id")
_organization = t.organizations.c.id
_POSITION = Prepared(
    select(
        *(t.org_totals.c[name] for name in _OF_TOTALS),
        *(t.accounts.c[name] for name in _OF_ACCOUNTS),
    )
    .select_from(t.organizations)
    .outerjoin(t.org_totals, t.org_totals.c.org_id == _organization)
    .outerjoin(t.accounts, t.accounts.c.org_id == _organization)
    .where(_organization == bindparam("wanted_org"))
)
_CLOSE_STORAGE = Prepared(
    closing(
        t.storage_periods,
        t.storage_periods.c.kind == bindparam("wanted_kind"),
        t.storage_periods.c.resource_id == bindparam("wanted_id"),
    ).returning(t.storage_periods.c.id)
)
_NOW = Prepared(select(type_coerce(t.now(), t.Moment).label("moment")))
_FACT = Prepared(select(t.facts.c.moment).where(t.facts.c.name == bindparam("wanted_name")))
