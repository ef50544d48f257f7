"""Opens the store for the operator's commands, whether or not a server runs."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from sandyard.server.app.installation import secret_key
from sandyard.server.app.settings import Settings
from sandyard.server.app.wiring import plans_of, sign_up_of
from sandyard.server.core.errors import NotFoundError
from sandyard.server.core.money import show
from sandyard.server.links.local import SystemClock
from sandyard.server.links.sql import open_store
from sandyard.server.service.people.administration import Administration
from sandyard.server.service.people.bootstrap import ensure_first_organization


@asynccontextmanager
async def administration(settings: Settings) -> AsyncIterator[Administration]:
    """Open an installation's store for its operator."""
    clock, sign_up = SystemClock(), sign_up_of(settings)
    async with open_store(settings.store_url, key=secret_key(settings.home)) as store:
        with suppress(NotFoundError):  # whoever lacks an admin is here to make one
            await ensure_first_organization(store, clock, sign_up)
        yield Administration(store=store, clock=clock, sign_up=sign_up, plans=plans_of(settings))


__all__ = ["administration", "show"]
