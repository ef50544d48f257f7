"""Top-ups by the payment provider's own library, against a stand-in of its HTTP API."""

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from tests.support.clock import AheadClock
from tests.support.house import Yard, eventually, open_yard, until
from tests.support.ports import free_port
from tests.support.stripe import (
    SECRET,
    WEBHOOK_SECRET,
    StandIn,
    charged_event,
    event_of,
    paid_event,
    signature_of,
    stripe_stand_in,
)

from sandyard.server.service.money.credits import credit

CHECKOUT = {"amountCents": 2000, "successUrl": "https://a.b/ok", "cancelUrl": "https://a.b/no"}


@pytest.fixture
def stand_in() -> Iterator[StandIn]:
    with stripe_stand_in(free_port()) as running:
        yield running


@pytest.fixture
def clock() -> AheadClock:
    return AheadClock()


@pytest.fixture
async def yard(tmp_path: Path, stand_in: StandIn, clock: AheadClock) -> AsyncIterator[Yard]:
    sections = {
        "billing": {
            "stripe_secret": SECRET, "stripe_webhook_secret": WEBHOOK_SECRET,
            "stripe_api": stand_in.url, "sign_up_cents": 100,
        }
    }  # fmt: skip
    async with open_yard(tmp_path, saves=True, clock=clock, sections=sections) as opened:
        yield opened


async def tell(yard: Yard, payload: bytes, signature: str | None = None) -> Any:
    headers = {"Stripe-Signature": signature_of(payload) if signature is None else signature}
    async with yard.client_of(None) as stranger:
        return await stranger.post("/webhooks/stripe", content=payload, headers=headers)


async def balance(yard: Yard) -> int:
    data = (await yard.client.get("/v1/billing/credits")).json()["data"]
    return int(data["balanceCents"])


async def is_balance(yard: Yard, cents: int) -> bool:
    return await balance(yard) == cents


async def is_told(yard: Yard) -> bool:
    query = {"event_type": "billing.topup_failed"}
    events = (await yard.client.get("/v1/activity", params=query)).json()["data"]["events"]
    return bool(events)


async def test_a_checkout_is_paid_and_credited_once(yard: Yard, stand_in: StandIn) -> None:
    answer = await yard.client.post("/v1/billing/topup", json=CHECKOUT)
    assert answer.json()["data"] == {
        "checkoutUrl": f"{stand_in.url}/pay/cs_1", "sessionId": "cs_1",
    }  # fmt: skip
    ((method, path, form, _),) = stand_in.asked
    org_id, _ = await yard.first()
    assert (method, path) == ("POST", "/v1/checkout/sessions")
    assert form["line_items[0][price_data][unit_amount]"] == "2000"
    assert (form["metadata[org_id]"], form["success_url"]) == (org_id, "https://a.b/ok")
    assert await balance(yard) == 100
    event = paid_event(org_id)
    answers = await asyncio.gather(*(tell(yard, event) for _ in range(5)))
    assert sorted(one.json()["credited"] for one in answers) == [False] * 4 + [True]
    assert await balance(yard) == 2100
    entry = (await yard.client.get("/v1/billing/credits/history")).json()["data"][0]
    assert (entry["type"], entry["referenceId"], entry["amountCents"]) == ("topup", "cs_1", 2000)
    # The card is saved, so that the account can be filled up by itself.
    wish = (await yard.client.get("/v1/billing/auto-topup")).json()["data"]
    assert wish["hasSavedPaymentMethod"] is True


@pytest.mark.parametrize("how", ["none", "garbage", "other secret", "old", "altered"])
async def test_an_event_that_the_provider_did_not_sign_is_refused(yard: Yard, how: str) -> None:
    event = paid_event((await yard.first())[0])
    signature = {
        "none": "",
        "garbage": "t=1,v1=00",
        "other secret": signature_of(event, secret="whsec_other"),
        "old": signature_of(event, at=time.time() - 3600),
        "altered": signature_of(event.replace(b"2000", b"1999")),
    }[how]
    answer = await tell(yard, event, signature)
    assert (answer.status_code, answer.json()["error"]["code"]) == (401, "invalid_token")
    assert await balance(yard) == 100


