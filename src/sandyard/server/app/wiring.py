"""Builds the house for one process: what stands behind each seam is decided here."""

import logging
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version as package_version

from fastapi import FastAPI

from sandyard.server.api import Services, make_api
from sandyard.server.app.firecracker import fetch, program
from sandyard.server.app.installation import kind_of_host, secret_key
from sandyard.server.app.logs import request_id
from sandyard.server.app.metrics import Metrics, MetricsRoute
from sandyard.server.app.settings import Settings
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.payments import Payments
from sandyard.server.core.contracts.store import Store
from sandyard.server.core.errors import UnavailableError
from sandyard.server.core.money import Prices, micros_of
from sandyard.server.core.plans import Plan
from sandyard.server.drivers.contract import Driver
from sandyard.server.drivers.fake import FakeDriver, FakeHost
from sandyard.server.drivers.firecracker import FirecrackerDriver, has_kvm
from sandyard.server.drivers.firecracker.api import limiter
from sandyard.server.drivers.qemu import QemuDriver
from sandyard.server.links.local import LocalBus, SystemClock
from sandyard.server.links.passwords import hash_password
from sandyard.server.links.payments import NoPayments, StripePayments
from sandyard.server.links.sessions import JwtSessions, Provider
from sandyard.server.links.sql import open_store
from sandyard.server.node.fake import FakeDisks, FakeNetwork, make_fake_image
from sandyard.server.node.host.admission import Margins
from sandyard.server.node.host.choice import Drivers
from sandyard.server.node.host.disks import Disks, Ext4Disks
from sandyard.server.node.host.identity import Identity, take_identity
from sandyard.server.node.host.network import Network, Slots, host_routes
from sandyard.server.node.images.build import Builder
from sandyard.server.node.images.definitions import load_definitions
from sandyard.server.node.images.images import Images
from sandyard.server.node.machines.launcher import NodeLimits
from sandyard.server.node.node import Node
from sandyard.server.node.stock.pool import PoolLimits
from sandyard.server.service.feed import Feed
from sandyard.server.service.money.billing import Billing
from sandyard.server.service.money.metering import BEAT, Meter
from sandyard.server.service.people.access import Access
from sandyard.server.service.people.api_keys import ApiKeys
from sandyard.server.service.people.bootstrap import ensure_first_organization
from sandyard.server.service.people.organizations import Organizations, SignUp
from sandyard.server.service.people.rates import Rates
from sandyard.server.service.people.sign_in import SignIn
from sandyard.server.service.people.ssh_keys import SshKeys
from sandyard.server.service.placement import Placement
from sandyard.server.service.readiness import Readiness
from sandyard.server.service.reconcile.idle import Idleness
from sandyard.server.service.reconcile.reconciler import (
    NODES,
    WORKABLE,
    Pace,
    Reconciler,
)
from sandyard.server.service.repeats import Repeats
from sandyard.server.service.sandboxes.lifecycle import Lifecycle
from sandyard.server.service.sandboxes.quota import Admission
from sandyard.server.service.sandboxes.register import Register
from sandyard.server.service.sandboxes.sandboxes import Sandboxes, Waits
from sandyard.server.service.sandboxes.snapshots import Snapshots
from sandyard.server.service.sandboxes.uses import Uses
from sandyard.server.service.templates import Templates
from sandyard.server.tasks import in_thread

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class House:
    """A running installation without its HTTP server."""

    api: FastAPI
    store: Store
    node: Node
    reconciler: Reconciler
    lifecycle: Lifecycle
    meter: Meter


def images_of(settings: Settings) -> Images:
    """Return the templates and images of an installation."""
    return Images(
        definitions=load_definitions(settings.templates_dir),
        images_dir=settings.images_dir,
        templates_dir=settings.home / "templates",
    )


def builder_of(settings: Settings) -> Builder:
    """Return the builder of an installation's templates."""
    return Builder(
        images_of(settings), cache_dir=settings.cache_dir, logs_dir=settings.home / "builds"
    )


async def identity_of(settings: Settings) -> Identity:
    """Return the installation's place on its host."""
    return take_identity(settings.home, routes=await host_routes(), subnet=settings.node.subnet)


