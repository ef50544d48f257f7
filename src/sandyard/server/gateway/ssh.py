"""The SSH gateway: authenticates, and turns channels into processes and connections of a sandbox.

No sshd runs in a sandbox. A session's channel becomes a process of the agent (a shell, a command,
sftp-server), a forwarded connection one that the machine makes or takes itself, so that what a
sandbox may reach is what its users may reach through it.
"""

import asyncio
import logging
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import Any

import asyncssh
from asyncssh.channel import SSHServerChannel
from asyncssh.packet import SSHPacket
from asyncssh.stream import SSHTCPStreamSession, SSHUNIXStreamSession

from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.errors import NotFoundError, SandyardError, UnavailableError
from sandyard.server.core.ops import Caller, Dial, Ended, Listen, Run, Size, Take
from sandyard.server.gateway.copy import relay
from sandyard.server.service.actor import Actor
from sandyard.server.service.people.logins import Login, Logins
from sandyard.server.service.sandboxes.forwards import Forwards
from sandyard.server.service.sandboxes.processes import Following, Processes, Which
from sandyard.server.service.sandboxes.reach import Use
from sandyard.server.tasks import Crew, beside

log = logging.getLogger(__name__)

USE = Use("ssh", "", "log in to", is_told=False)
_LOGIN_S = 30.0
_ALIVE_S, _ALIVE_TRIES = 30, 4
_LOOK_S = 5.0
_ATTEMPTS_MAX = 20
_UNKNOWN_BY_ADDRESS = 50  # connections that have not logged in yet
_UNSTARTED_MAX, _UNSTARTED_S = 100, 30.0  # sessions that say nothing of what they are to be
_CALLERS_MAX = 64
_UNREAD_MAX = 64 * 1024 * 1024
_SESSIONS_MAX = 200  # of one connection, forwarded ones included
_WINDOW, _PACKET = 2 * 1024 * 1024, 32 * 1024
_CHANNEL_S = 30.0
_CLOSE_S = 3.0
_INPUT_MAX = 1024 * 1024
_ENV_MAX, _ENV_BYTES_MAX = 64, 64 * 1024
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_LOCALES = frozenset({"C", "POSIX", "C.UTF-8", "C.utf8"})
_SFTP = """\
for one in /usr/lib/openssh/sftp-server /usr/libexec/openssh/sftp-server \
/usr/libexec/sftp-server /usr/lib/ssh/sftp-server /usr/lib/sftp-server; do
[ -x "$one" ] && exec "$one"; done
echo "sandyard: there is no sftp-server in the sandbox; install openssh-sftp-server" >&2
exit 127"""
_GROUPED = ("ABRT", "ALRM", "FPE", "HUP", "ILL", "INT", "KILL", "PIPE", "QUIT", "SEGV", "TERM",
            "USR1", "USR2")  # fmt: skip
_FAILED = 255  # what OpenSSH's own client exits with when the connection is at fault

# What none of today's clients needs to go below; the first that both know is taken.
_KEY_EXCHANGES = ("mlkem768x25519-sha256", "curve25519-sha256", "curve25519-sha256@libssh.org")
_CIPHERS = ("aes128-gcm@openssh.com", "aes256-gcm@openssh.com", "aes256-ctr", "aes128-ctr")
_MACS = ("hmac-sha2-256-etm@openssh.com", "hmac-sha2-512-etm@openssh.com")
_SIGNATURES = (
    "sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com", "ssh-ed25519",
    "ecdsa-sha2-nistp521", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp256", "rsa-sha2-256",
    "rsa-sha2-512",
)  # fmt: skip


