"""How headers are rewritten on their way through the proxy, to the guest and back."""

import re
from collections.abc import Iterable, Sequence
from urllib.parse import urlsplit

Headers = Sequence[tuple[bytes, bytes]]

COOKIE = b"sandyard_preview"
_HOP = frozenset(
    {
        b"connection", b"keep-alive", b"proxy-connection", b"proxy-authenticate",
        b"proxy-authorization", b"te", b"transfer-encoding", b"upgrade",
    }
)  # fmt: skip
"""Those of one connection alone (RFC 9110, 7.6.1)."""
_TOLD_BY_US = frozenset(
    {
        b"host", b"forwarded", b"x-forwarded-for", b"x-forwarded-proto",
        b"x-forwarded-host", b"x-forwarded-port", b"x-real-ip", b"content-length",
    }
)  # fmt: skip
_OURS = re.compile(rb"rt_(?:live|test)_|e2b_[0-9a-f]{40}", re.IGNORECASE)
_LOCAL = frozenset({"localhost", "127.0.0.1", "::1", "0.0.0.0"})  # noqa: S104 - compared


_NO_TRAILERS = _HOP | frozenset(
    {
        b"authorization", b"clear-site-data", b"content-encoding", b"content-length",
        b"content-type", b"cookie", b"date", b"e2b-traffic-access-token", b"expect",
        b"forwarded", b"host", b"location", b"origin", b"referer", b"set-cookie", b"trailer",
        b"x-access-token", b"x-api-key", b"x-request-id",
    }
)  # fmt: skip
"""What may stand before a body only: how a message is framed, passed on, and who sends it
(RFC 9110, 6.5.1)."""


def trailers_of(headers: Headers) -> list[tuple[bytes, bytes]]:
    """Return the trailers that are passed on, in either direction."""
    return [
        (name, value)
        for name, value in headers
        if name not in _NO_TRAILERS and not name.startswith((b"x-forwarded-", b"x-ratelimit-"))
    ]


def takes_trailers(headers: Headers) -> bool:
    """Tell whether a client accepts trailers."""
    return any(
        word.partition(b";")[0].strip().lower() == b"trailers"
        for name, value in headers
        if name == b"te"
        for word in value.split(b",")
    )


def waits_to_go_on(headers: Headers) -> bool:
    """Tell whether a client waits for `100 Continue` before its body (RFC 9110, 10.1.1)."""
    return (first(headers, b"expect") or "").strip().lower() == "100-continue"


def first(headers: Headers, name: bytes) -> str | None:
    """Return the first header of a name."""
    return next((value.decode("latin-1") for key, value in headers if key == name), None)


def cookies_of(headers: Headers, *, is_safe: bool) -> list[bytes]:
    """Return the values of our cookie; other pages may have set more of the same name. Over TLS
    (`is_safe`) only the `__Host-` cookie counts, which no other host can set."""
    wanted = b"__Host-" + COOKIE if is_safe else COOKIE
    found = []
    for key, value in headers:
        if key == b"cookie":
            for part in value.split(b";"):
                name, _, text = part.strip().partition(b"=")
                if name == wanted:
                    found.append(text)
    return found


def to_guest(
    headers: Headers,
    *,
    port: int,
    hosts: Iterable[str],
    client: str,
    scheme: str,
    query_token: str,
    strips_authorization: bool,
) -> list[tuple[bytes, bytes]]:
    """Return the headers that a guest receives. It sees itself addressed as `localhost`, from its
    own pages, and no credential of the client's for the platform.

    `hosts` are the names that the client uses for it, `query_token` the query parameter that may
    carry a credential. Framing headers are left out.
    """
    local = f"localhost:{port}".encode()
    dropped = _HOP | _TOLD_BY_US | _nominated(headers)
    own = {f"{one}://{host}" for one in ("http", "https") for host in hosts}
    result = [(b"host", local)]
    for name, value in headers:
        if name in dropped:
            continue
        kept: bytes | None = value
        if name == b"cookie":
            kept = _without_our_cookie(value)
        elif name == b"origin":
            kept = b"http://" + local if value.decode("latin-1").lower() in own else value
        elif name == b"referer":
            kept = _local_address(value, own, local, query_token)
        elif name in (b"authorization", b"x-api-key") and (
            strips_authorization or _OURS.search(value)
        ):
            kept = None
        if kept is not None:
            result.append((name, kept))
    result.append((b"x-forwarded-for", client.encode("latin-1", "replace")))
    result.append((b"x-forwarded-proto", scheme.encode()))
    return result


