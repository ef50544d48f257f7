"""API keys: created, shown once, changed, rotated, revoked."""

import re
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timedelta

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Store, Transaction
from sandyard.server.core.errors import (
    ConflictError,
    InvalidArgumentError,
    NotFoundError,
    PermissionDeniedError,
)
from sandyard.server.core.ids import (
    API_KEY_PREFIX_LENGTH,
    E2B_KEY,
    digest_of_key,
    is_uuid,
    new_api_key,
    new_uuid,
)
from sandyard.server.core.records import ApiKey
from sandyard.server.core.scopes import SCOPES
from sandyard.server.service.actor import Actor
from sandyard.server.service.lines import line
from sandyard.server.service.people.organizations import check_title

_FOR = re.compile(r"([1-9][0-9]{0,3})([dmy])")
_DAYS = {"d": 1, "m": 30, "y": 365}
_YEARS_MAX = 100
_KEYS_MAX = 1000


class ApiKeys:
    """The operations. Members have their own keys; admins see the organization's."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock

    async def create(
        self,
        actor: Actor,
        name: str,
        *,
        scopes: Sequence[str] = (),
        expires_in: str | None = None,
        is_test: bool = False,
        project_id: str | None = None,
        is_for_e2b: bool = False,
    ) -> tuple[ApiKey, str]:
        """Create a key for the actor and return it with its secret, which is not stored. One that
        `is_for_e2b` has a form that clients of the E2B API accept.

        Raises:
            InvalidArgumentError: a value is invalid; `facts` name the field.
            PermissionDeniedError: the actor lacks a requested scope.
            ConflictError: there are too many keys.
        """
        actor.require("org:write")
        now = self._clock.now()
        secret = new_api_key(is_test=is_test or actor.is_test, is_for_e2b=is_for_e2b)
        until = _expiry(expires_in, now)
        async with self._store.write(actor.org_id) as tx:
            actor = await self._as_now(tx, actor)
            wanted = _check_scopes(actor, scopes)
            until = await self._no_longer_than(tx, actor, until)
            await _check_project(tx, actor, project_id)
            there = await tx.keys.page(actor.org_id, owner_user_id=None, limit=_KEYS_MAX)
            if len(there) >= _KEYS_MAX:
                raise ConflictError(
                    f"cannot make another key: an organization has {_KEYS_MAX} at most; revoke some"
                )
            key = ApiKey(
                id=new_uuid(),
                org_id=actor.org_id,
                owner_user_id=actor.user_id,
                name=check_title(name, field="name"),
                prefix=secret[:API_KEY_PREFIX_LENGTH],
                digest=digest_of_key(secret),
                scopes=wanted,
                created_at=now,
                expires_at=until,
                is_test=is_test or actor.is_test,
                project_id=project_id,
            )
            await tx.keys.add(key)
            await self._note(tx, actor, key, "api_key.created", "API key made")
            return await _found(tx, actor, key.id), secret

    async def page(
        self, actor: Actor, *, limit: int, after: tuple[datetime, str] | None
    ) -> list[ApiKey]:
        """Return one page of the keys that the actor may see, without revoked ones."""
        actor.require("org:read")
        async with self._store.read() as tx:
            return await tx.keys.page(
                actor.org_id,
                owner_user_id=None if actor.sees_all else actor.user_id,
                limit=limit,
                after=after,
            )

    async def get(self, actor: Actor, key_id: str) -> ApiKey:
        """Return a key without its secret.

        Raises:
            NotFoundError: it does not exist, or belongs to another organization or member.
        """
        actor.require("org:read")
        async with self._store.read() as tx:
            return await _found(tx, actor, key_id)

    async def change(
        self,
        actor: Actor,
        key_id: str,
        *,
        name: str | None,
        scopes: Sequence[str] | None,
        project_id: str | None,
        expires_in: str | None,
    ) -> ApiKey:
        """Change a key's name, scopes, project or expiry, counted from now.

        Raises: see `create`, `get`; ConflictError: it is revoked.
        """
        actor.require("org:write")
        async with self._store.write(actor.org_id) as tx:
            actor = await self._as_now(tx, actor)
            key = _check_lives(await _found(tx, actor, key_id))
            _check_kind(actor, key)
            if name is not None:
                key = replace(key, name=check_title(name, field="name"))
            if scopes is not None:
                if not scopes:
                    raise InvalidArgumentError(
                        "cannot take all scopes from a key: name some, or revoke it",
                        field="scopes",
                    )
                key = replace(key, scopes=_check_scopes(actor, scopes))
            if project_id is not None:
                await _check_project(tx, actor, project_id)
                key = replace(key, project_id=project_id)
            if expires_in is not None:
                # A new key must not outlive the credential that creates it.
                until = _expiry(expires_in, self._clock.now())
                key = replace(key, expires_at=await self._no_longer_than(tx, actor, until))
            await tx.keys.replace(key)
            await self._note(tx, actor, key, "api_key.updated", "API key changed")
            return key

    async def rotate(self, actor: Actor, key_id: str) -> tuple[ApiKey, str]:
        """Replace the secret of one of the actor's own keys, and return it. The old secret stops
        working at once.

        Raises:
            PermissionDeniedError: it is another member's key, whose secret would let the actor act
                as them, or it has more rights than the caller's credential.
            ConflictError: it is revoked or has expired.
            For the rest see `get`.
        """
        actor.require("org:write")
        async with self._store.write(actor.org_id) as tx:
            actor = await self._as_now(tx, actor)
            key = _check_lives(await _found(tx, actor, key_id))
            if key.owner_user_id != actor.user_id:
                raise PermissionDeniedError(
                    "cannot rotate another member's key: its secret would let you act as them; "
                    "revoke it and have them make a new one"
                )
            if key.expires_at is not None and key.expires_at <= self._clock.now():
                raise ConflictError("cannot rotate this key: it has expired; make a new one")
            # The new secret has the key's rights and lifetime.
            _check_scopes(actor, key.scopes)
            _check_kind(actor, key)
            key = replace(key, expires_at=await self._no_longer_than(tx, actor, key.expires_at))
            secret = new_api_key(is_test=key.is_test, is_for_e2b=key.prefix.startswith(E2B_KEY))
            key = replace(key, prefix=secret[:API_KEY_PREFIX_LENGTH], digest=digest_of_key(secret))
            await tx.keys.replace(key)
            await self._note(tx, actor, key, "api_key.rotated", "API key rotated")
            return key, secret

    async def revoke(self, actor: Actor, key_id: str) -> ApiKey:
        """Revoke a key permanently, from the next request on. Repeating it is not an error.

        Raises: see `get`.
        """
        actor.require("org:write")
        async with self._store.write(actor.org_id) as tx:
            key = await _found(tx, actor, key_id)
            _check_kind(actor, key)
            if key.revoked_at is None:
                key = replace(key, revoked_at=self._clock.now())
                await tx.keys.replace(key)
                await self._note(tx, actor, key, "api_key.revoked", "API key revoked")
            return key

    async def _as_now(self, tx: Transaction, actor: Actor) -> Actor:
        """Return an actor with its current role: a request may have waited.

        Raises:
            PermissionDeniedError: the credential is no longer valid.
        """
        if actor.kind == "system":
            return actor
        member = await tx.users.member(actor.org_id, actor.user_id)
        own = None if actor.key_id is None else await tx.keys.find(actor.org_id, actor.key_id)
        is_revoked = actor.key_id is not None and (own is None or own.revoked_at is not None)
        if member is None or is_revoked:
            raise PermissionDeniedError("cannot do this: the credential was withdrawn meanwhile")
        return replace(actor, role=member.role)

    async def _no_longer_than(
        self, tx: Transaction, actor: Actor, until: datetime | None
    ) -> datetime | None:
        """Return an expiry that is not after that of the caller's own key."""
        if actor.key_id is None:
            return until
        own = await tx.keys.find(actor.org_id, actor.key_id)
        if own is None or own.expires_at is None:
            return until
        return own.expires_at if until is None else min(until, own.expires_at)

    async def _note(
        self, tx: Transaction, actor: Actor, key: ApiKey, event: str, title: str
    ) -> None:
        await tx.activity.append(
            line(
                event,
                title,
                org_id=actor.org_id,
                actor=actor,
                resource_id=key.id,
                at=self._clock.now(),
                summary=key.name,
                attributes={"scopes": list(key.scopes), "keyPrefix": key.prefix},
            )
        )


