"""Money as HTTP carries it."""

from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import Field, JsonValue
from pydantic.config import JsonDict

from sandyard.server.api.models.base import PRINTABLE, Body, Model, Time, bounds
from sandyard.server.core.money import MICROS, Account
from sandyard.server.core.records import (
    AutoTopup,
    LedgerEntry,
)
from sandyard.server.service.money.billing import TOPUP_MIN, MachineUsage, StoredUsage
from sandyard.server.service.money.credits import AMOUNT_MAX

Cents = Annotated[int, Field(ge=-(10**15), le=10**15)]


class PlanOut(Model):
    """A plan, its limits, and the organization's balance."""

    org_id: str
    plan: str
    balance_cents: int
    total_granted_cents: int
    total_used_cents: int
    limits: dict[str, int | None]


class CreditsOut(Model):
    """An organization's balance."""

    balance_cents: int
    total_granted_cents: int
    total_used_cents: int
    free_credits_used: bool = Field(description="Whether the credits it began with are used up.")


def credits_out(account: Account, *, is_spent: bool) -> CreditsOut:
    """Return an account as it is shown."""
    return CreditsOut(
        balance_cents=account.balance_cents,
        total_granted_cents=account.granted_cents,
        total_used_cents=account.used_cents,
        free_credits_used=is_spent,
    )


class LedgerEntryOut(Model):
    """One line of the ledger."""

    id: str
    org_id: str
    type: Literal["grant", "topup", "usage", "refund", "adjustment"]
    amount_cents: int
    resource: str | None
    description: str
    reference_id: str | None
    balance_after_cents: int
    created_at: Time


def ledger_entry_out(entry: LedgerEntry) -> LedgerEntryOut:
    """Return a line of the ledger as it is shown."""
    return LedgerEntryOut.model_validate(vars(entry), by_name=True)


class RuntimeOut(Model):
    """Usage of machines, and its cost; 1 cent is 1,000,000 micros."""

    seconds: float
    active_seconds: float = Field(description="Of these, of sandboxes that still run.")
    vcpu_seconds: float
    memory_gib_seconds: float
    cost_micros: int
    cost_cents: int


def runtime_out(used: MachineUsage) -> RuntimeOut:
    """Return what was used as it is shown."""
    return RuntimeOut(
        seconds=used.seconds,
        active_seconds=used.active_seconds,
        vcpu_seconds=used.vcpu_seconds,
        memory_gib_seconds=used.memory_mib_seconds / 1024,
        cost_micros=used.micros,
        cost_cents=used.micros // MICROS,
    )


class SandboxRuntimeOut(RuntimeOut):
    """Usage of one sandbox's machine."""

    sandbox_id: str


class StorageOut(Model):
    """Usage of storage."""

    byte_seconds: float
    by_kind: dict[str, float] = Field(description="Byte-seconds: sandbox (paused), snapshot.")
    cost_micros: int
    cost_cents: int


def storage_out(kept: StoredUsage) -> StorageOut:
    """Return what was kept as it is shown."""
    return StorageOut(
        byte_seconds=sum(kept.byte_seconds.values()),
        by_kind=dict(kept.byte_seconds),
        cost_micros=kept.micros,
        cost_cents=kept.micros // MICROS,
    )


class UsageOut(Model):
    """Usage in a period. Tokens, models and tools are not charged."""

    org_id: str
    period: str
    since: Time
    until: Time
    sandbox_runtime: RuntimeOut
    sandboxes: list[SandboxRuntimeOut]
    storage_usage: StorageOut
    tokens: int = 0
    model_usage: tuple[JsonValue, ...] = ()
    tool_executions: tuple[JsonValue, ...] = ()
    resource_charges: tuple[JsonValue, ...] = ()


def sandboxes_out(sandboxes: Mapping[str, MachineUsage]) -> list[SandboxRuntimeOut]:
    """Return what each sandbox used, the dearest first."""
    dearest = sorted(sandboxes.items(), key=lambda one: (-one[1].micros, one[0]))
    return [
        SandboxRuntimeOut(sandbox_id=sandbox_id, **runtime_out(used).model_dump(by_alias=False))
        for sandbox_id, used in dearest
    ]


class CostOut(Model):
    """What a sandbox costs."""

    sandbox_id: str
    runtime: RuntimeOut
    storage: StorageOut
    total_micros: int
    total_cents: int
    hourly_micros: int = Field(description="What it costs in an hour as it is now.")
    is_free: bool = Field(description="Whether a test key made it.")


_URL: JsonDict = {"format": "uri", "pattern": "^https?://"}


class TopUp(Body):
    """The body of a top-up."""

    amount_cents: int = Field(examples=[2000], json_schema_extra=bounds(TOPUP_MIN, AMOUNT_MAX))
    success_url: str = Field(examples=["https://example.org/thanks"], json_schema_extra=_URL)
    cancel_url: str = Field(examples=["https://example.org/credits"], json_schema_extra=_URL)


class CheckoutOut(Model):
    """Where to pay."""

    checkout_url: str
    session_id: str


class PutAutoTopup(Body):
    """The body of a change; amounts that are left out stay as they are."""

    enabled: bool
    threshold_cents: int | None = Field(None, json_schema_extra=bounds(1, AMOUNT_MAX))
    topup_amount_cents: int | None = Field(None, json_schema_extra=bounds(TOPUP_MIN, AMOUNT_MAX))


class AutoTopupOut(Model):
    """How the balance is topped up automatically."""

    enabled: bool
    threshold_cents: int
    topup_amount_cents: int
    has_saved_payment_method: bool
    last_topup_at: Time | None


def auto_topup_out(wish: AutoTopup) -> AutoTopupOut:
    """Return how the balance is filled up as it is shown."""
    return AutoTopupOut(
        enabled=wish.is_enabled,
        threshold_cents=wish.threshold_cents,
        topup_amount_cents=wish.amount_cents,
        has_saved_payment_method=wish.customer_id is not None,
        last_topup_at=wish.last_at,
    )


class Grant(Body):
    """The body of a grant."""

    amount_cents: int = Field(examples=[5000], json_schema_extra=bounds(1, AMOUNT_MAX))
    org_id: str | None = Field(None, description="Default: the organization of who asks.")
    description: Annotated[
        str, Field(json_schema_extra={"minLength": 1, "maxLength": 255, "pattern": PRINTABLE})
    ] = "Granted by the operator"
    reference_id: str | None = Field(
        None, description="With one, the grant is made once, however often it is asked for."
    )


class Received(Model):
    """The event was received; `credited` says whether it changed an account."""

    received: Literal[True] = True
    credited: bool
