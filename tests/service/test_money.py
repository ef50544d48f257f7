"""Money below HTTP: what is charged, refused and stopped, by a clock that the test drives."""

from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
from tests.support.desk import Desk, member_of, open_desk

from sandyard.server.core.errors import (
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
    QuotaExceededError,
    UnavailableError,
)
from sandyard.server.core.ids import new_uuid
from sandyard.server.core.states import Status
from sandyard.server.service.money.billing import TOPUP_MIN
from sandyard.server.service.sandboxes.create import NewSandbox

HOUR = timedelta(hours=1)
URL = "https://example.org/done"


@pytest.fixture
async def desk(tmp_path: Path) -> AsyncIterator[Desk]:
    async with open_desk(tmp_path) as opened:
        yield opened


async def charge(desk: Desk) -> None:
    await desk.control.meter.charge_all()


async def balance(desk: Desk) -> int:
    account, _ = await desk.services.billing.credits(desk.actor)
    return account.balance_cents


async def spend_all_but(desk: Desk, cents: int) -> None:
    operator = replace(desk.actor, is_operator=True)
    await desk.services.billing.grant(
        operator, 1, org_id=None, description="a cent", reference_id=None
    )
    async with desk.control.store.write(desk.actor.org_id) as tx:
        account = await tx.credits.account(desk.actor.org_id)
        await tx.credits.save(replace(account, balance_cents=cents))


async def test_what_runs_is_charged_by_the_hour_and_what_is_paused_by_its_storage(
    desk: Desk,
) -> None:
    box = await desk.create(idle_timeout=0)
    before = await balance(desk)
    hourly = (await desk.services.billing.cost(desk.actor, box.id))[3]
    desk.clock.time += HOUR
    await charge(desk)
    _, used, kept, _ = await desk.services.billing.cost(desk.actor, box.id)
    assert used.micros == pytest.approx(hourly, rel=1e-3)
    assert used.seconds == pytest.approx(3600, abs=5)
    assert kept.micros == 0
    assert before - await balance(desk) == used.micros // 1_000_000
    await desk.services.sandboxes.pause(desk.actor, box.id)
    await desk.until(box, Status.PAUSED)
    _, paused, _, hourly_paused = await desk.services.billing.cost(desk.actor, box.id)
    desk.clock.time += HOUR
    _, later, kept, _ = await desk.services.billing.cost(desk.actor, box.id)
    assert later.micros == paused.micros
    assert kept.micros == pytest.approx(hourly_paused, abs=2)
    assert hourly_paused < hourly


async def test_each_hour_is_charged_once_however_often_it_is_charged(desk: Desk) -> None:
    box = await desk.create(idle_timeout=0)
    desk.clock.time += 10 * HOUR
    for _ in range(5):
        await charge(desk)
    _, used, _, _ = await desk.services.billing.cost(desk.actor, box.id)
    entries = await desk.services.billing.history(desk.actor, limit=100)
    posted = -sum(one.amount_cents for one in entries if one.amount_cents < 0)
    assert posted == used.micros // 1_000_000
    assert len([one for one in entries if one.amount_cents < 0]) == 1


async def test_a_create_that_cannot_be_paid_for_an_hour_is_refused_with_the_figures(
    desk: Desk,
) -> None:
    await spend_all_but(desk, 1)
    with pytest.raises(QuotaExceededError) as caught:
        await desk.services.creation.create(
            desk.actor, NewSandbox(template="base-minimal", vcpus=32)
        )
    assert caught.value.facts["balance_cents"] == 1
    assert int(caught.value.facts["price_cents"]) > 1
    assert not desk.node.machines


async def test_what_runs_is_paused_when_the_credits_are_used_up_and_kept(desk: Desk) -> None:
    box = await desk.create(idle_timeout=0)
    await spend_all_but(desk, 1)
    desk.clock.time += 10 * HOUR
    await charge(desk)
    stopped = await desk.until(box, Status.PAUSED)
    assert stopped.reason is not None
    assert stopped.reason.code == "insufficient_credits"
    with pytest.raises(QuotaExceededError):
        await desk.services.sandboxes.resume(desk.actor, box.id)
    operator = replace(desk.actor, is_operator=True)
    await desk.services.billing.grant(
        operator, 10_000, org_id=None, description="more", reference_id=None
    )
    await desk.services.sandboxes.resume(desk.actor, box.id)
    await desk.until(box, Status.RUNNING)


