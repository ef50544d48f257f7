"""SSH keys: public keys that are accepted by an organization's sandboxes."""

from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime
from typing import Protocol

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Store, Transaction
from sandyard.server.core.errors import ConflictError, InvalidArgumentError, NotFoundError
from sandyard.server.core.ids import checked_text, new_uuid
from sandyard.server.core.records import SshKey
from sandyard.server.core.sshkeys import fingerprint_of, is_literal_key
from sandyard.server.service.actor import Actor
from sandyard.server.service.lines import line
from sandyard.server.service.people.organizations import check_title
from sandyard.server.service.repeats import Repeatable, Repeats

KEYS_MAX = 100
"""How many keys an organization has, and a sandbox takes, at most."""


async def withdraw(tx: Transaction, key: SshKey, *, at: datetime) -> None:
    """Remove a key from an organization and from its sandboxes. `service.reconcile.revoking`
    removes it from their files."""
    await tx.ssh_keys.remove(key.org_id, key.id)
    await tx.revoked_keys.clear()
    for sandbox in await tx.sandboxes.with_ssh_key(key.org_id, key.id):
        kept = [(line, key_id) for line, key_id in sandbox.keys if key_id != key.id]
        await tx.sandboxes.replace(
            replace(
                sandbox,
                authorized_keys=tuple(line for line, _ in kept),
                ssh_key_ids=tuple(key_id for _, key_id in kept),
                updated_at=at,
            )
        )
        if _blob(key.public_key) not in {_blob(line) for line, _ in kept}:
            await tx.revoked_keys.add(sandbox.id, key)


def _blob(public_key: str) -> str:
    return public_key.split(" ")[1]


class CheckPublicKey(Protocol):
    """Validates public keys. See links.public_keys.checked_public_key."""

    def __call__(self, text: str, *, field: str) -> str:
        """Return a public key as one line."""
        ...


class SshKeys:
    """The operations. All members see an organization's keys; members delete only their own."""

    def __init__(
        self, store: Store, repeats: Repeats, clock: Clock, check_public_key: CheckPublicKey
    ) -> None:
        self._check = check_public_key
        self._store = store
        self._repeats = repeats
        self._clock = clock

    async def add(
        self, actor: Actor, name: str, public_key: str, *, request: Repeatable | None = None
    ) -> SshKey:
        """Add a public key.

        Raises:
            InvalidArgumentError: it is invalid, damaged or too weak.
            AlreadyExistsError: the organization has it already.
            ConflictError: there are too many.
        """
        actor.require("ssh-key:*")
        text = self._check(checked_text(public_key, field="public_key"), field="public_key")
        key = SshKey(
            id=new_uuid(),
            org_id=actor.org_id,
            owner_user_id=actor.user_id,
            name=check_title(name, field="name"),
            public_key=text,
            fingerprint=fingerprint_of(text),
            key_type=text.split(" ", 1)[0],
            created_at=self._clock.now(),
        )
        async with self._repeats.turn(actor, request), self._store.write(actor.org_id) as tx:
            ids = await self._repeats.made_before(tx, actor, request)
            if ids is not None:
                known = await tx.ssh_keys.find(actor.org_id, ids[0])
                if known is None:
                    raise NotFoundError("cannot find the SSH key that was added: it was deleted")
                return known
            if len(await tx.ssh_keys.every(actor.org_id)) >= KEYS_MAX:
                raise ConflictError(
                    f"cannot add another key: an organization has {KEYS_MAX} at most; delete some"
                )
            await tx.ssh_keys.add(key)
            await tx.activity.append(
                line(
                    "ssh_key.added",
                    "SSH key added",
                    org_id=actor.org_id,
                    actor=actor,
                    resource_id=key.id,
                    at=key.created_at,
                    summary=key.name,
                    attributes={"fingerprint": key.fingerprint},
                )
            )
            await self._repeats.note(tx, actor, request, (key.id,))
        return key

    async def every(self, actor: Actor) -> list[SshKey]:
        """Return the organization's keys, newest first."""
        actor.require("ssh-key:*")
        async with self._store.read() as tx:
            return await tx.ssh_keys.every(actor.org_id)

    async def delete(self, actor: Actor, key_id: str) -> None:
        """Delete a key. It opens no sandbox from now on; see `withdraw`.

        Raises:
            NotFoundError: it does not exist, or belongs to another organization or member.
        """
        actor.require("ssh-key:*")
        async with self._store.write(actor.org_id) as tx:
            key = await tx.ssh_keys.find(actor.org_id, key_id)
            if key is None or not (actor.sees_all or key.owner_user_id == actor.user_id):
                raise NotFoundError("cannot find the SSH key: check its id")
            await withdraw(tx, key, at=self._clock.now())
            await tx.activity.append(
                line(
                    "ssh_key.deleted",
                    "SSH key deleted",
                    org_id=actor.org_id,
                    actor=actor,
                    resource_id=key.id,
                    at=self._clock.now(),
                    summary=key.name,
                )
            )

    async def resolve(
        self, actor: Actor, wanted: Sequence[str] | None
    ) -> tuple[tuple[str, str], ...]:
        """Return the public keys for ids and literal keys, or all of the organization's for None.
        Each comes with its id, or an empty string if it was given literally.

        Raises:
            InvalidArgumentError: there is no such key, or one is invalid.
        """
        if wanted is not None and len(wanted) > KEYS_MAX:
            raise InvalidArgumentError(f"cannot take over {KEYS_MAX} SSH keys", field="ssh_keys")
        if wanted is not None and all(is_literal_key(one) for one in wanted):
            return tuple((self._check(one, field="ssh_keys"), "") for one in wanted)
        async with self._store.glance() as tx:
            known = {key.id: key.public_key for key in await tx.ssh_keys.every(actor.org_id)}
        if wanted is None:
            return tuple((line, key_id) for key_id, line in known.items())
        found = dict[str, str]()
        for one in wanted:
            checked_text(one, field="ssh_keys")
            if is_literal_key(one):
                found[self._check(one, field="ssh_keys")] = ""
            elif one in known:
                found.setdefault(known[one], one)
            else:
                raise InvalidArgumentError(
                    f"cannot use the SSH key {one[:80]!r}: no key of the organization has this id, "
                    "and it is not a public key itself",
                    field="ssh_keys",
                )
        return tuple(found.items())
