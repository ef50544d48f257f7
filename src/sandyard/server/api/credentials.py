"""Where requests to the API carry their credential."""

from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qsl

from starlette.requests import HTTPConnection
from starlette.routing import BaseRoute, Match

from sandyard.server.api.models.files import given_path, path_in
from sandyard.server.core.errors import InvalidArgumentError, InvalidTokenError
from sandyard.server.core.ids import is_sandbox_id
from sandyard.server.front.face import Reader
from sandyard.server.service.people.credentials import (
    Credential,
    OneTimeTicket,
    Signature,
    Token,
)
from sandyard.server.service.sandboxes.signing import SignedUse

_SIGNED = {"path", "pathBase64", "user", "expires", "by", "signature"}
_MARKS = ("takes_query_key", "ticket_kind", "takes_signature")


def readers(routes: Sequence[BaseRoute]) -> tuple[Reader, ...]:
    """Return what reads credentials, in order of precedence: a ticket in the path of a WebSocket,
    a header, the query, a signature of the URL.

    All but the header are read where the route in question declares them (see `api.access`).
    """
    own = _Routes(routes)
    return own.ticket, bearer_or_key, own.query_key, own.signature


def bearer_or_key(connection: HTTPConnection) -> Token | None:
    """Return the token in the headers; Bearer wins over X-API-Key."""
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return _token(connection, token.strip())
    key = connection.headers.get("x-api-key")
    return None if key is None else _token(connection, key)


class _Routes:
    """Reads the credentials that some routes take besides headers."""

    def __init__(self, routes: Sequence[BaseRoute]) -> None:
        self._routes = [
            one
            for one in routes
            if any(hasattr(getattr(one, "endpoint", None), mark) for mark in _MARKS)
        ]

    def ticket(self, connection: HTTPConnection) -> Credential | None:
        if connection.scope["type"] != "websocket":
            return None
        endpoint, parameters = self._match(connection)
        kind = getattr(endpoint, "ticket_kind", None)
        return None if kind is None else OneTimeTicket(kind, parameters["session"])

    def query_key(self, connection: HTTPConnection) -> Credential | None:
        """Return the token in the query.

        Raises:
            InvalidArgumentError: the query has several.
        """
        query = connection.query_params
        given = [*query.getlist("api_key"), *query.getlist("token")]
        if not given or not hasattr(self._match(connection)[0], "takes_query_key"):
            return None
        if len(given) > 1:
            raise InvalidArgumentError(
                "cannot tell which credential to use: give one of api_key and token, once",
                field="api_key",
            )
        return _token(connection, given[0])

    def signature(self, connection: HTTPConnection) -> Credential | None:
        """Return the signature of a URL, and what it allows.

        Raises:
            InvalidTokenError: the query has parameters that no signed URL has.
            InvalidArgumentError: the path is malformed.
        """
        scope = connection.scope
        if "signature" not in connection.query_params:
            return None
        endpoint, parameters = self._match(connection)
        sandbox_id = parameters.get("reference", "")
        if not hasattr(endpoint, "takes_signature") or not is_sandbox_id(sandbox_id):
            return None
        query: bytes = scope["query_string"]
        pairs = parse_qsl(query.decode("latin-1"), keep_blank_values=True, errors="replace")
        given = dict(pairs)
        if len(given) != len(pairs) or not given.keys() <= _SIGNED:
            raise InvalidTokenError(
                "cannot accept the signed URL: it has parameters that were not signed; use it "
                "unchanged"
            )
        expires = given.get("expires", "")
        if not (expires.isascii() and expires.isdigit() and len(expires) <= 12):
            raise InvalidTokenError("cannot accept the signed URL: it has no valid expiry")
        path = given_path(path_in(query), given.get("pathBase64"), field="path")
        use = SignedUse(
            scope["method"],
            sandbox_id,
            path,
            given.get("user", "root"),
            int(expires),
            given.get("by", ""),
        )
        return Signature(use, given["signature"])

    def _match(self, connection: HTTPConnection) -> tuple[Any, dict[str, str]]:
        """Return the function that serves a connection, and its path parameters, if it is one of
        the routes that declare a credential."""
        for route in self._routes:
            match, found = route.matches(connection.scope)
            if match is Match.FULL:
                return found["endpoint"], found["path_params"]
        return None, {}


def _token(connection: HTTPConnection, secret: str) -> Token:
    return Token(secret, connection.query_params.get("orgId"))
