"""Session tokens: JWTs that an identity provider signs. See core.contracts.people.Sessions.

The provider's keys are fetched once and cached. A token with an unknown key id triggers another
fetch, at a limited rate, so that clients cannot cause constant requests. If the provider does not
answer, the cached keys remain valid.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import httpx
import jwt
from typing_extensions import override

from sandyard.server.core.contracts.clock import Clock
from sandyard.server.core.contracts.people import Session, Sessions
from sandyard.server.core.errors import InvalidTokenError, TokenExpiredError, UnavailableError

log = logging.getLogger(__name__)

_LIMIT_S = 5.0
_ANSWER_MAX = 256 * 1024
_KEYS_MAX = 64
_AGAIN_S = 30.0
_STALE_S = 6 * 3600.0
_TEXT_MAX = 255


@dataclass(frozen=True)
class Provider:
    """A trusted identity provider, and what its tokens must contain.

    `keys_url` is the URL of its keys; by default it is read from the discovery document. The issuer
    is compared exactly, or as a prefix with `is_issuer_prefix`.
    """

    issuer: str
    keys_url: str | None = None
    is_issuer_prefix: bool = False
    audience: str | None = None
    algorithms: tuple[str, ...] = ("RS256",)
    skew_s: int = 30
    org_claim: str = "org_id"
    role_claim: str = "role"


class JwtSessions(Sessions):
    """See core.contracts.people.Sessions."""

    def __init__(self, provider: Provider, clock: Clock) -> None:
        self._provider = provider
        self._clock = clock
        self._keys: Mapping[str, jwt.PyJWK] = {}
        self._keys_url = provider.keys_url
        self._fetched_at: float | None = None
        self._tried_at: float | None = None
        self._fetching = asyncio.Lock()

    @override
    async def read(self, token: str) -> Session:
        key = await self._key_of(token)
        provider = self._provider
        # Time is judged by the installation's clock, and the issuer by our own rule.
        options: Any = {
            "require": ["exp", "iat", "sub", "iss"],
            "verify_exp": False,
            "verify_iat": False,
            "verify_nbf": False,
            "verify_iss": False,
            "verify_aud": provider.audience is not None,
        }
        try:
            claims = jwt.decode(
                token,
                key.key,
                algorithms=[key.algorithm_name],
                audience=provider.audience,
                options=options,
            )
        except jwt.PyJWTError as error:
            raise InvalidTokenError(f"cannot accept the session token: {error}") from error
        self._check(claims)
        return self._session(claims)

    def _check(self, claims: Mapping[str, Any]) -> None:
        provider, now = self._provider, self._clock.now().timestamp()
        issuer = str(claims["iss"])
        is_ours = (
            issuer.startswith(provider.issuer)
            if provider.is_issuer_prefix
            else issuer == provider.issuer
        )
        if not is_ours:
            raise InvalidTokenError("cannot accept the session token: another issuer made it")
        if _number(claims, "exp") + provider.skew_s <= now:
            raise TokenExpiredError(
                "cannot accept the session token: it has expired; sign in again"
            )
        early = max(_number(claims, "iat"), _number(claims, "nbf", 0.0))
        if early - provider.skew_s > now:
            raise InvalidTokenError("cannot accept the session token: it is not valid yet (nbf)")

    def _session(self, claims: Mapping[str, Any]) -> Session:
        subject = _identity(claims, "sub")
        if subject is None:
            raise InvalidTokenError("cannot accept the session token: it names no user (sub)")
        permissions = claims.get("permissions")
        named = None
        if isinstance(permissions, list):
            named = tuple(one for one in permissions if isinstance(one, str))
        return Session(
            subject=subject,
            org=_identity(claims, self._provider.org_claim),
            org_name=_text(claims, "org_name"),
            role=_text(claims, self._provider.role_claim),
            permissions=named,
            email=_text(claims, "email"),
            is_email_verified=claims.get("email_verified") is True,
            first_name=_text(claims, "given_name") or _text(claims, "first_name"),
            last_name=_text(claims, "family_name") or _text(claims, "last_name"),
            picture_url=_text(claims, "picture"),
            issued_at=datetime.fromtimestamp(_number(claims, "iat"), UTC),
        )

    async def _key_of(self, token: str) -> jwt.PyJWK:
        try:
            head = jwt.get_unverified_header(token)
        except jwt.InvalidTokenError as error:
            raise InvalidTokenError(f"cannot accept the session token: {error}") from error
        name = head.get("kid")
        if not isinstance(name, str) or not name:
            raise InvalidTokenError("cannot accept the session token: it names no key (kid)")
        if head.get("alg") not in self._provider.algorithms:
            raise InvalidTokenError(
                "cannot accept the session token: it is not signed with "
                f"{' or '.join(self._provider.algorithms)}"
            )
        # A known key remains valid while another request fetches newer ones.
        if name not in self._keys or (self._is_stale() and not self._fetching.locked()):
            await self._refresh(name)
        key = self._keys.get(name)
        if key is None:
            if self._fetched_at is None:
                raise UnavailableError(
                    "the identity provider's keys cannot be fetched now; try again"
                )
            raise InvalidTokenError("cannot accept the session token: its key is not known")
        if key.algorithm_name != head["alg"]:
            raise InvalidTokenError("cannot accept the session token: its key has another type")
        return key

    def _is_stale(self) -> bool:
        return self._fetched_at is None or self._clock.monotonic() - self._fetched_at > _STALE_S

    async def _refresh(self, wanted: str) -> None:
        async with self._fetching:
            if wanted in self._keys and not self._is_stale():
                return
            now = self._clock.monotonic()
            if self._tried_at is not None and now - self._tried_at < _AGAIN_S:
                return
            self._tried_at = now
            try:
                # Each read has its own limit; a trickle has this one.
                async with asyncio.timeout(_LIMIT_S):
                    self._keys = await self._fetch()
                self._fetched_at = now
            except (httpx.HTTPError, TimeoutError, ValueError, TypeError, KeyError) as error:
                log.warning("the identity provider's keys cannot be fetched: %r", error)

    async def _fetch(self) -> Mapping[str, jwt.PyJWK]:
        async with httpx.AsyncClient(timeout=_LIMIT_S, follow_redirects=False) as client:
            if self._keys_url is None:
                place = f"{self._provider.issuer.rstrip('/')}/.well-known/openid-configuration"
                document = await _json_of(client, place)
                if document["issuer"] != self._provider.issuer:
                    raise ValueError(f"{place} names another issuer")
                keys_url = str(document["jwks_uri"])
                if keys_url.split("://")[0] != place.split("://")[0]:
                    raise ValueError(f"{place} names keys at {keys_url}")
                self._keys_url = keys_url
            document = await _json_of(client, self._keys_url)
        return _usable(document["keys"], self._provider.algorithms)


def _usable(keys: Any, algorithms: Sequence[str]) -> Mapping[str, jwt.PyJWK]:
    """Return the signing keys by id; keys that cannot be read are left out."""
    found: dict[str, jwt.PyJWK] = {}
    for one in list(keys)[:_KEYS_MAX]:
        if not isinstance(one, dict):
            continue
        name = one.get("kid")
        if not isinstance(name, str) or one.get("use", "sig") != "sig":
            continue
        try:
            key = jwt.PyJWK(one)
        except jwt.PyJWTError as error:
            log.info("cannot read a key of the identity provider: %s", error)
            continue
        # A symmetric key in a public list would let anyone sign.
        if key.key_type in ("RSA", "EC") and key.algorithm_name in algorithms:
            found[name] = key
    return found


async def _json_of(client: httpx.AsyncClient, url: str) -> Any:
    async with client.stream("GET", url) as answer:
        answer.raise_for_status()
        body = b""
        async for piece in answer.aiter_bytes():
            body += piece
            if len(body) > _ANSWER_MAX:
                raise ValueError(f"the response of {url} is too long")
    return httpx.Response(200, content=body).json()


def _number(claims: Mapping[str, Any], name: str, default: float | None = None) -> float:
    value = claims.get(name, default)
    # A datetime has no year beyond 9999.
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value < 253402300800:
        raise InvalidTokenError(f"cannot accept the session token: its {name} is not a timestamp")
    return float(value)


def _identity(claims: Mapping[str, Any], name: str) -> str | None:
    """Return the id of a user or an organization, which must be unambiguous."""
    value = claims.get(name)
    if value is None or value == "":
        return None
    if not isinstance(value, str) or len(value) > _TEXT_MAX or not value.isprintable():
        raise InvalidTokenError(f"cannot accept the session token: its {name} is not a name")
    return value


def _text(claims: Mapping[str, Any], name: str) -> str | None:
    value = claims.get(name)
    if not isinstance(value, str) or not value or "\x00" in value or not value.isprintable():
        return None
    return value[:_TEXT_MAX]
