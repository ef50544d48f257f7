"""Opens a control plane: the services on a store and nodes, and the faces on them."""

from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI

from sandyard.server.app.faces import MakeFace, make_faces
from sandyard.server.app.installation import secret_key
from sandyard.server.app.metrics import Metrics
from sandyard.server.app.settings import Settings
from sandyard.server.app.wiring import (
    addresses_of,
    build_limits_of,
    plans_of,
    prices_of,
    sign_up_of,
)
from sandyard.server.core.contracts.bus import Bus
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import NodeControl, NodeTunnel
from sandyard.server.core.contracts.payments import Payments
from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.contracts.volumes import Volumes
from sandyard.server.front.dispatch import Dispatch
from sandyard.server.gateway.previews import PreviewApp
from sandyard.server.links.identities import new_network_authority
from sandyard.server.links.passwords import check_password, hash_password
from sandyard.server.links.payments import NoPayments, StripePayments
from sandyard.server.links.public_keys import checked_public_key
from sandyard.server.links.sessions import JwtSessions, Provider
from sandyard.server.service.builds.build import build_templates
from sandyard.server.service.money.build import Money, build_money
from sandyard.server.service.money.metering import BEAT, Meter
from sandyard.server.service.network.build import build_network
from sandyard.server.service.nodes import Nodes
from sandyard.server.service.people.build import build_people
from sandyard.server.service.people.sign_in import SignIn
from sandyard.server.service.reconcile.build import build_reconciler
from sandyard.server.service.reconcile.compare import SilenceLimits
from sandyard.server.service.reconcile.reconciler import Pace, Reconciler
from sandyard.server.service.roster import Roster
from sandyard.server.service.sandboxes.build import build_sandboxes
from sandyard.server.service.sandboxes.lifecycle import Lifecycle
from sandyard.server.service.sandboxes.platform import Platform, build_platform
from sandyard.server.service.services import Services, gather
from sandyard.server.service.workspaces.build import WorkspaceServices, build_workspaces
from sandyard.server.service.workspaces.files import THREADS


@dataclass(frozen=True)
class Control:
    """A control plane without its HTTP server. `front` serves all faces."""

    front: Dispatch
    api: FastAPI
    previews: PreviewApp
    services: Services
    store: Store
    nodes: Nodes
    reconciler: Reconciler
    lifecycle: Lifecycle
    meter: Meter


@asynccontextmanager
async def _payments(settings: Settings) -> AsyncIterator[Payments]:
    """Open the payment provider, or a substitute that refuses payments."""
    billing = settings.billing
    if billing.stripe_secret is None:
        yield NoPayments()
        return
    webhook = billing.stripe_webhook_secret
    stripe = StripePayments(
        billing.stripe_secret.get_secret_value(),
        webhook_secret=webhook.get_secret_value() if webhook else None,
        currency=billing.currency,
        api=billing.stripe_api,
    )
    try:
        yield stripe
    finally:
        await stripe.close()


@asynccontextmanager
async def _threads() -> AsyncIterator[Executor]:
    with ThreadPoolExecutor(THREADS, thread_name_prefix="workspaces") as threads:
        yield threads


def _sign_in(settings: Settings, store: Store, clock: Clock) -> SignIn | None:
    own = settings.sessions
    if own.provider is None:
        return None
    is_workos = own.provider == "workos"
    keys_url = own.jwks_url
    if is_workos and keys_url is None:
        keys_url = f"https://api.workos.com/sso/jwks/{own.client_id}"
    provider = Provider(
        issuer=own.issuer or "https://api.workos.com/",
        keys_url=keys_url,
        is_issuer_prefix=is_workos,
        audience=own.audience,
        algorithms=tuple(own.algorithms),
        skew_s=own.skew_s,
        org_claim=own.org_claim,
        role_claim=own.role_claim,
    )
    return SignIn(
        store=store,
        sessions=JwtSessions(provider, clock),
        clock=clock,
        sign_up=sign_up_of(settings),
        admin_roles=frozenset(own.admin_roles),
    )


def _services(
    settings: Settings,
    platform: Platform,
    worker: Reconciler,
    money: Money,
    workspaces: WorkspaceServices,
) -> Services:
    addresses = addresses_of(settings)
    people = build_people(
        platform,
        sign_in=_sign_in(settings, platform.store, platform.clock),
        sign_up=sign_up_of(settings),
        failures_per_minute=settings.accounts.failed_logins_per_minute,
        check_password=check_password,
        check_public_key=checked_public_key,
    )
    sandboxes = build_sandboxes(
        platform,
        worker=worker,
        ssh_keys=people.ssh_keys,
        addresses=addresses,
        preview_s=settings.preview.token_s,
        hash_password=hash_password,
    )
    return gather(
        platform,
        people=people,
        money=money,
        sandboxes=sandboxes,
        network=build_network(platform),
        workspaces=workspaces,
        templates=build_templates(
            platform,
            sandboxes=sandboxes,
            uploads_dir=settings.home / "uploads",
            upload_max=settings.builds.upload_mib * 2**20,
            limits=build_limits_of(settings),
        ),
        addresses=addresses,
    )


@asynccontextmanager
async def open_control(
    settings: Settings,
    *,
    server_id: str,
    store: Store,
    nodes: Mapping[str, NodeControl],
    tunnel: NodeTunnel,
    volumes: Volumes,
    roster: Roster | None = None,
    bus: Bus,
    clock: Clock,
    metrics: Metrics,
    version: str,
    pace: Pace | None = None,
    faces: Sequence[MakeFace] = (),
) -> AsyncIterator[Control]:
    """Open a control plane on a store and nodes. `server_id` distinguishes it from its peers.

    Work that a server with that id left unfinished is resumed. The mappings by node may change,
    and be empty at first.
    """
    async with store.write(Turn.ALONE) as tx:
        await tx.leases.void(server_id)
    async with store.read() as tx:
        away_since = await tx.facts.moment(BEAT)
    platform = build_platform(
        server_id=server_id,
        store=store,
        bus=bus,
        clock=clock,
        nodes=nodes,
        roster=roster,
        tunnel=tunnel,
        key=secret_key(settings.home),
        plans=plans_of(settings),
        prices=prices_of(settings),
        enforces=settings.billing.enforce,
        new_authority=new_network_authority,
    )
    async with (
        _payments(settings) as payments,
        _threads() as threads,
    ):
        if pace is None:
            days = settings.backup.quarantine_days
            kept_s = days * 86_400.0 if days else None
            pace = Pace(patience=SilenceLimits(quarantine_s=kept_s))
        reconciler = build_reconciler(platform, pace=pace, away_since=away_since)
        money = build_money(platform, payments=payments)
        workspaces = build_workspaces(
            platform,
            volumes=volumes,
            threads=threads,
            quota_bytes=settings.workspaces.quota_mib * 2**20,
            upload_max=settings.workspaces.upload_mib * 2**20,
        )
        services = _services(settings, platform, reconciler, money, workspaces)
        made = make_faces(
            services,
            platform,
            http=settings.http,
            e2b=settings.e2b,
            metrics=metrics,
            version=version,
            more=faces,
        )
        yield Control(
            front=made.front,
            api=made.api,
            previews=made.previews,
            services=services,
            store=store,
            nodes=platform.nodes,
            reconciler=reconciler,
            lifecycle=platform.lifecycle,
            meter=money.meter,
        )
