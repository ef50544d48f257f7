"""The payment provider."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Checkout:
    """A page of the payment provider on which one amount is paid."""

    url: str
    session_id: str


KEY_PREFIX = "topup-"
"""How the keys of automatic top-ups begin, of which their payments tell."""


@dataclass(frozen=True)
class Payment:
    """A payment. `reference` is the provider's, and the same in repeated events.

    If it is not `is_paid` yet, another event may follow. One that `is_automatic` has the `key` of
    its request, unless an earlier version requested it.
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
    """The total of a payment that is refunded, or held by an open or lost dispute, as of now.
    `reference` is the provider's, and the same in repeated events. The amount may decrease, if a
    refund fails or a dispute is won."""

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
            InvalidArgumentError: the provider rejected the request.
            UnavailableError: the provider is not set up, or does not answer.
        """
        ...

    async def charge(
        self, *, org_id: str, customer_id: str, amount_cents: int, key: str
    ) -> Payment:
        """Charge the card that a customer saved; idempotent by `key`.

        Raises:
            ConflictError: the charge was refused permanently.
            UnavailableError: the provider is not set up, or does not answer. The outcome of the
                charge is unknown; retry with the same key.
        """
        ...

    async def read_event(self, payload: bytes, signature: str) -> Payment | Reversal | None:
        """Return the payment or reversal that an event is about; None for other events.

        Events may arrive out of order, so a reversal is fetched from the provider as of now.

        Raises:
            InvalidTokenError: it is not signed by the provider, or too old.
            UnavailableError: the provider is not set up, or does not answer.
        """
        ...
