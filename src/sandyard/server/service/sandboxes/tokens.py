"""Tokens of sandboxes: secrets that belong to one sandbox for as long as it exists.

Each is an HMAC (RFC 2104) of the sandbox's id with the installation's key, so that it is the same
after a pause, a resume and a restart of the server. No machine knows it.
"""

import hmac
from base64 import urlsafe_b64encode
from collections import OrderedDict
from dataclasses import replace
from hashlib import sha256

from sandyard.server.core.errors import InvalidTokenError, NotFoundError
from sandyard.server.core.ids import is_sandbox_id
from sandyard.server.core.states import Status
from sandyard.server.service.actor import Actor, Admission
from sandyard.server.service.sandboxes.platform import Platform
from sandyard.server.service.signers import Signers

_SCOPE, _READ_SCOPE = "sandbox:write", "sandbox:read"
_ACCESS = b"sandyard: access to a sandbox, 1"
_TRAFFIC = b"sandyard: traffic to ports of a sandbox, 1"
_KNOWN_S = 3.0
_KNOWN_MAX = 10_000


class SandboxTokens:
    """Issues and verifies them."""

    def __init__(self, platform: Platform, signers: Signers) -> None:
        self._store = platform.store
        self._clock = platform.clock
        self._signers = signers
        self._access = hmac.digest(platform.key, _ACCESS, sha256)
        self._traffic = hmac.digest(platform.key, _TRAFFIC, sha256)
        self._known: OrderedDict[str, tuple[float, Actor]] = OrderedDict()

    def access(self, sandbox_id: str) -> str:
        """Return the token for processes and files of a sandbox."""
        return _token(self._access, sandbox_id)

    def traffic(self, sandbox_id: str) -> str:
        """Return the token for the ports of a sandbox."""
        return _token(self._traffic, sandbox_id)

    async def enter(self, sandbox_id: str, secret: str) -> Admission:
        """Return the owner of a sandbox, for a client that has its token.

        Raises:
            NotFoundError: there is no such sandbox.
            InvalidTokenError: it is another token, or the owner has left the organization.
        """
        if not self.is_access(sandbox_id, secret):
            raise InvalidTokenError("cannot accept the access token: it is not this sandbox's")
        return Admission(await self.owner(sandbox_id), sandbox_id)

    def is_access(self, sandbox_id: str, secret: str) -> bool:
        """Tell whether a secret is the token for processes and files of a sandbox."""
        return hmac.compare_digest(secret.encode(), self.access(sandbox_id).encode())

    def is_traffic(self, sandbox_id: str, secret: str) -> bool:
        """Tell whether a secret is the token for the ports of a sandbox."""
        return hmac.compare_digest(secret.encode(), self.traffic(sandbox_id).encode())

    async def owner(self, sandbox_id: str) -> Actor:
        """Return the owner of a sandbox, with the right to use it, as of some seconds ago.

        Raises:
            NotFoundError: there is no such sandbox.
            InvalidTokenError: the owner has left the organization.
        """
        at, actor = self._known.get(sandbox_id, (0.0, None))
        now = self._clock.monotonic()
        if actor is not None and 0 <= now - at < _KNOWN_S:
            return actor
        sandbox = None
        if is_sandbox_id(sandbox_id):
            async with self._store.glance() as tx:
                sandbox = await tx.sandboxes.find(sandbox_id)
        if sandbox is None or sandbox.status is Status.DESTROYED:
            raise NotFoundError(f"cannot find the sandbox {sandbox_id[:80]!r}")
        actor = await self._signers.actor(sandbox.org_id, f"user:{sandbox.owner_user_id}", _SCOPE)
        if actor is None:
            raise InvalidTokenError("cannot accept the access token: its owner has left")
        actor = replace(actor, scopes=actor.scopes | {_READ_SCOPE})
        self._known[sandbox_id] = (now, actor)
        while len(self._known) > _KNOWN_MAX:
            self._known.popitem(last=False)
        return actor


def _token(key: bytes, sandbox_id: str) -> str:
    digest = hmac.digest(key, sandbox_id.encode(), sha256)
    return urlsafe_b64encode(digest).rstrip(b"=").decode()