class SshGateway:
    """See the module. `open_gateway` opens one."""

    def __init__(
        self,
        *,
        logins: Logins,
        processes: Processes,
        forwards: Forwards,
        most: int,
        most_by_address: int,
        crew: Crew,
    ) -> None:
        self.logins = logins
        self.processes = processes
        self.forwards = forwards
        self.crew = crew
        self._most = most
        self._most_by_address = most_by_address
        self._open: dict[_Client, str] = {}
        self._by_address: Counter[str] = Counter()

    def enter(self, client: "_Client", address: str) -> str | None:
        """Count a connection, or say why it may not be."""
        if len(self._open) >= self._most or self._by_address[address] >= self._most_by_address:
            return "too many connections are open; close some, or try again later"
        unknown = [one for one, where in self._open.items() if not one.is_known]
        here = sum(self._open[one] == address for one in unknown)
        if here >= _UNKNOWN_BY_ADDRESS:
            return "too many are logging in from this address just now; try again"
        if len(unknown) >= self._most // 2:
            # Whoever crowds the door gives way to whoever comes.
            crowd, _ = Counter(self._open[one] for one in unknown).most_common(1)[0]
            next(one for one in unknown if self._open[one] == crowd).close("try again")
        self._open[client] = address
        self._by_address[address] += 1
        return None

    def leave(self, client: "_Client") -> None:
        """Count a connection no more."""
        address = self._open.pop(client, None)
        if address is not None:
            self._by_address[address] -= 1
            if not self._by_address[address]:
                del self._by_address[address]

    async def close(self, reason: str) -> None:
        """Close all connections, tell them why, and return once they are closed."""
        open_ = [one.connection for one in self._open]
        for client in list(self._open):
            client.close(reason)
        with suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_S):
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
    forwards: Forwards,
    most: int = 1000,
    most_by_address: int = 200,
) -> AsyncIterator[int]:
    """Serve SSH on an address, and yield the port.

    Raises:
        UnavailableError: the address is taken.
    """
    # What it logs by itself are the commands that people run.
    asyncssh.set_log_level(logging.ERROR)
    async with Crew() as crew:
        gateway = SshGateway(
            logins=logins,
            processes=processes,
            forwards=forwards,
            most=most,
            most_by_address=most_by_address,
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
                # What is small packed may be very large unpacked, and what is worth it is packed.
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


class _Client(asyncssh.SSHServer):
    """One connection: who it is, and what it has open."""

    def __init__(self, gateway: SshGateway) -> None:
        self.gateway = gateway
        self.address = "unknown"
        self.peer: tuple[str, int] = ("", 0)
        self._connection: asyncssh.SSHServerConnection | None = None
        self._offered: Login | None = None
        self._login: Login | None = None
        self._attempts = 0
        self._channels = 0
        self._unstarted = 0
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

    def connection_made(self, conn: asyncssh.SSHServerConnection) -> None:
        """See asyncssh."""
        self._connection = conn
        peer = conn.get_extra_info("peername") or ("unknown", 0)
        self.address, self.peer = str(peer[0]), (str(peer[0]), int(peer[1]))
        refusal = self.gateway.enter(self, self.address)
        if refusal is not None:
            self.close(refusal)

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncssh."""
        self.gateway.leave(self)
        self._is_over.set()
        if self._login is None and self._attempts:
            self.gateway.logins.failed(self.address)

    def close(self, reason: str) -> None:
        """Close it, and say why."""
        if self._connection is not None:
            self._connection.disconnect(asyncssh.DISC_SERVICE_NOT_AVAILABLE, f"sandyard: {reason}")

    # --- who is it --------------------------------------------------------------------------

    def begin_auth(self, username: str) -> bool:
        """See asyncssh: nobody is let in without showing something."""
        del username
        return True

    def password_auth_supported(self) -> bool:
        """See asyncssh: the same for all names, whatever is behind them."""
        return True

    def public_key_auth_supported(self) -> bool:
        """See asyncssh."""
        return True

    async def validate_public_key(self, username: str, key: asyncssh.SSHKey) -> bool:
        """See asyncssh, which looks at the signature itself."""
        if not self._may_try():
            return False
        text = key.export_public_key("openssh").decode().strip()
        self._offered = await self._asked(self.gateway.logins.by_key(username, text))
        return self._offered is not None

    async def validate_password(self, username: str, password: str) -> bool:
        """See asyncssh."""
        if not self._may_try():
            return False
        found = self.gateway.logins.by_password(username, password, self.address)
        self._offered = await self._asked(found)
        return self._offered is not None

    def change_password(self, username: str, old_password: str, new_password: str) -> bool:
        """See asyncssh: not here."""
        del username, old_password, new_password
        return False

    async def _asked(self, question: Awaitable[Login | None]) -> Login | None:
        try:
            return await question
        except SandyardError as error:
            log.warning("a login could not be looked at: %s", error.message)
            return None

    def _may_try(self) -> bool:
        self._attempts += 1
        if self._attempts > _ATTEMPTS_MAX:
            self.close("too many keys and passwords that open nothing; try with the right one")
            return False
        return True

    def auth_completed(self) -> None:
        """See asyncssh: what was offered last is what was shown to be one's own."""
        self._login, self._offered = self._offered, None
        if self._login is not None and self._login.sandbox_id is not None:
            self.gateway.crew.start(self._watch(self._login), "a login is not watched")

    async def _watch(self, login: Login) -> None:
        """Note the login, and close the connection when its sandbox is gone."""
        assert login.sandbox_id is not None
        try:
            await self.gateway.logins.note(login, login.sandbox_id, self.address)
        except SandyardError as error:
            # What cannot be written to the audit log is not done.
            log.warning("a login could not be noted: %s", error.message)
            self.close("the login could not be noted; try again")
            return
        while not self._is_over.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._is_over.wait()
            with suppress(UnavailableError):
                if not await self.gateway.logins.is_there(login):
                    self.close("the sandbox was deleted")
                    return
            transport = getattr(self.connection, "_transport", None)
            if transport is not None and transport.get_write_buffer_size() > _UNREAD_MAX:
                self.connection.abort()  # it asks for what it does not read
                return

    async def of(self) -> tuple[Actor, str]:
        """Return whose connection it is, and to which sandbox.

        Raises:
            NotFoundError: several are meant.
            UnauthenticatedError, PermissionDeniedError: what it was let in by holds no more.
        """
        login = self._login
        if login is None or login.sandbox_id is None:
            raise NotFoundError(
                "cannot tell which sandbox is meant: your key opens several of this name; log in "
                "with the id of one"
            )
        return await self.gateway.logins.still(login), login.sandbox_id

    # --- what it wants ----------------------------------------------------------------------

    def session_requested(self) -> Any:
        """See asyncssh."""
        if self._unstarted >= _UNSTARTED_MAX:
            raise asyncssh.ChannelOpenError(
                asyncssh.OPEN_RESOURCE_SHORTAGE, "too many sessions that were not started"
            )
        self.take_place()
        self._unstarted += 1
        channel = _ServerChannel(
            self.connection,
            asyncio.get_running_loop(),
            allow_pty=True,
            line_editor=False,
            line_echo=False,
            line_history=0,
            max_line_length=1024,
            encoding=None,
            errors="strict",
            window=_WINDOW,
            max_pktsize=_PACKET,
        )
        return channel, _Session(self)

    def connection_requested(
        self, dest_host: str, dest_port: int, orig_host: str, orig_port: int
    ) -> Any:
        """See asyncssh: `-L` and `-D`, a connection that the sandbox makes."""
        del orig_host, orig_port
        self.take_place()
        return self._forward(Dial(dest_port, host=dest_host), SSHTCPStreamSession)

    def unix_connection_requested(self, dest_path: str) -> Any:
        """See asyncssh: a connection to a socket in the sandbox."""
        self.take_place()
        return self._forward(Dial(path=dest_path), SSHUNIXStreamSession)

    async def _forward(self, wish: Dial, kind: Callable[[Any], Any]) -> Any:
        forward = _Forward(self, wish)
        what = "a connection was not forwarded"
        if self.gateway.crew.start(forward.serve(), what, quietly=True) is None:
            self.give_place()
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, "the server ends")
        try:
            await forward.opened
        except SandyardError as error:
            raise asyncssh.ChannelOpenError(asyncssh.OPEN_CONNECT_FAILED, error.message) from error
        return kind(forward.take_channel)

    def server_requested(self, listen_host: str, listen_port: int) -> Any:
        """See asyncssh: `-R`, the sandbox listens."""
        return self._listen(listen_host, listen_port)

    async def _listen(self, host: str, port: int) -> Any:
        if self._channels >= _SESSIONS_MAX:
            return None
        self.take_place()
        listener = _Listener(self, host or "localhost", port)
        what = "a port was not forwarded"
        if self.gateway.crew.start(listener.serve(), what, quietly=True) is None:
            self.give_place()
            return None
        try:
            await listener.opened
        except SandyardError as error:
            log.info("a port of a sandbox is not forwarded: %s", error.message)
            return None
        return listener

    async def until_over(self) -> None:
        """Return once the connection has ended."""
        await self._is_over.wait()

    def take_place(self) -> None:
        """Count a channel, from the moment that it is asked for.

        Raises:
            asyncssh.ChannelOpenError: there are too many.
        """
        if self._channels >= _SESSIONS_MAX:
            raise asyncssh.ChannelOpenError(
                asyncssh.OPEN_RESOURCE_SHORTAGE, "too many channels are open"
            )
        self._channels += 1

    def give_place(self) -> None:
        """Count one less."""
        self._channels -= 1

    def note_start(self) -> None:
        """Note that a session has said what it is to be, or never will."""
        self._unstarted -= 1


