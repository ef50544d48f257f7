"""The connections of a sandbox with rules: who they are for, whether they may pass, and how."""

import asyncio
import logging
import socket
import ssl
import struct
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

from sandyard.server.core.clienthello import HelloReader, NotHelloError
from sandyard.server.core.egress import TLS_PORT, Address, Judgement, Rules, plain_name
from sandyard.server.egress.answers import Known
from sandyard.server.egress.dial import Dialer, DialError
from sandyard.server.egress.held import Held
from sandyard.server.egress.http import Headers, RefusedError, Upstream, converse
from sandyard.server.egress.journal import Journal
from sandyard.server.egress.streams import (
    Counter,
    PlainStream,
    TlsStream,
    linger,
    prepare,
    reset,
    splice,
)

log = logging.getLogger(__name__)

_CONNECTIONS_MAX = 512
_FIRST_S = 10.0
_PAUSE_S = 0.1
_PIECE = 16 * 1024
_HTTP = 80
_SO_ORIGINAL_DST = 80  # linux/netfilter_ipv4.h
# A fatal alert of TLS, `access_denied` (RFC 8446, 6): clients show it, and do not try again.
_ACCESS_DENIED = b"\x15\x03\x01\x00\x02\x02\x31"
Still = Callable[[Rules], Judgement | None]


@dataclass(eq=False)
class _Passage:
    """A connection that may pass for as long as `still` says so."""

    address: Address
    port: int
    name: str
    rule: str
    still: Still
    task: "asyncio.Task[None] | None"
    counter: Counter = field(default_factory=Counter)
    secrets: set[str] = field(default_factory=set)
    began: float = field(default_factory=lambda: asyncio.get_running_loop().time())


