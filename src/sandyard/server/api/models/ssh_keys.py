"""SSH keys as HTTP carries them."""

from typing import Literal

from pydantic import AliasChoices, Field

from sandyard.server.api.models.base import Body, Model, Time, Title
from sandyard.server.core.records import (
    SshKey,
)
from sandyard.server.core.sshkeys import KEY_TYPES

_TYPES = "|".join(sorted(one.replace(".", r"\.") for one in KEY_TYPES))
_PUBLIC_KEY = rf"^({_TYPES}) AAAA[A-Za-z0-9+/]+={{0,2}}( [^\x00\r\n]*)?\s*$"


class CreateSshKey(Body):
    """The body of a new SSH key."""

    name: Title = Field(examples=["laptop"])
    public_key: str = Field(
        validation_alias=AliasChoices("publicKey", "public_key"),
        examples=[
            "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAAIP6E1S+w0BGuWIOm2fiZq9sacuQWHVLwk5hXJrwPwmad me"
        ],
        description="An OpenSSH public key on one line. RSA keys have 2048 bits or more.",
        json_schema_extra={"pattern": _PUBLIC_KEY},
    )


class SshKeyOut(Model):
    """An SSH key; some clients look for the names with underscores."""

    id: str
    name: str
    fingerprint: str
    key_type: str
    created_at: Time
    last_used_at: Time | None
    key_type_: str = Field(alias="key_type")
    created_at_: Time = Field(alias="created_at")
    last_used_at_: Time | None = Field(alias="last_used_at")


def ssh_key_out(key: SshKey) -> SshKeyOut:
    """Return an SSH key as it is shown."""
    return SshKeyOut.model_validate(
        {
            "id": key.id,
            "name": key.name,
            "fingerprint": key.fingerprint,
            "keyType": key.key_type,
            "createdAt": key.created_at,
            "lastUsedAt": key.last_used_at,
            "key_type": key.key_type,
            "created_at": key.created_at,
            "last_used_at": key.last_used_at,
        }
    )


class SuccessOut(Model):
    """It is done."""

    success: Literal[True] = True
