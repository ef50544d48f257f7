"""Checks plan limits and credits."""

from collections.abc import Mapping
from datetime import timedelta

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Transaction
from sandyard.server.core.errors import (
    InvalidArgumentError,
    LimitReachedError,
    QuotaExceededError,
)
from sandyard.server.core.money import Account, Prices, cents_up, show
from sandyard.server.core.plans import Plan
from sandyard.server.core.records import InUse
from sandyard.server.core.shapes import NOTHING, Shape, format_size
from sandyard.server.service.actor import Actor, plan_of


class Quota:
    """Checks before anything is started, in the transaction that stores the request."""

    def __init__(
        self,
        *,
        clock: Clock,
        plans: Mapping[str, Plan],
        prices: Prices,
        enforces: bool,
    ) -> None:
        self._clock = clock
        self._plans = plans
        self._prices = prices
        self._enforces = enforces

    def check_shape(self, actor: Actor, shape: Shape) -> None:
        """Refuse a sandbox that exceeds an organization's total limits on its own.

        Raises:
            InvalidArgumentError: it does; `facts` name the field and the limit.
        """
        plan = plan_of(self._plans, actor)
        for what, asked, limit, shown in (
            ("vcpus", shape.vcpus, plan.vcpus, f"{plan.vcpus} vCPUs"),
            ("memory", shape.memory_mib, _mib(plan.memory_gb), f"{plan.memory_gb}GB of memory"),
            ("disk", shape.disk_mib, _mib(plan.disk_gb), f"{plan.disk_gb}GB of disk"),
        ):
            if limit is not None and asked > limit:
                raise InvalidArgumentError(
                    f"cannot give a sandbox so much {what}: the organization's plan allows "
                    f"{shown} in all",
                    field=f"resources.{what}",
                    limit=limit,
                )

    async def check_new(
        self, tx: Transaction, actor: Actor, shape: Shape, *, count: int = 1
    ) -> None:
        """Refuse new sandboxes beyond the plan's limits or the credits.

        Raises:
            LimitReachedError: a limit of the plan is reached; `facts` name it.
            QuotaExceededError: the credits do not suffice for about an hour.
        """
        used, account = await tx.credits.position(actor.org_id, self._clock.now())
        self._check_plan(used, actor, shape, count=count, is_new=True)
        if not actor.is_test:
            self._check_credits(used, account, shape, count=count)

    async def check_resume(
        self, tx: Transaction, actor: Actor, shape: Shape, *, is_test: bool
    ) -> None:
        """Refuse to start a sandbox again. See `check_new`."""
        used, account = await tx.credits.position(actor.org_id, self._clock.now())
        self._check_plan(used, actor, shape, count=1, is_new=False)
        if not is_test:
            self._check_credits(used, account, shape, count=1)

    async def check_snapshot(
        self, tx: Transaction, actor: Actor, shape: Shape, *, is_test: bool
    ) -> None:
        """Refuse another snapshot beyond the plan's limits or the credits.

        Its size is not known in advance, so the credits must cover an hour of the largest possible
        size. See `check_snapshot_size` for the actual size.

        Raises:
            LimitReachedError: a limit of the plan is reached.
            QuotaExceededError: the credits do not suffice.
        """
        plan = plan_of(self._plans, actor)
        kept = await tx.snapshots.kept(actor.org_id)
        for name, has, limit in (
            ("snapshots", kept.count, plan.snapshots),
            ("test_snapshots", kept.tests if is_test else None, plan.test_snapshots),
        ):
            if limit is not None and has is not None and has >= limit:
                raise _too_many_snapshots(name, allowed=limit, used=has)
        _check_snapshot_bytes(plan, kept.size_bytes + 1)
        if is_test or not self._enforces:
            return
        used, account = await tx.credits.position(actor.org_id, self._clock.now())
        left = account.left - max(0, self._prices.used(used.owed) - used.posted)
        size_bytes = (shape.memory_mib + shape.disk_mib) * 2**20
        price = self._prices.storage(size_bytes, timedelta(hours=1))
        hourly = self._prices.hour_of(used.paid)
        if left <= 0 or left < price + hourly:
            raise QuotaExceededError(
                "cannot pay for this: an hour of a snapshot of up to "
                f"{format_size(size_bytes >> 20)} costs {show(cents_up(price))}, "
                f"and the balance is {show(account.balance_cents)}",
                price_cents=cents_up(price),
                running_cents=cents_up(hourly),
                balance_cents=account.balance_cents,
            )

    async def check_snapshot_size(self, tx: Transaction, actor: Actor, size_bytes: int) -> None:
        """Refuse a finished snapshot that exceeds the plan's total size.

        Raises:
            LimitReachedError: it does.
        """
        kept = await tx.snapshots.kept(actor.org_id)
        _check_snapshot_bytes(plan_of(self._plans, actor), kept.size_bytes + size_bytes)

    async def check_going_on(self, tx: Transaction, actor: Actor, *, is_test: bool) -> None:
        """Refuse to stop a running sandbox for a restart that could not be paid for."""
        if not is_test:
            used, account = await tx.credits.position(actor.org_id, self._clock.now())
            self._check_credits(used, account, NOTHING, count=0)

    def _check_plan(
        self, used: InUse, actor: Actor, shape: Shape, *, count: int, is_new: bool
    ) -> None:
        plan = plan_of(self._plans, actor)
        added_disk = shape.disk_mib * count if is_new else 0
        is_test = actor.is_test and is_new
        for name, has, wants, limit in (
            ("sandboxes", used.active, count, plan.sandboxes),
            ("vcpus", used.vcpus, shape.vcpus * count, plan.vcpus),
            ("memory_gb", used.memory_mib, shape.memory_mib * count, _mib(plan.memory_gb)),
            ("disk_gb", used.disk_mib, added_disk, _mib(plan.disk_gb)),
            ("test_sandboxes", used.tests, count if is_test else 0, plan.test_sandboxes),
        ):
            if limit is not None and wants and has + wants > limit:
                per = 1024 if name.endswith("_gb") else 1
                # Disks, and what test keys make, count until they are deleted.
                way = "delete" if name in ("disk_gb", "testSandboxes") else "pause or delete"
                raise LimitReachedError(
                    f"cannot start this: the organization's plan allows {limit // per} {{limit}}, "
                    f"and {has / per:g} are in use; {way} some, or ask an operator for a higher "
                    "limit",
                    limit=name,
                    allowed=limit // per,
                    used=int(has / per),
                )

    def _check_credits(self, used: InUse, account: Account, shape: Shape, *, count: int) -> None:
        if not self._enforces:
            return
        owed = self._prices.used(used.owed) - used.posted
        left = account.left - max(0, owed)
        hourly = self._prices.hour_of(used.paid)
        price = self._prices.hour_of(shape) * count
        if left < price + hourly:
            besides = ""
            if hourly:
                besides = f", what runs already costs {show(cents_up(hourly))} in that hour"
            raise QuotaExceededError(
                f"cannot pay for this: an hour of {count} x {shape.vcpus} vCPUs and "
                f"{format_size(shape.memory_mib)} costs {show(cents_up(price))}{besides}, and the "
                f"balance is {show(account.balance_cents)}",
                price_cents=cents_up(price),
                running_cents=cents_up(hourly),
                balance_cents=account.balance_cents,
            )


def _check_snapshot_bytes(plan: Plan, size_bytes: int) -> None:
    if plan.snapshot_gb is not None and size_bytes > plan.snapshot_gb * 2**30:
        raise _too_many_snapshots("snapshot_gb", allowed=plan.snapshot_gb, used=size_bytes >> 30)


def _too_many_snapshots(name: str, *, allowed: int, used: int) -> LimitReachedError:
    return LimitReachedError(
        f"cannot keep this snapshot: the organization's plan allows {allowed} {{limit}}; delete "
        "some, or ask an operator for a higher limit",
        limit=name,
        allowed=allowed,
        used=used,
    )


def _mib(gb: int | None) -> int | None:
    return None if gb is None else gb * 1024
