"""The identity provider."""

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol


@dataclass(frozen=True)
class Session:
    """The claims of a verified session token.

    `subject` and `org` are the provider's ids of user and organization; `org` is None if the token
    has no organization. `permissions` is None if the token has no such claim.
    """

    subject: str
    org: str | None
    org_name: str | None
    role: str | None
    permissions: tuple[str, ...] | None
    email: str | None
    is_email_verified: bool
    first_name: str | None
    last_name: str | None
    picture_url: str | None
    issued_at: datetime


class Sessions(Protocol):
    """Reads session tokens."""

    async def read(self, token: str) -> Session:
        """Return the claims of a token.

        Raises:
            InvalidTokenError: it is malformed, not signed by the provider, or for another audience.
            TokenExpiredError: it has expired.
            UnavailableError: the provider's keys cannot be fetched.
        """
        ...
