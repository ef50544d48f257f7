"""A face: one public protocol on the shared listener, as data for the edge."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from starlette.requests import HTTPConnection
from starlette.responses import Response

from sandyard.server.core.errors import SandyardError
from sandyard.server.front.bodies import LargeBodies
from sandyard.server.service.people.credentials import Credential, Credentials
from sandyard.server.service.people.rates import Rates

Reader = Callable[[HTTPConnection], Credential | None]
"""Reads one kind of credential from a request; None if the request carries none of that kind."""


class RequestObserver(Protocol):
    """Counts answered requests."""

    def __call__(self, *, face: str, method: str, route: str, status: int, seconds: float) -> None:
        """Count one request; `route` is the pattern, not the path."""
        ...


@dataclass(frozen=True)
class Face:
    """What the edge has to know about a public protocol.

    `guards` tells which paths need a credential. `credentials` are asked in order, and the first
    that finds one decides. `render` turns an error into the protocol's answer. With `json_only`,
    guarded routes take JSON bodies only, unless a route streams its body. If it `resets`, an answer
    that cannot go on is ended by a reset of its connection, which drops what is not read yet;
    otherwise the connection is closed.
    """

    name: str
    guards: Callable[[str], bool]
    credentials: Sequence[Reader]
    render: Callable[[HTTPConnection, SandyardError], Response]
    json_only: bool
    resets: bool = False


@dataclass(frozen=True)
class EdgeServices:
    """What the edges of all faces share.

    `bind` receives each request's id before the request is served, for the log.
    """

    credentials: Credentials
    rates: Rates
    observe: RequestObserver
    bind: Callable[[str], object]
    bodies: LargeBodies
