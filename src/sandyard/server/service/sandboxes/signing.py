"""URLs that let whoever has them read or write one file of a sandbox, without a key of their own.

A signature (HMAC, RFC 2104) binds method, sandbox, path, user and the moment it runs out to whoever
signed. It is worth no more than its signer is when it is used: it ends with the key that made it.
"""

import hmac
import json
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Store
from sandyard.server.core.errors import (
    InvalidArgumentError,
    InvalidTokenError,
    TokenExpiredError,
)
from sandyard.server.core.scopes import ADMINS_ONLY, is_covered
from sandyard.server.service.actor import Actor
from sandyard.server.service.sandboxes.files import check_user
from sandyard.server.service.sandboxes.register import Register

SECONDS = range(1, 7 * 86_400 + 1)
METHODS = ("GET", "PUT")
_SCOPE = "sandbox:write"
_PURPOSE = b"sandyard: signed URLs of files, 1"


@dataclass(frozen=True)
class SignedUse:
    """What a signature lets somebody do, until `expires` (seconds since 1970)."""

    method: str
    sandbox_id: str
    path: bytes
    user: str
    expires: int
    by: str


class Signing:
    """See the module. `key` is the installation's."""

    def __init__(self, store: Store, register: Register, clock: Clock, key: bytes) -> None:
        self._store = store
        self._register = register
        self._clock = clock
        self._key = hmac.digest(key, _PURPOSE, sha256)

    async def sign(
        self, actor: Actor, reference: str, method: str, path: bytes, user: str, seconds: int
    ) -> tuple[SignedUse, str]:
        """Return what may be done with one file for so many seconds, and the signature for it.

        Raises:
            NotFoundError: no such sandbox for this actor.
            InvalidArgumentError: something asked for cannot be; `facts` name the field.
        """
        actor.require(_SCOPE)
        if method not in METHODS:
            raise InvalidArgumentError(
                "cannot sign for that method: it is GET to read or PUT to write", field="method"
            )
        if seconds not in SECONDS:
            raise InvalidArgumentError(
                f"cannot use expiresIn: it is 1 to {SECONDS.stop - 1} seconds", field="expiresIn"
            )
        check_user(user)
        sandbox = await self._register.get(actor, reference)
        signer = actor.key_id if actor.key_id is not None else f"user:{actor.user_id}"
        until = self._clock.now() + timedelta(seconds=seconds)
        use = SignedUse(
            method, sandbox.id, path, user, int(until.timestamp()), f"{actor.org_id}:{signer}"
        )
        return use, self._signature(use)

    async def enter(self, use: SignedUse, signature: str) -> Actor:
        """Return the actor on whose behalf a signed URL is used.

        Raises:
            InvalidTokenError: it was not signed here for this, or its signer may do it no more.
            TokenExpiredError: it has run out.
        """
        if not hmac.compare_digest(signature.encode(), self._signature(use).encode()):
            raise InvalidTokenError(
                "cannot accept the signed URL: it was not signed for this; use it as it was given, "
                "with its method"
            )
        if use.expires <= self._clock.now().timestamp():
            raise TokenExpiredError("cannot accept the signed URL: it has expired; sign a new one")
        org_id, _, signer = use.by.partition(":")
        kind, _, user_id = signer.partition(":")
        actor = (
            await self._member(org_id, user_id)
            if kind == "user"
            else await self._holder(org_id, signer)
        )
        if actor is None:
            raise InvalidTokenError(
                "cannot accept the signed URL: whoever signed it may not do this any more"
            )
        return actor

    async def _holder(self, org_id: str, key_id: str) -> Actor | None:
        async with self._store.read() as tx:
            key = await tx.keys.find(org_id, key_id)
            holder = None if key is None else await tx.keys.holder(key.digest)
        if holder is None:
            return None
        key = holder.key
        is_over = key.expires_at is not None and key.expires_at <= self._clock.now()
        if key.revoked_at is not None or is_over:
            return None
        if not is_covered(_SCOPE, key.scopes):
            return None
        return Actor(
            org_id=org_id,
            user_id=key.owner_user_id,
            role=holder.role,
            # The one reaches files, the others an admin's view of other members' sandboxes.
            scopes=frozenset({_SCOPE}) | (ADMINS_ONLY & frozenset(key.scopes)),
            kind="api_key",
            key_id=key.id,
            is_test=key.is_test,
            plan=holder.plan,
            limits=holder.limits,
        )

    async def _member(self, org_id: str, user_id: str) -> Actor | None:
        async with self._store.read() as tx:
            member = await tx.users.member(org_id, user_id)
            organization = await tx.organizations.find(org_id)
        if member is None or organization is None:
            return None
        return Actor(
            org_id=org_id,
            user_id=user_id,
            role=member.role,
            scopes=frozenset({_SCOPE}),
            kind="user",
            plan=organization.plan,
            limits=organization.limits,
        )

    def _signature(self, use: SignedUse) -> str:
        said = json.dumps(
            [use.method, use.sandbox_id, use.path.hex(), use.user, use.expires, use.by]
        )
        digest = hmac.digest(self._key, said.encode(), sha256)
        return urlsafe_b64encode(digest).rstrip(b"=").decode()


def moment_of(use: SignedUse) -> datetime:
    """Return when it runs out."""
    return datetime.fromtimestamp(use.expires, UTC)