def status_of(key: ApiKey, now: datetime) -> str:
    """Return `active`, `expired` or `revoked`."""
    if key.revoked_at is not None:
        return "revoked"
    return "expired" if key.expires_at is not None and key.expires_at <= now else "active"


async def _found(tx: Transaction, actor: Actor, key_id: str) -> ApiKey:
    key = await tx.keys.find(actor.org_id, key_id)
    if key is None or not (actor.sees_all or key.owner_user_id == actor.user_id):
        raise NotFoundError("cannot find the API key: check its id")
    return key


def _check_lives(key: ApiKey) -> ApiKey:
    if key.revoked_at is not None:
        raise ConflictError("cannot change this key: it was revoked", status="revoked")
    return key


def _check_kind(actor: Actor, key: ApiKey) -> None:
    if actor.is_test and not key.is_test:
        raise PermissionDeniedError(
            "cannot change this key with a test key: what it makes is paid for"
        )


def _check_scopes(actor: Actor, scopes: Sequence[str]) -> tuple[str, ...]:
    wanted = tuple(dict.fromkeys(scopes)) or ("*",)
    for scope in wanted:
        if scope not in SCOPES:
            raise InvalidArgumentError(
                f"cannot grant the scope {scope[:80]!r}: known are {', '.join(sorted(SCOPES))}",
                field="scopes",
            )
        if not actor.may_grant(scope):
            raise PermissionDeniedError(
                f"cannot grant the scope {scope}: the credential given does not hold it; name "
                "scopes that it holds",
                required_scope=scope,
            )
    return wanted


async def _check_project(tx: Transaction, actor: Actor, project_id: str | None) -> None:
    if project_id is None:
        return
    if not is_uuid(project_id) or await tx.projects.find(actor.org_id, project_id) is None:
        raise InvalidArgumentError(
            "cannot use {field}: the organization has no such project", field="project_id"
        )


def _expiry(text: str | None, now: datetime) -> datetime | None:
    if text is None or text == "never":
        return None
    match = _FOR.fullmatch(text)
    days = int(match[1]) * _DAYS[match[2]] if match else 0
    if not 1 <= days <= _YEARS_MAX * 365:
        raise InvalidArgumentError(
            "cannot use {field}: it must be like 30d, 12m or 1y, or never", field="expires_in"
        )
    return now + timedelta(days=days)
