"""What is asked of an identity provider."""

from dataclasses import dataclass
from datetime import datetime
from typing import Protocol


@dataclass(frozen=True)
class Session:
    """What a session token says, once its signature was found good.

    `subject` and `org` are the provider's names for user and organization; `org` is None where the
    token is for no organization. `permissions` is None where it says nothing of them.
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
        """Return what a token says.

        Raises:
            InvalidTokenError: it is malformed, not signed by the provider, or not for us.
            TokenExpiredError: it was good once.
            UnavailableError: the provider's keys cannot be had now.
        """
        ...
