"""The first organization of an installation, and the key that its operator starts with."""

from sandyard.server.core.contracts import Clock, Store
from sandyard.server.core.ids import (
    API_KEY_PREFIX_LENGTH,
    digest_of_key,
    new_api_key,
    new_uuid,
)
from sandyard.server.core.records import ApiKey, Organization, Project, User

BOOTSTRAP_KEY = "bootstrap"


async def ensure_first_organization(store: Store, clock: Clock) -> tuple[Organization, User]:
    """Return the first organization and its admin, making both the first time."""
    now = clock.now()
    async with store.write() as tx:
        found = await tx.accounts.first_organization()
        if found is not None:
            return found
        organization = Organization(new_uuid(), "Default", "default", now)
        user = User(new_uuid(), "admin@localhost", "Admin", now)
        project = Project(new_uuid(), organization.id, "Default", "default", True, now)
        await tx.accounts.add_organization(organization, project)
        await tx.accounts.add_member(user, org_id=organization.id, role="admin")
        return organization, user


async def new_bootstrap_key(store: Store, clock: Clock, *, replaces: bool) -> str:
    """Return a fresh key of the first organization's admin; it may replace those before."""
    organization, user = await ensure_first_organization(store, clock)
    key = new_api_key()
    now = clock.now()
    async with store.write() as tx:
        if replaces:
            await tx.accounts.revoke_keys(organization.id, name=BOOTSTRAP_KEY, at=now)
        await tx.accounts.add_key(
            ApiKey(
                id=new_uuid(),
                org_id=organization.id,
                owner_user_id=user.id,
                name=BOOTSTRAP_KEY,
                prefix=key[:API_KEY_PREFIX_LENGTH],
                digest=digest_of_key(key),
                scopes=("*",),
                created_at=now,
            )
        )
    return key


async def is_valid_key(store: Store, key: str) -> bool:
    """Tell whether a key would be accepted now."""
    async with store.read() as tx:
        holder = await tx.accounts.find_key(digest_of_key(key))
    return holder is not None and holder.key.revoked_at is None
