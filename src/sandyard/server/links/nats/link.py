"""A connection to NATS that is re-established whenever it is lost. Messages are sent now or not at
all."""

import asyncio
import json
import logging
import secrets
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Final, Protocol

from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.errors import Error as NatsError

from sandyard.server.core.errors import UnavailableError
from sandyard.server.tasks import Crew

log = logging.getLogger(__name__)

PREFIX: Final = "sy.v1"
"""What every subject begins with: its number changes where two versions could not understand each
other."""

TLS_NAME: Final = "nats.sandyard"
"""The name in the certificates of an installation's NATS servers, wherever they run."""

_AGAIN_S = 0.1
_CONNECT_S = 2
_TRY_S = 4.0
_CLOSE_S = 1.0
_LOOK_S = 0.1
_NO_RESPONDERS = "503"


class NatsLogin(Protocol):
    """Credentials for NATS, asked for again with every connection."""

    def token(self) -> str:
        """Return the token, which states what may be published and subscribed to."""
        ...

    def sign(self, nonce: bytes) -> bytes:
        """Return the signature of the server's nonce."""
        ...


@dataclass(frozen=True)
class NatsMessage:
    """A message. If `is_undelivered`, NATS reports that the subject has no subscriber."""

    subject: str
    values: Mapping[str, Any]
    reply: str = ""
    is_undelivered: bool = False


@dataclass
class _Listening:
    subject: str
    queue: str
    take: Callable[[NatsMessage], None]
    longest: int | None = None


@dataclass
class Link:
    """A connection to NATS; made by `linked`. `trouble` is the last connection error. With
    `is_quiet`, neither connecting nor losing the connection is logged, except for debugging."""

    servers: tuple[str, ...]
    name: str
    login: NatsLogin
    tls: ssl.SSLContext | None = None
    trouble: str = ""
    is_quiet: bool = False
    _listening: list[_Listening] = field(default_factory=list)
    _client: Client | None = None
    _changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    @property
    def is_up(self) -> bool:
        """Whether NATS answers, as far as is known."""
        return self._client is not None and self._client.is_connected

    async def until_up(self) -> None:
        """Return once NATS answers."""
        async with self._changed:
            await self._changed.wait_for(lambda: self.is_up)

    def listen(
        self,
        subject: str,
        take: Callable[[NatsMessage], None],
        *,
        queue: str = "",
        longest: int | None = None,
    ) -> None:
        """Handle messages on a subject, from the next connection on. Of several listeners in one
        `queue`, one receives each message. Messages of over `longest` bytes are dropped."""
        self._listening.append(_Listening(f"{PREFIX}.{subject}", queue, take, longest))

    async def say(self, subject: str, values: Mapping[str, object], *, reply: str = "") -> None:
        """Publish a message now.

        Raises:
            UnavailableError: NATS does not answer, or the message is too long for it.
        """
        await self._publish(f"{PREFIX}.{subject}", values, f"{PREFIX}.{reply}" if reply else "")

    async def answer(self, heard: NatsMessage, values: Mapping[str, object]) -> None:
        """Reply to a message; does nothing if its sender expects no reply.

        Raises: see `say`.
        """
        if heard.reply:
            await self._publish(heard.reply, values, "")

    async def _publish(self, subject: str, values: Mapping[str, object], reply: str) -> None:
        client = self._client
        if client is None or not client.is_connected:
            raise UnavailableError("cannot send this now: NATS does not answer")
        try:
            await client.publish(subject, json.dumps(values).encode(), reply=reply)
        except (NatsError, OSError, TimeoutError) as error:
            raise UnavailableError(f"cannot send this now: NATS refuses it: {error}") from error

    # --- the connection ---------------------------------------------------------------------

    async def _keep_up(self) -> None:
        """Connect to one server after the other until one answers, and again after each loss.

        The NATS client could reconnect itself, but it buffers messages while it is offline and
        sends them later, and gives up for good when its token has expired.
        """
        was_up = True
        for number in count(secrets.randbelow(len(self.servers))):
            server = self.servers[number % len(self.servers)]
            client = Client()
            self.trouble = ""
            try:
                await self._connect(client, server)
                log.log(
                    logging.DEBUG if self.is_quiet else logging.INFO, "NATS answers at %s", server
                )
                was_up = True
                await self._tell(client)
                while client.is_connected and not _is_cancelled():
                    await asyncio.sleep(_LOOK_S)
            except Exception as error:  # noqa: BLE001 - the next try may do better
                self.trouble = self.trouble or str(error)
                if was_up and not self.is_quiet:
                    why = self.trouble or "no answer"
                    log.warning("NATS does not answer at %s: %s", server, why)
                was_up = False
            finally:
                await self._tell(None)
                await _close(client)
            if _is_cancelled():
                raise asyncio.CancelledError
            await asyncio.sleep(_AGAIN_S)

    async def _tell(self, client: Client | None) -> None:
        async with self._changed:
            self._client = client
            self._changed.notify_all()

    async def _connect(self, client: Client, server: str) -> None:
        async def complain(error: Exception) -> None:
            self.trouble = self.trouble or str(error)
            log.log(logging.WARNING if self.is_up else logging.DEBUG, "NATS complains: %s", error)

        def sign(nonce: str) -> bytes:
            # The server announces in plain text whether it uses TLS. One that does not, although
            # the client requires it, is an impostor, which would get the token and the signature.
            if self.tls is not None and not client._server_info.get("tls_required"):
                raise NatsError("it does not use TLS")
            return self.login.sign(nonce.encode())

        async with asyncio.timeout(_TRY_S):
            await self._connected(client, server, complain, sign)
            if self.tls is not None and not _is_tls(client):
                raise NatsError("it does not use TLS")
            for one in self._listening:
                await client.subscribe(one.subject, queue=one.queue, cb=_taking(one))
            # The client sends a ping at once, and pending messages after it: only the answer to
            # a second ping proves that the server knows all subscriptions.
            for _ in range(2):
                await client.flush(_CONNECT_S)

    async def _connected(
        self,
        client: Client,
        server: str,
        complain: Callable[[Exception], Awaitable[None]],
        sign: Callable[[str], bytes],
    ) -> None:
        await client.connect(
            server,
            name=self.name,
            allow_reconnect=False,
            max_reconnect_attempts=1,
            reconnect_time_wait=0,
            connect_timeout=_CONNECT_S,
            # Otherwise a server that hangs would be noticed after minutes only.
            ping_interval=0.5,  # type: ignore[arg-type]  # slept for
            max_outstanding_pings=2,
            pending_size=-1,
            no_echo=True,
            error_cb=complain,
            tls=self.tls,
            tls_hostname=TLS_NAME if self.tls else None,
            # Otherwise the client sends no credentials, whatever the next two are.
            token="unused",  # noqa: S106 - no secret: the server looks at the other two
            user_jwt_cb=lambda: self.login.token().encode(),
            signature_cb=sign,
        )


