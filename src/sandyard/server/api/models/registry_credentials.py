"""Credentials for registries as HTTP carries them."""

from pydantic import Field

from sandyard.server.api.models.base import PRINTABLE, Body, Model, Time
from sandyard.server.core.records import RegistryCredential
from sandyard.server.service.builds.credentials import REGISTRY, TEXT_MAX


class AddRegistryCredential(Body):
    """The body of a new credential."""

    host: str = Field(
        examples=["ghcr.io"],
        description="The registry, with its port if any.",
        json_schema_extra={"maxLength": 255, "pattern": f"^{REGISTRY}$"},
    )
    username: str = Field(
        json_schema_extra={"minLength": 1, "maxLength": TEXT_MAX, "pattern": "^[!-9;-~]+$"}
    )
    password: str = Field(
        description="Never shown again. Often a token.",
        json_schema_extra={"minLength": 1, "maxLength": TEXT_MAX, "pattern": PRINTABLE},
    )


class RegistryCredentialOut(Model):
    """A credential, without its password."""

    id: str
    host: str
    username: str
    created_at: Time


def credential_out(credential: RegistryCredential) -> RegistryCredentialOut:
    """Return a credential as it is shown."""
    return RegistryCredentialOut(
        id=credential.id,
        host=credential.host,
        username=credential.username,
        created_at=credential.created_at,
    )
