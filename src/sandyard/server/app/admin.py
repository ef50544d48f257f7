"""Opens the store for operator commands, with or without a running server."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from sandyard.server.app.database import is_sqlite, migrate, open_database, schema_of
from sandyard.server.app.settings import Settings
from sandyard.server.app.wiring import plans_of, sign_up_of
from sandyard.server.core.errors import NotFoundError
from sandyard.server.core.money import show
from sandyard.server.links.local import SystemClock
from sandyard.server.service.people.administration import Administration
from sandyard.server.service.people.bootstrap import (
    ensure_first_organization,
    is_valid_key,
    new_bootstrap_key,
)


@asynccontextmanager
async def administration(settings: Settings) -> AsyncIterator[Administration]:
    """Open an installation's store for its operator."""
    clock, sign_up = SystemClock(), sign_up_of(settings)
    async with open_database(settings) as store:
        with suppress(NotFoundError):  # there is no admin yet, and this command makes one
            await ensure_first_organization(store, clock, sign_up)
        yield Administration(store=store, clock=clock, sign_up=sign_up, plans=plans_of(settings))


async def ensure_key(settings: Settings, known: str | None) -> str:
    """Return a valid API key: the configured one if it works, else a new one.

    A database on this host is migrated first, if no server has it.
    """
    if is_sqlite(settings) and (await schema_of(settings)).is_behind:
        await migrate(settings)
    async with open_database(settings) as store:
        if known and await is_valid_key(store, known):
            return known
        # A key of another installation says that this one's may still be in use somewhere.
        return await new_bootstrap_key(
            store, SystemClock(), sign_up_of(settings), replaces=known is None
        )


__all__ = ["administration", "ensure_key", "show"]
