"""Opens a control plane: the services on a store and nodes, and the HTTP application on them."""

from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from fastapi import FastAPI

from sandyard.server.app.faces import MakeFace, make_front, make_runtools_api
from sandyard.server.app.installation import secret_key
from sandyard.server.app.logs import request_id
from sandyard.server.app.metrics import Metrics
from sandyard.server.app.settings import Settings
from sandyard.server.app.wiring import addresses_of, plans_of, prices_of, sign_up_of
from sandyard.server.core.contracts.bus import Bus
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.node import NodeControl, NodeExports, NodeTunnel
from sandyard.server.core.contracts.payments import Payments
from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.contracts.volumes import Volumes
from sandyard.server.front.bodies import LargeBodies
from sandyard.server.front.dispatch import Dispatch
from sandyard.server.front.face import EdgeServices
from sandyard.server.gateway.previews import PreviewApp
from sandyard.server.links.passwords import check_password, hash_password
from sandyard.server.links.payments import NoPayments, StripePayments
from sandyard.server.links.sessions import JwtSessions, Provider
from sandyard.server.service.feed import Feed
from sandyard.server.service.money.billing import Billing
from sandyard.server.service.money.metering import BEAT, Meter
from sandyard.server.service.nodes import Nodes
from sandyard.server.service.people.access import Access
from sandyard.server.service.people.api_keys import ApiKeys
from sandyard.server.service.people.credentials import Credentials
from sandyard.server.service.people.logins import Logins
from sandyard.server.service.people.organizations import Organizations
from sandyard.server.service.people.rates import Rates
from sandyard.server.service.people.sign_in import SignIn
from sandyard.server.service.people.ssh_keys import SshKeys
from sandyard.server.service.placement import Placement
from sandyard.server.service.readiness import Readiness
from sandyard.server.service.reconcile.idle import Idleness
from sandyard.server.service.reconcile.reconciler import Pace, Reconciler
from sandyard.server.service.reconcile.revoking import Revoking
from sandyard.server.service.reconcile.shares import Shares
from sandyard.server.service.reconcile.work import Work
from sandyard.server.service.repeats import Repeats
from sandyard.server.service.roster import Roster
from sandyard.server.service.sandboxes.change import Sandboxes
from sandyard.server.service.sandboxes.create import Creation
from sandyard.server.service.sandboxes.desktops import Desktops
from sandyard.server.service.sandboxes.execute import Commands
from sandyard.server.service.sandboxes.files import Files
from sandyard.server.service.sandboxes.forwards import Forwards
from sandyard.server.service.sandboxes.frames import Open
from sandyard.server.service.sandboxes.lifecycle import Lifecycle
from sandyard.server.service.sandboxes.power import Power, Waits
from sandyard.server.service.sandboxes.previews import Previews
from sandyard.server.service.sandboxes.processes import Processes
from sandyard.server.service.sandboxes.quota import Quota
from sandyard.server.service.sandboxes.reach import Reach
from sandyard.server.service.sandboxes.register import Register
from sandyard.server.service.sandboxes.signing import Signing
from sandyard.server.service.sandboxes.snapshots import Snapshots
from sandyard.server.service.sandboxes.terminals import Terminals
from sandyard.server.service.sandboxes.tickets import Tickets
from sandyard.server.service.services import Services
from sandyard.server.service.signers import Signers
from sandyard.server.service.templates import Templates
from sandyard.server.service.workspaces.files import THREADS, WorkspaceFiles
from sandyard.server.service.workspaces.workspaces import Workspaces


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
    """Open the payment provider, or what says that there is none."""
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


