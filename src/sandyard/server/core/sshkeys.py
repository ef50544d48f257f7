"""SSH public keys as text: which are taken and what is refused."""

import base64
import binascii
from dataclasses import dataclass
from hashlib import sha256

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


def checked_public_key(text: str, *, field: str) -> str:
    """Return an OpenSSH public key on one line, as `authorized_keys` wants it.

    The key's blob is read as RFC 4253, section 6.6 lays it out, so what is named and what is inside
    must agree.

    Raises:
        InvalidArgumentError: not one key on one line, damaged, of a type not taken, or too weak.
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
        parts = _parts(blob)
    except (binascii.Error, ValueError) as error:
        raise InvalidArgumentError(
            "cannot read {field}: the key is damaged; copy it again", field=field
        ) from error
    if not parts or parts[0] != words[0].encode():
        raise InvalidArgumentError(
            "cannot read {field}: the key is not of the type it names; copy it again", field=field
        )
    if not _is_sound(words[0], parts[1:]):
        raise InvalidArgumentError(
            f"cannot read {{field}}: what is in it is no {words[0]} key; copy it again",
            field=field,
        )
    if words[0] == "ssh-rsa" and int.from_bytes(parts[2], "big").bit_length() < _RSA_BITS_MIN:
        raise InvalidArgumentError(
            f"cannot take {{field}}: RSA keys need {_RSA_BITS_MIN} bits; make a new one",
            field=field,
        )
    return " ".join(words)


def fingerprint_of(key: str) -> str:
    """Return the fingerprint of a public key as OpenSSH prints it: `SHA256:` and 43 characters."""
    digest = sha256(base64.b64decode(key.split(" ", 2)[1])).digest()
    return "SHA256:" + base64.b64encode(digest).decode().rstrip("=")


def _is_sound(kind: str, parts: list[bytes]) -> bool:
    """Tell whether a key's fields are those of its type (RFC 8709, RFC 5656, RFC 4253, PROTOCOL.u2f
    of OpenSSH), which tells a key from bytes that merely have its form.
    """
    if kind.startswith("sk-"):
        # The last field names the application, such as `ssh:`.
        return bool(parts) and _is_sound(_WITHOUT_TOKEN[kind], parts[:-1])
    match kind:
        case "ssh-ed25519":
            return [len(one) for one in parts] == [32]
        case "ssh-rsa":
            if len(parts) != 2:
                return False
            exponent, modulus = (int.from_bytes(one, "big", signed=True) for one in parts)
            return exponent >= 3 and exponent % 2 == 1 and modulus > 0 and modulus % 2 == 1
        case _:
            curve = _CURVES[kind.removeprefix("ecdsa-sha2-")]
            if len(parts) != 2 or parts[0].decode(errors="replace") != curve.name:
                return False
            return curve.holds(parts[1])


@dataclass(frozen=True)
class _Curve:
    """y² = x³ - 3x + b over a prime field (FIPS 186-4, appendix D.1.2)."""

    name: str
    prime: int
    b: int

    def holds(self, point: bytes) -> bool:
        """Tell whether bytes are an uncompressed point of the curve."""
        size = (self.prime.bit_length() + 7) // 8
        if len(point) != 1 + 2 * size or point[0] != 4:
            return False
        x, y = int.from_bytes(point[1 : 1 + size], "big"), int.from_bytes(point[1 + size :], "big")
        return max(x, y) < self.prime and (y * y - (x**3 - 3 * x + self.b)) % self.prime == 0


_CURVES = {
    curve.name: curve
    for curve in (
        _Curve(
            "nistp256",
            2**256 - 2**224 + 2**192 + 2**96 - 1,
            0x5AC635D8AA3A93E7B3EBBD55769886BC651D06B0CC53B0F63BCE3C3E27D2604B,
        ),
        _Curve(
            "nistp384",
            2**384 - 2**128 - 2**96 + 2**32 - 1,
            0xB3312FA7E23EE7E4988E056BE3F82D19181D9C6EFE8141120314088F5013875AC656398D8A2ED19D2A85C8EDD3EC2AEF,
        ),
        _Curve(
            "nistp521",
            2**521 - 1,
            0x0051953EB9618E1C9A1F929A21A0B68540EEA2DA725B99B315F3B8B489918EF109E156193951EC7E937B1652C0BD3BB1BF073573DF883D2C34F1EF451FD46B503F00,
        ),
    )
}
_WITHOUT_TOKEN = {
    "sk-ssh-ed25519@openssh.com": "ssh-ed25519",
    "sk-ecdsa-sha2-nistp256@openssh.com": "ecdsa-sha2-nistp256",
}


def _parts(blob: bytes) -> list[bytes]:
    parts = []
    while blob:
        length = int.from_bytes(blob[:4], "big")
        if len(blob) < 4 + length:
            raise ValueError("a field is cut short")
        parts.append(blob[4 : 4 + length])
        blob = blob[4 + length :]
    return parts
