"""SSH public keys, parsed by cryptography."""

import base64

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_ssh_public_key

from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.core.sshkeys import KEY_TYPES

_KEY_MAX = 16 * 1024
_RSA_BITS_MIN = 2048


def checked_public_key(text: str, *, field: str) -> str:
    """Return an OpenSSH public key as one line of `authorized_keys`.

    Raises:
        InvalidArgumentError: it is not one key on one line, is damaged or too weak, or has a type
            that is not accepted.
    """
    words = text.strip().split(" ", 2)
    if len(text) > _KEY_MAX or len(words) < 2 or any(ch in text.strip() for ch in "\r\n\x00"):
        raise InvalidArgumentError(
            "cannot read {field}: a public key is one line, such as ssh-ed25519 AAAA… comment",
            field=field,
        )
    if words[0] not in KEY_TYPES:
        raise InvalidArgumentError(
            "cannot take {field}: keys of this type are not accepted", field=field
        )
    try:
        blob = base64.b64decode(words[1], validate=True)
        if base64.b64encode(blob).decode() != words[1]:
            raise ValueError("the base64 is not canonical")  # the library does not check that
        key = load_ssh_public_key(" ".join(words[:2]).encode())
        if isinstance(key, RSAPublicKey) and key.public_numbers().n % 2 == 0:
            raise ValueError("an RSA modulus is odd")  # the library does not check that
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidArgumentError(
            f"cannot read {{field}}: it is not a valid {words[0]} key; copy it again", field=field
        ) from error
    if isinstance(key, RSAPublicKey) and key.key_size < _RSA_BITS_MIN:
        raise InvalidArgumentError(
            f"cannot take {{field}}: RSA keys need {_RSA_BITS_MIN} bits; make a new one",
            field=field,
        )
    return " ".join(words)