async def test_a_grant_with_a_reference_is_made_once(desk: Desk) -> None:
    operator, billing = replace(desk.actor, is_operator=True), desk.services.billing
    before = await balance(desk)

    async def grant(cents: int, reference: str | None) -> str:
        entry = await billing.grant(
            operator, cents, org_id=None, description="invoice", reference_id=reference
        )
        return entry.id

    assert await grant(500, "17") == await grant(500, "17")
    assert await balance(desk) == before + 500
    with pytest.raises(InvalidArgumentError) as caught:
        await grant(600, "17")
    assert caught.value.facts["field"] == "reference_id"
    assert await grant(500, None) != await grant(500, None)
    assert await balance(desk) == before + 1500


@pytest.mark.parametrize(
    ("cents", "changes", "field"),
    [
        (0, {}, "amount_cents"),
        (-5, {}, "amount_cents"),
        (10**15, {}, "amount_cents"),
        (5, {"description": ""}, "description"),
        (5, {"reference_id": "x" * 10_000}, "reference_id"),
    ],
)
async def test_a_grant_that_cannot_be_is_refused_by_field(
    desk: Desk, cents: int, changes: dict[str, str], field: str
) -> None:
    operator = replace(desk.actor, is_operator=True)
    given = {"description": "d", "reference_id": None, **changes}
    with pytest.raises(InvalidArgumentError) as caught:
        await desk.services.billing.grant(operator, cents, org_id=None, **given)  # type: ignore[arg-type]  # one dictionary for both
    assert caught.value.facts["field"] == field


async def test_only_operators_grant_and_only_admins_buy(desk: Desk) -> None:
    billing = desk.services.billing
    with pytest.raises(PermissionDeniedError) as caught:
        await billing.grant(desk.actor, 5, org_id=None, description="d", reference_id=None)
    assert caught.value.facts["required_role"] == "operator"
    member = member_of(desk.actor, new_uuid())
    with pytest.raises(PermissionDeniedError) as caught:
        await billing.check_out(member, TOPUP_MIN, success_url=URL, cancel_url=URL)
    assert caught.value.facts["required_role"] == "admin"
    operator = replace(desk.actor, is_operator=True)
    with pytest.raises(NotFoundError) as absent:
        await billing.grant(operator, 5, org_id=new_uuid(), description="d", reference_id=None)
    assert absent.value.facts["field"] == "org_id"


@pytest.mark.parametrize(
    ("cents", "urls", "field"),
    [
        (1, (URL, URL), "amount_cents"),
        (TOPUP_MIN, ("ftp://x", URL), "success_url"),
        (TOPUP_MIN, (URL, ""), "cancel_url"),
    ],
)
async def test_a_top_up_that_cannot_be_is_refused_by_field(
    desk: Desk, cents: int, urls: tuple[str, str], field: str
) -> None:
    with pytest.raises(InvalidArgumentError) as caught:
        await desk.services.billing.check_out(
            desk.actor, cents, success_url=urls[0], cancel_url=urls[1]
        )
    assert caught.value.facts["field"] == field


async def test_without_a_provider_nothing_is_bought_and_nothing_topped_up(desk: Desk) -> None:
    billing = desk.services.billing
    with pytest.raises(UnavailableError):
        await billing.check_out(desk.actor, TOPUP_MIN, success_url=URL, cancel_url=URL)
    with pytest.raises(ConflictError, match="no card"):
        await billing.set_auto_topup(
            desk.actor, is_enabled=True, threshold_cents=None, amount_cents=None
        )
    assert not (await billing.auto_topup(desk.actor)).is_enabled


async def test_a_member_sees_own_usage_and_an_admin_all(desk: Desk) -> None:
    await desk.create(idle_timeout=0)
    desk.clock.time += HOUR
    member, billing = member_of(desk.actor, new_uuid()), desk.services.billing
    assert (await billing.usage(member, "7d", wants_all=False)).total.micros == 0
    with pytest.raises(PermissionDeniedError):
        await billing.usage(member, "7d", wants_all=True)
    everything = await billing.usage(desk.actor, "7d", wants_all=True)
    assert everything.total.micros > 0
    assert len(everything.sandboxes) == 1


async def test_what_a_test_key_makes_costs_nothing(desk: Desk) -> None:
    tester = replace(desk.actor, is_test=True)
    wish = NewSandbox(template="base-minimal", idle_timeout=0)
    box = await desk.services.creation.create(tester, wish)
    await desk.until(box, Status.RUNNING)
    before = await balance(desk)
    desk.clock.time += 10 * HOUR
    await charge(desk)
    assert await balance(desk) == before
    assert (await desk.services.billing.cost(tester, box.id))[3] == 0
