"""Turns usage into charges, and pauses sandboxes when credits run out.

A period is opened and closed with the sandbox's status. The meter regularly deducts what a period
has cost so far, less what was charged for it, in the transaction that stores both. However often
and by however many servers this runs, each microsecond is charged once.
"""

import asyncio
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Generic, TypeVar

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.payments import KEY_PREFIX, Payments
from sandyard.server.core.contracts.store import Store, Transaction, Turn
from sandyard.server.core.errors import ConflictError, SandyardError
from sandyard.server.core.ids import new_uuid
from sandyard.server.core.money import MICROS, Account, PriceList, Prices
from sandyard.server.core.records import (
    AutoTopup,
    LedgerEntry,
    PendingTopup,
    Reason,
    Sandbox,
    SandboxQuery,
    StoragePeriod,
    UsagePeriod,
)
from sandyard.server.core.states import Event, Status
from sandyard.server.service.lines import line
from sandyard.server.service.money.credits import end_pending, take_payment
from sandyard.server.service.sandboxes.lifecycle import Lifecycle

log = logging.getLogger(__name__)

BEAT = "metered"
"""The moment at which the installation was last seen at work."""
EXHAUSTED = Reason(
    "insufficient_credits", "the organization's credits are used up; top up and resume it"
)
_PERIOD_S = 10.0
_AT_WORK = timedelta(seconds=35)  # a server at work says so every period
_DUTY = "meter"
_DUTY_LASTS = timedelta(seconds=30)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_TICK = timedelta(microseconds=1)
_SOONEST_S = 1.0
_POST_EVERY_S = 300.0
_TELL_EVERY_S = 300.0
_PAUSE_AGAIN = timedelta(minutes=5)
_PAGE = 500
_TOPUP_EVERY = timedelta(minutes=10)
# Stripe keeps the answer of a key for at least a day (docs.stripe.com/api/idempotent_requests).
_KEY_LIVES = timedelta(hours=23)
_P = TypeVar("_P", UsagePeriod, StoragePeriod)


@dataclass(frozen=True)
class Balance:
    """An account's balance after all usage so far, and its sandboxes' cost per hour."""

    account: Account
    left: int
    hourly: int