def _is_cancelled() -> bool:
    """Tell whether this task was cancelled. The NATS client catches CancelledError in some places,
    for example in `close`, so the task would otherwise run forever."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


def _is_tls(client: Client) -> bool:
    # The library lets the server decide about TLS, whatever the URL says.
    writer = getattr(client._transport, "_io_writer", None)
    return writer is not None and writer.get_extra_info("ssl_object") is not None


def _taking(one: _Listening) -> Callable[[Msg], Any]:
    async def take(message: Msg) -> None:
        if one.longest is not None and len(message.data) > one.longest:
            log.warning("received a message on %s that is too long", message.subject)
            return
        heard = _heard(message)
        if heard is not None:
            one.take(heard)

    return take


def _heard(message: Msg) -> NatsMessage | None:
    subject = message.subject.removeprefix(f"{PREFIX}.")
    if (message.headers or {}).get("Status") == _NO_RESPONDERS:
        return NatsMessage(subject, {}, is_undelivered=True)
    try:
        values = json.loads(message.data)
    except (ValueError, RecursionError):
        values = None
    if not isinstance(values, dict):
        log.warning("received a message on %s that is not a JSON object", message.subject)
        return None
    return NatsMessage(subject, values, message.reply)


async def _close(client: Client) -> None:
    """Close a client with a time limit, because closing waits forever for a server that hangs."""
    try:
        async with asyncio.timeout(_CLOSE_S):
            await client.close()
    except Exception as error:  # noqa: BLE001 - it is of no more use in any case
        log.debug("cannot close a connection to NATS: %s", error)
    finally:
        # What was subscribed to while it closed, or a close that ran out of time, leaves these.
        for one in list(client._subs.values()):
            if one._wait_for_msgs_task is not None:
                one._wait_for_msgs_task.cancel()


@asynccontextmanager
async def linked(link: Link) -> AsyncIterator[Link]:
    """Keep a link connected while the block runs, whether or not NATS answers yet."""
    async with Crew() as crew:
        crew.start(link._keep_up(), "NATS is connected to no longer")
        yield link
