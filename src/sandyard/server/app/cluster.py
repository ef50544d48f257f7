"""Runs a control plane of an installation on several hosts, and its operator commands."""

import logging
import os
import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version as package_version
from pathlib import Path

from typing_extensions import override

from sandyard.server.app.backups import back_up_regularly
from sandyard.server.app.clocks import agree_at_first, agreeing, database_of
from sandyard.server.app.control import Control, open_control
from sandyard.server.app.database import open_database
from sandyard.server.app.installation import only_server, server_id_of
from sandyard.server.app.metrics import metrics_of
from sandyard.server.app.serve import at_the_end, listen, serve_control, ssh_gateway
from sandyard.server.app.settings import Settings
from sandyard.server.app.wiring import sign_up_of
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.errors import InvalidArgumentError, SandyardError, UnavailableError
from sandyard.server.links.identities import nats_name, new_request, node_name
from sandyard.server.links.installation import Installation, InstallationRegistrar
from sandyard.server.links.local import AgreedClock, LocalBus, SystemClock
from sandyard.server.links.nats.bus import NatsBus, hinting
from sandyard.server.links.nats.client import Inbox, RemoteNode
from sandyard.server.links.nats.config import ServerFiles, config_of
from sandyard.server.links.nats.link import TLS_NAME, Link, NatsLogin, linked
from sandyard.server.links.nats.register import registering
from sandyard.server.links.nats.tokens import Key, Role, signature_of
from sandyard.server.links.tunnel.client import NodeAddress, Tunnels
from sandyard.server.links.tunnel.door import fingerprint_of, opened_door
from sandyard.server.links.tunnel.ends import Papers, context_of
from sandyard.server.links.volumes import FolderVolumes
from sandyard.server.node.membership import boot_time
from sandyard.server.service.fleet import Fleet
from sandyard.server.service.people.bootstrap import ensure_first_organization
from sandyard.server.service.reconcile.reconciler import topic_of_node
from sandyard.server.service.roster import Roster
from sandyard.server.service.sandboxes.lifecycle import Lifecycle
from sandyard.server.tasks import concurrently

log = logging.getLogger(__name__)

_ANY = frozenset({"0.0.0.0", "::"})  # noqa: S104 - compared, not listened on
INSTALLATION = "installation"
"""The name of the secret that has its authority and keys."""
_LOOK_S, _RENEW_S = 20.0, 24 * 3600.0


async def ensure_installation(store: Store, clock: Clock) -> Installation:
    """Return the installation's authority and NATS account, created at first use.

    Raises:
        InternalError: it was sealed with another key.
    """
    async with store.read() as tx:
        known = await tx.secrets.find(INSTALLATION)
    if known is None:
        async with store.write(Turn.ALONE) as tx:
            known = await tx.secrets.find(INSTALLATION)
            if known is None:
                known = Installation.new(clock.now()).values()
                await tx.secrets.add(INSTALLATION, known)
    return Installation.of(known)


def write_papers(folder: Path, certificate: bytes, key: bytes, authority: bytes) -> Papers:
    """Write certificate, key and authority into a private directory, and return their paths."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    papers = Papers(folder / "certificate.pem", folder / "key.pem", folder / "authority.pem")
    for path, data in (
        (papers.key, key), (papers.certificate, certificate), (papers.authority, authority),
    ):  # fmt: skip
        write_private(path, data)
    return papers


def write_private(path: Path, data: bytes) -> None:
    """Write a file atomically, readable by its owner only."""
    part = path.with_name(f"{path.name}.part")
    descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def nats_tls(servers: tuple[str, ...], authority: str) -> ssl.SSLContext | None:
    """Return the TLS context for NATS (with its authority in PEM), or None if it is not
    encrypted."""
    if not any(one.startswith("tls://") for one in servers):
        return None
    context = ssl.create_default_context(cadata=authority)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context


def advertised_address(settings: Settings) -> str:
    """Return the address by which other hosts reach this one."""
    own = settings.cluster
    return own.address or (own.host if own.host not in _ANY else socket.gethostname())


def door_of(settings: Settings) -> str:
    """Return the HOST:PORT by which nodes reach this control plane."""
    address = advertised_address(settings)
    host = f"[{address}]" if ":" in address else address
    return f"{host}:{settings.cluster.port}"


class ControlLogin(NatsLogin):
    """See links.nats.link.NatsLogin: a control plane makes its own tokens."""

    def __init__(self, installation: Installation, server_id: str, clock: Clock) -> None:
        self._installation = installation
        self._server_id = server_id
        self._clock = clock
        self._key = Key.new(Role.USER)

    @override
    def token(self) -> str:
        return self._installation.control_token(self._key.name, self._server_id, self._clock.now())

    @override
    def sign(self, nonce: bytes) -> bytes:
        return signature_of(self._key, nonce)


class RemoteNodes(Mapping[str, RemoteNode]):
    """The nodes of a roster, as clients of their requests."""

    def __init__(self, roster: Roster, link: Link, inbox: Inbox) -> None:
        self._roster = roster
        self._link = link
        self._inbox = inbox

    @override
    def __getitem__(self, node_id: str) -> RemoteNode:
        if node_id not in self._roster.nodes:
            raise KeyError(node_id)
        return RemoteNode(self._link, self._inbox, node_id)

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(list(self._roster.nodes))

    @override
    def __len__(self) -> int:
        return len(self._roster.nodes)


@dataclass(frozen=True)
class Cluster:
    """A control plane's connections to other hosts; `roster` is to be run."""

    roster: Roster
    nodes: RemoteNodes
    tunnels: Tunnels
    bus: NatsBus
    link: Link
    door: int


