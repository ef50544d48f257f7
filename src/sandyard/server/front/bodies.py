"""Limits on request bodies, enforced while a body arrives."""

from collections.abc import Callable
from typing import Any, TypeVar

from starlette.types import Message, Receive, Scope

from sandyard.server.core.errors import (
    InvalidArgumentError,
    PayloadTooLargeError,
    UnavailableError,
)
from sandyard.server.core.limits import Allotment
from sandyard.server.front.bounds import JsonBounds

BODY_MAX = 64 * 1024
BODIES_MAX = 256 * 1024 * 1024
"""How much memory all large bodies together may take while their requests are served."""
RouteT = TypeVar("RouteT", bound=Callable[..., object])


def streams_body(route: RouteT) -> RouteT:
    """Let a route read its body piece by piece, of any type and size."""
    route.streams = True  # type: ignore[attr-defined]  # read from the matched route
    return route


def takes_body(limit: int) -> Callable[[RouteT], RouteT]:
    """Let a route take a body of up to `limit` bytes instead of BODY_MAX."""

    def mark(route: RouteT) -> RouteT:
        route.body_max = limit  # type: ignore[attr-defined]  # read from the matched route
        return route

    return mark


class LargeBodies:
    """Counts bodies over BODY_MAX. One organization gets half of BODIES_MAX at most, so that it
    cannot shut out the others."""

    def __init__(self) -> None:
        self._held = Allotment(each=BODIES_MAX // 2, total=BODIES_MAX)

    def hold(self, org_id: str, size: int) -> None:
        """Count `size` more bytes of an organization's.

        Raises:
            UnavailableError: all large bodies together take too much memory.
        """
        if not self._held.take(org_id, size):
            raise UnavailableError(
                "cannot take another large body now: too many are being uploaded; try again"
            )

    def release(self, org_id: str, size: int) -> None:
        """Take back what `hold` counted."""
        self._held.give_back(org_id, size)


class BoundedBody:
    """The body of one request, which is refused beyond its route's limit.

    The route is known by the time it reads its body. `checks_json` limits JSON bodies by depth and
    number of values, and refuses other types.
    """

    def __init__(
        self, scope: Scope, receive: Receive, bodies: LargeBodies, *, checks_json: bool
    ) -> None:
        self._scope = scope
        self._receive = receive
        self._bodies = bodies
        self._bounds = JsonBounds() if checks_json else None
        self._size = self._held = 0

    async def receive(self) -> Message:
        """Return the next message, as ASGI's `receive`.

        Raises:
            InvalidArgumentError: the body is not JSON, or nested too deep.
            PayloadTooLargeError: the body is larger than its route allows.
            UnavailableError: too many large bodies are being uploaded.
        """
        endpoint: Any = self._scope.get("endpoint")
        if getattr(endpoint, "streams", False):
            return await self._receive()
        if self._size == 0 and self._bounds is not None:
            _check_type(self._scope)
        message = await self._receive()
        if message["type"] != "http.request":
            return message
        body = message.get("body", b"")
        self._size += len(body)
        limit = getattr(endpoint, "body_max", BODY_MAX)
        if self._size > limit:
            raise PayloadTooLargeError(
                f"cannot take a body of over {_shown(limit)} here", limit=limit
            )
        if self._size > BODY_MAX:
            self._bodies.hold(self._org_id, self._size - self._held)
            self._held = self._size
        if self._bounds is not None:
            self._bounds.feed(body)
        return message

    def release(self) -> None:
        """Stop counting the body."""
        if self._held:
            self._bodies.release(self._org_id, self._held)
            self._held = 0

    @property
    def _org_id(self) -> str:
        actor = self._scope["state"].get("actor")
        return "" if actor is None else str(actor.org_id)


def _check_type(scope: Scope) -> None:
    """Refuse a body whose Content-Type is not JSON; without the header it is taken for JSON."""
    headers = dict(scope["headers"])
    kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
    has_body = headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers
    is_json = not kind or kind == b"application/json" or kind.endswith(b"+json")
    if has_body and not is_json:
        raise InvalidArgumentError(
            f"cannot read a body of the type {kind.decode('latin-1')[:100]}: send JSON, with the "
            "header `Content-Type: application/json`",
            field="Content-Type",
        )


def _shown(limit: int) -> str:
    return f"{limit // 2**20} MiB" if limit >= 2**20 else f"{limit // 2**10} KiB"
