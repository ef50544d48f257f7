"""Requests with an idempotency key: repeated requests are executed once.

Within 24 hours the same key and request returns what the first one created, in its current state.
Only a keyed digest of the request is stored, so that its content (a password, an environment)
cannot be guessed.
"""

import asyncio
import hmac
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import timedelta
from hashlib import sha256
from weakref import WeakValueDictionary

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Transaction
from sandyard.server.core.errors import InvalidArgumentError, KeyReusedError, UnavailableError
from sandyard.server.core.records import KeyedRequest, RequestKey
from sandyard.server.core.refusals import REUSED
from sandyard.server.service.actor import Actor

_KEY = re.compile(r"[\x21-\x7e]{1,255}")
_KEPT = timedelta(hours=24)
_TURN_S = 60.0


@dataclass(frozen=True)
class Repeatable:
    """A creating request with an idempotency key."""

    route: str
    key: str
    body: bytes


class Repeats:
    """Stores such requests, in the transaction that executes them."""

    def __init__(self, clock: Clock, secret: bytes) -> None:
        self._clock = clock
        self._secret = secret
        # Each exists while it is held or waited for.
        self._turns: WeakValueDictionary[RequestKey, asyncio.Lock] = WeakValueDictionary()

    @asynccontextmanager
    async def turn(self, actor: Actor, request: Repeatable | None) -> AsyncIterator[None]:
        """Serialize requests with the same key, so that later ones find the first one's result.

        Raises:
            InvalidArgumentError: the key is invalid.
            UnavailableError: the first request takes too long.
        """
        self.check(request)
        if request is None:
            yield
            return
        turn = self._turns.setdefault(_key(actor, request), asyncio.Lock())
        try:
            async with self._clock.timeout(_TURN_S):
                await turn.acquire()
        except TimeoutError as error:
            raise UnavailableError(
                "cannot tell yet what this request makes: it was asked for before, and that is "
                "still under way; ask again in a while"
            ) from error
        try:
            yield
        finally:
            turn.release()

    def check(self, request: Repeatable | None) -> None:
        """Validate a key.

        Raises:
            InvalidArgumentError: it is not 1 to 255 printable ASCII characters.
        """
        if request is not None and not _KEY.fullmatch(request.key):
            raise InvalidArgumentError(
                "cannot use {field}: it must be 1 to 255 printable ASCII characters "
                "without spaces; a UUID is a good one",
                field="idempotency_key",
            )

    async def made_before(
        self, tx: Transaction, actor: Actor, request: Repeatable | None
    ) -> tuple[str, ...] | None:
        """Return the ids that this request created before, or None if it is the first.

        Raises:
            KeyReusedError: the key was used with another request.
        """
        if request is None:
            return None
        key, before = _key(actor, request), self._clock.now() - _KEPT
        await tx.requests.remove(key, before=before)  # a concurrent cleanup may have skipped it
        await tx.requests.forget(before=before)
        known = await tx.requests.find(key)
        if known is None:
            return None
        if not hmac.compare_digest(known.digest, self._digest(request)):
            raise KeyReusedError(REUSED, field="idempotency_key")
        return known.resource_ids

    async def note(
        self, tx: Transaction, actor: Actor, request: Repeatable | None, ids: tuple[str, ...]
    ) -> None:
        """Store what a request creates."""
        if request is not None:
            await tx.requests.add(
                _key(actor, request),
                KeyedRequest(self._digest(request), ids),
                at=self._clock.now(),
            )

    async def forget(
        self, tx: Transaction, actor: Actor, request: Repeatable | None, ids: tuple[str, ...]
    ) -> None:
        """Forget a request that failed, so that it can be retried. A newer entry with other `ids`
        stays."""
        if request is None:
            return
        known = await tx.requests.find(_key(actor, request))
        if known is not None and known.resource_ids == ids:
            await tx.requests.remove(_key(actor, request))

    def name_of(self, actor: Actor, request: Repeatable | None) -> str | None:
        """Return a name of a request for others to remember, None if it has no key. It differs
        between actors and routes, and discloses nothing.

        Raises:
            InvalidArgumentError: the key is invalid.
        """
        self.check(request)
        return None if request is None else self._of_key(b"name", actor, request)

    def secret_of(self, actor: Actor, request: Repeatable) -> str:
        """Return 256 bits as text that only this installation can compute, the same for each
        repetition of a request."""
        return self._of_key(b"secret\0" + request.body, actor, request)

    def _of_key(self, purpose: bytes, actor: Actor, request: Repeatable) -> str:
        key = _key(actor, request)
        signed = json.dumps([key.org_id, key.user_id, key.route, key.key]).encode()
        return hmac.new(self._secret, signed + b"\0" + purpose, sha256).hexdigest()

    def _digest(self, request: Repeatable) -> str:
        return hmac.new(self._secret, b"request\0" + request.body, sha256).hexdigest()


def _key(actor: Actor, request: Repeatable) -> RequestKey:
    return RequestKey(actor.org_id, actor.user_id, request.route, request.key)