def drivers_of(settings: Settings) -> list[Driver]:
    """Return the drivers that the settings allow, best first."""
    if settings.node.driver == "fake":
        return [FakeDriver(FakeHost())]
    every = _every_driver(settings)
    return [one for one in every if settings.node.driver in ("auto", one.name)]


def _every_driver(settings: Settings) -> list[Driver]:
    own = settings.firecracker
    return [
        FirecrackerDriver(
            cache=settings.home / "cache" / "kernels",
            binary=program(settings, "firecracker", own.binary),
            jailer=program(settings, "jailer", own.jailer),
            disk_limiter=limiter(own.disk_mib_per_s),
            network_limiter=limiter(own.network_mib_per_s),
        ),
        *(
            QemuDriver(
                accel=accel, binary=settings.node.qemu_binary, tb_size_mib=settings.node.tb_size_mib
            )
            for accel in ("kvm", "tcg")
        ),
    ]


async def set_up_firecracker(
    settings: Settings, *, force: bool, progress: Callable[[str], None]
) -> str:
    """Fetch Firecracker unless it is there or would not be used here; return what came of it.

    Raises:
        UnavailableError: it cannot be had.
    """
    driver = _every_driver(settings)[0]
    try:
        return f"Firecracker {await driver.version()} is installed"
    except UnavailableError as error:
        log.debug("Firecracker is not to be used yet: %s", error.message)
    if not force and not has_kvm():
        return "Firecracker is not fetched: this host has no KVM, and QEMU emulates"
    await in_thread(fetch, settings, progress=progress)
    return f"Firecracker {await driver.version()} is installed"


def choice_of(settings: Settings, drivers: Sequence[Driver]) -> Drivers:
    """Return the choice among drivers, with this installation's memory of verdicts."""
    return Drivers(
        drivers,
        cache=settings.home / "cache" / "verdicts.json",
        known=_every_driver(settings),
    )


def sign_up_of(settings: Settings) -> SignUp:
    """Return what new organizations begin with."""
    return SignUp(
        grant_cents=settings.billing.sign_up_cents,
        plan=settings.accounts.default_plan,
        organizations_max=settings.accounts.organizations_per_user,
    )


def plans_of(settings: Settings) -> Mapping[str, Plan]:
    """Return the plans by name."""
    return {name: Plan(**one.model_dump()) for name, one in settings.plans.items()}


def prices_of(settings: Settings) -> Prices:
    """Return the prices."""
    cents = settings.billing.prices
    return Prices(
        vcpu_hour=micros_of(cents.vcpu_hour),
        memory_gib_hour=micros_of(cents.memory_gib_hour),
        disk_gib_month=micros_of(cents.disk_gib_month),
        storage_gib_month=micros_of(cents.storage_gib_month),
    )


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


async def _void_leases(store: Store, clock: Clock) -> None:
    """Let every lease run out now: one server at a time uses a home, so they are a dead one's."""
    far, now = datetime.max.replace(tzinfo=UTC), clock.now()
    async with store.write() as tx:
        await tx.sandboxes.claim(WORKABLE, lease="void", now=far, until=now, limit=1_000_000)


