"""Access as routes declare it: a route without a declaration is refused by a test."""

from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

from fastapi import Depends, Request
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import HTTPConnection

from sandyard.server.core.errors import NotFoundError
from sandyard.server.service.actor import Actor

RouteT = TypeVar("RouteT", bound=Callable[..., object])

_BEARER = HTTPBearer(auto_error=False, description="An API key: rt_live_… or rt_test_…")
_HEADER = APIKeyHeader(name="X-API-Key", auto_error=False)


def actor_of(connection: HTTPConnection) -> Actor:
    """Return the actor that the edge found for a request's credential.

    Raises:
        NotFoundError: the request is for another organization.
    """
    actor: Actor = connection.state.actor
    if connection.query_params.get("orgId", actor.org_id) != actor.org_id:
        raise NotFoundError("cannot find the organization: the key belongs to another one")
    return actor


class Scope:
    """A dependency that requires a scope; with None, any credential."""

    def __init__(self, name: str | None) -> None:
        self.name = name

    async def __call__(
        self,
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(_BEARER)],
        key: Annotated[str | None, Depends(_HEADER)],
    ) -> Actor:
        """Return the actor behind the request's credential.

        The credentials are parameters only so that they are in the OpenAPI description.
        """
        del bearer, key
        actor = actor_of(request)
        if self.name is not None:
            actor.require(self.name)
        return actor


def open_to_all(route: Callable[..., Awaitable[object]]) -> Callable[..., Awaitable[object]]:
    """Mark a route as open: it takes no credential."""
    route.is_open = True  # type: ignore[attr-defined]  # a mark for the test of all routes
    return route


def socket_scope(name: str) -> Callable[[RouteT], RouteT]:
    """Declare the scope that a WebSocket needs; `sockets.served` enforces it."""

    def mark(route: RouteT) -> RouteT:
        route.scope_name = name  # type: ignore[attr-defined]  # read by api.sockets
        return route

    return mark


def takes_query_key(route: RouteT) -> RouteT:
    """Let a route read its API key from the query, for browsers.

    A browser cannot send headers with a WebSocket or an EventSource. No other route does this,
    since URLs are written to logs.
    """
    route.takes_query_key = True  # type: ignore[attr-defined]  # read by api.credentials
    return route


def takes_ticket(kind: str) -> Callable[[RouteT], RouteT]:
    """Let the ticket in a route's path, its parameter `session`, be the credential."""

    def mark(route: RouteT) -> RouteT:
        route.ticket_kind = kind  # type: ignore[attr-defined]  # read by api.credentials
        return route

    return mark


def takes_signature(route: RouteT) -> RouteT:
    """Let a route be used through a signed URL."""
    route.takes_signature = True  # type: ignore[attr-defined]  # read by api.credentials
    return route
