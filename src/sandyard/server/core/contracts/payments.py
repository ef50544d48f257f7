"""What is asked of a payment provider."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Checkout:
    """A page of the payment provider's on which one amount is paid."""

    url: str
    session_id: str


KEY_PREFIX = "topup-"
"""How the keys of automatic top-ups begin, of which their payments tell."""


@dataclass(frozen=True)
class Payment:
    """An amount that was paid. `reference` is the provider's, the same however often it is told.

    One that is not `is_paid` yet is told of later, if it ever is. One that `is_automatic` has the
    `key` that it was asked for with, but where a version before asked for it.
    """

    org_id: str
    amount_cents: int
    reference: str
    customer_id: str | None
    is_paid: bool = True
    is_automatic: bool = False
    key: str | None = None


@dataclass(frozen=True)
class Reversal:
    """What went back of one payment to whoever paid, in all, as of now: by refunds, or by a dispute
    for as long as it is open or lost. `reference` is the provider's, the same however often it is
    told; the amount may be less later, where a refund fails or a dispute is won."""

    org_id: str
    amount_cents: int
    reference: str
    is_dispute: bool


class Payments(Protocol):
    """The payment provider."""

    async def check_out(
        self, *, org_id: str, amount_cents: int, success_url: str, cancel_url: str
    ) -> Checkout:
        """Return a page on which an organization pays an amount.

        Raises:
            InvalidArgumentError: the provider does not take what was asked.
            UnavailableError: the provider is not set up or does not answer.
        """
        ...

    async def charge(
        self, *, org_id: str, customer_id: str, amount_cents: int, key: str
    ) -> Payment:
        """Charge the card that a customer saved; asked twice with one key, once.

        Raises:
            ConflictError: the charge was refused for good.
            UnavailableError: the provider is not set up or does not answer: what became of the
                charge is not known, and is found out by asking again with the same key.
        """
        ...

    async def read_event(self, payload: bytes, signature: str) -> Payment | Reversal | None:
        """Return the payment, or what went back of one, that the provider tells of; None for
        anything else.

        Events come in any order, so what went back is asked of the provider as of now.

        Raises:
            InvalidTokenError: it is not signed by the provider, or too old.
            UnavailableError: the provider is not set up, or does not answer.
        """
        ...
