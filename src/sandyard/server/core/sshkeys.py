"""SSH public keys as text."""

import base64
from hashlib import sha256

KEY_TYPES = frozenset(
    {
        "ssh-rsa", "ssh-ed25519",
        "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521",
        "sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com",
    }
)  # fmt: skip
"""The types that are accepted."""


def is_literal_key(text: str) -> bool:
    """Tell whether `text` starts like a public key rather than being the id of one."""
    return text.split(" ", 1)[0] in KEY_TYPES


def fingerprint_of(key: str) -> str:
    """Return the fingerprint of a public key as OpenSSH prints it: `SHA256:` and 43 characters."""
    digest = sha256(base64.b64decode(key.split(" ", 2)[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")
