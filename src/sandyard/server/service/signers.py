"""The issuers of tickets and signatures, with their current rights.

A ticket or signature grants what its issuer may do at the time of use. It ends when the issuer's
key is revoked, expires or is rotated.
"""

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Store
from sandyard.server.core.ids import generation_of
from sandyard.server.core.scopes import ADMINS_ONLY, is_covered
from sandyard.server.service.actor import Actor

_USER = "user"
_BY_SECRET = "."


def signer_of(actor: Actor) -> str:
    """Return an actor's identity, as stored in tickets and signatures."""
    if actor.key_id is None:
        return f"{_USER}:{actor.user_id}"
    return f"{actor.key_id}{_BY_SECRET}{actor.key_generation}"


class Signers:
    """Looks issuers up."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def actor(self, org_id: str, by: str, scope: str) -> Actor | None:
        """Return an actor with one scope of the issuer's, or None if the issuer has lost it.

        The actor has only that scope, and an admin's view of other members' resources.
        """
        kind, _, user_id = by.partition(":")
        if kind == _USER:
            return await self._member(org_id, user_id, scope)
        key_id, _, generation = by.partition(_BY_SECRET)
        return await self._holder(org_id, key_id, generation, scope)

    async def _holder(self, org_id: str, key_id: str, generation: str, scope: str) -> Actor | None:
        async with self._store.read() as tx:
            key = await tx.keys.find(org_id, key_id)
            holder = None if key is None else await tx.keys.holder(key.digest)
        if holder is None:
            return None
        key = holder.key
        is_over = key.expires_at is not None and key.expires_at <= self._clock.now()
        if key.revoked_at is not None or is_over or generation_of(key.digest) != generation:
            return None
        if not is_covered(scope, key.scopes):
            return None
        return Actor(
            org_id=org_id,
            user_id=key.owner_user_id,
            role=holder.role,
            scopes=frozenset({scope}) | (ADMINS_ONLY & frozenset(key.scopes)),
            kind="api_key",
            key_id=key.id,
            key_generation=generation,
            is_test=key.is_test,
            plan=holder.plan,
            limits=holder.limits,
        )

    async def _member(self, org_id: str, user_id: str, scope: str) -> Actor | None:
        async with self._store.read() as tx:
            member = await tx.users.member(org_id, user_id)
            organization = await tx.organizations.find(org_id)
        if member is None or organization is None:
            return None
        return Actor(
            org_id=org_id,
            user_id=user_id,
            role=member.role,
            scopes=frozenset({scope}),
            kind="user",
            plan=organization.plan,
            limits=organization.limits,
        )