async def test_events_that_pay_nothing_change_nothing(yard: Yard) -> None:
    org_id, _ = await yard.first()
    for event in (
        paid_event(org_id, payment_status="unpaid"),
        paid_event(org_id, currency="eur"),
        paid_event(org_id, type="customer.created"),
        paid_event("", metadata={}, client_reference_id=None),
    ):
        answer = await tell(yard, event)
        assert answer.json() == {"received": True, "credited": False}
    unknown = "6ad0b1a5-0000-4000-8000-000000000000"
    assert (await tell(yard, paid_event(unknown))).status_code == 404
    too_large = b" " * 300_000
    assert (await tell(yard, too_large)).status_code == 413
    assert await balance(yard) == 100


async def test_a_provider_that_is_down_is_a_503(yard: Yard, stand_in: StandIn) -> None:
    stand_in.is_down = True
    answer = await yard.client.post("/v1/billing/topup", json=CHECKOUT)
    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")


async def with_card(yard: Yard) -> str:
    """Have the organization's account filled up below 50.00, from a card, and return its id."""
    org_id, _ = await yard.first()
    await tell(yard, paid_event(org_id))
    wish = {"enabled": True, "thresholdCents": 5000, "topupAmountCents": 600}
    await yard.client.put("/v1/billing/auto-topup", json=wish)
    return org_id


async def test_an_account_is_filled_up_by_itself(
    yard: Yard, stand_in: StandIn, clock: AheadClock
) -> None:
    org_id, _ = await yard.first()
    await tell(yard, paid_event(org_id))
    wish = {"enabled": True, "thresholdCents": 2090, "topupAmountCents": 600}
    assert (await yard.client.put("/v1/billing/auto-topup", json=wish)).status_code == 200
    box = await yard.create(idleTimeout=0)
    clock.ahead = timedelta(hours=1)
    await yard.house.meter.charge_all()
    await eventually(lambda: is_balance(yard, 2100 - 16 + 600))
    # Above the threshold nothing is bought.
    clock.ahead = timedelta(hours=1, minutes=15)
    await yard.house.meter.charge_all()
    await until(lambda: not yard.house.meter._topping)
    assert len(stand_in.charges) == 1
    # A card that is declined is told of, and not tried again at once.
    stand_in.declines = True
    clock.ahead = timedelta(hours=60)
    for _ in range(3):
        await yard.house.meter.charge_all()
    await eventually(lambda: is_told(yard))
    query = {"event_type": "billing.topup_failed"}
    events = (await yard.client.get("/v1/activity", params=query)).json()["data"]["events"]
    assert len(events) == 1
    assert "declined" in events[0]["summary"]
    assert (await yard.get(box))["status"] == "running"


@pytest.mark.parametrize("trouble", ["loses_answers", "is_slow"])
async def test_a_charge_whose_outcome_is_not_known_is_made_and_credited_once(
    yard: Yard, stand_in: StandIn, clock: AheadClock, trouble: str
) -> None:
    setattr(stand_in, trouble, True)
    org_id = await with_card(yard)
    # Nothing runs, and still the balance is filled up; asked for again and again, it is one charge.
    for round_ in range(3):
        clock.ahead = timedelta(minutes=11 * round_)

        async def asked(least: int = round_ + 1) -> bool:
            await yard.house.meter.charge_all()  # nothing while one is under way
            return len([one for one in stand_in.asked if "intents" in one[1]]) >= least

        await eventually(asked)
    assert len(stand_in.charges) == 1
    assert await balance(yard) == 2100
    # Another amount meanwhile changes nothing of what was asked for.
    (intent,) = stand_in.charges.values()
    event = charged_event(org_id, intent, 600)
    for _ in range(2):
        await tell(yard, event)
    assert await balance(yard) == 2700
    setattr(stand_in, trouble, False)
    other = charged_event(org_id, "pi_other", 600, kind="a checkout's own")
    assert (await tell(yard, other)).json()["credited"] is False
    query = {"event_type": "billing.topup"}
    events = (await yard.client.get("/v1/activity", params=query)).json()["data"]["events"]
    assert len(events) == 2


