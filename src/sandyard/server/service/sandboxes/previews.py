"""Previews: ports of sandboxes under their own host names."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime

from sandyard.server.core.contracts.node import ByteStream
from sandyard.server.core.contracts.store import Turn
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ops import Dial
from sandyard.server.core.wire import AGENT_PORT, RFB_PORT, is_guests_port
from sandyard.server.service.actor import Actor
from sandyard.server.service.addresses import Addresses
from sandyard.server.service.lines import line
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.sandboxes.reach import Reach
from sandyard.server.service.sandboxes.tickets import Tickets
from sandyard.server.service.sandboxes.uses import Use

KIND = "preview"
QUERY_TOKEN = "rt_token"
_USE = Use("preview", "", "preview", is_in_feed=False, is_frequent=True)


@dataclass(frozen=True)
class Preview:
    """A preview URL."""

    url: str
    port: int
    expires_at: datetime


class Previews:
    """Issues preview URLs, and connects to ports."""

    def __init__(
        self,
        platform: Platform,
        *,
        reach: Reach,
        tickets: Tickets,
        addresses: Addresses,
    ) -> None:
        self._store = platform.store
        self._register = platform.register
        self._reach = reach
        self._tickets = tickets
        self._addresses = addresses
        self._clock = platform.clock

    async def url(
        self,
        actor: Actor,
        reference: str,
        port: int,
        *,
        by_cookie: bool,
        lasts_s: int | None = None,
    ) -> Preview:
        """Return a URL of a port, with the token in its host name, or `by_cookie` in its query. It
        is valid for at least `lasts_s` seconds.

        Raises:
            NotFoundError: the actor has no such sandbox.
            InvalidArgumentError: the port is invalid, or reserved for the platform.
        """
        actor.require("sandbox:write")
        if not is_guests_port(port):
            raise InvalidArgumentError(
                f"cannot preview port {port}: it is 1 to 65535, and not {AGENT_PORT} or "
                f"{RFB_PORT}, which are the platform's own",
                field="port",
            )
        sandbox = await self._register.get(actor, reference)
        token, until = await self._tickets.issue_for_port(actor, sandbox, KIND, port, lasts_s)
        where = self._addresses
        label = f"{port}-{sandbox.id}"
        if by_cookie:
            url = f"{where.preview_scheme}://{label}.{where.preview_domain}/?{QUERY_TOKEN}={token}"
        else:
            url = f"{where.preview_scheme}://{label}-{token}.{where.preview_domain}/"
        async with self._store.write(Turn.SHARED) as tx:
            await tx.activity.append(
                line(
                    "sandbox.url.issued",
                    "Preview URL issued",
                    org_id=sandbox.org_id,
                    actor=actor,
                    resource_id=sandbox.id,
                    at=self._clock.now(),
                    status=sandbox.status.value,
                    sandbox_id=sandbox.id,
                    attributes={"port": port},
                )
            )
        return Preview(url, port, until)

    async def check(self, actor: Actor, sandbox_id: str) -> None:
        """Return if an actor may see a sandbox's previews.

        Raises:
            NotFoundError: the actor has no such sandbox.
            PermissionDeniedError: it lacks the scope.
        """
        actor.require("sandbox:write")
        await self._register.get(actor, sandbox_id)

    @asynccontextmanager
    async def dial(self, actor: Actor, sandbox_id: str, port: int) -> AsyncIterator[ByteStream]:
        """Connect to a port of a sandbox. A paused sandbox is resumed first.

        Raises:
            NotFoundError: nothing listens there.
            For the rest see `Reach.open`.
        """
        async with self._reach.open(actor, sandbox_id, Dial(port), _USE) as reached:
            yield reached.stream
