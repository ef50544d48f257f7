"""What a request shows for itself: a key or a session, or that its very URL was signed."""

import re
from urllib.parse import parse_qsl

from starlette.requests import HTTPConnection

from sandyard.server.api.models.files import given_path, path_in
from sandyard.server.core.errors import InvalidArgumentError, InvalidTokenError
from sandyard.server.service.sandboxes.signing import SignedUse

_STREAMS = re.compile(
    r"/v1/sandboxes/[^/]+/(?:events|files/watch|processes/[^/]+/(?:output|attach))"
)
_TICKET = re.compile(r"/v1/(terminal|desktop)/sessions/([^/]+)")
_FILE = re.compile(r"/v1/sandboxes/(sandbox-[a-z0-9]{12})/files")
_SIGNED = {"path", "pathBase64", "user", "expires", "by", "signature"}
_METHODS = {"GET": "GET", "HEAD": "GET", "PUT": "PUT"}


def token_of(connection: HTTPConnection) -> str | None:
    """Return a connection's credential; Bearer wins over X-API-Key.

    A browser sends no headers of ours with a WebSocket or an EventSource: there, and nowhere else,
    for addresses are written to logs, the query may have it.

    Raises:
        InvalidArgumentError: the query has it twice.
    """
    scheme, _, token = connection.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return token.strip()
    if (key := connection.headers.get("x-api-key")) is not None:
        return key
    if not _STREAMS.fullmatch(connection.scope["path"]):
        return None
    query = connection.query_params
    given = [*query.getlist("api_key"), *query.getlist("token")]
    if len(given) > 1:
        raise InvalidArgumentError(
            "cannot tell who is asking: give one of api_key and token, once", field="api_key"
        )
    return given[0] if given else None


def ticket_of(connection: HTTPConnection) -> tuple[str, str] | None:
    """Return what the ticket in a WebSocket's address is for, and its secret; it needs no more."""
    if connection.scope["type"] != "websocket":
        return None
    found = _TICKET.fullmatch(connection.scope["path"])
    return None if found is None else (found[1], found[2])


def signed_use_of(connection: HTTPConnection) -> tuple[SignedUse, str] | None:
    """Return what a signed URL lets its holder do, and the signature; None for any other URL.

    Raises:
        InvalidTokenError: there is something in it that no signed URL has.
        InvalidArgumentError: its path cannot be one.
    """
    scope = connection.scope
    found = _FILE.fullmatch(scope["path"])
    method = _METHODS.get(scope.get("method", ""))
    pairs = parse_qsl(
        scope["query_string"].decode("latin-1"), keep_blank_values=True, errors="replace"
    )
    given = dict(pairs)
    if found is None or method is None or "signature" not in given:
        return None
    if len(given) != len(pairs) or not given.keys() <= _SIGNED:
        raise InvalidTokenError(
            "cannot accept the signed URL: there is more in it than was signed; use it as it was "
            "given"
        )
    expires = given.get("expires", "")
    if not (expires.isascii() and expires.isdigit() and len(expires) <= 12):
        raise InvalidTokenError("cannot accept the signed URL: it does not say until when")
    path = given_path(path_in(scope["query_string"]), given.get("pathBase64"), field="path")
    user, by = given.get("user", "root"), given.get("by", "")
    return SignedUse(method, found[1], path, user, int(expires), by), given["signature"]