async def test_a_word_that_comes_again_ends_no_other_charge(
    yard: Yard, stand_in: StandIn, clock: AheadClock
) -> None:
    org_id = await with_card(yard)

    async def asked(least: int) -> bool:
        await yard.house.meter.charge_all()
        return len([one for one in stand_in.asked if "intents" in one[1]]) >= least

    await eventually(lambda: asked(1))
    await eventually(lambda: is_balance(yard, 2700))
    ((key, intent),) = stand_in.charges.items()
    # The next one's answer is lost; meanwhile the word of the first comes, late and again.
    stand_in.loses_answers = True
    clock.ahead = timedelta(minutes=11)
    await eventually(lambda: asked(2))
    await until(lambda: not yard.house.meter._topping)
    before = len(stand_in.asked)
    for _ in range(2):
        event = charged_event(org_id, intent, 600, key=key)
        assert (await tell(yard, event)).json()["credited"] is False
    stand_in.loses_answers = False
    clock.ahead = timedelta(minutes=22)
    await yard.house.meter.charge_all()
    await eventually(lambda: is_balance(yard, 3300))
    assert len(stand_in.asked) > before
    assert len(stand_in.charges) == 2, "what was asked then is the second again"


async def test_what_is_switched_off_meanwhile_stays_off(
    yard: Yard, stand_in: StandIn, clock: AheadClock
) -> None:
    await with_card(yard)
    await asyncio.gather(
        *(yard.house.meter.charge_all() for _ in range(3)),
        yard.client.put("/v1/billing/auto-topup", json={"enabled": False}),
    )
    clock.ahead = timedelta(minutes=11)
    await yard.house.meter.charge_all()
    await until(lambda: not yard.house.meter._topping)
    assert len(stand_in.charges) <= 1
    wish = (await yard.client.get("/v1/billing/auto-topup")).json()["data"]
    assert wish["enabled"] is False


def _charge(
    stand_in: StandIn, org_id: str | None, *, refunded: int = 0, currency: str = "usd"
) -> Any:
    charge = {
        "id": "ch_1", "object": "charge", "amount": 2000, "amount_refunded": refunded,
        "currency": currency, "payment_intent": "pi_9",
        "metadata": {"org_id": org_id} if org_id else {},
    }  # fmt: skip
    stand_in.objects["/v1/charges/ch_1"] = charge
    return charge


def _dispute(stand_in: StandIn, status: str) -> Any:
    dispute = {
        "id": "dp_1",
        "object": "dispute",
        "amount": 1500,
        "charge": "ch_1",
        "status": status,
    }
    stand_in.objects["/v1/disputes/dp_1"] = dispute
    return dispute


async def test_what_is_refunded_is_taken_out_once_in_whatever_order_it_is_told(
    yard: Yard, stand_in: StandIn
) -> None:
    org_id, _ = await yard.first()
    await tell(yard, paid_event(org_id))
    await yard.client.put("/v1/billing/auto-topup", json={"enabled": True, "thresholdCents": 5000})
    before = await balance(yard)
    charge = _charge(stand_in, org_id, refunded=500)
    refund = {"id": "re_1", "object": "refund", "amount": 500, "charge": "ch_1"}
    for event in (
        event_of("charge.refunded", charge), event_of("refund.created", refund),
        event_of("charge.refunded", charge),
    ):  # fmt: skip
        assert (await tell(yard, event)).status_code == 200
        assert await balance(yard) == before - 500
    # The card that was paid back is not charged for that.
    found = (await yard.client.get("/v1/billing/auto-topup")).json()["data"]
    assert found["enabled"] is False
    # What the event says is old by now: the whole was refunded since.
    _charge(stand_in, org_id, refunded=2000)
    await tell(yard, event_of("charge.refunded", charge))
    assert await balance(yard) == before - 2000
    _charge(stand_in, org_id, refunded=500)  # one of the two failed
    await tell(yard, event_of("refund.failed", refund))
    assert await balance(yard) == before - 500
    history = (await yard.client.get("/v1/billing/credits/history")).json()["data"]
    told = [(one["type"], one["amountCents"], one["description"]) for one in history[:3]]
    assert told == [
        ("refund", 1500, "Refund failed"), ("refund", -1500, "Payment refunded"),
        ("refund", -500, "Payment refunded"),
    ]  # fmt: skip
    events = (await yard.client.get("/v1/activity")).json()["data"]["events"]
    assert sum(one["eventType"] == "billing.refund" for one in events) == 3


