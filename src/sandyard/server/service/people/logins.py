"""SSH logins: by one of a sandbox's keys, or its password.

A sandbox is named by its id, by `name.slug` with its organization's slug, or by its name if that is
unambiguous: with an API key, which belongs to one organization, or if there is only one. A public
key does not decide, since anyone may add a stranger's key to a sandbox. An API key with access is
also a password. Refusals reveal nothing, in content or timing: for a sandbox that does not exist,
as much is looked up and a password is checked as well.
"""

from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.errors import (
    NotFoundError,
    RateLimitedError,
    SandyardError,
    UnauthenticatedError,
)
from sandyard.server.core.ids import is_sandbox_id
from sandyard.server.core.records import Sandbox
from sandyard.server.core.sshkeys import fingerprint_of
from sandyard.server.core.states import HIDDEN, Status
from sandyard.server.service.actor import Actor
from sandyard.server.service.lines import line
from sandyard.server.service.people.access import Access
from sandyard.server.service.people.rates import Rates
from sandyard.server.service.sandboxes.register import Register

_SCOPE = "sandbox:write"
_ALIKE_MAX = 500
_USER_MAX = 256
_NAME_MAX = 64
_NOBODY = "00000000-0000-0000-0000-000000000000"
UNCLEAR = (
    "a name alone does not say whose sandbox is meant; log in as <name>.<organization's slug>, or "
    "with the sandbox's id"
)
"""The message for a login with a bare name that several organizations may use."""


@dataclass(frozen=True)
class Login:
    """A successful login, and its credential.

    Without a sandbox, the key opens one of that name, and the name is ambiguous.
    """

    actor: Actor
    sandbox_id: str | None
    method: str
    public_key: str | None = None
    key_id: str | None = None
    token: str | None = field(default=None, repr=False)
    password_hash: str | None = field(default=None, repr=False)

    @property
    def fingerprint(self) -> str | None:
        """The fingerprint of the public key."""
        return None if self.public_key is None else fingerprint_of(self.public_key)


