"""Sessions of SSH: a shell, a command, sftp; each a process of the sandbox."""

import asyncio
import logging
import re
from collections.abc import Mapping
from contextlib import AsyncExitStack, suppress
from typing import Any, Protocol

import asyncssh
from asyncssh.channel import SSHServerChannel
from asyncssh.packet import SSHPacket
from asyncssh.stream import SSHUNIXStreamSession
from typing_extensions import override

from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.errors import NotFoundError, SandyardError, UnsupportedError
from sandyard.server.core.ops import Caller, Ended, Listen, Pipe, Run, Size
from sandyard.server.gateway.ssh.forwarding import (
    CHANNEL_S,
    PACKET,
    USE,
    WINDOW,
    Holder,
    answer_all,
    take,
)
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.processes import Following, Processes, Which
from sandyard.server.tasks import Crew, concurrently

log = logging.getLogger(__name__)

_UNSTARTED_S = 30.0
_READ = 256 * 1024
_INPUT_MAX = 1024 * 1024
_ENV_MAX, _ENV_BYTES_MAX = 64, 64 * 1024
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_LOCALES = frozenset({"C", "POSIX", "C.UTF-8", "C.utf8"})
# The sandbox's own, or ours with our own C library.
_SFTP = """\
for one in /usr/lib/openssh/sftp-server /usr/libexec/openssh/sftp-server \
/usr/libexec/sftp-server /usr/lib/ssh/sftp-server /usr/lib/sftp-server; do
[ -x "$one" ] && exec "$one"; done
tools=/run/sandyard/tools; libraries=$tools/usr/lib/x86_64-linux-gnu
one=$tools/usr/lib/openssh/sftp-server
[ -x "$one" ] && exec "$libraries/ld-linux-x86-64.so.2" --library-path "$libraries" "$one"
echo "sandyard: there is no sftp-server in the sandbox; install openssh-sftp-server" >&2
exit 127"""
_GROUPED = ("ABRT", "ALRM", "FPE", "HUP", "ILL", "INT", "KILL", "PIPE", "QUIT", "SEGV", "TERM",
            "USR1", "USR2")  # fmt: skip
_FAILED = 255  # what OpenSSH's own client exits with when the connection is at fault


class SessionHolder(Holder, Protocol):
    """What a session needs of its connection."""

    @property
    def peer(self) -> tuple[str, int]:
        """The client's address and port."""
        ...

    @property
    def processes(self) -> Processes:
        """The service that runs processes."""
        ...

    @property
    def crew(self) -> Crew:
        """The owner of the session's task."""
        ...

    async def until_listening(self) -> None:
        """Wait until requested listeners are open."""
        ...

    def note_start(self) -> None:
        """Note that a session has started, or has ended without that."""
        ...


class SessionChannel(SSHServerChannel[bytes]):
    """A session's channel. Commands may contain bytes that are not UTF-8, and a forwarded agent
    listens in the sandbox, not on this host."""

    forwards_agent = False
    _env_bytes = 0

    @override
    def _process_env_request(self, packet: SSHPacket) -> bool:
        self._env_bytes += len(packet.get_remaining_payload())
        is_much = len(self.get_environment_bytes()) >= _ENV_MAX
        if is_much or self._env_bytes > _ENV_BYTES_MAX:
            return False
        return super()._process_env_request(packet)

    @override
    def _process_exec_request(self, packet: SSHPacket) -> bool:
        command = packet.get_string()
        packet.check_end()
        return self._start_session(command=command.decode("utf-8", "surrogateescape"))

    @override
    def _process_auth_agent_req_at_openssh_dot_com_request(self, packet: SSHPacket) -> None:
        packet.check_end()
        self.forwards_agent = True
        self._report_response(True)