class _ServerChannel(SSHServerChannel[bytes]):
    """A session's channel. A command may have bytes that are no UTF-8, as a file's name may; and an
    agent that is forwarded is to be reached in the sandbox, not on this host."""

    forwards_agent = False
    _told_bytes = 0

    def _process_env_request(self, packet: SSHPacket) -> bool:
        self._told_bytes += len(packet.get_remaining_payload())
        is_much = len(self.get_environment_bytes()) >= _ENV_MAX
        if is_much or self._told_bytes > _ENV_BYTES_MAX:
            return False
        return super()._process_env_request(packet)

    def _process_exec_request(self, packet: SSHPacket) -> bool:
        command = packet.get_string()
        packet.check_end()
        return self._start_session(command=command.decode("utf-8", "surrogateescape"))

    def _process_auth_agent_req_at_openssh_dot_com_request(self, packet: SSHPacket) -> None:
        packet.check_end()
        self.forwards_agent = True
        self._report_response(True)


class _Session(asyncssh.SSHServerSession[bytes]):
    """A shell, a command or a subsystem: what the client sends goes to a process, and back."""

    def __init__(self, client: _Client) -> None:
        self._client = client
        self._gateway = client.gateway
        self._channel: _ServerChannel | None = None
        self._terminal: str | None = None
        self._size = Size(80, 24)
        self._what: dict[str, Any] = {}
        self._input: asyncio.Queue[bytes | None] = asyncio.Queue()
        self._waiting = 0
        self._wishes: asyncio.Queue[Size | str] = asyncio.Queue(64)
        self._can_write = asyncio.Event()
        self._can_write.set()
        self._is_over = asyncio.Event()
        self._has_started = False

    # --- what asyncssh tells ----------------------------------------------------------------

    def connection_made(self, chan: Any) -> None:
        """See asyncssh."""
        self._channel = chan
        asyncio.get_running_loop().call_later(_UNSTARTED_S, self._close_unless_started)

    def _close_unless_started(self) -> None:
        if not self._has_started and self._channel is not None:
            self._channel.close()

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncssh."""
        self._note_start()
        self._client.give_place()
        self._is_over.set()
        self._can_write.set()

    def _note_start(self) -> None:
        if not self._has_started:
            self._has_started = True
            self._client.note_start()

    def pty_requested(
        self, term_type: str, term_size: tuple[int, int, int, int], term_modes: Mapping[int, int]
    ) -> bool:
        """See asyncssh."""
        del term_modes
        self._terminal = term_type or "dumb"
        self._size = _size_of(*term_size[:2])
        return True

    def terminal_size_changed(self, width: int, height: int, pixwidth: int, pixheight: int) -> None:
        """See asyncssh."""
        del pixwidth, pixheight
        self._wish(_size_of(width, height))

    def shell_requested(self) -> bool:
        """See asyncssh."""
        return True

    def exec_requested(self, command: str) -> bool:
        """See asyncssh."""
        self._what = {"line": command.encode("utf-8", "surrogateescape")}
        return "\0" not in command and bool(command)

    def subsystem_requested(self, subsystem: str) -> bool:
        """See asyncssh."""
        self._what = {"command": _SFTP}
        return subsystem == "sftp"

    def session_started(self) -> None:
        """See asyncssh."""
        self._note_start()
        self._gateway.crew.start(self._serve(), "a session failed", quietly=True)

    def data_received(self, data: bytes, datatype: Any) -> None:
        """See asyncssh."""
        del datatype
        self._waiting += len(data)
        self._input.put_nowait(data)
        if self._waiting > _INPUT_MAX and self._channel is not None:
            self._channel.pause_reading()

    def eof_received(self) -> bool:
        """See asyncssh: what the process says still goes the other way."""
        self._input.put_nowait(None)
        return True

    def signal_received(self, signal: str) -> None:
        """See asyncssh."""
        self._wish(signal)

    def break_received(self, msec: int) -> bool:
        """See asyncssh."""
        del msec
        self._wish("INT")
        return True

    def pause_writing(self) -> None:
        """See asyncssh."""
        self._can_write.clear()

    def resume_writing(self) -> None:
        """See asyncssh."""
        self._can_write.set()

    def _wish(self, what: Size | str) -> None:
        if self._wishes.full():
            self._wishes.get_nowait()  # of very many sizes the last counts
        self._wishes.put_nowait(what)

    # --- what is made of it -----------------------------------------------------------------

    async def _serve(self) -> None:
        channel = self._channel
        assert channel is not None
        try:
            async with (
                beside(self._is_over.wait()) as over,
                beside(self._run(channel)) as running,
            ):
                await asyncio.wait([running, over], return_when=asyncio.FIRST_COMPLETED)
        except SandyardError as error:
            self._say(channel, error.message)
            channel.exit(_FAILED)
        except Exception:  # a bug: it must not stay unanswered
            log.exception("a session failed")
            channel.exit(_FAILED)

    async def _run(self, channel: _ServerChannel) -> None:
        actor, sandbox_id = await self._client.of()
        async with AsyncExitStack() as held:
            env = self._environment(channel)
            if channel.forwards_agent:
                env["SSH_AUTH_SOCK"] = await self._forward_agent(held, actor, sandbox_id)
            wish = Run(
                **self._what,
                cwd="~",
                env=env,
                stdin=self._terminal is None,
                terminal=None if self._terminal is None else self._size,
                login=True,
                hang_up_s=0.0,
            )
            opening = self._gateway.processes.run(actor, sandbox_id, wish, USE)
            following = await held.enter_async_context(opening)
            which = Which(pid=following.pid)
            async with (
                beside(self._feed(channel, following)),
                beside(self._obey(actor, sandbox_id, which)),
            ):
                await self._show(channel, following)

    async def _show(self, channel: _ServerChannel, following: Following) -> None:
        async for one in following.events():
            if isinstance(one, Ended):
                name = (one.signal or "").removeprefix("SIG")
                if name in _GROUPED:
                    channel.exit_with_signal(name)
                else:
                    channel.exit(one.exit_code)
                return
            is_error = one.stream == "stderr"
            channel.write(one.data, asyncssh.EXTENDED_DATA_STDERR if is_error else None)
            await self._can_write.wait()

    async def _feed(self, channel: _ServerChannel, following: Following) -> None:
        while True:
            data = await self._input.get()
            if data is None:
                if self._terminal is None:  # the end of what is typed is a key of its own there
                    await following.close_input()
                continue
            await following.write(data)
            self._waiting -= len(data)
            if self._waiting <= _INPUT_MAX // 2:
                channel.resume_reading()

    async def _obey(self, actor: Actor, sandbox_id: str, which: Which) -> None:
        """Pass on signals and sizes; one that comes too late is no fault."""
        while True:
            wish = await self._wishes.get()
            with suppress(SandyardError):
                if isinstance(wish, Size):
                    await self._gateway.processes.resize(actor, sandbox_id, which, wish, use=USE)
                else:
                    await self._gateway.processes.signal(
                        actor,
                        sandbox_id,
                        which,
                        wish,
                        everything=self._terminal is None,
                        use=USE,
                    )

    async def _forward_agent(self, held: AsyncExitStack, actor: Actor, sandbox_id: str) -> str:
        """Have a socket in the sandbox lead to the client's own agent; return its path."""
        client = self._client

        async def answer(caller: Caller) -> None:
            channel = client.connection.create_agent_channel(_WINDOW, _PACKET)
            async with asyncio.timeout(_CHANNEL_S):
                session: Any = await channel.open(SSHUNIXStreamSession)
            reader = asyncssh.SSHReader[bytes](session, channel)
            writer = asyncssh.SSHWriter[bytes](session, channel)
            await _take(client, actor, sandbox_id, caller, reader, writer)

        listening = self._gateway.forwards.listen(actor, sandbox_id, Listen())
        where, callers = await held.enter_async_context(listening)
        await held.enter_async_context(beside(_answer_all(callers, answer)))
        return where.path

    def _environment(self, channel: _ServerChannel) -> dict[str, str]:
        """Return what the process is told besides: what the client sends, and whence it comes."""
        host, port = self._client.peer
        env: dict[str, str] = {}
        for name, value in channel.get_environment_bytes().items():
            key, text = name.decode("utf-8", "replace"), value.decode("utf-8", "surrogateescape")
            is_locale = key == "LANG" or key.startswith("LC_")
            # A locale that is not in the sandbox makes half of its programs complain.
            if (
                _ENV_NAME.fullmatch(key)
                and (not is_locale or text in _LOCALES)
                and "\0" not in text
            ):
                env[key] = text
        env["SSH_CLIENT"] = f"{host} {port} 22"
        env["SSH_CONNECTION"] = f"{host} {port} 127.0.0.1 22"
        if self._terminal is not None:
            env["TERM"] = self._terminal
        return env

    def _say(self, channel: _ServerChannel, message: str) -> None:
        """Tell a person why it ends."""
        with suppress(OSError):
            if self._terminal is not None:
                channel.write(f"\r\nsandyard: {message}\r\n".encode())
            else:
                channel.write(f"sandyard: {message}\n".encode(), asyncssh.EXTENDED_DATA_STDERR)