async def test_what_is_disputed_cannot_be_spent_until_the_dispute_is_won(
    yard: Yard, stand_in: StandIn
) -> None:
    org_id, _ = await yard.first()
    await tell(yard, paid_event(org_id))
    before = await balance(yard)
    _charge(stand_in, org_id)
    for status, kind, taken in (
        ("warning_needs_response", "created", 0),  # an inquiry takes nothing
        ("needs_response", "created", 1500),
        ("under_review", "updated", 1500),
        ("needs_response", "funds_withdrawn", 1500),
        ("won", "closed", 0),
        ("won", "funds_reinstated", 0),
        ("lost", "closed", 1500),
    ):
        told = _dispute(stand_in, status)
        assert (await tell(yard, event_of(f"charge.dispute.{kind}", told))).status_code == 200
        assert await balance(yard) == before - taken, (status, kind)
    # Below nothing, nothing starts.
    spent = -(await balance(yard)) - 1
    async with yard.house.store.write(org_id) as tx:
        now = datetime.now(UTC)
        await credit(tx, org_id, "adjustment", spent, description="spent", at=now)
    answer = await yard.client.post("/v1/sandboxes", json={})
    assert answer.status_code == 402


async def test_reversals_of_others_charges_and_unknown_ones_change_nothing(
    yard: Yard, stand_in: StandIn
) -> None:
    org_id, _ = await yard.first()
    before = await balance(yard)
    path = "/v1/checkout/sessions"
    empty = {"object": "list", "data": [], "has_more": False, "url": path}
    stand_in.objects[path] = empty
    charge = _charge(stand_in, None, refunded=700)
    assert (await tell(yard, event_of("charge.refunded", charge))).json()["credited"] is False
    charge = _charge(stand_in, org_id, refunded=700, currency="eur")
    assert (await tell(yard, event_of("charge.refunded", charge))).json()["credited"] is False
    gone = event_of("charge.refunded", {**charge, "id": "ch_gone"})
    assert (await tell(yard, gone)).status_code == 503
    stand_in.is_down = True
    assert (await tell(yard, event_of("charge.refunded", charge))).status_code == 503
    stand_in.is_down = False
    assert await balance(yard) == before
    # A checkout of a version before told only its session whose it is.
    session = {"id": "cs_1", "object": "checkout.session", "metadata": {"org_id": org_id}}
    stand_in.objects[path] = {**empty, "data": [session]}
    charge = _charge(stand_in, None, refunded=700)
    assert (await tell(yard, event_of("charge.refunded", charge))).json()["credited"] is True
    assert await balance(yard) == before - 700


async def test_an_event_that_is_slow_does_not_undo_a_newer_one(
    yard: Yard, stand_in: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    org_id, _ = await yard.first()
    await tell(yard, paid_event(org_id))
    before = await balance(yard)
    charge = _charge(stand_in, org_id, refunded=500)
    payments: Any = yard.house.control.services.billing._payments
    real, looks = payments.read_event, 0
    let_go = asyncio.Event()

    async def read_event(payload: bytes, signature: str) -> Any:
        nonlocal looks
        looks += 1
        is_first = looks == 1
        found = await real(payload, signature)
        if is_first:  # what it was told is old by the time that it goes on
            await let_go.wait()
        return found

    monkeypatch.setattr(payments, "read_event", read_event)
    slow = asyncio.create_task(tell(yard, event_of("charge.refunded", charge)))
    await eventually(lambda: _is_asked(stand_in, "/v1/charges/ch_1"))
    _charge(stand_in, org_id, refunded=1000)
    await tell(yard, event_of("charge.refunded", charge))
    assert await balance(yard) == before - 1000
    let_go.set()
    assert (await slow).status_code == 200
    assert await balance(yard) == before - 1000


async def _is_asked(stand_in: StandIn, path: str) -> bool:
    return any(one[1] == path for one in stand_in.asked)
