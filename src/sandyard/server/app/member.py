"""Runs a host's node in an installation on several hosts, and joins hosts."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from sandyard.build import build_version
from sandyard.server.app.cluster import nats_tls, write_papers, write_private
from sandyard.server.app.installation import NODE_FILE, only_server
from sandyard.server.app.metrics import Metrics, MetricsRoute, Reported, metrics_of
from sandyard.server.app.node import open_node
from sandyard.server.app.serve import at_the_end, http_server, served_on
from sandyard.server.app.settings import Settings
from sandyard.server.core.codec import CodecError, decode, encode
from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.cluster import Application, Hello, Identity, Joining
from sandyard.server.core.errors import (
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    UnavailableError,
)
from sandyard.server.core.ids import new_uuid
from sandyard.server.core.node_ops import Report
from sandyard.server.core.records import NodeStart
from sandyard.server.links.identities import new_request, request_of
from sandyard.server.links.installation import is_control_of
from sandyard.server.links.local import SystemClock
from sandyard.server.links.nats.client import Inbox
from sandyard.server.links.nats.link import Link, linked
from sandyard.server.links.nats.register import NatsPresence
from sandyard.server.links.nats.server import answering
from sandyard.server.links.nats.tokens import Key, KeyLogin, NatsToken, Role
from sandyard.server.links.tunnel.door import DoorPresence, joined
from sandyard.server.links.tunnel.ends import Papers, context_of
from sandyard.server.links.tunnel.server import serving
from sandyard.server.links.volumes import FolderVolumes
from sandyard.server.node.membership import NodeMembership, Telling
from sandyard.server.node.node import Node
from sandyard.server.tasks import Crew, concurrently

log = logging.getLogger(__name__)

_PEMS = ("certificate", "key", "authority")
_PLACE_MAX = 512
_DOORS_MAX = 4
_FIRST_S = 0.5


@dataclass(frozen=True)
class Home:
    """A node's identity: its keys, its id, and the addresses of control planes."""

    identity: Identity
    seed: bytes
    doors: tuple[str, ...]
    address: str

    def kept(self) -> bytes:
        """Return it as stored."""
        return json.dumps(encode(self)).encode()


def home_of(settings: Settings) -> Home:
    """Return this host's identity as a node.

    Raises:
        UnavailableError: it is not a node, or its file cannot be read.
    """
    file = settings.home / "cluster" / NODE_FILE
    try:
        return decode(Home, json.loads(file.read_text()))
    except FileNotFoundError as error:
        raise UnavailableError(
            "cannot start the node: this host has not joined an installation; run `sandyard admin "
            "node invite` on a control plane's host, and here the line that it prints"
        ) from error
    except (OSError, ValueError, CodecError) as error:
        raise UnavailableError(
            f"cannot start the node: {file} cannot be read ({error}); remove it, and join again"
        ) from error


async def join(settings: Settings, door: str, token: str, *, name: str | None = None) -> str:
    """Make this host a node by an invite, and return its new id.

    Raises:
        InvalidArgumentError: the address or the invite is invalid.
        ConflictError: it is a node already, or has an installation of its own.
        SandyardError: see links.tunnel.door.joined.
    """
    host, port = door_at(door)
    try:
        installation, fingerprint, secret = token.split(".")
    except ValueError as error:
        raise InvalidArgumentError(
            "cannot join: the invite is not whole; copy the line of `sandyard admin node invite` "
            "with all that is in it"
        ) from error
    folder = settings.home / "cluster"
    with only_server(settings.home):
        if (folder / NODE_FILE).exists():
            raise ConflictError(
                f"cannot join: {settings.home} is a node already; `sandyard node` starts it"
            )
        key, user = new_request(), Key.new(Role.USER)
        identity, address = await joined(
            host,
            port,
            Joining(secret, name or socket.gethostname(), Application(key[1].decode(), user.name)),
            fingerprint=fingerprint,
            may_be=is_control_of(installation),
        )
        _papers(settings, identity, key[0])
        kept = Home(identity, user.seed, (door,), address)
        write_private(folder / NODE_FILE, kept.kept())
    return identity.node_id