class _Forward:
    """A connection that the sandbox makes for the client, from the wish to its end."""

    def __init__(self, client: _Client, wish: Dial) -> None:
        self._client = client
        self._wish = wish
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._channel: asyncio.Future[_Channel] = asyncio.get_running_loop().create_future()

    async def take_channel(self, reader: Any, writer: Any) -> None:
        """Take the channel that asyncssh has opened for it."""
        if self._channel.done():
            writer.close()  # it came too late
        else:
            self._channel.set_result(_Channel(reader, writer))

    async def serve(self) -> None:
        """Connect, say that it is `opened`, and carry bytes while both ends are there."""
        client = self._client
        try:
            async with (
                _told(self.opened),
                beside(client.until_over()) as over,
                beside(self._serve()) as serving,
            ):
                await asyncio.wait([over, serving], return_when=asyncio.FIRST_COMPLETED)
        finally:
            client.give_place()
            if self._channel.done():
                self._channel.result().close()
            self._channel.cancel()

    async def _serve(self) -> None:
        client = self._client
        actor, sandbox_id = await client.of()
        async with client.gateway.forwards.dial(actor, sandbox_id, self._wish, USE) as there:
            self.opened.set_result(None)
            await asyncio.wait([self._channel], timeout=_CHANNEL_S)
            if self._channel.done():
                await _carry(self._channel.result(), there)