class SshSession(asyncssh.SSHServerSession[bytes]):
    """A shell, a command or a subsystem: what the client sends goes to a process, and back."""

    def __init__(self, client: SessionHolder) -> None:
        self._client = client
        self._channel: SessionChannel | None = None
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

    @override
    def connection_made(self, chan: Any) -> None:
        self._channel = chan
        asyncio.get_running_loop().call_later(_UNSTARTED_S, self._close_unless_started)

    def _close_unless_started(self) -> None:
        if not self._has_started and self._channel is not None:
            self._channel.close()

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        self._note_start()
        self._client.give_place()
        self._is_over.set()
        self._can_write.set()

    def _note_start(self) -> None:
        if not self._has_started:
            self._has_started = True
            self._client.note_start()

    @override
    def pty_requested(
        self, term_type: str, term_size: tuple[int, int, int, int], term_modes: Mapping[int, int]
    ) -> bool:
        del term_modes
        self._terminal = term_type or "dumb"
        self._size = _size_of(*term_size[:2])
        return True

    @override
    def terminal_size_changed(self, width: int, height: int, pixwidth: int, pixheight: int) -> None:
        del pixwidth, pixheight
        self._wish(_size_of(width, height))

    @override
    def shell_requested(self) -> bool:
        return True

    @override
    def exec_requested(self, command: str) -> bool:
        self._what = {"line": command.encode("utf-8", "surrogateescape")}
        return "\0" not in command and bool(command)

    @override
    def subsystem_requested(self, subsystem: str) -> bool:
        self._what = {"command": _SFTP}
        return subsystem == "sftp"

    @override
    def session_started(self) -> None:
        self._note_start()
        self._client.crew.start(self._serve(), "an SSH session failed", quietly=True)

    @override
    def data_received(self, data: bytes, datatype: Any) -> None:
        del datatype
        self._waiting += len(data)
        self._input.put_nowait(data)
        if self._waiting > _INPUT_MAX and self._channel is not None:
            self._channel.pause_reading()

    @override
    def eof_received(self) -> bool:
        """Close the input of the process; its output still arrives."""
        self._input.put_nowait(None)
        return True

    @override
    def signal_received(self, signal: str) -> None:
        self._wish(signal)

    @override
    def break_received(self, msec: int) -> bool:
        del msec
        self._wish("INT")
        return True

    @override
    def pause_writing(self) -> None:
        self._can_write.clear()

    @override
    def resume_writing(self) -> None:
        self._can_write.set()

    def _wish(self, what: Size | str) -> None:
        if self._wishes.full():
            self._wishes.get_nowait()  # of many window sizes only the last matters
        self._wishes.put_nowait(what)

    # --- what is made of it -----------------------------------------------------------------

    async def _serve(self) -> None:
        channel = self._channel
        assert channel is not None
        try:
            async with (
                concurrently(self._is_over.wait()) as over,
                concurrently(self._run(channel)) as running,
            ):
                await asyncio.wait([running, over], return_when=asyncio.FIRST_COMPLETED)
        except SandyardError as error:
            self._say(channel, error.message)
            channel.exit(_FAILED)
        except (OSError, asyncssh.Error):  # the client closes it at this moment
            channel.close()
        except Exception:  # a bug: it must not stay unanswered
            log.exception("unexpected error in an SSH session; closing it")
            channel.exit(_FAILED)

    async def _run(self, channel: SessionChannel) -> None:
        await self._client.until_listening()
        if self._what.get("command") is _SFTP:
            # Many small requests, one after the other: nothing in the sandbox handles them but the
            # server itself, unless its agent is of before this was possible.
            with suppress(UnsupportedError):
                await self._pipe(channel)
                return
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
            opening = self._client.processes.run(actor, sandbox_id, wish, USE)
            following = await held.enter_async_context(opening)
            which = Which(pid=following.pid)
            async with (
                concurrently(self._feed(channel, following)),
                concurrently(self._obey(actor, sandbox_id, which)),
            ):
                await self._show(channel, following)

    async def _pipe(self, channel: SessionChannel) -> None:
        actor, sandbox_id = await self._client.of()
        wish = Pipe(_SFTP, env=self._environment(channel))
        has_spoken = False
        async with (
            self._client.processes.pipe(actor, sandbox_id, wish, USE) as stream,
            concurrently(self._pass_on(channel, stream)),
        ):
            while data := await stream.read(_READ):
                has_spoken = True
                channel.write(data)
                await self._can_write.wait()
        if not has_spoken:
            raise NotFoundError(
                "sftp-server ended without output; install openssh-sftp-server in the sandbox"
            )
        channel.exit(0)

    async def _pass_on(self, channel: SessionChannel, stream: ByteStream) -> None:
        with suppress(SandyardError):  # the other direction ends, and tells why
            while (data := await self._input.get()) is not None:
                await stream.write(data)
                self._taken(channel, len(data))
            await stream.write_eof()

    def _taken(self, channel: SessionChannel, size: int) -> None:
        """Note that so much of the input was taken."""
        self._waiting -= size
        if self._waiting <= _INPUT_MAX // 2:
            channel.resume_reading()

    async def _show(self, channel: SessionChannel, following: Following) -> None:
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

    async def _feed(self, channel: SessionChannel, following: Following) -> None:
        while True:
            data = await self._input.get()
            if data is None:
                if self._terminal is None:  # the end of what is typed is a key of its own there
                    await following.close_input()
                continue
            await following.write(data)
            self._taken(channel, len(data))

    async def _obey(self, actor: Actor, sandbox_id: str, which: Which) -> None:
        """Pass on signals and sizes; one that comes too late is no fault."""
        while True:
            wish = await self._wishes.get()
            with suppress(SandyardError):
                if isinstance(wish, Size):
                    await self._client.processes.resize(actor, sandbox_id, which, wish, use=USE)
                else:
                    await self._client.processes.signal(
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
            channel = client.connection.create_agent_channel(WINDOW, PACKET)
            async with client.clock.timeout(CHANNEL_S):
                session: Any = await channel.open(SSHUNIXStreamSession)
            reader = asyncssh.SSHReader[bytes](session, channel)
            writer = asyncssh.SSHWriter[bytes](session, channel)
            await take(client, actor, sandbox_id, caller, reader, writer)

        listening = self._client.forwards.listen(actor, sandbox_id, Listen())
        where, callers = await held.enter_async_context(listening)
        await held.enter_async_context(concurrently(answer_all(callers, answer)))
        return where.path

    def _environment(self, channel: SessionChannel) -> dict[str, str]:
        """Return additional environment variables: those that the client sends, and its address."""
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

    def _say(self, channel: SessionChannel, message: str) -> None:
        """Tell a person why it ends."""
        with suppress(OSError):
            if self._terminal is not None:
                channel.write(f"\r\nsandyard: {message}\r\n".encode())
            else:
                channel.write(f"sandyard: {message}\n".encode(), asyncssh.EXTENDED_DATA_STDERR)


def _size_of(columns: int, rows: int) -> Size:
    """Return the size that a client tells, which is none at all where it has no window."""
    return Size(min(columns, 65535) or 80, min(rows, 65535) or 24)
