"""The first organization of an installation, and its operator's key."""

from dataclasses import replace
from datetime import datetime

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.store import Store, Transaction, Turn
from sandyard.server.core.errors import NotFoundError
from sandyard.server.core.ids import (
    API_KEY_PREFIX_LENGTH,
    digest_of_key,
    new_api_key,
    new_uuid,
)
from sandyard.server.core.records import Activity, ApiKey, Organization, User
from sandyard.server.service.lines import line
from sandyard.server.service.money.credits import SIGN_UP, credit
from sandyard.server.service.people.organizations import SignUp, found_organization, join

BOOTSTRAP_KEY = "bootstrap"


async def ensure_first_organization(
    store: Store, clock: Clock, sign_up: SignUp
) -> tuple[Organization, User]:
    """Return the first organization and its admin, who is the operator.

    Both are created at the first start. Data that an older version did not store is added.
    """
    async with store.read() as tx:
        first = await tx.organizations.first()
        is_whole = first is not None and (
            sign_up.grant_cents == 0
            or await tx.credits.find(first.id, "grant", SIGN_UP) is not None
        )
        without = await tx.users.without_workspace()
    if first is None or not is_whole:
        async with store.write(Turn.ALONE) as tx:
            first = await tx.organizations.first() or await _found(tx, sign_up, clock.now())
            if sign_up.grant_cents > 0:
                await _grant_once(tx, first, sign_up, clock.now())
    for user, member in without:
        async with store.write(member.org_id) as tx:
            if await tx.workspaces.personal(member.org_id, user.id) is None:
                await join(tx, member.org_id, user, member.role, at=member.created_at)
    async with store.read() as tx:
        members = await tx.users.members(first.id)
    admins = [user for user, member in members if member.role == "admin"]
    if not admins:
        raise NotFoundError(
            f"cannot find an admin of {first.slug}: make one with `sandyard admin user "
            f"add {first.slug} EMAIL --role admin`"
        )
    return first, admins[0]


async def _found(tx: Transaction, sign_up: SignUp, now: datetime) -> Organization:
    user = User(new_uuid(), "admin@localhost", "Admin", now, is_operator=True)
    await tx.users.add(user)
    founded = await found_organization(tx, "Default", user, sign_up=sign_up, at=now, slug="default")
    return founded.organization


async def new_bootstrap_key(store: Store, clock: Clock, sign_up: SignUp, *, replaces: bool) -> str:
    """Return a new key of the first organization's admin; it may replace earlier ones."""
    organization, user = await ensure_first_organization(store, clock, sign_up)
    key = new_api_key()
    now = clock.now()
    async with store.write(Turn.ALONE) as tx:
        if replaces:
            for old in await tx.keys.page(organization.id, owner_user_id=user.id, limit=10_000):
                if old.name == BOOTSTRAP_KEY:
                    await tx.keys.replace(replace(old, revoked_at=now))
                    await tx.activity.append(_line("api_key.revoked", "API key revoked", old, now))
        made = ApiKey(
            id=new_uuid(),
            org_id=organization.id,
            owner_user_id=user.id,
            name=BOOTSTRAP_KEY,
            prefix=key[:API_KEY_PREFIX_LENGTH],
            digest=digest_of_key(key),
            scopes=("*",),
            created_at=now,
        )
        await tx.keys.add(made)
        await tx.activity.append(_line("api_key.created", "API key made", made, now))
    return key


def _line(event: str, title: str, key: ApiKey, now: datetime) -> Activity:
    return line(
        event, title, org_id=key.org_id, actor=None, resource_id=key.id, at=now, summary=key.name
    )


async def is_valid_key(store: Store, key: str) -> bool:
    """Tell whether a key would be accepted now."""
    async with store.read() as tx:
        holder = await tx.keys.holder(digest_of_key(key))
    return holder is not None and holder.key.revoked_at is None


async def _grant_once(
    tx: Transaction, organization: Organization, sign_up: SignUp, now: datetime
) -> None:
    if await tx.credits.find(organization.id, "grant", SIGN_UP) is None:
        await credit(
            tx,
            organization.id,
            "grant",
            sign_up.grant_cents,
            description="Sign-up credits",
            at=now,
            reference_id=SIGN_UP,
        )
