"""Runs an installation with its HTTP server, and removes one."""

import asyncio
import contextlib
import gc
import logging
import resource
import signal
import socket
import ssl
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from typing_extensions import override

from sandyard.server.app.backups import back_up_regularly
from sandyard.server.app.control import Control
from sandyard.server.app.house import House, open_house
from sandyard.server.app.installation import forget_environment, only_server, ssh_host_key
from sandyard.server.app.settings import E2bSettings, HttpSettings, PreviewSettings, Settings
from sandyard.server.app.wiring import identity_of
from sandyard.server.core.contracts.node import Phase
from sandyard.server.core.errors import InternalError, SandyardError, UnavailableError
from sandyard.server.core.node_ops import DropSnapshot, EnsureGone, Report
from sandyard.server.core.states import Event, Status
from sandyard.server.drivers.firecracker.jail import remove_groups
from sandyard.server.front.dispatch import Dispatch
from sandyard.server.front.engine import ConnectionLimits, Gate, guarded
from sandyard.server.front.proxies import TrustedProxies
from sandyard.server.gateway.ssh.gateway import open_gateway
from sandyard.server.links.local import SystemClock
from sandyard.server.links.tunnel.handshakes import Handshakes
from sandyard.server.node.host.identity import give_back_identity
from sandyard.server.node.host.mounts import remove_mounts
from sandyard.server.node.host.network import remove_host_rules
from sandyard.server.service.money.metering import BEAT
from sandyard.server.tasks import in_thread

log = logging.getLogger(__name__)

_GRACE_S = 10
_HANDSHAKE_S = 10.0
_THREADS = 32
SOCKET_MESSAGE_MAX = 1024 * 1024
"""What a client may send in one message of a WebSocket."""
_EMPTY_LIMIT_S = 120.0
_GONE = frozenset({Status.DESTROYED})


async def serve(settings: Settings) -> None:
    """Serve until stopped by SIGTERM or SIGINT. Machines keep running.

    Raises:
        UnavailableError: another server uses the home, or the port is taken.
    """
    stop = at_the_end()
    with only_server(settings.home), listen(settings.http.host, settings.http.port) as listener:
        async with open_house(settings) as house, ssh_gateway(house.control, settings):
            if not stop.is_set():
                saving = back_up_regularly(settings, SystemClock())
                await serve_control(house.control, listener, settings, saving)
    log.info("stopped; machines keep running")


def at_the_end() -> asyncio.Event:
    """Prepare this process to serve, and return an event that is set by SIGTERM or SIGINT."""
    forget_environment()
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    loop = asyncio.get_running_loop()
    # Python's default depends on the CPUs. These wait for disks: a few machines that are saved
    # at once, each for a minute, must leave some for those that only write a record.
    loop.set_default_executor(ThreadPoolExecutor(_THREADS, thread_name_prefix="work"))
    # uvicorn takes these over while it serves and raises them again when it is done: without a
    # handler of ours that would end the process before the house has closed.
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    return stop


@contextlib.asynccontextmanager
async def ssh_gateway(control: Control, settings: Settings) -> AsyncIterator[None]:
    """Open the SSH gateway of a control plane, if it is enabled."""
    services, ssh = control.services, settings.ssh
    if not ssh.enabled:
        yield
        return
    async with open_gateway(
        host=ssh.host or settings.http.host,
        port=ssh.port,
        host_key=ssh_host_key(settings.home),
        logins=services.logins,
        processes=services.processes,
        forwards=services.forwards,
        clock=services.clock,
        most=ssh.connections,
        most_by_address=ssh.connections_per_address,
    ) as port:
        log.info("serving SSH on port %s", port)
        yield