@asynccontextmanager
async def open_control(
    settings: Settings,
    *,
    server_id: str,
    store: Store,
    nodes: Mapping[str, NodeControl],
    tunnel: NodeTunnel,
    volumes: Volumes,
    exports: Mapping[str, NodeExports] | None = None,
    roster: Roster | None = None,
    bus: Bus,
    clock: Clock,
    metrics: Metrics,
    version: str,
    pace: Pace | None = None,
    faces: Sequence[MakeFace] = (),
) -> AsyncIterator[Control]:
    """Open a control plane on a store and nodes; `server_id` tells it from its peers.

    Whatever a server of that id was at work on when it ended is taken up anew.
    """
    async with store.write(Turn.ALONE) as tx:
        await tx.leases.void(server_id)
    async with store.read() as tx:
        away_since = await tx.facts.moment(BEAT)
    async with AsyncExitStack() as held:
        payments = await held.enter_async_context(_payments(settings))
        threads = held.enter_context(ThreadPoolExecutor(THREADS, thread_name_prefix="workspaces"))
        key = secret_key(settings.home)
        plans, prices = plans_of(settings), prices_of(settings)
        sign_up, waits = sign_up_of(settings), Waits()
        addresses = addresses_of(settings)
        enforces = settings.billing.enforce
        known = Nodes(nodes, clock, roster)
        templates = Templates(known, clock)
        placement = Placement(known, clock, by_lot=roster is not None)
        lifecycle = Lifecycle(store, bus, clock)
        register = Register(store, bus, clock)
        repeats = Repeats(clock, key)
        ssh_keys = SshKeys(store, repeats, clock)
        quota = Quota(clock=clock, plans=plans, prices=prices, enforces=enforces)
        meter = Meter(
            store=store,
            lifecycle=lifecycle,
            payments=payments,
            clock=clock,
            prices=prices,
            enforces=enforces,
        )
        pace = pace or Pace()
        reconciler = Reconciler(
            server_id=server_id,
            store=store,
            nodes=known,
            work=Work(
                store=store,
                nodes=known,
                placement=placement,
                lifecycle=lifecycle,
                clock=clock,
                start_limit_s=pace.start_limit_s,
            ),
            lifecycle=lifecycle,
            idleness=Idleness(store=store, tunnel=tunnel, clock=clock),
            revoking=Revoking(store=store, tunnel=tunnel, clock=clock),
            bus=bus,
            clock=clock,
            pace=pace,
            shares=None if roster is None else Shares(server_id, store, roster),
            away_since=away_since,
        )
        power = Power(
            register=register,
            lifecycle=lifecycle,
            worker=reconciler,
            nodes=known,
            quota=quota,
            waits=waits,
            clock=clock,
        )
        reach = Reach(store=store, register=register, power=power, tunnel=tunnel, clock=clock)
        opened = Open()
        access = Access(store, clock, _sign_in(settings, store, clock))
        rates = Rates(clock, plans, failures_per_minute=settings.accounts.failed_logins_per_minute)
        signers = Signers(store, clock)
        processes, commands = Processes(reach, clock, opened), Commands(reach, clock)
        tickets = Tickets(
            store=store,
            signers=signers,
            clock=clock,
            key=key,
            preview_s=settings.preview.token_s,
        )
        workspaces = Workspaces(
            store=store,
            volumes=volumes,
            repeats=repeats,
            clock=clock,
            plans=plans,
            quota_bytes=settings.workspaces.quota_mib * 2**20,
            exports=exports or {},
        )
        signing = Signing(signers, register, clock, key)
        services = Services(
            access=access,
            credentials=Credentials(access=access, tickets=tickets, signing=signing),
            rates=rates,
            organizations=Organizations(store=store, repeats=repeats, clock=clock, sign_up=sign_up),
            api_keys=ApiKeys(store, clock),
            ssh_keys=ssh_keys,
            feed=Feed(store, register, opened),
            now=clock.now,
            billing=Billing(
                store=store,
                register=register,
                payments=payments,
                repeats=repeats,
                clock=clock,
                prices=prices,
                plans=plans,
            ),
            creation=Creation(
                store=store,
                register=register,
                placement=placement,
                templates=templates,
                lifecycle=lifecycle,
                worker=reconciler,
                quota=quota,
                ssh_keys=ssh_keys,
                repeats=repeats,
                clock=clock,
                hash_password=hash_password,
                pooled_wait_s=waits.pooled_s,
            ),
            sandboxes=Sandboxes(
                store=store,
                register=register,
                nodes=known,
                tunnel=tunnel,
                lifecycle=lifecycle,
                worker=reconciler,
                power=power,
                clock=clock,
                waits=waits,
            ),
            commands=commands,
            desktops=Desktops(
                store=store,
                register=register,
                reach=reach,
                commands=commands,
                tickets=tickets,
                addresses=addresses,
                clock=clock,
            ),
            processes=processes,
            files=Files(reach, clock, opened),
            signing=signing,
            addresses=addresses,
            logins=Logins(
                store=store,
                register=register,
                access=access,
                rates=rates,
                clock=clock,
                check_password=check_password,
            ),
            previews=Previews(
                store=store,
                register=register,
                reach=reach,
                tickets=tickets,
                addresses=addresses,
                clock=clock,
            ),
            forwards=Forwards(reach, clock),
            terminals=Terminals(register, processes, tickets),
            snapshots=Snapshots(
                store=store,
                register=register,
                nodes=known,
                placement=placement,
                lifecycle=lifecycle,
                worker=reconciler,
                power=power,
                quota=quota,
                repeats=repeats,
                clock=clock,
            ),
            templates=templates,
            workspaces=workspaces,
            workspace_files=WorkspaceFiles(
                workspaces=workspaces,
                volumes=volumes,
                clock=clock,
                threads=threads,
                upload_max=settings.workspaces.upload_mib * 2**20,
            ),
            readiness=Readiness(store, known),
        )
        edge = EdgeServices(
            credentials=services.credentials,
            rates=rates,
            observe=metrics.observe,
            bind=request_id.set,
            bodies=LargeBodies(),
        )
        http = settings.http
        api = make_runtools_api(
            services, edge, metrics=metrics, nodes=known, http=http, version=version
        )
        previews = PreviewApp(services, edge, clock=clock)
        front = make_front(
            services, edge, api=api, previews=previews, http=http, version=version, faces=faces
        )
        yield Control(front, api, previews, services, store, known, reconciler, lifecycle, meter)