class Logins:
    """Checks logins."""

    def __init__(
        self,
        *,
        store: Store,
        register: Register,
        access: Access,
        rates: Rates,
        clock: Clock,
        check_password: Callable[[str, str | None], Awaitable[bool]],
    ) -> None:
        self._store = store
        self._register = register
        self._access = access
        self._rates = rates
        self._clock = clock
        self._check_password = check_password

    async def by_key(self, user: str, public_key: str) -> Login | None:
        """Return the login for a public key, `type base64`, or None if it opens nothing.

        The caller verifies that the client has the private key.
        """
        found, is_clear = await self._meant(user)
        valid = await self._owners({one.org_id for one in found} or {_NOBODY})
        for sandbox in found:
            key_id = _opened_by(sandbox, public_key, valid)
            if key_id or (key_id is not None and await self._is_members(sandbox)):
                return Login(
                    await self._actor(sandbox, valid.get(key_id, sandbox.owner_user_id)),
                    sandbox.id if is_clear else None,
                    "key",
                    public_key=public_key,
                    key_id=key_id or None,
                )
        return None

    async def by_password(self, user: str, password: str, address: str) -> Login | None:
        """Return the login for a password, or None if it opens nothing, or if the address had too
        many failures: then it is not checked. API keys are always checked, since they cannot be
        guessed."""
        if password.startswith("rt_"):
            login = await self._by_api_key(user, password)
            if login is None:
                self._count_failure(address)
            return login
        if not self._rates.try_guess(address):
            return None
        login = await self._by_root_password(user, password.replace("\0", "\ufffd"))
        if login is not None:
            self._rates.guessed_right(address)
        return login

    async def _by_root_password(self, user: str, password: str) -> Login | None:
        """Return the login for a sandbox's root password. A password is checked in any case."""
        found, is_clear = await self._meant(user)
        sandbox = found[0] if found and is_clear else None
        hashed = None if sandbox is None else sandbox.root_password_hash
        if not await self._check_password(password, hashed) or sandbox is None:
            return None
        if not await self._is_members(sandbox):
            return None
        actor = await self._actor(sandbox, sandbox.owner_user_id)
        return Login(actor, sandbox.id, "password", password_hash=hashed)

    async def hint(self, user: str) -> str | None:
        """Return a hint for a refused client, by the form of its user name only."""
        if is_sandbox_id(user) or "." in user:
            return None
        async with self._store.read() as tx:
            return UNCLEAR if await tx.organizations.are_several() else None

    async def still(self, login: Login) -> Actor:
        """Return the actor of a login with its current rights.

        Raises:
            UnauthenticatedError, PermissionDeniedError: the login is no longer authorized: a key
                was deleted, a password changed, an API key revoked.
            NotFoundError: the sandbox was deleted, or the actor lost access.
        """
        assert login.sandbox_id is not None
        if login.token is not None:
            actor = await self._access.authenticate(login.token)
            actor.require(_SCOPE)
            await self._register.get(actor, login.sandbox_id)
            return actor
        async with self._store.read() as tx:
            sandbox = await tx.sandboxes.find(login.sandbox_id)
        if sandbox is None or not _is_live(sandbox):
            raise NotFoundError("the sandbox was deleted")
        if login.public_key is not None:
            valid = await self._owners({sandbox.org_id})
            key_id = _opened_by(sandbox, login.public_key, valid)
            if key_id is None:
                raise UnauthenticatedError("the SSH key was deleted; log in with another")
            if key_id:
                return login.actor
        elif sandbox.root_password_hash != login.password_hash:
            raise UnauthenticatedError("the password was changed; log in with the new one")
        if not await self._is_members(sandbox):
            raise UnauthenticatedError("the sandbox's owner is no longer a member")
        return login.actor

    async def _is_members(self, sandbox: Sandbox) -> bool:
        """Tell whether a sandbox's owner is still a member. Keys and passwords of the sandbox
        itself end with the membership."""
        async with self._store.read() as tx:
            return await tx.users.member(sandbox.org_id, sandbox.owner_user_id) is not None

    def _count_failure(self, address: str) -> None:
        try:
            self._rates.failed(address)
        except RateLimitedError:
            return

    async def note(self, login: Login, sandbox_id: str, address: str) -> None:
        """Record a login."""
        now, facts = self._clock.now(), {"method": login.method, "address": address}
        if login.fingerprint is not None:
            facts["fingerprint"] = login.fingerprint
        async with self._store.write(Turn.SHARED) as tx:
            if login.key_id is not None:
                await tx.ssh_keys.touch(login.key_id, now)
            await tx.activity.append(
                line(
                    "sandbox.ssh.connected",
                    "Logged in by SSH",
                    org_id=login.actor.org_id,
                    actor=login.actor,
                    resource_id=sandbox_id,
                    at=now,
                    sandbox_id=sandbox_id,
                    attributes=facts,
                )
            )

    async def _by_api_key(self, user: str, token: str) -> Login | None:
        try:
            actor = await self._access.authenticate(token)
            actor.require(_SCOPE)
            sandbox = await self._of_own(actor, user)
        except SandyardError:
            return None
        return Login(actor, sandbox.id, "api_key", token=token) if _is_live(sandbox) else None

    async def _of_own(self, actor: Actor, user: str) -> Sandbox:
        try:
            return await self._register.get(actor, user[:_USER_MAX])
        except NotFoundError:
            name, dot, slug = user.rpartition(".")
            async with self._store.read() as tx:
                organization = await tx.organizations.find(actor.org_id)
            if not dot or organization is None or organization.slug != slug:
                raise
            return await self._register.get(actor, name[:_NAME_MAX])

    async def _meant(self, user: str) -> tuple[list[Sandbox], bool]:
        """Return the sandbox that a user name refers to, if any; if it is ambiguous, all candidates
        and False."""
        text, is_clear = user[:_USER_MAX].replace("\0", "\ufffd"), True
        name, dot, slug = text.rpartition(".")
        async with self._store.read() as tx:
            if is_sandbox_id(text):
                one = await tx.sandboxes.find(text)
                found = [] if one is None else [one]
            else:
                is_clear = not await tx.organizations.are_several()
                found = await tx.sandboxes.named(text[:_NAME_MAX], limit=_ALIKE_MAX)
                organization = await tx.organizations.find_slug(slug) if dot else None
                if organization is not None and not (found and is_clear):
                    one = await tx.sandboxes.find_named(organization.id, name[:_NAME_MAX])
                    found, is_clear = [] if one is None else [one], True
        return [one for one in found if _is_live(one)], is_clear

    async def _owners(self, org_ids: set[str]) -> Mapping[str, str]:
        """Return the owners of the organizations' current keys, by the keys' ids."""
        async with self._store.read() as tx:
            return {
                key.id: key.owner_user_id
                for org_id in org_ids
                for key in await tx.ssh_keys.every(org_id)
            }

    async def _actor(self, sandbox: Sandbox, user_id: str) -> Actor:
        async with self._store.read() as tx:
            organization = await tx.organizations.find(sandbox.org_id)
        return Actor(
            org_id=sandbox.org_id,
            user_id=user_id,
            role="member",
            # The second for sandboxes of others whose key this is; it gets to no other than the
            # one of the login.
            scopes=frozenset({_SCOPE, "admin:resources"}),
            kind="user",
            is_test=sandbox.is_test,
            plan="enterprise" if organization is None else organization.plan,
            limits={} if organization is None else organization.limits,
        )


def _is_live(sandbox: Sandbox) -> bool:
    return sandbox.status not in HIDDEN | {Status.DESTROYING}


def _opened_by(sandbox: Sandbox, public_key: str, valid: Collection[str]) -> str | None:
    """Return the id of the key of a sandbox that a public key matches, one of the organization's
    `valid` keys, or an empty string for a literal one; None if none matches."""
    wanted = public_key.split(" ")[:2]
    for text, key_id in sandbox.keys:
        if text.split(" ")[:2] == wanted and (not key_id or key_id in valid):
            return key_id
    return None
