"""Access as routes declare it: a route without a declaration is refused by a test."""

from collections.abc import Awaitable, Callable
from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer

from sandyard.server.core.errors import InvalidTokenError, RateLimitedError, TokenExpiredError
from sandyard.server.service.actor import Actor
from sandyard.server.service.people.access import Access
from sandyard.server.service.people.rates import Rates

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
        """Return the actor behind the request's credential; Bearer wins over X-API-Key.

        `orgId` in the query says which of a session's organizations is meant.
        """
        access: Access = request.app.state.services.access
        rates: Rates = request.app.state.services.rates
        org_id = request.query_params.get("orgId")
        token = bearer.credentials if bearer is not None else key
        try:
            actor = await access.authenticate(token, org_id=org_id)
        except (InvalidTokenError, TokenExpiredError):
            rates.failed(request.client.host if request.client else "unknown")
            raise
        try:
            request.state.allowance = rates.count(actor)
        except RateLimitedError:
            request.state.allowance = rates.refused(actor)
            raise
        if self.name is not None:
            actor.require(self.name)
        return actor


def open_to_all(route: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
    """Mark a route as open: it takes no credential."""
    route.is_open = True  # type: ignore[attr-defined]  # a mark for the test of all routes
    return route