def door_at(door: str) -> tuple[str, int]:
    """Return the host and port of a control plane's address.

    Raises:
        InvalidArgumentError: it is invalid.
    """
    host, _, port = door.rpartition(":")
    if not host or not port.isdigit():
        raise InvalidArgumentError(f"cannot join at {door[:80]!r}: it must be HOST:PORT")
    return host.removeprefix("[").removesuffix("]"), int(port)


def _papers(settings: Settings, identity: Identity, key: bytes) -> Papers:
    trusted = (identity.authority + identity.also_trusted).encode()
    return write_papers(settings.home / "cluster", identity.certificate.encode(), key, trusted)


def place_of(home: Path) -> str:
    """Return a value that distinguishes a host and home from copies of them."""
    # A copied host has the same /etc/machine-id, and a container often none.
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    # Two containers of one host may have copies of a home at the same path.
    found = home.stat()
    return f"{boot}:{found.st_dev}:{found.st_ino}:{home.resolve()}"[:_PLACE_MAX]


class _Credentials:
    """A running node's identity, applied to its connections and saved whenever it changes."""

    def __init__(self, settings: Settings) -> None:
        self.home, self._settings = home_of(settings), settings
        self._folder = settings.home / "cluster"
        self._key = (self._folder / "key.pem").read_bytes()
        papers = Papers(*(self._folder / f"{name}.pem" for name in _PEMS))
        self.answers = context_of(papers, is_server=True)
        self.asks = context_of(papers, is_server=False)
        identity = self.home.identity
        self.node_id, self.is_control = identity.node_id, is_control_of(identity.installation)
        self._user, self._token = Key(Role.USER, self.home.seed), NatsToken(identity.token)
        login = KeyLogin(self._user, self._token)
        tls = nats_tls(identity.servers, identity.nats_authority)
        # Two: the node announces itself before its machines are known, and takes requests only
        # after that.
        self.link, self.requests = (
            Link(identity.servers, f"node {self.node_id}", login, tls) for _ in range(2)
        )
        self.by_nats = NatsPresence(self.link, Inbox(self.link, self.node_id))
        self.by_door = DoorPresence(lambda: self.asks, self.is_control)
        self.by_door.doors = [door_at(one) for one in self.home.doors]
        self._boot, self.version = new_uuid(), build_version()

    def hello(self) -> Hello:
        """Return what the node says about itself to a control plane."""
        own = self._settings.cluster
        address, place = own.address or self.home.address, place_of(self._settings.home)
        start = NodeStart(self._boot, place, self.version, address, own.port)
        return Hello(start, Application(request_of(self._key).decode(), self._user.name))

    def keep(self, identity: Identity) -> None:
        """Use and save a renewed identity."""
        self._token.text = identity.token
        for one in (self.link, self.requests):
            one.servers = identity.servers or one.servers
            if one.tls is not None:
                one.tls.load_verify_locations(cadata=identity.nats_authority)
        self.home = replace(self.home, identity=identity)
        try:
            for end in (self.answers, self.asks):  # first: the disk may be full
                end.load_verify_locations(cadata=identity.authority + identity.also_trusted)
            papers = _papers(self._settings, identity, self._key)
            for end in (self.answers, self.asks):
                end.load_cert_chain(papers.certificate, papers.key)
            write_private(self._folder / NODE_FILE, self.home.kept())
        except OSError as error:  # the previous certificate is still valid for some time
            log.warning("cannot save a renewed certificate: %s; it is renewed again", error)

    def know(self, door: str) -> None:
        """Remember the address of a control plane."""
        if not door or door in self.home.doors:
            return
        self.home = replace(self.home, doors=(door, *self.home.doors)[:_DOORS_MAX])
        self.by_door.doors = [door_at(one) for one in self.home.doors]
        try:
            write_private(self._folder / NODE_FILE, self.home.kept())
        except OSError as error:
            log.warning("cannot save the address of a control plane: %s", error)


