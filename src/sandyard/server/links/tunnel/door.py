"""The TLS listener of a control plane for nodes. Hosts join here, and nodes that cannot reach NATS
register and send heartbeats here.

The protocol uses the frames of the tunnel (`frames`), one request at a time: `authority` (no
authentication), `join` (with an invite), `hello` and `beat` (with a node's certificate).
"""

import asyncio
import hashlib
import logging
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any, Final, TypeVar

from sandyard.server.core.codec import CodecError, decode, encode
from sandyard.server.core.contracts.cluster import (
    Beat,
    Grant,
    Hello,
    Identity,
    Joining,
    Registry,
    Welcome,
)
from sandyard.server.core.errors import (
    InternalError,
    InvalidArgumentError,
    SandyardError,
    UnauthenticatedError,
    UnavailableError,
)
from sandyard.server.links.tunnel.ends import name_of, watch_over
from sandyard.server.links.tunnel.frames import (
    PIECE,
    BrokenError,
    FrameKind,
    Line,
    head,
    refusal,
    refused,
    values_of,
)
from sandyard.server.links.tunnel.handshakes import Handshakes
from sandyard.server.tasks import Crew

log = logging.getLogger(__name__)

_FIRST_S: Final = 10.0
_QUIET_S: Final = 30.0
_STRANGER_S: Final = 20.0
_STRANGERS_MAX: Final = 64
_WORDS_MAX: Final = 64 * 1024
_ANSWER_S: Final = 5.0
_BEAT_S: Final = 1.0
_BEATS_S: Final = 2.0
_WORK_S: Final = 1.0
_EACH_MAX: Final = 4
_T = TypeVar("_T")


@asynccontextmanager
async def opened_door(
    registry: Registry,
    *,
    address: str,
    port: int,
    tls: ssl.SSLContext,
    authority: Callable[[], str],
    node_of: Callable[[str], str | None],
    most: int = 1000,
) -> AsyncIterator[int]:
    """Handle nodes while the block runs, and yield the port.

    `node_of` returns the id of the node with a name (see `ends.name_of`), or None. Clients without
    a certificate may only request the authority's certificate, and join.
    """
    lines: dict[Line, str] = {}
    strangers: set[Line] = set()
    async with Crew() as crew:

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            line = Line(reader, writer, longest=_WORDS_MAX)
            who = _node_at(writer, node_of)
            if who is None:
                is_full = len(strangers) >= _STRANGERS_MAX
            else:
                is_full = len(lines) >= most or list(lines.values()).count(who) >= _EACH_MAX
            if is_full:
                line.hang_up()
                return
            if who is None:
                strangers.add(line)
            else:
                lines[line] = who
            try:
                watch_over(writer)
                # Clients without a certificate have a separate limit, and little time.
                with suppress(BrokenError, TimeoutError):
                    async with asyncio.timeout(_STRANGER_S if who is None else None):
                        while True:
                            async with asyncio.timeout(_QUIET_S):
                                asked = await line.hear()
                            await _answer(line, asked.payload, registry, who, authority())
            finally:
                strangers.discard(line)
                lines.pop(line, None)
                line.hang_up()

        def take(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            if crew.start(serve(reader, writer), "a node at the door was not answered") is None:
                writer.transport.abort()

        handshakes = Handshakes(tls, limit_s=_FIRST_S)
        server = await handshakes.streams(take, address, port, limit=2 * PIECE)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            handshakes.close()
            for line in {*lines, *strangers}:
                line.hang_up()


def _node_at(writer: asyncio.StreamWriter, node_of: Callable[[str], str | None]) -> str | None:
    try:
        return node_of(name_of(writer.get_extra_info("ssl_object")))
    except UnauthenticatedError:
        return None


async def _answer(
    line: Line, payload: bytes, registry: Registry, who: str | None, authority: str
) -> None:
    try:
        values = values_of(payload)
        # Done after its caller gave up, it could undo what was done since.
        async with asyncio.timeout(_WORK_S):
            answered = await _registered(
                registry, who, str(values.get("op")), values.get("args"), authority
            )
    except SandyardError as error:
        await line.say(FrameKind.REFUSE, refusal(error))
    except TimeoutError:
        await line.say(FrameKind.REFUSE, refusal(UnavailableError("the database does not answer")))
    except BrokenError:
        raise
    except Exception as error:  # answered as an internal error
        log.exception("unexpected error while handling a node's connection")
        await line.say(
            FrameKind.REFUSE, refusal(InternalError(f"cannot answer the request: {error}"))
        )
    else:
        await line.say(FrameKind.ANSWER, head(answered))


async def _registered(
    registry: Registry, who: str | None, op: str, args: object, authority: str
) -> dict[str, Any]:
    try:
        match op:
            case "authority":
                return {"certificate": authority}
            case "join":
                return _encoded(await registry.join(decode(Joining, args)))
            case "hello" | "beat" if who is None:
                raise UnauthenticatedError("cannot identify the node")
            case "hello" if who is not None:
                return _encoded(await registry.hello(who, decode(Hello, args)))
            case "beat" if who is not None:
                return _encoded(await registry.beat(who, decode(Beat, args)))
    except CodecError as error:
        raise InvalidArgumentError(f"cannot read the message: {error}") from error
    raise InvalidArgumentError("cannot read the request: it comes from another version")


def _encoded(value: object) -> dict[str, Any]:
    found: dict[str, Any] = encode(value)
    return found


# --- the node's side ----------------------------------------------------------------------------


def fingerprint_of(authority: str) -> str:
    """Return the fingerprint of an authority's certificate (PEM): SHA-256, 64 hex digits.

    Raises:
        ValueError: it is not a certificate.
    """
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(authority)).hexdigest()