class Meter:
    """Charges organizations; it is to be run. Of several servers, one at a time does.

    `prices` are those of this server's settings. If they are not the latest in the database, they
    hold from then on: what is in use is charged with the prices that held in each second. While
    another server at work has other prices, neither charges.
    """

    def __init__(
        self,
        *,
        store: Store,
        lifecycle: Lifecycle,
        payments: Payments,
        clock: Clock,
        prices: Prices,
        server_id: str,
        enforces: bool,
    ) -> None:
        self._server_id = server_id
        self._differed_at: float | None = None
        self._reopened: dict[str, datetime] = {}
        self._store = store
        self._lifecycle = lifecycle
        self._payments = payments
        self._clock = clock
        self._prices = prices
        self._enforces = enforces
        self._posted_at: dict[str, float] = {}
        self._paused_logged_at: dict[str, float] = {}
        self._topping: set[str] = set()
        self._tasks: asyncio.TaskGroup | None = None

    async def run(self) -> None:
        """Charge until cancelled."""
        try:
            async with asyncio.TaskGroup() as self._tasks:
                while True:
                    wait = _PERIOD_S
                    try:
                        wait = await self.charge_all()
                    except SandyardError as error:
                        log.warning("cannot charge usage: %s; retrying", error.message)
                    except Exception:  # the loop must continue after any error
                        log.exception("unexpected error while charging usage; retrying")
                    await self._clock.sleep(wait)
        finally:
            self._tasks = None

    async def charge_all(self) -> float:
        """Charge every organization once; return seconds until the next time."""
        if not await self._may_charge():
            return _PERIOD_S
        async with self._store.read() as tx:
            owing = await tx.usage.owing()
            topped_up = await tx.credits.topped_up()
        wait = _PERIOD_S
        for org_id in sorted({*owing, *topped_up}):
            try:
                wait = min(wait, await self._look_at(org_id))
            except SandyardError as error:
                log.warning(
                    "cannot charge an account: %s; retrying",
                    error.message,
                    extra={"org_id": org_id},
                )
            except Exception:  # as above: one account must not stop the others
                log.exception(
                    "unexpected error while charging an account; retrying", extra={"org_id": org_id}
                )
        return max(_SOONEST_S, wait)

    async def _may_charge(self) -> bool:
        """Tell whether all servers at work have the same prices, which hold from now on, and it is
        for this one to charge."""
        now = self._clock.now()
        async with self._store.write(Turn.SHARED) as tx:
            await tx.facts.note(BEAT, now)
            await tx.prices.note(self._server_id, self._prices, now)
            others = await tx.prices.noted(since=now - _AT_WORK, until=now + _AT_WORK)
            known = await tx.prices.history()
            has_duty = await tx.duties.take(_DUTY, self._server_id, lasts=_DUTY_LASTS)
        if differing := sorted(one for one, its in others.items() if its != self._prices):
            logged_at = self._differed_at
            if logged_at is None or self._clock.monotonic() - logged_at >= _TELL_EVERY_S:
                self._differed_at = self._clock.monotonic()
                log.error(
                    "other servers have other prices: %s; nothing is charged until billing.prices "
                    "is the same on all of them",
                    ", ".join(differing),
                )
            return False
        self._differed_at = None
        is_known = known is not None and known.latest == self._prices
        if not has_duty or (is_known and known is not None and known.entries[-1][0] <= now):
            return has_duty
        async with self._store.write(Turn.ALONE) as tx:
            # Written while the clock was ahead: they would hold only from then on.
            await tx.prices.forget(after=now)
            known = await tx.prices.history()
            if known is None:
                await tx.prices.add(self._prices, since=_EPOCH)
            elif known.latest != self._prices:
                await tx.prices.add(self._prices, since=max(now, known.entries[-1][0] + _TICK))
                log.warning("the prices have changed; what is in use continues with the new ones")
        return True

    async def _reopen(self, org_id: str, prices: PriceList) -> None:
        """Have what is in use begin anew at the last change of prices, in bounded steps: estimates
        of what is owed use the latest prices alone."""
        at = prices.changed_at
        if at is None or at > self._clock.now() or self._reopened.get(org_id) == at:
            return
        for reopen in (_reopen_usage, _reopen_storage):
            count = _PAGE
            while count == _PAGE:
                async with self._store.write(org_id) as tx:
                    count = await reopen(tx, org_id, at)
        self._reopened[org_id] = at

    async def _look_at(self, org_id: str) -> float:
        """Charge one organization, and react to its balance."""
        reading = await self.charge(org_id, posts=self._is_due(org_id))
        if org_id in self._topping:
            return _PERIOD_S
        if (wish := await self._wish_due(reading)) is not None:
            # It may take minutes, and nothing else waits for it.
            self._topping.add(org_id)
            work = self._top_up(wish)
            if self._tasks is None:
                await work
            else:
                self._tasks.create_task(work)
            return _PERIOD_S
        if not self._enforces or reading.hourly == 0:
            return _PERIOD_S
        if reading.left > 0:
            return reading.left / reading.hourly * 3600
        reading = await self.charge(org_id)
        if reading.left <= 0:
            await self._stop(org_id)
        return _PERIOD_S

    def _is_due(self, org_id: str) -> bool:
        """Tell whether a ledger entry is due."""
        now = self._clock.monotonic()
        last = self._posted_at.get(org_id)
        if last is not None and now - last < _POST_EVERY_S:
            return False
        self._posted_at[org_id] = now
        return True

    async def charge(self, org_id: str, *, posts: bool = True) -> Balance:
        """Deduct uncharged usage from an account; with `posts` also write whole cents to the
        ledger."""
        async with self._store.glance() as tx:
            prices = await tx.prices.history() or PriceList.always(self._prices)
        await self._reopen(org_id, prices)
        while await self._settle_some(org_id, prices):
            pass
        now = self._clock.now()
        async with self._store.write(org_id) as tx:
            compute = _computed(await tx.usage.unsettled(org_id), prices, now)
            storage = _stored(await tx.storage.unsettled(org_id), prices, now)
            account = await tx.credits.account(org_id)
            used = account.carried + compute.added + storage.added
            left = account.balance_cents * MICROS - used
            # Without usage, this account may not be looked at again for long.
            is_last = not compute.going and not storage.going
            is_full = (posts or is_last) and abs(used) >= MICROS
            if not is_full:
                # What is open is written when it fills a line of the ledger.
                compute, storage = compute.ended(), storage.ended()
            if compute.periods or storage.periods or is_full:
                await tx.usage.charge(compute.periods)
                await tx.storage.charge(storage.periods)
                carried = account.carried + compute.added + storage.added
                account = replace(account, carried=carried)
                if is_full:
                    resource = "sandbox" if compute.added >= storage.added else "storage"
                    account = await _post(tx, account, resource=resource, at=now)
                await tx.credits.save(account)
        hourly = sum(self._prices.hour_of(one.shape) for one in compute.going)
        return Balance(account, left, hourly)

    async def _settle_some(self, org_id: str, prices: PriceList) -> bool:
        """If very much has ended since the last time, charge a part of it, and return True: one
        transaction must not take long, however many periods there are."""
        now = self._clock.now()
        async with self._store.write(org_id) as tx:
            compute = _computed(await tx.usage.ended(org_id, most=_PAGE), prices, now)
            storage = _stored(await tx.storage.ended(org_id, most=_PAGE), prices, now)
            if max(len(compute.periods), len(storage.periods)) < _PAGE:
                return False
            await tx.usage.charge(compute.periods)
            await tx.storage.charge(storage.periods)
            account = await tx.credits.account(org_id)
            carried = account.carried + compute.added + storage.added
            await tx.credits.save(replace(account, carried=carried))
        return True

    async def _stop(self, org_id: str) -> None:
        """Pause every charged sandbox of an organization."""
        query = SandboxQuery(org_id, _PAGE, statuses=frozenset({Status.RUNNING}), is_test=False)
        async with self._store.read() as tx:
            running = await tx.sandboxes.page(query)
        paused = 0
        for sandbox in running:
            if self._failed_lately(sandbox):
                continue
            try:
                if await self._lifecycle.apply(sandbox, Event.PAUSE, reason=EXHAUSTED):
                    paused += 1
            except ConflictError:
                continue  # it was settled meanwhile
        now = self._clock.monotonic()
        if paused and now - self._paused_logged_at.get(org_id, -_TELL_EVERY_S) >= _TELL_EVERY_S:
            self._paused_logged_at[org_id] = now
            log.warning(
                "credits are used up; pausing the organization's sandboxes",
                extra={"org_id": org_id},
            )
            await self._tell(
                org_id,
                "billing.exhausted",
                "Credits are used up",
                summary=f"{paused} running sandboxes are being paused",
                severity="warning",
            )

    def _failed_lately(self, sandbox: Sandbox) -> bool:
        """Tell whether a pause has failed recently and would fail again."""
        at = sandbox.last_activity_at
        is_failed = sandbox.last_activity_kind == "pause_failed" and at is not None
        return is_failed and at is not None and self._clock.now() - at < _PAUSE_AGAIN

    async def _wish_due(self, reading: Balance) -> AutoTopup | None:
        """Return the automatic top-up that is due now, and store that it was requested."""
        org_id, now = reading.account.org_id, self._clock.now()
        async with self._store.write(org_id) as tx:
            wish = await tx.credits.auto_topup(org_id)
            is_due = wish.last_at is None or now - wish.last_at >= _TOPUP_EVERY
            if wish.customer_id is None or not is_due:
                return None
            pending = wish.pending
            if pending is not None and now - pending.since > _KEY_LIVES:
                # The provider no longer knows the key: another request could charge twice.
                log.error(
                    "the outcome of a top-up was never reported; not repeating it",
                    extra={"org_id": org_id},
                )
                await tx.credits.save_auto_topup(replace(wish, pending=None, last_at=now))
                return None
            if pending is None:
                if not wish.is_enabled or reading.left >= wish.threshold_cents * MICROS:
                    return None
                pending = PendingTopup(f"{KEY_PREFIX}{new_uuid()}", wish.amount_cents, now)
            wish = replace(wish, last_at=now, pending=pending)
            await tx.credits.save_auto_topup(wish)
        return wish

    async def _top_up(self, wish: AutoTopup) -> None:
        """Request a stored top-up. Its outcome may be reported later."""
        try:
            await self._charge_card(wish)
        except SandyardError as error:
            log.warning("the outcome of a top-up is unknown: %s", error.message)
        except Exception:  # it runs concurrently with the meter, and must not end it
            log.exception("unexpected error during a top-up; its outcome is unknown")
        finally:
            self._topping.discard(wish.org_id)

    async def _charge_card(self, wish: AutoTopup) -> None:
        assert wish.pending is not None
        assert wish.customer_id is not None
        org_id = wish.org_id
        try:
            payment = await self._payments.charge(
                org_id=org_id,
                customer_id=wish.customer_id,
                amount_cents=wish.pending.cents,
                key=wish.pending.key,
            )
        except ConflictError as error:
            log.warning("a top-up was refused: %s", error.message, extra={"org_id": org_id})
            async with self._store.write(org_id) as tx:
                await end_pending(tx, org_id, wish.pending.key)
            await self._tell(
                org_id,
                "billing.topup_failed",
                "Automatic top-up failed",
                summary=error.message,
                severity="error",
            )
            return
        if payment.is_paid:
            async with self._store.write(payment.org_id) as tx:
                await take_payment(tx, payment, at=self._clock.now(), is_automatic=True)

    async def _tell(
        self, org_id: str, event: str, title: str, *, summary: str, severity: str
    ) -> None:
        async with self._store.write(Turn.SHARED) as tx:
            await tx.activity.append(
                line(
                    event,
                    title,
                    org_id=org_id,
                    actor=None,
                    resource_id=org_id,
                    at=self._clock.now(),
                    summary=summary,
                    severity=severity,
                )
            )