class HttpServer(uvicorn.Server):
    """uvicorn, which goes on serving for `drain_s` seconds after it was asked to stop.

    `on_drain` is called at once, and connections are closed after their next answer: a load
    balancer has the time to notice, and no request meets a connection that is about to be closed.
    """

    def __init__(self, config: uvicorn.Config, gate: Gate) -> None:
        super().__init__(config)
        self.drain_s = 0.0
        self.on_drain: Callable[[], None] = lambda: None
        self._gate = gate
        self._drained_at: float | None = None

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop serving; on the second signal, exit immediately."""
        if self.drain_s == 0 or self._drained_at is not None:
            super().handle_exit(sig, frame)
            return
        self._captured_signals.append(sig)
        self._drained_at = time.monotonic() + self.drain_s
        self.close_after_answers()
        self.on_drain()

    def close_after_answers(self) -> None:
        """Close each connection after its next answer."""
        self._gate.is_draining = True

    @override
    async def on_tick(self, counter: int) -> bool:
        if self._drained_at is not None and time.monotonic() >= self._drained_at:
            self.should_exit = True
        return await super().on_tick(counter)


def http_server(
    api: ASGIApp,
    http: HttpSettings,
    patience: ConnectionLimits | None = None,
    *,
    is_tunnel: Callable[[Any], bool] = lambda _: False,
    handshakes: Handshakes | None = None,
) -> HttpServer:
    """Return the HTTP server of an application, with the limits of the settings.

    For `is_tunnel` see `guarded`. With `handshakes` it terminates TLS.
    """
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    gate = Gate(
        # The other half is for the platform's own work, so that many clients cannot stop it.
        most=min(http.connections, descriptors // 2),
        most_by_address=http.connections_per_address,
        patience=patience,
    )
    protocol, socket_protocol = guarded(gate, is_tunnel)
    return HttpServer(
        uvicorn.Config(
            TrustedProxies(api, http.trusted_proxies) if http.trusted_proxies else api,
            proxy_headers=False,
            log_config=None,
            access_log=False,
            server_header=False,
            http=protocol if handshakes is None else _behind(handshakes, protocol),
            ws=socket_protocol,
            ws_max_size=SOCKET_MESSAGE_MAX,
            ws_per_message_deflate=False,
            ws_ping_interval=None,
            lifespan="off",  # the house opens and closes, not the application
            backlog=256,
            timeout_graceful_shutdown=_GRACE_S,
            timeout_keep_alive=75,
        ),
        gate,
    )


def _behind(handshakes: Handshakes, protocol: type[asyncio.Protocol]) -> Any:
    """Return a factory of connections whose protocol starts after their TLS handshake."""
    return lambda **given: handshakes.protocol(lambda: protocol(**given))


async def serve_control(
    control: Control,
    listener: socket.socket,
    settings: Settings,
    *background: Coroutine[object, object, None],
    drain_s: float = 0.0,
) -> None:
    """Serve HTTP and run a control plane's background work, with `background` concurrently, until
    stopped, and for `drain_s` seconds longer."""
    handshakes = _handshakes(settings.preview, "preview")
    e2b_handshakes = _handshakes(settings.e2b, "e2b")
    server = http_server(control.front, settings.http, is_tunnel=control.front.is_tunnel)
    server.drain_s = drain_s
    # What is there by now stays: to look through it again and again for garbage costs a tenth of
    # what a burst of creates takes.
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    async with asyncio.TaskGroup() as tasks:
        working = [
            tasks.create_task(control.reconciler.run()),
            tasks.create_task(control.meter.run()),
            tasks.create_task(control.services.workspaces.run()),
            tasks.create_task(control.services.readiness.run()),
            tasks.create_task(control.services.building.run()),
            tasks.create_task(control.services.journals.run()),
            *(tasks.create_task(one) for one in background),
        ]
        host, port = listener.getsockname()[:2]
        log.info("serving on http://%s:%s", host, port)
        async with (
            _preview_server(control.previews, settings, handshakes) as preview,
            _e2b_server(control.front, settings, e2b_handshakes) as e2b,
        ):

            def drain() -> None:
                control.services.readiness.stop_serving()
                for one in (preview, e2b):
                    if one is not None:
                        one.close_after_answers()

            server.on_drain = drain
            await server.serve(sockets=[listener])
        for one in working:
            one.cancel()


def _preview_server(
    preview: ASGIApp, settings: Settings, handshakes: Handshakes | None
) -> AbstractAsyncContextManager[HttpServer | None]:
    """Serve previews on a separate port, if one is configured."""
    server = http_server(preview, settings.http, is_tunnel=lambda _: True, handshakes=handshakes)
    return _beside(server, settings, settings.preview.port, "PREVIEW", handshakes)


def _e2b_server(
    front: Dispatch, settings: Settings, handshakes: Handshakes | None
) -> AbstractAsyncContextManager[HttpServer | None]:
    """Serve the E2B API on a separate port, if one is configured."""
    server = http_server(front, settings.http, is_tunnel=front.is_tunnel, handshakes=handshakes)
    return _beside(server, settings, settings.e2b.port, "E2B", handshakes)


@contextlib.asynccontextmanager
async def _beside(
    server: HttpServer,
    settings: Settings,
    port: int | None,
    section: str,
    handshakes: Handshakes | None,
) -> AsyncIterator[HttpServer | None]:
    """Run a server on a separate port, if one is configured."""
    if port is None:
        yield None
        return
    async with served_on(server, settings.http.host, port, f"SANDYARD_{section}__PORT"):
        try:
            yield server
        finally:
            if handshakes is not None:
                handshakes.close()


@contextlib.asynccontextmanager
async def served_on(
    server: uvicorn.Server, host: str, port: int, setting: str
) -> AsyncIterator[None]:
    """Run a server on a port of its own, in addition to what the process serves.

    Raises:
        UnavailableError: the port is taken; the message names `setting`.
    """
    with listen(host, port, setting) as listener:
        async with asyncio.TaskGroup() as tasks:
            # `_serve` leaves signals alone: they are the process's to handle.
            serving = tasks.create_task(server._serve([listener]))
            try:
                yield
            finally:
                server.should_exit = True
                await asyncio.wait([serving])


def _handshakes(section: PreviewSettings | E2bSettings, name: str) -> Handshakes | None:
    """Return the TLS handshakes for a separate port, if it terminates TLS.

    Raises:
        UnavailableError: its certificate cannot be used.
    """
    certificate, key = section.tls_certificate, section.tls_key
    if certificate is None or key is None:
        return None
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        tls.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise UnavailableError(
            f"cannot use the certificate {certificate} with the key {key}: {error}; check "
            f"{name}.tls_certificate and {name}.tls_key"
        ) from error
    return Handshakes(tls, limit_s=_HANDSHAKE_S)


def listen(host: str, port: int, setting: str = "SANDYARD_HTTP__PORT") -> socket.socket:
    """Return a listening socket.

    Raises:
        UnavailableError: the port is taken.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # With the protocol named, asyncio switches Nagle's algorithm off on what is accepted here;
    # without it every small answer waits 40 ms for the client's acknowledgement.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise UnavailableError(
            f"cannot listen on {host}:{port}: {error.strerror}; set {setting} to another port"
        ) from error
    return listener