class _Trust:
    """The certificate of a control plane, and the TLS contexts by which it asks and answers."""

    def __init__(
        self,
        registrar: InstallationRegistrar,
        store: Store,
        clock: Clock,
        *,
        server_id: str,
        folder: Path,
    ) -> None:
        self._registrar = registrar
        self._store = store
        self._clock = clock
        self._server_id = server_id
        self._folder = folder
        self._papers = self._written(registrar.installation)
        self.asks = context_of(self._papers, is_server=False)
        self.answers = context_of(self._papers, is_server=True)
        self.answers.verify_mode = ssl.CERT_OPTIONAL  # a joining host has no certificate yet

    def _written(self, installation: Installation) -> Papers:
        papers = installation.control_papers(self._server_id, self._clock.now())
        return write_papers(self._folder, *papers, installation.trusted)

    async def renew(self, link: Link) -> None:
        """Renew the certificate in time, and trust what the installation trusts; never returns."""
        renewed, is_due = self._clock.monotonic(), False
        while True:
            await self._clock.sleep(_LOOK_S)
            try:
                known = await ensure_installation(self._store, self._clock)
                is_due = is_due or self._clock.monotonic() >= renewed + _RENEW_S
                if known == self._registrar.installation and not is_due:
                    continue
                is_due = True
                # What was trusted before stays so in this process: a context only ever takes more.
                for one in (self.asks, self.answers):
                    one.load_verify_locations(cadata=known.trusted.decode())
                if link.tls is not None:
                    link.tls.load_verify_locations(cadata=known.nats_trusted.decode())
                self._registrar.installation = known
                self._written(known)
                for one in (self.asks, self.answers):
                    one.load_cert_chain(self._papers.certificate, self._papers.key)
            except (SandyardError, OSError) as error:
                log.warning("cannot renew the certificate: %s; trying again", error)
            else:
                renewed, is_due = self._clock.monotonic(), False


@asynccontextmanager
async def open_cluster(
    settings: Settings, *, server_id: str, store: Store, clock: Clock
) -> AsyncIterator[Cluster]:
    """Join the control planes and nodes of an installation, and leave them when the block ends.

    Raises:
        InvalidArgumentError: no NATS servers are configured.
        UnavailableError: the port is taken, or the store does not answer.
    """
    own = settings.cluster
    if not own.nats:
        raise InvalidArgumentError(
            "cannot start a control plane: set SANDYARD_CLUSTER__NATS to where NATS is, such as "
            '["tls://10.0.0.5:4222"]; on one machine, `sandyard serve` needs none of it'
        )
    installation = await ensure_installation(store, clock)
    registrar = InstallationRegistrar(installation, own.nats, clock.now)
    trust = _Trust(registrar, store, clock, server_id=server_id, folder=settings.home / "cluster")
    link = Link(
        own.nats,
        f"control {server_id}",
        ControlLogin(installation, server_id, clock),
        nats_tls(own.nats, installation.nats_trusted.decode()),
    )
    inbox = Inbox(link, server_id)
    roster = Roster(store, clock, can_hear=lambda: link.is_up, elapsed=boot_time)
    await roster.refresh()
    lifecycle = Lifecycle(store, LocalBus(clock), clock)
    fleet = Fleet(
        store, registrar, lifecycle, clock,
        door=door_of(settings), hear=roster.hear, hears_late=roster.hears_late,
    )  # fmt: skip

    def place_of(node_id: str) -> NodeAddress | None:
        node = roster.nodes.get(node_id)
        if node is None or not node.host:
            return None
        return NodeAddress(node.host, node.port, node_name(installation.id, node_id))

    async with (
        hinting(link, clock) as bus,
        registering(
            fleet,
            link,
            on_change=lambda one: bus.hint_here(topic_of_node(one)),
            on_beat=roster.hear,
        ),
        Tunnels(trust.asks, place_of) as tunnels,
        opened_door(
            fleet,
            address=own.host,
            port=own.port,
            tls=trust.answers,
            authority=lambda: registrar.installation.authority.certificate.decode(),
            node_of=installation.node_of,
        ) as door,
        linked(link),
        concurrently(trust.renew(link)),
    ):
        yield Cluster(roster, RemoteNodes(roster, link, inbox), tunnels, bus, link, door)