def to_client(
    headers: Headers, *, origin: str, port: int, adds_policy: bool
) -> list[tuple[bytes, bytes]]:
    """Return the headers of a guest's answer that a client receives.

    Cookies are limited to this one host name and never replace ours. A redirect to `localhost`
    leads to `origin` instead. A guest cannot set the platform's own headers (request id, rate
    limits).
    """
    dropped = _HOP | _nominated(headers) | {b"date", b"clear-site-data", b"x-request-id"}
    if any(name == b"transfer-encoding" for name, _ in headers):
        dropped |= {b"content-length"}  # which of the two is true, only the guest knows
    result = []
    for name, value in headers:
        if name in dropped or name.startswith(b"x-ratelimit-"):
            continue
        if name == b"set-cookie":
            cookie = _host_only(value)
            if cookie is not None:
                result.append((name, cookie))
        elif name == b"location":
            result.append((name, _address_here(value, origin, port)))
        else:
            result.append((name, value))
    if adds_policy and not any(name == b"referrer-policy" for name, _ in result):
        # The name contains the token, which other sites must not learn.
        result.append((b"referrer-policy", b"same-origin"))
    return result


def _nominated(headers: Headers) -> frozenset[bytes]:
    """Return the headers that `Connection` declares as hop-by-hop."""
    return frozenset(
        word.strip().lower()
        for name, value in headers
        if name == b"connection"
        for word in value.split(b",")
    )


def _without_our_cookie(value: bytes) -> bytes | None:
    kept = [
        part
        for part in value.split(b";")
        if part.strip().partition(b"=")[0] not in (COOKIE, b"__Host-" + COOKIE)
    ]
    return b";".join(kept).strip() or None


def _local_address(value: bytes, own: set[str], local: bytes, query_token: str) -> bytes | None:
    try:
        parsed = urlsplit(value.decode("latin-1"))
    except ValueError:
        return None
    if f"{parsed.scheme}://{parsed.netloc}".lower() not in own:
        return value
    query = "&".join(
        one for one in parsed.query.split("&") if not one.startswith(f"{query_token}=")
    )
    rest = f"{parsed.path}?{query}" if query else parsed.path
    return b"http://" + local + rest.encode("latin-1")


def _host_only(value: bytes) -> bytes | None:
    """Return a guest's cookie limited to its own host, or None if it has the name of ours."""
    name = value.partition(b"=")[0].strip()
    if name.lower().removeprefix(b"__host-").removeprefix(b"__secure-") == COOKIE:
        return None
    if not name:
        # A browser takes `=name=x` for a cookie without a name, and sends it back as `name=x`.
        return None
    first_part, *attributes = value.split(b";")
    kept = [one for one in attributes if one.partition(b"=")[0].strip().lower() != b"domain"]
    return b";".join([first_part, *kept])


def _address_here(value: bytes, origin: str, port: int) -> bytes:
    try:
        parsed = urlsplit(value.decode("latin-1"))
        is_own = parsed.hostname in _LOCAL and parsed.port == port
    except ValueError:
        return value
    if not is_own or parsed.scheme not in ("http", "https"):
        return value
    rest = parsed._replace(scheme="", netloc="").geturl()
    return (origin + (rest if rest.startswith("/") else f"/{rest}")).encode("latin-1")