class _Listener(asyncssh.SSHListener):
    """A port of the sandbox whose connections go to the client."""

    def __init__(self, client: _Client, host: str, port: int) -> None:
        super().__init__()
        self._client = client
        # What comes from elsewhere is kept out where the client does not ask for it, as by sshd.
        self._host = host
        self._port = port
        self.opened: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._is_closed = asyncio.Event()

    async def serve(self) -> None:
        """Have the sandbox listen, say that it is `opened`, and answer who comes."""
        client = self._client
        try:
            async with (
                _told(self.opened),
                beside(client.until_over()) as over,
                beside(self._is_closed.wait()) as closed,
                beside(self._serve()) as serving,
            ):
                waiting: list[asyncio.Task[Any]] = [over, closed, serving]
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        finally:
            client.give_place()

    async def _serve(self) -> None:
        client, asked = self._client, self._port
        actor, sandbox_id = await client.of()
        wish = Listen(host=self._host, port=asked)
        async with client.gateway.forwards.listen(actor, sandbox_id, wish) as (where, callers):
            self._port = where.port

            async def answer(caller: Caller) -> None:
                async with asyncio.timeout(_CHANNEL_S):
                    reader, writer = await client.connection.open_connection(
                        self._host, asked or self._port, caller.host or "127.0.0.1", caller.port
                    )
                await _take(client, actor, sandbox_id, caller, reader, writer)

            self.opened.set_result(None)
            await _answer_all(callers, answer)

    def get_port(self) -> int:
        """See asyncssh."""
        return self._port

    def close(self) -> None:
        """See asyncssh."""
        self._is_closed.set()

    async def wait_closed(self) -> None:
        """See asyncssh."""


