"""Stripe, by its own library. See core.contracts.payments.Payments."""

import json
import logging
from typing import Any

import stripe
from typing_extensions import override

from sandyard.server.core.contracts.payments import (
    KEY_PREFIX,
    Checkout,
    Payment,
    Payments,
    Reversal,
)
from sandyard.server.core.errors import (
    ConflictError,
    InvalidArgumentError,
    InvalidTokenError,
    UnavailableError,
)
from sandyard.server.core.money import show

log = logging.getLogger(__name__)

_LIMIT_S = 20.0
_TOLERANCE_S = 300
_AUTOMATIC = "auto-topup"
_CHARGED = "payment_intent.succeeded"
_REFUNDED = (
    "charge.refunded", "charge.refund.updated", "refund.created", "refund.updated", "refund.failed",
)  # fmt: skip
_DISPUTED = "charge.dispute."
# An inquiry (warning_…) takes no money yet.
_WITHHELD = frozenset({"needs_response", "under_review", "lost"})
_PAID = ("checkout.session.completed", "checkout.session.async_payment_succeeded")


class NoPayments(Payments):
    """Used when no provider is configured: refuses everything and says what to do."""

    @override
    async def check_out(
        self, *, org_id: str, amount_cents: int, success_url: str, cancel_url: str
    ) -> Checkout:
        raise _not_set_up()

    @override
    async def charge(
        self, *, org_id: str, customer_id: str, amount_cents: int, key: str
    ) -> Payment:
        raise _not_set_up()

    @override
    async def read_event(self, payload: bytes, signature: str) -> Payment | Reversal | None:
        raise _not_set_up()