async def joined(
    host: str,
    port: int,
    joining: Joining,
    *,
    fingerprint: str,
    may_be: Callable[[str], bool],
) -> tuple[Identity, str]:
    """Join an installation at a control plane; return the identity, and this host's address on that
    connection.

    The invite's secret is sent only after the server's certificate was verified by the authority's
    fingerprint, which is part of the invite, and after `may_be` accepted its name as a control
    plane's.

    Raises:
        UnavailableError: nothing answers at this address.
        UnauthenticatedError: the server belongs to another installation.
        SandyardError: the control plane refuses.
    """
    stranger = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    stranger.check_hostname, stranger.verify_mode = False, ssl.CERT_NONE
    async with _dialled(host, port, stranger) as (line, _):
        answer = await _asked(line, "authority", {})
    known = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    known.check_hostname, known.minimum_version = False, ssl.TLSVersion.TLSv1_3
    # Only the verified certificate is used: the text may contain others after it.
    known.load_verify_locations(cadata=_pinned(str(answer.get("certificate")), fingerprint, host))
    async with _dialled(host, port, known) as (line, writer):
        if not may_be(name_of(writer.get_extra_info("ssl_object"))):
            raise UnauthenticatedError(f"cannot join at {host}:{port}: it is no control plane")
        identity = decode(Identity, await _asked(line, "join", encode(joining)))
        _pinned(identity.authority, fingerprint, host)
        return identity, str(writer.get_extra_info("sockname")[0])


def _pinned(authority: str, fingerprint: str, host: str) -> bytes:
    """Return an authority's certificate (DER), verified by its fingerprint."""
    with suppress(ValueError):
        found = ssl.PEM_cert_to_DER_cert(authority)
        if (
            ssl.DER_cert_to_PEM_cert(found).split() == authority.split()
            and hashlib.sha256(found).hexdigest() == fingerprint
        ):
            return found
    raise UnauthenticatedError(
        f"cannot join at {host}: it is not of the installation that the invite is from, or its "
        "certificate authority was replaced since; make another invite"
    )


async def reached(host: str, port: int, tls: ssl.SSLContext, may_be: Callable[[str], bool]) -> None:
    """Return once a control plane accepts a connection.

    Raises:
        UnavailableError: nothing answers, or not a control plane of this installation.
    """
    async with _dialled(host, port, tls) as (_, writer):
        if not may_be(name_of(writer.get_extra_info("ssl_object"))):
            raise UnavailableError(f"at {host}:{port} there is no control plane")


class DoorPresence:
    """See core.contracts.cluster.Presence: at the first of the `doors` that answers, which is the
    first to be asked next; there is not long for it, for a lease is not long.

    Raises, by any method: UnavailableError if none does.
    """

    def __init__(self, tls: Callable[[], ssl.SSLContext], may_be: Callable[[str], bool]) -> None:
        self.doors: list[tuple[str, int]] = []
        self._tls = tls
        self._may_be = may_be

    async def hello(self, node_id: str, hello: Hello) -> Welcome:
        """See core.contracts.cluster.Registry.hello; the certificate names the sender."""
        return await self._tried("hello", hello, Welcome)

    async def beat(self, node_id: str, beat: Beat) -> Grant:
        """See core.contracts.cluster.Registry.beat; the certificate names the sender."""
        return await self._tried("beat", beat, Grant)

    async def _tried(self, op: str, words: object, kind: type[_T]) -> _T:
        trouble = UnavailableError("no control plane answers in time")
        with suppress(TimeoutError):
            async with asyncio.timeout(_BEATS_S):
                for door in list(self.doors):
                    try:
                        async with asyncio.timeout(_BEAT_S):
                            return decode(kind, await self._answer_of(door, op, words))
                    except (UnavailableError, CodecError, TimeoutError) as error:
                        trouble = UnavailableError(f"{door[0]}:{door[1]} does not answer: {error}")
                        self._put_last(door)
        raise trouble

    async def _answer_of(self, door: tuple[str, int], op: str, words: object) -> dict[str, Any]:
        async with _dialled(*door, self._tls()) as (line, writer):
            if not self._may_be(name_of(writer.get_extra_info("ssl_object"))):
                raise UnavailableError("no control plane is there")
            return await _asked(line, op, encode(words))

    def _put_last(self, door: tuple[str, int]) -> None:
        if door in self.doors:
            self.doors = [*(one for one in self.doors if one != door), door]


@asynccontextmanager
async def _dialled(
    host: str, port: int, tls: ssl.SSLContext
) -> AsyncIterator[tuple[Line, asyncio.StreamWriter]]:
    try:
        async with asyncio.timeout(_ANSWER_S):
            reader, writer = await asyncio.open_connection(host, port, ssl=tls, limit=2 * PIECE)
    except (OSError, TimeoutError) as error:
        raise UnavailableError(
            f"cannot reach a control plane at {host}:{port}: {str(error) or 'no answer'}"
        ) from error
    line = Line(reader, writer)
    try:
        yield line, writer
    finally:
        line.hang_up()


async def _asked(line: Line, op: str, args: object) -> dict[str, Any]:
    try:
        async with asyncio.timeout(_ANSWER_S):
            await line.say(FrameKind.ASK, head({"op": op, "args": args}))
            frame = await line.hear()
        if frame.kind is FrameKind.REFUSE:
            raise refused(frame.payload)
        return values_of(frame.payload)
    except (BrokenError, TimeoutError) as error:
        raise UnavailableError("the control plane does not answer") from error
