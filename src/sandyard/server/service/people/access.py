"""Authentication by API key or session token."""

import hmac
import logging
from datetime import timedelta
from typing import Protocol

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.errors import (
    InvalidTokenError,
    SandyardError,
    TokenExpiredError,
    UnauthenticatedError,
)
from sandyard.server.core.ids import E2B_KEY, digest_of_key, generation_of
from sandyard.server.core.records import ApiKey
from sandyard.server.service.actor import Actor

log = logging.getLogger(__name__)

_TOUCH_EVERY = timedelta(minutes=1)
_TOKEN_MAX = 8192
_TOUCHED_MAX = 10_000


def no_credential() -> UnauthenticatedError:
    """Return the error for a request without a credential."""
    return UnauthenticatedError("cannot serve this without a credential")


class SessionVerifier(Protocol):
    """Verifies session tokens. See service.people.sign_in.SignIn."""

    async def enter(self, token: str, *, org_id: str | None = None) -> Actor:
        """Return the actor of a session token."""
        ...


class Access:
    """Authenticates callers."""

    def __init__(self, store: Store, clock: Clock, sign_in: SessionVerifier | None = None) -> None:
        self._store = store
        self._clock = clock
        self._sign_in = sign_in
        self._touched: dict[str, float] = {}

    async def authenticate(self, token: str | None, *, org_id: str | None = None) -> Actor:
        """Return the actor behind an API key or session token.

        `org_id` selects one of a session's organizations, if its token does not. A key has one.

        Raises:
            UnauthenticatedError: the token is empty.
            InvalidTokenError: it is unknown, revoked or malformed.
            TokenExpiredError: it has expired.
            NotFoundError: the actor is not a member of that organization.
            UnavailableError: the identity provider does not answer.
        """
        if not token:
            raise no_credential()
        if len(token) > _TOKEN_MAX or not token.isascii():
            raise _unknown_kind()
        if token.startswith(("rt_", E2B_KEY)):
            return await self._by_key(token)
        if token.startswith("eyJ"):
            if self._sign_in is None:
                raise InvalidTokenError(
                    "cannot accept a session token: no identity provider is set up here; "
                    "use an API key"
                )
            return await self._sign_in.enter(token, org_id=org_id)
        raise _unknown_kind()

    async def _by_key(self, token: str) -> Actor:
        digest = digest_of_key(token)
        async with self._store.glance() as tx:
            holder = await tx.keys.holder(digest)
        if holder is None or not hmac.compare_digest(holder.key.digest, digest):
            raise InvalidTokenError("cannot accept the API key: it is unknown")
        key = holder.key
        now = self._clock.now()
        if key.revoked_at is not None:
            raise InvalidTokenError("cannot accept the API key: it was revoked")
        if key.expires_at is not None and key.expires_at <= now:
            raise TokenExpiredError("cannot accept the API key: it has expired; make a new one")
        await self._touch(key)
        return Actor(
            org_id=key.org_id,
            user_id=key.owner_user_id,
            role=holder.role,
            scopes=frozenset(key.scopes),
            kind="api_key",
            key_id=key.id,
            key_generation=generation_of(key.digest),
            is_operator=holder.is_operator,
            is_test=key.is_test,
            plan=holder.plan,
            limits=holder.limits,
        )

    async def _touch(self, key: ApiKey) -> None:
        last = self._touched.get(key.id)
        now = self._clock.monotonic()
        if last is None or now - last > _TOUCH_EVERY.total_seconds():
            if len(self._touched) > _TOUCHED_MAX:
                self._touched.clear()
            self._touched[key.id] = now
            try:
                async with self._store.write(Turn.SHARED) as tx:
                    await tx.keys.touch(key.id, self._clock.now())
            except SandyardError:  # worth less than the request it would stop
                log.warning("cannot record the last use of a key; continuing")


def _unknown_kind() -> InvalidTokenError:
    return InvalidTokenError(
        "cannot accept the credential: it is neither an API key (rt_live_…, rt_test_… or e2b_…) "
        "nor a session token (eyJ…)"
    )
