"""Secrets of organizations as HTTP carries them."""

from typing import Annotated

from pydantic import ConfigDict, Field

from sandyard.server.api.models.base import NAME_OF_HOST, ONE_LINE, Body, Model, Time, at_least_one
from sandyard.server.core.records import Secret
from sandyard.server.service.network.secrets import HOSTS_MAX, SECRET_NAME, VALUE_MAX

_HOSTS = "The hosts that it may be sent to: names, and `*.` for all below one."
Value = Annotated[
    str, Field(json_schema_extra={"minLength": 1, "maxLength": VALUE_MAX, "pattern": ONE_LINE})
]
Hosts = Annotated[
    list[
        Annotated[str, Field(json_schema_extra={"maxLength": 253, "pattern": f"^{NAME_OF_HOST}$"})]
    ],
    Field(json_schema_extra={"minItems": 1, "maxItems": HOSTS_MAX}),
]


class AddSecret(Body):
    """The body of a new secret."""

    name: str = Field(
        examples=["GITHUB"],
        description="Letters, digits and underscores; it is kept in upper case.",
        json_schema_extra={"pattern": f"^{SECRET_NAME.replace('A-Z', 'A-Za-z')}$"},
    )
    value: Value = Field(description="Never shown again.")
    hosts: Hosts = Field(examples=[["api.github.com"]], description=_HOSTS)


class ReplaceSecret(Body):
    """The body of a change: a new value, other hosts, or both."""

    model_config = ConfigDict(json_schema_extra=at_least_one("value", "hosts"))

    value: Value | None = Field(None, description="Never shown again. Default: as before.")
    hosts: Hosts | None = Field(None, description=f"{_HOSTS} Default: as before.")


class SecretOut(Model):
    """A secret, without its value."""

    id: str
    name: str
    hosts: list[str]
    created_at: Time
    changed_at: Time
    last_used_at: Time | None = Field(
        description="When a connection that it was sent over last ended; it may be seconds late."
    )


def secret_out(secret: Secret) -> SecretOut:
    """Return a secret as it is shown."""
    return SecretOut(
        id=secret.id,
        name=secret.name,
        hosts=list(secret.hosts),
        created_at=secret.created_at,
        changed_at=secret.changed_at,
        last_used_at=secret.last_used_at,
    )
