"""/v1/billing, what a sandbox costs, and what the payment provider tells."""

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Header, Query, Request

from sandyard.server.api.access import Scope, open_to_all
from sandyard.server.api.cursors import Cursor
from sandyard.server.api.models.base import Data, Page
from sandyard.server.api.models.billing import (
    AutoTopupOut,
    CheckoutOut,
    CostOut,
    CreditsOut,
    Grant,
    LedgerEntryOut,
    PlanOut,
    PutAutoTopup,
    Received,
    TopUp,
    UsageOut,
    auto_topup_out,
    credits_out,
    ledger_entry_out,
    runtime_out,
    sandboxes_out,
    storage_out,
)
from sandyard.server.api.routes.common import Keyed, enveloped, errors, paged, provided
from sandyard.server.core.errors import PayloadTooLargeError
from sandyard.server.core.ids import checked_text
from sandyard.server.core.money import MICROS
from sandyard.server.core.plans import LIMITS
from sandyard.server.front.cursors import decode_cursor
from sandyard.server.service.actor import Actor
from sandyard.server.service.money.billing import Billing

router = APIRouter(tags=["billing"])

CanRead = Annotated[Actor, Depends(Scope("org:read"))]
CanWrite = Annotated[Actor, Depends(Scope("org:write"))]
CanReadSandbox = Annotated[Actor, Depends(Scope("sandbox:read"))]
_EVENT_MAX = 256 * 1024


Service = Annotated[Billing, provided("billing")]


@router.get("/v1/billing/plan", responses=errors(404))
async def get_plan(request: Request, actor: CanRead, service: Service) -> Data[PlanOut]:
    """Return the organization's plan, its limits (null: unlimited) and its balance."""
    organization, account, plan = await service.plan(actor)
    shown = PlanOut(
        org_id=organization.id,
        plan=organization.plan,
        balance_cents=account.balance_cents,
        total_granted_cents=account.granted_cents,
        total_used_cents=account.used_cents,
        limits={name: getattr(plan, attribute) for name, attribute in LIMITS.items()},
    )
    return enveloped(request, shown)


@router.get("/v1/billing/credits", responses=errors())
async def get_credits(request: Request, actor: CanRead, service: Service) -> Data[CreditsOut]:
    """Return the organization's balance."""
    account, is_spent = await service.credits(actor)
    return enveloped(request, credits_out(account, is_spent=is_spent))


@router.get("/v1/billing/credits/history", responses=errors())
async def list_ledger(
    request: Request,
    actor: CanRead,
    service: Service,
    limit: Annotated[int, Query(ge=1, le=500)] = 100,
    cursor: Cursor = None,
) -> Page[LedgerEntryOut]:
    """List the entries of the ledger, newest first."""
    after_id = decode_cursor(cursor)[1] if cursor else None
    found = await service.history(actor, limit=limit + 1, after_id=after_id)
    return paged(request, found, limit, ledger_entry_out, lambda one: (one.created_at, one.id))


@router.get("/v1/billing/my-usage", responses=errors())
async def get_usage(
    request: Request,
    actor: CanRead,
    service: Service,
    period: Literal["current", "7d", "30d", "all_time"] = "current",
    all_: Annotated[
        bool, Query(alias="all", description="Of all members, with storage; for admins.")
    ] = False,
) -> Data[UsageOut]:
    """Return the user's usage in a period. `current` is the current month (UTC)."""
    usage = await service.usage(actor, period, wants_all=all_)
    shown = UsageOut(
        org_id=actor.org_id,
        period=period,
        since=usage.since,
        until=usage.until,
        sandbox_runtime=runtime_out(usage.total),
        sandboxes=sandboxes_out(usage.sandboxes),
        storage_usage=storage_out(usage.storage),
    )
    return enveloped(request, shown)


@router.get("/v1/sandboxes/{reference}/cost", responses=errors(404))
async def get_cost(
    request: Request, actor: CanReadSandbox, service: Service, reference: str
) -> Data[CostOut]:
    """Return what a sandbox has cost so far, and what it costs per hour now."""
    sandbox, used, kept, hourly = await service.cost(
        actor, checked_text(reference, field="reference")
    )
    shown = CostOut(
        sandbox_id=sandbox.id,
        runtime=runtime_out(used),
        storage=storage_out(kept),
        total_micros=used.micros + kept.micros,
        total_cents=(used.micros + kept.micros) // MICROS,
        hourly_micros=hourly,
        is_free=sandbox.is_test,
    )
    return enveloped(request, shown)


@router.post("/v1/billing/topup", responses=errors())
async def top_up(
    request: Request, actor: CanWrite, service: Service, body: TopUp
) -> Data[CheckoutOut]:
    """Return a payment page for buying credits. Admins only."""
    checkout = await service.check_out(
        actor, body.amount_cents, success_url=body.success_url, cancel_url=body.cancel_url
    )
    shown = CheckoutOut(checkout_url=checkout.url, session_id=checkout.session_id)
    return enveloped(request, shown)


@router.get("/v1/billing/auto-topup", responses=errors())
async def get_auto_topup(request: Request, actor: CanRead, service: Service) -> Data[AutoTopupOut]:
    """Return the settings of automatic top-up."""
    return enveloped(request, auto_topup_out(await service.auto_topup(actor)))


@router.put("/v1/billing/auto-topup", responses=errors(409))
async def set_auto_topup(
    request: Request, actor: CanWrite, service: Service, body: PutAutoTopup
) -> Data[AutoTopupOut]:
    """Change automatic top-up, which charges the card of the last top-up. Admins only."""
    wish = await service.set_auto_topup(
        actor,
        is_enabled=body.enabled,
        threshold_cents=body.threshold_cents,
        amount_cents=body.topup_amount_cents,
    )
    return enveloped(request, auto_topup_out(wish))


@router.post("/v1/billing/grants", status_code=201, responses=errors(404))
async def grant_credits(
    request: Request, actor: CanWrite, service: Service, body: Grant, keyed: Keyed
) -> Data[LedgerEntryOut]:
    """Grant credits to an organization. Operators of the installation only."""
    entry = await service.grant(
        actor,
        body.amount_cents,
        org_id=body.org_id,
        description=body.description,
        reference_id=body.reference_id,
        request=keyed,
    )
    return enveloped(request, ledger_entry_out(entry))


@router.post("/webhooks/stripe", responses=errors(404, 413), openapi_extra={"security": []})
@open_to_all
async def stripe_event(
    request: Request,
    service: Service,
    stripe_signature: Annotated[str, Header()] = "",
) -> Received:
    """Receive a webhook event from Stripe. Events without a valid signature are refused."""
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > _EVENT_MAX:
            raise PayloadTooLargeError("cannot take an event that large", limit=_EVENT_MAX)
    return Received(credited=await service.receive_payment_event(body, stripe_signature))