@dataclass(frozen=True)
class _Charged(Generic[_P]):
    """Periods after charging, and by how much each was charged. `going` are open and cost
    something."""

    periods: Sequence[_P]
    costs: Sequence[int]
    going: Sequence[_P]

    @property
    def added(self) -> int:
        """By how much they were charged together."""
        return sum(self.costs)

    def ended(self) -> "_Charged[_P]":
        """Return those that have ended."""
        chosen = [
            (one, cost)
            for one, cost in zip(self.periods, self.costs, strict=True)
            if one.is_settled
        ]
        return _Charged([one for one, _ in chosen], [cost for _, cost in chosen], self.going)


def _computed(
    periods: Sequence[UsagePeriod], prices: PriceList, now: datetime
) -> _Charged[UsagePeriod]:
    return _charged(periods, now, lambda one, end: prices.compute(one.shape, one.started_at, end))


def _stored(
    periods: Sequence[StoragePeriod], prices: PriceList, now: datetime
) -> _Charged[StoragePeriod]:
    return _charged(
        periods, now, lambda one, end: prices.storage(one.size_bytes, one.started_at, end)
    )


def _charged(
    periods: Sequence[_P], now: datetime, cost: Callable[[_P, datetime], int]
) -> _Charged[_P]:
    changed, costs, going = [], [], []
    for one in periods:
        total = 0
        if not one.is_free:
            total = cost(one, one.ended_at or now)
            if one.ended_at is None:
                going.append(one)
        costs.append(total - one.posted)
        changed.append(replace(one, posted=total, is_settled=one.ended_at is not None))
    return _Charged(changed, costs, going)


async def _post(tx: Transaction, account: Account, *, resource: str, at: datetime) -> Account:
    """Move whole cents of the carried amount to the ledger, and return the account."""
    # Rounded towards zero: less than a cent is carried over.
    cents = int(abs(account.carried) // MICROS) * (1 if account.carried > 0 else -1)
    account = replace(
        account,
        carried=account.carried - cents * MICROS,
        balance_cents=account.balance_cents - cents,
        used_cents=account.used_cents + cents,
    )
    if cents:
        await tx.credits.post(
            LedgerEntry(
                id=new_uuid(),
                org_id=account.org_id,
                # Negative only if a clock was set back after more had been charged.
                type="usage" if cents > 0 else "adjustment",
                amount_cents=-cents,
                resource=resource,
                description="Usage" if cents > 0 else "Usage charged too early",
                reference_id=None,
                balance_after_cents=account.balance_cents,
                created_at=at,
            )
        )
    return account


async def _reopen_usage(tx: Transaction, org_id: str, at: datetime) -> int:
    return await tx.usage.reopen(org_id, at, most=_PAGE)


async def _reopen_storage(tx: Transaction, org_id: str, at: datetime) -> int:
    return await tx.storage.reopen(org_id, at, most=_PAGE)
