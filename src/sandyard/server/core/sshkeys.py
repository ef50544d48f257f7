"""SSH public keys as text: which are taken and what is refused."""

import base64
import binascii

from sandyard.server.core.errors import InvalidArgumentError

KEY_TYPES = frozenset(
    {
        "ssh-rsa", "ssh-ed25519",
        "ecdsa-sha2-nistp256", "ecdsa-sha2-nistp384", "ecdsa-sha2-nistp521",
        "sk-ssh-ed25519@openssh.com", "sk-ecdsa-sha2-nistp256@openssh.com",
    }
)  # fmt: skip
_KEY_MAX = 16 * 1024
_RSA_BITS_MIN = 2048


def is_literal_key(text: str) -> bool:
    """Tell whether `text` starts like a public key rather than being the id of one."""
    return text.split(" ", 1)[0] in KEY_TYPES


def check_public_key(text: str, *, field: str) -> str:
    """Return an OpenSSH public key on one line, as `authorized_keys` wants it.

    The key's blob is read as RFC 4253, section 6.6 lays it out, so what is named and what is inside
    must agree.

    Raises:
        InvalidArgumentError: not one key on one line, damaged, of a type not taken, or too weak.
    """
    words = text.strip().split(" ", 2)
    if len(text) > _KEY_MAX or len(words) < 2 or any(ch in text.strip() for ch in "\r\n\x00"):
        raise InvalidArgumentError(
            f"cannot read {field}: a public key is one line, such as ssh-ed25519 AAAA… comment",
            field=field,
        )
    if words[0] not in KEY_TYPES:
        raise InvalidArgumentError(
            f"cannot take {field}: keys of this type are not accepted", field=field
        )
    try:
        blob = base64.b64decode(words[1], validate=True)
        parts = _parts(blob)
    except (binascii.Error, ValueError) as error:
        raise InvalidArgumentError(
            f"cannot read {field}: the key is damaged; copy it again", field=field
        ) from error
    if len(parts) < 2 or parts[0] != words[0].encode():
        raise InvalidArgumentError(
            f"cannot read {field}: the key is not of the type it names; copy it again", field=field
        )
    if words[0] == "ssh-rsa" and int.from_bytes(parts[-1], "big").bit_length() < _RSA_BITS_MIN:
        raise InvalidArgumentError(
            f"cannot take {field}: RSA keys need {_RSA_BITS_MIN} bits; make a new one", field=field
        )
    return " ".join(words)


def _parts(blob: bytes) -> list[bytes]:
    parts = []
    while blob:
        length = int.from_bytes(blob[:4], "big")
        if len(blob) < 4 + length:
            raise ValueError("a field is cut short")
        parts.append(blob[4 : 4 + length])
        blob = blob[4 + length :]
    return parts
