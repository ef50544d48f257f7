"""Accounts: plan, credits, usage, top-ups and grants."""

import asyncio
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta

from sandyard.server.core.contracts.payments import Checkout, Payment, Payments, Reversal
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.errors import (
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
)
from sandyard.server.core.ids import checked_text, is_uuid
from sandyard.server.core.money import Account, PriceList, between
from sandyard.server.core.plans import Plan
from sandyard.server.core.records import (
    AutoTopup,
    LedgerEntry,
    Organization,
    Sandbox,
    StoragePeriod,
    UsagePeriod,
)
from sandyard.server.service.actor import Actor, plan_of
from sandyard.server.service.lines import line
from sandyard.server.service.money.credits import (
    AMOUNT_MAX,
    SIGN_UP,
    credit,
    take_back,
    take_payment,
)
from sandyard.server.service.repeats import Repeatable
from sandyard.server.service.sandboxes.platform import Platform

TOPUP_MIN = 501
_REFERENCE_MAX = 255
_LOOKS_MAX = 10
_URL_MAX = 2048
_PERIODS = {"7d": timedelta(days=7), "30d": timedelta(days=30)}


@dataclass(frozen=True)
class MachineUsage:
    """Usage of a sandbox's machine: seconds, seconds of the open period, and micros."""

    seconds: float = 0.0
    active_seconds: float = 0.0
    vcpu_seconds: float = 0.0
    memory_mib_seconds: float = 0.0
    micros: int = 0


@dataclass(frozen=True)
class StoredUsage:
    """Stored data: byte-seconds by kind, and micros."""

    byte_seconds: Mapping[str, float] = field(default_factory=dict)
    micros: int = 0


@dataclass(frozen=True)
class Usage:
    """Usage of an organization or a member since a point in time."""

    since: datetime
    until: datetime
    sandboxes: Mapping[str, MachineUsage]
    total: MachineUsage
    storage: StoredUsage