@asynccontextmanager
async def open_house(
    settings: Settings,
    *,
    drivers: Sequence[Driver] | None = None,
    clock: Clock | None = None,
    fills_pool: bool = True,
) -> AsyncIterator[House]:
    """Open store and node, adopt what lives, and give everything back on leaving.

    `drivers` takes the place of those that the settings allow, `clock` that of the host's. Machines
    live on: leaving lets go of them without ending them.
    """
    clock, bus = clock or SystemClock(), LocalBus()
    images = images_of(settings)
    network: Network
    disks: Disks
    if settings.node.driver == "fake":
        network, disks = FakeNetwork(), FakeDisks()
        for slug in images.definitions:
            images.use(slug, make_fake_image(images))
    else:
        network = Slots(
            await identity_of(settings), allow=[str(one) for one in settings.node.allow]
        )
        disks = Ext4Disks()

    def on_change() -> None:
        bus.hint(NODES)

    version = package_version("sandyard")
    metrics = Metrics(version=version)
    key = secret_key(settings.home)
    node = Node(
        node_id="local",
        home=settings.home,
        images=images,
        drivers=choice_of(settings, drivers or drivers_of(settings)),
        network=network,
        disks=disks,
        clock=clock,
        limits=NodeLimits(
            boot_s=settings.node.boot_s,
            no_progress_s=settings.node.no_progress_s,
            boots_at_once=settings.node.boots_at_once,
            restores_at_once=settings.node.restores_at_once,
            heartbeat_s=settings.node.heartbeat_s,
            uses_goldens=settings.node.golden_machines,
            settle_s=0.0 if settings.node.driver == "fake" else NodeLimits.settle_s,
        ),
        pool_limits=PoolLimits(
            floor=min(settings.pool.floor, settings.pool.ceiling),
            ceiling=settings.pool.ceiling,
            demand_window_s=settings.pool.demand_window_s,
        ),
        margins=Margins(
            memory_floor_mib=settings.node.memory_floor_mib,
            disk_floor_mib=settings.node.disk_floor_mib,
            memory_overcommit=settings.node.memory_overcommit,
            disk_overcommit=settings.node.disk_overcommit,
        ),
        key=key,
        host=kind_of_host(),
        observer=metrics,
        on_change=on_change,
    )
    async with open_store(settings.store_url, key=key) as store:
        await ensure_first_organization(store, clock, sign_up_of(settings))
        await _void_leases(store, clock)
        async with store.read() as tx:
            away_since = await tx.facts.moment(BEAT)
        async with AsyncExitStack() as held, node.running(fills_pool=fills_pool):
            placement = Placement({node.node_id: node})
            lifecycle = Lifecycle(store, bus, clock)
            uses = Uses()
            register = Register(store, bus, clock)
            repeats = Repeats(clock, key)
            plans, prices = plans_of(settings), prices_of(settings)
            payments = await held.enter_async_context(_payments(settings))
            ssh_keys = SshKeys(store, repeats, clock)
            admission = Admission(
                clock=clock,
                plans=plans,
                prices=prices,
                enforces=settings.billing.enforce,
            )
            meter = Meter(
                store=store,
                lifecycle=lifecycle,
                payments=payments,
                clock=clock,
                prices=prices,
                enforces=settings.billing.enforce,
            )
            reconciler = Reconciler(
                store=store,
                placement=placement,
                lifecycle=lifecycle,
                bus=bus,
                clock=clock,
                pace=Pace(),
                idleness=Idleness(store=store, tunnel=node, clock=clock, uses=uses),
                uses=uses,
                away_since=away_since,
            )
            sandboxes = Sandboxes(
                store=store,
                register=register,
                placement=placement,
                tunnel=node,
                lifecycle=lifecycle,
                worker=reconciler,
                uses=uses,
                admission=admission,
                ssh_keys=ssh_keys,
                repeats=repeats,
                bus=bus,
                clock=clock,
                hash_password=hash_password,
                waits=Waits(),
            )
            snapshots = Snapshots(
                store=store,
                register=register,
                placement=placement,
                lifecycle=lifecycle,
                worker=reconciler,
                sandboxes=sandboxes,
                admission=admission,
                repeats=repeats,
                uses=uses,
                clock=clock,
            )
            services = Services(
                access=Access(store, clock, _sign_in(settings, store, clock)),
                rates=Rates(
                    clock, plans, failures_per_minute=settings.accounts.failed_logins_per_minute
                ),
                organizations=Organizations(
                    store=store, repeats=repeats, clock=clock, sign_up=sign_up_of(settings)
                ),
                api_keys=ApiKeys(store, clock),
                ssh_keys=ssh_keys,
                feed=Feed(store, register),
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
                sandboxes=sandboxes,
                snapshots=snapshots,
                templates=Templates(placement),
                readiness=Readiness(store, placement),
            )
            api = make_api(services, version=version, observe=metrics.observe, bind=request_id.set)
            api.add_route(
                "/metrics",
                MetricsRoute(metrics, node, settings.http.metrics_token).answer,
                include_in_schema=False,
            )
            yield House(api, store, node, reconciler, lifecycle, meter)