class StripePayments(Payments):
    """See core.contracts.payments.Payments."""

    def __init__(
        self, secret: str, *, webhook_secret: str | None, currency: str, api: str | None = None
    ) -> None:
        self._http: Any = stripe.HTTPXClient(timeout=_LIMIT_S)  # its methods have no types
        self._client = stripe.StripeClient(
            secret,
            base_addresses={"api": api} if api else {},
            http_client=self._http,
            max_network_retries=2,
        )
        self._webhook_secret = webhook_secret
        self._currency = currency

    async def close(self) -> None:
        """Close the connections."""
        await self._http.close_async()

    @override
    async def check_out(
        self, *, org_id: str, amount_cents: int, success_url: str, cancel_url: str
    ) -> Checkout:
        try:
            made = await self._client.v1.checkout.sessions.create_async(
                {
                    "mode": "payment",
                    "success_url": success_url,
                    "cancel_url": cancel_url,
                    "client_reference_id": org_id,
                    "metadata": {"org_id": org_id},
                    # So that an automatic top-up can use the same card.
                    "customer_creation": "always",
                    "payment_intent_data": {
                        "setup_future_usage": "off_session",
                        # For the charge, so that a refund of it finds its organization.
                        "metadata": {"org_id": org_id},
                    },
                    "line_items": [
                        {
                            "quantity": 1,
                            "price_data": {
                                "currency": self._currency,
                                "unit_amount": amount_cents,
                                "product_data": {"name": f"Credits: {show(amount_cents)}"},
                            },
                        }
                    ],
                }
            )
        except stripe.InvalidRequestError as error:
            raise InvalidArgumentError(
                f"the payment provider does not take this: {error.user_message or error}"
            ) from error
        except stripe.StripeError as error:
            raise _failed(error) from error
        if not made.url:
            raise UnavailableError("the payment provider's response contains no payment page")
        return Checkout(made.url, made.id)

    @override
    async def charge(
        self, *, org_id: str, customer_id: str, amount_cents: int, key: str
    ) -> Payment:
        try:
            methods = await self._client.v1.customers.payment_methods.list_async(
                customer_id, {"limit": 1, "type": "card"}
            )
            if not methods.data:
                raise ConflictError("the organization has saved no card")
            paid = await self._client.v1.payment_intents.create_async(
                {
                    "amount": amount_cents,
                    "currency": self._currency,
                    "customer": customer_id,
                    "payment_method": methods.data[0].id,
                    "off_session": True,
                    "confirm": True,
                    "metadata": {"org_id": org_id, "kind": _AUTOMATIC} | _key_metadata(key),
                },
                {"idempotency_key": key},
            )
        except (stripe.CardError, stripe.InvalidRequestError) as error:
            raise ConflictError(
                f"the charge was refused: {error.user_message or 'no reason given'}"
            ) from error
        except stripe.StripeError as error:
            raise _failed(error) from error
        if paid.status not in ("succeeded", "processing"):
            raise ConflictError(f"the charge did not succeed: it is {paid.status}")
        return Payment(
            org_id,
            amount_cents,
            paid.id,
            customer_id,
            is_paid=paid.status == "succeeded",
            is_automatic=True,
            key=key,
        )

    @override
    async def read_event(self, payload: bytes, signature: str) -> Payment | Reversal | None:
        if self._webhook_secret is None:
            raise _not_set_up("billing.stripe_webhook_secret")
        try:
            self._client.construct_event(payload, signature, self._webhook_secret, _TOLERANCE_S)
        except (ValueError, stripe.SignatureVerificationError) as error:
            raise InvalidTokenError(
                "cannot accept this event: it is not signed by the payment provider, or too old"
            ) from error
        event = json.loads(payload)
        subject = event["data"]["object"]
        if event["type"] in _REFUNDED:
            return await self._refunded(
                subject["id" if subject["object"] == "charge" else "charge"]
            )
        if event["type"].startswith(_DISPUTED):
            return await self._disputed(subject["id"])
        return self._paid(event)

    async def _refunded(self, charge_id: str) -> Reversal | None:
        """Return the refunded part of a charge, if the charge is one of ours."""
        try:
            charge = await self._client.v1.charges.retrieve_async(charge_id)
            org_id = await self._org_of(charge)
        except stripe.StripeError as error:
            raise _failed(error) from error
        if org_id is None:
            return None
        return Reversal(org_id, charge.amount_refunded, charge.id, is_dispute=False)

    async def _disputed(self, dispute_id: str) -> Reversal | None:
        """Return the disputed amount, if the dispute is about one of our charges."""
        try:
            dispute = await self._client.v1.disputes.retrieve_async(dispute_id)
            charge_id = dispute.charge if isinstance(dispute.charge, str) else dispute.charge.id
            org_id = await self._org_of(await self._client.v1.charges.retrieve_async(charge_id))
        except stripe.StripeError as error:
            raise _failed(error) from error
        if org_id is None:
            return None
        amount = dispute.amount if dispute.status in _WITHHELD else 0
        return Reversal(org_id, amount, dispute.id, is_dispute=True)

    async def _org_of(self, charge: stripe.Charge) -> str | None:
        """Return the organization that a charge was credited to; None if there is none."""
        found = _org_in(charge.metadata)
        if not found and charge.payment_intent is not None:
            # A checkout of an earlier version, which stored only its session.
            intent = charge.payment_intent
            sessions = await self._client.v1.checkout.sessions.list_async(
                {"payment_intent": intent if isinstance(intent, str) else intent.id, "limit": 1}
            )
            for one in sessions.data:
                found = _org_in(one.metadata)
        if found and charge.currency != self._currency:
            log.error("cannot post a reversal: its currency is %s", charge.currency,
                      extra={"reference": charge.id})  # fmt: skip
            return None
        return found

    def _paid(self, event: Any) -> Payment | None:
        """Return the payment that an event reports."""
        subject = event["data"]["object"]
        org_id = (subject.get("metadata") or {}).get("org_id")
        key = (subject.get("metadata") or {}).get("key")
        customer = subject.get("customer")
        is_automatic = event["type"] == _CHARGED
        if is_automatic:
            # Checkouts have their own payments, with their own events.
            if (subject.get("metadata") or {}).get("kind") != _AUTOMATIC:
                return None
            amount = subject["amount_received"]
        elif event["type"] in _PAID and subject["payment_status"] == "paid":
            amount = subject["amount_total"]
        else:
            return None  # if the money arrives later, another event follows
        if subject["currency"] != self._currency or not isinstance(org_id, str):
            log.error(
                "cannot credit a payment: its currency is %s and its organization %s",
                subject["currency"],
                org_id,
                extra={"reference": subject["id"]},
            )
            return None
        return Payment(
            org_id=org_id,
            amount_cents=int(amount),
            reference=str(subject["id"]),
            customer_id=customer if isinstance(customer, str) else None,
            is_automatic=is_automatic,
            key=key if is_automatic and isinstance(key, str) else None,
        )


def _org_in(metadata: object) -> str | None:
    found = getattr(metadata, "org_id", None)
    return found if isinstance(found, str) and found else None


def _key_metadata(key: str) -> dict[str, str]:
    # A request of an earlier version is repeated unchanged: Stripe refuses the
    # same key with other parameters.
    return {"key": key} if key.startswith(KEY_PREFIX) else {}


def _not_set_up(setting: str = "billing.stripe_secret") -> UnavailableError:
    return UnavailableError(
        f"cannot take payments: none are set up on this installation (setting {setting}); an "
        "operator can grant credits with `sandyard admin grant`"
    )


def _failed(error: stripe.StripeError) -> UnavailableError:
    log.warning("the payment provider refused: %s", error)
    return UnavailableError(
        f"the payment provider did not do it: {error.user_message or 'try again later'}"
    )
