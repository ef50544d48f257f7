"""Recognizes sessions of the platform in requests to sandboxes."""

from sandyard.server.core.errors import InvalidTokenError, SandyardError, TokenExpiredError
from sandyard.server.front import headers as h
from sandyard.server.service.people.credentials import Credentials, Token


async def has_session(headers: h.Headers, credentials: Credentials) -> bool:
    """Tell whether a client sends a session of the platform along, which the guest must not see;
    other tokens it may."""
    for name, value in headers:
        text = value.decode("latin-1").strip()
        if name == b"authorization":
            kind, _, text = text.partition(" ")
            text = text.strip() if kind.lower() == "bearer" else ""
        elif name != b"x-api-key":
            continue
        if text.startswith("eyJ"):
            try:
                await credentials.verify(Token(text))
            except (InvalidTokenError, TokenExpiredError):
                continue
            except SandyardError:
                return True  # it cannot be verified now, and may be one
            return True
    return False
