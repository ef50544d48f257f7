"""Credentials: everything a client can present, and how each kind is verified.

Faces read credentials from requests; this table tells who is behind one. It is the only place that
decides that.
"""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar

from sandyard.server.core.errors import InternalError
from sandyard.server.service.actor import Admission
from sandyard.server.service.people.access import Access
from sandyard.server.service.sandboxes.signing import SignedUse, Signing
from sandyard.server.service.sandboxes.tickets import Tickets


@dataclass(frozen=True)
class Credential:
    """Base of all kinds."""


@dataclass(frozen=True)
class Token(Credential):
    """An API key or a session token. `org_id` selects one of a session's organizations."""

    secret: str
    org_id: str | None = None


@dataclass(frozen=True)
class OneTimeTicket(Credential):
    """A ticket of a kind (`terminal`, `desktop`). Verifying it uses it up."""

    kind: str
    secret: str


@dataclass(frozen=True)
class PreviewToken(Credential):
    """A reusable token, bound to one port of one sandbox."""

    secret: str
    sandbox_id: str
    port: int


@dataclass(frozen=True)
class Signature(Credential):
    """The signature of a URL, bound to one method, path and user."""

    use: SignedUse
    signature: str


C = TypeVar("C", bound=Credential)
Verifier = Callable[[C], Awaitable[Admission]]


class Credentials:
    """The table: a verifier for each kind of credential."""

    def __init__(self, *, access: Access, tickets: Tickets, signing: Signing) -> None:
        self._verifiers: dict[type[Credential], Verifier[Any]] = {}

        async def token(one: Token) -> Admission:
            return Admission(await access.authenticate(one.secret, org_id=one.org_id))

        async def ticket(one: OneTimeTicket) -> Admission:
            return await tickets.redeem(one.secret, one.kind)

        async def preview_token(one: PreviewToken) -> Admission:
            return await tickets.admit(one.secret, "preview", one.sandbox_id, str(one.port))

        async def signature(one: Signature) -> Admission:
            return Admission(await signing.enter(one.use, one.signature))

        self.add(Token, token)
        self.add(OneTimeTicket, ticket)
        self.add(PreviewToken, preview_token)
        self.add(Signature, signature)

    def add(self, kind: type[C], verify: Verifier[C]) -> None:
        """Add a kind of credential; a face with keys of its own adds theirs."""
        self._verifiers[kind] = verify

    async def verify(self, credential: Credential) -> Admission:
        """Return who presents a credential, and what it is bound to.

        Raises:
            InvalidTokenError: it is unknown, revoked, used up or malformed.
            TokenExpiredError: it has expired.
            NotFoundError: it names an organization that its holder is not a member of.
            UnavailableError: the identity provider cannot be asked now.
        """
        verifier = self._verifiers.get(type(credential))
        if verifier is None:
            raise InternalError(f"no verifier for {type(credential).__name__}")
        return await verifier(credential)
