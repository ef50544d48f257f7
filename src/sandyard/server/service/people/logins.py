"""Who may log in to a sandbox by SSH: whoever has one of its keys, or knows its password.

A sandbox is named by its id, or by its name. Names are an organization's own: of several sandboxes
of one name a key tells which is meant. An API key that may use a sandbox is a password of it, too.
Whoever may not log in learns nothing from how or how fast that is said: of a sandbox that is not
there as much is looked up, and its password checked, as of one that is.
"""

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Store, Turn
from sandyard.server.core.errors import RateLimitedError, SandyardError
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
_PASSWORDS = 3
_NAME_MAX = 64
_NOBODY = "00000000-0000-0000-0000-000000000000"


@dataclass(frozen=True)
class Login:
    """Somebody who may log in to a sandbox, and what they showed for it.

    Without a sandbox their key opens several of that name, and it takes an id to tell which.
    """

    actor: Actor
    sandbox_id: str | None
    method: str
    fingerprint: str | None = None
    key_id: str | None = None
    token: str | None = field(default=None, repr=False)


class Logins:
    """See the module."""

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
        """Return the login of whoever has a key, `type base64`; None if it opens nothing.

        That they have it indeed the caller finds out.
        """
        found = await self._named(user)
        valid = await self._valid_ids({one.org_id for one in found} or {_NOBODY})
        wanted = public_key.split(" ")[:2]
        opened = []
        for sandbox in found:
            ids = [*sandbox.ssh_key_ids, *("" for _ in sandbox.authorized_keys)]
            for text, key_id in zip(sandbox.authorized_keys, ids, strict=False):
                is_valid = not key_id or key_id in valid
                if is_valid and text.split(" ")[:2] == wanted:
                    opened.append((sandbox, key_id))
                    break
        if not opened:
            return None
        sandbox, key_id = opened[0]
        actor = await self._actor(sandbox, valid.get(key_id, sandbox.owner_user_id))
        return Login(
            actor,
            sandbox.id if len(opened) == 1 else None,
            "key",
            fingerprint_of(public_key),
            key_id or None,
        )

    async def by_password(self, user: str, password: str, address: str) -> Login | None:
        """Return the login of whoever knows a password; None if it opens nothing, or if too many
        that opened nothing came from an address: then it is not even tried. An API key is: it is
        not to be guessed."""
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
        """Return the login of whoever knows a sandbox's password.

        As many are checked whatever is there: the first of a name, and else none at all. So one's
        own opens whether or not somebody else has one of that name.
        """
        found: list[Sandbox | None] = [
            one for one in await self._named(user) if one.root_password_hash
        ][:_PASSWORDS]  # type: ignore[assignment]
        count = 1 if is_sandbox_id(user) else _PASSWORDS
        opened = []
        for sandbox in [*found, *[None] * count][:count]:
            hashed = None if sandbox is None else sandbox.root_password_hash
            if await self._check_password(password, hashed) and sandbox is not None:
                opened.append(sandbox)
        if not opened:
            return None
        actor = await self._actor(opened[0], opened[0].owner_user_id)
        return Login(actor, opened[0].id if len(opened) == 1 else None, "password")

    async def still(self, login: Login) -> Actor:
        """Return the actor of a login as it is now: an API key may be revoked since.

        Raises:
            InvalidTokenError, TokenExpiredError, PermissionDeniedError: it opens nothing any more.
        """
        if login.token is None:
            return login.actor
        actor = await self._access.authenticate(login.token)
        actor.require(_SCOPE)
        return actor

    def _count_failure(self, address: str) -> None:
        try:
            self._rates.failed(address)
        except RateLimitedError:
            return

    async def note(self, login: Login, sandbox_id: str, address: str) -> None:
        """Note that somebody logged in."""
        now, facts = self._clock.now(), {"method": login.method, "address": address}
        if login.fingerprint is not None:
            facts["fingerprint"] = login.fingerprint
        async with self._store.write(Turn.BESIDE) as tx:
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

    async def is_there(self, login: Login) -> bool:
        """Tell whether the sandbox of a login is still there."""
        if login.sandbox_id is None:
            return False
        async with self._store.read() as tx:
            sandbox = await tx.sandboxes.find(login.sandbox_id)
        return sandbox is not None and _is_live(sandbox)

    async def _by_api_key(self, user: str, token: str) -> Login | None:
        try:
            actor = await self._access.authenticate(token)
            actor.require(_SCOPE)
            sandbox = await self._register.get(actor, user[:_NAME_MAX])
        except SandyardError:
            return None
        return Login(actor, sandbox.id, "api_key", token=token) if _is_live(sandbox) else None

    async def _named(self, user: str) -> list[Sandbox]:
        async with self._store.read() as tx:
            if is_sandbox_id(user):
                sandbox = await tx.sandboxes.find(user)
                found = [] if sandbox is None else [sandbox]
            else:
                text = user if "\0" not in user else ""
                found = await tx.sandboxes.named(text[:_NAME_MAX], limit=_ALIKE_MAX)
        return [one for one in found if _is_live(one)]

    async def _valid_ids(self, org_ids: set[str]) -> Mapping[str, str]:
        """Return the owners of the keys that organizations have now, by the keys' ids."""
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