@asynccontextmanager
async def open_cluster_control(
    settings: Settings, clock: Clock | None = None
) -> AsyncIterator[tuple[Control, Cluster]]:
    """Open a control plane on the shared store, and on its nodes."""
    agreed = AgreedClock()
    clock = clock or agreed
    version, server_id = package_version("sandyard"), server_id_of(settings.home)
    async with (
        open_database(settings, clock=clock) as store,
        agreeing(agreed, store, database_of(store)),
    ):
        await ensure_first_organization(store, clock, sign_up_of(settings))
        volumes = FolderVolumes(
            settings.workspaces_dir, floor_bytes=settings.node.disk_floor_mib * 2**20
        )
        async with (
            open_cluster(settings, server_id=server_id, store=store, clock=clock) as cluster,
            open_control(
                settings,
                server_id=server_id,
                store=store,
                nodes=cluster.nodes,
                roster=cluster.roster,
                tunnel=cluster.tunnels,
                volumes=volumes,
                bus=cluster.bus,
                clock=clock,
                metrics=metrics_of(settings),
                version=version,
            ) as control,
        ):
            yield control, cluster


async def serve_cluster_control(settings: Settings) -> None:
    """Serve as a control plane, until stopped by SIGTERM or SIGINT.

    Raises:
        InvalidArgumentError: a setting is missing; the message names it.
        UnavailableError: another server uses the home, or a port is taken.
    """
    if not settings.store_url.startswith("postgresql://"):
        raise InvalidArgumentError(
            "cannot start a control plane on SQLite: set SANDYARD_STORE__URL to the PostgreSQL "
            "database that all of them share; on one machine, use `sandyard serve`"
        )
    stop = at_the_end()
    with only_server(settings.home), listen(settings.http.host, settings.http.port) as listener:
        async with (
            open_cluster_control(settings) as (control, cluster),
            ssh_gateway(control, settings),
        ):
            log.info("nodes join at port %s", cluster.door)
            if not stop.is_set():
                saving = back_up_regularly(settings, SystemClock())
                await serve_control(
                    control, listener, settings, cluster.roster.run(), saving,
                    drain_s=settings.cluster.drain_s,
                )  # fmt: skip
    log.info("stopped; nodes and machines keep running")


# --- what an operator does ----------------------------------------------------------------------


@asynccontextmanager
async def open_fleet(settings: Settings) -> AsyncIterator[tuple[Fleet, Installation]]:
    """Open an installation's nodes for its operator, with or without a running control plane."""
    clock = AgreedClock()
    async with open_database(settings) as store:
        await agree_at_first(clock, database_of(store))
        installation = await ensure_installation(store, clock)
        registrar = InstallationRegistrar(installation, settings.cluster.nats, clock.now)
        yield Fleet(store, registrar, Lifecycle(store, LocalBus(clock), clock), clock), installation


async def invite_line(settings: Settings) -> str:
    """Return the command that makes a host a node. It is valid once, for an hour.

    Raises:
        InvalidArgumentError: this is not a control plane's host.
    """
    if not settings.cluster.nats:
        raise InvalidArgumentError(
            "cannot invite a host: this installation is on one machine, or this is no control "
            "plane's host; set SANDYARD_CLUSTER__NATS as the control planes have it"
        )
    async with open_fleet(settings) as (fleet, installation):
        authority = installation.authority.certificate.decode()
        secret = await fleet.invite()
    token = f"{installation.id}.{fingerprint_of(authority)}.{secret}"
    # By a pipe: what is on a command line, every user of the host sees.
    return f"echo {token} | sandyard node join {door_of(settings)}"


async def write_nats_config(
    settings: Settings,
    folder: Path,
    *,
    host: str,
    addresses: tuple[str, ...],
    port: int,
    routes: tuple[str, ...],
    cluster_port: int | None,
    name: str,
) -> Path:
    """Write the configuration for a NATS server of the installation; return its file.

    `addresses` are those by which other servers reach it. Default: `host`, or this host's name.

    Raises:
        UnavailableError: it cannot be written there.
    """
    clock = SystemClock()
    async with open_database(settings) as store:
        installation = await ensure_installation(store, clock)
    now = clock.now()
    key, request = new_request()
    known_by = addresses or ((socket.gethostname(),) if host in _ANY else (host,))
    certificate = installation.nats.sign_server(
        request, nats_name(installation.id, name), (TLS_NAME, *known_by), now
    )
    try:
        papers = write_papers(folder.absolute(), certificate, key, installation.nats_trusted)
        file = folder.absolute() / "nats.conf"
        write_private(
            file,
            config_of(
                installation=installation.id,
                operator=installation.operator,
                account=installation.account,
                host=host,
                port=port,
                files=ServerFiles(papers.certificate, papers.key, papers.authority),
                cluster_port=cluster_port,
                routes=routes,
                name=name,
            ).encode(),
        )
    except OSError as error:
        raise UnavailableError(f"cannot write into {folder}: {error.strerror}") from error
    return file
