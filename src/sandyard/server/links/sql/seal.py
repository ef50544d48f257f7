"""Encrypts secrets with the installation's key before they are stored in the database."""

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
        """Return the encrypted form; an empty mapping is recognizable as empty."""
        if not values:
            return ""
        return self._fernet.encrypt(json.dumps(dict(values)).encode()).decode()

    def open(self, sealed: str) -> dict[str, str]:
        """Return the decrypted mapping.

        Raises:
            InternalError: it was encrypted with another key, or modified.
        """
        if not sealed:
            return {}
        try:
            values = json.loads(self._fernet.decrypt(sealed.encode()))
        except InvalidToken as error:
            raise InternalError(
                "cannot read the secrets in the database: they were encrypted with another "
                "secret.key; restore the right one"
            ) from error
        return {str(name): str(value) for name, value in values.items()}