class Gate:
    """Serves the connections that were redirected to a listener."""

    def __init__(
        self,
        rules: Rules,
        dialer: Dialer,
        known: Known,
        journal: Journal,
        hosts: ssl.SSLContext,
    ) -> None:
        self.rules = rules
        self._dialer = dialer
        self._known = known
        self._journal = journal
        self._hosts = hosts
        self.held: Held | None = None
        self._passages: set[_Passage] = set()
        self._free = asyncio.Semaphore(_CONNECTIONS_MAX)

    def use(self, rules: Rules, held: Held | None = None) -> None:
        """Judge by other rules from now on, and end the connections that they do not let pass; end
        TLS with what is `held`."""
        self.rules = rules
        self.held = held
        for one in list(self._passages):
            judgement = one.still(rules)
            if one.task is not None and (judgement is None or not judgement.may_pass):
                one.task.cancel()

    async def serve(self, listener: socket.socket) -> None:
        """Serve connections until cancelled."""
        loop = asyncio.get_running_loop()
        async with asyncio.TaskGroup() as tasks:
            while True:
                await self._free.acquire()
                try:
                    guest, _ = await loop.sock_accept(listener)
                except OSError:  # out of descriptors, for example
                    self._free.release()
                    await asyncio.sleep(_PAUSE_S)
                    continue
                tasks.create_task(self._serve(guest))

    async def _serve(self, guest: socket.socket) -> None:
        try:
            prepare(guest)
            address, port = _original(guest)
            await self._pass(guest, address, port)
        except* (OSError, TimeoutError, DialError):
            reset(guest)
        except* Exception:
            log.exception("a connection failed")
            reset(guest)
        finally:
            guest.close()
            self._free.release()

    async def _pass(self, guest: socket.socket, address: Address, port: int) -> None:
        rules = self.rules
        judgement = rules.of_address(address)
        if not judgement.may_pass:
            judgement = self._known.is_granted(address, port, rules) or judgement
        is_private = judgement.rule == "private"
        if port == TLS_PORT and rules.ended and not is_private:
            await self._pass_tls(guest, address, judgement)
        elif judgement.may_pass:
            await self._pass_to(guest, address, port, judgement)
        elif not is_private and port in rules.named_ports:
            await (self._pass_http if port == _HTTP else self._pass_tls)(guest, address, judgement)
        else:
            self.refuse(address, port, judgement.rule)
            reset(guest)

    async def _pass_to(
        self,
        guest: socket.socket,
        address: Address,
        port: int,
        judgement: Judgement,
        *,
        first: bytes = b"",
        name: str = "",
    ) -> None:
        """Pass a connection on to the address that the guest dialed; `first` was received, and in
        it the `name` of a host."""

        def still(rules: Rules) -> Judgement | None:
            if rules.ends_tls_of(name):
                return None
            now = rules.of_address(address)
            return now if now.may_pass else self._known.is_granted(address, port, rules)

        passage = _Passage(
            address, port, name or self._known.name_of(address), judgement.rule, still, _task()
        )
        try:
            upstream = await self._dialer.by_address(address, port)
        except DialError as error:
            self.refuse(address, port, str(error), name=passage.name)
            raise
        with upstream:
            # The rules may have changed meanwhile.
            self.check(passage)
            with _Kept(self, passage):
                await splice(
                    PlainStream(guest), PlainStream(upstream), passage.counter, first=first
                )

    async def _pass_tls(self, guest: socket.socket, address: Address, judgement: Judgement) -> None:
        """Pass TLS on to the host that the guest names, or end it here. `judgement` is of the
        address that the guest dialed."""
        hello, name = HelloReader(), None
        try:
            async with asyncio.timeout(_FIRST_S):
                while not hello.feed(await _some(guest)):
                    pass
            name = plain_name(hello.name() or "")
        except (NotHelloError, EOFError, TimeoutError):
            pass
        rules = self.rules  # as they are by now
        found = None if name is None else rules.of_name(name, TLS_PORT)
        may_be_reached = found is not None or rules.allowed or not rules.denies
        if name is not None and rules.ends_tls_of(name) and may_be_reached:
            await self._end_tls(guest, address, name, hello.received)
            return
        if name is None or found is None:
            if judgement.may_pass:
                await self._pass_to(
                    guest, address, TLS_PORT, judgement, first=hello.received, name=name or ""
                )
                return
            self.refuse(address, TLS_PORT, judgement.rule, name=name or "")
            with suppress(OSError):
                guest.send(_ACCESS_DENIED)
            await linger(PlainStream(guest))
            return

        def still(rules: Rules) -> Judgement | None:
            return None if rules.ends_tls_of(name) else rules.of_name(name, TLS_PORT)

        upstream, passage = await self.reached(name, TLS_PORT, found, still, address)
        with upstream:
            # The rules may have changed while it was dialed.
            self.check(passage)
            with _Kept(self, passage):
                await splice(
                    PlainStream(guest), PlainStream(upstream), passage.counter, first=hello.received
                )

    async def _end_tls(
        self, guest: socket.socket, address: Address, name: str, received: bytes
    ) -> None:
        """End TLS with the certificate of this sandbox's authority, judge each request inside, and
        pass it on by TLS with the host itself."""
        why = "its secrets have not arrived yet"
        if self.held is not None:
            stream = TlsStream(guest, self.held.issuer.context(name), first=received)
            try:
                async with asyncio.timeout(_FIRST_S):
                    await stream.shake_hands()
            except ssl.SSLEOFError:
                why = "the client ended the connection"
            except ssl.SSLError:
                why = "the client does not accept the certificate"
            else:
                await _Ended(self, name, address).converse(stream)
                return
        self.refuse(address, TLS_PORT, why, name=name)
        with suppress(OSError):
            guest.send(_ACCESS_DENIED)
        await linger(PlainStream(guest))

    async def secured(self, upstream: socket.socket, passage: _Passage) -> TlsStream:
        """Return TLS with a host over a connection to it.

        Raises:
            RefusedError: it is not with that host.
        """
        secure = TlsStream(upstream, self._hosts, host=passage.name)
        try:
            async with asyncio.timeout(_FIRST_S):
                await secure.shake_hands()
        except (OSError, TimeoutError) as error:
            why = getattr(error, "verify_message", "") or "TLS with the host fails"
            self.refuse(passage.address, TLS_PORT, why, name=passage.name)
            raise RefusedError(502, f"cannot reach {passage.name} securely: {why}") from error
        return secure

    async def _pass_http(self, guest: socket.socket, address: Address, judged: Judgement) -> None:
        """Pass HTTP on, each request to the host that it names; see `_pass_tls`."""
        current: list[_Kept] = []

        async def reach(host: str) -> Upstream:
            _end(current)
            rules = self.rules
            # Patterns are for plain names: others could end like one, and lead elsewhere.
            is_plain = plain_name(host) == host
            judgement = rules.of_name(host, _HTTP) if is_plain else None
            if judgement is None:
                self.refuse(address, _HTTP, judged.rule, name=host)
                raise RefusedError(403, f"the rules of this sandbox do not allow {host}")
            if rules.ends_tls_of(host):
                self.refuse(address, _HTTP, "not by https", name=host)
                raise RefusedError(403, f"{host} is reached by https alone: its requests are read")

            def still(rules: Rules) -> Judgement | None:
                return None if rules.ends_tls_of(host) else rules.of_name(host, _HTTP)

            upstream, passage = await self.reached(host, _HTTP, judgement, still, address)
            passage.task = task
            try:
                self.check(passage)
            except ConnectionAbortedError:
                upstream.close()
                raise
            _begin(current, _Kept(self, passage))
            return Upstream(PlainStream(upstream), passage.counter)

        task = _task()
        try:
            first = await asyncio.wait_for(_some(guest), _FIRST_S)
            await converse(PlainStream(guest), first, _HTTP, reach)
        except EOFError:
            return
        finally:
            _end(current)

    async def reached(
        self,
        name: str,
        port: int,
        judgement: Judgement | None,
        still: Still,
        address: Address,
    ) -> tuple[socket.socket, _Passage]:
        """Dial a name that a rule allows, or at an address that may be reached.

        Raises:
            DialError: it cannot be; that is in the journal, with the `address` the guest dialed.
        """
        rules = self.rules

        def may_reach(one: Address) -> bool:
            if judgement is not None:
                return not rules.is_private(one)
            return rules.of_address(one).may_pass

        try:
            upstream, reached = await self._dialer.by_name(name, port, may_reach)
        except DialError as error:
            self.refuse(address, port, str(error), name=name)
            raise
        rule = (judgement or rules.of_address(reached)).rule
        return upstream, _Passage(reached, port, name, rule, still, _task())

    def check(self, passage: _Passage) -> None:
        """Raise ConnectionAbortedError if a passage may no longer pass."""
        judgement = passage.still(self.rules)
        if judgement is None or not judgement.may_pass:
            raise ConnectionAbortedError

    def refuse(self, address: Address, port: int, rule: str, *, name: str = "") -> None:
        """Write to the journal that something was refused, and why."""
        self._journal.write(
            {
                "verdict": "refused", "rule": rule, "name": name or self._known.name_of(address),
                "address": str(address), "port": port,
            }
        )  # fmt: skip

    def begin(self, passage: _Passage) -> None:
        """Count a passage among those that other rules may end."""
        self._passages.add(passage)

    def end(self, passage: _Passage) -> None:
        """Write a passage to the journal."""
        self._passages.discard(passage)
        seconds = asyncio.get_running_loop().time() - passage.began
        self._journal.write(
            {
                "verdict": "allowed", "rule": passage.rule, "name": passage.name,
                "address": str(passage.address), "port": passage.port,
                "bytesOut": passage.counter.out, "bytesIn": passage.counter.into,
                "durationMs": round(seconds * 1000),
            }
            | ({"secrets": sorted(passage.secrets)} if passage.secrets else {})
        )  # fmt: skip


