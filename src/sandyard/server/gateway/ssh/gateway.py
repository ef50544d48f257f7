"""The SSH gateway: authenticates clients, and maps channels to processes and connections of a
sandbox.

No sshd runs in a sandbox. A session becomes a process of the agent (a shell, a command, sftp-
server). A forwarded connection is made or accepted by the machine itself, so the sandbox's own
network rules apply to it.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import asyncssh
from asyncssh.constants import MSG_KEXINIT
from asyncssh.kex import get_kex_algs
from asyncssh.stream import SSHTCPStreamSession, SSHUNIXStreamSession
from typing_extensions import override

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.errors import NotFoundError, SandyardError, UnavailableError
from sandyard.server.core.ops import Dial, Listen
from sandyard.server.core.sources import BySource, source_of
from sandyard.server.gateway.ssh.forwarding import CHANNEL_S, PACKET, WINDOW, Forward, Listener
from sandyard.server.gateway.ssh.sessions import SessionChannel, SshSession
from sandyard.server.gateway.ssh.throttle import Throttle
from sandyard.server.service.actor import Actor
from sandyard.server.service.people.logins import UNCLEAR, Login, Logins
from sandyard.server.service.sandboxes.forwards import Forwards
from sandyard.server.service.sandboxes.processes import Processes
from sandyard.server.tasks import Crew

log = logging.getLogger(__name__)

_LOGIN_S = 30.0
_ALIVE_S, _ALIVE_TRIES = 30, 4
_UNCLEAR_S = 60.0
_LOOK_S = 5.0
_AUTHORIZE_S = 15.0
_ATTEMPTS_MAX = 20
_REFUSAL_S = 0.01
_UNKNOWN_BY_ADDRESS = 50  # connections that have not logged in yet
_HANDSHAKES_AT_ONCE, _HANDSHAKES_A_SECOND = 100, 5.0  # of one source, that led to no login
_UNSTARTED_MAX = 100  # sessions that have not requested anything yet
_UNREAD_MAX = 64 * 1024 * 1024
_SESSIONS_MAX = 200  # of one connection, with what it forwards; what comes to a port is besides
_CLOSE_S = 3.0

# What all current clients support; the client's first choice that is in the list is
# used. The first two key exchanges resist quantum computers; the second needs liboqs.
_KEY_EXCHANGES = tuple(
    one
    for one in (
        "mlkem768x25519-sha256", "sntrup761x25519-sha512", "sntrup761x25519-sha512@openssh.com",
        "curve25519-sha256", "curve25519-sha256@libssh.org",
    )
    if one.encode() in get_kex_algs()
)  # fmt: skip
_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes256-ctr", "aes128-ctr")
_MACS = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com")
_SIGNATURES = (
    "sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com", "ssh-ed25519",
    "ecdsa-sha2-nistp521", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp256", "rsa-sha2-256",
    "rsa-sha2-512",
)  # fmt: skip


class SshGateway:
    """Counts connections and starts their tasks. `open_gateway` opens one."""

    def __init__(
        self,
        *,
        logins: Logins,
        processes: Processes,
        forwards: Forwards,
        most: int,
        most_by_address: int,
        crew: Crew,
        clock: Clock,
    ) -> None:
        self.clock = clock
        self.logins = logins
        self.processes = processes
        self.forwards = forwards
        self.crew = crew
        self._most = most
        self._most_by_address = most_by_address
        self._open: BySource[_Client] = BySource()
        self.throttle = Throttle(
            at_once=_HANDSHAKES_AT_ONCE, a_second=_HANDSHAKES_A_SECOND, monotonic=clock.monotonic
        )

    def enter(self, client: "_Client", address: str) -> str | None:
        """Count a connection from a source. Return None, or the reason for refusing it."""
        if not self.throttle.begin(address):
            return "too many connections came from this address without a login; try again later"
        if len(self._open) >= self._most or self._open.count(address) >= self._most_by_address:
            return "too many connections are open; close some, or try again later"
        unknown = [one for one in self._open if not one.is_known]
        here = sum(not one.is_known for one in self._open.of(address))
        if here >= _UNKNOWN_BY_ADDRESS:
            return "too many are logging in from this address just now; try again"
        if len(unknown) >= self._most // 2:
            # A connection of the source with the most gives way to the new one.
            crowd, _ = Counter(map(self._open.source, unknown)).most_common(1)[0]
            next(one for one in unknown if self._open.source(one) == crowd).close("try again")
        self._open.add(client, address)
        return None

    def leave(self, client: "_Client") -> None:
        """Stop counting a connection."""
        self._open.remove(client)

    async def close(self, reason: str) -> None:
        """Close all connections with a reason, and wait until they are closed."""
        open_ = [one.connection for one in self._open]
        for client in list(self._open):
            client.close(reason)
        with suppress(TimeoutError):
            async with self.clock.timeout(_CLOSE_S):
                await asyncio.gather(*(one.wait_closed() for one in open_), return_exceptions=True)
        for connection in open_:
            connection.abort()


@asynccontextmanager
async def open_gateway(
    *,
    host: str,
    port: int,
    host_key: bytes,
    logins: Logins,
    processes: Processes,
    clock: Clock,
    forwards: Forwards,
    most: int = 1000,
    most_by_address: int = 200,
) -> AsyncIterator[int]:
    """Serve SSH on an address, and yield the port.

    Raises:
        UnavailableError: the address is taken.
    """
    # Its own log would contain the commands that people run.
    asyncssh.set_log_level(logging.ERROR)
    async with Crew() as crew:
        gateway = SshGateway(
            logins=logins,
            processes=processes,
            forwards=forwards,
            most=most,
            most_by_address=most_by_address,
            clock=clock,
            crew=crew,
        )
        try:
            acceptor = await asyncssh.listen(
                host,
                port,
                server_factory=lambda: _Client(gateway),
                server_host_keys=[asyncssh.import_private_key(host_key)],
                encoding=None,
                line_editor=False,
                allow_scp=False,
                kbdint_auth=False,
                # Compressed data may be very large when unpacked.
                compression_algs=["none"],
                gss_host=None,
                server_version="Sandyard",
                login_timeout=_LOGIN_S,
                keepalive_interval=_ALIVE_S,
                keepalive_count_max=_ALIVE_TRIES,
                kex_algs=_KEY_EXCHANGES,
                encryption_algs=_CIPHERS,
                mac_algs=_MACS,
                signature_algs=_SIGNATURES,
                backlog=256,
            )
        except OSError as error:
            raise UnavailableError(
                f"cannot listen on {host}:{port} for SSH: {error.strerror}; set SANDYARD_SSH__PORT "
                "to another port, or SANDYARD_SSH__ENABLED=false"
            ) from error
        try:
            yield acceptor.get_port()
        finally:
            acceptor.close()
            await gateway.close("the server is being stopped; log in again in a moment")
            await acceptor.wait_closed()


def rest_of(elapsed_s: float) -> float:
    """Return how much longer a refusal has to take: 10 ms in total, doubled as often as needed."""
    whole_s = _REFUSAL_S
    while whole_s < elapsed_s:
        whole_s *= 2
    return whole_s - elapsed_s


class _Client(asyncssh.SSHServer):
    """One connection: its login and its channels."""

    def __init__(self, gateway: SshGateway) -> None:
        self.gateway = gateway
        self.clock = gateway.clock
        self.crew = gateway.crew
        self.processes = gateway.processes
        self.forwards = gateway.forwards
        self.address = self._source = "unknown"
        self.peer: tuple[str, int] = ("", 0)
        self._connection: asyncssh.SSHServerConnection | None = None
        self._offered: Login | None = None
        self._login: Login | None = None
        self._attempts = 0
        self._exchanges = 0
        self._is_hinted = False
        self._channels = 0
        self._unstarted = 0
        self._listening: set[asyncio.Future[None]] = set()
        self._is_over = asyncio.Event()

    @property
    def is_known(self) -> bool:
        """Whether it has logged in."""
        return self._login is not None

    @property
    def connection(self) -> asyncssh.SSHServerConnection:
        """The connection, once there is one."""
        assert self._connection is not None
        return self._connection

    # --- the connection ---------------------------------------------------------------------

    @override
    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        self._connection = conn
        peer = conn.get_extra_info("peername") or ("unknown", 0)
        self.address, self.peer = str(peer[0]), (str(peer[0]), int(peer[1]))
        self._source = source_of(self.address)
        refusal = self.gateway.enter(self, self._source)
        if refusal is not None:
            self.close(refusal)
            return
        # asyncssh exchanges keys as often as it is asked to.
        handlers: Any = conn
        handlers._packet_handlers = {
            **handlers._packet_handlers,
            MSG_KEXINIT: self._limited(handlers._packet_handlers[MSG_KEXINIT]),
        }

    def _limited(self, process: Callable[..., Any]) -> Callable[..., Any]:
        """Return a handler that allows one key exchange before login."""

        def limited(conn: Any, *packet: Any) -> Any:
            self._exchanges += 1
            if self._exchanges > 1 and not self.is_known:
                self.close("log in before keys are exchanged again")
                return True
            return process(conn, *packet)

        return limited

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self.gateway.leave(self)
        self._is_over.set()

    def close(self, reason: str) -> None:
        """Close the connection with a reason."""
        if self._connection is not None:
            self._connection.disconnect(asyncssh.DISC_SERVICE_NOT_AVAILABLE, f"sandyard: {reason}")

    # --- who is it --------------------------------------------------------------------------

    @override
    def begin_auth(self, username: str) -> bool:
        """Tell asyncssh that every login needs a credential."""
        del username
        return True

    @override
    def password_auth_supported(self) -> bool:
        """Offer the same for every name, so that the answer does not tell which sandboxes exist."""
        return True

    @override
    def public_key_auth_supported(self) -> bool:
        return True

    @override
    async def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        """Tell whether a key may log in; asyncssh verifies the signature itself."""
        if not self._may_try():
            return False
        text = key.export_public_key("openssh").decode().strip()
        self._offered = await self._asked(self.gateway.logins.by_key(username, text))
        return self._offered is not None

    @override
    async def validate_password(self, username: str, password: str) -> bool:
        if not self._may_try():
            return False
        found = self.gateway.logins.by_password(username, password, self.address)
        self._offered = await self._asked(found)
        if self._offered is None and not self._is_hinted:
            self._is_hinted = True
            with suppress(SandyardError):
                if (hint := await self.gateway.logins.hint(username)) is not None:
                    self.connection.send_auth_banner(f"sandyard: {hint}\r\n")
        return self._offered is not None

    @override
    def change_password(self, username: str, old_password: str, new_password: str) -> bool:
        """Refuse: a password cannot be changed over SSH."""
        del username, old_password, new_password
        return False

    async def _asked(self, question: Awaitable[Login | None]) -> Login | None:
        """Return the result of a login attempt. Refusals are delayed to fixed times, so that timing
        reveals nothing."""
        began = self.clock.monotonic()
        found = None
        try:
            found = await question
        except SandyardError as error:
            log.warning("cannot verify an SSH login: %s; refusing it", error.message)
        if found is None:
            await self.clock.sleep(rest_of(self.clock.monotonic() - began))
        return found

    def _may_try(self) -> bool:
        self._attempts += 1
        if self._attempts > _ATTEMPTS_MAX:
            self.close("too many invalid keys and passwords; try again with a valid one")
            return False
        return True

    @override
    def auth_completed(self) -> None:
        """Note who logged in: of all that was offered, the last is what was proved."""
        self._login, self._offered = self._offered, None
        if self._login is not None:
            self.gateway.throttle.give_back(self._source)
            self.crew.start(self._watch(self._login), "a login is not watched")

    async def _watch(self, login: Login) -> None:
        """Record the login, and close the connection when it is no longer authorized."""
        if login.sandbox_id is None:
            # Every request gets that error; after a while the connection is closed.
            with suppress(TimeoutError):
                async with self.clock.timeout(_UNCLEAR_S):
                    await self._is_over.wait()
            self.close(UNCLEAR)
            return
        try:
            await self.gateway.logins.note(login, login.sandbox_id, self.address)
        except SandyardError as error:
            # What cannot be written to the audit log is not done.
            log.warning("cannot record an SSH login: %s; closing the connection", error.message)
            self.close("the login could not be recorded; try again")
            return
        clock = self.clock
        authorized_at = clock.monotonic()
        while not self._is_over.is_set():
            with suppress(TimeoutError):
                async with clock.timeout(_LOOK_S):
                    await self._is_over.wait()
            transport = getattr(self.connection, "_transport", None)
            if transport is not None and transport.get_write_buffer_size() > _UNREAD_MAX:
                self.connection.abort()  # it requests data that it does not read
                return
            if clock.monotonic() - authorized_at >= _AUTHORIZE_S:
                authorized_at = clock.monotonic()
                try:
                    await self.gateway.logins.still(login)
                except UnavailableError:
                    continue  # an unavailable store revokes nothing
                except SandyardError as error:
                    self.close(error.message)
                    return

    async def of(self) -> tuple[Actor, str]:
        """Return the actor and the sandbox's id.

        Raises:
            NotFoundError: the name is ambiguous, or the sandbox was deleted.
            UnauthenticatedError, PermissionDeniedError: the login is no longer authorized.
        """
        login = self._login
        if login is None or login.sandbox_id is None:
            raise NotFoundError(UNCLEAR)
        return await self.gateway.logins.still(login), login.sandbox_id

    # --- what it wants ----------------------------------------------------------------------

    @override
    def session_requested(self) -> Any:
        if self._unstarted >= _UNSTARTED_MAX:
            raise asyncssh.ChannelOpenError(
                asyncssh.OPEN_RESOURCE_SHORTAGE, "too many sessions that were not started"
            )
        self.take_place()
        self._unstarted += 1
        channel = SessionChannel(
            self.connection,
            asyncio.get_running_loop(),
            allow_pty=True,
            line_editor=False,
            line_echo=False,
            line_history=0,
            max_line_length=1024,
            encoding=None,
            errors="strict",
            window=WINDOW,
            max_pktsize=PACKET,
        )
        return channel, SshSession(self)

    @override
    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int
    ) -> Any:
        """Open a connection from within the sandbox, for `-L` and `-D`."""
        del orig_host, orig_port
        self.take_place()
        return self._forward(Dial(dest_port, host=dest_host), SSHTCPStreamSession)

    @override
    def unix_connection_requested(self, dest_path: str) -> Any:
        """Open a connection to a Unix socket in the sandbox."""
        self.take_place()
        return self._forward(Dial(path=dest_path), SSHUNIXStreamSession)

    async def _forward(self, wish: Dial, kind: Callable[[Any], Any]) -> Any:
        forward = Forward(self, wish)
        what = "a connection was not forwarded"
        if self.crew.start(forward.serve(), what, quietly=True) is None:
            self.give_place()
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, "the server ends")
        try:
            await forward.opened
        except SandyardError as error:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, error.message) from error
        return kind(forward.take_channel)

    @override
    def server_requested(self, listen_host: str, listen_port: int) -> Any:
        """Listen in the sandbox, for `-R`."""
        return self._listen(Listen(host=listen_host or "localhost", port=listen_port))

    @override
    def unix_server_requested(self, listen_path: str) -> Any:
        """Listen on a Unix socket in the sandbox, for `-R` with a path."""
        return self._listen(Listen(path=listen_path))

    async def _listen(self, wish: Listen) -> Any:
        if self._channels >= _SESSIONS_MAX:
            return None
        self.take_place()
        listener = Listener(self, wish)
        what = "a port was not forwarded"
        if self.crew.start(listener.serve(), what, quietly=True) is None:
            self.give_place()
            return None
        self._listening.add(listener.opened)
        try:
            await listener.opened
        except SandyardError as error:
            log.info("cannot forward a port of a sandbox: %s", error.message)
            return None
        finally:
            self._listening.discard(listener.opened)
        return listener

    async def until_listening(self) -> None:
        """Wait until requested listeners are open: the next command may connect to them at once."""
        if self._listening:
            await asyncio.wait(list(self._listening), timeout=CHANNEL_S)

    async def until_over(self) -> None:
        """Return once the connection has ended."""
        await self._is_over.wait()

    def take_place(self) -> None:
        """Count a channel from its request on.

        Raises:
            asyncssh.ChannelOpenError: there are too many.
        """
        if self._channels >= _SESSIONS_MAX:
            raise asyncssh.ChannelOpenError(
                asyncssh.OPEN_RESOURCE_SHORTAGE, "too many channels are open"
            )
        self._channels += 1

    def give_place(self) -> None:
        """Release one channel."""
        self._channels -= 1

    def note_start(self) -> None:
        """Note that a session has started, or never will."""
        self._unstarted -= 1
