"""API keys as HTTP carries them."""

from typing import Annotated, Literal

from pydantic import Field

from sandyard.server.api.models.base import Body, Data, Model, Time, Title
from sandyard.server.core.records import (
    ApiKey,
)
from sandyard.server.core.scopes import SCOPES

Scope = Annotated[str, Field(json_schema_extra={"enum": [*sorted(SCOPES)]})]
ExpiresIn = Annotated[str, Field(json_schema_extra={"pattern": "^([1-9][0-9]{0,2}[dmy]|never)$"})]
"""Days, months or years of the calendar."""


class CreateApiKey(Body):
    """The body of a new API key."""

    name: Title = Field(examples=["ci"])
    scopes: list[Scope] = Field([], description="None: everything the creator may.")
    expires_in: ExpiresIn | None = Field(None, examples=["30d", "12m", "1y", "never"])
    is_test: bool = False
    project_id: str | None = None
    format: Literal["sandyard", "e2b"] = Field(
        "sandyard",
        description="`e2b`: a key that begins with `e2b_`, as clients of the E2B API insist on.",
    )


class PatchApiKey(Body):
    """The body of a change: what is left out stays as it is."""

    name: Title | None = None
    scopes: list[Scope] | None = Field(None, json_schema_extra={"minItems": 1})
    project_id: str | None = None
    expires_in: ExpiresIn | None = Field(
        None,
        description="Counted from now. Months and years are of the calendar.",
        examples=["30d", "12m", "1y", "never"],
    )


class ApiKeyOut(Model):
    """An API key, without its secret."""

    id: str
    name: str
    key_prefix: str
    scopes: list[str]
    project_id: str | None
    expires_at: Time | None
    last_used_at: Time | None
    revoked_at: Time | None
    created_at: Time
    status: Literal["active", "expired", "revoked"]
    is_test: bool
    owner_user_id: str
    owner_display_name: str
    owner_email: str


class NewApiKeyOut(ApiKeyOut):
    """An API key with its secret, which is shown only now."""

    key: str


class NewApiKey(Data[NewApiKeyOut]):
    """The envelope of a secret."""

    message: str = "Store this key securely. You will not be able to see it again."


def api_key_values(
    key: ApiKey, status: Literal["active", "expired", "revoked"]
) -> dict[str, object]:
    """Return what is shown of a key."""
    return {
        "id": key.id,
        "name": key.name,
        "key_prefix": key.prefix,
        "scopes": list(key.scopes),
        "project_id": key.project_id,
        "expires_at": key.expires_at,
        "last_used_at": key.last_used_at,
        "revoked_at": key.revoked_at,
        "created_at": key.created_at,
        "status": status,
        "is_test": key.is_test,
        "owner_user_id": key.owner_user_id,
        "owner_display_name": key.owner_display_name,
        "owner_email": key.owner_email,
    }
