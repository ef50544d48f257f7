"""Secrets at rest: encrypted with the installation's key before they reach the database."""

import json
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from hashlib import sha256

from cryptography.fernet import Fernet, InvalidToken

from sandyard.server.core.errors import InternalError


class Seal:
    """Encrypts and authenticates small mappings of text."""

    def __init__(self, key: bytes) -> None:
        # A key of its own for this purpose, whatever else the installation's key is used for.
        self._fernet = Fernet(urlsafe_b64encode(sha256(b"sandyard store\0" + key).digest()))

    def close(self, values: Mapping[str, str]) -> str:
        """Return the sealed form; an empty mapping stays visibly empty."""
        if not values:
            return ""
        return self._fernet.encrypt(json.dumps(dict(values)).encode()).decode()

    def open(self, sealed: str) -> dict[str, str]:
        """Return what was sealed.

        Raises:
            InternalError: it was sealed with another key, or altered.
        """
        if not sealed:
            return {}
        try:
            values = json.loads(self._fernet.decrypt(sealed.encode()))
        except InvalidToken as error:
            raise InternalError(
                "cannot read the secrets in the database: they were written with another "
                "secret.key; put the right one back"
            ) from error
        return {str(name): str(value) for name, value in values.items()}
