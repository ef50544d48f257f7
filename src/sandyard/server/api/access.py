"""Access as routes declare it: a route without a declaration is refused by a test."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from sandyard.server.service.actor import Actor

_BEARER = HTTPBearer(auto_error=False, description="An API key: rt_live_… or rt_test_…")
_HEADER = APIKeyHeader(name="X-API-Key", auto_error=False)


class Scope:
    """Lets in who holds a scope, anyone with a credential for None; a route depends on one."""

    def __init__(self, name: str | None) -> None:
        self.name = name

    async def __call__(
        self,
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
        key: Annotated[str | None, Depends(_HEADER)],
    ) -> Actor:
        """Return the actor that the edge found behind the request's credential.

        The credentials are parameters for the description's sake.
        """
        del bearer, key
        actor: Actor = request.state.actor
        if self.name is not None:
            actor.require(self.name)
        return actor


def open_to_all(route: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
    """Mark a route as open: it takes no credential."""
    route.is_open = True  # type: ignore[attr-defined]  # a mark for the test of all routes
    return route
