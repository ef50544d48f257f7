"""Tickets: short-lived access to one sandbox, for clients that cannot send a key.

A ticket is a secret of at least 128 bits; the store keeps its digest. It grants what its issuer may
do, and ends with the issuer's key.
"""

import hmac
from base64 import b32encode
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256

from sandyard.server.core.contracts.store import Transaction, Turn
from sandyard.server.core.errors import InvalidTokenError, TokenExpiredError
from sandyard.server.core.ids import new_secret
from sandyard.server.core.records import Sandbox, Ticket
from sandyard.server.service.actor import Actor, Admission
from sandyard.server.service.repeats import Repeatable
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.signers import Signers, signer_of

SCOPE = "sandbox:write"
_ONCE_S = 60
_PURPOSE = b"sandyard: tokens of previews, 1"
_PARTS = 24
_SECRET_MAX = 200
_FORGET_AFTER = timedelta(hours=1)


@dataclass(frozen=True)
class Issued:
    """A ticket's `secret`, its `detail` and its expiry."""

    secret: str = field(repr=False)
    detail: str
    expires_at: datetime


class Tickets:
    """Issues and verifies tickets. Preview tokens are valid for `preview_s` by default."""

    def __init__(self, platform: Platform, signers: Signers, *, preview_s: int) -> None:
        self._store = platform.store
        self._repeats = platform.repeats
        self._signers = signers
        self._clock = platform.clock
        self._key = hmac.digest(platform.key, _PURPOSE, sha256)
        self._preview_s = preview_s

    async def issue(
        self,
        actor: Actor,
        sandbox: Sandbox,
        kind: str,
        detail: str = "",
        *,
        request: Repeatable | None = None,
    ) -> Issued:
        """Create a ticket for one use within a minute. A repeated `request` gets the same one."""
        until = self._clock.now() + timedelta(seconds=_ONCE_S)
        if request is None:
            secret = new_secret()
            async with self._store.write(Turn.SHARED) as tx:
                await self._keep(tx, actor, sandbox, secret, kind, detail, until)
            return Issued(secret, detail, until)
        secret = self._repeats.secret_of(actor, request)
        async with self._repeats.turn(actor, request), self._store.write(actor.org_id) as tx:
            made = await self._repeats.made_before(tx, actor, request)
            if made is not None:
                return Issued(secret, made[0], datetime.fromisoformat(made[1]))
            await self._keep(tx, actor, sandbox, secret, kind, detail, until)
            await self._repeats.note(tx, actor, request, (detail, until.isoformat()))
        return Issued(secret, detail, until)

    async def issue_for_port(
        self, actor: Actor, sandbox: Sandbox, kind: str, port: int, lasts_s: int | None = None
    ) -> tuple[str, datetime]:
        """Create a reusable token for a port of a sandbox, valid in a host name. Return it and its
        expiry.

        Within a fraction of its lifetime the same token is returned again, so that frequent
        requests do not fill the store.
        """
        lasts_s = self._preview_s if lasts_s is None else lasts_s
        part_s = max(1, lasts_s // _PARTS)
        part = int(self._clock.now().timestamp()) // part_s
        until = datetime.fromtimestamp((part + 1) * part_s + lasts_s, UTC)
        signed = f"{kind} {actor.org_id} {signer_of(actor)} {sandbox.id} {port} {part} {lasts_s}"
        digest = hmac.digest(self._key, signed.encode(), sha256)[:16]
        token = b32encode(digest).decode().rstrip("=").lower()
        async with self._store.write(Turn.SHARED) as tx:
            await self._keep(tx, actor, sandbox, token, kind, str(port), until)
        return token, until

    async def redeem(self, secret: str, kind: str) -> Admission:
        """Use up a ticket.

        Raises:
            InvalidTokenError: it is unknown, used, of another kind, or its issuer lost the right.
            TokenExpiredError: it has expired.
        """
        if len(secret) > _SECRET_MAX:
            raise _unknown()
        async with self._store.write(Turn.SHARED) as tx:
            ticket = await tx.tickets.take(_digest(secret), kind)
        return await self._admitted(ticket, kind)

    async def admit(self, secret: str, kind: str, sandbox_id: str, detail: str) -> Admission:
        """Verify a reusable ticket.

        Raises: see `redeem`; InvalidTokenError also for another sandbox or purpose.
        """
        if len(secret) > _SECRET_MAX:
            raise _unknown()
        async with self._store.glance() as tx:
            ticket = await tx.tickets.find(_digest(secret))
        if ticket is not None and (ticket.sandbox_id, ticket.detail) != (sandbox_id, detail):
            raise _unknown()
        return await self._admitted(ticket, kind)

    async def _admitted(self, ticket: Ticket | None, kind: str) -> Admission:
        if ticket is None or ticket.kind != kind:
            raise _unknown()
        if ticket.expires_at <= self._clock.now():
            raise TokenExpiredError("cannot accept the ticket: it has expired; request a new one")
        actor = await self._signers.actor(ticket.org_id, ticket.by, SCOPE)
        if actor is None:
            raise InvalidTokenError("cannot accept the ticket: its issuer no longer has the right")
        return Admission(
            actor, ticket.sandbox_id, ticket.detail, by=ticket.by, expires_at=ticket.expires_at
        )

    async def check(self, admission: Admission) -> None:
        """Return if the ticket's issuer still has the right that it granted.

        Raises:
            InvalidTokenError: the issuer has lost it.
        """
        actor = await self._signers.actor(admission.actor.org_id, admission.by, SCOPE)
        if actor is None or (admission.actor.sees_all and not actor.sees_all):
            raise InvalidTokenError("cannot continue: the ticket's issuer no longer has the right")

    async def _keep(
        self,
        tx: Transaction,
        actor: Actor,
        sandbox: Sandbox,
        secret: str,
        kind: str,
        detail: str,
        until: datetime,
    ) -> None:
        actor.require(SCOPE)
        by = signer_of(actor)
        ticket = Ticket(_digest(secret), kind, actor.org_id, sandbox.id, by, detail, until)
        await tx.tickets.forget(before=self._clock.now() - _FORGET_AFTER)
        await tx.tickets.put(ticket)


def _digest(secret: str) -> str:
    return sha256(secret.encode("utf-8", "replace")).hexdigest()


def _unknown() -> InvalidTokenError:
    return InvalidTokenError(
        "cannot accept the ticket: it is unknown or already used; request a new one"
    )