class Billing:
    """The operations. Reading needs `org:read`; moving money also needs an admin."""

    def __init__(
        self,
        platform: Platform,
        *,
        payments: Payments,
    ) -> None:
        self._store = platform.store
        self._register = platform.register
        self._payments = payments
        self._repeats = platform.repeats
        self._clock = platform.clock
        self._prices = platform.prices
        self._list = PriceList.always(platform.prices)
        self._plans = platform.plans
        self._reversing = asyncio.Lock()

    async def plan(self, actor: Actor) -> tuple[Organization, Account, Plan]:
        """Return the organization, its account and its limits."""
        actor.require("org:read")
        async with self._store.read() as tx:
            organization = await tx.organizations.find(actor.org_id)
            account = await tx.credits.account(actor.org_id)
        if organization is None:
            raise NotFoundError("cannot find the organization")
        return organization, account, plan_of(self._plans, actor)

    async def credits(self, actor: Actor) -> tuple[Account, bool]:
        """Return the account, and whether the initial credits are used up."""
        actor.require("org:read")
        async with self._store.read() as tx:
            account = await tx.credits.account(actor.org_id)
            first = await tx.credits.find(actor.org_id, "grant", SIGN_UP)
        return account, first is not None and account.used_cents >= first.amount_cents

    async def history(
        self, actor: Actor, *, limit: int, after_id: str | None = None
    ) -> list[LedgerEntry]:
        """Return one page of the ledger, newest first."""
        actor.require("org:read")
        async with self._store.read() as tx:
            return await tx.credits.history(actor.org_id, limit=limit, after_id=after_id)

    async def usage(self, actor: Actor, period: str, *, wants_all: bool) -> Usage:
        """Return the actor's usage in a period, or with `wants_all` the organization's.

        Storage is reported for the organization only. `current` is the current month.

        Raises:
            PermissionDeniedError: a member asked for all.
        """
        actor.require("org:read")
        if wants_all and not actor.sees_all:
            raise PermissionDeniedError(
                "cannot show the usage of all members: that takes the role admin",
                required_scope="admin:resources",
            )
        now = self._clock.now()
        since = datetime(1970, 1, 1, tzinfo=UTC)
        if period == "current":
            since = now.replace(day=1, hour=0, minute=0, second=0, microsecond=0)
        elif period in _PERIODS:
            since = now - _PERIODS[period]
        async with self._store.read() as tx:
            owner = None if wants_all else actor.user_id
            prices = await tx.prices.history() or self._list
            periods = await tx.usage.within(actor.org_id, since=since, owner_user_id=owner)
            stored = await tx.storage.within(actor.org_id, since=since) if wants_all else []
        by_sandbox: dict[str, list[UsagePeriod]] = defaultdict(list)
        for one in periods:
            by_sandbox[one.sandbox_id].append(one)
        return Usage(
            since=since,
            until=now,
            sandboxes={
                sandbox_id: _used(prices, theirs, since, now)
                for sandbox_id, theirs in by_sandbox.items()
            },
            total=_used(prices, periods, since, now),
            storage=_kept(prices, stored, since, now),
        )

    async def cost(
        self, actor: Actor, reference: str
    ) -> tuple[Sandbox, MachineUsage, StoredUsage, int]:
        """Return a sandbox, its usage so far, and its current cost per hour.

        Raises:
            NotFoundError: there is no such sandbox.
        """
        actor.require("sandbox:read")
        sandbox = await self._register.get(actor, reference)
        now = self._clock.now()
        async with self._store.read() as tx:
            prices = await tx.prices.history() or self._list
            periods = await tx.usage.of_sandbox(sandbox.id)
            stored = await tx.storage.of("sandbox", sandbox.id)
        first = datetime(1970, 1, 1, tzinfo=UTC)
        hourly = 0
        if not sandbox.is_test:
            hour = timedelta(hours=1)
            hourly = sum(
                self._prices.hour_of(one.shape) for one in periods if one.ended_at is None
            ) + sum(
                self._prices.storage(one.size_bytes, hour) for one in stored if one.ended_at is None
            )
        used, kept = _used(prices, periods, first, now), _kept(prices, stored, first, now)
        return sandbox, used, kept, hourly

    async def check_out(
        self, actor: Actor, amount_cents: int, *, success_url: str, cancel_url: str
    ) -> Checkout:
        """Return a payment page. The amount is credited after the payment.

        Raises:
            InvalidArgumentError: the amount or a URL is invalid.
            UnavailableError: no payment provider is configured, or it does not answer.
        """
        actor.require("org:write")
        actor.require_admin()
        _check_amount(amount_cents)
        for name, url in (("success_url", success_url), ("cancel_url", cancel_url)):
            checked_text(url, field=name)
            if not url.startswith(("https://", "http://")) or len(url) > _URL_MAX:
                raise InvalidArgumentError(
                    "cannot use {field}: it must be a URL such as https://example.org/done",
                    field=name,
                )
        return await self._payments.check_out(
            org_id=actor.org_id,
            amount_cents=amount_cents,
            success_url=success_url,
            cancel_url=cancel_url,
        )

    async def receive_payment_event(self, payload: bytes, signature: str) -> bool:
        """Post a payment, or a reversal, that the provider reports. Repeated reports change
        nothing.

        Raises:
            InvalidTokenError: the provider's signature is invalid.
            UnavailableError: no payment provider is configured.
        """
        event = await self._payments.read_event(payload, signature)
        if event is None:
            return False
        if not isinstance(event, Reversal):
            return await self._post(event)
        # The provider's answer may be outdated when it is posted, and another event may
        # have posted what is newer. The last to post asks once more after that.
        async with self._reversing:
            has_posted = False
            for _ in range(_LOOKS_MAX):
                has_posted |= await self._post(event)
                before, event = event, await self._payments.read_event(payload, signature)
                if event is None or event == before:
                    break
        return has_posted

    async def _post(self, event: Payment | Reversal) -> bool:
        now = self._clock.now()
        async with self._store.write(event.org_id) as tx:
            if await tx.organizations.find(event.org_id) is None:
                raise NotFoundError("cannot credit a payment: its organization does not exist")
            if isinstance(event, Reversal):
                return await take_back(tx, event, at=now)
            return await take_payment(tx, event, at=now, is_automatic=event.is_automatic)

    async def auto_topup(self, actor: Actor) -> AutoTopup:
        """Return the settings of automatic top-up."""
        actor.require("org:read")
        async with self._store.read() as tx:
            return await tx.credits.auto_topup(actor.org_id)

    async def set_auto_topup(
        self,
        actor: Actor,
        *,
        is_enabled: bool,
        threshold_cents: int | None,
        amount_cents: int | None,
    ) -> AutoTopup:
        """Change automatic top-up.

        Raises:
            InvalidArgumentError: an amount is invalid.
            ConflictError: it is to be enabled, and there is no card.
        """
        actor.require("org:write")
        actor.require_admin()
        if threshold_cents is not None and not 1 <= threshold_cents <= AMOUNT_MAX:
            raise InvalidArgumentError(
                f"cannot use {{field}}: it must be 1 to {AMOUNT_MAX}",
                field="threshold_cents",
            )
        if amount_cents is not None:
            _check_amount(amount_cents, field="topup_amount_cents")
        async with self._store.write(actor.org_id) as tx:
            wish = await tx.credits.auto_topup(actor.org_id)
            if is_enabled and wish.customer_id is None:
                raise ConflictError(
                    "cannot top up automatically: there is no card yet; top up once, and the card "
                    "is kept for this",
                    status="no_card",
                )
            wish = replace(wish, is_enabled=is_enabled)
            if threshold_cents is not None:
                wish = replace(wish, threshold_cents=threshold_cents)
            if amount_cents is not None:
                wish = replace(wish, amount_cents=amount_cents)
            await tx.credits.save_auto_topup(wish)
            await tx.activity.append(
                line(
                    "billing.auto_topup_changed",
                    "Automatic top-up changed",
                    org_id=actor.org_id,
                    actor=actor,
                    resource_id=actor.org_id,
                    at=self._clock.now(),
                    attributes={"enabled": is_enabled},
                )
            )
        return wish

    async def grant(
        self,
        actor: Actor,
        amount_cents: int,
        *,
        org_id: str | None,
        description: str,
        reference_id: str | None,
        request: Repeatable | None = None,
    ) -> LedgerEntry:
        """Grant credits to an organization. A grant with a reference is made once.

        Raises:
            PermissionDeniedError: the actor is not an operator.
            NotFoundError: there is no such organization.
            InvalidArgumentError: the amount is invalid.
        """
        actor.require("org:write")
        actor.require_admin()
        actor.require_operator()
        for name, text in (("description", description), ("reference_id", reference_id or "x")):
            checked_text(text, field=name)
            if not 1 <= len(text) <= _REFERENCE_MAX:
                raise InvalidArgumentError(
                    f"cannot use {{field}}: it must have 1 to {_REFERENCE_MAX} characters",
                    field=name,
                )
        if not 1 <= amount_cents <= AMOUNT_MAX:
            raise InvalidArgumentError(
                f"cannot grant {amount_cents} cents: it must be 1 to {AMOUNT_MAX}",
                field="amount_cents",
            )
        wanted = actor.org_id if org_id is None else org_id
        now = self._clock.now()
        async with self._repeats.turn(actor, request), self._store.write(Turn.ALONE) as tx:
            ids = await self._repeats.made_before(tx, actor, request)
            if ids is not None:
                for known in await tx.credits.history(ids[1], limit=10_000):
                    if known.id == ids[0]:
                        return known
            if not is_uuid(wanted) or await tx.organizations.find(wanted) is None:
                raise NotFoundError("cannot find the organization: check {field}", field="org_id")
            entry, is_new = await credit(
                tx,
                wanted,
                "grant",
                amount_cents,
                description=description,
                at=now,
                reference_id=reference_id,
            )
            if is_new:
                await tx.activity.append(
                    line(
                        "billing.grant",
                        "Credits granted",
                        org_id=wanted,
                        actor=actor,
                        resource_id=entry.id,
                        at=now,
                        summary=description,
                        attributes={"amountCents": amount_cents},
                    )
                )
            await self._repeats.note(tx, actor, request, (entry.id, wanted))
        return entry