async def remove_everything(settings: Settings) -> int:
    """Delete every sandbox and everything the installation set up on the host; return how many.

    Images, database and keys stay. The server must be stopped.

    Raises:
        UnavailableError: a server is running, or something cannot be removed.
    """
    removed = 0
    with only_server(settings.home):
        async with (
            open_house(settings, fills_pool=False) as house,
            asyncio.TaskGroup() as tasks,
        ):
            reconciling = tasks.create_task(house.reconciler.run())
            async with asyncio.timeout(_EMPTY_LIMIT_S):
                removed = await _delete_all(house)
            reconciling.cancel()
        if settings.node.driver != "fake":
            identity = await identity_of(settings)
            await remove_host_rules(identity)
            await in_thread(remove_groups, identity.prefix)
            try:
                await remove_mounts(settings.home)
            except InternalError as error:
                log.warning("%s", error.message)
            give_back_identity(settings.home)
    return removed


async def _delete_all(house: House) -> int:
    removed = 0
    async with house.store.read() as tx:
        away_since = await tx.facts.moment(BEAT)
    report = await house.node.do(Report())
    living = {fact.sandbox_id for fact in report.machines if fact.phase is not Phase.DEAD}
    while True:
        async with house.store.read() as tx:
            left = await tx.sandboxes.on_node(house.node.node_id, frozenset(Status) - _GONE)
            left += await tx.sandboxes.on_node(None, frozenset({Status.PENDING}))
        if not left:
            break
        for sandbox in left:
            if sandbox.status is not Status.DESTROYING:
                with contextlib.suppress(SandyardError):
                    await house.lifecycle.apply(
                        sandbox,
                        Event.DELETE,
                        ended_at=None if sandbox.id in living else away_since,
                    )
                    removed += 1
        await asyncio.sleep(0.05)
    async with house.store.read() as tx:
        snapshots = await tx.snapshots.on_node(house.node.node_id)
    now = SystemClock().now()
    for one in snapshots:
        async with house.store.write(one.org_id) as tx:
            await tx.snapshots.remove(one.id, at=now)
            await tx.storage.close("snapshot", one.id, now)
    # Machines and snapshots that the store knows nothing of: it was lost or replaced.
    for fact in (await house.node.do(Report())).machines:
        await house.node.do(EnsureGone(fact.sandbox_id, incarnation=fact.incarnation))
        removed += 1
    for snapshot_id in (await house.node.do(Report())).snapshots:
        await house.node.do(DropSnapshot(snapshot_id))
    return removed
