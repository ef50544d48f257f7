"""Changes of an organization's account. Each is an entry of the ledger."""

from dataclasses import replace
from datetime import datetime

from sandyard.server.core.contracts.payments import Payment, Reversal
from sandyard.server.core.contracts.store import Transaction
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ids import new_uuid
from sandyard.server.core.records import LedgerEntry
from sandyard.server.service.lines import line

SIGN_UP = "sign-up"
"""The reference of the grant that an organization gets once."""
AMOUNT_MAX = 10**12
"""Cents; more is a mistake, and exceeds the exact integers of some clients."""


async def credit(
    tx: Transaction,
    org_id: str,
    type_: str,
    amount_cents: int,
    *,
    description: str,
    at: datetime,
    reference_id: str | None = None,
) -> tuple[LedgerEntry, bool]:
    """Post an amount to an account; negative amounts are withdrawn.

    With a reference it is posted once: a repetition returns the first entry, and False.

    Raises:
        InvalidArgumentError: the amount is 0 or too large, or its reference was used for another
            amount.
    """
    if amount_cents == 0 or abs(amount_cents) > AMOUNT_MAX:
        raise InvalidArgumentError(
            f"cannot post {amount_cents} cents: it must be 1 to {AMOUNT_MAX}",
            field="amount_cents",
        )
    if reference_id is not None:
        known = await tx.credits.find(org_id, type_, reference_id)
        if known is not None:
            if known.amount_cents != amount_cents:
                raise InvalidArgumentError(
                    f"cannot post {amount_cents} cents under the reference {reference_id!r}: "
                    f"{known.amount_cents} were posted under it before",
                    field="reference_id",
                )
            return known, False
    account = await tx.credits.account(org_id)
    account = replace(
        account,
        balance_cents=account.balance_cents + amount_cents,
        granted_cents=account.granted_cents + amount_cents,
    )
    await tx.credits.save(account)
    entry = LedgerEntry(
        id=new_uuid(),
        org_id=org_id,
        type=type_,
        amount_cents=amount_cents,
        resource=None,
        description=description,
        reference_id=reference_id,
        balance_after_cents=account.balance_cents,
        created_at=at,
    )
    await tx.credits.post(entry)
    return entry, True


async def take_payment(
    tx: Transaction, payment: Payment, *, at: datetime, is_automatic: bool = False
) -> bool:
    """Credit a payment once; return False if it was credited before."""
    entry, is_new = await credit(
        tx,
        payment.org_id,
        "topup",
        payment.amount_cents,
        description="Automatic top-up" if is_automatic else "Payment",
        at=at,
        reference_id=payment.reference,
    )
    # A late or repeated event may be about another top-up than the pending one.
    if is_automatic and (payment.key is not None or is_new):
        await end_pending(tx, payment.org_id, payment.key)
    if is_new:
        if payment.customer_id is not None:
            wish = await tx.credits.auto_topup(payment.org_id)
            await tx.credits.save_auto_topup(replace(wish, customer_id=payment.customer_id))
        await tx.activity.append(
            line(
                "billing.topup",
                "Credits bought",
                org_id=payment.org_id,
                actor=None,
                resource_id=entry.id,
                at=at,
                attributes={"amountCents": payment.amount_cents, "isAutomatic": is_automatic},
            )
        )
    return is_new


async def take_back(tx: Transaction, reversal: Reversal, *, at: datetime) -> bool:
    """Debit exactly what was reversed of a payment, in whatever order reports arrive; return False
    if it was debited before.

    The account may become negative. Automatic top-up is switched off: a card that was refunded, or
    whose owner disputes a payment, must not be charged for that.
    """
    type_ = "adjustment" if reversal.is_dispute else "refund"
    posted, number = 0, 1
    while True:
        reference = reversal.reference if number == 1 else f"{reversal.reference} {number}"
        known = await tx.credits.find(reversal.org_id, type_, reference)
        if known is None:
            break
        posted, number = posted + known.amount_cents, number + 1
    missing = -reversal.amount_cents - posted
    if missing == 0:
        return False
    what = "Payment disputed" if reversal.is_dispute else "Payment refunded"
    if missing > 0:
        what = "Disputed payment returned" if reversal.is_dispute else "Refund failed"
    entry, _ = await credit(
        tx, reversal.org_id, type_, missing, description=what, at=at, reference_id=reference
    )
    wish = await tx.credits.auto_topup(reversal.org_id)
    if missing < 0 and wish.is_enabled:
        await tx.credits.save_auto_topup(replace(wish, is_enabled=False))
    await tx.activity.append(
        line(
            "billing.dispute" if reversal.is_dispute else "billing.refund",
            what,
            org_id=reversal.org_id,
            actor=None,
            resource_id=entry.id,
            at=at,
            attributes={"amountCents": missing, "reference": reversal.reference},
        )
    )
    return True


async def end_pending(tx: Transaction, org_id: str, key: str | None) -> None:
    """Store that the outcome of an automatic top-up is known, of any for None."""
    wish = await tx.credits.auto_topup(org_id)
    if wish.pending is not None and key in (None, wish.pending.key):
        await tx.credits.save_auto_topup(replace(wish, pending=None))
