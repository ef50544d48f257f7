"""Secrets of organizations as HTTP carries them."""

from pydantic import Field

from sandyard.server.api.models.base import Body, Model, Time
from sandyard.server.core.records import Secret

_HOSTS = "The hosts that it may be sent to: names, and `*.` for all below one."


class AddSecret(Body):
    """The body of a new secret."""

    name: str = Field(
        examples=["GITHUB"],
        description="Letters, digits and underscores; it is kept in upper case.",
    )
    value: str = Field(description="Never shown again.")
    hosts: list[str] = Field(examples=[["api.github.com"]], description=_HOSTS)


class ReplaceSecret(Body):
    """The body of a change: a new value, other hosts, or both."""

    value: str | None = Field(None, description="Never shown again. Default: as before.")
    hosts: list[str] | None = Field(None, description=f"{_HOSTS} Default: as before.")


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