@asynccontextmanager
async def open_member(
    settings: Settings, clock: Clock | None = None
) -> AsyncIterator["asyncio.Task[ConflictError | NotFoundError | None]"]:
    """Open this host's node for all control planes.

    The yielded task ends with the reason why this process is no longer the node. Machines keep
    running after the block.

    Raises:
        UnavailableError: this host has not joined, or a port is taken.
        ConflictError: another process is this node.
        NotFoundError: the node was removed.
    """
    clock = clock or SystemClock()
    mine, own = _Credentials(settings), settings.cluster
    metrics, telling = metrics_of(settings), Telling()
    membership = NodeMembership(
        mine.node_id,
        (mine.by_nats, mine.by_door),
        hello=mine.hello,
        keep=mine.keep,
        know=mine.know,
        clock=clock,
        telling=telling,
    )
    async with Crew() as crew, linked(mine.link), AsyncExitStack() as held:
        with suppress(TimeoutError):
            async with clock.timeout(_FIRST_S):
                await mine.link.until_up()
        running = await held.enter_async_context(concurrently(_run(membership)))
        # The records of a copied home name machines of the original.
        async with concurrently(membership.settled()) as settled:
            await asyncio.wait([running, settled], return_when=asyncio.FIRST_COMPLETED)
        if running.done() and (trouble := running.result()) is not None:
            raise trouble
        async with (
            open_node(
                settings,
                clock=clock,
                observer=metrics,
                on_change=lambda: _tell(crew, mine.by_nats, mine.node_id),
                volumes=FolderVolumes(settings.workspaces_dir),
                node_id=mine.node_id,
            ) as node,
            serving(node, address=own.host, port=own.port, tls=mine.answers, may=mine.is_control),
            answering(node, mine.requests, check=membership.check),
            linked(mine.requests),
            _metrics_server(settings, metrics, node),
        ):
            telling.of(node)
            yield running


@asynccontextmanager
async def _metrics_server(settings: Settings, metrics: Metrics, node: Node) -> AsyncIterator[None]:
    """Serve the node's own /metrics, if a port is configured."""
    port = settings.cluster.metrics_port
    if port is None:
        yield
        return

    async def reports() -> list[Reported]:
        return [Reported(await node.do(Report()))]

    async def refused(_: Request, error: Exception) -> Response:
        return PlainTextResponse(f"{error}\n", status_code=404)

    shown = MetricsRoute(metrics, reports, settings.http.metrics_token)
    app = Starlette(
        routes=[Route("/metrics", shown.answer, methods=["GET"])],
        exception_handlers={NotFoundError: refused},
    )
    server = http_server(app, settings.http)
    async with served_on(server, metrics_host(settings), port, "SANDYARD_CLUSTER__METRICS_PORT"):
        yield


def metrics_host(settings: Settings) -> str:
    """Return the address on which a node serves its metrics. Without a token only its own host may
    read them, so that `http.host`, loopback by default, will do."""
    http = settings.http
    if "host" in http.model_fields_set or http.metrics_token is None:
        return http.host
    return settings.cluster.host


def _tell(crew: Crew, registry: NatsPresence, node_id: str) -> None:
    crew.start(
        registry.changed(node_id), "no control plane was told of a change", once="tell",
        quietly=True,
    )  # fmt: skip


async def serve_node(settings: Settings) -> None:
    """Serve this host's machines to control planes, until stopped by SIGTERM or SIGINT.

    Raises:
        UnavailableError: this host has not joined, or its home or port is taken.
        ConflictError: another process is this node.
        NotFoundError: the node was removed.
    """
    stop = at_the_end()
    with only_server(settings.home):
        async with open_member(settings) as running, concurrently(stop.wait()) as stopping:
            await asyncio.wait([stopping, running], return_when=asyncio.FIRST_COMPLETED)
    if running.done() and not running.cancelled() and (trouble := running.result()) is not None:
        raise trouble
    log.info("stopped; machines keep running")


async def _run(membership: NodeMembership) -> ConflictError | NotFoundError | None:
    try:
        await membership.run()
    except (ConflictError, NotFoundError) as error:
        return error
    return None
