"""Identities on NATS: keys, and tokens that state what their holder may publish and subscribe to.

Keys are Ed25519 in NATS's encoding (base32 of a prefix, the key and a checksum). A token is a JWT
in NATS's format, signed by the installation's account (docs.nats.io, "Decentralized JWT
authentication").
"""

import base64
import binascii
import json
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from hashlib import sha256
from typing import Any, Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from typing_extensions import override

from sandyard.server.core.errors import InvalidArgumentError
from sandyard.server.links.nats.link import PREFIX, NatsLogin

_ANSWERS_MAX: Final = 100_000
_ANSWERS_FOR: Final = timedelta(hours=2)
_ALWAYS: Final = datetime(2026, 1, 1, tzinfo=UTC)


class Role(IntEnum):
    """The purpose of a key: the first byte of its encoded public key."""

    ACCOUNT = 0
    OPERATOR = 14 << 3
    USER = 20 << 3


@dataclass(frozen=True)
class Key:
    """A key of some role; `seed` is its secret, 32 bytes."""

    role: Role
    seed: bytes

    @classmethod
    def new(cls, role: Role) -> "Key":
        """Return a new key."""
        return cls(role, Ed25519PrivateKey.generate().private_bytes_raw())

    @override
    def __repr__(self) -> str:
        return f"Key({self.role.name})"

    @property
    def name(self) -> str:
        """The public key in NATS's encoding."""
        public = Ed25519PrivateKey.from_private_bytes(self.seed).public_key().public_bytes_raw()
        return name_of(self.role, public)

    def sign(self, data: bytes) -> bytes:
        """Return the signature of some data."""
        return Ed25519PrivateKey.from_private_bytes(self.seed).sign(data)


def name_of(role: Role, public: bytes) -> str:
    """Return a public key in NATS's encoding."""
    raw = bytes((role,)) + public
    checked = raw + binascii.crc_hqx(raw, 0).to_bytes(2, "little")
    return base64.b32encode(checked).decode().rstrip("=")


def public_of(name: str, role: Role) -> bytes:
    """Return the public key from its encoding.

    Raises:
        InvalidArgumentError: it is not a key, or a key of another role.
    """
    try:
        raw = base64.b32decode(name + "=" * (-len(name) % 8))
    except ValueError as error:
        raise InvalidArgumentError("cannot use this key: its encoding is invalid") from error
    if len(raw) != 35 or raw[0] != role or name_of(role, raw[1:33]) != name:
        raise InvalidArgumentError("cannot use this key: it has another role")
    return raw[1:33]


# --- tokens -------------------------------------------------------------------------------------


def operator_token(operator: Key, installation: str) -> str:
    """Return the operator's token, the root of trust of a NATS server.

    It is always the same: a server that reads its configuration anew refuses another one.
    """
    return _token(operator, operator.name, installation, {"type": "operator"}, _ALWAYS)


def account_token(operator: Key, account: Key, installation: str) -> str:
    """Return the token of the installation's account, signed by the operator; always the same."""
    limits = {
        "subs": -1, "data": -1, "payload": -1, "imports": -1, "exports": -1, "wildcards": True,
        "conn": -1, "leaf": 0,
    }  # fmt: skip
    claims = {"type": "account", "limits": limits}
    return _token(operator, account.name, installation, claims, _ALWAYS)


def control_token(account: Key, user: str, server_id: str, now: datetime, lasts: timedelta) -> str:
    """Return the token of a control plane, which may publish and subscribe to everything."""
    everything = [f"{PREFIX}.>"]
    return _user_token(
        account, user, f"control {server_id}", says=everything, hears=everything, now=now,
        lasts=lasts,
    )  # fmt: skip


def node_token(account: Key, user: str, node_id: str, now: datetime, lasts: timedelta) -> str:
    """Return the token of a node. It may publish under its own name, receive requests to itself,
    and reply to them. It cannot receive requests to other nodes, which contain secrets."""
    return _user_token(
        account,
        user,
        f"node {node_id}",
        says=[f"{PREFIX}.ctl.{node_id}.*"],
        hears=[f"{PREFIX}.node.{node_id}.*", f"{PREFIX}.inbox.{node_id}.*"],
        now=now,
        lasts=lasts,
        answers=True,
    )


def _user_token(
    account: Key,
    user: str,
    name: str,
    *,
    says: list[str],
    hears: list[str],
    now: datetime,
    lasts: timedelta,
    answers: bool = False,
) -> str:
    public_of(user, Role.USER)
    claims: dict[str, Any] = {
        "type": "user",
        "pub": {"allow": says},
        "sub": {"allow": hears},
        "subs": 16 if answers else -1,
        "data": -1,
        "payload": -1,
    }
    if answers:
        seconds = _ANSWERS_FOR // timedelta(seconds=1)
        claims["resp"] = {"max": _ANSWERS_MAX, "ttl": seconds * 10**9}
    return _token(account, user, name, claims, now, ends=now + lasts)


def _token(
    signer: Key,
    subject: str,
    name: str,
    claims: Mapping[str, object],
    now: datetime,
    *,
    ends: datetime | None = None,
) -> str:
    body: dict[str, Any] = {
        "iat": int(now.timestamp()),
        "iss": signer.name,
        "name": name,
        "nats": {**claims, "version": 2},
        "sub": subject,
    }
    if ends is not None:
        body["exp"] = int(ends.timestamp())
    body["jti"] = sha256(json.dumps(body).encode()).hexdigest()[:32]
    head = _written({"typ": "JWT", "alg": "ed25519-nkey"})
    signed = f"{head}.{_written(body)}"
    return f"{signed}.{_base64(signer.sign(signed.encode()))}"


def signature_of(key: Key, nonce: bytes) -> bytes:
    """Return the signature of a server's nonce in NATS's encoding."""
    return _base64(key.sign(nonce)).encode()


def _written(values: Mapping[str, object]) -> str:
    return _base64(json.dumps(values, separators=(",", ":")).encode())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")


@dataclass(frozen=True)
class KeyLogin(NatsLogin):
    """See link.NatsLogin: a key, and a token that was issued for it."""

    key: Key
    current: "NatsToken"

    @override
    def token(self) -> str:
        return self.current.text

    @override
    def sign(self, nonce: bytes) -> bytes:
        return signature_of(self.key, nonce)


@dataclass
class NatsToken:
    """A token that is replaced when it is renewed."""

    text: str
