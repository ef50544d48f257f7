"""The network rules of sandboxes, validated, and the credentials that go with them to a node."""

from collections.abc import Callable
from dataclasses import replace
from datetime import datetime

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Store
from sandyard.server.core.egress import (
    FILLED_MAX,
    Credentials,
    Header,
    Policy,
    checked,
    covers,
    filled,
    secrets_in,
)
from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.ids import new_secret
from sandyard.server.core.records import Secret
from sandyard.server.service.actor import Actor

NewAuthority = Callable[[str, datetime], tuple[str, str, str]]
"""Returns a new authority of a name: its certificate and key (PEM), and its name's hash."""
_STAMP = 16
_SIZE_MAX = 256 * 1024


class Networks:
    """Reads what rules need from the store."""

    def __init__(self, store: Store, clock: Clock, new_authority: NewAuthority) -> None:
        self._store = store
        self._clock = clock
        self._new_authority = new_authority

    async def checked(self, actor: Actor, policy: Policy) -> Policy:
        """Return rules in their plain form, and stamped; see `core.egress.checked`.

        Raises:
            InvalidArgumentError: a rule is invalid, or one of its secrets does not exist or is not
                for that host; `facts` name the field.
            PermissionDeniedError: they name secrets, and the actor may use none.
        """
        policy = checked(policy)
        check_use(actor, policy)
        if names_in(policy):
            known = await self._secrets(actor.org_id)
            values = {one.name: one.value for one in known.values()}
            size = 0
            for injection in policy.inject:
                for text in injection.headers.values():
                    for name in secrets_in(text):
                        _check_use(known.get(name), name, injection.host)
                    made = filled(text, values)
                    size += len(made or "")
                    if made is None or size > _SIZE_MAX:
                        raise InvalidArgumentError(
                            "cannot use {field}: with its secrets, a header becomes longer than "
                            f"{FILLED_MAX} characters, or all of them than {_SIZE_MAX}",
                            field="network.inject",
                        )
        return stamped(policy)

    async def credentials_of(self, org_id: str, policy: Policy) -> Credentials | None:
        """Return what a node needs beside rules, as it is now; nothing if they end no TLS."""
        if not policy.ends_tls:
            return None
        secrets = await self._secrets(org_id) if names_in(policy) else {}
        certificate, key, name_hash = await self._authority(org_id)
        headers: list[Header] = []
        size = 0
        for injection in policy.inject:
            values = {
                one.name: one.value
                for one in secrets.values()
                if any(covers(host, injection.host) for host in one.hosts)
            }
            for name, text in injection.headers.items():
                made = filled(text, values)
                size += len(made or "")
                # A secret may have become longer since; a node takes only so much.
                fits = made if size <= _SIZE_MAX else None
                headers.append(Header(injection.host, name, fits, secrets_in(text)))
        return Credentials(policy.stamp, tuple(headers), certificate, key, name_hash)

    async def _secrets(self, org_id: str) -> dict[str, Secret]:
        async with self._store.read() as tx:
            return {one.name: one for one in await tx.org_secrets.of(org_id)}

    async def _authority(self, org_id: str) -> tuple[str, str, str]:
        """Return the organization's authority; it is made when it is first needed."""
        row = f"network authority {org_id}"
        async with self._store.read() as tx:
            found = await tx.secrets.find(row)
        if found is None:
            async with self._store.write(org_id) as tx:
                found = await tx.secrets.find(row)
                if found is None:
                    name = new_secret()[:_STAMP]
                    certificate, key, name_hash = self._new_authority(name, self._clock.now())
                    found = {"certificate": certificate, "key": key, "hash": name_hash}
                    await tx.secrets.add(row, found)
        return found["certificate"], found["key"], found["hash"]


def check_use(actor: Actor, policy: Policy) -> None:
    """Return if an actor may use the secrets that rules name.

    Raises:
        PermissionDeniedError: they name some, and the actor may use none.
    """
    if names_in(policy):
        actor.require("secret:use")


def names_in(policy: Policy) -> frozenset[str]:
    """Return the names of the secrets in rules."""
    return frozenset(
        name
        for injection in policy.inject
        for text in injection.headers.values()
        for name in secrets_in(text)
    )


def stamped(policy: Policy) -> Policy:
    """Return rules that end TLS with a new stamp: what is in force is then put in force again."""
    return replace(policy, stamp=new_secret()[:_STAMP] if policy.ends_tls else "")


def _check_use(secret: Secret | None, name: str, host: str) -> None:
    if secret is None:
        raise InvalidArgumentError(
            f"cannot use {{field}}: there is no secret {name}; `sandyard secret set` adds one",
            field="network.inject",
        )
    if not any(covers(one, host) for one in secret.hosts):
        raise InvalidArgumentError(
            f"cannot use {{field}}: the secret {name} is for {', '.join(secret.hosts)}, and not "
            f"for {host}",
            field="network.inject",
        )