class _Channel:
    """A channel as a stream; see core.contracts.node.ByteStream."""

    def __init__(self, reader: Any, writer: Any) -> None:
        self._reader = reader
        self._writer = writer

    async def read(self, limit: int) -> bytes:
        """See core.contracts.node.ByteStream.read."""
        data: bytes = await self._reader.read(limit)
        return data

    async def write(self, data: bytes) -> None:
        """See core.contracts.node.ByteStream.write."""
        self._writer.write(data)
        await self._writer.drain()

    async def write_eof(self) -> None:
        """See core.contracts.node.ByteStream.write_eof."""
        with suppress(OSError):
            self._writer.write_eof()

    def close(self) -> None:
        """Close it."""
        self._writer.close()


@asynccontextmanager
async def _told(opened: "asyncio.Future[None]") -> AsyncIterator[None]:
    """Tell whoever waits for something to be opened that it was not, and why."""
    try:
        yield
    except SandyardError as error:
        if opened.done():
            raise
        opened.set_exception(error)
    finally:
        opened.cancel()


async def _carry(one: ByteStream, other: ByteStream) -> None:
    """Relay, until something breaks, which ends it."""
    with suppress(SandyardError, OSError, asyncssh.Error):
        await relay(one, other)


async def _take(
    client: _Client, actor: Actor, sandbox_id: str, caller: Caller, reader: Any, writer: Any
) -> None:
    """Join a connection that came to the sandbox with a channel to the client."""
    try:
        taking = client.gateway.forwards.take(actor, sandbox_id, Take(caller.number), USE)
        async with taking as there:
            await _carry(_Channel(reader, writer), there)
    finally:
        writer.close()


async def _answer_all(
    callers: AsyncIterator[Caller], answer: Callable[[Caller], Awaitable[None]]
) -> None:
    """Answer callers, each by itself, so many at a time; one that cannot be is no reason not to
    answer the next."""
    room = asyncio.Semaphore(_CALLERS_MAX)

    async def answer_one(caller: Caller) -> None:
        try:
            with suppress(SandyardError, OSError, TimeoutError, ValueError, asyncssh.Error):
                await answer(caller)
        finally:
            room.release()

    async with asyncio.TaskGroup() as tasks:
        with suppress(SandyardError):  # the sandbox ended: what is under way hears of it, too
            async for caller in callers:
                await room.acquire()
                tasks.create_task(answer_one(caller))


def _size_of(columns: int, rows: int) -> Size:
    """Return the size that a client tells, which is none at all where it has no window."""
    return Size(min(columns, 65535) or 80, min(rows, 65535) or 24)
