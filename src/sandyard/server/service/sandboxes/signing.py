"""Signed URLs that read or write one file of a sandbox without a key.

The signature (HMAC, RFC 2104) covers method, sandbox, path, user, expiry and signer. A URL is valid
only while its signer has the right, and ends with the key that made it.
"""

import hmac
import json
from base64 import urlsafe_b64encode
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from hashlib import sha256

from sandyard.server.core.errors import (
    InvalidArgumentError,
    InvalidTokenError,
    TokenExpiredError,
)
from sandyard.server.service.actor import Actor
from sandyard.server.service.repeats import Repeatable
from sandyard.server.service.sandboxes.fields import check_account
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.signers import Signers, signer_of

SECONDS = range(1, 7 * 86_400 + 1)
METHODS = ("GET", "PUT")
_SCOPE = "sandbox:write"
_PURPOSE = b"sandyard: signed URLs of files, 1"


@dataclass(frozen=True)
class SignedUse:
    """What a signature allows, until `expires` (seconds since 1970)."""

    method: str
    sandbox_id: str
    path: bytes
    user: str
    expires: int
    by: str


class Signing:
    """Signs and verifies. `key` is the installation's."""

    def __init__(self, platform: Platform, signers: Signers) -> None:
        self._signers = signers
        self._store = platform.store
        self._repeats = platform.repeats
        self._register = platform.register
        self._clock = platform.clock
        self._key = hmac.digest(platform.key, _PURPOSE, sha256)

    async def sign(
        self,
        actor: Actor,
        reference: str,
        method: str,
        path: bytes,
        user: str,
        seconds: int,
        *,
        request: Repeatable | None = None,
    ) -> tuple[SignedUse, str]:
        """Return the permission for one file for `seconds`, and its signature. A repeated `request`
        gets the same.

        Raises:
            NotFoundError: the actor has no such sandbox.
            InvalidArgumentError: a value is invalid; `facts` name the field.
        """
        actor.require(_SCOPE)
        if method not in METHODS:
            raise InvalidArgumentError(
                "cannot sign for this method: use GET to read or PUT to write", field="method"
            )
        if seconds not in SECONDS:
            raise InvalidArgumentError(
                f"cannot use {{field}}: it must be 1 to {SECONDS.stop - 1} seconds",
                field="expires_in",
            )
        check_account(user)
        sandbox = await self._register.get(actor, reference)
        until = await self._until(actor, seconds, request)
        by = f"{actor.org_id}:{signer_of(actor)}"
        use = SignedUse(method, sandbox.id, path, user, until, by)
        return use, self._signature(use)

    async def _until(self, actor: Actor, seconds: int, request: Repeatable | None) -> int:
        """Return the expiry, which is all that has to be stored of a permission."""
        until = int((self._clock.now() + timedelta(seconds=seconds)).timestamp())
        if request is None:
            return until
        async with self._repeats.turn(actor, request), self._store.write(actor.org_id) as tx:
            made = await self._repeats.made_before(tx, actor, request)
            if made is not None:
                return int(made[0])
            await self._repeats.note(tx, actor, request, (str(until),))
        return until

    async def enter(self, use: SignedUse, signature: str) -> Actor:
        """Return the actor on whose behalf a signed URL is used.

        Raises:
            InvalidTokenError: the signature does not match, or its signer has lost the right.
            TokenExpiredError: it has expired.
        """
        if not hmac.compare_digest(signature.encode(), self._signature(use).encode()):
            raise InvalidTokenError(
                "cannot accept the signed URL: the signature does not match; use it unchanged, "
                "with its method"
            )
        if use.expires <= self._clock.now().timestamp():
            raise TokenExpiredError("cannot accept the signed URL: it has expired; sign a new one")
        org_id, _, signer = use.by.partition(":")
        actor = await self._signers.actor(org_id, signer, _SCOPE)
        if actor is None:
            raise InvalidTokenError(
                "cannot accept the signed URL: its signer no longer has the right"
            )
        return actor

    def _signature(self, use: SignedUse) -> str:
        signed = json.dumps(
            [use.method, use.sandbox_id, use.path.hex(), use.user, use.expires, use.by]
        )
        digest = hmac.digest(self._key, signed.encode(), sha256)
        return urlsafe_b64encode(digest).rstrip(b"=").decode()


def moment_of(use: SignedUse) -> datetime:
    """Return the expiry."""
    return datetime.fromtimestamp(use.expires, UTC)