def _used(
    prices: PriceList, periods: list[UsagePeriod], since: datetime, now: datetime
) -> MachineUsage:
    seconds = active = vcpus = memory = 0.0
    micros = 0
    for one in periods:
        end = one.ended_at or now
        cut = min(since, end)
        spent = (between(one.started_at, end) - between(one.started_at, cut)).total_seconds()
        seconds += spent
        active += spent if one.ended_at is None else 0
        vcpus += spent * one.shape.vcpus
        memory += spent * one.shape.memory_mib
        if not one.is_free:
            micros += prices.compute(one.shape, one.started_at, end)
            micros -= prices.compute(one.shape, one.started_at, cut)
    return MachineUsage(seconds, active, vcpus, memory, micros)


def _kept(
    prices: PriceList, periods: list[StoragePeriod], since: datetime, now: datetime
) -> StoredUsage:
    kinds: dict[str, float] = defaultdict(float)
    micros = 0
    for one in periods:
        end = one.ended_at or now
        cut = min(since, end)
        spent = between(one.started_at, end) - between(one.started_at, cut)
        kinds[one.kind] += spent.total_seconds() * one.size_bytes
        if not one.is_free:
            micros += prices.storage(one.size_bytes, one.started_at, end)
            micros -= prices.storage(one.size_bytes, one.started_at, cut)
    return StoredUsage(kinds, micros)


def _check_amount(amount_cents: int, *, field: str = "amount_cents") -> None:
    if not TOPUP_MIN <= amount_cents <= AMOUNT_MAX:
        raise InvalidArgumentError(
            f"cannot top up {amount_cents} cents: it must be {TOPUP_MIN} to {AMOUNT_MAX}",
            field=field,
        )