class _Ended:
    """A connection of a guest whose TLS is ended here, and its host."""

    def __init__(self, gate: Gate, name: str, address: Address) -> None:
        self._gate = gate
        self._name = name
        self._dialed = address
        self._reached = address
        self._task = _task()
        self._current: list[_Kept] = []

    async def converse(self, guest: TlsStream) -> None:
        """Pass the requests on; see egress.http.converse."""
        try:
            await converse(guest, b"", TLS_PORT, self._reach, self._adapted)
        finally:
            _end(self._current)

    def _still(self, rules: Rules) -> Judgement | None:
        if not rules.ends_tls_of(self._name):
            return None
        return rules.of_name(self._name, TLS_PORT) or rules.of_address(self._reached)

    async def _reach(self, host: str) -> Upstream:
        _end(self._current)
        gate, name = self._gate, self._name
        if host != name:
            gate.refuse(self._dialed, TLS_PORT, f"its connection is to {name}", name=host)
            raise RefusedError(421, f"this connection is to {name}, and not to {host}")
        self._given([])  # nothing is dialed without the secrets
        upstream, passage = await gate.reached(
            name, TLS_PORT, gate.rules.of_name(name, TLS_PORT), self._still, self._dialed
        )
        self._reached, passage.task = passage.address, self._task
        try:
            secure = await gate.secured(upstream, passage)
            gate.check(passage)
        except BaseException:
            upstream.close()
            raise
        _begin(self._current, _Kept(gate, passage))
        return Upstream(secure, passage.counter)

    def _adapted(self, headers: Headers) -> Headers:
        made, secrets = self._given(headers)
        for one in self._current:
            one.passage.secrets.update(secrets)
        return made

    def _given(self, headers: Headers) -> tuple[Headers, frozenset[str]]:
        held, why = self._gate.held, "its secrets have not arrived yet"
        try:
            if held is None:
                raise RefusedError(502, f"the secrets for {self._name} are not here yet")
            why = "a secret is missing"
            made, secrets, count = held.added(self._name, headers)
            if count == 0 and self._gate.rules.injects_into(self._name):
                raise RefusedError(502, f"the headers for {self._name} are not here yet")
        except RefusedError:
            self._gate.refuse(self._dialed, TLS_PORT, why, name=self._name)
            raise
        return made, secrets


class _Kept:
    """Counts a passage for as long as a block runs."""

    def __init__(self, gate: Gate, passage: _Passage) -> None:
        self._gate = gate
        self.passage = passage

    def __enter__(self) -> _Passage:
        self._gate.begin(self.passage)
        return self.passage

    def __exit__(self, *trouble: object) -> None:
        self._gate.end(self.passage)


def _begin(current: list[_Kept], kept: _Kept) -> None:
    kept.__enter__()
    current.append(kept)


def _end(current: list[_Kept]) -> None:
    while current:
        current.pop().__exit__()


def _task() -> "asyncio.Task[None] | None":
    return asyncio.current_task()


async def _some(connection: socket.socket) -> bytes:
    data = await asyncio.get_running_loop().sock_recv(connection, _PIECE)
    if not data:
        raise EOFError
    return data


def _original(connection: socket.socket) -> tuple[Address, int]:
    """Return where a connection was for before it was redirected.

    Raises:
        OSError: it was not.
    """
    packed = connection.getsockopt(socket.SOL_IP, _SO_ORIGINAL_DST, 16)
    _, port, address = struct.unpack_from("!HH4s", packed)
    return Address(address), port
