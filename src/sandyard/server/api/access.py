"""Access as routes declare it: a route without a declaration is refused by a test."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from sandyard.server.service.access import Access, Actor

_BEARER = HTTPBearer(auto_error=False, description="An API key: rt_live_… or rt_test_…")
_HEADER = APIKeyHeader(name="X-API-Key", auto_error=False)


class Scope:
    """Lets in who holds a scope; a route depends on one of these."""

    def __init__(self, name: str) -> None:
        self.name = name

    async def __call__(
        self,
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
        key: Annotated[str | None, Depends(_HEADER)],
    ) -> Actor:
        """Return the actor behind the request's credential; Bearer wins over X-API-Key."""
        access: Access = request.app.state.services.access
        actor = await access.authenticate(bearer.credentials if bearer is not None else key)
        actor.require(self.name)
        return actor


def open_to_all(route: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
    """Mark a route as open: it takes no credential."""
    route.is_open = True  # type: ignore[attr-defined]
    return route
