"""Who is asking, and what they may do."""

import hmac
import logging
from dataclasses import dataclass
from datetime import timedelta

from sandyard.server.core.contracts import Clock, Store
from sandyard.server.core.errors import (
    InvalidTokenError,
    PermissionDeniedError,
    SandyardError,
    TokenExpiredError,
    UnauthenticatedError,
)
from sandyard.server.core.ids import digest_of_key
from sandyard.server.core.records import ApiKey
from sandyard.server.core.scopes import is_covered

log = logging.getLogger(__name__)

_SEE_ALL = ("admin:resources", "admin:*")
_TOUCH_EVERY = timedelta(minutes=1)
_TOKEN_MAX = 8192


@dataclass(frozen=True)
class Actor:
    """Somebody who acts within one organization."""

    org_id: str
    user_id: str
    role: str
    scopes: frozenset[str]
    kind: str  # api_key, user or system
    key_id: str | None = None

    @property
    def sees_all(self) -> bool:
        """Whether the actor sees and acts on other members' resources."""
        # Named, not covered by `*`: a member's key for everything is not an admin's.
        return self.role == "admin" or not self.scopes.isdisjoint(_SEE_ALL)

    def require(self, scope: str) -> None:
        """Return if the actor holds a scope.

        Raises:
            PermissionDeniedError: it does not; `facts` name the scope.
        """
        if not is_covered(scope, self.scopes):
            raise PermissionDeniedError(
                f"cannot do this with the credential given: it lacks the scope {scope}",
                requiredScope=scope,
            )


def no_credential() -> UnauthenticatedError:
    """Return the error for a request that says nothing of who is asking."""
    return UnauthenticatedError(
        "cannot serve without a credential: send `Authorization: Bearer <API key>`"
    )


class Access:
    """Tells from a credential who is asking."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._touched: dict[str, float] = {}

    async def authenticate(self, token: str | None) -> Actor:
        """Return the actor behind a credential.

        Raises:
            UnauthenticatedError: there is none.
            InvalidTokenError: it is unknown, revoked or malformed.
            TokenExpiredError: it has run out.
        """
        if not token:
            raise no_credential()
        if not token.startswith("rt_") or len(token) > _TOKEN_MAX or not token.isascii():
            raise InvalidTokenError(
                "cannot accept the credential: it is not an API key (rt_live_… or rt_test_…)"
            )
        return await self._by_key(token)

    async def _by_key(self, token: str) -> Actor:
        digest = digest_of_key(token)
        async with self._store.read() as tx:
            holder = await tx.accounts.find_key(digest)
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
        )

    async def _touch(self, key: ApiKey) -> None:
        last = self._touched.get(key.id)
        now = self._clock.monotonic()
        if last is None or now - last > _TOUCH_EVERY.total_seconds():
            self._touched[key.id] = now
            try:
                async with self._store.write() as tx:
                    await tx.accounts.touch_key(key.id, self._clock.now())
            except SandyardError:  # worth less than the request it would stop
                log.warning("the last use of a key could not be noted")
